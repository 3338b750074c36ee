//! One run of the trainer: its recipe and data, and everything that looks at it.

use candle_core::Device;
use vq_data::{Source, Splits};
use vq_train::{
    MetricsFile, Observer, Recipe, RunFolder, Tokenizer, TrainConfig, Trainable, Trainer,
    available_memory,
};

use crate::cli::LogFormat;
use crate::error::Result;
use crate::observers::{Reporter, Subject};
use crate::run_args::RecipeArgs;
use crate::stop::Stop;
use crate::{data_args, output, recipes};

/// The help of `--config` where [`prepare`] has the last word.
pub(crate) const CONFIG: &str = "A recipe: a TOML file or the name of an embedded one (see `vq configs`) \
    [default: cifar10, or shapes with the built-in data]";

/// A recipe that has been checked, and its data.
pub(crate) struct Prepared {
    pub(crate) recipe: Recipe,
    pub(crate) splits: Splits,
    /// What the recipe is called.
    pub(crate) name: String,
}

/// The recipe that is asked for, or that of the run that is to go on, or the one that suits the data;
/// `lay_over` adds the flags.
pub(crate) fn prepare(
    args: &RecipeArgs,
    resumed: Option<&RunFolder>,
    lay_over: impl Fn(Recipe) -> Result<Recipe>,
    format: LogFormat,
) -> Result<Prepared> {
    let (base, mut name) = match (&args.config, resumed) {
        (Some(name), _) => (recipes::load(name)?, name.clone()),
        (None, Some(run)) => (run.recipe()?, run.recipe_file().display().to_string()),
        (None, None) => (recipes::load(recipes::DEFAULT)?, recipes::DEFAULT.to_owned()),
    };
    let mut recipe = lay_over(base)?;
    let source = recipe.data.source.clone();
    let made_for_it = match source.resolve(&recipe.data.dir) {
        Source::Shapes => Some(recipes::SHAPES),
        Source::PlainShapes => Some(recipes::PLAIN_SHAPES),
        _ => None,
    };
    let is_chosen = args.config.is_some() || resumed.is_some();
    let other = made_for_it.filter(|_| !is_chosen);
    if let Some(other) = other {
        recipe = lay_over(recipes::load(other)?)?;
        recipe.data.source = source;
        other.clone_into(&mut name);
    }
    recipe.validate()?;
    let splits = data_args::open(&recipe.data, recipe.model.image_size, format)?;
    if other.is_some() {
        let default = recipes::DEFAULT;
        let message = format!(
            "using the recipe `{name}`, made for the built-in shapes ({} epochs, batches of {}), and not the \
             default `{default}`; --config {default} takes that one",
            recipe.train.epochs, recipe.train.batch_size
        );
        output::note(format, &message)?;
    }
    // So that resuming does not depend on what is on disk by then.
    recipe.data.source = recipe.data.source.resolve(&recipe.data.dir);
    Ok(Prepared { recipe, splits, name })
}

/// How a run is watched and stopped.
pub(crate) struct Watch<'a> {
    pub(crate) format: LogFormat,
    pub(crate) stop: &'a Stop,
    pub(crate) subject: Subject,
}

/// A trainer of `task` for the run in a folder; it writes the metrics file and `pictures`, reports, and
/// obeys Ctrl-C.
pub(crate) fn trainer<T: Trainable>(
    task: T,
    config: &TrainConfig,
    run: &RunFolder,
    pictures: impl Observer + 'static,
    watch: Watch<'_>,
) -> vq_train::Result<Trainer<T>> {
    Ok(Trainer::new(task, config, run.path())?
        .with_observer(MetricsFile::new(run.metrics_file(), config.log_every))
        .with_observer(pictures)
        .with_observer(Reporter::new(watch.format, config.log_every, watch.subject))
        .with_stop_flag(watch.stop.flag.clone()))
}

/// Takes up a run from its last checkpoint; whether anything is left to do. Says so where nothing is, and where
/// everything is.
pub(crate) fn resume<T: Trainable>(
    trainer: &mut Trainer<T>,
    epochs: usize,
    format: LogFormat,
) -> Result<bool> {
    if trainer.resume()?.is_none() {
        output::note(format, "there is no checkpoint yet: starting from the beginning")?;
    }
    let is_done = trainer.progress().epoch >= epochs;
    if is_done {
        output::note(format, &format!("all {epochs} epochs are done; --epochs N goes on to N"))?;
    }
    Ok(!is_done)
}

/// Warns where training will take more memory than is free.
pub(crate) fn note_memory(
    tokenizer: &Tokenizer,
    train: &TrainConfig,
    device: &Device,
    format: LogFormat,
) -> Result<()> {
    let memory = tokenizer.memory()?;
    match available_memory().filter(|available| device.is_cpu() && memory.total() > *available) {
        None => Ok(()),
        Some(available) => {
            let message = format!(
                "training will take about {} of memory and {} are free; take fewer images a step (--batch-size, \
                 now {}) or run them through the model in more parts (--set train.accumulate=N, now {})",
                output::bytes(memory.total()),
                output::bytes(available),
                train.batch_size,
                train.accumulate
            );
            output::note(format, &message)
        }
    }
}

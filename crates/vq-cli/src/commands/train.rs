//! `vq train`

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use vq_data::{Source, Splits};
use vq_train::{MetricsFile, Outcome, Recipe, RunFolder, Tokenizer, Trainer, available_memory};

use crate::cli::LogFormat;
use crate::compute::{self, ComputeArgs};
use crate::data_args::{self, DataArgs};
use crate::error::Result;
use crate::observers::{Pictures, Reporter, Subject};
use crate::stop::Stop;
use crate::{output, recipes};

/// Train a VQ-VAE.
///
/// Writes into the run folder (--out): `config.toml`, `metrics.jsonl`, `epoch_N_orig.png` and
/// `epoch_N_recon.png` after every epoch (the same test images each time), `curves.svg`, `codebook.svg`,
/// and checkpoints, with the links `last` and `best`. With several levels of codes also
/// `epoch_N_recon_level0.png`, …, decoded from one level alone (0 = bottom), and `codebook.1.svg`, ….
///
/// Ctrl-C or SIGTERM finish the step, save a checkpoint and end with exit code 130 or 143, ready for
/// --resume; a second one ends at once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vq train                                    CIFAR-10 if it is on disk, else the built-in shapes
  vq train --epochs 5 --out results/short
  vq train --resume                           go on with the run in results
  vq train --data folder:photos --set model.image_size=[64,64]
  vq train --set model.levels.0.quantizer.codebook_size=1024")]
pub(crate) struct TrainArgs {
    /// A recipe: a TOML file or the name of an embedded one (see `vq configs`) [default: cifar10, or
    /// shapes with the built-in data].
    #[arg(long, value_name = "FILE|NAME")]
    config: Option<String>,

    /// Set any key of the recipe; may be given several times, and comes before the flags below.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,

    /// Passes over the training images [default: the recipe's, 50 in cifar10].
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,

    /// Images per step [default: the recipe's, 128 in cifar10].
    #[arg(long, alias = "batch_size", value_name = "N")]
    batch_size: Option<usize>,

    /// The highest learning rate [default: the recipe's].
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,

    /// Decides the initial weights, the order of the images, the flips and the revived codes
    /// [default: the recipe's].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// The run folder.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    out: PathBuf,

    /// Go on with the run in --out from its newest checkpoint, with its own recipe.
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,

    /// Replace the run in --out, if there is one.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    data: DataArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

pub(crate) fn run(args: &TrainArgs, format: LogFormat) -> Result<ExitCode> {
    let stop = Stop::listen()?;
    let device = args.compute.start()?;
    let resumed = if args.resume { Some(RunFolder::open(&args.out)?) } else { None };
    if !args.resume && !args.overwrite {
        RunFolder::require_free(&args.out)?;
    }
    let (mut recipe, splits) = prepare(args, resumed.as_ref(), format)?;
    // So that resuming does not depend on what is on disk by then.
    recipe.data.source = recipe.data.source.resolve(&recipe.data.dir);
    let tokenizer = Tokenizer::new(&recipe, &splits, &device)?;

    // Last, so that nothing is left behind (or cleared away) where anything of the above is refused.
    let run = match resumed {
        None => RunFolder::create(&args.out, &recipe, args.overwrite)?,
        Some(run) => {
            for change in recipe.check_resume(&run.recipe()?)? {
                output::note(format, &format!("resuming with another {change}"))?;
            }
            run
        }
    };
    describe(&recipe, &splits, &tokenizer, &device, format)?;
    let mut trainer = Trainer::new(tokenizer, &recipe.train, run.path())?
        .with_observer(MetricsFile::new(run.metrics_file(), recipe.train.log_every))
        .with_observer(Pictures::new(&run))
        .with_observer(Reporter::new(format, recipe.train.log_every, Subject::Tokenizer))
        .with_stop_flag(stop.flag.clone());
    if args.resume {
        trainer.resume()?;
        recipe.save(&run.recipe_file())?;
        if trainer.progress().epoch >= recipe.train.epochs {
            let done = recipe.train.epochs;
            output::note(format, &format!("all {done} epochs are done; --epochs N goes on to N"))?;
        }
    }
    match trainer.run()? {
        Outcome::Finished => Ok(ExitCode::SUCCESS),
        Outcome::Interrupted => Ok(stop.exit_code().into()),
    }
}

/// The recipe that the flags ask for, and its data. `auto` is left to be resolved.
fn prepare(
    args: &TrainArgs,
    resumed: Option<&RunFolder>,
    format: LogFormat,
) -> Result<(Recipe, Splits)> {
    let base = match (&args.config, resumed) {
        (Some(name), _) => recipes::load(name)?,
        (None, Some(run)) => run.recipe()?,
        (None, None) => recipes::load(recipes::DEFAULT)?,
    };
    let mut recipe = args.apply(base)?;
    let source = recipe.data.source.clone();
    let takes_shapes = source.resolve(&recipe.data.dir) == Source::Shapes;
    let switches = takes_shapes && args.config.is_none() && resumed.is_none();
    if switches {
        recipe = args.apply(recipes::load(recipes::SHAPES)?)?;
        recipe.data.source = source;
    }
    recipe.validate()?;
    let splits = data_args::open(&recipe.data, recipe.model.image_size, format)?;
    if switches {
        let (name, default) = (recipes::SHAPES, recipes::DEFAULT);
        let message = format!(
            "using the recipe `{name}`, made for the built-in shapes ({} epochs, batches of {}), and not the \
             default `{default}`; --config {default} takes that one",
            recipe.train.epochs, recipe.train.batch_size
        );
        output::note(format, &message)?;
    }
    Ok((recipe, splits))
}

impl TrainArgs {
    /// Lays `--set` and then the other flags over a recipe.
    fn apply(&self, mut recipe: Recipe) -> Result<Recipe> {
        for assignment in &self.overrides {
            recipe = recipe.with_override(assignment)?;
        }
        let train = &mut recipe.train;
        train.epochs = self.epochs.unwrap_or(train.epochs);
        train.batch_size = self.batch_size.unwrap_or(train.batch_size);
        train.lr = self.lr.unwrap_or(train.lr);
        train.seed = self.seed.unwrap_or(train.seed);
        train.precision = self.compute.precision.unwrap_or(train.precision);
        self.data.apply(&mut recipe.data);
        Ok(recipe)
    }
}

/// Says what will be trained on what.
fn describe(
    recipe: &Recipe,
    splits: &Splits,
    tokenizer: &Tokenizer,
    device: &Device,
    format: LogFormat,
) -> Result<()> {
    let memory = tokenizer.memory()?;
    if device.is_cpu()
        && let Some(available) = available_memory()
        && memory.total() > available
    {
        let train = &recipe.train;
        let message = format!(
            "training will take about {} of memory and {} are free; take fewer images a step (--batch-size, \
             now {}) or run them through the model in more parts (--set train.accumulate=N, now {})",
            output::bytes(memory.total()),
            output::bytes(available),
            train.batch_size,
            train.accumulate
        );
        output::note(format, &message)?;
    }
    if format == LogFormat::Json {
        return Ok(());
    }
    output::line(format!(
        "memory  about {}: {} for a batch's activations, {} for parameters and moments, {} for images",
        output::bytes(memory.total()),
        output::bytes(memory.activations),
        output::bytes(memory.parameters),
        output::bytes(memory.batches + memory.data)
    ))?;
    let model = tokenizer.model();
    let parameters: usize = model.parameters().values().map(|var| var.elem_count()).sum();
    output::line(format!(
        "data    {} ({} images), {} ({})",
        splits.train.name(),
        splits.train.len(),
        splits.test.name(),
        splits.test.len()
    ))?;
    output::line(format!(
        "model   {} parameters, {} multiply-adds and {} bits an image",
        output::count(parameters as u64),
        output::count(model.multiply_adds()?),
        model.config().bits_per_image()
    ))?;
    output::line(format!(
        "train   {} epochs, batches of {}, seed {}; {} on the {}",
        recipe.train.epochs,
        recipe.train.batch_size,
        recipe.train.seed,
        recipe.train.precision,
        compute::name(device)
    ))
}

//! `vq train-prior`

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Device;
use clap::{Args, ValueEnum};
use vq_train::{Outcome, PriorLevel, PriorRecipe, PriorTask, RunFolder, model_hash, resolve_model};

use crate::cli::LogFormat;
use crate::compute::{self, ComputeArgs};
use crate::error::Result;
use crate::observers::{PriorPictures, Subject};
use crate::run_args::{RecipeArgs, RunArgs};
use crate::stop::Stop;
use crate::training::{self, Watch};
use crate::{output, recipes};

/// Train a prior over a model's codes, to draw new images from (see `vq sample`).
///
/// Reads the codes that `vq encode --dataset train` wrote. Writes into the run folder (--out):
/// `config.toml`, `metrics.jsonl`, `epoch_N_samples.png` (new images; of a top prior with up to 16 classes a
/// column of each), `curves.svg`, and checkpoints, with the links `last` and `best`.
///
/// A model of several levels needs a prior for each: a top prior, and for every level below one that sees
/// the whole grids of those above (--level).
///
/// Ctrl-C or SIGTERM finish the step, save a checkpoint and end with exit code 130 or 143, ready for
/// --resume; a second one ends at once.
#[derive(Debug, Args)]
#[command(mut_arg("config", |config| config.help(CONFIG)))]
#[command(mut_arg("precision", |precision| precision.help(PRECISION)))]
#[command(mut_arg("out", |out| out.default_value("results-prior")))]
#[command(after_help = "Examples:
  vq train-prior --model results --codes codes
  vq train-prior --model results --codes codes --held-out codes-test --kind transformer
  vq train-prior --model results --codes codes --level 0 --out results/bottom
  vq train-prior --resume")]
pub(crate) struct TrainPriorArgs {
    #[command(flatten)]
    recipe: RecipeArgs,

    /// The model that made the codes: a run's folder (its best checkpoint), a checkpoint's or a model's
    /// [default: the recipe's, results].
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,

    /// The codes to learn from [default: the recipe's, codes].
    #[arg(long, value_name = "FOLDER")]
    codes: Option<PathBuf>,

    /// Codes to judge by, of `vq encode --dataset test` [default: a tenth of --codes, images drawn from all
    /// of them, the same ones in every run].
    #[arg(long, value_name = "FOLDER")]
    held_out: Option<PathBuf>,

    /// The network [default: the recipe's, pixelcnn].
    #[arg(long, value_enum, value_name = "KIND")]
    kind: Option<Kind>,

    /// The level of codes to learn: top, or its number from 0 (the bottom) [default: the recipe's, top].
    #[arg(long, value_name = "LEVEL")]
    level: Option<PriorLevel>,

    #[command(flatten)]
    run: RunArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Where the default is not simply that of the recipe.
const CONFIG: &str = "A recipe: a TOML file or the name of an embedded one (see `vq configs`) [default: that of \
    the --kind, prior-pixelcnn or prior-transformer]";

/// What it reaches.
const PRECISION: &str = "f32 or bf16: the format of the factors of the convolutions of the tokenizer that decodes \
    the pictures of new images; the prior is trained in f32 in any case [default: f32]";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Pixelcnn,
    Transformer,
}

pub(crate) fn run(args: &TrainPriorArgs, format: LogFormat) -> Result<ExitCode> {
    let stop = Stop::listen()?;
    let device = args.compute.start()?;
    let resumed = args.run.resumed()?;
    let mut recipe = args.recipe(resumed.as_ref())?;
    let folder = resolve_model(&recipe.data.model)?;
    let model = args.compute.load(&folder, &device)?;
    let task = PriorTask::new(&mut recipe, model, &model_hash(&folder)?, &device)?;

    // Last, so that nothing is left behind (or cleared away) where anything of the above is refused.
    let run = match resumed {
        None => RunFolder::create_prior(&args.run.out, &recipe, args.run.overwrite)?,
        Some(run) => {
            for change in recipe.check_resume(&run.prior_recipe()?)? {
                output::note(format, &format!("resuming with another {change}"))?;
            }
            run
        }
    };
    describe(&recipe, &task, &device, format)?;
    let train = recipe.train.resolve();
    let model = recipe.data.model.clone();
    let watch = Watch { format, stop: &stop, subject: Subject::Prior { model } };
    let pictures = PriorPictures::new(&run, task.prior().config());
    let mut trainer = training::trainer(task, &train, &run, pictures, watch)?;
    if args.run.resume && training::resume(&mut trainer, train.epochs, format)? {
        recipe.save(&run.recipe_file())?;
    }
    match trainer.run()? {
        Outcome::Finished => Ok(ExitCode::SUCCESS),
        Outcome::Interrupted => Ok(stop.exit_code().into()),
    }
}

impl TrainPriorArgs {
    /// The recipe that the flags ask for.
    fn recipe(&self, resumed: Option<&RunFolder>) -> Result<PriorRecipe> {
        let mut recipe = match (&self.recipe.config, resumed) {
            (Some(name), _) => recipes::load_prior(name)?,
            (None, Some(run)) => run.prior_recipe()?,
            (None, None) => recipes::load_prior(match self.kind {
                Some(Kind::Transformer) => recipes::TRANSFORMER,
                _ => recipes::PIXELCNN,
            })?,
        };
        match self.kind {
            Some(Kind::Pixelcnn) => recipe = recipe.with_kind("pixelcnn")?,
            Some(Kind::Transformer) => recipe = recipe.with_kind("transformer")?,
            None => {}
        }
        recipe = self.recipe.set(recipe, PriorRecipe::with_override)?;
        let data = &mut recipe.data;
        data.model = self.model.clone().unwrap_or(std::mem::take(&mut data.model));
        data.codes = self.codes.clone().unwrap_or(std::mem::take(&mut data.codes));
        data.held_out = self.held_out.clone().or(data.held_out.take());
        data.level = self.level.unwrap_or(data.level);
        let train = &mut recipe.train;
        self.recipe.apply(&mut train.epochs, &mut train.batch_size, &mut train.lr);
        self.run.apply(&mut train.seed);
        Ok(recipe)
    }
}

/// Says what will be trained on what.
fn describe(
    recipe: &PriorRecipe,
    task: &PriorTask,
    device: &Device,
    format: LogFormat,
) -> Result<()> {
    if format == LogFormat::Json {
        return Ok(());
    }
    let (train, held_out) = task.images();
    let config = task.prior().config();
    let [h, w] = config.grid;
    output::line(format!(
        "codes   level {} of {} images: {h}×{w} positions, {:?} codes, {} classes; {held_out} images held out",
        task.level(),
        train,
        config.codebook_sizes,
        config.class_count
    ))?;
    output::line(format!(
        "unigram {:.3} bits per held-out code: what the codes' frequencies alone give",
        task.unigram_bits()
    ))?;
    let parameters: usize = task.prior().parameters().values().map(|var| var.elem_count()).sum();
    output::line(format!("prior   {} parameters", output::count(parameters as u64)))?;
    output::line(format!(
        "train   {} epochs, batches of {}, seed {}; on the {}",
        recipe.train.epochs,
        recipe.train.batch_size,
        recipe.train.seed,
        compute::name(device)
    ))
}

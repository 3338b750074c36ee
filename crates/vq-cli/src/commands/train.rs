//! `vq train`

use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use vq_data::Splits;
use vq_train::{Outcome, Recipe, RunFolder, Tokenizer};

use super::inspect::count;
use crate::cli::LogFormat;
use crate::compute::{self, ComputeArgs};
use crate::data_args::DataArgs;
use crate::error::Result;
use crate::observers::{Pictures, Subject};
use crate::output;
use crate::run_args::{RecipeArgs, RunArgs};
use crate::stop::Stop;
use crate::training::{self, Prepared, Watch};

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
#[command(mut_arg("config", |config| config.help(training::CONFIG)))]
#[command(mut_arg("epochs", |epochs| epochs.help(EPOCHS)))]
#[command(after_help = "Examples:
  vq train                                    CIFAR-10 if it is on disk, else the built-in shapes
  vq train --epochs 5 --out results/short
  vq train --resume                           go on with the run in results
  vq train --data folder:photos --set model.image_size=[64,64]
  vq train --set model.levels.0.quantizer.codebook_size=1024")]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    recipe: RecipeArgs,

    #[command(flatten)]
    run: RunArgs,

    #[command(flatten)]
    data: DataArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Where the default is not simply that of the recipe.
const EPOCHS: &str = "Passes over the training images [default: the recipe's, 50 in cifar10]";

pub(crate) fn run(args: &TrainArgs, format: LogFormat) -> Result<ExitCode> {
    let stop = Stop::listen()?;
    let device = args.compute.start()?;
    let resumed = args.run.resumed()?;
    let Prepared { recipe, splits, .. } =
        training::prepare(&args.recipe, resumed.as_ref(), |recipe| args.apply(recipe), format)?;
    let tokenizer = Tokenizer::new(&recipe, &splits, &device)?;

    // Last, so that nothing is left behind (or cleared away) where anything of the above is refused.
    let run = match resumed {
        None => RunFolder::create(&args.run.out, &recipe, args.run.overwrite)?,
        Some(run) => {
            for change in recipe.check_resume(&run.recipe()?)? {
                output::note(format, &format!("resuming with another {change}"))?;
            }
            run
        }
    };
    describe(&recipe, &splits, &tokenizer, &device, format)?;
    let watch = Watch { format, stop: &stop, subject: Subject::Tokenizer };
    let mut trainer =
        training::trainer(tokenizer, &recipe.train, &run, Pictures::new(&run), watch)?;
    if args.run.resume && training::resume(&mut trainer, recipe.train.epochs, format)? {
        recipe.save(&run.recipe_file())?;
    }
    match trainer.run()? {
        Outcome::Finished => Ok(ExitCode::SUCCESS),
        Outcome::Interrupted => Ok(stop.exit_code().into()),
    }
}

impl TrainArgs {
    /// Lays `--set` and then the other flags over a recipe.
    fn apply(&self, recipe: Recipe) -> Result<Recipe> {
        let mut recipe = self.recipe.set(recipe, Recipe::with_override)?;
        let train = &mut recipe.train;
        self.recipe.apply(&mut train.epochs, &mut train.batch_size, &mut train.lr);
        self.run.apply(&mut train.seed);
        train.precision = self.compute.precision.unwrap_or(train.precision);
        self.data.apply(&mut recipe.data)?;
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
    training::note_memory(tokenizer, &recipe.train, device, format)?;
    if format == LogFormat::Json {
        return Ok(());
    }
    let memory = tokenizer.memory()?;
    output::line(format!(
        "memory  about {}: {} for a batch's activations, {} for parameters and moments, {} for images",
        output::bytes(memory.total()),
        output::bytes(memory.activations),
        output::bytes(memory.parameters),
        output::bytes(memory.batches + memory.data)
    ))?;
    let model = tokenizer.model();
    let beside = match count(model.buffers()) {
        0 => String::new(),
        buffers => format!(" and {} kept beside them", output::count(buffers as u64)),
    };
    output::line(format!(
        "data    {} ({} images), {} ({})",
        splits.train.name(),
        splits.train.len(),
        splits.test.name(),
        splits.test.len()
    ))?;
    output::line(format!(
        "model   {} parameters{beside}, {} multiply-adds and {} bits an image",
        output::count(count(model.parameters()) as u64),
        output::count(model.multiply_adds()?),
        output::bits(model.config().bits_per_image())
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

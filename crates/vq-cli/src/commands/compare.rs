//! `vq compare`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use serde_json::{Value, json};
use vq_data::Splits;
use vq_train::{
    Comparison, Outcome, PlannedRun, Recipe, RunFolder, RunState, Summary, Tokenizer, Variants,
};
use vq_viz::{Compared, save_comparison};

use crate::cli::LogFormat;
use crate::compute::{self, ComputeArgs};
use crate::data_args::DataArgs;
use crate::error::{Error, Result};
use crate::observers::{Pictures, Subject};
use crate::run_args::RecipeArgs;
use crate::stop::Stop;
use crate::training::{self, Prepared, Watch};
use crate::{file, output, recipes};

/// Compare quantizers: train the same network with each, over several seeds, at equal bits an image.
///
/// Writes into --out: `compare.md` (the table, with what differs between the variants), `compare.csv`,
/// `compare-runs.csv` (a line for each run) and `compare.png`, all anew after every run, and a run folder
/// for each run, `NAME-SEED`, as `vq train` writes it.
///
/// The same command again goes on where it stopped, also within a run, and leaves out what is done. A run
/// that fails (its loss is no longer finite) is named in the table and does not stop the others; it is not
/// tried again unless its folder is removed.
///
/// Ctrl-C or SIGTERM finish the step, save a checkpoint and end with exit code 130 or 143; a second one ends
/// at once.
#[derive(Debug, Args)]
#[command(mut_arg("config", |config| config.help(training::CONFIG)))]
#[command(mut_arg("epochs", |epochs| epochs.help(EPOCHS)))]
#[command(after_help = "Examples:
  vq compare                                       every kind of quantizer, 3 seeds of 2 epochs
  vq compare --quantizers vector,finite-scalar,sim --seeds 5 --epochs 10 --out results/three
  vq compare --quantizers vector,vector-gradient,vector-cosine,vector-rotation
  vq configs compare > mine.toml && vq compare --variants mine.toml")]
pub(crate) struct CompareArgs {
    /// The variants to compare, by their names in --variants, or `all` [default: those that are not
    /// optional: one for each kind of quantizer].
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    quantizers: Vec<String>,

    /// Runs of each: with the recipe's seed (0) and the numbers that follow it.
    #[arg(long, default_value_t = 3, value_name = "N")]
    seeds: u64,

    /// What the variants are: a TOML file or `compare` (see `vq configs compare`).
    #[arg(long, default_value = recipes::COMPARE, value_name = "FILE|NAME")]
    variants: String,

    /// Where the tables and the run folders go.
    #[arg(long, default_value = "results/compare", value_name = "FOLDER")]
    out: PathBuf,

    /// Make all runs anew.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    recipe: RecipeArgs,

    #[command(flatten)]
    data: DataArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Where the default is not the recipe's.
const EPOCHS: &str = "Passes over the training images [default: that of --variants, 2]";

pub(crate) fn run(args: &CompareArgs, format: LogFormat) -> Result<ExitCode> {
    let stop = Stop::listen()?;
    let device = args.compute.start()?;
    let variants = recipes::load_variants(&args.variants)?;
    let chosen = variants.choose(&args.quantizers)?;
    let Prepared { recipe, splits, name } =
        training::prepare(&args.recipe, None, |recipe| args.apply(&variants, &recipe), format)?;
    let comparison = Comparison::new(recipe, &variants.baseline, &chosen, args.seeds, &args.out)?;
    // Whatever the data and the base recipe refuse is refused here, before anything is trained.
    let tokenizer = Tokenizer::new(comparison.base(), &splits, &device)?;
    if args.overwrite {
        for run in comparison.runs() {
            RunFolder::create(&run.folder, &run.recipe, true)?;
        }
    }
    let mut states = comparison.states()?;
    file::make_folder(&args.out)?;
    training::note_memory(&tokenizer, &comparison.base().train, &device, format)?;
    drop(tokenizer);

    let conditions = conditions(&comparison, args.seeds, &name, &splits, &device);
    announce(&conditions, &states, format)?;
    let total = states.len();
    for (index, run) in comparison.runs().iter().enumerate() {
        if matches!(states.get(index), Some(RunState::Done(_) | RunState::Failed(_))) {
            continue;
        }
        start(run, index + 1, total, format)?;
        let watch = Watch { format, stop: &stop, subject: Subject::Compared };
        let state = train(run, &splits, &device, watch)?;
        let is_stopped = state == RunState::Begun;
        if let RunState::Failed(error) = &state {
            output::note(format, &format!("{}: {error}", run.folder.display()))?;
        }
        if let Some(slot) = states.get_mut(index) {
            *slot = state;
        }
        write(&args.out, &Summary::new(&comparison, &states, conditions.clone()))?;
        if is_stopped {
            output::note(format, "stopped; the same command goes on")?;
            return Ok(stop.exit_code().into());
        }
    }
    let summary = Summary::new(&comparison, &states, conditions);
    write(&args.out, &summary)?;
    report(&args.out, &summary, format)?;
    if states.iter().any(|state| matches!(state, RunState::Done(_))) {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Error::other(format!("all {total} runs failed: the notes above and the table say why")))
}

impl CompareArgs {
    /// Lays what all variants have in common, `--set` and then the other flags over a recipe.
    fn apply(&self, variants: &Variants, recipe: &Recipe) -> Result<Recipe> {
        let mut recipe = self.recipe.set(variants.common(recipe)?, Recipe::with_override)?;
        let train = &mut recipe.train;
        self.recipe.apply(&mut train.epochs, &mut train.batch_size, &mut train.lr);
        train.precision = self.compute.precision.unwrap_or(train.precision);
        self.data.apply(&mut recipe.data)?;
        Ok(recipe)
    }
}

/// Trains a run, or the rest of one: done, failed, or (interrupted) begun.
fn train(run: &PlannedRun, splits: &Splits, device: &Device, watch: Watch<'_>) -> Result<RunState> {
    let folder = match RunFolder::resume(&run.folder) {
        Err(vq_train::Error::NoRun { .. }) => RunFolder::create(&run.folder, &run.recipe, false)?,
        folder => folder?,
    };
    let attempt = || {
        let tokenizer = Tokenizer::new(&run.recipe, splits, device)?;
        let pictures = Pictures::new(&folder);
        let mut trainer =
            training::trainer(tokenizer, &run.recipe.train, &folder, pictures, watch)?;
        trainer.resume()?;
        trainer.run()
    };
    match attempt() {
        Ok(Outcome::Finished) => Ok(run.state()?),
        Ok(Outcome::Interrupted) => Ok(RunState::Begun),
        Err(error) => Ok(RunState::Failed(run.note_failure(error)?)),
    }
}

/// What is trained on what, in one line.
fn conditions(
    comparison: &Comparison,
    seeds: u64,
    recipe: &str,
    splits: &Splits,
    device: &Device,
) -> String {
    let base = comparison.base();
    let train = &base.train;
    format!(
        "Data: {} ({} images), judged on {} ({}). Recipe `{recipe}`, epochs: {}, images a step: {}, seeds: {seeds} \
         from {} on; {} on the {}.",
        splits.train.name(),
        splits.train.len(),
        splits.test.name(),
        splits.test.len(),
        train.epochs,
        train.batch_size,
        train.seed,
        train.precision,
        compute::name(device)
    )
}

fn announce(conditions: &str, states: &[RunState], format: LogFormat) -> Result<()> {
    let count = |is: fn(&RunState) -> bool| states.iter().filter(|state| is(state)).count();
    let done = count(|state| matches!(state, RunState::Done(_)));
    let failed = count(|state| matches!(state, RunState::Failed(_)));
    let text = format!(
        "{conditions}\ncompare {} runs: {done} done already, {failed} failed",
        states.len()
    );
    let record = json!({ "event": "compare-started", "runs": states.len(), "done": done,
        "failed": failed, "conditions": conditions });
    output::result(format, text, &record)
}

fn start(run: &PlannedRun, number: usize, total: usize, format: LogFormat) -> Result<()> {
    let bits = run.recipe.model.bits_per_image();
    let text = format!(
        "\nrun     {number} of {total}: {}, seed {}, {} bits an image",
        run.name,
        run.seed,
        output::bits(bits)
    );
    let record = json!({ "event": "compare-run", "run": number, "runs": total, "variant": run.name,
        "seed": run.seed, "bits_per_image": bits });
    output::result(format, text, &record)
}

/// The tables and the chart.
fn write(out: &Path, summary: &Summary) -> Result<()> {
    for (name, text) in [
        ("compare.md", summary.to_markdown()),
        ("compare.csv", summary.to_csv()),
        ("compare-runs.csv", summary.runs_to_csv()),
    ] {
        file::write_atomic(&out.join(name), text.as_bytes())?;
    }
    let rows: Vec<Compared> = summary
        .rows
        .iter()
        .map(|row| {
            let used: f64 = row.codes_in_use.iter().map(|spread| spread.mean).sum();
            Compared {
                label: row.name.clone(),
                value: row.psnr.map(|spread| (spread.mean, spread.deviation)),
                share: (row.done > 0).then(|| (used, row.codes() as f64)),
                is_baseline: row.is_baseline,
            }
        })
        .collect();
    let titles = ["PSNR on the test split, dB", "codes in use"];
    Ok(save_comparison(&out.join("compare.png"), "Quantizers compared", titles, &rows)?)
}

fn report(out: &Path, summary: &Summary, format: LogFormat) -> Result<()> {
    let rows: Vec<Value> = summary
        .rows
        .iter()
        .map(|row| {
            let means: serde_json::Map<String, Value> =
                row.means().iter().map(|(name, mean)| (name.to_owned(), mean.into())).collect();
            json!({ "variant": row.name, "bits_per_image": row.bits_per_image, "done": row.done,
                "failed": row.failures.len(), "means": means })
        })
        .collect();
    let record = json!({ "event": "compared", "path": output::path(out), "seeds": summary.seeds, "rows": rows });
    let text = format!(
        "\n{}\nwritten to {}, beside compare.csv, compare-runs.csv and compare.png",
        summary.to_markdown(),
        out.join("compare.md").display()
    );
    output::result(format, text, &record)
}

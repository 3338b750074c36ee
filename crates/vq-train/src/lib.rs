//! Training VQ-VAEs, and priors over their codes: recipe, loop, loss, optimizer, schedules, checkpoints,
//! metrics.
//!
//! A [`Recipe`] (TOML) decides everything. A [`Trainer`] trains a [`Trainable`], here a [`Tokenizer`]
//! or (from a [`PriorRecipe`]) a [`PriorTask`],
//! and tells its [`Observer`]s what happens as [`Event`]s; progress bars, logs and pictures are
//! observers, and so is the [`MetricsFile`]. A run resumes from its [`Checkpoints`] to the bit, also in
//! the middle of an epoch. A [`Comparison`] plans many runs of one recipe with several quantizers, and
//! a [`Summary`] says what came of them. This crate prints nothing.
//!
//! ```no_run
//! use candle_core::Device;
//! use vq_train::{MetricsFile, Outcome, Recipe, RunFolder, Tokenizer, Trainer, load_model};
//!
//! # fn main() -> vq_train::Result<()> {
//! let recipe = Recipe::default().with_override("train.epochs=5")?;
//! let run = RunFolder::create("results", &recipe, /* overwrite */ false)?;
//! let splits = recipe.data.open(recipe.model.image_size)?;
//! let tokenizer = Tokenizer::new(&recipe, &splits, &Device::Cpu)?;
//! let mut trainer = Trainer::new(tokenizer, &recipe.train, run.path())?
//!     .with_observer(MetricsFile::new(run.metrics_file(), recipe.train.log_every));
//! assert_eq!(trainer.run()?, Outcome::Finished);
//! let model = load_model("results", &Device::Cpu)?;
//! # Ok(())
//! # }
//! ```

mod bits;
mod checkpoint;
mod compare;
mod device_images;
pub mod doctor;
mod error;
mod evaluate;
mod event;
mod figures;
mod file;
mod hash;
mod jsonl;
mod loss;
mod memory;
mod metrics;
mod optimizer;
mod prior_codes;
mod prior_evaluation;
mod prior_recipe;
mod prior_task;
mod recipe;
mod recipe_toml;
mod run_folder;
mod schedule;
mod ssim;
mod state;
mod tokenizer;
mod trainable;
mod trainer;
mod unigram;

pub use bits::{BitsPerDim, bits_per_dim};
pub use checkpoint::{
    BEST, CHECKPOINTS, Checkpoints, LAST, is_prior, load_model, load_prior, require_model,
    require_prior, resolve_model,
};
pub use compare::{
    Comparison, PlannedRun, Row, RunFigures, RunState, Spread, Summary, Variant, Variants,
};
pub use device_images::DeviceImages;
pub use error::{Error, Result};
pub use evaluate::{EvaluateOptions, evaluate};
pub use event::{
    Best, CheckpointSaved, EpochFinished, EpochRecord, Event, Observer, RunEnded, RunStarted,
    StepFinished, Warning, WarningKind,
};
pub use figures::Figures;
pub use hash::model_hash;
pub use jsonl::{MetricsFile, read_metrics, record};
pub use memory::{MemoryEstimate, available_memory};
pub use metrics::{Metrics, Usage, is_codebook_figure};
pub use prior_evaluation::{PriorFigures, UnigramSource, evaluate_prior};
pub use prior_recipe::{PriorDataConfig, PriorLevel, PriorRecipe, PriorTrainConfig};
pub use prior_task::{PriorTask, decode};
pub use recipe::{DataConfig, KMeansConfig, Recipe, RevivalConfig, TrainConfig};
pub use run_folder::{METRICS_FILE, RECIPE_FILE, RunFolder};
pub use schedule::{Schedule, learning_rate};
pub use ssim::ssim;
pub use state::{Progress, Running, TRAINING_FILE, read_progress};
pub use tokenizer::{Part, Residue, Tokenizer};
pub use trainable::{Advice, Evaluation, Forward, Repeats, Samples, Trainable, Update};
pub use trainer::{Outcome, Trainer};
pub use unigram::UNIGRAM_FILE;

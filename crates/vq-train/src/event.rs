//! What a run says about itself, and who listens.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Evaluation, Metrics, Usage};

/// Something that looks at training: a progress bar, a log, a metrics file, pictures. An error that
/// it returns ends the run.
pub trait Observer {
    /// Called for every event, in order, on the training thread.
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

impl<O: Observer + ?Sized> Observer for Box<O> {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        (**self).observe(event)
    }
}

/// What a run says about itself. Steps, epochs and batches are counted from 1; `step` is the number
/// of steps that are done.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Before the first step of this call of the trainer.
    RunStarted(RunStarted<'a>),
    /// After every step.
    StepFinished(StepFinished<'a>),
    /// After the last step of every epoch, and its evaluation if it is due.
    EpochFinished(EpochFinished<'a>),
    /// A checkpoint is on disk, whole.
    CheckpointSaved(CheckpointSaved<'a>),
    /// Something that the user should know and the run goes on with.
    Warning(Warning<'a>),
    /// All epochs are done and saved.
    RunFinished(RunEnded<'a>),
    /// The stop flag was raised; the run is saved and can be resumed.
    RunInterrupted(RunEnded<'a>),
}

/// See [`Event::RunStarted`].
#[derive(Clone, Copy, Debug)]
pub struct RunStarted<'a> {
    /// The run folder.
    pub run: &'a Path,
    /// The checkpoint that it goes on from.
    pub resumed_from: Option<&'a Path>,
    /// Steps that are done already.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epochs that are done already.
    pub epoch: usize,
    /// Epochs of the whole run.
    pub epochs: usize,
    /// Steps in an epoch.
    pub batches: usize,
    /// Numbers that the optimizer trains.
    pub parameters: usize,
    /// The epochs that are done already.
    pub history: &'a [EpochRecord],
}

/// See [`Event::StepFinished`].
#[derive(Clone, Copy, Debug)]
pub struct StepFinished<'a> {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// This epoch.
    pub epoch: usize,
    /// Epochs of the whole run.
    pub epochs: usize,
    /// Batches of this epoch that are done.
    pub batch: usize,
    /// Batches in an epoch.
    pub batches: usize,
    /// `loss` and its terms, of this batch.
    pub losses: &'a Metrics,
    /// Learning rate of this step.
    pub lr: f64,
    /// Global norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Perplexity of this batch's codes, one per level.
    pub perplexity: &'a [f64],
    /// Codes of this batch that are in use, one per level.
    pub codes_in_use: &'a [usize],
    /// Codes that were revived after this step.
    pub revived: usize,
    /// Training speed, smoothed over about ten steps.
    pub images_per_second: f64,
}

/// See [`Event::EpochFinished`].
#[derive(Clone, Copy, Debug)]
pub struct EpochFinished<'a> {
    /// Steps done.
    pub step: u64,
    /// Epochs of the whole run.
    pub epochs: usize,
    /// This epoch.
    pub record: &'a EpochRecord,
    /// The codes of this epoch's training batches, one histogram per level.
    pub train_usage: &'a [Usage],
    /// The evaluation, if it was due; with its pictures and its histograms.
    pub evaluation: Option<&'a Evaluation>,
    /// Whether this evaluation is the best so far.
    pub is_best: bool,
    /// Seconds that training took in this epoch, as far as this call of the trainer did it.
    pub train_seconds: f64,
    /// Seconds that the evaluation took.
    pub evaluation_seconds: f64,
    /// All epochs up to this one.
    pub history: &'a [EpochRecord],
}

/// The figures of one epoch. Kept in checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch, from 1.
    pub epoch: usize,
    /// Steps done at its end.
    pub step: u64,
    /// Means over the epoch's images, and figures of the codebooks:
    /// - `perplexity`, `codes_in_use`: of the whole epoch; see [`evaluate`](crate::evaluate()).
    /// - `dead_codes`: codes that were not chosen, beyond those that chance alone leaves out.
    /// - `code_distance`: the root of the mean of ‖`z_e` − e‖² over a batch's vectors, averaged over the epoch.
    /// - `code_spread`, `code_spacing`, `duplicate_codes`: of the codebook at the epoch's end; see
    ///   [`CodebookGeometry`](vq_model::CodebookGeometry).
    /// - `drift`: see [`codebook_drift`](vq_model::codebook_drift), since the end of the epoch before.
    /// - `revived`: revivals in the epoch, over all levels.
    ///
    /// Those of the levels above the bottom are called `drift.1` and so on. A level has those that apply to
    /// its quantizer.
    pub train: Metrics,
    /// What the evaluation gave, if it was due.
    pub test: Option<Metrics>,
}

/// See [`Event::CheckpointSaved`].
#[derive(Clone, Copy, Debug)]
pub struct CheckpointSaved<'a> {
    /// Steps done.
    pub step: u64,
    /// The checkpoint's folder.
    pub path: &'a Path,
    /// Whether `best` points to it now.
    pub is_best: bool,
}

/// See [`Event::Warning`].
#[derive(Clone, Copy, Debug)]
pub struct Warning<'a> {
    /// Steps done.
    pub step: u64,
    /// What it is about.
    pub kind: WarningKind,
    /// What is the matter and what to do.
    pub message: &'a str,
}

/// What a [`Warning`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WarningKind {
    /// Few codes are in use.
    Collapse,
    /// The codebooks could do better.
    Codebook,
    /// The settings ask for trouble.
    Settings,
    /// A checkpoint could not be read, and an earlier one was taken.
    Checkpoint,
    /// An image could not be read, and another one was taken.
    Data,
}

/// See [`Event::RunFinished`] and [`Event::RunInterrupted`].
#[derive(Clone, Copy, Debug)]
pub struct RunEnded<'a> {
    /// Steps done.
    pub step: u64,
    /// The newest checkpoint.
    pub checkpoint: Option<&'a Path>,
    /// The best evaluation so far.
    pub best: Option<&'a Best>,
    /// The epochs that are done.
    pub history: &'a [EpochRecord],
}

/// The best evaluation so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// [`Evaluation::score`].
    pub score: f64,
    /// Steps done when it was reached.
    pub step: u64,
    /// The epoch at whose end it was reached, from 1.
    pub epoch: usize,
}

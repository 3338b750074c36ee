//! What the trainer asks of the thing that it trains.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{Tensor, Var};
use vq_ops::StepNumber;

use crate::{EpochRecord, Figures, Metrics, Result, Usage};

/// A model with its data and its loss: a [`Tokenizer`](crate::Tokenizer), or a prior over its codes, a
/// [`PriorTask`](crate::PriorTask).
///
/// [`forward`](Self::forward) and [`evaluate`](Self::evaluate) take `&self` and must not change the
/// model; [`update`](Self::update) is where anything but the optimizer does.
pub trait Trainable {
    /// What one step learns from.
    type Batch;
    /// What [`forward`](Self::forward) leaves for [`update`](Self::update).
    type Residue;

    /// Steps in an epoch.
    fn batches_per_epoch(&self) -> usize;

    /// Images to learn from and images to judge by, where that is known: a run goes on with as many of the first as it
    /// was started with, and says so where those of the second are others.
    fn image_counts(&self) -> Option<[usize; 2]> {
        None
    }

    /// The batches of an epoch (from 0), from number `first` on. They must depend on the seed, the
    /// epoch and their number alone.
    fn batches(
        &self,
        epoch: u64,
        first: usize,
    ) -> Box<dyn Iterator<Item = Result<Self::Batch>> + Send>;

    /// What the optimizer trains, by name.
    fn parameters(&self) -> &BTreeMap<String, Var>;

    /// Whether weight decay applies to that parameter.
    fn decays(&self, name: &str, parameter: &Var) -> bool;

    /// Called once, before the first step of a run, e.g. to place the codes by k-means. False where it was `stop` that
    /// ended it: then the run ends before its first step, and nothing of it is kept.
    fn prepare(&mut self, stop: &AtomicBool) -> Result<bool>;

    /// The loss of a batch in a step (numbered from 1), on which alone depends what is random in it.
    fn forward(&self, batch: &Self::Batch, step: u64) -> Result<Forward<Self::Residue>>;

    /// A batch as `count` parts, or as many as it can be cut into, in order: what is held for a backward
    /// pass is then that of one part, while their gradients add up to the batch's. What is random in a
    /// part must be what it is in the whole.
    ///
    /// A task that overrides this also overrides [`join`](Self::join).
    fn split(&self, batch: Self::Batch, count: usize) -> Result<Vec<Self::Batch>> {
        let _ = count;
        Ok(vec![batch])
    }

    /// What the parts of a batch left behind, in their order, as the whole batch would have.
    fn join(&self, parts: Vec<Self::Residue>) -> Result<Option<Self::Residue>> {
        Ok(parts.into_iter().next())
    }

    /// Called after the optimizer's step (numbered from 1), e.g. to move an EMA codebook.
    fn update(&mut self, residue: Self::Residue, step: u64) -> Result<Update>;

    /// How a step can be recorded once and repeated, where each gives the device the same work: the same
    /// operations on tensors of the same shapes, with no number of its own but what [`Repeats`] takes from the
    /// device. [`update`](Self::update) is then [`Repeats::follow`] and [`Repeats::revive`].
    fn repeats(&self) -> Option<&dyn Repeats<Self::Batch, Self::Residue>> {
        None
    }

    /// Judges the model on the test split; `None` if `stop` was raised meanwhile.
    fn evaluate(&self, stop: &AtomicBool) -> Result<Option<Evaluation>>;

    /// Whether these settings ask for trouble; one message each.
    fn concerns(&self) -> Vec<String> {
        Vec::new()
    }

    /// What the user should know of the data that was read since this was last asked; one message each.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }

    /// The code vectors of every level's codebooks, `[K,D]` each, copied to the CPU: for the figures of an
    /// epoch. None of a level whose codes are implicit.
    fn codebooks(&self) -> Result<Vec<Vec<Tensor>>> {
        Ok(Vec::new())
    }

    /// What the figures of an epoch ask for; `is_late` in the second half of the run.
    fn advise(&self, record: &EpochRecord, is_late: bool) -> Vec<Advice> {
        let _ = (record, is_late);
        Vec::new()
    }

    /// What to try when the codebook of a level has collapsed.
    fn collapse_advice(&self, level: usize) -> String {
        format!("try a smaller codebook at level {level}")
    }

    /// Writes the model's files into a folder that is there and empty.
    fn save(&self, folder: &Path) -> Result<()>;

    /// Takes the model from a folder that [`save`](Self::save) wrote. Changes nothing on an error.
    fn load(&mut self, folder: &Path) -> Result<()>;
}

/// What repeating a step takes, of a [`Trainable`] with batches `B` and residues `R`.
pub trait Repeats<B, R> {
    /// All tensors of a batch, always in the same order.
    fn batch_tensors<'a>(&self, batch: &'a mut B) -> Vec<&'a mut Tensor>;

    /// The tensors of a residue that [`revive`](Self::revive) reads, always in the same order.
    fn residue_tensors<'a>(&self, residue: &'a mut R) -> Vec<&'a mut Tensor>;

    /// The part of an update that is the same work in every step and does not wait for the device.
    fn follow(&self, residue: &R, step: StepNumber<'_>) -> Result<()>;

    /// The other part, after it, of a step (from 1).
    fn revive(&self, residue: &R, step: u64) -> Result<Update>;
}

/// What could be better, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Which advice it is, e.g. `drift.0`: each is given once in a run.
    pub key: String,
    /// What is the matter and which keys of the recipe to change.
    pub message: String,
}

/// What one batch gives.
pub struct Forward<R> {
    /// The scalar to descend on; a mean over the images, so that the parts of a batch, weighted by their
    /// images, give that of the batch.
    pub loss: Tensor,
    /// The terms that the loss is made of and the codes used by the batch, as they are reported.
    pub figures: Figures,
    /// Images in the batch.
    pub examples: usize,
    /// For [`Trainable::update`].
    pub residue: R,
}

/// What [`Trainable::update`] did beside the optimizer.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// Rows of parameters that were set anew, so that their moments no longer apply:
    /// (parameter, rows).
    pub reset_rows: Vec<(String, Vec<usize>)>,
    /// Codes that were revived, over all levels.
    pub revived: usize,
}

/// How good a model is on the test split, from whole-set statistics.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// For a tokenizer: see [`evaluate`](crate::evaluate()); for a prior: see
    /// [`PriorTask`](crate::PriorTask).
    pub metrics: Metrics,
    /// What `best` goes by: higher is better.
    pub score: f64,
    /// Codes used by the whole set, one histogram per level.
    pub usage: Vec<Usage>,
    /// The same few images every time.
    pub samples: Option<Samples>,
    /// Images that were drawn from the model, `[N,C,H,W]` f32 in [0, 1] on the CPU: of a prior.
    pub drawn: Option<Tensor>,
}

/// A few images and what became of them, all `[N,C,H,W]` f32 in [0, 1] on the CPU.
#[derive(Clone, Debug)]
pub struct Samples {
    /// As they are in the data.
    pub originals: Tensor,
    /// After encoding and decoding.
    pub reconstructions: Tensor,
    /// Decoded from one level of codes alone, bottom first; empty where there is only one. See
    /// [`VqVae::decode_levels`](vq_model::VqVae::decode_levels).
    pub levels: Vec<Tensor>,
}

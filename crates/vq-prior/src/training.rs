//! What a training step learns from.

use candle_core::{Device, Tensor};
use vq_model::Stream;
use vq_ops::{DropSeed, can_record};

use crate::inputs::{Told, check_codes};
use crate::layers::Mode;
use crate::{Conditions, Config, Result};

/// What the random parts of a training step depend on: dropout, and which labels are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Training {
    /// The run's seed.
    pub seed: u64,
    /// The number of the step.
    pub step: u64,
}

/// The codes of a training step, with what the prior is told about them and with what is random in the step:
/// checked, drawn, and on the prior's device.
///
/// What the device does in [`Prior::loss_of`](crate::Prior::loss_of) depends on the batch's
/// [tensors](Self::tensors) and shape alone, so that it can be [recorded](vq_ops::Recording) with one batch and
/// repeated with others.
#[derive(Clone, Debug)]
pub struct TrainingBatch {
    /// `[B,h,w,G]`.
    pub(crate) codes: Tensor,
    pub(crate) told: Told,
    seed: u64,
    /// The same, where work is recorded.
    seed_there: Option<Tensor>,
}

impl TrainingBatch {
    /// Codes `[B,h,w]` or `[B,h,w,G]` u32 and conditions for a prior of that architecture on `device`.
    ///
    /// An error where they do not fit the architecture.
    pub fn new(
        config: &Config,
        codes: &Tensor,
        conditions: &Conditions,
        training: Training,
        device: &Device,
    ) -> Result<Self> {
        let codes = check_codes("the codes", codes, config.grid, &config.codebook_sizes)?;
        let mut stream = Stream::new(training.seed, "prior.labels", training.step);
        let drop = |label: u32| {
            if stream.unit() < config.label_dropout { config.class_count as u32 } else { label }
        };
        let told = Told::new(config, conditions, codes.dim(0)?, drop, device)?;
        let seed = Stream::new(training.seed, "prior.dropout", training.step).next_seed();
        let seed_there = if can_record(device) && config.dropout > 0.0 {
            Some(DropSeed::to_device(seed, device)?)
        } else {
            None
        };
        Ok(Self { codes: codes.to_device(device)?, told, seed, seed_there })
    }

    /// The number of images.
    pub fn images(&self) -> usize {
        self.codes.dims().first().copied().unwrap_or(0)
    }

    /// u32 `[B,h,w,G]`.
    pub fn codes(&self) -> &Tensor {
        &self.codes
    }

    /// u32 `[B]`, of which those that the step drops are the number of classes; nothing for a prior without
    /// classes.
    pub fn labels(&self) -> Option<&Tensor> {
        self.told.labels.as_ref()
    }

    /// The codes of each level above, u32 `[B,h',w',G']`.
    pub fn conditioning(&self) -> &[Tensor] {
        &self.told.grids
    }

    /// All that is on the device, always in the same order.
    pub fn tensors(&mut self) -> Vec<&mut Tensor> {
        let Self { codes, told, seed_there, .. } = self;
        let told = told.labels.iter_mut().chain(&mut told.grids);
        std::iter::once(codes).chain(told).chain(seed_there).collect()
    }

    /// How the step runs where so many activations are dropped.
    pub(crate) fn mode(&self, dropout: f64) -> Mode<'_> {
        let seed = match &self.seed_there {
            Some(number) => DropSeed::OnDevice(number, 0),
            None => DropSeed::Known(self.seed),
        };
        Mode { tracked: true, training: true, dropout, seed }
    }
}

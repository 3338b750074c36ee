//! The gradient of a batch, all at once or part by part.

use candle_core::backprop::GradStore;
use vq_ops::Gradients;

use super::Trainer;
use super::pending::{PartOfStep, Seen};
use crate::{Forward, Result, Trainable};

/// What a batch gives, before the optimizer's step.
pub(super) struct Learned<R> {
    pub(super) gradients: GradStore,
    pub(super) parts: Vec<PartOfStep>,
    pub(super) residue: R,
}

impl<T: Trainable> Trainer<T> {
    /// Forward and backward of a batch, in `train.accumulate` parts.
    pub(super) fn learn(&self, batch: T::Batch, step: u64) -> Result<Learned<T::Residue>> {
        let parts = match self.config.accumulate {
            0 | 1 => vec![batch],
            count => self.task.split(batch, count)?,
        };
        if let [whole] = &parts[..] {
            let (gradients, part, residue) = self.learn_part(whole, step)?;
            return Ok(Learned { gradients, parts: vec![part], residue });
        }
        let mut sums: Option<GradStore> = None;
        let mut seen = Vec::with_capacity(parts.len());
        let mut residues = Vec::with_capacity(parts.len());
        for part in parts {
            // Its graph goes at the end of each turn.
            let (gradients, part, residue) = self.learn_part(&part, step)?;
            sums = Some(self.add(sums, &gradients, part.examples)?);
            seen.push(part);
            residues.push(residue);
        }
        let missing = || candle_core::Error::Msg("a batch of no parts".to_owned());
        let mut gradients = sums.ok_or_else(missing)?;
        let examples: usize = seen.iter().map(|part| part.examples).sum();
        let share = 1.0 / examples.max(1) as f64;
        for var in self.task.parameters().values() {
            if let Some(sum) = gradients.remove(var) {
                gradients.insert(var, (sum * share)?);
            }
        }
        let residue = self.task.join(residues)?.ok_or_else(missing)?;
        Ok(Learned { gradients, parts: seen, residue })
    }

    pub(super) fn learn_part(
        &self,
        part: &T::Batch,
        step: u64,
    ) -> Result<(GradStore, PartOfStep, T::Residue)> {
        let beside = Gradients::new();
        let forward = self.task.forward(part, step).map_err(|error| self.explain(step, error))?;
        let Forward { loss, figures, examples, residue } = forward;
        let seen = if self.read_every > 1 {
            Seen::Waiting(figures)
        } else {
            let (terms, usage) = figures.read()?;
            self.require_finite_loss(step, &terms)?;
            Seen::Read(terms, usage)
        };
        Ok((beside.backward(&loss)?, PartOfStep { examples, seen }, residue))
    }

    /// Adds `weight` times the parameters' gradients of one part to those of the parts before it.
    fn add(&self, sums: Option<GradStore>, part: &GradStore, weight: usize) -> Result<GradStore> {
        let mut sums = match sums {
            Some(sums) => sums,
            // candle makes a store in a backward pass only.
            None => candle_core::Var::new(0f32, &candle_core::Device::Cpu)?.backward()?,
        };
        for var in self.task.parameters().values() {
            let Some(gradient) = part.get(var) else { continue };
            let gradient = (gradient * weight as f64)?;
            let sum = match sums.get(var) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            sums.insert(var, sum);
        }
        Ok(sums)
    }
}

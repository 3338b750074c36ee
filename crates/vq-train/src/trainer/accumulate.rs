//! The gradient of a batch, all at once or part by part.

use candle_core::backprop::GradStore;

use super::Trainer;
use crate::state::Running;
use crate::{Forward, Metrics, Result, Trainable, Usage};

/// What a batch gives, before the optimizer's step.
pub(super) struct Learned<R> {
    pub(super) gradients: GradStore,
    pub(super) terms: Metrics,
    pub(super) examples: usize,
    pub(super) usage: Vec<Usage>,
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
            return self.learn_part(whole, step);
        }
        let mut sums: Option<GradStore> = None;
        let mut seen = Running::default();
        let mut residues = Vec::with_capacity(parts.len());
        for part in parts {
            // Its graph goes at the end of each turn.
            let learned = self.learn_part(&part, step)?;
            sums = Some(self.add(sums, &learned.gradients, learned.examples)?);
            seen.add(learned.examples, &learned.terms, &learned.usage);
            residues.push(learned.residue);
        }
        let missing = || candle_core::Error::Msg("a batch of no parts".to_owned());
        let mut gradients = sums.ok_or_else(missing)?;
        let share = 1.0 / seen.examples.max(1) as f64;
        for var in self.task.parameters().values() {
            if let Some(sum) = gradients.remove(var) {
                gradients.insert(var, (sum * share)?);
            }
        }
        Ok(Learned {
            gradients,
            terms: seen.means(),
            examples: seen.examples as usize,
            usage: seen.usage,
            residue: self.task.join(residues)?.ok_or_else(missing)?,
        })
    }

    fn learn_part(&self, part: &T::Batch, step: u64) -> Result<Learned<T::Residue>> {
        let forward = self.task.forward(part, step).map_err(|error| self.explain(step, error))?;
        let Forward { loss, terms, examples, usage, residue } = forward;
        self.require_finite_loss(step, &terms)?;
        Ok(Learned { gradients: loss.backward()?, terms, examples, usage, residue })
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

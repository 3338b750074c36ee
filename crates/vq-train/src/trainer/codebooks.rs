//! The codebooks' figures at the end of an epoch, and what carries over to the next one.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Trainer;
use crate::doctor::{self, codebook_metrics, dead_codes};
use crate::evaluate::usage_metrics;
use crate::metrics::level_name;
use crate::{Metrics, Result, Trainable, WarningKind};

/// What the names of the codebooks in a checkpoint begin with.
const PREFIX: &str = "codebooks.";

impl<T: Trainable> Trainer<T> {
    /// The figures of the epoch that is at its end; see [`EpochRecord::train`](crate::EpochRecord::train).
    pub(super) fn epoch_figures(&mut self) -> Result<Metrics> {
        let running = &self.progress.running;
        let mut figures = usage_metrics(running.means(), &running.usage);
        for (level, usage) in running.usage.iter().enumerate() {
            figures.set(&level_name("dead_codes", level), dead_codes(usage));
        }
        let codebooks = self.task.codebooks()?;
        for (level, now) in codebooks.iter().enumerate() {
            let before = self.codebooks.get(level).map(Vec::as_slice);
            codebook_metrics(&mut figures, level, now, before)?;
        }
        if codebooks.iter().any(|level| !level.is_empty()) {
            figures.set("revived", running.revived as f64);
        }
        self.codebooks = codebooks;
        Ok(figures)
    }

    /// What the epoch that is done asks for, unless it was said before.
    pub(super) fn report_advice(&mut self) -> Result<()> {
        let Some(record) = self.progress.history.last() else { return Ok(()) };
        let is_late = doctor::is_late(record.epoch, self.config.epochs);
        for advice in self.task.advise(record, is_late) {
            // A collapse says the same more loudly.
            let is_said = self.progress.collapse_reported && advice.key.starts_with("dead");
            if !is_said && !self.progress.advised.contains(&advice.key) {
                self.progress.advised.push(advice.key);
                self.warn(WarningKind::Codebook, &advice.message)?;
            }
        }
        Ok(())
    }

    /// With the codebooks, for a checkpoint.
    pub(super) fn with_codebooks(
        &self,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> BTreeMap<String, Tensor> {
        for (level, codebooks) in self.codebooks.iter().enumerate() {
            for (index, codebook) in codebooks.iter().enumerate() {
                tensors.insert(format!("{PREFIX}{level}.{index}"), codebook.clone());
            }
        }
        tensors
    }

    /// Those of a checkpoint that [`with_codebooks`](Self::with_codebooks) is in; none of an older one.
    pub(super) fn restore_codebooks(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.codebooks = self.task.codebooks()?;
        for (level, codebooks) in self.codebooks.iter_mut().enumerate() {
            let saved = |index| tensors.get(&format!("{PREFIX}{level}.{index}"));
            let saved: Option<Vec<Tensor>> =
                (0..codebooks.len()).map(|index| saved(index).cloned()).collect();
            let fits = |saved: &Vec<Tensor>| {
                saved.iter().zip(&*codebooks).all(|(saved, now)| saved.dims() == now.dims())
            };
            *codebooks = saved.filter(fits).unwrap_or_default();
        }
        Ok(())
    }
}

//! Steps that are done and not reported yet. To report a step is to wait for the device, so that on one
//! with a queue of its own some steps are reported together.

use candle_core::Tensor;

use super::Trainer;
use crate::state::Running;
use crate::{Figures, Metrics, Result, Trainable, Usage};

/// Steps that are read together, at most, where the device has a queue.
const MOST_STEPS: u64 = 20;

/// A step as it will be reported.
pub(super) struct Pending {
    pub(super) step: u64,
    /// Batches of the epoch that were done.
    pub(super) batch: usize,
    pub(super) parts: Vec<PartOfStep>,
    pub(super) lr: f64,
    pub(super) norm: Norm,
    pub(super) revived: usize,
}

/// What the step saw of a part of its batch.
pub(super) struct PartOfStep {
    pub(super) examples: usize,
    pub(super) seen: Seen,
}

pub(super) enum Seen {
    Read(Metrics, Vec<Usage>),
    Waiting(Figures),
    /// In the trainer's ledger, in the row that is the step's place among those that are pending.
    Noted,
}

/// The gradient's norm.
pub(super) enum Norm {
    Known(f64),
    /// The first element.
    Waiting(Tensor),
    /// As the figures.
    Noted,
}

impl Norm {
    fn read(&self) -> Result<f64> {
        match self {
            Self::Known(norm) => Ok(*norm),
            Self::Waiting(norm) => Ok(f64::from(norm.get(0)?.to_scalar::<f32>()?)),
            Self::Noted => Ok(f64::NAN),
        }
    }
}

/// A step, read.
pub(super) struct Report {
    pub(super) terms: Metrics,
    pub(super) usage: Vec<Usage>,
    pub(super) examples: usize,
    pub(super) norm: f64,
}

impl Pending {
    pub(super) fn examples(&self) -> usize {
        self.parts.iter().map(|part| part.examples).sum()
    }

    /// From the ledger's row, where it is there.
    fn read(&self, row: Option<Report>) -> Result<Report> {
        if let (Norm::Noted, Some(row)) = (&self.norm, row) {
            return Ok(Report { examples: self.examples(), ..row });
        }
        let read = |part: &PartOfStep| match &part.seen {
            Seen::Read(terms, usage) => Ok((terms.clone(), usage.clone())),
            Seen::Waiting(figures) => figures.read(),
            Seen::Noted => Ok((Metrics::new(), Vec::new())),
        };
        let (examples, norm) = (self.examples(), self.norm.read()?);
        if let [whole] = &self.parts[..] {
            let (terms, usage) = read(whole)?;
            return Ok(Report { terms, usage, examples, norm });
        }
        let mut seen = Running::default();
        for part in &self.parts {
            let (terms, usage) = read(part)?;
            seen.add(part.examples, &terms, &usage);
        }
        Ok(Report { terms: seen.means(), usage: seen.usage, examples, norm })
    }
}

/// Steps between two looks at a device: each one on the CPU, which has no queue.
pub(super) fn read_every(is_cpu: bool, log_every: u64) -> usize {
    if is_cpu { 1 } else { log_every.clamp(1, MOST_STEPS) as usize }
}

impl<T: Trainable> Trainer<T> {
    /// Reports all steps that are done.
    pub(super) fn report_steps(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        let mut reports = Vec::with_capacity(pending.len());
        let is_noted = pending.iter().any(|step| matches!(step.norm, Norm::Noted));
        let mut rows = match &self.ledger {
            Some(ledger) if is_noted => ledger.read(pending.len())?,
            _ => Vec::new(),
        }
        .into_iter();
        for step in pending {
            let report = step.read(rows.next())?;
            self.require_finite_loss(step.step, &report.terms)?;
            let norm = report.norm;
            self.require(norm.is_finite(), step.step, || format!("the gradient's norm is {norm}"))?;
            reports.push((step, report));
        }
        // After the device has done what was asked for.
        let images = reports.iter().map(|(_, report)| report.examples).sum();
        let speed = self.clock.images_per_second(images);
        for (step, report) in &reports {
            self.progress.running.add(report.examples, &report.terms, &report.usage);
            self.progress.running.revived += step.revived as u64;
            self.emit_step(step, report, speed)?;
        }
        Ok(())
    }
}

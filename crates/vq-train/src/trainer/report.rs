//! What the trainer tells its observers.

use std::time::Instant;

use super::Trainer;
use super::pending::{Pending, Report};
use crate::{
    Error, Event, Observer, Result, RunEnded, StepFinished, Trainable, Usage, Warning, WarningKind,
};

/// Steps after which a collapse can be told from a slow start.
pub(super) const COLLAPSE_WINDOW: usize = 200;

impl<T: Trainable> Trainer<T> {
    /// Says so once in a run if a level's codebook has collapsed.
    pub(super) fn report_collapse(&mut self, usage: &[Usage]) -> Result<()> {
        // Most codebooks are in disorder at the very start.
        let is_early = self.progress.step < self.total_steps().min(COLLAPSE_WINDOW as u64);
        if self.progress.collapse_reported || is_early {
            return Ok(());
        }
        let collapsed = usage.iter().enumerate().find(|(_, usage)| usage.has_collapsed());
        let Some((level, usage)) = collapsed else { return Ok(()) };
        self.progress.collapse_reported = true;
        let message = format!(
            "the codebook of level {level} has collapsed: {} of {} codes in use, perplexity {:.1}, in \
             this epoch so far; {}",
            usage.codes_in_use(),
            usage.counts.len(),
            usage.perplexity(),
            self.task.collapse_advice(level),
        );
        self.warn(WarningKind::Collapse, &message)
    }

    /// What reading the data brought up.
    pub(super) fn report_notices(&mut self) -> Result<()> {
        self.task.notices().iter().try_for_each(|notice| self.warn(WarningKind::Data, notice))
    }

    pub(super) fn warn(&mut self, kind: WarningKind, message: &str) -> Result<()> {
        let step = self.progress.step;
        emit(&mut self.observers, &Event::Warning(Warning { step, kind, message }))
    }

    pub(super) fn emit_step(
        &mut self,
        step: &Pending,
        report: &Report,
        images_per_second: f64,
    ) -> Result<()> {
        let perplexity: Vec<f64> = report.usage.iter().map(Usage::perplexity).collect();
        let codes_in_use: Vec<usize> = report.usage.iter().map(Usage::codes_in_use).collect();
        let event = Event::StepFinished(StepFinished {
            step: step.step,
            total_steps: self.total_steps(),
            epoch: self.progress.epoch + 1,
            epochs: self.config.epochs,
            batch: step.batch,
            batches: self.progress.batches_per_epoch,
            losses: &report.terms,
            lr: step.lr,
            grad_norm: report.norm,
            perplexity: &perplexity,
            codes_in_use: &codes_in_use,
            revived: step.revived,
            images_per_second,
        });
        emit(&mut self.observers, &event)
    }

    pub(super) fn emit_end(&mut self, is_finished: bool) -> Result<()> {
        let ended = RunEnded {
            step: self.progress.step,
            checkpoint: self.last_checkpoint.as_deref(),
            best: self.progress.best.as_ref(),
            history: &self.progress.history,
        };
        let event =
            if is_finished { Event::RunFinished(ended) } else { Event::RunInterrupted(ended) };
        emit(&mut self.observers, &event)
    }
}

/// Tells all observers; an error that one of them had from this crate comes back as it was.
pub(super) fn emit(observers: &mut [Box<dyn Observer>], event: &Event<'_>) -> Result<()> {
    for observer in observers {
        observer.observe(event).map_err(|error| match error.downcast::<Error>() {
            Ok(own) => *own,
            Err(other) => Error::Observer(other),
        })?;
    }
    Ok(())
}

/// Wall-clock time; nothing that is saved depends on it.
pub(super) struct Clock {
    epoch: Instant,
    step: Instant,
    seconds_per_image: Option<f64>,
}

impl Clock {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { epoch: now, step: now, seconds_per_image: None }
    }

    pub(super) fn start_epoch(&mut self) {
        self.epoch = Instant::now();
        self.pause();
    }

    pub(super) fn epoch_seconds(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// Leaves the time since the last step out of the speed.
    pub(super) fn pause(&mut self) {
        self.step = Instant::now();
    }

    pub(super) fn images_per_second(&mut self, images: usize) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.step).as_secs_f64() / images.max(1) as f64;
        self.step = now;
        let smoothed = self.seconds_per_image.map_or(seconds, |old| 0.9 * old + 0.1 * seconds);
        self.seconds_per_image = Some(smoothed);
        1.0 / smoothed.max(1e-9)
    }
}

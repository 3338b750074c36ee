//! How long it will take.

use std::time::Instant;

use vq_train::StepFinished;

/// Measures this call of the trainer, evaluations and all.
pub(crate) struct Pace {
    start: Instant,
    first_step: u64,
}

impl Pace {
    /// From now on, with so many steps done.
    pub(crate) fn new(step: u64) -> Self {
        Self { start: Instant::now(), first_step: step }
    }

    /// Seconds left, if it goes on as it has.
    pub(crate) fn seconds_left(&self, step: &StepFinished<'_>) -> f64 {
        let done = step.step.saturating_sub(self.first_step).max(1);
        let left = step.total_steps.saturating_sub(step.step);
        self.start.elapsed().as_secs_f64() / done as f64 * left as f64
    }
}

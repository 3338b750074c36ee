//! Whole training steps, by the real loop.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vq_ops::Precision;
use vq_train::{Event, Observer, Trainer};

use crate::bench::worker::{Result, training};

/// Steps before the clock starts, and steps that are timed.
pub(super) const STEPS: (usize, usize) = (5, 20);

/// The median step.
pub(super) fn milliseconds(precision: Precision) -> Result<f64> {
    let (tokenizer, config) = training(precision)?;
    let folder = tempfile::tempdir()?;
    let stop = Arc::new(AtomicBool::new(false));
    let ends = Rc::new(RefCell::new(Vec::new()));
    let watch = Watch { ends: ends.clone(), stop: stop.clone() };
    let trainer = Trainer::new(tokenizer, &config, folder.path())?;
    trainer.with_observer(watch).with_stop_flag(stop).run()?;
    let ends = ends.borrow();
    let times = ends.windows(2).skip(STEPS.0).filter_map(|pair| match pair {
        [before, after] => Some((*after - *before).as_secs_f64() * 1e3),
        _ => None,
    });
    Ok(crate::bench::median(&times.collect::<Vec<f64>>()))
}

/// Notes when each step ended, and stops the run.
struct Watch {
    ends: Rc<RefCell<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
}

impl Observer for Watch {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        if matches!(event, Event::StepFinished(_)) {
            let mut ends = self.ends.borrow_mut();
            ends.push(Instant::now());
            if ends.len() > STEPS.0 + STEPS.1 {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

//! The training loop.

mod accumulate;
mod codebooks;
mod pending;
mod persist;
mod recorded;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use self::accumulate::Learned;
use self::pending::{Norm, PartOfStep, Pending, read_every};
use self::recorded::{Ledger, Repeating};
use self::report::{COLLAPSE_WINDOW, Clock, emit};
use crate::optimizer::{Clip, Optimizer, clip_scale, gradient_norm, norm_and_scale};
use crate::schedule::learning_rate;
use crate::state::Progress;
use crate::{
    Best, Checkpoints, EpochFinished, EpochRecord, Error, Evaluation, Event, Metrics, Observer,
    Result, RunStarted, TrainConfig, Trainable, Update, WarningKind,
};

/// Trains a [`Trainable`]: steps, evaluations, checkpoints; says what happens to its observers.
pub struct Trainer<T: Trainable> {
    task: T,
    config: TrainConfig,
    run: PathBuf,
    checkpoints: Checkpoints,
    observers: Vec<Box<dyn Observer>>,
    stop: Arc<AtomicBool>,
    progress: Progress,
    optimizer: Optimizer,
    /// The codebooks at the end of the epoch before, or where the first one started.
    codebooks: Vec<Vec<Tensor>>,
    resumed_from: Option<PathBuf>,
    last_checkpoint: Option<PathBuf>,
    /// Steps and epochs done at the last checkpoint.
    saved_at: Option<(u64, usize)>,
    /// Noticed before there was anyone to tell.
    warnings: Vec<(WarningKind, String)>,
    clock: Clock,
    /// Steps that are done and not reported yet.
    pending: Vec<Pending>,
    /// Steps that are reported together.
    read_every: usize,
    repeating: Repeating<T>,
    /// Where repeated steps leave their figures.
    ledger: Option<Ledger>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are done.
    Finished,
    /// The stop flag was raised; the run is saved and can be resumed.
    Interrupted,
}

impl<T: Trainable> Trainer<T> {
    /// To train `task` from its start, with checkpoints in the folder `run`.
    pub fn new(task: T, config: &TrainConfig, run: impl Into<PathBuf>) -> Result<Self> {
        let run = run.into();
        let is_cpu = task.parameters().values().next().is_none_or(|var| var.device().is_cpu());
        Ok(Self {
            pending: Vec::new(),
            read_every: read_every(is_cpu, config.log_every),
            config: config.clone(),
            checkpoints: Checkpoints::new(&run),
            run,
            observers: Vec::new(),
            stop: Arc::default(),
            progress: Progress::new(config.seed, task.batches_per_epoch(), task.image_counts()),
            optimizer: Optimizer::new(task.parameters(), config)?,
            codebooks: Vec::new(),
            resumed_from: None,
            last_checkpoint: None,
            saved_at: None,
            warnings: Vec::new(),
            clock: Clock::new(),
            repeating: Repeating::Waiting,
            ledger: None,
            task,
        })
    }

    /// With one more observer; they are told in the order in which they were added.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Reports so many steps together; without it each one on the CPU, and some on devices that work while
    /// the trainer goes on. Changes nothing else.
    #[must_use]
    pub fn with_read_interval(mut self, steps: usize) -> Self {
        self.read_every = steps.max(1);
        self
    }

    /// Runs every step by itself, also where the device could [repeat](crate::Repeats) a recorded one. Changes
    /// nothing but the speed.
    #[must_use]
    pub fn without_recording(mut self) -> Self {
        self.repeating = Repeating::Off;
        self
    }

    /// With a flag that ends the run after the current step, saved, once it is raised.
    #[must_use]
    pub fn with_stop_flag(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// What is trained.
    pub fn task(&self) -> &T {
        &self.task
    }

    /// Whether steps are [repeated](crate::Repeats) at present.
    pub fn is_recorded(&self) -> bool {
        matches!(self.repeating, Repeating::On(_))
    }

    /// Where the run is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Trains until all epochs are done or the stop flag is raised.
    pub fn run(&mut self) -> Result<Outcome> {
        if !self.start()? {
            self.emit_end(false)?;
            return Ok(Outcome::Interrupted);
        }
        while self.progress.epoch < self.config.epochs {
            if !self.train_epoch()? || !self.finish_epoch()? {
                self.save(false)?;
                self.emit_end(false)?;
                return Ok(Outcome::Interrupted);
            }
        }
        self.emit_end(true)?;
        Ok(Outcome::Finished)
    }

    /// The rest of the current epoch; false if stopped.
    fn train_epoch(&mut self) -> Result<bool> {
        self.clock.start_epoch();
        if self.is_stopped() {
            return Ok(false);
        }
        for batch in self.task.batches(self.progress.epoch as u64, self.progress.batch) {
            self.step(batch?)?;
            let every = self.config.checkpoint_every_steps;
            let is_last = self.progress.batch == self.progress.batches_per_epoch;
            if every > 0 && self.progress.step.is_multiple_of(every) && !is_last {
                self.save(false)?;
            }
            if self.is_stopped() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn step(&mut self, batch: T::Batch) -> Result<()> {
        let step = self.progress.step + 1;
        let Some(batch) = self.repeat(batch, step)? else { return Ok(()) };
        let Learned { gradients, parts, residue } = self.learn(batch, step)?;
        let (norm, clip) = self.clip(&gradients, step)?;
        let lr = learning_rate(&self.config, self.progress.step, self.total_steps());
        self.optimizer.step(
            self.task.parameters(),
            |name, var| self.task.decays(name, var),
            &gradients,
            &self.config,
            (step, lr),
            &clip,
        )?;
        // The codebooks move last: the losses were those of the codes that the batch was given.
        let update = self.task.update(residue, step)?;
        self.finish(step, lr, parts, norm, &update)
    }

    /// What comes after a step's work.
    fn finish(
        &mut self,
        step: u64,
        lr: f64,
        parts: Vec<PartOfStep>,
        norm: Norm,
        update: &Update,
    ) -> Result<()> {
        for (name, rows) in &update.reset_rows {
            self.optimizer.reset_rows(self.task.parameters(), name, rows)?;
        }
        self.progress.step = step;
        self.progress.batch += 1;
        let (batch, revived) = (self.progress.batch, update.revived);
        self.pending.push(Pending { step, batch, parts, lr, norm, revived });
        if self.pending.len() >= self.read_every || batch == COLLAPSE_WINDOW {
            self.report_steps()?;
        }
        self.report_notices()?;
        if batch == COLLAPSE_WINDOW {
            let seen = self.progress.running.usage.clone();
            self.report_collapse(&seen)?;
        }
        Ok(())
    }

    /// The gradients' norm, and what clipping does to them.
    fn clip(&self, gradients: &GradStore, step: u64) -> Result<(Norm, Clip)> {
        let (parameters, limit) = (self.task.parameters(), self.config.grad_clip);
        if let Some(both) = norm_and_scale(parameters, gradients, limit)? {
            let scale = both.narrow(0, 1, 1)?;
            return Ok((Norm::Waiting(both), Clip::Waiting(scale)));
        }
        let norm = gradient_norm(parameters, gradients)?;
        self.require(norm.is_finite(), step, || format!("the gradient's norm is {norm}"))?;
        Ok((Norm::Known(norm), Clip::Known(clip_scale(norm, limit))))
    }

    /// Evaluation, bookkeeping and checkpoint; false if stopped.
    fn finish_epoch(&mut self) -> Result<bool> {
        self.report_steps()?;
        let train_seconds = self.clock.epoch_seconds();
        let start = Instant::now();
        let epoch = self.progress.epoch + 1;
        let is_due = epoch.is_multiple_of(self.config.eval_every) || epoch == self.config.epochs;
        let mut evaluation = None;
        if is_due {
            let evaluate = || self.task.evaluate(&self.stop);
            let result = self.optimizer.with_averages(self.task.parameters(), evaluate);
            evaluation = result.map_err(|error| self.explain(self.progress.step, error))?;
            if evaluation.is_none() {
                return Ok(false);
            }
            self.report_notices()?;
        }
        let figures = self.epoch_figures()?;
        let is_best = self.note_epoch(figures, evaluation.as_ref());
        let usage = std::mem::take(&mut self.progress.running).usage;
        if let Some(record) = self.progress.history.last() {
            let event = Event::EpochFinished(EpochFinished {
                step: self.progress.step,
                epochs: self.config.epochs,
                record,
                train_usage: &usage,
                evaluation: evaluation.as_ref(),
                is_best,
                train_seconds,
                evaluation_seconds: start.elapsed().as_secs_f64(),
                history: &self.progress.history,
            });
            emit(&mut self.observers, &event)?;
        }
        self.report_collapse(&usage)?;
        self.report_advice()?;
        self.save(is_best)?;
        Ok(true)
    }

    /// Moves on to the next epoch; whether this one was the best.
    fn note_epoch(&mut self, train: Metrics, evaluation: Option<&Evaluation>) -> bool {
        let progress = &mut self.progress;
        progress.epoch += 1;
        progress.batch = 0;
        progress.history.push(EpochRecord {
            epoch: progress.epoch,
            step: progress.step,
            train,
            test: evaluation.map(|evaluation| evaluation.metrics.clone()),
        });
        let best = progress.best.as_ref().map_or(f64::NEG_INFINITY, |best| best.score);
        match evaluation {
            Some(evaluation) if evaluation.score > best => {
                let (score, step, epoch) = (evaluation.score, progress.step, progress.epoch);
                progress.best = Some(Best { score, step, epoch });
                true
            }
            _ => false,
        }
    }

    /// False if it was stopped.
    fn start(&mut self) -> Result<bool> {
        self.checkpoints.recover()?;
        let parameters = self.task.parameters().values().map(|var| var.elem_count()).sum();
        let event = Event::RunStarted(RunStarted {
            run: &self.run,
            resumed_from: self.resumed_from.as_deref(),
            step: self.progress.step,
            total_steps: self.total_steps(),
            epoch: self.progress.epoch,
            epochs: self.config.epochs,
            batches: self.progress.batches_per_epoch,
            parameters,
            history: &self.progress.history,
        });
        emit(&mut self.observers, &event)?;
        for (kind, message) in std::mem::take(&mut self.warnings) {
            self.warn(kind, &message)?;
        }
        for concern in self.task.concerns() {
            self.warn(WarningKind::Settings, &concern)?;
        }
        if !self.progress.prepared {
            if !self.task.prepare(&self.stop).map_err(|error| self.explain(0, error))? {
                return Ok(false);
            }
            // Averages start at the prepared parameters.
            self.optimizer = Optimizer::new(self.task.parameters(), &self.config)?;
            self.progress.prepared = true;
            self.codebooks = self.task.codebooks()?;
        }
        Ok(true)
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn total_steps(&self) -> u64 {
        (self.config.epochs * self.progress.batches_per_epoch) as u64
    }

    fn require(&self, holds: bool, step: u64, what: impl FnOnce() -> String) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::NotFinite { step, what: what(), checkpoint: self.last_checkpoint.clone() })
    }

    fn require_finite_loss(&self, step: u64, terms: &Metrics) -> Result<()> {
        self.require(terms.iter().all(|(_, value)| value.is_finite()), step, || {
            let terms: Vec<String> =
                terms.iter().map(|(name, value)| format!("{name} {value}")).collect();
            format!("the loss is not finite ({})", terms.join(", "))
        })
    }

    /// The model notices divergence, but does not know the step nor the checkpoint.
    fn explain(&self, step: u64, error: Error) -> Error {
        match error {
            Error::Model(vq_model::Error::Diverged { level }) => Error::NotFinite {
                step,
                what: format!("the encoder's output of level {level} is not finite"),
                checkpoint: self.last_checkpoint.clone(),
            },
            other => other,
        }
    }
}

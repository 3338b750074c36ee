//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::evaluate::usage_metrics;
use crate::optimizer::{Optimizer, clip_scale, gradient_norm};
use crate::schedule::learning_rate;
use crate::state::{self, Progress, TRAINING_FILE};
use crate::{
    Best, CheckpointSaved, Checkpoints, EpochFinished, EpochRecord, Error, Evaluation, Event,
    Forward, Metrics, Observer, Result, RunEnded, RunStarted, StepFinished, TrainConfig, Trainable,
    Usage, Warning, WarningKind,
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
    resumed_from: Option<PathBuf>,
    last_checkpoint: Option<PathBuf>,
    /// Noticed before there was anyone to tell.
    warnings: Vec<(WarningKind, String)>,
    clock: Clock,
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
        Ok(Self {
            config: config.clone(),
            checkpoints: Checkpoints::new(&run),
            run,
            observers: Vec::new(),
            stop: Arc::default(),
            progress: Progress::new(config.seed, task.batches_per_epoch()),
            optimizer: Optimizer::new(task.parameters(), config)?,
            resumed_from: None,
            last_checkpoint: None,
            warnings: Vec::new(),
            clock: Clock::new(),
            task,
        })
    }

    /// With one more observer; they are told in the order in which they were added.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observers.push(Box::new(observer));
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

    /// Where the run is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Goes back to the newest checkpoint that can be read; `None`, and a start from the beginning, if
    /// there is no checkpoint yet. Damaged ones are passed over, which [`run`](Self::run) will warn of.
    pub fn resume(&mut self) -> Result<Option<&Path>> {
        self.checkpoints.recover()?;
        let mut candidates = Vec::from_iter(self.checkpoints.last()?);
        for (_, path) in self.checkpoints.list()?.into_iter().rev() {
            if candidates.iter().all(|known| known.canonicalize().ok() != path.canonicalize().ok())
            {
                candidates.push(path);
            }
        }
        let mut damage: Option<Error> = None;
        for path in candidates {
            match self.load(&path) {
                Ok(()) => {
                    if let Some(damage) = damage {
                        let message = format!("{damage}; resuming from {} instead", path.display());
                        self.warnings.push((WarningKind::Checkpoint, message));
                    }
                    self.last_checkpoint = Some(path.clone());
                    self.resumed_from = Some(path);
                    return Ok(self.resumed_from.as_deref());
                }
                Err(error) if is_damage(&error) => {
                    damage = damage.or(Some(name_damage(&path, &error)))
                }
                Err(error) => return Err(error),
            }
        }
        match damage {
            None => Ok(None),
            Some(Error::DamagedCheckpoint { path, cause, .. }) => {
                let advice = "no other checkpoint can be read: copy it again, or start anew with --overwrite";
                Err(Error::DamagedCheckpoint { path, cause, advice: advice.into() })
            }
            Some(other) => Err(other),
        }
    }

    /// Trains until all epochs are done or the stop flag is raised.
    pub fn run(&mut self) -> Result<Outcome> {
        self.start()?;
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
        for batch in self.task.batches(self.progress.epoch as u64, self.progress.batch) {
            self.step(&batch?)?;
            let every = self.config.checkpoint_every_steps;
            let is_last = self.progress.batch == self.progress.batches_per_epoch;
            if every > 0 && self.progress.step % every == 0 && !is_last {
                self.save(false)?;
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn step(&mut self, batch: &T::Batch) -> Result<()> {
        let step = self.progress.step + 1;
        let forward = self.task.forward(batch).map_err(|error| self.explain(step, error))?;
        let Forward { loss, terms, examples, usage, residue } = forward;
        self.require_finite_loss(step, &terms)?;
        let gradients = loss.backward()?;
        let norm = gradient_norm(self.task.parameters(), &gradients)?;
        self.require(norm.is_finite(), step, || format!("the gradient's norm is {norm}"))?;
        let lr = learning_rate(&self.config, self.progress.step, self.total_steps());
        self.optimizer.step(
            self.task.parameters(),
            |name, var| self.task.decays(name, var),
            &gradients,
            &self.config,
            (step, lr, clip_scale(norm, self.config.grad_clip)),
        )?;
        // The codebooks move last: the losses were those of the codes that the batch was given.
        let update = self.task.update(residue, step)?;
        for (name, rows) in &update.reset_rows {
            self.optimizer.reset_rows(self.task.parameters(), name, rows)?;
        }
        self.progress.step = step;
        self.progress.batch += 1;
        self.progress.running.add(examples, &terms, &usage);
        self.emit_step(&terms, &usage, lr, norm, update.revived, examples)?;
        if self.progress.batch == COLLAPSE_WINDOW {
            let seen = self.progress.running.usage.clone();
            self.report_collapse(&seen)?;
        }
        Ok(())
    }

    /// Evaluation, bookkeeping and checkpoint; false if stopped.
    fn finish_epoch(&mut self) -> Result<bool> {
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
        }
        let is_best = self.note_epoch(evaluation.as_ref());
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
        self.save(is_best)?;
        Ok(true)
    }

    /// Moves on to the next epoch; whether this one was the best.
    fn note_epoch(&mut self, evaluation: Option<&Evaluation>) -> bool {
        let progress = &mut self.progress;
        progress.epoch += 1;
        progress.batch = 0;
        progress.history.push(EpochRecord {
            epoch: progress.epoch,
            step: progress.step,
            train: usage_metrics(progress.running.means(), &progress.running.usage),
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

    fn start(&mut self) -> Result<()> {
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
            self.task.prepare().map_err(|error| self.explain(0, error))?;
            // Averages start at the prepared parameters.
            self.optimizer = Optimizer::new(self.task.parameters(), &self.config)?;
            self.progress.prepared = true;
        }
        Ok(())
    }

    fn save(&mut self, is_best: bool) -> Result<()> {
        let step = self.progress.step;
        for (name, var) in self.task.parameters() {
            let is_finite = vq_ops::sum_of_squares(var.as_tensor())?.is_finite();
            self.require(is_finite, step, || format!("the parameter {name} is not finite"))?;
        }
        let parameters = self.task.parameters();
        let path = self.checkpoints.save(step, is_best, |folder| {
            self.optimizer.with_averages(parameters, || self.task.save(folder))?;
            let tensors = self.optimizer.tensors(parameters);
            state::write(&folder.join(TRAINING_FILE), &tensors, &self.progress)
        })?;
        self.checkpoints.prune(self.config.keep_checkpoints)?;
        self.last_checkpoint = Some(path.clone());
        let event = Event::CheckpointSaved(CheckpointSaved { step, path: &path, is_best });
        emit(&mut self.observers, &event)?;
        self.clock.pause();
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let Some(var) = self.task.parameters().values().next() else { return Ok(()) };
        let file = path.join(TRAINING_FILE);
        let (tensors, progress) = state::read(&file, &var.device().clone())?;
        if progress.seed != self.config.seed {
            let (was, now) = (progress.seed.to_string(), self.config.seed.to_string());
            return Err(Error::ResumeMismatch { key: "train.seed".into(), was, now });
        }
        let now = self.task.batches_per_epoch();
        if progress.batches_per_epoch != now {
            return Err(Error::ResumeData { was: progress.batches_per_epoch, now });
        }
        self.task.load(path)?;
        let restored = Optimizer::restore(self.task.parameters(), &self.config, &tensors)?;
        self.optimizer = restored
            .map_err(|name| Error::damaged(&file, format!("tensor `{name}` does not fit")))?;
        self.progress = progress;
        Ok(())
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

    /// Says so once in a run if a level's codebook has collapsed.
    fn report_collapse(&mut self, usage: &[Usage]) -> Result<()> {
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

    fn warn(&mut self, kind: WarningKind, message: &str) -> Result<()> {
        let step = self.progress.step;
        emit(&mut self.observers, &Event::Warning(Warning { step, kind, message }))
    }

    fn emit_step(
        &mut self,
        losses: &Metrics,
        usage: &[Usage],
        lr: f64,
        grad_norm: f64,
        revived: usize,
        examples: usize,
    ) -> Result<()> {
        let perplexity: Vec<f64> = usage.iter().map(Usage::perplexity).collect();
        let codes_in_use: Vec<usize> = usage.iter().map(Usage::codes_in_use).collect();
        let event = Event::StepFinished(StepFinished {
            step: self.progress.step,
            total_steps: self.total_steps(),
            epoch: self.progress.epoch + 1,
            epochs: self.config.epochs,
            batch: self.progress.batch,
            batches: self.progress.batches_per_epoch,
            losses,
            lr,
            grad_norm,
            perplexity: &perplexity,
            codes_in_use: &codes_in_use,
            revived,
            images_per_second: self.clock.images_per_second(examples),
        });
        emit(&mut self.observers, &event)
    }

    fn emit_end(&mut self, is_finished: bool) -> Result<()> {
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

/// Steps after which a collapse can be told from a slow start.
const COLLAPSE_WINDOW: usize = 200;

fn emit(observers: &mut [Box<dyn Observer>], event: &Event<'_>) -> Result<()> {
    for observer in observers {
        observer.observe(event).map_err(|error| match error.downcast::<Error>() {
            Ok(own) => *own,
            Err(other) => Error::Observer(other),
        })?;
    }
    Ok(())
}

/// Whether an earlier checkpoint may do better.
fn is_damage(error: &Error) -> bool {
    match error {
        Error::DamagedCheckpoint { .. } | Error::Read { .. } => true,
        Error::Model(error) => !matches!(
            error,
            vq_model::Error::Architecture { .. } | vq_model::Error::FormatVersion { .. }
        ),
        _ => false,
    }
}

fn name_damage(path: &Path, error: &Error) -> Error {
    Error::DamagedCheckpoint {
        path: path.to_path_buf(),
        cause: error.to_string(),
        advice: "delete its folder to be rid of this message".into(),
    }
}

/// Wall-clock time; nothing that is saved depends on it.
struct Clock {
    epoch: Instant,
    step: Instant,
    seconds_per_image: Option<f64>,
}

impl Clock {
    fn new() -> Self {
        let now = Instant::now();
        Self { epoch: now, step: now, seconds_per_image: None }
    }

    fn start_epoch(&mut self) {
        self.epoch = Instant::now();
        self.pause();
    }

    fn epoch_seconds(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// Leaves the time since the last step out of the speed.
    fn pause(&mut self) {
        self.step = Instant::now();
    }

    fn images_per_second(&mut self, images: usize) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.step).as_secs_f64() / images.max(1) as f64;
        self.step = now;
        let smoothed = self.seconds_per_image.map_or(seconds, |old| 0.9 * old + 0.1 * seconds);
        self.seconds_per_image = Some(smoothed);
        1.0 / smoothed.max(1e-9)
    }
}

//! The trainer's checkpoints: writing them, and going back to them.

use std::path::Path;

use super::Trainer;
use super::report::emit;
use crate::optimizer::Optimizer;
use crate::state::{self, TRAINING_FILE};
use crate::{CheckpointSaved, Error, Event, Progress, Result, Trainable, WarningKind};

impl<T: Trainable> Trainer<T> {
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
                    damage = damage.or(Some(name_damage(&path, error)));
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

    /// A checkpoint of where the run is, unless it was just saved.
    pub(super) fn save(&mut self, is_best: bool) -> Result<()> {
        self.report_steps()?;
        let step = self.progress.step;
        let position = Some((step, self.progress.epoch));
        if self.saved_at == position {
            return Ok(());
        }
        for (name, var) in self.task.parameters() {
            let is_finite = vq_ops::sum_of_squares(var.as_tensor())?.is_finite();
            self.require(is_finite, step, || format!("the parameter {name} is not finite"))?;
        }
        let parameters = self.task.parameters();
        let path = self.checkpoints.save(step, is_best, |folder| {
            self.optimizer.with_averages(parameters, || self.task.save(folder))?;
            let tensors = self.with_codebooks(self.optimizer.tensors(parameters));
            state::write(&folder.join(TRAINING_FILE), &tensors, &self.progress)
        })?;
        self.checkpoints.prune(self.config.keep_checkpoints)?;
        self.last_checkpoint = Some(path.clone());
        self.saved_at = position;
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
        let now = self.task.image_counts();
        if let (Some([train, test]), Some([train_now, test_now])) = (progress.images, now) {
            if train != train_now {
                return Err(Error::ResumeImages { was: train, now: train_now });
            }
            if test != test_now {
                let message = format!(
                    "{test_now} images to judge by, where there were {test} before: earlier scores, the best among \
                     them, are of others"
                );
                self.warnings.push((WarningKind::Data, message));
            }
        }
        let progress = Progress { images: now, ..progress };
        self.task.load(path)?;
        self.forget_recording();
        self.restore_codebooks(&tensors)?;
        let restored = Optimizer::restore(self.task.parameters(), &self.config, &tensors)?;
        self.optimizer = restored
            .map_err(|name| Error::damaged(&file, format!("tensor `{name}` does not fit")))?;
        self.saved_at = Some((progress.step, progress.epoch));
        self.progress = progress;
        Ok(())
    }
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

/// The same, named by its file where that is known.
fn name_damage(path: &Path, error: Error) -> Error {
    let advice = "delete its folder to be rid of this message".to_owned();
    match error {
        Error::DamagedCheckpoint { path, cause, .. } => {
            Error::DamagedCheckpoint { path, cause, advice }
        }
        other => {
            Error::DamagedCheckpoint { path: path.to_path_buf(), cause: other.to_string(), advice }
        }
    }
}

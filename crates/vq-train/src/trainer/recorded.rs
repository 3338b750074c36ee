//! Steps that are recorded once and repeated.
//!
//! Of a small model, giving the device its work takes the host longer than the device takes to do it. Where
//! every step is the same work on other numbers, one step is recorded, and those after it are a copy of the
//! batch, a few numbers, and one command. A repeated step computes what the same step would compute by
//! itself, to the bit.

use candle_core::{DType, Device, Tensor};
use vq_ops::{Recording, StepNumber, can_record, rehearse};

use super::Trainer;
use super::pending::{Norm, PartOfStep, Report, Seen};
use crate::optimizer::{self, Clip, Numbers};
use crate::schedule::learning_rate;
use crate::trainable::Repeats;
use crate::{Figures, Metrics, Result, Trainable, WarningKind};

/// Whether steps are repeated.
pub(super) enum Repeating<T: Trainable> {
    /// They cannot be, or are not to be.
    Off,
    /// From the next one on, if they can be.
    Waiting,
    On(Box<Recorded<T>>),
}

/// A step, recorded.
pub(super) struct Recorded<T: Trainable> {
    recording: Recording,
    place: Place<T>,
}

/// What a recorded step reads, and where it leaves its results.
struct Place<T: Trainable> {
    batch: T::Batch,
    numbers: Numbers,
    results: Results<T::Residue>,
}

/// What a step's work gives.
struct Results<R> {
    residue: R,
    figures: Figures,
    /// The terms of the loss and then the gradient's norm, `[n + 1]`.
    values: Tensor,
    examples: usize,
}

/// The results of repeated steps that were not reported yet: a row for each.
pub(super) struct Ledger {
    figures: Figures,
    values: Tensor,
    codes: Vec<Tensor>,
}

impl<T: Trainable> Trainer<T> {
    /// Runs a step as a repeated one, if it can be; gives the batch back if not.
    pub(super) fn repeat(&mut self, mut batch: T::Batch, step: u64) -> Result<Option<T::Batch>> {
        match std::mem::replace(&mut self.repeating, Repeating::Off) {
            Repeating::Off => Ok(Some(batch)),
            Repeating::Waiting => match self.can_repeat() {
                Some(device) => self.record(batch, step, &device).map(|()| None),
                None => Ok(Some(batch)),
            },
            Repeating::On(mut recorded) => {
                let is_alike = match self.task.repeats() {
                    Some(repeats) => overwrite(
                        repeats.batch_tensors(&mut recorded.place.batch),
                        repeats.batch_tensors(&mut batch),
                    )?,
                    None => false,
                };
                let done =
                    if is_alike { Some(self.run_recorded(&mut recorded, step)) } else { None };
                self.repeating = Repeating::On(recorded);
                done.transpose().map(|done| if done.is_some() { None } else { Some(batch) })
            }
        }
    }

    /// A recorded step is one on the tensors that there were then.
    pub(super) fn forget_recording(&mut self) {
        if let Repeating::On(_) = self.repeating {
            self.repeating = Repeating::Waiting;
        }
    }

    /// The device, where steps can be repeated on it.
    fn can_repeat(&self) -> Option<Device> {
        let device = self.task.parameters().values().next()?.device().clone();
        let can = self.config.accumulate <= 1
            && self.read_every > 1
            && can_record(&device)
            && self.task.repeats().is_some();
        can.then_some(device)
    }

    /// Runs the step by itself and records it for those to come.
    fn record(&mut self, mut batch: T::Batch, step: u64, device: &Device) -> Result<()> {
        self.report_steps()?;
        let Some(repeats) = self.task.repeats() else { return Ok(()) };
        own(repeats.batch_tensors(&mut batch))?;
        let numbers = Numbers::new(device)?;
        let lr = self.set_numbers(&numbers, step)?;
        let mut results = rehearse(device, || self.work(repeats, &batch, step, &numbers))?;
        own(repeats.residue_tensors(&mut results.residue))?;
        results.values = results.values.copy()?;
        results.figures.own_codes()?;
        let mut place = Place { batch, numbers, results };
        let recording = Recording::new(device, || {
            let again = self.work(repeats, &place.batch, step, &place.numbers);
            keep(repeats, &mut place.results, again.map_err(candle_core::Error::wrap)?)
        });
        let mut ledger = Ledger::new(&place.results, self.read_every)?;
        ledger.note(&place.results, 0)?;
        self.ledger = Some(ledger);
        let update = repeats.revive(&place.results.residue, step)?;
        let examples = place.results.examples;
        match recording {
            Ok(recording) => {
                self.repeating = Repeating::On(Box::new(Recorded { recording, place }));
            }
            Err(error) => {
                let why = error.to_string();
                // Without a backtrace.
                let why = why.lines().next().unwrap_or_default();
                let message = format!("steps run one by one, since none can be recorded: {why}");
                self.warn(WarningKind::Settings, &message)?;
            }
        }
        let part = PartOfStep { examples, seen: Seen::Noted };
        self.finish(step, lr, vec![part], Norm::Noted, &update)
    }

    fn run_recorded(&mut self, recorded: &mut Recorded<T>, step: u64) -> Result<()> {
        let Recorded { recording, place } = recorded;
        let lr = self.set_numbers(&place.numbers, step)?;
        recording.repeat()?;
        if let Some(ledger) = &mut self.ledger {
            ledger.note(&place.results, self.pending.len())?;
        }
        let update = match self.task.repeats() {
            Some(repeats) => repeats.revive(&place.results.residue, step)?,
            None => crate::Update::default(),
        };
        let part = PartOfStep { examples: place.results.examples, seen: Seen::Noted };
        self.finish(step, lr, vec![part], Norm::Noted, &update)
    }

    /// What the device does in a step.
    fn work(
        &self,
        repeats: &dyn Repeats<T::Batch, T::Residue>,
        batch: &T::Batch,
        step: u64,
        numbers: &Numbers,
    ) -> Result<Results<T::Residue>> {
        let (gradients, part, residue) = self.learn_part(batch, step)?;
        let (norm, clip) = self.clip(&gradients, step)?;
        let (Clip::Waiting(scale), Norm::Waiting(norm), Seen::Waiting(mut figures)) =
            (clip, norm, part.seen)
        else {
            return Err(candle_core::Error::Msg("a step that waits for the device".into()).into());
        };
        self.optimizer.step_by(
            self.task.parameters(),
            |name, var| self.task.decays(name, var),
            &gradients,
            numbers,
            &scale,
        )?;
        repeats.follow(&residue, StepNumber::OnDevice(numbers.step()))?;
        figures.count_codes()?;
        let values = figures.values_and(norm.narrow(0, 0, 1)?)?;
        Ok(Results { residue, figures, values, examples: part.examples })
    }

    fn set_numbers(&self, numbers: &Numbers, step: u64) -> Result<f64> {
        let lr = learning_rate(&self.config, self.progress.step, self.total_steps());
        self.optimizer.set_numbers(numbers, &self.config, (step, lr))?;
        Ok(lr)
    }
}

impl Ledger {
    fn new<R>(results: &Results<R>, rows: usize) -> Result<Self> {
        let row = |tensor: &Tensor| {
            let dims = (rows, tensor.elem_count());
            Tensor::zeros(dims, tensor.dtype(), tensor.device())
        };
        let codes = results.figures.codes().map(row).collect::<candle_core::Result<_>>()?;
        Ok(Self { figures: results.figures.clone(), values: row(&results.values)?, codes })
    }

    fn note<R>(&mut self, results: &Results<R>, row: usize) -> Result<()> {
        let set = |to: &Tensor, from: &Tensor| to.slice_set(&from.reshape((1, ()))?, 0, row);
        set(&self.values, &results.values)?;
        for (to, from) in self.codes.iter().zip(results.figures.codes()) {
            set(to, from)?;
        }
        Ok(())
    }

    /// The first `count` rows.
    pub(super) fn read(&self, count: usize) -> Result<Vec<Report>> {
        let rows = self.values.narrow(0, 0, count)?.to_vec2::<f32>()?;
        let codes = self.codes.iter().map(|codes| codes.narrow(0, 0, count)?.to_vec2::<u32>());
        let codes: Vec<Vec<Vec<u32>>> = codes.collect::<candle_core::Result<_>>()?;
        let report = |(row, values): (usize, &Vec<f32>)| {
            let of_row = codes.iter().filter_map(|level| level.get(row).map(Vec::as_slice));
            let (norm, values) = values.split_last().unwrap_or((&f32::NAN, &[]));
            let (terms, usage): (Metrics, _) = self.figures.with_values(values, of_row);
            Report { terms, usage, examples: 0, norm: f64::from(*norm) }
        };
        Ok(rows.iter().enumerate().map(report).collect())
    }
}

/// Gives tensors a storage of their own.
fn own(tensors: Vec<&mut Tensor>) -> Result<()> {
    for tensor in tensors {
        *tensor = tensor.contiguous()?.copy()?.detach();
    }
    Ok(())
}

/// Copies each tensor over its counterpart; false, and nothing done, where they are not alike.
fn overwrite(to: Vec<&mut Tensor>, from: Vec<&mut Tensor>) -> Result<bool> {
    let is_alike = to.len() == from.len()
        && to.iter().zip(&from).all(|(to, from)| {
            (to.shape(), to.dtype()) == (from.shape(), from.dtype())
                && to.device().same_device(from.device())
        });
    if is_alike {
        for (to, from) in to.into_iter().zip(from) {
            set(to, from)?;
        }
    }
    Ok(is_alike)
}

fn keep<R, B>(
    repeats: &dyn Repeats<B, R>,
    place: &mut Results<R>,
    mut new: Results<R>,
) -> candle_core::Result<()> {
    set(&place.values, &new.values)?;
    for (to, from) in place.figures.codes().zip(new.figures.codes()) {
        set(to, from)?;
    }
    let pairs = repeats.residue_tensors(&mut place.residue).into_iter();
    for (to, from) in pairs.zip(repeats.residue_tensors(&mut new.residue)) {
        set(to, from)?;
    }
    Ok(())
}

/// Copies `from` into the storage of `to`.
fn set(to: &Tensor, from: &Tensor) -> candle_core::Result<()> {
    if to.dtype() == DType::F32 || to.dtype() == DType::U32 {
        return optimizer::set(to, &from.detach());
    }
    candle_core::bail!("a recorded step keeps f32 and u32, not {:?}", to.dtype())
}

//! The metrics file: one JSON object per line.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{Error, Event, Metrics, Observer, Result, file};

/// Writes `metrics.jsonl`: an observer that appends one JSON object per event.
///
/// Every record has `event` and `step`. `step` records (every `log_every` steps and at the end of each
/// epoch) hold the loss and its terms, the learning rate, the gradient's norm and the speed; `epoch`
/// records hold `train` and `test`. A resumed run first drops the records of steps that it will do
/// again, and a line that a crash cut off.
pub struct MetricsFile {
    path: PathBuf,
    log_every: u64,
    file: Option<File>,
}

impl MetricsFile {
    /// For the file at `path`, which is made when the run starts.
    pub fn new(path: impl Into<PathBuf>, log_every: u64) -> Self {
        Self { path: path.into(), log_every: log_every.max(1), file: None }
    }

    fn start(&mut self, resumed: bool, step: u64) -> Result<()> {
        let mut kept = Vec::new();
        if resumed && self.path.exists() {
            kept = read_metrics(&self.path)?;
            kept.retain(|record| record["step"].as_u64().is_some_and(|at| at <= step));
        }
        let mut lines = Vec::new();
        for record in kept {
            lines.extend_from_slice(record.to_string().as_bytes());
            lines.push(b'\n');
        }
        file::write_atomic(&self.path, &lines)?;
        let file = OpenOptions::new().append(true).open(&self.path);
        self.file = Some(file.map_err(Error::write(&self.path))?);
        Ok(())
    }

    fn append(&mut self, record: &Value) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        // In one write, so that other programs see whole lines.
        file.write_all(format!("{record}\n").as_bytes()).map_err(Error::write(&self.path))
    }
}

impl Observer for MetricsFile {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Event::RunStarted(started) = event {
            self.start(started.resumed_from.is_some(), started.step)?;
        }
        if let Event::StepFinished(step) = event
            && step.step % self.log_every != 0
            && step.batch != step.batches
        {
            return Ok(());
        }
        Ok(self.append(&record(event))?)
    }
}

/// The JSON object that stands for an event, as in the metrics file.
pub fn record(event: &Event<'_>) -> Value {
    match event {
        Event::RunStarted(e) => json!({
            "event": "run-started", "step": e.step, "total_steps": e.total_steps,
            "epochs": e.epochs, "batches": e.batches, "parameters": e.parameters,
            "resumed_from": e.resumed_from.map(Path::display).map(|path| path.to_string()),
        }),
        Event::StepFinished(e) => {
            let mut record = Map::new();
            record.insert("event".into(), "step".into());
            record.insert("step".into(), e.step.into());
            record.insert("epoch".into(), e.epoch.into());
            for (name, value) in e.losses.iter() {
                record.insert(name.into(), value.into());
            }
            record.insert("lr".into(), e.lr.into());
            record.insert("grad_norm".into(), e.grad_norm.into());
            record.insert("perplexity".into(), json!(e.perplexity));
            record.insert("codes_in_use".into(), json!(e.codes_in_use));
            record.insert("revived".into(), e.revived.into());
            record.insert("images_per_second".into(), e.images_per_second.into());
            record.into()
        }
        Event::EpochFinished(e) => json!({
            "event": "epoch", "step": e.step, "epoch": e.record.epoch,
            "train": metrics(&e.record.train), "test": e.record.test.as_ref().map(metrics),
            "is_best": e.is_best, "train_seconds": e.train_seconds,
            "evaluation_seconds": e.evaluation_seconds,
        }),
        Event::CheckpointSaved(e) => json!({
            "event": "checkpoint", "step": e.step, "path": e.path.display().to_string(),
            "is_best": e.is_best,
        }),
        Event::Warning(e) => json!({
            "event": "warning", "step": e.step, "kind": e.kind, "message": e.message,
        }),
        Event::RunFinished(e) => json!({ "event": "run-finished", "step": e.step, "best": e.best }),
        Event::RunInterrupted(e) => {
            json!({ "event": "run-interrupted", "step": e.step, "best": e.best })
        }
    }
}

/// The records of a metrics file, oldest first. Lines that are not JSON are left out: a crash cuts off
/// at most the last one.
pub fn read_metrics(path: &Path) -> Result<Vec<Value>> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn metrics(metrics: &Metrics) -> Value {
    metrics
        .iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect::<Map<_, _>>()
        .into()
}

//! A tiny recipe, and observers that remember or interrupt.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vq_train::{
    Event, MetricsFile, Observer, Outcome, Recipe, Result, RunFolder, Tokenizer, Trainer,
};

/// 5 steps an epoch, 3 epochs, a grid of 4×4 out of 16 codes.
pub(crate) fn recipe(more: &[&str]) -> Recipe {
    let text = "
        [model]
        image_size = [16, 16]
        [[model.levels]]
        downsample = 4
        hidden = 8
        residual_blocks = 1
        residual_hidden = 4
        [model.levels.quantizer]
        codebook_size = 16
        dim = 4
        [data]
        source = 'shapes'
        flip = true
        train_count = 43
        test_count = 11
        [train]
        epochs = 3
        batch_size = 8
        samples = 4
        log_every = 1
        warmup_steps = 2";
    let mut recipe = Recipe::from_toml(text, "test").unwrap();
    for assignment in more {
        recipe = recipe.with_override(assignment).unwrap();
    }
    recipe.validate().unwrap();
    recipe
}

pub(crate) fn tokenizer(recipe: &Recipe) -> Result<Tokenizer> {
    let splits = recipe.data.open(recipe.model.image_size)?;
    Tokenizer::new(recipe, &splits, &vq_ops::test_device())
}

/// A trainer for a new run, with its metrics file.
pub(crate) fn trainer(recipe: &Recipe, run: &Path) -> Result<Trainer<Tokenizer>> {
    let folder = RunFolder::create(run, recipe, true)?;
    Ok(Trainer::new(tokenizer(recipe)?, &recipe.train, run)?
        .with_observer(MetricsFile::new(folder.metrics_file(), recipe.train.log_every)))
}

/// A trainer for a run that goes on.
pub(crate) fn resumed(recipe: &Recipe, run: &Path) -> Result<Trainer<Tokenizer>> {
    let folder = RunFolder::open(run)?;
    let mut trainer = Trainer::new(tokenizer(recipe)?, &recipe.train, run)?
        .with_observer(MetricsFile::new(folder.metrics_file(), recipe.train.log_every));
    trainer.resume()?;
    Ok(trainer)
}

/// Runs to the end.
pub(crate) fn train(recipe: &Recipe, run: &Path) {
    assert_eq!(trainer(recipe, run).unwrap().run().unwrap(), Outcome::Finished);
}

/// The bytes of both files of the newest checkpoint.
pub(crate) fn last(run: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "training.safetensors"]
        .map(|name| fs::read(run.join("last").join(name)).unwrap())
}

/// Raises a stop flag, or fails as abruptly as a crash, after a step.
pub(crate) struct At {
    pub(crate) step: u64,
    /// None: fail.
    pub(crate) stop: Option<Arc<AtomicBool>>,
}

impl Observer for At {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match (event, &self.stop) {
            (Event::StepFinished(event), Some(stop)) if event.step == self.step => {
                stop.store(true, Ordering::Relaxed);
                Ok(())
            }
            (Event::StepFinished(event), None) if event.step == self.step => Err("crash".into()),
            _ => Ok(()),
        }
    }
}

/// Remembers events as the JSON of the metrics file.
#[derive(Clone, Default)]
pub(crate) struct Memory(pub(crate) Arc<Mutex<Vec<serde_json::Value>>>);

impl Observer for Memory {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.lock().unwrap().push(vq_train::record(event));
        Ok(())
    }
}

impl Memory {
    /// The events of that name.
    pub(crate) fn all(&self, name: &str) -> Vec<serde_json::Value> {
        let events = self.0.lock().unwrap();
        events.iter().filter(|event| event["event"] == name).cloned().collect()
    }
}

//! How fast the real training loop runs.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use vq_data::{Dataset, Splits};
use vq_model::Precision;
use vq_train::{Event, Observer, Recipe, Tokenizer, Trainer};

use super::Options;
use super::checks::text;
use super::report::{OURS, Report, Speed};
use super::training::{Repeated, noise_images};

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Steps before the clock starts: plans are made and memory is taken.
const WARM_UP: u64 = 20;
/// Steps that a device's report holds, by the recipes' `log_every`: those of one report come within an
/// instant, so that time counts at its last.
const REPORTED: u64 = 10;

pub(super) fn measure(device: &Device, options: &Options, report: &mut Report) {
    for model in &options.models {
        for format in &options.formats {
            for &batch in &options.batches {
                let images_per_second =
                    time(device, model, format, batch, options.seconds).map_err(text);
                let (model, format) = (model.clone(), format.clone());
                let program = OURS.to_owned();
                report.speed(Speed { program, model, format, batch, images_per_second });
            }
        }
    }
    vq_ops::set_strict_f32(false);
}

/// Images a second of training `model` on made-up images.
fn time(
    device: &Device,
    model: &str,
    format: &str,
    batch: usize,
    seconds: f64,
) -> Result<f64, Boxed> {
    // Small images lie on the device, as CIFAR-10's do; the large ones come as files' do, in batches.
    let (mut recipe, side, len, are_costly) = match model {
        "standard" => (Recipe::default(), 32, 1 << 18, false),
        "imagenet256" => {
            let text = include_str!("../../../configs/imagenet256.toml");
            let recipe = Recipe::from_toml(text, "imagenet256")?;
            (recipe.with_override("train.accumulate=1")?, 256, 1 << 20, true)
        }
        _ => return Err(format!("the models are standard and imagenet256, not {model}").into()),
    };
    for change in [
        "train.kmeans.rounds=2",
        "train.eval_every=1000000",
        "train.epochs=1000000",
        "train.samples=0",
    ] {
        recipe = recipe.with_override(change)?;
    }
    vq_ops::set_strict_f32(format == "f32");
    recipe.train.precision = match format {
        "f32" | "tf32" => Precision::F32,
        "bf16" => Precision::Bf16,
        _ => return Err(format!("the formats are f32, tf32 and bf16, not {format}").into()),
    };
    recipe.train.batch_size = batch;
    // As many as make whole reports; a few images, again and again.
    let reported = batch.max(1) * REPORTED as usize;
    let len = (len / reported).max(1) * reported;
    let images = noise_images(1024, side)?;
    let data: Arc<dyn Dataset> = Arc::new(Repeated { images, len, are_costly });
    let splits = Splits { train: data.clone(), test: data, notes: Vec::new(), broken: Vec::new() };
    let folder = tempfile::tempdir()?;
    let tokenizer = Tokenizer::new(&recipe, &splits, device)?;
    let stop = Arc::new(AtomicBool::new(false));
    let found = Rc::new(Cell::new(None));
    let watch = Watch {
        seconds,
        start: None,
        epoch_end: None,
        pause: Duration::ZERO,
        found: found.clone(),
        stop: stop.clone(),
    };
    let trainer = Trainer::new(tokenizer, &recipe.train, folder.path())?;
    trainer.with_observer(watch).with_stop_flag(stop).run()?;
    let (steps, elapsed): (u64, f64) = found.get().ok_or("the run ended before it was timed")?;
    Ok(steps as f64 * batch as f64 / elapsed)
}

/// Times the steps from the first report after the warm-up on, and stops the run when that is enough. Steps
/// are reported when the device has done them, so that nothing is left in its queue.
struct Watch {
    seconds: f64,
    start: Option<(u64, Instant)>,
    epoch_end: Option<Instant>,
    /// Time between epochs, spent on checkpoints.
    pause: Duration,
    /// (steps, seconds)
    found: Rc<Cell<Option<(u64, f64)>>>,
    stop: Arc<AtomicBool>,
}

impl Observer for Watch {
    fn observe(&mut self, event: &Event<'_>) -> Result<(), Boxed> {
        let step = match event {
            Event::StepFinished(step) => step,
            Event::EpochFinished(_) => {
                self.epoch_end = Some(Instant::now());
                return Ok(());
            }
            Event::CheckpointSaved(_) => {
                let end = self.epoch_end.take().filter(|_| self.start.is_some());
                self.pause += end.map_or(Duration::ZERO, |end| end.elapsed());
                return Ok(());
            }
            _ => return Ok(()),
        };
        if !step.step.is_multiple_of(REPORTED) {
            return Ok(());
        }
        match self.start {
            None if step.step >= WARM_UP => self.start = Some((step.step, Instant::now())),
            Some((first, start)) if step.step > first => {
                let elapsed = start.elapsed().saturating_sub(self.pause).as_secs_f64();
                if elapsed >= self.seconds && !self.stop.load(Ordering::Relaxed) {
                    self.found.set(Some((step.step - first, elapsed)));
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

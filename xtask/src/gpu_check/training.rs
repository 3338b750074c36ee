//! A short run on the device beside one on the CPU, and a run that was interrupted.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Var};
use vq_data::{Dataset, ImageShape, InMemory, Splits};
use vq_model::Precision;
use vq_train::{Event, Observer, PriorTask, Recipe, Tokenizer, Trainable, Trainer};

use super::checks::{noise, text};
use super::prior::{Kind, PriorFolder};
use super::report::Report;

type Boxed = Box<dyn std::error::Error + Send + Sync>;
pub(super) type Result<T> = std::result::Result<T, Boxed>;

/// Steps in an epoch.
pub(super) const STEPS: usize = 10;
pub(super) const BATCH: usize = 32;

/// Something to train on a device for so many epochs, with its run in a folder.
type Make<'a, T> = &'a dyn Fn(usize, &Device, &Path) -> Result<Trainer<T>>;

/// What is compared of a model.
trait Compared: Trainable {
    /// The term of the loss whose course is.
    const LOSS: &'static str;

    /// All that training changes.
    fn variables(&self) -> Vec<(&String, &Var)>;
}

impl Compared for Tokenizer {
    const LOSS: &'static str = "reconstruction";

    fn variables(&self) -> Vec<(&String, &Var)> {
        self.parameters().iter().chain(self.model().buffers()).collect()
    }
}

impl Compared for PriorTask {
    const LOSS: &'static str = "loss";

    fn variables(&self) -> Vec<(&String, &Var)> {
        self.parameters().iter().collect()
    }
}

#[derive(Clone, Copy)]
enum Model {
    OneLevel,
    TwoLevels,
    /// Of four codes at each position, side by side, and a decoder with a likelihood.
    Likelihood,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::OneLevel => "one level",
            Self::TwoLevels => "two levels",
            Self::Likelihood => "a likelihood",
        }
    }

    fn recipe(self) -> vq_train::Result<Recipe> {
        match self {
            Self::OneLevel => Ok(Recipe::default()),
            Self::TwoLevels => {
                let text = include_str!("../../../configs/cifar10-hierarchical.toml");
                Recipe::from_toml(text, "cifar10-hierarchical")
            }
            Self::Likelihood => {
                let text = include_str!("../../../configs/cifar10-likelihood.toml");
                Recipe::from_toml(text, "cifar10-likelihood")
            }
        }
    }
}

pub(super) fn check(device: &Device, report: &mut Report) {
    vq_ops::set_strict_f32(true);
    for model in [Model::OneLevel, Model::TwoLevels, Model::Likelihood] {
        let name = model.name();
        for precision in [Precision::F32, Precision::Bf16] {
            let make = |epochs: usize, device: &Device, run: &Path| {
                trainer((model, precision), epochs, device, run)
            };
            if precision == Precision::F32 {
                course(name, &make, device, report);
            }
            bits_agree(&format!("{name}, {precision}"), &make, device, report);
        }
    }
    for kind in [Kind::PixelCnn, Kind::Transformer] {
        let name = kind.name();
        match PriorFolder::new(kind) {
            Ok(folder) => {
                let make = |epochs: usize, device: &Device, run: &Path| {
                    folder.trainer(epochs, device, run)
                };
                course(name, &make, device, report);
                bits_agree(name, &make, device, report);
            }
            Err(error) => report.check(name, Err(text(error))),
        }
    }
    vq_ops::set_strict_f32(false);
}

fn course<T: Compared>(name: &str, make: Make<'_, T>, device: &Device, report: &mut Report) {
    let found = beside_the_cpu(make, device).map_err(text);
    report.check(&format!("{name}: 40 steps beside the CPU's"), found);
}

fn bits_agree<T: Compared>(name: &str, make: Make<'_, T>, device: &Device, report: &mut Report) {
    report.check(&format!("{name}: resumed to the bit"), resumed(make, device).map_err(text));
    if vq_ops::can_record(device) {
        let found = recorded(make, device).map_err(text);
        report.check(&format!("{name}: recorded steps, to the bit"), found);
    }
}

/// The mean of the reconstruction error over the last epoch. Rounding decides single codes and then grows, so
/// that only the course can agree.
fn beside_the_cpu<T: Compared>(make: Make<'_, T>, device: &Device) -> Result<String> {
    let run = |device: &Device| -> Result<(f64, f64)> {
        let folder = tempfile::tempdir()?;
        let losses = Losses { name: T::LOSS, all: Arc::default() };
        make(4, device, folder.path())?.with_observer(losses.clone()).run()?;
        let losses = losses.all.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(first), Some(last)) = (losses.first(), losses.get(3 * STEPS..)) else {
            return Err(format!("{} steps were reported", losses.len()).into());
        };
        Ok((*first, last.iter().sum::<f64>() / last.len() as f64))
    };
    let (ours, theirs) = (run(device)?, run(&Device::Cpu)?);
    let found = format!(
        "first loss {:.6} and {:.6}, mean of the last epoch {:.4} and {:.4}",
        ours.0, theirs.0, ours.1, theirs.1
    );
    let is_alike = (ours.0 / theirs.0 - 1.).abs() < 1e-3 && (ours.1 / theirs.1 - 1.).abs() < 0.05;
    if is_alike { Ok(found) } else { Err(found.into()) }
}

fn resumed<T: Compared>(make: Make<'_, T>, device: &Device) -> Result<String> {
    let (straight, parts) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let mut whole = make(2, device, straight.path())?;
    whole.run()?;
    make(1, device, parts.path())?.run()?;
    let mut second = make(2, device, parts.path())?;
    if second.resume()?.is_none() {
        return Err("there is no checkpoint to resume from".into());
    }
    second.run()?;
    compare(&bits(whole.task())?, &bits(second.task())?)
}

/// A run of repeated steps beside one of steps one by one.
fn recorded<T: Compared>(make: Make<'_, T>, device: &Device) -> Result<String> {
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let warnings = Warnings::default();
    let mut repeated = make(2, device, first.path())?.with_observer(warnings.clone());
    let mut one_by_one = make(2, device, second.path())?.without_recording();
    repeated.run()?;
    one_by_one.run()?;
    if !repeated.is_recorded() {
        let why = warnings.0.lock().unwrap_or_else(PoisonError::into_inner).join("; ");
        return Err(format!("no step was recorded: {why}").into());
    }
    compare(&bits(repeated.task())?, &bits(one_by_one.task())?)
}

fn compare(ours: &Bits, theirs: &Bits) -> Result<String> {
    let differing = ours.iter().filter(|(name, bits)| theirs.get(*name) != Some(*bits)).count();
    let count = ours.len();
    if differing == 0 {
        Ok(format!("all {count} tensors are equal"))
    } else {
        Err(format!("{differing} of {count} tensors differ").into())
    }
}

type Bits = BTreeMap<String, Vec<u32>>;

fn bits(task: &impl Compared) -> Result<Bits> {
    let all = task.variables().into_iter();
    all.map(|(name, var)| {
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        Ok((name.clone(), values.into_iter().map(f32::to_bits).collect()))
    })
    .collect()
}

fn trainer(
    (model, precision): (Model, Precision),
    epochs: usize,
    device: &Device,
    folder: &Path,
) -> Result<Trainer<Tokenizer>> {
    let mut recipe = model.recipe()?;
    for change in [
        "train.schedule=constant",
        "train.warmup_steps=0",
        "train.lr=0.001",
        "train.kmeans.rounds=0",
        "train.samples=0",
        "train.eval_every=1000",
        "model.image_size=[16,16]",
    ] {
        recipe = recipe.with_override(change)?;
    }
    for level in &mut recipe.model.levels {
        (level.hidden, level.residual_hidden) = (32, 8);
        (level.quantizer.codebook_size, level.quantizer.dim) = (32, 16);
        level.quantizer.groups = level.quantizer.groups.min(4);
    }
    recipe.train.precision = precision;
    recipe.train.epochs = epochs;
    recipe.train.batch_size = BATCH;
    let data = images(STEPS * BATCH, 16)?;
    let splits = Splits { train: data.clone(), test: data, notes: Vec::new(), broken: Vec::new() };
    let tokenizer = Tokenizer::new(&recipe, &splits, device)?;
    Ok(Trainer::new(tokenizer, &recipe.train, folder)?)
}

/// Smooth ramps in three colours with some noise.
pub(super) fn images(count: usize, side: usize) -> Result<Arc<dyn Dataset>> {
    let shape = ImageShape { channels: 3, height: side, width: side };
    let rough = noise(&[count * 6], 5);
    let mut pixels = Vec::with_capacity(count * shape.pixels());
    for image in rough.chunks_exact(6) {
        for channel in image.chunks_exact(2) {
            for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
                let (y, x) = (y as f32 / side as f32 - 0.5, x as f32 / side as f32 - 0.5);
                pixels.push((127.5 + 120. * (channel[0] * y + channel[1] * x)) as u8);
            }
        }
    }
    Ok(Arc::new(InMemory::new("ramps", shape, pixels, vec![0; count], Vec::new())?))
}

/// Noise, as the comparison's.
pub(super) fn noise_images(count: usize, side: usize) -> Result<Arc<dyn Dataset>> {
    let shape = ImageShape { channels: 3, height: side, width: side };
    let pixels = noise(&[count * shape.pixels()], 6);
    let pixels = pixels.into_iter().map(|v| (127.5 + 127.5 * v) as u8);
    let labels = vec![0; count];
    Ok(Arc::new(InMemory::new("noise", shape, pixels.collect(), labels, Vec::new())?))
}

/// Some images as if they were many, so that an epoch, with what comes at its end, is long.
pub(super) struct Repeated {
    pub(super) images: Arc<dyn Dataset>,
    pub(super) len: usize,
    /// So that several threads read, as they would decode files.
    pub(super) are_costly: bool,
}

impl Dataset for Repeated {
    fn name(&self) -> &str {
        self.images.name()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn shape(&self) -> ImageShape {
        self.images.shape()
    }

    fn class_names(&self) -> &[String] {
        self.images.class_names()
    }

    fn label(&self, _: usize) -> u32 {
        0
    }

    fn read(&self, index: usize, out: &mut [u8]) -> std::result::Result<(), vq_data::Error> {
        self.images.read(index % self.images.len(), out)
    }

    fn is_costly(&self) -> bool {
        self.are_costly
    }
}

/// A term of the loss in every step.
#[derive(Clone)]
struct Losses {
    name: &'static str,
    all: Arc<Mutex<Vec<f64>>>,
}

impl Observer for Losses {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        if let Event::StepFinished(step) = event {
            let loss = step.losses.get(self.name).unwrap_or(f64::NAN);
            self.all.lock().unwrap_or_else(PoisonError::into_inner).push(loss);
        }
        Ok(())
    }
}

/// What a run warns of.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Observer for Warnings {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        if let Event::Warning(warning) = event {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(warning.message.to_owned());
        }
        Ok(())
    }
}

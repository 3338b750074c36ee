//! The measured programs on our side: one process each, told when to work by `cargo xtask bench`.

use std::io::{BufRead, Write};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use vq_data::{Dataset, ImageShape, InMemory, Splits};
use vq_model::{CodebookRule, Config, Precision, VqVae};
use vq_train::{Event, Observer, Recipe, Tokenizer, TrainConfig, Trainer};

use super::naive::Naive;

pub(super) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Images a step or a batch.
pub(super) const BATCH: usize = 128;
/// Batches in a measured piece.
const BATCHES: usize = 16;

/// Does the named work the named way until standard input ends.
pub fn run(work: &str, way: &str) -> Result<()> {
    match (work, way) {
        ("gemm", _) => gemm(),
        ("profile", _) => {
            say(&super::profile::profile()?);
            Ok(())
        }
        ("train", "ours") => train_ours(Precision::F32),
        ("train", "ours-bf16") => train_ours(Precision::Bf16),
        ("pixelcnn" | "transformer", "ours") => super::prior::train(work),
        ("train", "candle") => train_candle(),
        ("forward", "ours") => forward_ours(Precision::F32),
        ("forward", "ours-bf16") => forward_ours(Precision::Bf16),
        ("forward", "candle") => {
            let model = Naive::new()?;
            forward(|images| Ok(model.forward(images)?.0.detach()))
        }
        (search, "ours") => match search.strip_prefix("search-").map(str::parse) {
            Some(Ok(codes)) => nearest(codes),
            _ => Err(format!("no such work: {work} {way}").into()),
        },
        _ => Err(format!("no such work: {work} {way}").into()),
    }
}

/// The standard model with the gradient codebook: 695,491 parameters.
pub(super) fn standard() -> Config {
    let mut config = Config::default();
    for level in &mut config.levels {
        level.quantizer.rule = CodebookRule::Gradient;
    }
    config
}

/// Waits for the next order; false at the end of the input.
fn told() -> bool {
    let mut line = String::new();
    matches!(std::io::stdin().lock().read_line(&mut line), Ok(count) if count > 0)
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// A line of what Linux says of this process's memory, in MiB; 0 where it says nothing.
fn memory(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(name));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|n| n.parse().ok());
    kib.unwrap_or(0.) / 1024.
}

/// By how many MiB the resident memory grows while `work` runs, at most; `None` where Linux does not let the
/// peak be forgotten.
fn growth(work: impl FnOnce() -> Result<()>) -> Result<Option<f64>> {
    let is_reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = memory("VmRSS");
    work()?;
    Ok(is_reset.then(|| memory("VmHWM") - before))
}

fn answer(units: f64, since: Instant, more: Option<f64>) {
    let seconds = since.elapsed().as_secs_f64();
    let more = more.map(|more| format!(" {more}")).unwrap_or_default();
    say(&format!("{units} {seconds} {}{more}", memory("VmHWM")));
}

/// Warms up, then repeats `piece` on order.
fn serve(units: f64, mut piece: impl FnMut() -> Result<()>) -> Result<()> {
    piece()?;
    repeat(units, piece, None)
}

/// Repeats `piece` on order; `more` is told with each answer.
fn repeat(units: f64, mut piece: impl FnMut() -> Result<()>, more: Option<f64>) -> Result<()> {
    say("ready");
    while told() {
        let start = Instant::now();
        piece()?;
        answer(units, start, more);
    }
    Ok(())
}

/// Side of the matrices whose product tells what the CPU can do in f32.
const SIDE: usize = 2048;

fn gemm() -> Result<()> {
    let a = Tensor::rand(-1f32, 1., (SIDE, SIDE), &Device::Cpu)?;
    serve(2. * (SIDE as f64).powi(3), || {
        a.matmul(&a)?;
        Ok(())
    })
}

/// Multiplies two matrices and says how many operations that took.
pub(super) fn gemm_operations() -> Result<f64> {
    static FACTOR: OnceLock<Tensor> = OnceLock::new();
    let a = if let Some(a) = FACTOR.get() {
        a
    } else {
        let a = Tensor::rand(-1f32, 1., (SIDE, SIDE), &Device::Cpu)?;
        FACTOR.get_or_init(|| a)
    };
    a.matmul(a)?;
    Ok(2. * (SIDE as f64).powi(3))
}

/// Pixels without structure; speed does not depend on what they show.
pub(super) fn noise_images() -> Result<Arc<dyn Dataset>> {
    const COUNT: usize = 50_000;
    let shape = ImageShape { channels: 3, height: 32, width: 32 };
    let pixels = noise(COUNT * shape.pixels());
    Ok(Arc::new(InMemory::new("noise", shape, pixels, vec![0; COUNT], Vec::new())?))
}

fn noise(count: usize) -> Vec<u8> {
    let mut state = 1u64;
    let each = (0..count).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    });
    each.collect()
}

/// Lets the real training loop run, and holds it between the measured pieces.
pub(super) struct Gate {
    /// Images a step.
    batch: usize,
    steps: usize,
    start: Option<Instant>,
}

impl Gate {
    pub(super) fn new(batch: usize) -> Self {
        Self { batch, steps: 0, start: None }
    }
}

impl Observer for Gate {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        if !matches!(event, Event::StepFinished(_)) {
            return Ok(());
        }
        self.steps += 1;
        if !self.steps.is_multiple_of(BATCHES) {
            return Ok(());
        }
        match self.start {
            Some(start) => answer((BATCHES * self.batch) as f64, start, None),
            None => say("ready"),
        }
        if !told() {
            std::process::exit(0);
        }
        self.start = Some(Instant::now());
        Ok(())
    }
}

fn forward_ours(precision: Precision) -> Result<()> {
    let mut model = VqVae::new(&standard(), 0, &Device::Cpu)?;
    model.set_precision(precision);
    forward(|images| Ok(model.reconstruct(images)?))
}

fn train_ours(precision: Precision) -> Result<()> {
    let (tokenizer, config) = training(precision)?;
    let folder = std::env::temp_dir().join(format!("vq-bench-{}", std::process::id()));
    Trainer::new(tokenizer, &config, folder)?.with_observer(Gate::new(BATCH)).run()?;
    Ok(())
}

/// The standard model and how it is trained, for longer than anyone measures.
pub(super) fn training(precision: Precision) -> Result<(Tokenizer, TrainConfig)> {
    let mut recipe = Recipe::default().with_override("train.kmeans.rounds=0")?;
    recipe.model = standard();
    recipe.train.revival.threshold = 0.;
    recipe.train.eval_every = 1_000_000;
    recipe.train.epochs = 1_000_000;
    recipe.train.precision = precision;
    let data = noise_images()?;
    let splits = Splits { train: data.clone(), test: data, notes: Vec::new(), broken: Vec::new() };
    Ok((Tokenizer::new(&recipe, &splits, &Device::Cpu)?, recipe.train))
}

fn train_candle() -> Result<()> {
    let model = Naive::new()?;
    let params = ParamsAdamW { lr: 3e-4, weight_decay: 0., ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(model.variables(), params)?;
    let images = Tensor::rand(-0.5f32, 0.5, (BATCH, 3, 32, 32), &Device::Cpu)?;
    serve((2 * BATCH) as f64, || {
        for _ in 0..2 {
            let (reconstruction, codebook, commitment) = model.forward(&images)?;
            let error = (reconstruction - &images)?.sqr()?.mean_all()?;
            let loss = ((error / 0.0628)? + codebook + (commitment * 0.25)?)?;
            optimizer.backward_step(&loss)?;
        }
        Ok(())
    })
}

/// A set as large as CIFAR-10's for testing, batch by batch; the last batch is smaller.
fn forward(reconstruct: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    const IMAGES: usize = 10_000;
    let pixels = noise(IMAGES * 3 * 32 * 32);
    let set = Tensor::from_vec(pixels, (IMAGES, 3, 32, 32), &Device::Cpu)?;
    serve(IMAGES as f64, || {
        for first in (0..IMAGES).step_by(BATCH) {
            let batch = set.narrow(0, first, BATCH.min(IMAGES - first))?;
            reconstruct(&batch.to_dtype(DType::F32)?.affine(1. / 255., -0.5)?)?;
        }
        Ok(())
    })
}

fn nearest(codes: usize) -> Result<()> {
    const COUNT: usize = 65_536;
    let z = Tensor::randn(0f32, 1., (COUNT, 64), &Device::Cpu)?;
    let codebook = Tensor::randn(0f32, 1., (codes, 64), &Device::Cpu)?;
    let piece = || {
        let found = vq_ops::nearest_codes(&z, &codebook)?;
        if found.max(D::Minus1)?.to_scalar::<u32>()? as usize >= codes {
            return Err("a code out of range".into());
        }
        Ok(())
    };
    // Threads and their stacks are there already; what the search takes is not.
    vq_ops::nearest_codes(&z.narrow(0, 0, 1024)?, &codebook.narrow(0, 0, 1)?)?;
    let working = growth(piece)?;
    repeat(COUNT as f64, piece, working)
}

//! The measured programs on our side: one process each, told when to work by `cargo xtask bench`.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use vq_data::{Dataset, ImageShape, InMemory, Splits};
use vq_model::{CodebookRule, Config, Precision, VqVae};
use vq_train::{Event, Observer, Recipe, Tokenizer, Trainer};

use super::naive::Naive;

pub(super) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const BATCH: usize = 128;
/// Batches in a measured piece.
const BATCHES: usize = 16;

/// Does the named work the named way until standard input ends.
pub fn run(work: &str, way: &str) -> Result<()> {
    match (work, way) {
        ("gemm", _) => gemm(),
        ("profile", precision) => {
            say(&super::profile::profile(precision.parse()?)?);
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
fn standard() -> Config {
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

/// Peak resident memory of this process in MiB, where the system tells.
fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|n| n.parse().ok());
    kib.unwrap_or(0.) / 1024.
}

fn answer(units: f64, since: Instant) {
    let seconds = since.elapsed().as_secs_f64();
    say(&format!("{units} {seconds} {}", peak_memory()));
}

/// Warms up, then repeats `piece` on order.
fn serve(units: f64, mut piece: impl FnMut() -> Result<()>) -> Result<()> {
    piece()?;
    say("ready");
    while told() {
        let start = Instant::now();
        piece()?;
        answer(units, start);
    }
    Ok(())
}

fn gemm() -> Result<()> {
    const SIDE: usize = 2048;
    let a = Tensor::rand(-1f32, 1., (SIDE, SIDE), &Device::Cpu)?;
    serve(2. * (SIDE as f64).powi(3), || {
        a.matmul(&a)?;
        Ok(())
    })
}

/// Pixels without structure; speed does not depend on what they show.
fn noise_images() -> Result<Arc<dyn Dataset>> {
    const COUNT: usize = 50_000;
    let shape = ImageShape { channels: 3, height: 32, width: 32 };
    let mut state = 1u64;
    let pixels = (0..COUNT * shape.pixels()).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    });
    Ok(Arc::new(InMemory::new("noise", shape, pixels.collect(), vec![0; COUNT], Vec::new())?))
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
            Some(start) => answer((BATCHES * self.batch) as f64, start),
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
    let mut recipe = Recipe::default().with_override("train.kmeans.rounds=0")?;
    recipe.model = standard();
    recipe.train.revival.threshold = 0.;
    recipe.train.eval_every = 1_000_000;
    recipe.train.epochs = 1_000_000;
    recipe.train.precision = precision;
    let data = noise_images()?;
    let splits = Splits { train: data.clone(), test: data, notes: Vec::new(), broken: Vec::new() };
    let folder = std::env::temp_dir().join(format!("vq-bench-{}", std::process::id()));
    let tokenizer = Tokenizer::new(&recipe, &splits, &Device::Cpu)?;
    Trainer::new(tokenizer, &recipe.train, folder)?.with_observer(Gate::new(BATCH)).run()?;
    Ok(())
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

fn forward(reconstruct: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let images = Tensor::rand(-0.5f32, 0.5, (BATCH, 3, 32, 32), &Device::Cpu)?;
    serve((BATCHES * BATCH) as f64, || {
        for _ in 0..BATCHES {
            reconstruct(&images)?;
        }
        Ok(())
    })
}

fn nearest(codes: usize) -> Result<()> {
    const COUNT: usize = 65_536;
    let z = Tensor::randn(0f32, 1., (COUNT, 64), &Device::Cpu)?;
    let codebook = Tensor::randn(0f32, 1., (codes, 64), &Device::Cpu)?.to_dtype(DType::F32)?;
    serve(COUNT as f64, || {
        let found = vq_ops::nearest_codes(&z, &codebook)?;
        if found.max(D::Minus1)?.to_scalar::<u32>()? as usize >= codes {
            return Err("a code out of range".into());
        }
        Ok(())
    })
}

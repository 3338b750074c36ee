//! How long a training step and sampling take, with and without the caches:
//!
//! ```text
//! cargo run --release -p vq-prior --example speed -- pixelcnn|transformer [GRID] [BATCH] [STEPS]
//! ```
//!
//! Without caches only a few codes are drawn, spread over the grid; every one of them costs the same.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Instant;

use candle_core::Device;
use vq_prior::{
    Conditions, Config, Network, PixelCnnConfig, Prior, Result, SampleOptions, Training,
    TransformerConfig,
};

/// As in the binary: large activations come and go in every step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().unwrap_or_default();
    let mut number = |default| arguments.next().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (side, batch, steps): (usize, usize, usize) = (number(32), number(1), number(12));
    let network = if kind == "transformer" {
        Network::Transformer(TransformerConfig::default())
    } else {
        Network::PixelCnn(PixelCnnConfig::default())
    };
    let config = Config { grid: [side, side], network, ..Config::default() };
    let prior = Prior::new(&config, 0, &Device::Cpu)?;
    let size: usize = prior.parameters().values().map(|var| var.elem_count()).sum();
    println!("{size} parameters, grid {side}×{side}, batch {batch}");

    let start = Instant::now();
    let codes = prior.sample(batch, &Conditions::default(), &SampleOptions::default(), None)?;
    let cached = start.elapsed().as_secs_f64();
    println!("sampling with caches: {cached:.3} s");

    let mut times = Vec::new();
    let mut stepper = prior.recomputing_stepper(&Conditions::default(), batch)?;
    for _ in 0..3 {
        let start = Instant::now();
        stepper.logits()?;
        times.push(start.elapsed().as_secs_f64());
        stepper.push(&vec![0; batch])?;
    }
    let each = median(&mut times);
    let whole = each * config.codes_per_image() as f64;
    println!(
        "without: {each:.4} s a code, {whole:.1} s in all: {:.0} times as long",
        whole / cached
    );

    let mut times = Vec::new();
    for step in 0..steps as u64 {
        let start = Instant::now();
        let training = Training { seed: 0, step };
        let loss = prior.loss(&codes, &Conditions::default(), training)?;
        let gradients = loss.backward()?;
        times.push(start.elapsed().as_secs_f64());
        drop(gradients);
    }
    println!(
        "training step without the optimizer: median {:.4} s, fastest {:.4} s",
        median(&mut times),
        times.first().copied().unwrap_or(f64::NAN)
    );
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

//! The operations on the shapes of the standard model, batch 128, against candle's own.
//!
//!     cargo bench -p vq-ops
//!
//! `VQ_CPU=avx2` or `VQ_CPU=portable` measures the kernels of lesser CPUs; `RAYON_NUM_THREADS` sets
//! the threads.

#![allow(missing_docs, clippy::expect_used)] // a bench may panic

use candle_core::{Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vq_ops::{AdamWStep, Conv2d, ConvTranspose2d, Layer, Precision, Stack, composed};

const BATCH: usize = 128;

fn random(shape: &[usize]) -> Tensor {
    Tensor::rand(-1f32, 1., shape, &Device::Cpu).expect("a random tensor")
}

type Run<'a> = (&'a str, Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>);

/// Forward, and forward with backward, of each way to run a layer.
fn layer(c: &mut Criterion, name: &str, multiply_adds: u64, x: &Var, runs: &[Run<'_>]) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    for (way, run) in runs {
        group.throughput(Throughput::Elements(2 * multiply_adds));
        group.bench_function(format!("forward/{way}"), |b| {
            b.iter(|| run(&x.as_detached_tensor()).expect("a forward pass"));
        });
        group.throughput(Throughput::Elements(6 * multiply_adds));
        group.bench_function(format!("step/{way}"), |b| {
            b.iter(|| {
                let y = run(x.as_tensor()).expect("a forward pass");
                y.backward().expect("a backward pass")
            });
        });
    }
    group.finish();
}

fn convolutions(c: &mut Criterion) {
    for (name, size, inner, outer, kernel, stride) in [
        ("conv 4x4/2 3→64 at 32", 32, 3, 64, 4, 2),
        ("conv 4x4/2 64→128 at 16", 16, 64, 128, 4, 2),
        ("conv 3x3 128→128 at 8", 8, 128, 128, 3, 1),
        ("conv 3x3 128→32 at 8", 8, 128, 32, 3, 1),
        ("conv 3x3 64→128 at 8", 8, 64, 128, 3, 1),
        ("conv 1x1 32→128 at 8", 8, 32, 128, 1, 1),
        ("conv 1x1 128→64 at 8", 8, 128, 64, 1, 1),
    ] {
        let config =
            Conv2d { stride, padding: kernel / 2 - usize::from(stride == 2), ..Conv2d::default() };
        let x = Var::from_tensor(&random(&[BATCH, size, size, inner])).expect("a variable");
        let weight =
            Var::from_tensor(&random(&[outer, inner, kernel, kernel])).expect("a variable");
        let out = size / stride;
        let work = (BATCH * out * out * kernel * kernel * inner * outer) as u64;
        let bf16 = Conv2d { precision: Precision::Bf16, ..config };
        let runs: [Run<'_>; 3] = [
            ("ours", Box::new(|x| vq_ops::conv2d(x, &weight, None, config))),
            ("ours-bf16", Box::new(|x| vq_ops::conv2d(x, &weight, None, bf16))),
            ("candle", Box::new(|x| composed::conv2d(x, &weight, None, config))),
        ];
        layer(c, name, work, &x, &runs);
    }
    for (name, size, inner, outer) in
        [("convT 4x4/2 128→64 at 8", 8, 128, 64), ("convT 4x4/2 64→3 at 16", 16, 64, 3)]
    {
        let config = ConvTranspose2d { stride: 2, padding: 1, ..ConvTranspose2d::default() };
        let x = Var::from_tensor(&random(&[BATCH, size, size, inner])).expect("a variable");
        let weight = Var::from_tensor(&random(&[inner, outer, 4, 4])).expect("a variable");
        let work = (BATCH * size * size * 16 * inner * outer) as u64;
        let bf16 = ConvTranspose2d { precision: Precision::Bf16, ..config };
        let runs: [Run<'_>; 3] = [
            ("ours", Box::new(|x| vq_ops::conv_transpose2d(x, &weight, None, config))),
            ("ours-bf16", Box::new(|x| vq_ops::conv_transpose2d(x, &weight, None, bf16))),
            ("candle", Box::new(|x| composed::conv_transpose2d(x, &weight, None, config))),
        ];
        layer(c, name, work, &x, &runs);
    }
}

/// A residual layer as one operation, with ReLU, bias and addition within the convolutions, against the
/// same one by one.
fn fused(c: &mut Criterion) {
    let residual = Layer::Residual { channels: 128, hidden: 32 };
    let parameters: Vec<Tensor> = residual
        .parameters()
        .iter()
        .map(|(_, shape)| Var::from_tensor(&random(shape)).expect("a variable").as_tensor().clone())
        .collect();
    let x = Var::from_tensor(&random(&[BATCH, 8, 8, 128])).expect("a variable");
    let f32 = Stack::new(vec![residual]).expect("a stack");
    let mut bf16 = f32.clone();
    bf16.set_precision(Precision::Bf16);
    let one_by_one = |x: &Tensor| composed::only(|| f32.forward_layerwise(x, &parameters));
    let runs: [Run<'_>; 4] = [
        ("ours", Box::new(|x| f32.forward(x, &parameters))),
        ("ours-bf16", Box::new(|x| bf16.forward(x, &parameters))),
        ("ours, layer by layer", Box::new(|x| f32.forward_layerwise(x, &parameters))),
        ("candle", Box::new(one_by_one)),
    ];
    layer(c, "residual 128→32→128 at 8", (BATCH * 64 * 128 * 32 * 10) as u64, &x, &runs);
}

fn codes(c: &mut Criterion) {
    let mut group = c.benchmark_group("nearest code, D = 64");
    group.sample_size(10);
    for (count, size) in [(BATCH * 64, 512), (65_536, 512), (65_536, 8_192)] {
        let (z, codebook) = (random(&[count, 64]), random(&[size, 64]));
        group.throughput(Throughput::Elements((2 * count * size * 64) as u64));
        group.bench_function(format!("N = {count}, K = {size}"), |b| {
            b.iter(|| vq_ops::nearest_codes(&z, &codebook).expect("codes"));
        });
    }
    // Each code three times, once moved by a unit in the last place; and one that is far away.
    let (z, once) = (random(&[65_536, 64]), random(&[171, 64]));
    let nearly = (&once * (1. + 1.2e-7)).expect("a tensor");
    let repeated = Tensor::cat(&[&once, &once, &nearly], 0).expect("a codebook");
    let far = (random(&[1, 64]) * 1e6).expect("a code");
    let outlier = Tensor::cat(&[&random(&[511, 64]), &far], 0).expect("a codebook");
    for (name, codebook) in [("repeated codes", repeated), ("a code far away", outlier)] {
        group.throughput(Throughput::Elements(2 * 65_536 * 512 * 64));
        group.bench_function(format!("N = 65536, K = 512, {name}"), |b| {
            b.iter(|| vq_ops::nearest_codes(&z, &codebook).expect("codes"));
        });
    }
    let z = random(&[BATCH * 64, 64]);
    let codes = vq_ops::nearest_codes(&z, &random(&[512, 64])).expect("codes");
    group.bench_function("statistics, N = 8192, K = 512", |b| {
        b.iter(|| vq_ops::code_statistics(&z, &codes, 512).expect("statistics"));
    });
    group.finish();
}

fn optimizer(c: &mut Criterion) {
    let tensors: Vec<Tensor> = (0..4).map(|_| random(&[700_000])).collect();
    let step = AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 1e-4,
        step: 10,
        grad_scale: 1.,
        ema_decay: None,
    };
    let mut group = c.benchmark_group("AdamW, 700,000 parameters");
    group.throughput(Throughput::Bytes(700_000 * 4 * 7));
    group.bench_function("one pass", |b| {
        b.iter(|| {
            vq_ops::adamw_step(&tensors[0], &tensors[1], &tensors[2], &tensors[3], None, &step)
                .expect("a step");
        });
    });
    group.finish();
}

criterion_group!(benches, convolutions, fused, codes, optimizer);
criterion_main!(benches);

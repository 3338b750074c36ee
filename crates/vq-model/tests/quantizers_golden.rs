//! Agreement of the quantizers with the package `vector-quantize-pytorch` and, where it lacks one or
//! departs from the paper, with the paper's formulas in PyTorch; `golden/make_quantizers.py` made the
//! values and says where.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and shows its figures"
)]

mod common;

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use common::{codes, small_of};
use vq_model::{
    CodebookRule, CodebookUpdate, Codes, GradientEstimator, QuantizerConfig, QuantizerKind, VqVae,
};

/// max |ours − theirs| / max |theirs|, of every tensor of the file. f32 sums of some ten terms of one size,
/// a few times over, are off by some 1e-6; entropies have the difference of two of them.
const TOLERANCE: f32 = 1e-5;
/// The package rewrites every code from its smoothed count, ours only those that were hit: an unhit code of
/// theirs moves by about Kε/ΣN, here under 1e-5.
const UNHIT: f32 = 2e-5;
const NAME: &str = "levels.0.quantizer";

#[test]
fn cosine_codes_with_moving_averages() {
    let mut config = vector_like(QuantizerKind::Vector, (10, 6), CodebookRule::Ema);
    config.cosine = true;
    check("vector-cosine-ema", &config, 1.0);
    check_updates("vector-cosine-ema", &config);
}

#[test]
fn product_with_the_gradient_rule() {
    let mut config = vector_like(QuantizerKind::Product, (8, 12), CodebookRule::Gradient);
    config.groups = 3;
    check("product-gradient", &config, 1.0);
}

#[test]
fn product_with_moving_averages_and_the_rotation_trick() {
    let mut config = vector_like(QuantizerKind::Product, (8, 12), CodebookRule::Ema);
    config.groups = 3;
    config.gradient_estimator = GradientEstimator::Rotation;
    check("product-ema-rotation", &config, 1.0);
    check_updates("product-ema-rotation", &config);
}

#[test]
fn residual_with_the_gradient_rule() {
    let mut config = vector_like(QuantizerKind::Residual, (8, 5), CodebookRule::Gradient);
    config.stages = 3;
    check("residual-gradient", &config, 1.0);
}

#[test]
fn residual_with_moving_averages_of_each_stages_residuals() {
    let mut config = vector_like(QuantizerKind::Residual, (8, 5), CodebookRule::Ema);
    config.stages = 3;
    check("residual-ema", &config, 1.0);
    check_updates("residual-ema", &config);
}

#[test]
fn finite_scalar_with_the_papers_bound() {
    check("finite-scalar-mixed", &QuantizerConfig::finite_scalar(&[8, 5, 4, 3]), 1.0);
    check("finite-scalar-even", &QuantizerConfig::finite_scalar(&[8, 6]), 1.0);
}

#[test]
fn lookup_free_with_the_entropies_of_all_codes() {
    let config = QuantizerConfig {
        entropy_temperature: 1.0 / 5.0,
        diversity: 0.7,
        entropy_group: 6,
        ..QuantizerConfig::lookup_free(6)
    };
    check("lookup-free", &config, 0.25);
}

#[test]
fn binary_spherical_with_the_entropies_of_all_codes_and_bit_by_bit() {
    let config = QuantizerConfig {
        entropy_temperature: 1.0 / 2.0,
        diversity: 0.7,
        entropy_group: 6,
        ..QuantizerConfig::binary_spherical(6)
    };
    check("binary-spherical", &config, 0.25);
    check("binary-spherical-18", &QuantizerConfig::binary_spherical(18), 0.25);
}

#[test]
fn sim_with_both_estimators() {
    let config =
        QuantizerConfig { codebook_size: 12, dim: 5, ..QuantizerConfig::of(QuantizerKind::Sim) };
    check("sim", &config, 0.25);
    let gradient_estimator = GradientEstimator::Rotation;
    check("sim-rotation", &QuantizerConfig { gradient_estimator, ..config }, 0.25);
}

#[test]
fn index_backprop_with_its_double_loss_and_entropies() {
    let config = QuantizerConfig {
        codebook_size: 12,
        dim: 5,
        entropy_temperature: 0.5,
        diversity: 0.8,
        ..QuantizerConfig::of(QuantizerKind::IndexBackprop)
    };
    check("index-backprop", &config, 0.25);
}

fn vector_like(
    kind: QuantizerKind,
    (codebook_size, dim): (usize, usize),
    rule: CodebookRule,
) -> QuantizerConfig {
    QuantizerConfig { codebook_size, dim, rule, decay: 0.9, ..QuantizerConfig::of(kind) }
}

/// Codes, vectors, the sum of the losses, and every gradient.
fn check(case: &str, config: &QuantizerConfig, beta: f64) {
    let golden = golden();
    let of = |name: &str| &golden[&format!("{case}/{name}")];
    let model = load(&golden, case, config);
    let z = Var::from_tensor(of("z")).unwrap();
    let quantized = model.quantizer(0).unwrap().quantize(&z).unwrap();
    let theirs: Vec<f32> = common::values(of("codes"));
    let ours: Vec<f32> = codes(&quantized.codes).into_iter().map(|code| code as f32).collect();
    assert_eq!(quantized.codes.dims(), of("codes").dims(), "{case}");
    assert_eq!(ours, theirs, "{case}");
    let mut worst = assert_close(case, "z_q", &quantized.z_q, of("z_q"), TOLERANCE);

    let weighted = (&quantized.z_q * of("weights")).unwrap().sum_all().unwrap();
    let losses = (&quantized.codebook_loss + (&quantized.commitment_loss * beta).unwrap()).unwrap();
    let mut total = (weighted + losses).unwrap();
    if let Some(entropy) = &quantized.entropy_loss {
        total = (total + entropy).unwrap();
    }
    worst = worst.max(assert_close(case, "total", &total, of("total"), TOLERANCE));
    let gradients = total.backward().unwrap();
    let gradient = gradients.get(&z).unwrap();
    worst = worst.max(assert_close(case, "z's gradient", gradient, of("grad_z"), TOLERANCE));
    let mut compared = 3;
    for (name, parameter) in model.parameters() {
        let Some(name) = name.strip_prefix(NAME) else { continue };
        let theirs = &golden[&format!("{case}/grad/{}", &name[1..])];
        let ours = gradients.get(parameter).unwrap();
        worst = worst.max(assert_close(case, name, ours, theirs, TOLERANCE));
        compared += 1;
    }
    let prefix = format!("{case}/grad/");
    assert_eq!(compared - 3, golden.keys().filter(|name| name.starts_with(&prefix)).count());
    println!("{case}: {compared} tensors, worst relative difference {worst:.1e}");
}

/// The codebooks and the usage after each of three updates.
fn check_updates(case: &str, config: &QuantizerConfig) {
    let golden = golden();
    let model = load(&golden, case, config);
    let mut worst = 0f32;
    for step in 0..3 {
        let z = &golden[&format!("{case}/z.{step}")];
        let quantizer = model.quantizer(0).unwrap();
        let codes = Codes { levels: vec![quantizer.encode(z).unwrap()] };
        let options = CodebookUpdate::default();
        model.update_codebooks(std::slice::from_ref(z), &codes, &options, step).unwrap();
        let prefix = format!("{case}/after.{step}/");
        let after = golden.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?, t)));
        let mut compared = 0;
        for (name, theirs) in after {
            let ours = &model.buffers()[&format!("{NAME}.{name}")];
            let what = format!("{name} after step {step}");
            worst = worst.max(assert_close(case, &what, ours, theirs, UNHIT));
            compared += 1;
        }
        assert_eq!(compared, 2 * config.codes_per_position());
    }
    println!("{case}: three updates, worst relative difference {worst:.1e}");
}

/// A model whose quantizer has the file's parameters; m = e and N = 1 with moving averages.
fn load(golden: &BTreeMap<String, Tensor>, case: &str, config: &QuantizerConfig) -> VqVae {
    let model = VqVae::new(&small_of(config), 0, &vq_ops::test_device()).unwrap();
    let mut tensors: BTreeMap<String, Tensor> = model
        .tensors()
        .into_iter()
        .map(|(name, t)| (name, t.force_contiguous().unwrap()))
        .collect();
    let prefix = format!("{case}/param/");
    for (name, tensor) in golden {
        let Some(name) = name.strip_prefix(&prefix) else { continue };
        let own = format!("{NAME}.{name}");
        assert!(tensors.contains_key(&own), "PyTorch's {name} has no counterpart");
        if let Some(start) = own.strip_suffix(".codebook")
            && tensors.contains_key(&format!("{start}.sums"))
        {
            tensors.insert(format!("{start}.sums"), tensor.clone());
        }
        tensors.insert(own, tensor.clone());
    }
    model.set_tensors(&tensors).unwrap();
    model
}

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/quantizers.safetensors");
    candle_core::safetensors::load(path, &vq_ops::test_device()).unwrap().into_iter().collect()
}

fn assert_close(case: &str, what: &str, ours: &Tensor, theirs: &Tensor, bound: f32) -> f32 {
    assert_eq!(ours.dims(), theirs.dims(), "{case}: {what}");
    let largest = |t: &Tensor| common::values(t).iter().fold(0f32, |max, v| max.max(v.abs()));
    let difference = largest(&(ours - theirs).unwrap()) / largest(theirs).max(f32::MIN_POSITIVE);
    assert!(difference <= bound, "{case}: {what}: {difference:e}");
    difference
}

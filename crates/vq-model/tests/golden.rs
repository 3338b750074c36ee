//! Agreement with PyTorch; `golden/make_golden.py` made the values.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic, and shows its figures"
)]

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};
use vq_model::{
    CodebookRule, CodebookUpdate, Config, GradientEstimator, LevelConfig, QuantizerConfig, VqVae,
};

/// max |ours − theirs| / max |theirs|, of every tensor of the file.
const TOLERANCE: f32 = 1e-4;
/// As in the script.
const BETA: f64 = 0.25;
const VARIANCE: f64 = 0.0628;

#[test]
fn forward_losses_and_every_gradient_agree_with_pytorch_for_the_gradient_rule() {
    let level = level(/* halvings */ 2, 16, (2, 8), (16, 8));
    check("gradient", &config(8, vec![level]), CodebookRule::Gradient);
}

#[test]
fn forward_losses_and_every_gradient_agree_with_pytorch_for_the_rotation_trick() {
    let mut level = level(2, 8, (1, 4), (16, 4));
    level.quantizer.gradient_estimator = GradientEstimator::Rotation;
    check("rotation", &config(8, vec![level]), CodebookRule::Gradient);
}

#[test]
fn forward_losses_and_every_gradient_agree_with_pytorch_for_two_levels_and_images_not_square() {
    let levels = vec![level(2, 8, (1, 4), (16, 4)), level(1, 6, (1, 4), (8, 3))];
    check("two_levels", &config(16, levels), CodebookRule::Gradient);
}

#[test]
fn forward_losses_and_every_gradient_agree_with_pytorch_for_the_ema_rule() {
    check("ema", &ema_config(), CodebookRule::Ema);
}

#[test]
fn codebook_and_averages_agree_with_pytorch_over_three_ema_updates() {
    let golden = golden();
    let (config, mut worst) = (ema_config(), 0f32);
    let model = load(&golden, "ema", &config, CodebookRule::Ema);
    for step in 0..3 {
        let output = model.forward(&golden[&format!("ema/images.{step}")]).unwrap();
        let options = CodebookUpdate::default();
        model.update_codebooks(&output.z_e, &output.codes, &options, step).unwrap();
        for name in ["usage", "sums", "codebook"] {
            let ours = &model.buffers()[&format!("levels.0.quantizer.{name}")];
            let theirs = &golden[&format!("ema/{name}.{step}")];
            worst = worst.max(assert_close(&format!("{name} after step {step}"), ours, theirs));
        }
    }
    println!("EMA updates: worst relative difference {worst:.1e}");
}

fn check(case: &str, config: &Config, rule: CodebookRule) {
    let golden = golden();
    let model = load(&golden, case, config, rule);
    let images = Var::from_tensor(&golden[&format!("{case}/images")]).unwrap();
    let output = model.forward(&images).unwrap();
    let reconstruction_loss =
        (output.reconstruction().unwrap().sub(&images).unwrap().sqr().unwrap().mean_all().unwrap()
            / VARIANCE)
            .unwrap();
    let total = (&reconstruction_loss + &output.codebook_loss)
        .and_then(|loss| loss + (&output.commitment_loss * BETA)?)
        .unwrap();

    for (index, codes) in output.codes.levels.iter().enumerate() {
        let theirs = golden[&format!("{case}/codes.{index}")].to_dtype(candle_core::DType::U32);
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(values(codes), values(&theirs.unwrap()), "codes of level {index}");
    }
    let mut worst = assert_close(
        "reconstruction",
        &output.reconstruction().unwrap(),
        &golden[&format!("{case}/reconstruction")],
    );
    let losses = [&reconstruction_loss, &output.codebook_loss, &output.commitment_loss, &total];
    for (index, loss) in losses.into_iter().enumerate() {
        let theirs = golden[&format!("{case}/losses")].get(index).unwrap();
        worst = worst.max(assert_close(&format!("loss {index}"), loss, &theirs));
    }

    let gradients = total.backward().unwrap();
    let prefix = format!("{case}/grad/");
    let expected: Vec<&String> = golden.keys().filter(|name| name.starts_with(&prefix)).collect();
    let ours: Vec<String> = model.parameters().keys().map(|n| format!("{prefix}{n}")).collect();
    assert_eq!(expected, ours.iter().collect::<Vec<_>>(), "the parameters with a gradient");
    for (name, parameter) in model.parameters() {
        let gradient = gradients.get(parameter).unwrap();
        worst = worst.max(assert_close(name, gradient, &golden[&format!("{prefix}{name}")]));
    }
    let gradient = gradients.get(&images).unwrap();
    worst = worst.max(assert_close("images", gradient, &golden[&format!("{case}/grad_images")]));
    println!("{case}: {} tensors, worst relative difference {worst:.1e}", ours.len() + 6);
}

/// The model of that case with the file's parameters.
fn load(
    golden: &BTreeMap<String, Tensor>,
    case: &str,
    config: &Config,
    rule: CodebookRule,
) -> VqVae {
    let mut config = config.clone();
    config.levels.iter_mut().for_each(|level| level.quantizer.rule = rule);
    let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
    // What the file does not hold: usage and the flag. With `ema`, m = e at the start.
    let mut tensors: BTreeMap<String, Tensor> = model
        .tensors()
        .into_iter()
        .map(|(name, tensor)| (name, tensor.force_contiguous().unwrap()))
        .collect();
    let prefix = format!("{case}/param/");
    for (name, tensor) in golden {
        if let Some(name) = name.strip_prefix(&prefix) {
            assert!(tensors.contains_key(name), "PyTorch's {name} has no counterpart");
            tensors.insert(name.to_owned(), tensor.clone());
            if let Some(level) = name.strip_suffix(".codebook")
                && rule == CodebookRule::Ema
            {
                tensors.insert(format!("{level}.sums"), tensor.clone());
            }
        }
    }
    model.set_tensors(&tensors).unwrap();
    model
}

fn level(
    halvings: u32,
    hidden: usize,
    (residual_blocks, residual_hidden): (usize, usize),
    (codebook_size, dim): (usize, usize),
) -> LevelConfig {
    let quantizer = QuantizerConfig { codebook_size, dim, ..QuantizerConfig::default() };
    LevelConfig {
        downsample: 2usize.pow(halvings),
        hidden,
        residual_blocks,
        residual_hidden,
        relu_before_residual: true,
        quantizer,
    }
}

fn config(width: usize, levels: Vec<LevelConfig>) -> Config {
    Config { image_size: [8, width], levels, ..Config::default() }
}

fn ema_config() -> Config {
    let mut level = level(2, 8, (1, 4), (16, 4));
    level.quantizer.decay = 0.9;
    config(8, vec![level])
}

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/golden.safetensors");
    candle_core::safetensors::load(path, &vq_ops::test_device()).unwrap().into_iter().collect()
}

fn assert_close(what: &str, ours: &Tensor, theirs: &Tensor) -> f32 {
    let difference = relative_difference(ours, theirs).unwrap();
    assert!(difference <= TOLERANCE, "{what}: {difference:e}");
    difference
}

fn relative_difference(ours: &Tensor, theirs: &Tensor) -> Result<f32> {
    assert_eq!(ours.dims(), theirs.dims());
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let (difference, scale) = (largest(&(ours - theirs)?)?, largest(theirs)?);
    Ok(if difference == 0.0 { 0.0 } else { difference / scale })
}

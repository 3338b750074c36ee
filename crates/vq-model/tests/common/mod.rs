//! Small models and data for the tests.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use vq_model::{CodebookRule, Config, GradientEstimator, LevelConfig, QuantizerConfig, VqVae};

/// 8×8 images of one level with 4×4 codes of 16.
pub fn small() -> Config {
    let quantizer = QuantizerConfig { codebook_size: 16, dim: 6, ..QuantizerConfig::default() };
    let level = LevelConfig {
        downsample: 2,
        hidden: 8,
        residual_blocks: 1,
        residual_hidden: 4,
        quantizer,
        ..LevelConfig::default()
    };
    Config { image_size: [8, 8], levels: vec![level], ..Config::default() }
}

pub fn small_with(rule: CodebookRule, estimator: GradientEstimator) -> Config {
    let mut config = small();
    config.levels[0].quantizer.rule = rule;
    config.levels[0].quantizer.gradient_estimator = estimator;
    config
}

/// 8×8 images, 4×4 codes below 2×2 codes.
pub fn two_levels() -> Config {
    let mut config = small();
    let mut top = config.levels[0].clone();
    top.hidden = 6;
    top.quantizer.dim = 3;
    top.quantizer.codebook_size = 8;
    config.levels.push(top);
    config
}

/// Every combination of rule, estimator and metric, and two levels.
pub fn all_kinds() -> Vec<Config> {
    let mut configs = vec![two_levels()];
    for rule in [CodebookRule::Gradient, CodebookRule::Ema] {
        for estimator in [GradientEstimator::StraightThrough, GradientEstimator::Rotation] {
            configs.push(small_with(rule, estimator));
            let mut cosine = small_with(rule, estimator);
            cosine.levels[0].quantizer.cosine = true;
            configs.push(cosine);
        }
    }
    configs
}

/// A model whose codes are spread among the outputs of its encoders.
pub fn model(config: &Config, seed: u64) -> VqVae {
    let model = VqVae::new(config, seed, &Device::Cpu).unwrap();
    for _ in 0..config.levels.len() {
        let output = model.evaluate(&images(config, 32, 1000 + seed)).unwrap();
        model.initialize_codebooks(&output.z_e, 3, 0).unwrap();
    }
    model
}

/// Uniform in [−0.5, 0.5).
pub fn images(config: &Config, batch: usize, seed: u64) -> Tensor {
    let [height, width] = config.image_size;
    uniform(seed, &[batch, config.channels, height, width], 0.5)
}

/// Uniform in ±bound.
pub fn uniform(seed: u64, shape: &[usize], bound: f32) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draw = || (rng.next_u32() as f32 / 2f32.powi(31) - 1.0) * bound;
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

pub fn codes(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

pub fn scalar(tensor: &Tensor) -> f32 {
    tensor.to_scalar().unwrap()
}

/// Every tensor of the model, to the bit.
pub fn bits(model: &VqVae) -> Vec<(String, Vec<u32>)> {
    let bits = |tensor: &Tensor| values(tensor).into_iter().map(f32::to_bits).collect();
    model.tensors().iter().map(|(name, tensor)| (name.clone(), bits(tensor))).collect()
}

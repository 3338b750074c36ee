//! Small models and data for the tests.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use candle_core::Tensor;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use vq_model::{
    CodebookRule, Config, GradientEstimator, LevelConfig, QuantizerConfig, QuantizerKind, VqVae,
};

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

/// 8×8 images, 4×4 codes below 2×2 codes below one.
pub fn three_levels() -> Config {
    let mut config = two_levels();
    let mut top = config.levels[1].clone();
    top.quantizer.dim = 5;
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

/// A small quantizer of every kind, with every setting that changes how it works.
pub fn every_quantizer() -> Vec<QuantizerConfig> {
    use QuantizerKind::{IndexBackprop, Product, Residual, Sim};
    let of = |kind: QuantizerKind| QuantizerConfig {
        codebook_size: 16,
        dim: 6,
        groups: if kind == Product { 3 } else { 2 },
        stages: if kind == Residual { 3 } else { 4 },
        ..QuantizerConfig::of(kind)
    };
    let mut all: Vec<QuantizerConfig> =
        all_kinds().into_iter().skip(1).map(|config| config.levels[0].quantizer.clone()).collect();
    for rule in [CodebookRule::Gradient, CodebookRule::Ema] {
        all.push(QuantizerConfig { rule, ..of(Product) });
        all.push(QuantizerConfig { rule, quantizer_dropout: 0.5, ..of(Residual) });
    }
    let rotation = GradientEstimator::Rotation;
    all.push(QuantizerConfig { cosine: true, gradient_estimator: rotation, ..of(Product) });
    all.push(QuantizerConfig { gradient_estimator: rotation, ..of(Residual) });
    all.push(QuantizerConfig { groups: 1, ..of(Product) });
    all.push(QuantizerConfig { stages: 1, ..of(Residual) });
    all.extend(
        [&[8, 6, 5][..], &[2, 2, 2, 2], &[3], &[7, 4, 2]].map(QuantizerConfig::finite_scalar),
    );
    for bits in [1, 6, 11] {
        all.push(QuantizerConfig::lookup_free(bits));
        all.push(QuantizerConfig::binary_spherical(bits));
    }
    all.push(QuantizerConfig { entropy_group: 3, ..QuantizerConfig::lookup_free(7) });
    all.push(QuantizerConfig { entropy_weight: 0.0, ..QuantizerConfig::lookup_free(4) });
    all.push(QuantizerConfig { diversity: 0.0, ..QuantizerConfig::binary_spherical(4) });
    all.push(of(Sim));
    all.push(QuantizerConfig { gradient_estimator: rotation, ..of(Sim) });
    all.push(of(IndexBackprop));
    all
}

/// [`small`] with that quantizer.
pub fn small_of(quantizer: &QuantizerConfig) -> Config {
    let mut config = small();
    config.levels[0].quantizer = quantizer.clone();
    config
}

/// A model whose codes are spread among the outputs of its encoders.
pub fn model(config: &Config, seed: u64) -> VqVae {
    let model = VqVae::new(config, seed, &vq_ops::test_device()).unwrap();
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
    Tensor::from_vec(values, shape, &vq_ops::test_device()).unwrap()
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

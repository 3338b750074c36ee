//! The shape of the networks, and what their parameters start as.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;

use candle_core::Tensor;
use common::{images, model, small, two_levels, values};
use vq_model::{CodebookRule, Config, LevelConfig, QuantizerConfig, VqVae};

#[test]
fn the_standard_model_has_695491_parameters_and_no_block_shares_weights() {
    let model = VqVae::new(&Config::default(), 0, &vq_ops::test_device()).unwrap();
    assert_eq!(parameter_count(&model), 695_491);
    let mut config = Config::default();
    config.levels[0].quantizer.rule = CodebookRule::Ema;
    let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
    assert_eq!(parameter_count(&model), 695_491 - 512 * 64);
    assert_eq!(values(&model.codebook(0).unwrap()).len(), 512 * 64);
}

#[test]
fn the_standard_model_takes_45_6_million_multiply_adds() {
    let model = VqVae::new(&Config::default(), 0, &vq_ops::test_device()).unwrap();
    assert_eq!(model.multiply_adds().unwrap(), 45_613_056);
    assert!((Config::default().bits_per_image() - 576.0).abs() < 1e-9);
}

#[test]
fn the_standard_models_layers_are_sonnets() {
    let model = VqVae::new(&Config::default(), 0, &vq_ops::test_device()).unwrap();
    let shape = |name: &str| model.parameters()[&format!("levels.0.{name}")].dims().to_vec();
    assert_eq!(shape("encoder.0.weight"), [64, 3, 4, 4]);
    assert_eq!(shape("encoder.1.weight"), [128, 64, 4, 4]);
    assert_eq!(shape("encoder.2.weight"), [128, 128, 3, 3]);
    assert_eq!(shape("encoder.3.conv1.weight"), [32, 128, 3, 3]);
    assert_eq!(shape("encoder.4.conv2.weight"), [128, 32, 1, 1]);
    assert_eq!(shape("projection.weight"), [64, 128, 1, 1]);
    assert_eq!(shape("quantizer.codebook"), [512, 64]);
    assert_eq!(shape("decoder.0.weight"), [128, 64, 3, 3]);
    assert_eq!(shape("decoder.2.conv2.bias"), [128]);
    assert_eq!(shape("decoder.3.weight"), [128, 64, 4, 4]);
    assert_eq!(shape("decoder.4.weight"), [64, 3, 4, 4]);
    // Six convolutions, four blocks of two convolutions, a weight and a bias each; two transposed
    // convolutions are among the six. And the codebook.
    assert_eq!(model.parameters().len(), 2 * (5 + 3 + 2 * 4 - 1) + 1);
}

#[test]
fn every_depth_width_and_number_of_levels_gives_back_images_of_the_same_size() {
    let quantizer = QuantizerConfig { codebook_size: 8, dim: 3, ..QuantizerConfig::default() };
    for downsamples in [vec![1], vec![2], vec![4], vec![8], vec![1, 2], vec![2, 4], vec![2, 2, 2]] {
        for (channels, residual_blocks) in [(1, 0), (3, 2)] {
            let level = |&downsample: &usize| LevelConfig {
                downsample,
                hidden: 4 + 2 * downsample,
                residual_blocks,
                residual_hidden: 3,
                relu_before_residual: true,
                quantizer: quantizer.clone(),
            };
            let config = Config {
                channels,
                image_size: [16, 8],
                normalization: vq_model::Normalization::uniform(channels, 0.5, 1.0),
                levels: downsamples.iter().map(level).collect(),
                ..Config::default()
            };
            let model = VqVae::new(&config, 1, &vq_ops::test_device()).unwrap();
            let images = images(&config, 2, 0);
            let output = model.forward(&images).unwrap();
            assert_eq!(output.reconstruction().unwrap().dims(), images.dims(), "{downsamples:?}");
            for (codes, grid) in output.codes.levels.iter().zip(config.grids(16, 8).unwrap()) {
                assert_eq!(codes.dims(), [2, grid[0], grid[1]], "{downsamples:?}");
            }
            let loss = output.reconstruction().unwrap().sqr().unwrap().mean_all().unwrap();
            let loss = (loss + output.commitment_loss + output.codebook_loss).unwrap();
            let gradients = loss.backward().unwrap();
            for (name, parameter) in model.parameters() {
                assert!(
                    gradients.get(parameter).is_some(),
                    "{downsamples:?}: no gradient for {name}"
                );
            }
            assert!(model.multiply_adds().unwrap() > 0);
        }
    }
}

#[test]
fn parameters_start_as_pytorchs_whatever_else_is_in_the_model() {
    let model = VqVae::new(&Config::default(), 3, &vq_ops::test_device()).unwrap();
    // fan-in: 64·4·4; PyTorch counts the output channels of a transposed convolution, 3·4·4.
    for (name, fan_in) in [
        ("encoder.1.weight", 64 * 16),
        ("encoder.1.bias", 64 * 16),
        ("encoder.3.conv2.weight", 32),
        ("encoder.3.conv2.bias", 32),
        ("decoder.3.weight", 64 * 16),
        ("decoder.4.weight", 3 * 16),
        ("decoder.4.bias", 3 * 16),
        ("quantizer.codebook", 512 * 512),
    ] {
        let bound = 1.0 / (fan_in as f32).sqrt();
        let values = values(&model.parameters()[&format!("levels.0.{name}")]);
        let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
        assert!(largest <= bound, "{name}: {largest} > {bound}");
        if values.len() > 1000 {
            assert!(largest > 0.99 * bound, "{name}: {largest} ≪ {bound}");
            let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.1, "{name}: {variance}");
        }
    }
    // The same names and shapes in another model: the same values. Another seed: others.
    let mut config = Config::default();
    config.levels[0].quantizer.codebook_size = 64;
    config.levels.push(LevelConfig { downsample: 2, ..LevelConfig::default() });
    let name = "levels.0.encoder.2.weight";
    let start = |seed| {
        values(&VqVae::new(&config, seed, &vq_ops::test_device()).unwrap().parameters()[name])
    };
    assert_eq!(start(3), values(&model.parameters()[name]));
    assert_ne!(start(4), start(3));
}

#[test]
fn a_residual_block_with_zero_weights_is_the_identity() {
    let mut config = small();
    config.levels[0].residual_blocks = 0;
    let without = model(&config, 5);
    config.levels[0].residual_blocks = 2;
    let with = VqVae::new(&config, 9, &vq_ops::test_device()).unwrap();
    // The blocks stand before the transposed convolution in the decoder and shift its number.
    let renumbered = |name: &str| name.replace("decoder.1.", "decoder.3.");
    let mut tensors: BTreeMap<String, Tensor> =
        with.tensors().into_iter().map(|(name, t)| (name, t.zeros_like().unwrap())).collect();
    for (name, tensor) in without.tensors() {
        assert!(tensors.insert(renumbered(&name), tensor).is_some(), "{name}");
    }
    with.set_tensors(&tensors).unwrap();
    let images = images(&config, 3, 0);
    let (a, b) = (without.forward(&images).unwrap(), with.forward(&images).unwrap());
    assert_eq!(values(&a.z_e[0]), values(&b.z_e[0]));
    assert_eq!(values(&a.reconstruction().unwrap()), values(&b.reconstruction().unwrap()));
}

#[test]
fn a_config_out_of_range_is_refused_with_the_key() {
    let message = |change: fn(&mut Config)| {
        let mut config = two_levels();
        change(&mut config);
        let error = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap_err();
        error.to_string()
    };
    for (expected, got) in [
        (
            "levels.0.quantizer.codebook_size must be at least 1, got 0",
            message(|c| c.levels[0].quantizer.codebook_size = 0),
        ),
        (
            "levels.1.quantizer.dim must be at least 1, got 0",
            message(|c| c.levels[1].quantizer.dim = 0),
        ),
        (
            "levels.0.downsample must be a power of two, got 3",
            message(|c| c.levels[0].downsample = 3),
        ),
        ("levels.1.downsample must be at least 2, got 1", message(|c| c.levels[1].downsample = 1)),
        ("levels.0.hidden must be even, got 7", message(|c| c.levels[0].hidden = 7)),
        ("levels.0.hidden must be at least 2, got 0", message(|c| c.levels[0].hidden = 0)),
        (
            "levels.0.residual_hidden must be at least 1, got 0",
            message(|c| c.levels[0].residual_hidden = 0),
        ),
        ("levels must hold at least one level", message(|c| c.levels.clear())),
        (
            "image_size.1 must be a multiple of the downsampling 4, got 10",
            message(|c| c.image_size = [8, 10]),
        ),
        (
            "normalization.mean must hold one value per channel (1), got 3",
            message(|c| c.channels = 1),
        ),
        ("normalization.std must be above 0, got 0", message(|c| c.normalization.std[1] = 0.0)),
        (
            "levels.0.quantizer.decay must be at least 0 and below 1, got 1",
            message(|c| c.levels[0].quantizer.decay = 1.0),
        ),
        (
            "levels.0.quantizer.epsilon must be above 0, got 0",
            message(|c| c.levels[0].quantizer.epsilon = 0.0),
        ),
        (
            "levels.0.hidden must be at most 65536, got 1000000000000",
            message(|c| c.levels[0].hidden = 1_000_000_000_000),
        ),
    ] {
        assert_eq!(got, expected);
    }
}

fn parameter_count(model: &VqVae) -> usize {
    model.parameters().values().map(|parameter| parameter.elem_count()).sum()
}

mod file;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use vq_model::{Codes, Config, LevelConfig, Likelihood, QuantizerKind, Stream, VqVae};

use super::coder::Coder;
use super::distribution::{Distribution, MOST_SYMBOLS, ONE, Softmax, Uniform};
use super::exp::exp;
use super::*;
use crate::{GridConfig, Network, PixelCnnConfig, Prior, TransformerConfig};

const CPU: &Device = &Device::Cpu;

#[test]
fn powers_are_right_to_the_last_bits() {
    for i in -70_000..70_000 {
        let x = f64::from(i) * 0.01;
        let exact = x.exp();
        assert!((exp(x) - exact).abs() <= 4e-16 * exact, "{x}: {} {exact}", exp(x));
    }
    let limits = [exp(f64::NEG_INFINITY), exp(-1e9), exp(0.0)];
    assert_eq!(limits.map(f64::to_bits), [0.0f64, 0.0, 1.0].map(f64::to_bits));
    assert!(exp(f64::NAN).is_nan() && exp(1e9).is_finite());
    // What they must be on every machine.
    assert_eq!(exp(1.0).to_bits(), 0x4005_bf0a_8b14_576a);
}

proptest! {
    #[test]
    fn every_symbol_has_an_interval_and_is_found_in_it(
        logits in proptest::collection::vec(prop_oneof![-5f32..5.0, -200f32..200.0], 1..300),
    ) {
        let softmax = Softmax::new(&logits, "test").unwrap();
        let mut first = 0;
        for symbol in 0..logits.len() as u32 {
            let interval = softmax.interval(symbol);
            prop_assert!(interval.first == first && interval.width > 0);
            first += interval.width;
            for quantile in [interval.first, interval.first + interval.width - 1] {
                prop_assert_eq!(softmax.find(quantile), symbol);
            }
            // A unit more for every symbol, and what rounding down takes.
            let ideal = (-softmax.bits(symbol)).exp2();
            let real = f64::from(interval.width) / f64::from(ONE);
            let slack = (logits.len() as f64 + 2.0) / f64::from(ONE);
            prop_assert!((real - ideal).abs() <= slack, "{real} {ideal}");
        }
        prop_assert_eq!(first, ONE);
    }

    #[test]
    fn symbols_come_back(symbols in proptest::collection::vec(0u32..7, 0..200), seed: u64) {
        let mut stream = Stream::new(seed, "logits", 0);
        let logits: Vec<f32> = (0..7).map(|_| (stream.unit() * 30.0) as f32).collect();
        let (softmax, uniform) = (Softmax::new(&logits, "test").unwrap(), Uniform::new(7).unwrap());
        let run = |coder: &mut Coder, symbols: &[u32]| -> Vec<u32> {
            let code = |(i, symbol): (usize, &u32)| match i % 2 {
                0 => coder.code(&softmax, *symbol).unwrap(),
                _ => coder.code(&uniform, *symbol).unwrap(),
            };
            symbols.iter().enumerate().map(code).collect()
        };
        let mut encoder = Coder::encoder();
        prop_assert_eq!(&run(&mut encoder, &symbols), &symbols);
        let bytes = encoder.finish();
        let mut decoder = Coder::decoder(&bytes).unwrap();
        prop_assert_eq!(run(&mut decoder, &vec![0; symbols.len()]), symbols);
    }
}

#[test]
fn distributions_that_are_none_are_refused() {
    for logits in [vec![f32::NAN, 0.0], vec![f32::NEG_INFINITY; 2], vec![f32::INFINITY, 0.0]] {
        assert!(matches!(Softmax::new(&logits, "prior"), Err(CompressError::NotFinite("prior"))));
    }
    for count in [0, MOST_SYMBOLS + 1] {
        assert!(matches!(Uniform::new(count), Err(CompressError::Input(_))));
    }
    let error = Coder::encoder().code(&Uniform::new(3).unwrap(), 3).unwrap_err();
    assert!(matches!(error, CompressError::Input(_)));
}

/// 8×8 images, levels of 4×4 and 2×2 codes.
fn model(levels: usize, groups: usize, likelihood: Likelihood, seed: u64) -> VqVae {
    let mut level = LevelConfig {
        downsample: 2,
        hidden: 4,
        residual_blocks: 1,
        residual_hidden: 4,
        ..LevelConfig::default()
    };
    level.quantizer.codebook_size = 11;
    level.quantizer.dim = 4;
    if groups > 1 {
        level.quantizer.kind = QuantizerKind::Residual;
        level.quantizer.stages = groups;
    }
    let config = Config {
        image_size: [8, 8],
        likelihood,
        mixtures: 2,
        levels: vec![level; levels],
        ..Config::default()
    };
    VqVae::new(&config, seed, CPU).unwrap()
}

/// A prior for each level, the top one first.
fn priors(model: &VqVae, classes: usize, transformer: bool, seed: u64) -> Vec<Prior> {
    let network = if transformer {
        let sizes = TransformerConfig { channels: 8, layers: 1, heads: 2, mlp_hidden: 8 };
        Network::Transformer(sizes)
    } else {
        let sizes =
            PixelCnnConfig { channels: 4, layers: 2, skip_channels: 4, ..Default::default() };
        Network::PixelCnn(sizes)
    };
    let levels = &model.config().levels;
    let sizes = |level: &LevelConfig| {
        vec![level.quantizer.codebook_size; level.quantizer.codes_per_position()]
    };
    let grids = model.config().grids(8, 8).unwrap();
    let prior = |level: usize| {
        let above = level + 1..levels.len();
        let config = crate::Config {
            grid: grids[level],
            codebook_sizes: sizes(&levels[level]),
            class_count: classes,
            conditioning: above
                .map(|i| GridConfig { grid: grids[i], codebook_sizes: sizes(&levels[i]) })
                .collect(),
            conditioner: crate::ConditionerConfig { channels: 4, residual_blocks: 1, heads: 1 },
            head_hidden: 6,
            network: network.clone(),
            ..crate::Config::default()
        };
        Prior::new(&config, seed + level as u64, CPU).unwrap()
    };
    (0..levels.len()).rev().map(prior).collect()
}

/// Random codes, labels and pixels for so many images.
fn block(model: &VqVae, classes: usize, lossless: bool, images: usize, seed: u64) -> Block {
    let mut stream = Stream::new(seed, "block", 0);
    let mut draw = |count: usize, below: usize| -> Vec<u32> {
        (0..count).map(|_| stream.below(below) as u32).collect()
    };
    let level = |(level, [h, w]): (&LevelConfig, [usize; 2])| {
        let groups = level.quantizer.codes_per_position();
        let codes = draw(images * h * w * groups, level.quantizer.codebook_size);
        match groups {
            1 => Tensor::from_vec(codes, (images, h, w), CPU).unwrap(),
            _ => Tensor::from_vec(codes, (images, h, w, groups), CPU).unwrap(),
        }
    };
    let grids = model.config().grids(8, 8).unwrap();
    let levels = model.config().levels.iter().zip(grids).map(level).collect();
    let labels = if classes > 0 { draw(images, classes + 1) } else { Vec::new() };
    let pixels = lossless.then(|| {
        let pixels = draw(images * 3 * 64, 256);
        Tensor::from_vec(pixels, (images, 3, 8, 8), CPU).unwrap().to_dtype(DType::U8).unwrap()
    });
    Block { labels, codes: Codes { levels }, pixels }
}

fn same(a: &Block, b: &Block) -> bool {
    let values =
        |t: &Tensor| (t.dims().to_vec(), t.flatten_all().unwrap().to_vec1::<u32>().unwrap());
    let bytes = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    a.labels == b.labels
        && a.codes.levels.iter().map(values).eq(b.codes.levels.iter().map(values))
        && a.pixels.as_ref().map(bytes) == b.pixels.as_ref().map(bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// And in as many bytes as were computed, but for the last two words.
    #[test]
    fn blocks_come_back(
        (levels, groups, classes) in (1usize..3, 1usize..4, 0usize..3),
        (with_priors, transformer) in any::<(bool, bool)>(),
        likelihood in prop_oneof![
            Just(Likelihood::Mse), Just(Likelihood::Categorical), Just(Likelihood::LogisticMixture)
        ],
        images in 1usize..6,
        seed in 0u64..1000,
    ) {
        let model = model(levels, groups, likelihood, seed);
        let priors = if with_priors { priors(&model, classes, transformer, seed) } else { Vec::new() };
        let lossless = likelihood != Likelihood::Mse;
        let codec = Codec::new(&model, &priors, lossless).unwrap();
        let block = block(&model, codec.classes(), lossless, images, seed);
        let (bytes, bits) = codec.encode(&block).unwrap();
        let back = codec.decode(&bytes, images, [8, 8]).unwrap();
        prop_assert!(same(&block, &back));
        prop_assert_eq!(block.hash().unwrap(), back.hash().unwrap());
        let written = bytes.len() as f64 * 8.0;
        prop_assert!(written < bits.total() * 1.001 + 64.0, "{written} {bits:?}");
        prop_assert!(written > bits.total() * 0.999 - 1.0, "{written} {bits:?}");
    }
}

/// The bits of a block are those of the whole networks.
#[test]
fn the_bits_are_those_of_the_likelihoods() {
    let model = model(2, 2, Likelihood::LogisticMixture, 3);
    let priors = priors(&model, 2, false, 3);
    let codec = Codec::new(&model, &priors, true).unwrap();
    let block = block(&model, 2, true, 4, 3);
    let (_, bits) = codec.encode(&block).unwrap();
    let labels = Tensor::from_slice(&block.labels, 4, CPU).unwrap();
    let levels = &block.codes.levels;
    let of = |prior: &Prior, level: usize| -> f64 {
        let above = &levels[level + 1..];
        let given = crate::Conditions { labels: Some(&labels), conditioning: above };
        let nats = prior.log_likelihood(&levels[level], &given).unwrap();
        -nats.iter().sum::<f64>() / std::f64::consts::LN_2
    };
    let params = model.decode_parameters(&block.codes).unwrap();
    let (b, h, w, size) = params.dims4().unwrap();
    let pixels = block.pixels.as_ref().unwrap().permute((0, 2, 3, 1)).unwrap();
    let nats = vq_ops::pixel_likelihood(
        &params.reshape((b * h * w, size)).unwrap(),
        &pixels.reshape((b * h * w, 3)).unwrap(),
        model.config().pixel_distribution().unwrap(),
    );
    let nats = nats.unwrap().narrow(1, 0, 1).unwrap().flatten_all().unwrap();
    let nats: f64 = nats.to_vec1::<f32>().unwrap().into_iter().map(f64::from).sum();
    for (ours, expected) in [
        (bits.levels[1], of(&priors[0], 1)),
        (bits.levels[0], of(&priors[1], 0)),
        (bits.pixels, nats / std::f64::consts::LN_2),
        (bits.labels, 4.0 * 3f64.log2()),
    ] {
        // The networks' own f32.
        assert!((ours - expected).abs() < 1e-4 * expected, "{ours} {expected}");
    }
}

/// However many images the decoder takes at a time.
#[test]
fn parts_of_a_block_are_the_whole() {
    let model = model(2, 1, Likelihood::LogisticMixture, 5);
    let block = block(&model, 0, true, 5, 5);
    let codec = Codec::new(&model, &[], true).unwrap();
    let per_image = 64 * model.config().pixel_distribution().unwrap().parameters(3);
    let (whole, bits) = codec.encode(&block).unwrap();
    for most in [1, per_image, 2 * per_image, 4 * per_image + 1] {
        let codec = codec.with_most_parameters(most);
        let (bytes, same_bits) = codec.encode(&block).unwrap();
        assert!(same(&block, &codec.decode(&bytes, 5, [8, 8]).unwrap()), "{most}");
        // The kernels of a CPU give an image the same numbers in any company.
        assert_eq!((&bytes, &same_bits), (&whole, &bits), "{most}");
    }
}

/// Parameters as a decoder that has learned gives them, and as none should.
#[test]
fn narrow_wide_and_far_logistics_are_coded() {
    let distribution = vq_model::PixelDistribution::LogisticMixture { mixtures: 3 };
    let mut stream = Stream::new(1, "extreme", 0);
    for spread in [0.1, 1.0, 10.0, 100.0] {
        let params: Vec<f32> = (0..30).map(|_| ((stream.unit() - 0.5) * spread) as f32).collect();
        for pixels in [[0u8, 0, 0], [255, 255, 255], [0, 255, 128], [1, 254, 77]] {
            let mut encoder = Coder::encoder();
            let mut given = pixels;
            let bits =
                super::pixels::code_position(&mut encoder, distribution, &params, &mut given);
            assert!(bits.unwrap().is_finite());
            let mut decoder = Coder::decoder(&encoder.finish()).unwrap();
            let mut read = [0; 3];
            super::pixels::code_position(&mut decoder, distribution, &params, &mut read).unwrap();
            assert_eq!(read, pixels, "{params:?}");
        }
    }
}

#[test]
fn blocks_that_do_not_fit_are_refused() {
    let model = model(1, 1, Likelihood::Mse, 3);
    let priors = priors(&model, 2, false, 3);
    assert!(matches!(
        Codec::new(&model, &priors, true),
        Err(CompressError::Model(vq_model::Error::NoLikelihood))
    ));
    let codec = Codec::new(&model, &priors, false).unwrap();
    assert!(codec.check_size(8, 8).is_ok());
    let error = codec.check_size(16, 8).unwrap_err().to_string();
    assert!(error.contains("8×8") && error.contains("--size"), "{error}");
    Codec::new(&model, &[], false).unwrap().check_size(16, 8).unwrap();

    let good = block(&model, 2, false, 2, 1);
    let without = Block { labels: Vec::new(), ..good.clone() };
    assert!(codec.encode(&without).is_err());
    let beyond = Block { labels: vec![0, 3], ..good.clone() };
    assert!(codec.encode(&beyond).unwrap_err().to_string().contains("3 is not below 3"));
    let with_pixels = Block { pixels: block(&model, 2, true, 2, 1).pixels, ..good };
    assert!(codec.encode(&with_pixels).is_err());
    let two = self::model(2, 1, Likelihood::Mse, 3);
    assert!(Codec::new(&two, &priors, false).is_err());
}

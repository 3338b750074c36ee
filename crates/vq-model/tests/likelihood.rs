//! Decoders with a likelihood: agreement with PyTorch (`golden/make_likelihood.py` made the values), and what
//! the model makes of them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use common::values;
use vq_model::{Config, Error, Likelihood, PixelDistribution, VqVae};

fn device() -> Device {
    vq_ops::test_device()
}

/// f32 sums of 256 powers, or of a few logarithms: off by some 1e-6 of the largest value.
const TOLERANCE: f32 = 1e-5;

#[test]
fn distributions_agree_with_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/likelihood.safetensors");
    let golden = candle_core::safetensors::load(path, &device()).unwrap();
    for (case, distribution) in [
        ("categorical", PixelDistribution::Categorical),
        ("mixture", PixelDistribution::LogisticMixture { mixtures: 5 }),
    ] {
        let of = |name: &str| golden[&format!("{case}/{name}")].clone();
        let params = Var::from_tensor(&of("params")).unwrap();
        let pixels = of("pixels").to_dtype(DType::U8).unwrap();
        let ours = vq_ops::pixel_likelihood(&params, &pixels, distribution).unwrap();
        let (nats, means) = (ours.narrow(1, 0, 1).unwrap(), ours.narrow(1, 1, 3).unwrap());
        let loss = (nats.squeeze(1).unwrap() * of("weights")).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        for (name, ours) in
            [("nats", nats), ("means", means), ("grad", gradients.get(&params).unwrap().clone())]
        {
            let (ours, theirs) = (values(&ours), values(&of(name)));
            assert_eq!(ours.len(), theirs.len());
            let largest = theirs.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= TOLERANCE * largest, "{case} {name}: {a} {b}");
            }
        }
    }
}

/// 4×4 codes of two levels on 8×8 images.
fn config(likelihood: Likelihood) -> Config {
    let mut config = Config { image_size: [8, 8], likelihood, mixtures: 3, ..Config::default() };
    config.levels[0].downsample = 2;
    config.levels[0].hidden = 8;
    config.levels[0].residual_blocks = 1;
    config.levels[0].residual_hidden = 4;
    config.levels[0].quantizer.codebook_size = 16;
    config.levels[0].quantizer.dim = 4;
    config.levels.push(config.levels[0].clone());
    config
}

/// Pixels in [0, 1] that are multiples of 1/255.
fn pixels() -> Tensor {
    let values = (0..2 * 3 * 64).map(|i| (i * 37 % 256) as f32 / 255.0).collect();
    Tensor::from_vec(values, (2, 3, 8, 8), &device()).unwrap()
}

const BOTH: [Likelihood; 2] = [Likelihood::Categorical, Likelihood::LogisticMixture];

#[test]
fn the_models_likelihood_is_that_of_the_pixels_under_what_it_decodes() {
    for likelihood in BOTH {
        let config = config(likelihood);
        let model = VqVae::new(&config, 3, &device()).unwrap();
        let images = config.normalization.normalize(&pixels()).unwrap();
        let output = model.evaluate(&images).unwrap();
        let nats = output.nats.as_ref().unwrap();
        assert_eq!(nats.dims(), [2, 8, 8]);

        let parameters = model.decode_parameters(&output.codes).unwrap();
        let distribution = config.pixel_distribution().unwrap();
        assert_eq!(parameters.dims(), [2, 8, 8, distribution.parameters(3)]);
        let bytes = (pixels() * 255.0).unwrap().round().unwrap().to_dtype(DType::U8).unwrap();
        let bytes = bytes.permute((0, 2, 3, 1)).unwrap().reshape((128, 3)).unwrap();
        let rows = parameters.reshape((128, ())).unwrap();
        let judged = vq_ops::pixel_likelihood(&rows, &bytes, distribution).unwrap();
        assert_eq!(values(&judged.narrow(1, 0, 1).unwrap()), values(nats), "to the bit");

        let decoded = model.decode(&output.codes).unwrap();
        assert_eq!(values(&decoded), values(&output.reconstruction().unwrap()), "to the bit");
        assert_eq!(decoded.dims(), images.dims());
        let means = config.normalization.denormalize(&decoded).unwrap();
        let expected = judged.narrow(1, 1, 3).unwrap().reshape((2, 8, 8, 3)).unwrap();
        let expected = expected.permute((0, 3, 1, 2)).unwrap();
        for (a, b) in values(&means).iter().zip(values(&expected)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}

#[test]
fn the_gradient_reaches_every_parameter_of_the_network() {
    for likelihood in BOTH {
        let model = VqVae::new(&config(likelihood), 3, &device()).unwrap();
        let images = model.config().normalization.normalize(&pixels()).unwrap();
        let output = model.forward(&images).unwrap();
        assert!(!output.reconstruction().unwrap().track_op());
        let loss = output.nats.as_ref().unwrap().mean_all().unwrap();
        let gradients = loss.backward().unwrap();
        for (name, parameter) in model.parameters() {
            if name.contains(".quantizer.") {
                continue;
            }
            let gradient = gradients.get(parameter).unwrap_or_else(|| panic!("{name} has none"));
            let sum = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(sum > 0.0 && sum.is_finite(), "{name}: {sum}");
        }
    }
}

#[test]
fn a_model_with_a_likelihood_is_stored_and_read() {
    for likelihood in BOTH {
        let model = VqVae::new(&config(likelihood), 3, &device()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path()).unwrap();
        let read = VqVae::from_pretrained(folder.path(), &device()).unwrap();
        assert_eq!(read.config(), model.config());
        let images = model.config().normalization.normalize(&pixels()).unwrap();
        let nats = |model: &VqVae| values(&model.evaluate(&images).unwrap().nats.unwrap());
        assert_eq!(nats(&model), nats(&read));
    }
}

#[test]
fn a_model_without_one_says_what_to_do() {
    let model = VqVae::new(&config(Likelihood::Mse), 3, &device()).unwrap();
    let images = model.config().normalization.normalize(&pixels()).unwrap();
    let output = model.evaluate(&images).unwrap();
    assert!(output.nats.is_none());
    let error = model.decode_parameters(&output.codes).unwrap_err();
    assert!(matches!(error, Error::NoLikelihood));
    assert!(error.to_string().contains("model.likelihood"), "{error}");
    let none = Config { mixtures: 0, ..config(Likelihood::LogisticMixture) };
    assert!(none.validate().unwrap_err().to_string().contains("mixtures"));
}

/// The estimate of memory must know the numbers of a distribution, and what they take is theirs.
#[test]
fn activations_count_the_distributions_numbers() {
    let activations =
        |likelihood| VqVae::new(&config(likelihood), 0, &device()).unwrap().activations().unwrap();
    let (mse, categorical) = (activations(Likelihood::Mse), activations(Likelihood::Categorical));
    // The logits and their gradient, at every pixel.
    assert!(categorical >= mse + 2 * 64 * 768, "{mse} {categorical}");
    assert!(activations(Likelihood::LogisticMixture) < categorical);
}

#[test]
fn a_mixture_of_one_narrow_component_decodes_to_its_mean() {
    let params: Vec<f32> = [&[0.3][..], &[0.5, -0.5, 0.0], &[-6.0; 3], &[0.0; 3]].concat();
    let params = Tensor::from_vec(params, (1, 10), &device()).unwrap();
    let pixels = Tensor::zeros((1, 3), DType::U8, &device()).unwrap();
    let distribution = PixelDistribution::LogisticMixture { mixtures: 1 };
    let judged = vq_ops::pixel_likelihood(&params, &pixels, distribution).unwrap();
    let means = values(&judged.narrow(D::Minus1, 1, 3).unwrap());
    assert_eq!(means, [0.75, 0.25, 0.5]);
}

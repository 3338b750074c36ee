//! Images to codes and back.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Tensor};
use common::{all_kinds, codes, images, model, small, two_levels, uniform, values};
use proptest::prelude::*;
use vq_model::{Codes, Config, VqVae};

#[test]
fn encode_then_decode_equals_forward_for_every_quantizer() {
    for config in all_kinds() {
        let (model, images) = (model(&config, 0), images(&config, 5, 1));
        let output = model.forward(&images).unwrap();
        let encoded = model.encode(&images).unwrap();
        for (a, b) in encoded.levels.iter().zip(&output.codes.levels) {
            assert_eq!(codes(a), codes(b));
        }
        let decoded = model.decode(&encoded).unwrap();
        assert_eq!(values(&decoded), values(&output.reconstruction().unwrap()), "to the bit");
        assert_eq!(values(&model.reconstruct(&images).unwrap()), values(&decoded));
    }
}

#[test]
fn codes_do_not_depend_on_what_else_is_in_the_batch() {
    for config in all_kinds().into_iter().chain([Config::default()]) {
        let (model, images) = (model(&config, 0), images(&config, 19, 1));
        let all = model.encode(&images).unwrap();
        let decoded = model.decode(&all).unwrap();
        for index in 0..19 {
            let one = model.encode(&images.narrow(0, index, 1).unwrap()).unwrap();
            let same = all.narrow(index, 1).unwrap();
            for (a, b) in one.levels.iter().zip(&same.levels) {
                assert_eq!(codes(a), codes(b));
            }
            let (a, b) = (model.decode(&one).unwrap(), decoded.narrow(0, index, 1).unwrap());
            let far = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            assert!(common::scalar(&far) < 1e-5);
        }
    }
}

#[test]
fn images_of_other_sizes_run_if_the_downsampling_divides_them() {
    let config = two_levels();
    let model = model(&config, 0);
    let output = model.forward(&uniform(0, &[2, 3, 12, 20], 0.5)).unwrap();
    assert_eq!(output.codes.levels[0].dims(), [2, 6, 10]);
    assert_eq!(output.codes.levels[1].dims(), [2, 3, 5]);
    assert_eq!(output.reconstruction().unwrap().dims(), [2, 3, 12, 20]);
}

#[test]
fn the_lowest_index_wins_a_tie_and_large_norms_do_not_cancel() {
    let model = VqVae::new(&small(), 0, &vq_ops::test_device()).unwrap();
    let quantizer = model.quantizer(0).unwrap();
    let book = &model.parameters()["levels.0.quantizer.codebook"];
    book.set(&Tensor::ones((16, 6), DType::F32, &vq_ops::test_device()).unwrap()).unwrap();
    assert_eq!(codes(&quantizer.encode(&uniform(0, &[3, 2, 2, 6], 1.0)).unwrap()), [0; 12]);

    // 4,096 off the origin ‖z‖² − 2z·e + ‖e‖² loses everything; differences do not.
    let offset = 4096.0;
    let near = (uniform(1, &[16, 6], 1.0) + offset).unwrap();
    book.set(&near).unwrap();
    let z = (uniform(2, &[4, 5, 5, 6], 1.0) + offset).unwrap();
    let (z_values, e_values) = (values(&z), values(&near));
    let expected: Vec<u32> = z_values
        .chunks(6)
        .map(|z| {
            let distance =
                |e: &[f32]| z.iter().zip(e).map(|(z, e)| f64::from(z - e).powi(2)).sum::<f64>();
            let distances: Vec<f64> = e_values.chunks(6).map(distance).collect();
            (0..16).min_by(|&a, &b| distances[a].total_cmp(&distances[b])).unwrap() as u32
        })
        .collect();
    assert_eq!(codes(&quantizer.encode(&z).unwrap()), expected);
}

#[test]
fn a_vector_with_nan_is_an_error_and_not_code_0() {
    let model = model(&small(), 0);
    let z = Tensor::full(f32::NAN, (1, 2, 2, 6), &vq_ops::test_device()).unwrap();
    let encoded = model.quantizer(0).unwrap().encode(&z);
    if vq_ops::test_device().is_cuda() {
        // An error would have to be waited for; the loss tells later.
        assert_eq!(codes(&encoded.unwrap()), [u32::MAX; 4]);
        return;
    }
    assert!(encoded.is_err());
    // Weights that have diverged are called that.
    let name = "levels.0.projection.bias";
    model.parameters()[name]
        .set(&Tensor::full(f32::NAN, 6, &vq_ops::test_device()).unwrap())
        .unwrap();
    let error = model.forward(&images(&small(), 1, 0)).unwrap_err();
    assert!(matches!(error, vq_model::Error::Diverged { level: 0 }), "{error}");
}

#[test]
fn images_that_do_not_fit_are_refused_with_what_to_do() {
    let model = model(&two_levels(), 0);
    let refused = |images: &Tensor, part: &str| {
        for message in [
            model.encode(images).unwrap_err().to_string(),
            model.forward(images).unwrap_err().to_string(),
        ] {
            assert!(message.contains(part), "{message}");
        }
    };
    refused(
        &uniform(0, &[1, 1, 8, 8], 0.5),
        "images must be f32 [B, 3, H, W], got F32 [1, 1, 8, 8]",
    );
    refused(&uniform(0, &[3, 8, 8], 0.5), "got F32 [3, 8, 8]");
    refused(&uniform(0, &[1, 3, 8, 10], 0.5), "images of 8×10 pixels do not fit");
    refused(&uniform(0, &[1, 3, 8, 10], 0.5), "multiples of the model's downsampling 4");
    // Devices hold no empty tensors.
    if vq_ops::test_device().is_cpu() {
        let empty = |shape| Tensor::zeros(shape, DType::F32, &vq_ops::test_device()).unwrap();
        refused(&empty((0, 3, 8, 8)), "got F32 [0, 3, 8, 8]");
        refused(&empty((1, 3, 0, 8)), "0×8 pixels do not fit");
    }
    refused(&Tensor::zeros((1, 3, 8, 8), DType::U8, &vq_ops::test_device()).unwrap(), "got U8");
    if !vq_ops::test_device().is_cpu() {
        // Nobody waits for a device to see.
        return;
    }
    for value in [f32::NAN, f32::INFINITY] {
        let mut pixels = vec![0.1; 192];
        pixels[100] = value;
        let images = Tensor::from_vec(pixels, (1, 3, 8, 8), &vq_ops::test_device()).unwrap();
        refused(&images, "images hold NaN or infinity");
    }
}

#[test]
fn codes_that_do_not_fit_are_refused_with_what_to_do() {
    let model = model(&two_levels(), 0);
    let full = |value: u32, shape: (usize, usize, usize)| {
        Tensor::full(value, shape, &vq_ops::test_device()).unwrap()
    };
    let refused = |levels: Vec<Tensor>, part: &str| {
        let message = model.decode(&Codes { levels }).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    assert!(model.decode(&Codes { levels: vec![full(15, (2, 4, 4)), full(7, (2, 2, 2))] }).is_ok());
    refused(
        vec![full(16, (2, 4, 4)), full(7, (2, 2, 2))],
        "code 16 of level 0 is out of range: the codebook has 16 (0 to 15)",
    );
    refused(vec![full(0, (2, 4, 4)), full(8, (2, 2, 2))], "code 8 of level 1 is out of range");
    refused(vec![full(0, (2, 4, 4))], "codes have 1 level(s), the model has 2");
    refused(vec![], "codes have 0 level(s)");
    refused(vec![full(0, (2, 4, 4)), full(0, (2, 4, 4))], "the grid must be 2 times smaller");
    refused(
        vec![full(0, (2, 4, 4)), full(0, (3, 2, 2))],
        "does not belong to [2, 4, 4] of level 0",
    );
    // Devices hold no empty tensors.
    if vq_ops::test_device().is_cpu() {
        refused(vec![full(0, (2, 4, 4)), full(0, (2, 0, 2))], "codes of level 1 are empty");
    }
    refused(
        vec![full(0, (2, 4, 4)), full(0, (2, 2, 2)).to_dtype(DType::F32).unwrap()],
        "must be u32 [B, h, w], got F32",
    );
    refused(vec![full(0, (2, 4, 4)).flatten_all().unwrap(), full(0, (2, 2, 2))], "got U32 [32]");
}

#[test]
fn normalisation_is_undone_by_its_inverse_which_clamps() {
    let mut config = small();
    config.normalization.mean = vec![0.4914, 0.4822, 0.4465];
    config.normalization.std = vec![0.247, 0.2435, 0.2616];
    let pixels = uniform(0, &[2, 3, 4, 4], 0.5).affine(1.0, 0.5).unwrap();
    let normalized = config.normalization.normalize(&pixels).unwrap();
    let red = values(&pixels)[0];
    assert!((values(&normalized)[0] - (red - 0.4914) / 0.247).abs() < 1e-6);
    let back = config.normalization.denormalize(&normalized).unwrap();
    assert!(values(&back).iter().zip(values(&pixels)).all(|(a, b)| (a - b).abs() < 1e-6));
    let far = config.normalization.denormalize(&uniform(0, &[2, 3, 4, 4], 9.0)).unwrap();
    assert!(values(&far).iter().all(|v| (0.0..=1.0).contains(v)));
    assert!(config.normalization.normalize(&uniform(0, &[2, 1, 4, 4], 1.0)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_grid_of_valid_codes_decodes_to_finite_images(
        batch in 1..3usize, height in 1..4usize, width in 1..4usize, seed in 0..1000u64,
    ) {
        let config = two_levels();
        let model = VqVae::new(&config, seed, &vq_ops::test_device()).unwrap();
        let level = |size: usize, factor: usize| {
            let unit = uniform(seed, &[batch, height * factor, width * factor], 0.499);
            unit.affine(size as f64, size as f64 / 2.0).unwrap().to_dtype(DType::U32).unwrap()
        };
        let codes = Codes { levels: vec![level(16, 2), level(8, 1)] };
        let images = model.decode(&codes).unwrap();
        prop_assert_eq!(images.dims(), [batch, 3, height * 4, width * 4]);
        prop_assert!(values(&images).iter().all(|v| v.is_finite()));
    }
}

#[test]
fn a_level_that_is_left_out_does_not_matter() {
    let config = two_levels();
    let model = model(&config, 0);
    let codes = model.encode(&images(&config, 2, 0)).unwrap();
    let decode =
        |codes: &Codes, shown: &[bool]| values(&model.decode_levels(codes, shown).unwrap());
    assert_eq!(decode(&codes, &[true, true]), values(&model.decode(&codes).unwrap()));
    let other = model.encode(&images(&config, 2, 7)).unwrap();
    let (bottom, top) = ([true, false], [false, true]);
    assert_ne!(decode(&codes, &bottom), decode(&codes, &top));
    // The other level's codes may be anything.
    let mixed = Codes { levels: vec![codes.levels[0].clone(), other.levels[1].clone()] };
    assert_eq!(decode(&mixed, &bottom), decode(&codes, &bottom));
    assert_eq!(decode(&mixed, &top), decode(&other, &top));
    let error = model.decode_levels(&codes, &[true]).unwrap_err().to_string();
    assert!(error.contains("2 level(s)"), "{error}");
}

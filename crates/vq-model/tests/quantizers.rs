//! What must hold of every quantizer.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may panic; many values must be exact"
)]

mod common;

use candle_core::{Tensor, Var};
use common::{bits, codes, every_quantizer, images, model, scalar, small_of, uniform, values};
use proptest::prelude::*;
use vq_model::{CodebookUpdate, Codes, Config, Quantized, QuantizerConfig, TrainingStep, VqVae};

/// Asserts within a property, with the quantizer's settings in the message.
macro_rules! same {
    ($a:expr, $b:expr, $config:expr) => {
        prop_assert_eq!($a, $b, "{:?}", $config)
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn codes_decode_to_what_was_quantized_exactly(
        seed in 0..1000u64, b in 1..4usize, h in 1..5usize, w in 1..5usize, spread in 0.01f32..3.0,
    ) {
        for config in every_quantizer() {
            let model = model(&small_of(&config), seed);
            let quantizer = model.quantizer(0).unwrap();
            let z_e = uniform(seed, &[b, h, w, config.dim], spread);
            let quantized = quantizer.quantize(&z_e).unwrap();
            let encoded = quantizer.encode(&z_e).unwrap();
            same!(codes(&encoded), codes(&quantized.codes), config);
            let (count, size) = (config.codes_per_position(), config.codebook_size);
            same!(quantizer.codes_per_position(), count, config);
            same!((quantizer.codebook_size(), quantizer.dim()), (size, config.dim), config);
            let shape = if count > 1 { vec![b, h, w, count] } else { vec![b, h, w] };
            same!(encoded.dims(), &shape[..], config);
            same!(quantized.codes.dims(), &shape[..], config);
            same!(codes(&encoded).iter().all(|&code| (code as usize) < size), true, config);
            same!(quantized.z_q.dims(), z_e.dims(), config);
            let decoded = quantizer.decode(&encoded).unwrap();
            same!(decoded.dims(), z_e.dims(), config);
            same!(values(&decoded), values(&quantized.z_q), config);
        }
    }

    #[test]
    fn codes_do_not_depend_on_the_batch(seed in 0..1000u64, spread in 0.01f32..3.0) {
        for config in every_quantizer() {
            let model = model(&small_of(&config), seed);
            let quantizer = model.quantizer(0).unwrap();
            let z_e = uniform(seed, &[9, 3, 2, config.dim], spread);
            let all = quantizer.encode(&z_e).unwrap();
            for index in 0..9 {
                let one = z_e.narrow(0, index, 1).unwrap().contiguous().unwrap();
                let alone = quantizer.encode(&one).unwrap();
                same!(codes(&alone), codes(&all.narrow(0, index, 1).unwrap()), config);
                // Nor on its neighbours.
                let corner = one.narrow(1, 1, 1).unwrap().narrow(2, 1, 1).unwrap();
                let corner = quantizer.encode(&corner.contiguous().unwrap()).unwrap();
                let count = config.codes_per_position();
                same!(&codes(&corner)[..], &codes(&alone)[3 * count..4 * count], config);
            }
        }
    }

    #[test]
    fn equal_vectors_have_equal_codes_and_finite_losses_and_gradients(
        seed in 0..1000u64, size in prop_oneof![Just(0f32), Just(1e-20), 1e-3f32..1e3],
    ) {
        for config in every_quantizer() {
            let model = model(&small_of(&config), seed);
            let row = uniform(seed, &[1, 1, 1, config.dim], size);
            let z_e = row.broadcast_as((2, 3, 4, config.dim)).unwrap().contiguous().unwrap();
            let z_e = Var::from_tensor(&z_e).unwrap();
            let quantized = model.quantizer(0).unwrap().quantize(&z_e).unwrap();
            let count = config.codes_per_position();
            let found = codes(&quantized.codes);
            same!(found.chunks(count).all(|codes| *codes == found[..count]), true, config);
            let loss = total(&quantized);
            same!(scalar(&loss).is_finite(), true, config);
            let gradients = loss.backward().unwrap();
            if let Some(gradient) = gradients.get(&z_e) {
                same!(values(gradient).iter().all(|g| g.is_finite()), true, config);
            }
            for parameter in model.parameters().values() {
                if let Some(gradient) = gradients.get(parameter) {
                    same!(values(gradient).iter().all(|g| g.is_finite()), true, config);
                }
            }
        }
    }
}

#[test]
fn the_whole_model_decodes_its_codes_to_its_reconstruction_for_every_quantizer() {
    for config in every_quantizer().iter().map(small_of) {
        let (model, images) = (model(&config, 0), images(&config, 5, 1));
        let output = model.forward(&images).unwrap();
        let encoded = model.encode(&images).unwrap();
        assert_eq!(codes(&encoded.levels[0]), codes(&output.codes.levels[0]));
        let decoded = model.decode(&encoded).unwrap();
        assert_eq!(values(&decoded), values(&output.reconstruction().unwrap()), "{config:?}");
        // Without a graph: the same values and nothing to differentiate.
        let evaluated = model.evaluate(&images).unwrap();
        assert_eq!(values(&evaluated.reconstruction().unwrap()), values(&decoded));
        assert!(!evaluated.reconstruction().unwrap().track_op(), "{config:?}");
        assert_eq!(scalar(&evaluated.commitment_loss), scalar(&output.commitment_loss));
    }
}

#[test]
fn every_quantizer_trains_every_parameter_of_a_model_of_two_levels() {
    for quantizer in every_quantizer() {
        let mut config = small_of(&quantizer);
        config.levels.push(config.levels[0].clone());
        let (model, images) = (model(&config, 0), images(&config, 4, 1));
        let step = TrainingStep { seed: 1, step: 1, first_image: 0 };
        let output = model.forward_training(&images, step).unwrap();
        let mut loss = output.reconstruction().unwrap().sqr().unwrap().mean_all().unwrap();
        loss = (loss + &output.codebook_loss).unwrap();
        loss = (loss + &output.commitment_loss).unwrap();
        if let Some(entropy) = &output.entropy_loss {
            loss = (loss + entropy).unwrap();
        }
        let has_entropy =
            quantizer.kind.has_key("entropy_weight") && quantizer.entropy_weight > 0.0;
        assert_eq!(output.entropy_loss.is_some(), has_entropy, "{quantizer:?}");
        let gradients = loss.backward().unwrap();
        for (name, parameter) in model.parameters() {
            let gradient = gradients.get(parameter);
            let gradient = gradient.unwrap_or_else(|| panic!("{quantizer:?}: none for {name}"));
            // A fresh encoder's outputs are small: with few levels all codes can be the vector 0, which
            // gives the weights that it meets no gradient.
            let meets_codes = name.ends_with("decoder.0.weight");
            if !(quantizer.kind.has_key("levels") && meets_codes) {
                assert!(values(gradient).iter().any(|&g| g != 0.0), "{quantizer:?}: {name}");
            }
        }
    }
}

#[test]
fn nothing_but_an_update_changes_a_quantizer() {
    for quantizer in every_quantizer() {
        let config = small_of(&quantizer);
        let (model, images) = (model(&config, 0), images(&config, 3, 1));
        let before = bits(&model);
        let output = model.evaluate(&images).unwrap();
        let codes = model.encode(&images).unwrap();
        model.decode(&codes).unwrap();
        model.forward(&images).unwrap().commitment_loss.backward().unwrap();
        model.forward_training(&images, TrainingStep { seed: 3, step: 4, first_image: 0 }).unwrap();
        model.quantizer(0).unwrap().codebooks().unwrap();
        assert_eq!(bits(&model), before, "{quantizer:?}");
        let options = CodebookUpdate { revive_threshold: 0.5, seed: 0 };
        let reports = model.update_codebooks(&output.z_e, &output.codes, &options, 1).unwrap();
        let is_kept = quantizer.kind.has_key("rule");
        let count = quantizer.codes_per_position();
        assert_eq!(reports.len(), if is_kept { count } else { 0 });
        assert_eq!(bits(&model) != before, is_kept, "{quantizer:?}");
        for report in reports {
            assert_eq!(report.counts().unwrap().iter().sum::<u64>(), 3 * 16, "{quantizer:?}");
            assert!(report.parameter.is_none_or(|name| model.parameters().contains_key(&name)));
            let named = |name: &String| name.starts_with(&report.codebook);
            assert!(model.buffers().keys().any(named), "{}", report.codebook);
        }
    }
}

#[test]
fn a_saved_model_of_every_quantizer_loads_to_the_bit_and_goes_on_alike() {
    for quantizer in every_quantizer() {
        let config = small_of(&quantizer);
        let folder = tempfile::tempdir().unwrap();
        let (model, images) = (model(&config, 0), images(&config, 6, 1));
        let options = CodebookUpdate { revive_threshold: 0.3, seed: 4 };
        let step = |model: &VqVae, step: u64| {
            let output = model
                .forward_training(&images, TrainingStep { seed: 4, step, first_image: 0 })
                .unwrap();
            let reports = model.update_codebooks(&output.z_e, &output.codes, &options, step);
            let reports: Vec<_> = reports
                .unwrap()
                .into_iter()
                .map(|report| {
                    (report.counts().unwrap(), report.revived, report.codebook, report.parameter)
                })
                .collect();
            (reports, values(&output.reconstruction().unwrap()))
        };
        step(&model, 1);
        model.save(folder.path()).unwrap();
        let loaded = VqVae::from_pretrained(folder.path(), &vq_ops::test_device()).unwrap();
        assert_eq!(loaded.config(), model.config());
        assert_eq!(bits(&loaded), bits(&model));
        assert!(loaded.codebooks_initialized().unwrap());
        for number in 2..5 {
            assert_eq!(step(&loaded, number), step(&model, number), "{quantizer:?}");
        }
        assert_eq!(bits(&loaded), bits(&model));
    }
}

#[test]
fn a_vector_that_is_not_finite_is_an_error_and_not_code_0() {
    if !vq_ops::test_device().is_cpu() {
        // Nobody waits for a device to see; the losses are then not finite either.
        return;
    }
    for quantizer in every_quantizer() {
        let model = model(&small_of(&quantizer), 0);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![0.5; quantizer.dim * 4];
            row[quantizer.dim * 2] = value;
            let z =
                Tensor::from_vec(row, (1, 2, 2, quantizer.dim), &vq_ops::test_device()).unwrap();
            assert!(model.quantizer(0).unwrap().encode(&z).is_err(), "{quantizer:?} {value}");
            assert!(model.quantizer(0).unwrap().quantize(&z).is_err(), "{quantizer:?} {value}");
        }
    }
}

#[test]
fn vectors_and_codes_of_the_wrong_shape_and_codes_out_of_range_are_refused() {
    for quantizer in every_quantizer() {
        let config = small_of(&quantizer);
        let model = model(&config, 0);
        let wide = uniform(0, &[1, 2, 2, quantizer.dim + 1], 1.0);
        let message = model.quantizer(0).unwrap().encode(&wide).unwrap_err().to_string();
        assert!(message.contains(&format!("[.., {}]", quantizer.dim)), "{message}");
        let codes = model.encode(&images(&config, 2, 0)).unwrap();
        let refused = |level: Tensor, part: &str| {
            let message = model.decode(&Codes { levels: vec![level] }).unwrap_err().to_string();
            assert!(message.contains(part), "{quantizer:?}: {message}");
        };
        let size = quantizer.codebook_size as u32;
        let high = Tensor::full(size, codes.levels[0].dims(), &vq_ops::test_device()).unwrap();
        refused(high.clone(), &format!("code {size} of level 0 is out of range"));
        // Nobody waits for a device to see; CUDA gives no numbers.
        let decoded = model.quantizer(0).unwrap().decode(&high);
        let is_refused = match decoded {
            Ok(z) => values(&z).iter().all(|v| v.is_nan()),
            Err(_) => true,
        };
        assert!(is_refused || vq_ops::test_device().is_metal());
        refused(codes.levels[0].flatten_all().unwrap(), "must be u32 [B, h, w");
        let count = quantizer.codes_per_position();
        if count > 1 {
            let layout = format!("[B, h, w, {count}]");
            refused(codes.levels[0].narrow(3, 0, 1).unwrap().squeeze(3).unwrap(), &layout);
            let more = Tensor::cat(&[&codes.levels[0], &codes.levels[0]], 3).unwrap();
            refused(more, &layout);
        }
    }
}

#[test]
fn all_codes_of_an_implicit_codebook_are_distinct_and_come_back_as_themselves() {
    let implicit = every_quantizer().into_iter().filter(|config| config.kind.is_implicit());
    for config in implicit.chain([
        QuantizerConfig::finite_scalar(&[8, 8, 8, 8, 8, 8]),
        QuantizerConfig::finite_scalar(&[1000, 2]),
        QuantizerConfig::lookup_free(18),
        QuantizerConfig::binary_spherical(18),
    ]) {
        let size = config.codebook_size;
        let all = Tensor::arange(0u32, size as u32, &vq_ops::test_device()).unwrap();
        let all = all.reshape((1, 1, size)).unwrap();
        let model = VqVae::new(&small_of(&config), 0, &vq_ops::test_device()).unwrap();
        let quantizer = model.quantizer(0).unwrap();
        assert!(quantizer.codebooks().unwrap().is_empty());
        assert!(model.codebook(0).unwrap_err().to_string().contains("0 codebooks"));
        assert!(
            model
                .buffers()
                .keys()
                .chain(model.parameters().keys())
                .all(|n| !n.contains("quantizer"))
        );
        let vectors = quantizer.decode(&all).unwrap();
        let mut rows: Vec<Vec<u32>> = values(&vectors)
            .chunks(config.dim)
            .map(|row| row.iter().map(|value| value.to_bits()).collect())
            .collect();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), size, "{config:?}");
        // The inverse: a vector that the quantizer sends to each of them.
        let z = towards(&config, &vectors);
        assert_eq!(codes(&quantizer.encode(&z).unwrap()), codes(&all), "{config:?}");
        assert_eq!(values(&quantizer.quantize(&z).unwrap().z_q), values(&vectors));
    }
}

/// Vectors whose codes are `vectors`: for signs these themselves, for scalars the inverse of the bound.
fn towards(config: &QuantizerConfig, vectors: &Tensor) -> Tensor {
    if !config.kind.has_key("levels") {
        return vectors.clone();
    }
    let inverse = |(index, value): (usize, &f32)| {
        let levels = config.levels[index % config.dim] as f64;
        let half = (levels - 1.0) * (1.0 - 1e-3) / 2.0;
        let offset = if levels % 2.0 == 0.0 { 0.5 } else { 0.0 };
        let bounded = f64::from(*value) * (levels / 2.0).floor();
        let shift = if levels == 2.0 { 0.0 } else { (offset / half).tan() };
        // The outermost levels lie beyond the bound's ends, which round to them.
        let target = ((bounded + offset) / half).clamp(-1.0 + 1e-12, 1.0 - 1e-12);
        (target.atanh() - shift) as f32
    };
    let z: Vec<f32> = values(vectors).iter().enumerate().map(inverse).collect();
    Tensor::from_vec(z, vectors.dims(), &vq_ops::test_device()).unwrap()
}

#[test]
fn a_codebook_holds_what_decode_gives() {
    for config in every_quantizer().into_iter().filter(|config| !config.kind.is_implicit()) {
        let model = model(&small_of(&config), 0);
        let quantizer = model.quantizer(0).unwrap();
        let codebooks = quantizer.codebooks().unwrap();
        let count = config.codes_per_position();
        assert_eq!(codebooks.len(), count);
        let dim = if config.kind.has_key("groups") { 6 / count } else { 6 };
        assert!(codebooks.iter().all(|codebook| codebook.dims() == [16, dim]), "{config:?}");
        assert_eq!(model.codebook(0).is_ok(), count == 1);
        // Code k of one codebook, code 0 of the others.
        for (index, codebook) in codebooks.iter().enumerate() {
            for code in 0..16u32 {
                let mut chosen = vec![0; count];
                chosen[index] = code;
                let shape = if count > 1 { vec![1, 1, 1, count] } else { vec![1, 1, 1] };
                let chosen = Tensor::from_vec(chosen, shape, &vq_ops::test_device()).unwrap();
                let vector = values(&quantizer.decode(&chosen).unwrap());
                let row = |of: &Tensor, code: usize| values(&of.get(code).unwrap());
                let expected: Vec<f32> = if config.kind.has_key("stages") {
                    let mut sum = vec![0f32; 6];
                    for (other, of) in codebooks.iter().enumerate() {
                        let code = if other == index { code as usize } else { 0 };
                        sum.iter_mut().zip(row(of, code)).for_each(|(sum, e)| *sum += e);
                    }
                    sum
                } else {
                    let part = |(other, of): (usize, &Tensor)| {
                        row(of, if other == index { code as usize } else { 0 })
                    };
                    codebooks.iter().enumerate().flat_map(part).collect()
                };
                assert_eq!(vector, expected, "{config:?}, {:?}", codebook.dims());
            }
        }
    }
}

/// `z_q` weighted, and all losses.
fn total(quantized: &Quantized) -> Tensor {
    let weights = uniform(7, quantized.z_q.dims(), 1.0);
    let mut loss = (&quantized.z_q * weights).unwrap().sum_all().unwrap();
    loss = (loss + &quantized.codebook_loss).unwrap();
    loss = (loss + &quantized.commitment_loss).unwrap();
    match &quantized.entropy_loss {
        Some(entropy) => (loss + entropy).unwrap(),
        None => loss,
    }
}

#[test]
fn the_low_dimensional_lookup_is_the_encoders_last_and_the_decoders_first_convolution() {
    let mut config = Config::default();
    config.levels[0].quantizer.dim = 8;
    let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
    let shape = |name: &str| model.parameters()[&format!("levels.0.{name}")].dims().to_vec();
    assert_eq!(shape("projection.weight"), [8, 128, 1, 1]);
    assert_eq!(shape("quantizer.codebook"), [512, 8]);
    assert_eq!(shape("decoder.0.weight"), [128, 8, 3, 3]);
    let images = images(&config, 2, 0);
    let output = model.forward(&images).unwrap();
    assert_eq!(output.z_e[0].dims(), [2, 8, 8, 8]);
    assert_eq!(
        values(&model.reconstruct(&images).unwrap()),
        values(&output.reconstruction().unwrap())
    );
}

//! Losses, stop-gradients and gradient estimators.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may panic; many values must be exact"
)]

mod common;

use candle_core::{Tensor, Var};
use common::{images, model, scalar, small, small_with, three_levels, two_levels, uniform, values};
use vq_model::{CodebookRule, Config, GradientEstimator, VqVae, rotation, straight_through};

const RULES: [CodebookRule; 2] = [CodebookRule::Gradient, CodebookRule::Ema];
const ESTIMATORS: [GradientEstimator; 2] =
    [GradientEstimator::StraightThrough, GradientEstimator::Rotation];

#[test]
fn beta_weighs_the_encoders_term_and_leaves_the_codebooks_gradient_alone() {
    let config = small();
    let (model, images) = (model(&config, 0), images(&config, 4, 1));
    let gradient = |beta: f64, name: &str| {
        let output = model.forward(&images).unwrap();
        let loss = total_loss(&output, &images, beta);
        values(loss.backward().unwrap().get(&model.parameters()[name]).unwrap())
    };
    let encoder = "levels.0.encoder.0.weight";
    let at = [gradient(0.0, encoder), gradient(0.5, encoder), gradient(1.0, encoder)];
    let size = at[2].iter().fold(0f32, |max, g| max.max(g.abs()));
    for ((g0, g05), g1) in at[0].iter().zip(&at[1]).zip(&at[2]) {
        assert!((g1 - g0 - 2.0 * (g05 - g0)).abs() < 1e-5 * size, "{g0} {g05} {g1}");
    }
    assert_ne!(at[0], at[2]);
    let codebook = "levels.0.quantizer.codebook";
    assert_eq!(gradient(0.0, codebook), gradient(1.0, codebook));
    let decoder = "levels.0.decoder.0.weight";
    assert_eq!(gradient(0.0, decoder), gradient(1.0, decoder));
}

#[test]
fn each_loss_reaches_only_what_its_stop_gradient_lets_it_reach() {
    let config = small();
    let (model, images) = (model(&config, 0), images(&config, 4, 1));
    let reached = |pick: fn(&vq_model::Output) -> Tensor| -> Vec<String> {
        let gradients = pick(&model.forward(&images).unwrap()).backward().unwrap();
        let nonzero =
            |var: &Var| gradients.get(var).is_some_and(|g| values(g).iter().any(|&g| g != 0.0));
        let names = model.parameters().iter().filter(|(_, var)| nonzero(var));
        names.map(|(name, _)| name.clone()).collect()
    };
    let all: Vec<String> = model.parameters().keys().cloned().collect();
    let with = |parts: &[&str]| -> Vec<String> {
        all.iter().filter(|name| parts.iter().any(|part| name.contains(part))).cloned().collect()
    };
    assert_eq!(reached(|o| o.codebook_loss.clone()), with(&["codebook"]));
    assert_eq!(reached(|o| o.commitment_loss.clone()), with(&["encoder", "projection"]));
    assert_eq!(
        reached(|o| o.reconstruction().unwrap().sqr().unwrap().mean_all().unwrap()),
        with(&["encoder", "projection", "decoder"])
    );
}

#[test]
fn losses_are_means_over_batch_positions_and_dimensions_taken_before_the_straight_through_step() {
    for rule in RULES {
        for estimator in ESTIMATORS {
            let config = small_with(rule, estimator);
            let model = model(&config, 2);
            let output = model.forward(&images(&config, 3, 1)).unwrap();
            let (z_e, codebook) = (values(&output.z_e[0]), values(&model.codebook(0).unwrap()));
            let codes = common::codes(&output.codes.levels[0]);
            let dim = config.levels[0].quantizer.dim;
            let mut sum = 0.0;
            for (z, &code) in z_e.chunks(dim).zip(&codes) {
                let e = &codebook[code as usize * dim..][..dim];
                sum += z.iter().zip(e).map(|(z, e)| f64::from(z - e).powi(2)).sum::<f64>();
            }
            let mean = (sum / z_e.len() as f64) as f32;
            assert!(mean > 0.0);
            assert!((scalar(&output.commitment_loss) / mean - 1.0).abs() < 1e-5);
            match rule {
                CodebookRule::Gradient => {
                    assert!((scalar(&output.codebook_loss) / mean - 1.0).abs() < 1e-5);
                }
                CodebookRule::Ema => assert_eq!(scalar(&output.codebook_loss), 0.0),
            }
        }
    }
}

#[test]
fn straight_through_passes_the_gradient_exactly_and_gives_the_code_exactly() {
    let z = Var::from_tensor(&uniform(0, &[50, 7], 1e3)).unwrap();
    let e = Var::from_tensor(&uniform(1, &[50, 7], 1e-3)).unwrap();
    let weights = uniform(2, &[50, 7], 1.0);
    let z_q = straight_through(&z, &e).unwrap();
    assert_eq!(values(&z_q), values(&e));
    let gradients = (z_q * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(gradients.get(&z).unwrap()), values(&weights));
    assert!(gradients.get(&e).is_none());
}

#[test]
fn in_the_model_the_gradient_of_z_e_is_exactly_that_of_z_q() {
    for rule in RULES {
        let config = small_with(rule, GradientEstimator::StraightThrough);
        let model = model(&config, 2);
        let z_e = Var::from_tensor(&uniform(0, &[2, 4, 4, 6], 0.3)).unwrap();
        let quantized = model.quantizer(0).unwrap().quantize(&z_e).unwrap();
        let weights = uniform(1, &[2, 4, 4, 6], 1.0);
        let loss = (&quantized.z_q * &weights).unwrap().sum_all().unwrap();
        assert_eq!(values(loss.backward().unwrap().get(&z_e).unwrap()), values(&weights));
        let e = model.quantizer(0).unwrap().decode(&quantized.codes).unwrap();
        assert_eq!(values(&quantized.z_q), values(&e));
    }
}

#[test]
fn rotation_gives_the_code_exactly_and_turns_and_scales_the_gradient() {
    let z = Var::from_tensor(&uniform(0, &[50, 7], 2.0)).unwrap();
    let e = Var::from_tensor(&uniform(1, &[50, 7], 0.5)).unwrap();
    let weights = uniform(2, &[50, 7], 1.0);
    let z_q = rotation(&z, &e).unwrap();
    assert_eq!(values(&z_q), values(&e));
    let gradients = (z_q * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&e).is_none());
    let gradient = values(gradients.get(&z).unwrap());
    let (z, e, weights) = (values(&z), values(&e), values(&weights));
    for (((g, z), e), w) in
        gradient.chunks(7).zip(z.chunks(7)).zip(e.chunks(7)).zip(weights.chunks(7))
    {
        // R keeps lengths and angles: ‖g‖ = λ‖w‖, and the angle of g to z is that of w to e.
        let scale = norm(e) / norm(z);
        assert!((norm(g) / (scale * norm(w)) - 1.0).abs() < 1e-4);
        let cosine = |a: &[f32], b: &[f32]| dot(a, b) / (norm(a) * norm(b));
        assert!((cosine(g, z) - cosine(w, e)).abs() < 1e-4);
    }
}

#[test]
fn rotation_is_finite_for_zero_vectors_and_opposite_codes() {
    type Row = ([f32; 3], [f32; 3]);
    let rows: [Row; 7] = [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]),
        ([1.0, 2.0, 3.0], [-1.000_000_1, -2.0, -3.0]),
        ([1e-30, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([1e18, 0.0, 1e18], [1e-18, 1e-18, 0.0]),
    ];
    let flatten = |pick: fn(&Row) -> [f32; 3]| {
        let values: Vec<f32> = rows.iter().flat_map(pick).collect();
        Tensor::from_vec(values, (rows.len(), 3), &vq_ops::test_device()).unwrap()
    };
    let (z, e) = (Var::from_tensor(&flatten(|row| row.0)).unwrap(), flatten(|row| row.1));
    let z_q = rotation(&z, &e).unwrap();
    assert_eq!(values(&z_q), values(&e));
    let gradients = z_q.sum_all().unwrap().backward().unwrap();
    let gradient = values(gradients.get(&z).unwrap());
    assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
    assert_eq!(gradient[..3], [1.0; 3], "where there is no rotation it is straight-through");
    assert_eq!(gradient[9..12], [1.0; 3]);
}

#[test]
fn finite_differences_agree_for_every_kind_of_parameter() {
    for config in [small(), two_levels(), three_levels()] {
        let (model, images) = (model(&config, 4), images(&config, 8, 1));
        for (index, name) in model.parameters().keys().enumerate() {
            // In a VQ-VAE-2 these also move another level's codes, through an estimator; the golden
            // test compares them.
            let estimated =
                ["levels.0.encoder", "levels.1.encoder", "levels.1.projection", "levels.2"];
            if config.levels.len() == 1 || !estimated.iter().any(|part| name.starts_with(part)) {
                check_direction(&model, &images, name, index as u64);
            }
        }
    }
}

/// ⟨gradient, v⟩ against (L(p + hv) − L(p − hv)) / 2h for a direction v, with the loss that the
/// parameter moves without a stop-gradient or an estimator in between.
fn check_direction(model: &VqVae, images: &Tensor, name: &str, seed: u64) {
    let parameter = &model.parameters()[name];
    let start = parameter.as_detached_tensor().force_contiguous().unwrap();
    let output = model.forward(images).unwrap();
    let in_bottom_decoder = name.starts_with("levels.0.decoder");
    let is_codebook = name.ends_with("codebook");
    let loss = if in_bottom_decoder {
        (&output.reconstruction().unwrap() - images).unwrap().sqr().unwrap().mean_all().unwrap()
    } else if is_codebook {
        output.codebook_loss.clone()
    } else {
        output.commitment_loss.clone()
    };
    let gradients = loss.backward().unwrap();
    let gradient = gradients.get(parameter).unwrap();
    // Mostly along the gradient, so that the change is well above the rounding of f32.
    let size = norm(&values(gradient));
    assert!(size > 0.0, "{name}");
    let aside = uniform(seed, start.dims(), 0.5 / (start.elem_count() as f32).sqrt());
    let direction = ((gradient / f64::from(size)).unwrap() + aside).unwrap();
    let expected = f64::from(dot(&values(gradient), &values(&direction)));

    // The codes, and what a stop-gradient holds, stay those of the start.
    let e = |level: usize| {
        values(&model.quantizer(level).unwrap().decode(&output.codes.levels[level]).unwrap())
    };
    let e_at_start: Vec<Vec<f32>> = (0..output.z_e.len()).map(e).collect();
    let loss_at = |sign: f64, step: f64| -> f64 {
        parameter.set(&(&start + (&direction * (sign * step)).unwrap()).unwrap()).unwrap();
        if in_bottom_decoder {
            return mean_square(&values(&model.decode(&output.codes).unwrap()), &values(images));
        }
        let z_e =
            if is_codebook { output.z_e.clone() } else { model.evaluate(images).unwrap().z_e };
        let level = |(index, z_e)| {
            let e = if is_codebook { e(index) } else { e_at_start[index].clone() };
            mean_square(&values(z_e), &e)
        };
        z_e.iter().enumerate().map(level).sum()
    };
    let error = |step: f64| {
        ((loss_at(1.0, step) - loss_at(-1.0, step)) / (2.0 * step) / expected - 1.0).abs()
    };
    // Too long a step meets kinks, too short a one the rounding.
    let best = [1e-2, 3e-3, 1e-3, 3e-4].map(error).into_iter().fold(f64::MAX, f64::min);
    parameter.set(&start).unwrap();
    assert!(best < 0.005, "{name}: off by {best} of {expected}");
}

fn mean_square(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    squares.sum::<f64>() / a.len() as f64
}

fn total_loss(output: &vq_model::Output, images: &Tensor, beta: f64) -> Tensor {
    let error =
        (&output.reconstruction().unwrap() - images).unwrap().sqr().unwrap().mean_all().unwrap();
    ((error + &output.codebook_loss).unwrap() + (&output.commitment_loss * beta).unwrap()).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f32]) -> f32 {
    dot(a, a).sqrt()
}

#[test]
fn cosine_codes_compare_directions_and_take_the_losses_in_the_normalised_space() {
    for rule in RULES {
        let mut config = small_with(rule, GradientEstimator::StraightThrough);
        config.levels[0].quantizer.cosine = true;
        let model = model(&config, 2);
        let quantizer = model.quantizer(0).unwrap();
        let z_e = Var::from_tensor(&uniform(0, &[2, 4, 4, 6], 0.3)).unwrap();
        let quantized = quantizer.quantize(&z_e).unwrap();
        for e in
            values(&quantized.z_q).chunks(6).chain(values(&model.codebook(0).unwrap()).chunks(6))
        {
            assert!((norm(e) - 1.0).abs() < 1e-5);
        }
        let longer = quantizer.quantize(&(z_e.as_tensor() * 7.0).unwrap()).unwrap();
        assert_eq!(common::codes(&quantized.codes), common::codes(&longer.codes));
        let z_hat: Vec<f32> = values(&z_e)
            .chunks(6)
            .flat_map(|z| z.iter().map(|v| v / norm(z)).collect::<Vec<_>>())
            .collect();
        let expected = mean_square(&z_hat, &values(&quantized.z_q)) as f32;
        assert!((scalar(&quantized.commitment_loss) - expected).abs() < 1e-6);
        if rule == CodebookRule::Gradient {
            assert!((scalar(&quantized.codebook_loss) - expected).abs() < 1e-6);
        }
        // The length of z_e changes nothing, so no gradient points along it.
        let gradients = quantized.commitment_loss.backward().unwrap();
        for (g, z) in values(gradients.get(&z_e).unwrap()).chunks(6).zip(values(&z_e).chunks(6)) {
            assert!(dot(g, z).abs() < 1e-4 * norm(g) * norm(z) + 1e-9);
        }
        let zeros =
            Var::zeros((1, 1, 2, 6), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        let loss = quantizer.quantize(&zeros).unwrap().commitment_loss;
        let gradients = loss.backward().unwrap();
        assert!(values(gradients.get(&zeros).unwrap()).iter().all(|g| g.is_finite()));
    }
}

#[test]
fn evaluating_records_no_graph_and_gives_the_same_values() {
    for config in common::all_kinds() {
        let (model, images) = (model(&config, 0), images(&config, 2, 1));
        let (trained, evaluated) =
            (model.forward(&images).unwrap(), model.evaluate(&images).unwrap());
        assert_eq!(
            values(&trained.reconstruction().unwrap()),
            values(&evaluated.reconstruction().unwrap())
        );
        assert_eq!(scalar(&trained.commitment_loss), scalar(&evaluated.commitment_loss));
        assert!(scalar(&evaluated.commitment_loss) > 0.0, "evaluation reports it too");
        assert!(trained.reconstruction().unwrap().track_op());
        assert!(!evaluated.reconstruction().unwrap().track_op());
        assert!(!evaluated.z_e[0].track_op() && !trained.z_e[0].track_op());
        let other: Config = config.clone();
        assert_eq!(other, *model.config());
    }
}

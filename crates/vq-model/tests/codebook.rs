//! Codebook maintenance: moving averages, k-means, revival.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may panic; many values must be exact"
)]

mod common;

use candle_core::Tensor;
use common::{bits, images, model, small, small_with, uniform, values};
use vq_model::{
    CodebookRule, CodebookUpdate, Codes, Config, GradientEstimator, QuantizerConfig, VqVae,
};

const NAME: &str = "levels.0.quantizer";

#[test]
fn only_update_and_initialize_change_a_model_and_never_evaluation() {
    for config in common::all_kinds() {
        let (model, images) = (model(&config, 0), images(&config, 3, 1));
        let before = bits(&model);
        let codes = model.encode(&images).unwrap();
        model.decode(&codes).unwrap();
        model.reconstruct(&images).unwrap();
        let output = model.evaluate(&images).unwrap();
        model.forward(&images).unwrap().commitment_loss.backward().unwrap();
        assert_eq!(bits(&model), before);
        let options = CodebookUpdate { revive_threshold: 0.5, seed: 0 };
        model.update_codebooks(&output.z_e, &output.codes, &options, 1).unwrap();
        assert_ne!(bits(&model), before);
    }
}

#[test]
fn an_update_uses_the_codes_that_were_assigned_before_it() {
    // One code, assigned by hand to vectors that lie nearer to another: it moves all the same.
    let model = ema_model(0.5, 1e-5);
    let start = values(&model.codebook(0).unwrap());
    let z = uniform(0, &[32, 6], 1.0);
    let codes = Codes { levels: vec![Tensor::full(3u32, 32, &vq_ops::test_device()).unwrap()] };
    model
        .update_codebooks(std::slice::from_ref(&z), &codes, &CodebookUpdate::default(), 0)
        .unwrap();
    let sums = values(&z.sum(0).unwrap());
    let after = row(&model, 3);
    for ((after, start), sum) in after.iter().zip(&start[18..24]).zip(sums) {
        // N = 0.5·1 + 0.5·32, m = 0.5·e + 0.5·Σz
        assert!((after - (0.5 * start + 0.5 * sum) / 16.5).abs() < 1e-5);
    }
}

#[test]
fn a_code_that_is_not_hit_does_not_move() {
    let model = ema_model(0.99, 1e-5);
    let start = values(&model.codebook(0).unwrap());
    let z = uniform(0, &[32, 6], 1.0);
    let codes = Codes {
        levels: vec![Tensor::zeros(32, candle_core::DType::U32, &vq_ops::test_device()).unwrap()],
    };
    for step in 0..3000 {
        model
            .update_codebooks(std::slice::from_ref(&z), &codes, &CodebookUpdate::default(), step)
            .unwrap();
    }
    let after = values(&model.codebook(0).unwrap());
    assert_eq!(after[6..], start[6..], "not by one bit in 3,000 steps");
    let mean = values(&z.mean(0).unwrap());
    assert!(after[..6].iter().zip(mean).all(|(e, mean)| (e - mean).abs() < 1e-4));
    // A code that comes back after its N has all but vanished is finite and lands on its vectors.
    let codes = Codes { levels: vec![Tensor::full(5u32, 32, &vq_ops::test_device()).unwrap()] };
    model
        .update_codebooks(std::slice::from_ref(&z), &codes, &CodebookUpdate::default(), 3000)
        .unwrap();
    let mean = values(&z.mean(0).unwrap());
    assert!(row(&model, 5).iter().zip(mean).all(|(e, mean)| (e - mean).abs() < 1e-3));
}

#[test]
fn smoothed_counts_divide_and_are_never_written_back() {
    let usage = |epsilon: f64| {
        let model = ema_model(0.9, epsilon);
        for step in 0..20 {
            let z = uniform(step, &[64, 6], 0.1);
            let codes = assign(&model, &z);
            model.update_codebooks(&[z], &codes, &CodebookUpdate::default(), step).unwrap();
        }
        (buffer(&model, "usage"), row(&model, 0))
    };
    // ε = 1 would show in N at once if it were kept: only N's sum is independent of the assignments.
    for epsilon in [1e-5, 1.0] {
        let total: f32 = usage(epsilon).0.iter().sum();
        let expected = 0.9f32.powi(20) * 16.0 + (1.0 - 0.9f32.powi(20)) * 64.0;
        assert!((total / expected - 1.0).abs() < 1e-5, "{total} {expected}");
    }
    assert_ne!(usage(1e-5).1, usage(1.0).1);
}

#[test]
fn averages_start_consistent_so_that_the_codebook_is_m_over_n() {
    let check = |model: &VqVae, what: &str| {
        let (usage, sums) = (buffer(model, "usage"), buffer(model, "sums"));
        let codebook = values(&model.codebook(0).unwrap());
        assert!(usage.iter().all(|&n| n > 0.0), "{what}");
        for (code, n) in usage.iter().enumerate() {
            for at in code * 6..code * 6 + 6 {
                assert!((sums[at] / n - codebook[at]).abs() < 1e-6, "{what}");
            }
        }
    };
    let config = small_with(CodebookRule::Ema, GradientEstimator::StraightThrough);
    let fresh = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
    check(&fresh, "fresh");
    assert_eq!(buffer(&fresh, "usage"), [1.0; 16]);
    check(&model(&config, 0), "after k-means");
    let model = ema_model(0.9, 1e-5);
    let z = uniform(0, &[64, 6], 1.0);
    let options = CodebookUpdate { revive_threshold: 0.9, seed: 1 };
    let codes = Codes { levels: vec![Tensor::full(3u32, 64, &vq_ops::test_device()).unwrap()] };
    let report = model.update_codebooks(&[z], &codes, &options, 0).unwrap();
    assert_eq!(report[0].revived.len(), 15);
    check(&model, "after revival");
}

#[test]
fn revival_resets_embedding_and_averages_onto_distinct_vectors_of_the_batch_and_reports_the_rows() {
    for rule in [CodebookRule::Gradient, CodebookRule::Ema] {
        let config = small_with(rule, GradientEstimator::StraightThrough);
        let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
        let start = values(&model.codebook(0).unwrap());
        let z = uniform(0, &[160, 6], 1.0);
        // Codes 0 and 1 share all vectors; N of the others falls to 0.99 of 1, the mean is 10.
        let codes: Vec<u32> = (0..160).map(|i| i % 2).collect();
        let codes =
            Codes { levels: vec![Tensor::from_vec(codes, 160, &vq_ops::test_device()).unwrap()] };
        let options = CodebookUpdate { revive_threshold: 0.1, seed: 1 };
        let report = model
            .update_codebooks(std::slice::from_ref(&z), &codes, &options, 70)
            .unwrap()
            .remove(0);
        assert_eq!(report.revived, (2..16).collect::<Vec<_>>(), "{rule:?}");
        assert_eq!(report.codes_in_use().unwrap(), 2);
        assert_eq!(report.counts().unwrap()[..3], [80, 80, 0]);
        assert!((report.perplexity().unwrap() - 2.0).abs() < 1e-9);
        match rule {
            CodebookRule::Gradient => {
                assert_eq!(report.parameter.as_deref(), Some("levels.0.quantizer.codebook"));
                assert!(model.parameters().contains_key(report.parameter.as_ref().unwrap()));
                assert_eq!(values(&model.codebook(0).unwrap())[..12], start[..12]);
            }
            CodebookRule::Ema => assert_eq!(report.parameter, None),
        }
        let vectors: Vec<Vec<f32>> = values(&z).chunks(6).map(<[f32]>::to_vec).collect();
        let mut drawn = Vec::new();
        for &code in &report.revived {
            let position = vectors.iter().position(|z| *z == row(&model, code));
            drawn.push(position.expect("a vector of the batch"));
            assert_eq!(buffer(&model, "usage")[code], 10.0);
        }
        drawn.sort_unstable();
        drawn.dedup();
        assert_eq!(drawn.len(), 14, "no two on the same vector");
        // A revived code is not dead again at once.
        let again = model.update_codebooks(&[z], &codes, &options, 80).unwrap().remove(0);
        assert_eq!(again.revived, Vec::<usize>::new());
    }
}

#[test]
fn the_revival_threshold_is_relative_to_tokens_per_step_over_k() {
    let revived = |repeats: usize, threshold: f64| {
        let model = ema_model(0.0, 1e-5);
        // Without memory N is the count: code c is hit c times in 120 vectors, the mean is 7.5.
        let codes: Vec<u32> = (0..16u32).flat_map(|c| vec![c; c as usize]).collect();
        let codes: Vec<u32> = codes.repeat(repeats);
        let count = codes.len();
        let codes =
            Codes { levels: vec![Tensor::from_vec(codes, count, &vq_ops::test_device()).unwrap()] };
        let z = uniform(0, &[count, 6], 1.0);
        let options = CodebookUpdate { revive_threshold: threshold, seed: 0 };
        model.update_codebooks(&[z], &codes, &options, 0).unwrap().remove(0).revived
    };
    assert_eq!(revived(1, 0.5), [0, 1, 2, 3]);
    assert_eq!(revived(7, 0.5), [0, 1, 2, 3]);
    assert_eq!(revived(7, 0.1), [0]);
    assert_eq!(revived(1, 0.0), Vec::<usize>::new());
}

#[test]
fn several_batches_are_summed_before_one_update() {
    let update = |parts: &[Tensor]| {
        let model = model(&small_with(CodebookRule::Ema, GradientEstimator::StraightThrough), 0);
        let assigned: Vec<Codes> = parts.iter().map(|part| assign(&model, part)).collect();
        let z_e = Tensor::cat(parts, 0).unwrap();
        let codes = Codes::concat(&assigned).unwrap();
        let options = CodebookUpdate { revive_threshold: 0.5, seed: 0 };
        model.update_codebooks(&[z_e], &codes, &options, 1).unwrap();
        bits(&model)
    };
    let z = uniform(0, &[64, 6], 0.2);
    let parts = [z.narrow(0, 0, 24).unwrap(), z.narrow(0, 24, 40).unwrap()];
    assert_eq!(update(std::slice::from_ref(&z)), update(&parts));
}

#[test]
fn revival_depends_on_seed_and_step_alone() {
    let run = |seed: u64, step: u64| {
        let model = ema_model(0.9, 1e-5);
        let z = uniform(0, &[64, 6], 1.0);
        let codes = Codes {
            levels: vec![
                Tensor::zeros(64, candle_core::DType::U32, &vq_ops::test_device()).unwrap(),
            ],
        };
        let options = CodebookUpdate { revive_threshold: 0.9, seed };
        model.update_codebooks(&[z], &codes, &options, step).unwrap();
        bits(&model)
    };
    // Steps in which devices revive codes too.
    assert_eq!(run(1, 20), run(1, 20));
    assert_ne!(run(1, 20), run(1, 30));
    assert_ne!(run(1, 20), run(2, 20));
}

#[test]
fn cosine_codes_are_renormalised_after_an_update() {
    let mut config = small_with(CodebookRule::Ema, GradientEstimator::StraightThrough);
    config.levels[0].quantizer.cosine = true;
    config.levels[0].quantizer.decay = 0.8;
    let model = model(&config, 0);
    let options = CodebookUpdate { revive_threshold: 0.3, seed: 0 };
    for step in 0..10 {
        let z = uniform(step, &[64, 6], 3.0);
        let codes = assign(&model, &z);
        model.update_codebooks(&[z], &codes, &options, step).unwrap();
        // As stored, not only as given out.
        for e in buffer(&model, "codebook").chunks(6) {
            assert!((e.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5, "{e:?}");
        }
    }
}

#[test]
fn kmeans_finds_clusters_and_every_code_is_in_use() {
    for rule in [CodebookRule::Gradient, CodebookRule::Ema] {
        let config = small_with(rule, GradientEstimator::StraightThrough);
        let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
        assert!(!model.codebooks_initialized().unwrap());
        // 32 clumps of 16 vectors for 16 codes.
        let clumps = uniform(0, &[32, 1, 6], 1.0);
        let around = uniform(1, &[32, 16, 6], 0.01);
        let pool = clumps.broadcast_add(&around).unwrap();
        let error = |rounds: usize| {
            model.initialize_codebooks(std::slice::from_ref(&pool), rounds, 3).unwrap();
            let flat = pool.reshape((1, 32, 16, 6)).unwrap();
            common::scalar(&model.quantizer(0).unwrap().quantize(&flat).unwrap().commitment_loss)
        };
        let errors = [error(0), error(1), error(20)];
        assert!(errors[1] < errors[0] && errors[2] <= errors[1], "{errors:?}");
        assert!(model.codebooks_initialized().unwrap());
        let codes = assign(&model, &pool.reshape(((), 6)).unwrap());
        let mut used = common::codes(&codes.levels[0]);
        used.sort_unstable();
        used.dedup();
        assert_eq!(used.len(), 16);
        let usage = buffer(&model, "usage");
        assert!((usage.iter().sum::<f32>() - 512.0).abs() < 1e-3, "N is the sizes of the clusters");
        let first = bits(&model);
        model.initialize_codebooks(std::slice::from_ref(&pool), 20, 3).unwrap();
        assert_eq!(bits(&model), first, "the seed decides");
    }
}

#[test]
fn kmeans_takes_pools_with_fewer_different_vectors_than_codes() {
    let model = VqVae::new(&small(), 0, &vq_ops::test_device()).unwrap();
    for pool in [
        Tensor::ones((100, 6), candle_core::DType::F32, &vq_ops::test_device()).unwrap(),
        Tensor::zeros((100, 6), candle_core::DType::F32, &vq_ops::test_device()).unwrap(),
        uniform(0, &[1, 6], 1.0),
    ] {
        model.initialize_codebooks(&[pool], 5, 0).unwrap();
        assert!(values(&model.codebook(0).unwrap()).iter().all(|e| e.is_finite()));
        assert!(buffer(&model, "usage").iter().all(|&n| n >= 1.0));
    }
    let nan = Tensor::full(f32::NAN, (10, 6), &vq_ops::test_device()).unwrap();
    let before = bits(&model);
    let rounds = std::cell::Cell::new(0);
    let stop = || rounds.replace(rounds.get() + 1) == 2;
    let stopped = model.initialize_codebooks_unless(&[uniform(1, &[10, 6], 1.0)], 5, 0, &stop);
    assert!(matches!(stopped, Err(vq_model::Error::Stopped)), "{stopped:?}");
    assert!(model.initialize_codebooks(&[nan], 5, 0).is_err());
    assert!(model.initialize_codebooks(&[], 5, 0).is_err());
    assert!(model.initialize_codebooks(&[uniform(0, &[10, 5], 1.0)], 5, 0).is_err());
    assert_eq!(bits(&model), before);
}

/// N = 1, m = e, K = 16, D = 6.
fn ema_model(decay: f64, epsilon: f64) -> VqVae {
    let mut config: Config = small_with(CodebookRule::Ema, GradientEstimator::StraightThrough);
    config.levels[0].quantizer.decay = decay;
    config.levels[0].quantizer.epsilon = epsilon;
    VqVae::new(&config, 0, &vq_ops::test_device()).unwrap()
}

/// The codes of z `[N,D]`.
fn assign(model: &VqVae, z: &Tensor) -> Codes {
    let (count, dim) = z.dims2().unwrap();
    let z = z.reshape((1, 1, count, dim)).unwrap();
    Codes { levels: vec![model.quantizer(0).unwrap().encode(&z).unwrap().flatten_all().unwrap()] }
}

fn row(model: &VqVae, code: usize) -> Vec<f32> {
    values(&model.codebook(0).unwrap().get(code).unwrap())
}

fn buffer(model: &VqVae, name: &str) -> Vec<f32> {
    values(&model.buffers()[&format!("{NAME}.{name}")])
}

#[test]
fn decay_rises_to_its_value() {
    let fixed = QuantizerConfig { decay: 0.99, ..QuantizerConfig::default() };
    assert_eq!([0, 1, 1000].map(|step| fixed.decay_at(step)), [0.99; 3]);
    let rising = QuantizerConfig { decay: 0.99, decay_warmup: 9.0, ..QuantizerConfig::default() };
    assert_eq!([1, 9, 890, 1000].map(|step| rising.decay_at(step)), [0.1, 0.5, 890. / 899., 0.99]);
}

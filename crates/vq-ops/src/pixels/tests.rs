use candle_core::{Tensor, Var};
use proptest::prelude::*;

use super::*;

fn device() -> candle_core::Device {
    crate::test_device()
}

fn numbers(count: usize, seed: f32, scale: f32) -> Vec<f32> {
    (0..count).map(|i| scale * (i as f32 * 12.9898 + seed).sin()).collect()
}

fn nats(params: &[f32], pixels: &[u8], distribution: PixelDistribution) -> f64 {
    nats_of_all(params, &[pixels.to_vec()], distribution)[0]
}

/// Of several pixels with the same parameters.
fn nats_of_all(params: &[f32], pixels: &[Vec<u8>], distribution: PixelDistribution) -> Vec<f64> {
    let size = (pixels.len(), pixels[0].len());
    let params =
        Tensor::from_vec(params.repeat(size.0), (size.0, params.len()), &device()).unwrap();
    let pixels = Tensor::from_vec(pixels.concat(), size, &device()).unwrap();
    let out = pixel_likelihood(&params, &pixels, distribution).unwrap();
    out.to_vec2::<f32>().unwrap().into_iter().map(|row| f64::from(row[0])).collect()
}

/// −ln p as the definitions say it, in f64.
fn oracle(params: &[f32], pixels: &[u8], distribution: PixelDistribution) -> f64 {
    let p: Vec<f64> = params.iter().map(|&p| f64::from(p)).collect();
    let c = pixels.len();
    match distribution {
        PixelDistribution::Categorical => {
            let of = |(logits, &pixel): (&[f64], &u8)| {
                let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
                total.ln() - logits[pixel as usize]
            };
            p.chunks(256).zip(pixels).map(of).sum()
        }
        PixelDistribution::LogisticMixture { mixtures: m } => {
            let x: Vec<f64> = pixels.iter().map(|&v| f64::from(v) / 127.5 - 1.0).collect();
            let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
            let total: f64 = p[..m].iter().map(|logit| logit.exp()).sum();
            let mut mass = 0.0;
            for i in 0..m {
                let mut product = p[i].exp() / total;
                let mut pair = 0;
                for channel in 0..c {
                    let mut mean = p[(1 + channel) * m + i];
                    for before in &x[..channel] {
                        mean += p[(1 + 2 * c + pair) * m + i].tanh() * before;
                        pair += 1;
                    }
                    let s = p[(1 + c + channel) * m + i].clamp(-7.0, 7.0).exp();
                    let cdf = |edge: f64| sigmoid((edge - mean) / s);
                    let upper =
                        if pixels[channel] == 255 { 1.0 } else { cdf(x[channel] + 1.0 / 255.0) };
                    let lower =
                        if pixels[channel] == 0 { 0.0 } else { cdf(x[channel] - 1.0 / 255.0) };
                    product *= upper - lower;
                }
                mass += product;
            }
            -mass.ln()
        }
    }
}

fn distributions() -> impl Strategy<Value = PixelDistribution> {
    prop_oneof![
        Just(PixelDistribution::Categorical),
        (1usize..5).prop_map(|mixtures| PixelDistribution::LogisticMixture { mixtures }),
    ]
}

proptest! {
    #[test]
    fn agrees_with_the_definition_in_f64(
        distribution in distributions(),
        pixels in proptest::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 1..5),
        seed in 0f32..100.0,
        scale in 0.1f32..2.0,
    ) {
        let params = numbers(distribution.parameters(pixels.len()), seed, scale);
        let (ours, exact) = (nats(&params, &pixels, distribution), oracle(&params, &pixels, distribution));
        // f32 sums of a few terms of this size.
        prop_assert!((ours - exact).abs() < 2e-5 * exact.abs().max(1.0), "{ours} {exact}");
    }

    #[test]
    fn agrees_with_candles_operations_in_value_and_gradient(
        distribution in distributions(),
        pixels in proptest::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 12),
        channels in 1usize..4,
        seed in 0f32..100.0,
    ) {
        let rows = 12 / channels;
        let pixels = Tensor::from_vec(pixels, (rows, 12 / rows), &device()).unwrap();
        let size = distribution.parameters(12 / rows);
        let params = Var::from_vec(numbers(rows * size, seed, 1.5), (rows, size), &device()).unwrap();
        let weights = Tensor::from_vec(numbers(rows, 3.0, 1.0), (rows, 1), &device()).unwrap();
        let run = |out: Tensor| {
            let loss = (out.narrow(1, 0, 1).unwrap() * &weights).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            [out, gradients.get(&params).unwrap().clone()]
                .map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let ours = run(pixel_likelihood(&params, &pixels, distribution).unwrap());
        let theirs = run(composed::pixel_likelihood(&params, &pixels, distribution).unwrap());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            for (a, b) in ours.iter().zip(theirs) {
                prop_assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{a} {b}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences(
        distribution in distributions(),
        pixels in proptest::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 1..4),
        seed in 0f32..100.0,
    ) {
        let size = distribution.parameters(pixels.len());
        let values = numbers(size, seed, 1.0);
        let params = Var::from_slice(&values, (1, size), &device()).unwrap();
        let tensor = Tensor::from_slice(&pixels, (1, pixels.len()), &device()).unwrap();
        let loss = pixel_likelihood(&params, &tensor, distribution).unwrap();
        let loss = loss.narrow(1, 0, 1).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(&params).unwrap().flatten_all().unwrap();
        for (index, ours) in gradient.to_vec1::<f32>().unwrap().into_iter().enumerate().step_by(7) {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[index] += by;
                (f64::from(values[index]), oracle(&values, &pixels, distribution))
            };
            let ((a, low), (b, high)) = (moved(-1e-3), moved(1e-3));
            let exact = (high - low) / (b - a);
            prop_assert!((f64::from(ours) - exact).abs() < 1e-4 * exact.abs().max(1.0), "{ours} {exact}");
        }
    }

    /// Whatever the scale: the last channel's 256 values share the mass of the channels before.
    #[test]
    fn the_probabilities_of_all_values_sum_to_one(
        distribution in distributions(),
        before in proptest::collection::vec(any::<u8>(), 0..3),
        seed in 0f32..100.0,
        shift in prop_oneof![Just(0f32), Just(-9.0), Just(-5.0), Just(9.0)],
    ) {
        let channels = before.len() + 1;
        let mut params = numbers(distribution.parameters(channels), seed, 1.0);
        if let PixelDistribution::LogisticMixture { mixtures } = distribution {
            for log_scale in &mut params[(1 + channels) * mixtures..(1 + 2 * channels) * mixtures] {
                *log_scale += shift;
            }
        }
        let with = |value: u8| [before.as_slice(), &[value]].concat();
        let all = nats_of_all(&params, &(0..=255).map(with).collect::<Vec<_>>(), distribution);
        prop_assert!(all.iter().all(|nats| nats.is_finite()));
        let least = all.iter().copied().fold(f64::INFINITY, f64::min);
        // Σ p(before, value) = p(before), from the distribution of fewer channels.
        let sum = all.iter().map(|nats| (least - nats).exp()).sum::<f64>().ln() - least;
        let fewer = match distribution {
            PixelDistribution::Categorical => params[..256 * before.len()].to_vec(),
            PixelDistribution::LogisticMixture { mixtures: m } => {
                let (c, b) = (channels, before.len());
                let pairs = b * b.saturating_sub(1) / 2;
                [&params[..(1 + b) * m], &params[(1 + c) * m..(1 + c + b) * m],
                    &params[(1 + 2 * c) * m..(1 + 2 * c + pairs) * m]].concat()
            }
        };
        let expected = if before.is_empty() { 0.0 } else { -nats(&fewer, &before, distribution) };
        prop_assert!((sum - expected).abs() < 1e-4 * expected.abs().max(1.0), "{sum} {expected}");
    }
}

#[test]
fn extreme_parameters_give_finite_numbers() {
    let distribution = PixelDistribution::LogisticMixture { mixtures: 2 };
    for pixels in [[0u8, 255, 7], [255, 0, 128]] {
        for size in [50.0, 1000.0] {
            let values = numbers(20, 1.0, size);
            let params = Var::from_vec(values, (1, 20), &device()).unwrap();
            let tensor = Tensor::from_slice(&pixels, (1, 3), &device()).unwrap();
            let out = pixel_likelihood(&params, &tensor, distribution).unwrap();
            let gradients = out.sum_all().unwrap().backward().unwrap();
            let gradient = gradients.get(&params).unwrap().to_vec2::<f32>().unwrap();
            assert!(gradient[0].iter().all(|g| g.is_finite()), "{gradient:?}");
            let out = out.to_vec2::<f32>().unwrap();
            assert!(out[0].iter().all(|x| x.is_finite()), "{out:?}");
            assert!(out[0][1..].iter().all(|mean| (0.0..=1.0).contains(mean)), "{out:?}");
        }
    }
}

#[test]
fn what_is_not_a_number_is_not_hidden() {
    for distribution in
        [PixelDistribution::Categorical, PixelDistribution::LogisticMixture { mixtures: 2 }]
    {
        let size = distribution.parameters(1);
        assert!(nats(&vec![f32::NAN; size], &[3], distribution).is_nan());
        for index in 0..size {
            let mut params = vec![0.0; size];
            params[index] = f32::NAN;
            assert!(nats(&params, &[3], distribution).is_nan(), "{index}");
        }
    }
    let wrong = Tensor::zeros((2, 255), candle_core::DType::F32, &device()).unwrap();
    let pixels = Tensor::zeros((2, 1), candle_core::DType::U8, &device()).unwrap();
    assert!(pixel_likelihood(&wrong, &pixels, PixelDistribution::Categorical).is_err());
}

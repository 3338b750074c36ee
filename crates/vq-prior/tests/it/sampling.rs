//! Point 33 and what else samplers promise.

use candle_core::{Device, Tensor};
use vq_prior::{Completion, Conditions, Prior, SampleOptions, choose, probabilities};

use crate::common::{Data, Optimizer, all_kinds, pixelcnn, rich, transformer};

fn codes(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A prior whose distributions are far from uniform.
fn trained(config: &vq_prior::Config) -> Prior {
    let prior = Prior::new(config, 2, &Device::Cpu).unwrap();
    let (mut optimizer, data) = (Optimizer::new(prior.parameters()), Data::new(config, 4, 8));
    for _ in 0..10 {
        optimizer.step(&prior, &data, 0.02);
    }
    prior
}

#[test]
fn the_same_seed_gives_the_same_codes_cached_and_uncached() {
    for (name, config) in all_kinds() {
        let (prior, data) = (trained(&config), Data::new(&config, 3, 1));
        let guided = config.class_count > 0;
        for options in [
            SampleOptions { seed: 1, ..SampleOptions::default() },
            SampleOptions { seed: 2, temperature: 0.7, top_k: 4, top_p: 0.9, ..Default::default() },
            SampleOptions {
                seed: 3,
                guidance: if guided { 2.5 } else { 1.0 },
                ..Default::default()
            },
        ] {
            let sample = |options: SampleOptions| {
                codes(&prior.sample(3, &data.conditions(), &options, None).unwrap())
            };
            let cached = sample(options);
            assert_eq!(cached, sample(SampleOptions { recompute: true, ..options }), "{name}");
            assert_ne!(cached, sample(SampleOptions { seed: 9, ..options }), "{name}");
        }
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let config = rich(pixelcnn(0));
    let (prior, data) = (trained(&config), Data::new(&config, 3, 1));
    let options = SampleOptions { seed: 5, guidance: 1.5, ..SampleOptions::default() };
    let together = codes(&prior.sample(3, &data.conditions(), &options, None).unwrap());
    for image in 0..3 {
        let one = |t: &Tensor| t.narrow(0, image, 1).unwrap();
        let labels = data.labels.as_ref().map(one);
        let grids: Vec<Tensor> = data.grids.iter().map(one).collect();
        let conditions = Conditions { labels: labels.as_ref(), conditioning: &grids };
        let options = SampleOptions { first_image: image as u64, ..options };
        let alone = codes(&prior.sample(1, &conditions, &options, None).unwrap());
        assert_eq!(alone, together[image * alone.len()..][..alone.len()]);
    }
}

#[test]
fn what_is_given_stays_and_the_rest_is_drawn_after_it() {
    for network in [pixelcnn(2), transformer()] {
        let config = rich(network);
        let (prior, data) = (trained(&config), Data::new(&config, 2, 1));
        let options = SampleOptions::default();
        let [h, w] = config.grid;
        let mask: Vec<u8> = (0..h * w).map(|p| u8::from(p % 3 == 0)).collect();
        let mask = Tensor::from_vec(mask, (h, w), &Device::Cpu).unwrap();
        let sample = |codes: &Tensor, mask: &Tensor, recompute| {
            let (completion, options) =
                (Completion { codes, mask }, SampleOptions { recompute, ..options });
            prior.sample(2, &data.conditions(), &options, Some(&completion)).unwrap()
        };
        let completed = sample(&data.codes, &mask, false);
        assert_eq!(codes(&completed), codes(&sample(&data.codes, &mask, true)));
        let pairs = codes(&completed).into_iter().zip(codes(&data.codes));
        for (index, (ours, given)) in pairs.enumerate() {
            assert!(ours == given || index / 3 % (h * w) % 3 != 0);
        }
        assert_ne!(codes(&completed), codes(&data.codes));
        // All or nothing given, and a mask for each image.
        let all = Tensor::ones((2, h, w), candle_core::DType::U8, &Device::Cpu).unwrap();
        assert_eq!(codes(&sample(&data.codes, &all, false)), codes(&data.codes));
        let none = all.zeros_like().unwrap();
        let free = prior.sample(2, &data.conditions(), &options, None).unwrap();
        assert_eq!(codes(&sample(&data.codes, &none, false)), codes(&free));
        let halves =
            Tensor::cat(&[&all.narrow(0, 0, 1).unwrap(), &none.narrow(0, 0, 1).unwrap()], 0);
        let halves = codes(&sample(&data.codes, &halves.unwrap(), false));
        let n = halves.len() / 2;
        assert_eq!(halves[..n], codes(&data.codes)[..n]);
        assert_eq!(halves[n..], codes(&free)[n..]);
    }
}

const LOGITS: [f32; 6] = [0.5, 2.0, -1.0, 2.0, 0.0, -3.0];

fn drawn(options: SampleOptions) -> Vec<usize> {
    let probabilities = probabilities(&LOGITS, &options).unwrap();
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    (0..LOGITS.len()).filter(|&code| probabilities[code] > 0.0).collect()
}

#[test]
fn temperature_zero_and_what_tends_to_it_take_the_most_probable_code() {
    for temperature in [0.0, 1e-300, f64::MIN_POSITIVE / 4.0] {
        let options = SampleOptions { temperature, top_k: 1, ..SampleOptions::default() };
        assert_eq!(drawn(options), [1]);
        for uniform in [0.0, 0.3, 1.0 - f64::EPSILON] {
            assert_eq!(choose(&LOGITS, &options, uniform).unwrap(), 1);
        }
    }
    // Without a limit the ties share what there is; at exactly 0 the lowest takes it.
    let cold = SampleOptions { temperature: 1e-9, ..SampleOptions::default() };
    assert_eq!(drawn(cold), [1, 3]);
    assert_eq!(drawn(SampleOptions { temperature: 0.0, ..cold }), [1]);
    let config = rich(pixelcnn(0));
    let (prior, data) = (trained(&config), Data::new(&config, 2, 1));
    let sample = |temperature, seed| {
        let options = SampleOptions { temperature, seed, ..SampleOptions::default() };
        codes(&prior.sample(2, &data.conditions(), &options, None).unwrap())
    };
    assert_eq!(sample(0.0, 1), sample(0.0, 2));
    assert_eq!(sample(0.0, 1), sample(1e-9, 3));
}

#[test]
fn top_k_keeps_k_and_top_p_the_fewest_that_suffice_but_one_at_least() {
    let default = SampleOptions::default();
    assert_eq!(drawn(default), [0, 1, 2, 3, 4, 5]);
    assert_eq!(drawn(SampleOptions { top_k: 1, ..default }), [1]);
    assert_eq!(drawn(SampleOptions { top_k: 3, ..default }), [0, 1, 3]);
    assert_eq!(drawn(SampleOptions { top_k: 1000, ..default }), [0, 1, 2, 3, 4, 5]);
    assert_eq!(drawn(SampleOptions { top_p: 1e-300, ..default }), [1]);
    let exact = probabilities(&LOGITS, &default).unwrap();
    let both = exact[1] + exact[3];
    assert_eq!(drawn(SampleOptions { top_p: both - 1e-9, ..default }), [1, 3]);
    assert_eq!(drawn(SampleOptions { top_p: both + 1e-9, ..default }), [0, 1, 3]);
    assert_eq!(drawn(SampleOptions { top_p: 0.9, top_k: 2, ..default }), [1, 3]);
}

#[test]
fn codes_are_drawn_as_often_as_their_probabilities_say() {
    let options = SampleOptions { temperature: 1.5, ..SampleOptions::default() };
    let (expected, n) = (probabilities(&LOGITS, &options).unwrap(), 20_000);
    let mut counts = [0usize; LOGITS.len()];
    for i in 0..n {
        counts[choose(&LOGITS, &options, (f64::from(i) + 0.5) / f64::from(n)).unwrap() as usize] +=
            1;
    }
    for (count, expected) in counts.iter().zip(expected) {
        // Evenly spaced draws miss by one at most, on either side.
        assert!((*count as f64 - expected * f64::from(n)).abs() <= 1.0);
    }
    let impossible = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    for uniform in [0.0, 0.5, 1.0 - f64::EPSILON] {
        assert_eq!(choose(&impossible, &SampleOptions::default(), uniform).unwrap(), 1);
    }
}

#[test]
fn guidance_moves_away_from_the_unconditional_distribution() {
    let config = rich(transformer());
    let (prior, data) = (trained(&config), Data::new(&config, 2, 1));
    let greedy = |guidance| SampleOptions { guidance, temperature: 0.0, ..Default::default() };
    let sample = |conditions: &Conditions, guidance| {
        codes(&prior.sample(2, conditions, &greedy(guidance), None).unwrap())
    };
    // s = 0 is the distribution without a class.
    let without = Conditions { labels: None, conditioning: &data.grids };
    assert_eq!(sample(&data.conditions(), 0.0), sample(&without, 1.0));
    assert_ne!(sample(&data.conditions(), 30.0), sample(&data.conditions(), 1.0));
    let error = prior.sample(2, &without, &greedy(2.0), None).unwrap_err().to_string();
    assert!(error.contains("guidance needs"), "{error}");
}

#[test]
fn options_and_masks_that_make_no_sense_are_named() {
    let config = rich(pixelcnn(0));
    let (prior, data) = (trained(&config), Data::new(&config, 2, 1));
    let default = SampleOptions::default();
    for (options, key) in [
        (SampleOptions { temperature: -1.0, ..default }, "temperature"),
        (SampleOptions { temperature: f64::NAN, ..default }, "temperature"),
        (SampleOptions { top_p: 0.0, ..default }, "top_p"),
        (SampleOptions { top_p: 1.5, ..default }, "top_p"),
        (SampleOptions { guidance: f64::INFINITY, ..default }, "guidance"),
    ] {
        let error = prior.sample(2, &data.conditions(), &options, None).unwrap_err().to_string();
        assert!(error.starts_with(key), "{error}");
    }
    assert!(probabilities(&[0.0, f32::NAN], &default).is_err());
    assert!(probabilities(&[f32::INFINITY, 0.0], &default).is_err());
    let mask = Tensor::zeros((6, 4), candle_core::DType::U8, &Device::Cpu).unwrap();
    let completion = Completion { codes: &data.codes, mask: &mask };
    let error = prior.sample(2, &data.conditions(), &default, Some(&completion)).unwrap_err();
    assert!(error.to_string().contains("the mask must be u8 [4, 6]"), "{error}");
}

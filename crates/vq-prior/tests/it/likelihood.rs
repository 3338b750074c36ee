//! Losses and likelihoods.

use candle_core::{Device, Tensor};
use vq_prior::{Conditions, Config, Prior, Training};

use crate::common::{Data, all_kinds, pixelcnn, plain, prior, transformer};

#[test]
fn the_probabilities_of_all_grids_add_up_to_one() {
    for network in [pixelcnn(2), transformer()] {
        let config =
            Config { codebook_sizes: vec![2, 3], class_count: 2, ..plain(network, [1, 3]) };
        let (prior, grids) = (Prior::new(&config, 3, &Device::Cpu).unwrap(), 6usize.pow(3));
        let mut codes = Vec::new();
        for index in 0..grids {
            for position in 0..3 {
                let both = (index / 6usize.pow(position) % 6) as u32;
                codes.extend([both % 2, both / 2]);
            }
        }
        let codes = Tensor::from_vec(codes, (grids, 1, 3, 2), &Device::Cpu).unwrap();
        for label in 0..3u32 {
            let labels = Tensor::from_vec(vec![label; grids], grids, &Device::Cpu).unwrap();
            let conditions = Conditions { labels: Some(&labels), conditioning: &[] };
            let nats = prior.log_likelihood(&codes, &conditions).unwrap();
            let total: f64 = nats.iter().map(|nats| nats.exp()).sum();
            // Each of the six factors of a probability is right to a few units of f32's rounding.
            assert!((total - 1.0).abs() < 1e-5, "{total}");
        }
    }
}

#[test]
fn the_loss_is_the_mean_of_the_likelihoods_per_code() {
    for (name, config) in all_kinds() {
        let (prior, data) = (prior(&config), Data::new(&config, 5, 3));
        let training = Training { seed: 0, step: 0 };
        let loss = prior.loss(&data.codes, &data.conditions(), training).unwrap();
        let nats = prior.log_likelihood(&data.codes, &data.conditions()).unwrap();
        let mean = -nats.iter().sum::<f64>() / (5 * config.codes_per_image()) as f64;
        let loss = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((loss - mean).abs() < 1e-5, "{name}: {loss} and {mean}");
    }
}

#[test]
fn dropout_depends_on_seed_and_step_and_stays_out_of_evaluation() {
    let config = Config { dropout: 0.5, ..plain(pixelcnn(0), [3, 4]) };
    let (prior, data) = (prior(&config), Data::new(&config, 2, 3));
    let loss = |seed, step| {
        let loss = prior.loss(&data.codes, &data.conditions(), Training { seed, step }).unwrap();
        loss.to_scalar::<f32>().unwrap().to_bits()
    };
    assert_eq!(loss(1, 1), loss(1, 1));
    assert_ne!(loss(1, 1), loss(1, 2));
    assert_ne!(loss(1, 1), loss(2, 1));
    let without = Prior::new(&Config { dropout: 0.0, ..config }, 1, &Device::Cpu).unwrap();
    let nats = |prior: &Prior| prior.log_likelihood(&data.codes, &data.conditions()).unwrap();
    assert_eq!(nats(&prior), nats(&without));
}

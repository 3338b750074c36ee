//! Points 27 to 29: the Jacobian of the logits with respect to the codes.

use candle_core::{Device, Tensor};
use vq_prior::{Config, Prior};

use crate::common::{Data, Optimizer, all_kinds, prior, values};

#[test]
fn a_code_changes_all_later_logits_and_no_others() {
    for (name, config) in all_kinds() {
        check(name, &prior(&config));
    }
}

#[test]
fn it_still_does_after_optimizer_steps_and_after_saving_and_loading() {
    for (name, config) in all_kinds() {
        let prior = prior(&config);
        let (mut optimizer, data) = (Optimizer::new(prior.parameters()), Data::new(&config, 4, 5));
        for _ in 0..3 {
            optimizer.step(&prior, &data, 0.01);
        }
        check(name, &prior);
        let folder = tempfile::tempdir().unwrap();
        prior.save(folder.path()).unwrap();
        check(name, &Prior::from_pretrained(folder.path(), &Device::Cpu).unwrap());
    }
}

/// The receptive field of a PixelCNN that is too small for its grid has the shape that its kernels give
/// it: everything above within reach, however far to the right.
#[test]
fn a_small_receptive_field_has_no_blind_spot() {
    let network = vq_prior::PixelCnnConfig {
        channels: 8,
        layers: 2,
        first_kernel: 3,
        kernel: 3,
        skip_channels: 8,
        attention_every: 0,
        heads: 1,
    };
    let config = Config {
        grid: [7, 9],
        codebook_sizes: vec![4],
        network: vq_prior::Network::PixelCnn(network),
        ..Config::default()
    };
    let changed = jacobian(&prior(&config));
    let (h, w) = (7i64, 9i64);
    for (from, row) in changed.iter().enumerate() {
        for (to, &changed) in row.iter().enumerate() {
            let (from, to) = (from as i64, to as i64);
            let (down, right) = (to / w - from / w, to % w - from % w);
            // Two layers of kernels that reach 1 up and 1 to either side, after a shift by 1 down; in the
            // row itself, two that reach 1 to the left, after a shift by 1. A link follows each vertical
            // layer, and from the first one on the horizontal stack carries it 1 further to the right.
            let above = (1..=3).contains(&down) && (-2..=2).contains(&right);
            let beside = down == 0 && (1..=3).contains(&right);
            assert_eq!(changed, above || beside, "{from} {to} of {h}×{w}");
        }
    }
}

fn check(name: &str, prior: &Prior) {
    for (from, row) in jacobian(prior).iter().enumerate() {
        for (to, &changed) in row.iter().enumerate() {
            assert_eq!(changed, to > from, "{name}: from code {from} to the logits of code {to}");
        }
    }
}

/// Whether the logits of each code of the sequence change, to the bit, with each code; on any of a few
/// images, as a change may be rounded away on one of them.
fn jacobian(prior: &Prior) -> Vec<Vec<bool>> {
    let mut changed = jacobian_of(prior, 2);
    for seed in 3..6 {
        for (row, other) in changed.iter_mut().zip(jacobian_of(prior, seed)) {
            for (changed, other) in row.iter_mut().zip(other) {
                *changed |= other;
            }
        }
    }
    changed
}

fn jacobian_of(prior: &Prior, seed: u64) -> Vec<Vec<bool>> {
    let config = prior.config();
    let data = Data::new(config, 1, seed);
    let (codes, sizes) = (data.codes.flatten_all().unwrap(), &config.codebook_sizes);
    let codes: Vec<u32> = codes.to_vec1().unwrap();
    let run = |codes: &[u32]| {
        let codes = Tensor::from_slice(codes, data.codes.shape(), &Device::Cpu).unwrap();
        values(&prior.logits(&codes, &data.conditions()).unwrap())
    };
    let (before, largest) = (run(&codes), sizes.iter().max().unwrap());
    let perturb = |index: usize| {
        let mut codes = codes.clone();
        codes[index] = (codes[index] + 1) % sizes[index % sizes.len()] as u32;
        let after = run(&codes);
        let pairs = before.chunks(*largest).zip(after.chunks(*largest));
        pairs.map(|(before, after)| before != after).collect()
    };
    (0..codes.len()).map(perturb).collect()
}

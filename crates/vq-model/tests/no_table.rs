//! Implicit codebooks are never written out. Alone in its program, whose memory it looks at.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{images, small_of};
use vq_model::{QuantizerConfig, TrainingStep, VqVae};

/// The most memory that the program has held so far.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Forward, backward, evaluation, encoding and decoding.
fn step(quantizer: &QuantizerConfig) {
    let config = small_of(quantizer);
    let model = VqVae::new(&config, 0, &vq_ops::test_device()).unwrap();
    let images = images(&config, 4, 0);
    let output = model.forward_training(&images, TrainingStep::default()).unwrap();
    let mut loss = output.reconstruction().unwrap().sqr().unwrap().mean_all().unwrap();
    loss = (loss + output.commitment_loss).unwrap();
    if let Some(entropy) = output.entropy_loss {
        loss = (loss + entropy).unwrap();
    }
    loss.backward().unwrap();
    let options = vq_model::CodebookUpdate::default();
    model.update_codebooks(&output.z_e, &output.codes, &options, 1).unwrap();
    model.decode(&model.encode(&images).unwrap()).unwrap();
}

#[test]
fn a_step_with_millions_of_implicit_codes_holds_no_table_of_them() {
    if !vq_ops::test_device().is_cpu() {
        // It is the host's memory that is looked at.
        return;
    }
    // The same sizes but for K.
    step(&QuantizerConfig::finite_scalar(&[2; 24]));
    step(&QuantizerConfig { entropy_group: 12, ..QuantizerConfig::lookup_free(12) });
    let before = peak_bytes();
    for bits in [18, 24] {
        let k = 1 << bits;
        for config in [
            QuantizerConfig::finite_scalar(&vec![8; bits / 3]),
            QuantizerConfig::lookup_free(bits),
            QuantizerConfig::binary_spherical(bits),
        ] {
            assert_eq!(config.codebook_size, k);
            step(&config);
        }
        // At 2²⁴ a single byte for each code would be 16 MiB.
        let more = peak_bytes() - before;
        assert!(more < 1 << 23, "{more} bytes more for {k} codes");
    }
}

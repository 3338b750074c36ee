//! That it learns.

use candle_core::{Device, Tensor};
use vq_prior::{Conditions, Config, Network, PixelCnnConfig, Prior, TransformerConfig};

use crate::common::{Data, Optimizer, plain};

/// Stripes whose direction is the class and whose phase and colour are random: 1 + log₂ 3 bits an image,
/// while each code by itself is nearly uniform over four.
fn stripes(images: usize, seed: usize) -> Data {
    let (h, w) = (4, 6);
    let mut codes = Vec::new();
    let mut labels = Vec::new();
    for image in 0..images {
        let (label, phase, colour) = (image % 2, (image / 2 + seed) % 2, (image / 4 + seed) % 3);
        labels.push(label as u32);
        for i in 0..h {
            for j in 0..w {
                let along = if label == 0 { i } else { j };
                codes.push(if (along + phase).is_multiple_of(2) { 3 } else { colour as u32 });
            }
        }
    }
    Data {
        codes: Tensor::from_vec(codes, (images, h, w, 1), &Device::Cpu).unwrap(),
        labels: Some(Tensor::from_vec(labels, images, &Device::Cpu).unwrap()),
        grids: Vec::new(),
    }
}

/// Bits per code of the best model that sees no context.
fn unigram(data: &Data) -> f64 {
    let codes: Vec<u32> = data.codes.flatten_all().unwrap().to_vec1().unwrap();
    let share = |code| codes.iter().filter(|&&c| c == code).count() as f64 / codes.len() as f64;
    (0..4).map(share).filter(|&p| p > 0.0).map(|p| -p * p.log2()).sum()
}

#[test]
fn bits_per_code_fall_far_below_the_unigram_entropy_and_the_class_is_learned() {
    let networks = [
        Network::PixelCnn(PixelCnnConfig {
            channels: 16,
            layers: 4,
            skip_channels: 16,
            ..PixelCnnConfig::default()
        }),
        Network::Transformer(TransformerConfig {
            channels: 32,
            layers: 2,
            heads: 4,
            mlp_hidden: 64,
        }),
    ];
    for network in networks {
        let config = Config {
            codebook_sizes: vec![4],
            class_count: 2,
            label_dropout: 0.1,
            head_hidden: 32,
            ..plain(network, [4, 6])
        };
        let (prior, data) = (Prior::new(&config, 0, &Device::Cpu).unwrap(), stripes(48, 0));
        let mut optimizer = Optimizer::new(prior.parameters());
        for _ in 0..150 {
            optimizer.step(&prior, &data, 3e-3);
        }
        let bits = |labels: Option<&Tensor>| {
            let conditions = Conditions { labels, conditioning: &[] };
            let nats = prior.log_likelihood(&data.codes, &conditions).unwrap();
            -nats.iter().sum::<f64>() / (48 * 24) as f64 / std::f64::consts::LN_2
        };
        let (learned, without, baseline) = (bits(data.labels.as_ref()), bits(None), unigram(&data));
        // 1 + log₂ 3 bits an image with the class, one bit more without it.
        println!(
            "{learned:.3} bits per code, {without:.3} without the class, unigram {baseline:.3}"
        );
        assert!(learned < 0.15 && learned > (1.0 + 3f64.log2()) / 24.0 - 1e-3, "{learned}");
        assert!(without > learned && without < 0.25, "{without}");
        assert!(baseline > 1.7);
        // Samples are stripes of the class asked for.
        let labels = Tensor::new(&[0u32, 0, 1, 1], &Device::Cpu).unwrap();
        let conditions = Conditions { labels: Some(&labels), conditioning: &[] };
        let options = vq_prior::SampleOptions { temperature: 0.5, ..Default::default() };
        let codes = prior.sample(4, &conditions, &options, None).unwrap();
        for (image, label) in [0, 0, 1, 1].into_iter().enumerate() {
            let rows = codes.get(image).unwrap().to_vec2::<u32>().unwrap();
            let equal = |i: usize, j: usize| rows[i][j] == rows[(i + 2) % 4][j];
            assert!((0..4).all(|i| (0..6).all(|j| equal(i, j))));
            let constant = rows.iter().all(|row| row.iter().all(|code| code == &row[0]));
            assert_eq!(constant, label == 0, "{rows:?}");
        }
    }
}

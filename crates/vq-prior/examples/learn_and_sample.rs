//! Learns a small set of patterns by heart and draws new ones of each class, in half a minute:
//!
//! ```text
//! cargo run --release -p vq-prior --example learn_and_sample -- pixelcnn|transformer
//! ```
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use vq_ops::{AdamWStep, adamw_step};
use vq_prior::{
    Conditions, Config, Network, PixelCnnConfig, Prior, Result, SampleOptions, Training,
    TransformerConfig,
};

const GRID: [usize; 2] = [6, 8];

fn main() -> Result<()> {
    let network = if std::env::args().nth(1).as_deref() == Some("transformer") {
        Network::Transformer(TransformerConfig {
            channels: 64,
            layers: 3,
            heads: 4,
            mlp_hidden: 128,
        })
    } else {
        Network::PixelCnn(PixelCnnConfig {
            channels: 32,
            layers: 5,
            skip_channels: 32,
            ..PixelCnnConfig::default()
        })
    };
    let config = Config {
        grid: GRID,
        codebook_sizes: vec![4],
        class_count: 2,
        class_names: vec!["rows".to_owned(), "columns".to_owned()],
        head_hidden: 64,
        network,
        ..Config::default()
    };
    let prior = Prior::new(&config, /* seed */ 0, &Device::Cpu)?;
    let (codes, labels) = patterns(96)?;
    let conditions = Conditions { labels: Some(&labels), conditioning: &[] };

    let zeros = |var: &candle_core::Var| var.zeros_like();
    let mut moments = BTreeMap::new();
    for (name, var) in prior.parameters() {
        moments.insert(name, (zeros(var)?, zeros(var)?));
    }
    for step in 1..=200 {
        let loss = prior.loss(&codes, &conditions, Training { seed: 0, step })?;
        let gradients = loss.backward()?;
        if step % 50 == 0 {
            println!("step {step}: {:.3} nats per code", loss.to_scalar::<f32>()?);
        }
        let settings = AdamWStep {
            lr: 3e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.0,
            step,
            grad_scale: 1.0,
            ema_decay: None,
        };
        for (name, var) in prior.parameters() {
            if let (Some(gradient), Some((first, second))) = (gradients.get(var), moments.get(name))
            {
                adamw_step(
                    var.as_tensor(),
                    &gradient.contiguous()?,
                    first,
                    second,
                    None,
                    &settings,
                )?;
            }
        }
    }

    let nats = prior.log_likelihood(&codes, &conditions)?;
    let count = (nats.len() * config.codes_per_image()) as f64;
    println!("{:.3} bits per code", -nats.iter().sum::<f64>() / count / std::f64::consts::LN_2);

    let labels = Tensor::new(&[0u32, 0, 1, 1], &Device::Cpu)?;
    let conditions = Conditions { labels: Some(&labels), conditioning: &[] };
    let options = SampleOptions { guidance: 1.5, seed: 1, ..SampleOptions::default() };
    let samples = prior.sample(4, &conditions, &options, None)?.to_vec3::<u32>()?;
    for (label, sample) in [0, 0, 1, 1].into_iter().zip(samples) {
        println!("{}:", config.class_names[label]);
        for row in sample {
            println!("  {}", row.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
        }
    }
    Ok(())
}

/// Stripes along the rows or the columns: codes `[B,h,w]` and labels `[B]`.
fn patterns(images: usize) -> Result<(Tensor, Tensor)> {
    let [h, w] = GRID;
    let mut codes = Vec::new();
    let mut labels = Vec::new();
    for image in 0..images {
        let (label, phase, colour) = (image % 2, image / 2 % 2, image / 4 % 3);
        labels.push(label as u32);
        for position in 0..h * w {
            let along = if label == 0 { position / w } else { position % w };
            codes.push(if (along + phase) % 2 == 0 { 3 } else { colour as u32 });
        }
    }
    let codes = Tensor::from_vec(codes, (images, h, w), &Device::Cpu)?;
    Ok((codes, Tensor::from_vec(labels, images, &Device::Cpu)?))
}

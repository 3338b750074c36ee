//! Agreement with PyTorch; `golden/make_golden.py` made the values.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use vq_model::store::read_tensors;
use vq_prior::{Conditions, Config, Network, PixelCnnConfig, Prior, Training, TransformerConfig};

use crate::common::values;

/// max |ours − theirs| / max |theirs|, of every tensor of the file.
const TOLERANCE: f32 = 1e-4;

#[test]
fn logits_loss_and_every_gradient_of_the_pixelcnn_agree_with_masked_convolutions_in_pytorch() {
    let network = PixelCnnConfig {
        channels: 6,
        layers: 3,
        first_kernel: 5,
        kernel: 3,
        skip_channels: 5,
        attention_every: 0,
        heads: 1,
    };
    check("pixelcnn", Network::PixelCnn(network), 8);
}

#[test]
fn logits_loss_and_every_gradient_of_the_transformer_agree_with_pytorch() {
    let network = TransformerConfig { channels: 8, layers: 2, heads: 2, mlp_hidden: 10 };
    check("transformer", Network::Transformer(network), 7);
}

fn check(case: &str, network: Network, head_hidden: usize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/golden.safetensors");
    let golden = read_tensors(&path).unwrap();
    let config = Config {
        grid: [3, 5],
        codebook_sizes: vec![6, 4],
        class_count: 2,
        dropout: 0.0,
        label_dropout: 0.0,
        head_hidden,
        network,
        ..Config::default()
    };
    let prior = Prior::new(&config, 0, &Device::Cpu).unwrap();
    let prefix = format!("{case}/param/");
    let names: Vec<&str> = golden.keys().filter_map(|name| name.strip_prefix(&prefix)).collect();
    assert_eq!(names, prior.parameters().keys().collect::<Vec<_>>());
    for (name, var) in prior.parameters() {
        var.set(&golden[&format!("{prefix}{name}")]).unwrap();
    }
    let integers = |name: &str| golden[&format!("{case}/{name}")].to_dtype(DType::U32).unwrap();
    let (codes, labels) = (integers("codes"), integers("labels"));
    let conditions = Conditions { labels: Some(&labels), conditioning: &[] };
    let mut worst = BTreeMap::new();
    let mut compare = |name: String, ours: &Tensor| {
        let (ours, theirs) = (values(ours), values(&golden[&format!("{case}/{name}")]));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let scale = theirs.iter().fold(1e-3f32, |max, v| max.max(v.abs()));
        let largest = ours.iter().zip(&theirs).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(largest <= TOLERANCE * scale, "{case}/{name}: {largest} of {scale}");
        worst.insert(name, largest / scale);
    };
    let logits = prior.logits(&codes, &conditions).unwrap();
    for (index, &size) in config.codebook_sizes.iter().enumerate() {
        let logits = logits.narrow(3, index, 1).unwrap().narrow(4, 0, size).unwrap();
        compare(format!("logits.{index}"), &logits);
    }
    let loss = prior.loss(&codes, &conditions, Training { seed: 0, step: 0 }).unwrap();
    compare("loss".to_owned(), &loss);
    let gradients = loss.backward().unwrap();
    for (name, var) in prior.parameters() {
        compare(format!("grad/{name}"), gradients.get(var).unwrap());
    }
    let largest = worst.values().fold(0f32, |max, v| max.max(*v));
    println!("{case}: worst relative difference {largest:.1e} of {} tensors", worst.len());
}

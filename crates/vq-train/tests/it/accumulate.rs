//! A step in parts is the step of the whole batch.

use candle_core::safetensors::load_buffer;
use vq_train::read_metrics;

use crate::support::{last, recipe, train};

const GRADIENT: &str = "model.levels.0.quantizer.rule=gradient";
const EMA: &str = "model.levels.0.quantizer.rule=ema";

/// The largest difference between two runs' saved tensors, each relative to the tensor's largest value.
fn difference(a: &[u8], b: &[u8]) -> f32 {
    let (a, b) = (
        load_buffer(a, &vq_ops::test_device()).unwrap(),
        load_buffer(b, &vq_ops::test_device()).unwrap(),
    );
    assert_eq!(a.len(), b.len());
    let mut names: Vec<&String> = a.keys().collect();
    names.sort();
    let largest = |x: &candle_core::Tensor| {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    let relative = names
        .into_iter()
        .map(|name| largest(&(&a[name] - &b[name]).unwrap()) / largest(&a[name]).max(1e-6));
    relative.fold(0.0, f32::max)
}

#[test]
fn parts_add_up_to_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let residual = [
        "model.levels.0.quantizer.kind=residual",
        "model.levels.0.quantizer.stages=3",
        "model.levels.0.quantizer.quantizer_dropout=0.5",
        "train.kmeans.rounds=0",
    ];
    // Adam's ε keeps rounding in a gradient of nearly nothing from becoming a step of full size.
    let common = ["train.epochs=1", "train.eps=1e-3"];
    let plain = ["train.revival.threshold=0.0", "train.kmeans.rounds=0"];
    for (index, settings) in
        [&[GRADIENT, plain[0], plain[1]][..], &[EMA, plain[0], plain[1]], &residual]
            .into_iter()
            .enumerate()
    {
        let run = |parts: usize| {
            let accumulate = format!("train.accumulate={parts}");
            let mut all = settings.to_vec();
            all.extend(common);
            all.push(&accumulate);
            let run = folder.path().join(format!("{index}-{parts}"));
            train(&recipe(&all), &run);
            let losses: Vec<f64> = read_metrics(&run.join("metrics.jsonl"))
                .unwrap()
                .iter()
                .filter(|record| record["event"] == "step")
                .map(|record| record["loss"].as_f64().unwrap())
                .collect();
            (last(&run), losses)
        };
        let (whole, losses) = run(1);
        assert_eq!(losses.len(), 5);
        // 8 images in parts of 4, of 3, 3 and 2, and one by one.
        for parts in [2, 3, 8] {
            let (other, other_losses) = run(parts);
            let difference = difference(&whole[0], &other[0]);
            assert!(difference < 1e-3, "{settings:?} in {parts} parts differs by {difference}");
            for (a, b) in losses.iter().zip(&other_losses) {
                assert!((a / b - 1.0).abs() < 1e-3, "{settings:?} in {parts} parts: {a} {b}");
            }
        }
    }
}

//! Points 9 and 23 to 25: figures of the whole set, from a model that stays as it is.

use std::sync::Arc;

use candle_core::Tensor;
use vq_model::VqVae;
use vq_train::{EvaluateOptions, Evaluation, evaluate, ssim};

use crate::support::recipe;

fn model_and_data() -> (VqVae, Arc<dyn vq_data::Dataset>) {
    let recipe = recipe(&[]);
    let model = VqVae::new(&recipe.model, 3, &vq_ops::test_device()).unwrap();
    (model, recipe.data.open(recipe.model.image_size).unwrap().test)
}

fn run(model: &VqVae, data: &Arc<dyn vq_data::Dataset>, batch_size: usize) -> Evaluation {
    let options = EvaluateOptions { batch_size, variance: 0.05, samples: 3, stop: None };
    evaluate(model, data, options).unwrap().unwrap()
}

#[test]
fn figures_are_those_of_the_definitions() {
    let (model, data) = model_and_data();
    let evaluation = run(&model, &data, 4);
    let (mut mses, mut ssims, mut psnrs) = (Vec::new(), Vec::new(), Vec::new());
    let mut counts = vec![0u64; 16];
    let mut commitment = 0.0;
    for index in 0..data.len() {
        let mut bytes = vec![0; 3 * 16 * 16];
        data.read(index, &mut bytes).unwrap();
        let pixels: Vec<f32> = bytes.iter().map(|&byte| f32::from(byte) / 255.0).collect();
        let images = Tensor::from_slice(&pixels, (1, 3, 16, 16), &vq_ops::test_device()).unwrap();
        let images = model.config().normalization.normalize(&images).unwrap();
        let output = model.forward(&images).unwrap();
        let back =
            model.config().normalization.denormalize(&output.reconstruction().unwrap()).unwrap();
        let back = back.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let squares = pixels.iter().zip(&back).map(|(a, b)| f64::from(a - b).powi(2));
        let mse = squares.sum::<f64>() / 768.0;
        mses.push(mse);
        psnrs.push(-10.0 * mse.log10());
        ssims.push(ssim(&pixels, &back, 3, 16, 16));
        for code in output.codes.levels[0].flatten_all().unwrap().to_vec1::<u32>().unwrap() {
            counts[code as usize] += 1;
        }
        commitment += f64::from(output.commitment_loss.to_scalar::<f32>().unwrap());
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let metric = |name: &str| evaluation.metrics.get(name).unwrap();
    for (name, expected) in [
        ("mse", mean(&mses)),
        ("nmse", mean(&mses) / 0.05),
        ("psnr", mean(&psnrs)),
        ("ssim", mean(&ssims)),
        ("commitment", commitment / data.len() as f64),
    ] {
        let found = metric(name);
        assert!((found - expected).abs() < 1e-4 * expected.abs(), "{name}: {found} {expected}");
    }
    assert_eq!(evaluation.usage[0].counts, counts);
    assert_eq!(counts.iter().sum::<u64>(), 11 * 16);
    assert!((metric("perplexity") - evaluation.usage[0].perplexity()).abs() < 1e-12);
    // A mean over images, not the PSNR of the mean.
    assert!((metric("psnr") + 10.0 * metric("mse").log10()).abs() > 1e-3);
}

#[test]
fn the_batch_size_does_not_matter() {
    let (model, data) = model_and_data();
    let (one, all) = (run(&model, &data, 1), run(&model, &data, 100));
    assert_eq!(one.usage, all.usage);
    for (name, value) in one.metrics.iter() {
        let other = all.metrics.get(name).unwrap();
        assert!((value - other).abs() <= 1e-5 * value.abs(), "{name}: {value} {other}");
    }
}

#[test]
fn evaluation_leaves_the_model_as_it_is() {
    let (model, data) = model_and_data();
    let values = |model: &VqVae| -> Vec<Vec<f32>> {
        model.tensors().values().map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    let before = values(&model);
    let first = run(&model, &data, 4);
    let second = run(&model, &data, 4);
    assert!(before == values(&model));
    assert!(!model.codebooks_initialized().unwrap());
    assert_eq!(first.metrics, second.metrics);
}

#[test]
fn samples_are_spread_over_the_set() {
    let (model, data) = model_and_data();
    let samples = run(&model, &data, 4).samples.unwrap();
    for (row, index) in [0, 3, 6].into_iter().enumerate() {
        let mut bytes = vec![0; 3 * 16 * 16];
        data.read(index, &mut bytes).unwrap();
        let row =
            samples.originals.get(row).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(bytes.iter().zip(row).all(|(&b, p)| (f32::from(b) / 255.0 - p).abs() < 1e-6));
    }
}

//! Point 26: bits per dimension, of every codebook and level, from a model with a likelihood.

use std::sync::Arc;

use vq_data::{Batch, Dataset, Loader, LoaderOptions, Normalization};
use vq_model::VqVae;
use vq_prior::{Conditions, GridConfig, Network, PixelCnnConfig, Prior};
use vq_train::{BitsPerDim, EvaluateOptions, bits_per_dim, evaluate};

use crate::support::{recipe, train};

/// Codes of 16, three at each of 4×4 positions, and of 16 above at 2×2.
const TWO_LEVELS: [&str; 3] = [
    "model.likelihood=logistic-mixture",
    "model.levels.0.quantizer.kind=residual",
    "model.levels.0.quantizer.stages=3",
];

fn model_and_data(likelihood: &str) -> (VqVae, Arc<dyn Dataset>) {
    let mut recipe = recipe(&TWO_LEVELS).with_override(likelihood).unwrap();
    let mut top = recipe.model.levels[0].clone();
    top.downsample = 2;
    top.quantizer = vq_model::QuantizerConfig { codebook_size: 16, dim: 4, ..Default::default() };
    recipe.model.levels.push(top);
    let model = VqVae::new(&recipe.model, 3, &vq_ops::test_device()).unwrap();
    // A fresh decoder says nearly the same of every image, also of the wrong one.
    for (_, var) in model.parameters().iter().filter(|(name, _)| name.contains("decoder")) {
        var.set(&(var.as_tensor() * 4.0).unwrap()).unwrap();
    }
    (model, recipe.data.open(recipe.model.image_size).unwrap().test)
}

/// Untrained priors for both levels, the top one first, told the classes of the data.
fn priors(data: &Arc<dyn Dataset>) -> Vec<Prior> {
    let network = PixelCnnConfig { channels: 8, layers: 2, skip_channels: 8, ..Default::default() };
    let top = vq_prior::Config {
        grid: [2, 2],
        codebook_sizes: vec![16],
        class_count: data.class_names().len(),
        class_names: data.class_names().to_vec(),
        head_hidden: 8,
        network: Network::PixelCnn(network),
        ..vq_prior::Config::default()
    };
    let bottom = vq_prior::Config {
        grid: [4, 4],
        codebook_sizes: vec![16; 3],
        conditioning: vec![GridConfig { grid: [2, 2], codebook_sizes: vec![16] }],
        ..top.clone()
    };
    [top, bottom]
        .iter()
        .map(|config| Prior::new(config, 5, &vq_ops::test_device()).unwrap())
        .collect()
}

fn bits(model: &VqVae, priors: &[Prior], data: &Arc<dyn Dataset>, batch: usize) -> BitsPerDim {
    bits_per_dim(model, priors, data, batch, None).unwrap().unwrap()
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-5 * b.abs(), "{a} {b}");
}

#[test]
fn every_term_is_counted_over_the_whole_set() {
    let (model, data) = model_and_data("train.seed=0");
    let priors = priors(&data);
    let found = bits(&model, &priors, &data, 4);
    assert_eq!((found.images, found.dimensions), (11, 3 * 16 * 16));
    let (mut pixels, mut bottom, mut top) = (0.0, 0.0, 0.0);
    let options = LoaderOptions::in_order(1);
    let normalization = Normalization { mean: vec![0.5; 3], std: vec![1.0; 3] };
    let loader = Loader::new(data.clone(), normalization, options).unwrap();
    for batch in loader.epoch(0, 0) {
        let Batch { images, labels, .. } = batch.unwrap();
        let output = model.evaluate(&images).unwrap();
        let nats = output.nats.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        pixels += nats.into_iter().map(f64::from).sum::<f64>();
        let [own, above] = &output.codes.levels[..] else { panic!("two levels") };
        let given = Conditions { labels: Some(&labels), conditioning: &[] };
        top -= priors[0].log_likelihood(above, &given).unwrap()[0];
        let conditioning = [above.clone()];
        let given = Conditions { labels: Some(&labels), conditioning: &conditioning };
        bottom -= priors[1].log_likelihood(own, &given).unwrap()[0];
    }
    let per_image = |nats: f64| nats / std::f64::consts::LN_2 / 11.0;
    close(found.pixels, per_image(pixels));
    close(found.levels[0], per_image(bottom));
    close(found.levels[1], per_image(top));
    close(found.labels, ((data.class_names().len() + 1) as f64).log2());
    close(found.total(), found.pixels + found.levels[0] + found.levels[1] + found.labels);

    let metrics = found.metrics();
    let names: Vec<&str> = metrics.iter().map(|(name, _)| name).collect();
    let expected = [
        "bits_per_dim",
        "bits_per_dim/pixels",
        "bits_per_dim/codes",
        "bits_per_dim/codes.1",
        "bits_per_dim/labels",
    ];
    assert_eq!(names, expected);
    close(metrics.get("bits_per_dim").unwrap(), found.total() / 768.0);
    let parts: f64 = metrics.iter().skip(1).map(|(_, value)| value).sum();
    close(parts, metrics.get("bits_per_dim").unwrap());

    for batch in [1, 11] {
        let other = bits(&model, &priors, &data, batch);
        close(other.total(), found.total());
    }
}

#[test]
fn without_a_prior_a_code_costs_the_logarithm_of_their_number() {
    for likelihood in ["model.likelihood=categorical", "model.likelihood=logistic-mixture"] {
        let (model, data) = model_and_data(likelihood);
        let found = bits(&model, &[], &data, 4);
        assert!(!found.has_priors);
        assert_eq!(found.levels, [16.0 * 3.0 * 4.0, 4.0 * 4.0]);
        assert_eq!(found.labels.to_bits(), 0);
        // The pixels' bits are those that the evaluation reports.
        let options = EvaluateOptions { batch_size: 3, variance: 0.05, samples: 0, stop: None };
        let evaluation = evaluate(&model, &data, options).unwrap().unwrap();
        let reported = evaluation.metrics.get("pixel_bits_per_dim").unwrap();
        close(found.metrics().get("bits_per_dim/pixels").unwrap(), reported);
        close(-evaluation.score, reported);
    }
}

#[test]
fn other_classes_and_missing_likelihoods_are_not_passed_over() {
    let (model, data) = model_and_data("train.seed=0");
    let known = priors(&data);
    let stranger = known.iter().map(|prior| {
        let mut config = prior.config().clone();
        config.class_names.reverse();
        Prior::new(&config, 5, &vq_ops::test_device()).unwrap()
    });
    let stranger: Vec<Prior> = stranger.collect();
    let known = bits(&model, &known, &data, 4);
    assert_ne!(bits(&model, &stranger, &data, 4).levels, known.levels);

    let (plain, data) = model_and_data("model.likelihood=mse");
    let error = bits_per_dim(&plain, &[], &data, 4, None).unwrap_err().to_string();
    assert!(error.contains("model.likelihood"), "{error}");
    let one = &priors(&data)[..1];
    let error = bits_per_dim(&model, one, &data, 4, None).unwrap_err().to_string();
    assert!(error.contains("one for each level"), "{error}");
}

#[test]
fn models_with_a_likelihood_learn() {
    for likelihood in ["model.likelihood=categorical", "model.likelihood=logistic-mixture"] {
        let recipe = recipe(&[likelihood, "train.lr=1e-2", "train.epochs=8"]);
        let run = tempfile::tempdir().unwrap();
        train(&recipe, run.path());
        let history = vq_train::read_progress(&run.path().join("last")).unwrap().history;
        let nats = |epoch: usize| history[epoch].train.get("reconstruction").unwrap();
        assert!(nats(7) < nats(0) - 0.05, "{likelihood}: {} {}", nats(0), nats(7));
        assert!(history[7].test.as_ref().unwrap().get("pixel_bits_per_dim").is_some());
    }
}

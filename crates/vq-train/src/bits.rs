//! How many bits a model and its priors take for an image.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use vq_data::{Dataset, Loader, LoaderOptions};
use vq_model::VqVae;
use vq_prior::{Conditions, Prior};

use crate::evaluate::{data_normalization, sum};
use crate::{Error, Metrics, Result};

/// What the images of a data set take, in bits an image: −log₂ of a probability each.
#[derive(Clone, Debug, PartialEq)]
pub struct BitsPerDim {
    /// Images that were looked at.
    pub images: usize,
    /// C·H·W of an image.
    pub dimensions: usize,
    /// −log₂ p(x|z).
    pub pixels: f64,
    /// −log₂ p(z) of the codes of each level, bottom first, all codebooks counted: under the prior, given
    /// the levels above; without priors log₂ K a code.
    pub levels: Vec<f64>,
    /// Of the label that the priors are told, which a decoder has to be told too: log₂(classes + 1), as
    /// an image may have none. 0 for priors without classes.
    pub labels: f64,
    /// Whether the codes were counted under priors.
    pub has_priors: bool,
}

impl BitsPerDim {
    /// Bits an image, of everything.
    pub fn total(&self) -> f64 {
        self.pixels + self.labels + self.levels.iter().sum::<f64>()
    }

    /// `bits_per_dim`, and each of the terms that add up to it: `bits_per_dim/pixels`,
    /// `bits_per_dim/codes` of the bottom level, `bits_per_dim/codes.1` of the one above it and so on, and
    /// `bits_per_dim/labels` where there are any.
    pub fn metrics(&self) -> Metrics {
        let per_dim = |bits: f64| bits / self.dimensions.max(1) as f64;
        let mut metrics = Metrics::new()
            .with("bits_per_dim", per_dim(self.total()))
            .with("bits_per_dim/pixels", per_dim(self.pixels));
        for (level, bits) in self.levels.iter().enumerate() {
            let suffix = if level == 0 { String::new() } else { format!(".{level}") };
            metrics.set(&format!("bits_per_dim/codes{suffix}"), per_dim(*bits));
        }
        if self.labels > 0.0 {
            metrics.set("bits_per_dim/labels", per_dim(self.labels));
        }
        metrics
    }
}

/// −log₂ p(x|z) − log₂ p(z) of every image of `dataset`, z being the codes that the encoder gives; a mean over
/// the images. It bounds −log₂ p(x) from above, and is what a lossless file of them takes.
///
/// `priors` holds one prior for every level, the top one first, or none: then all codes count as equally
/// probable. Priors with classes are told those of the data set where these are the ones that they learned, and
/// no class otherwise. The model must have a likelihood. `None` if `stop` was raised meanwhile.
pub fn bits_per_dim(
    model: &VqVae,
    priors: &[Prior],
    dataset: &Arc<dyn Dataset>,
    batch_size: usize,
    stop: Option<&AtomicBool>,
) -> Result<Option<BitsPerDim>> {
    let config = model.config();
    if config.pixel_distribution().is_none() {
        return Err(vq_model::Error::NoLikelihood.into());
    }
    let count = config.levels.len();
    if !priors.is_empty() && priors.len() != count {
        let problem = format!("must be {count}, one for each level, or none: got {}", priors.len());
        return Err(Error::config("the number of priors", problem));
    }
    let options = LoaderOptions::in_order(batch_size.min(dataset.len()).max(1));
    let loader = Loader::new(dataset.clone(), data_normalization(&config.normalization), options)?;
    let (mut images, mut pixels, mut levels) = (0, 0.0, vec![0.0; count]);
    for batch in loader.epoch(0, 0) {
        if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Ok(None);
        }
        let batch = batch?;
        let output = model.evaluate(&batch.images.to_device(model.device())?)?;
        images += batch.indices.len();
        if let Some(nats) = &output.nats {
            pixels += sum(nats)?;
        }
        let labels = batch.labels.to_vec1::<u32>()?;
        let codes = &output.codes.levels;
        for (index, prior) in priors.iter().enumerate() {
            let (level, above) = codes.split_at(count - index);
            let Some((level, own)) = level.last().zip(levels.get_mut(count - 1 - index)) else {
                continue;
            };
            let labels = prior.config().labels_of(dataset.class_names(), &labels);
            let labels = match labels.len() {
                0 => None,
                count => Some(Tensor::from_vec(labels, count, &Device::Cpu)?),
            };
            let conditions = Conditions { labels: labels.as_ref(), conditioning: above };
            *own -= prior.log_likelihood(level, &conditions)?.iter().sum::<f64>();
        }
    }
    let bits = |nats: f64| nats / std::f64::consts::LN_2 / images.max(1) as f64;
    let uniform = || -> Result<Vec<f64>> {
        let [height, width] = [dataset.shape().height, dataset.shape().width];
        let grids = config.grids(height, width)?;
        let of = |(level, [h, w]): (&vq_model::LevelConfig, [usize; 2])| {
            (h * w) as f64 * level.quantizer.bits_per_position()
        };
        Ok(config.levels.iter().zip(grids).map(of).collect())
    };
    let classes = priors.first().map_or(0, |prior| prior.config().class_count);
    Ok(Some(BitsPerDim {
        images,
        dimensions: dataset.shape().pixels(),
        pixels: bits(pixels),
        levels: if priors.is_empty() { uniform()? } else { levels.into_iter().map(bits).collect() },
        labels: if classes > 0 { ((classes + 1) as f64).log2() } else { 0.0 },
        has_priors: !priors.is_empty(),
    }))
}

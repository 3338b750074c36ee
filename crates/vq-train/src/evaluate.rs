//! How good a tokenizer is, from whole-set statistics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use vq_data::{Dataset, Loader, LoaderOptions};
use vq_model::{Codes, LevelConfig, VqVae};

use crate::metrics::level_name;
use crate::ssim::ssim;
use crate::{Error, Evaluation, Metrics, Result, Samples, Usage};

/// PSNR of an image that comes back without any error, in dB.
const MOST_PSNR: f64 = 100.0;

/// How to [`evaluate`].
#[derive(Clone, Copy, Debug)]
pub struct EvaluateOptions<'a> {
    /// Images that are run through the model at a time. Does not change the figures.
    pub batch_size: usize,
    /// Variance of the training pixels in [0, 1], by which `nmse` is divided; see
    /// [`vq_data::pixel_variance`].
    pub variance: f64,
    /// Images to return for pictures, evenly spaced over the set.
    pub samples: usize,
    /// Raised to give up.
    pub stop: Option<&'a AtomicBool>,
}

/// Runs every image of `dataset` through the model, and changes neither. `None` if stopped.
///
/// All figures are of the reconstruction in pixels: denormalised, clamped to [0, 1], not rounded.
/// - `mse`: mean squared error over all pixels and channels of the set.
/// - `nmse`: `mse` / [`EvaluateOptions::variance`].
/// - `psnr`: 10·log₁₀(1 / MSE) of each image (peak 1), averaged over the images; at most 100 dB each.
/// - `ssim`: see [`ssim()`](crate::ssim()), averaged over the images.
/// - `commitment`, `codebook`: ‖`z_e` − e‖², mean over the set, without β; the second is 0 for an EMA
///   codebook.
/// - `perplexity`, `codes_in_use`: from one histogram over the set; those of the level above the
///   bottom are called `perplexity.1` and so on. A level with several codebooks has the geometric mean
///   and the sum over them, and `perplexity/0`, `perplexity/1`, … of each.
///
/// - `pixel_bits_per_dim`, of a model with a likelihood: −log₂ p(x|z) / (C·H·W), averaged over the images.
///   The codes' bits come on top: see [`bits_per_dim`](crate::bits_per_dim()).
///
/// The score is the PSNR; of a model with a likelihood −`pixel_bits_per_dim`.
pub fn evaluate(
    model: &VqVae,
    dataset: &Arc<dyn Dataset>,
    options: EvaluateOptions<'_>,
) -> Result<Option<Evaluation>> {
    let normalization = &model.config().normalization;
    let loader = Loader::new(
        dataset.clone(),
        data_normalization(normalization),
        LoaderOptions::in_order(options.batch_size.min(dataset.len()).max(1)),
    )?;
    let mut tally = Tally::new(model, dataset.len(), options.samples);
    for batch in loader.epoch(0, 0) {
        if options.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Ok(None);
        }
        let batch = batch?;
        let output = model.evaluate(&batch.images.to_device(model.device())?)?;
        let pixels = |images: &Tensor| -> Result<Tensor> {
            Ok(normalization.denormalize(&images.to_device(&Device::Cpu)?)?.contiguous()?)
        };
        let (originals, reconstructions) =
            (pixels(&batch.images)?, pixels(&output.reconstruction()?)?);
        tally.images(&originals, &reconstructions)?;
        let kept = tally.samples(&batch.indices, &originals, &reconstructions)?;
        tally.sample_levels(model, &output.codes, &kept)?;
        tally.losses(
            batch.indices.len(),
            output.codebook_loss.to_scalar::<f32>()?,
            output.commitment_loss.to_scalar::<f32>()?,
        );
        if let Some(nats) = &output.nats {
            tally.nats += sum(nats)?;
        }
        tally.codes(&output.codes.levels)?;
    }
    let dimensions = dataset.shape().pixels();
    let has_likelihood = model.config().pixel_distribution().is_some();
    tally.finish(options.variance, has_likelihood.then_some(dimensions)).map(Some)
}

/// The sum in f64.
pub(crate) fn sum(x: &Tensor) -> Result<f64> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// The same numbers, in the type that the loader takes.
pub(crate) fn data_normalization(
    normalization: &vq_model::Normalization,
) -> vq_data::Normalization {
    vq_data::Normalization { mean: normalization.mean.clone(), std: normalization.std.clone() }
}

/// One histogram per level of `codes` `[B,h,w]` or `[B,h,w,G]`.
pub(crate) fn count_codes(usage: &mut [Usage], codes: &[Tensor]) -> Result<()> {
    for (usage, codes) in usage.iter_mut().zip(codes) {
        usage.count(&codes.flatten_all()?.to_vec1::<u32>()?);
    }
    Ok(())
}

/// Empty histograms for a model.
pub(crate) fn empty_usage(model: &VqVae) -> Vec<Usage> {
    let levels = &model.config().levels;
    let empty = |level: &LevelConfig| {
        let quantizer = &level.quantizer;
        Usage::with_codebooks(quantizer.codes_per_position(), quantizer.codebook_size)
    };
    levels.iter().map(empty).collect()
}

/// Perplexity and codes in use of every level, by name.
pub(crate) fn usage_metrics(mut metrics: Metrics, usage: &[Usage]) -> Metrics {
    for (level, usage) in usage.iter().enumerate() {
        let perplexity_name = level_name("perplexity", level);
        metrics.set(&perplexity_name, usage.perplexity());
        metrics.set(&level_name("codes_in_use", level), usage.codes_in_use() as f64);
        if usage.codebooks > 1 {
            for (codebook, perplexity) in usage.perplexities().into_iter().enumerate() {
                metrics.set(&format!("{perplexity_name}/{codebook}"), perplexity);
            }
        }
    }
    metrics
}

/// Sums over the set, in f64 and in the order of the images.
struct Tally {
    images: u64,
    mse: f64,
    psnr: f64,
    ssim: f64,
    codebook: f64,
    commitment: f64,
    /// −ln p(x|z).
    nats: f64,
    usage: Vec<Usage>,
    /// Every this many images, one is kept.
    spacing: usize,
    most_samples: usize,
    originals: Vec<Tensor>,
    reconstructions: Vec<Tensor>,
    /// One list per level where there are several, else none.
    levels: Vec<Vec<Tensor>>,
}

impl Tally {
    fn new(model: &VqVae, images: usize, samples: usize) -> Self {
        let levels = model.config().levels.len();
        Self {
            images: 0,
            mse: 0.0,
            psnr: 0.0,
            ssim: 0.0,
            codebook: 0.0,
            commitment: 0.0,
            nats: 0.0,
            usage: empty_usage(model),
            spacing: (images / samples.max(1)).max(1),
            most_samples: samples,
            originals: Vec::new(),
            reconstructions: Vec::new(),
            levels: vec![Vec::new(); if levels > 1 { levels } else { 0 }],
        }
    }

    /// Both `[B,C,H,W]` in [0, 1].
    fn images(&mut self, originals: &Tensor, reconstructions: &Tensor) -> Result<()> {
        let (_, channels, height, width) = originals.dims4()?;
        let size = channels * height * width;
        let a = originals.flatten_all()?.to_vec1::<f32>()?;
        let b = reconstructions.flatten_all()?.to_vec1::<f32>()?;
        let figures: Vec<(f64, f64)> = a
            .par_chunks_exact(size)
            .zip(b.par_chunks_exact(size))
            .map(|(a, b)| (mse(a, b), ssim(a, b, channels, height, width)))
            .collect();
        for (mse, ssim) in figures {
            self.images += 1;
            self.mse += mse;
            self.psnr += (-10.0 * mse.log10()).min(MOST_PSNR);
            self.ssim += ssim;
        }
        Ok(())
    }

    /// Keeps some of a batch; which rows of it.
    fn samples(
        &mut self,
        indices: &[usize],
        originals: &Tensor,
        reconstructions: &Tensor,
    ) -> Result<Vec<usize>> {
        let mut kept = Vec::new();
        for (row, index) in indices.iter().enumerate() {
            if index % self.spacing == 0 && self.originals.len() < self.most_samples {
                self.originals.push(originals.get(row)?.copy()?);
                self.reconstructions.push(reconstructions.get(row)?.copy()?);
                kept.push(row);
            }
        }
        Ok(kept)
    }

    /// What each level alone makes of the codes of these rows.
    fn sample_levels(&mut self, model: &VqVae, codes: &Codes, rows: &[usize]) -> Result<()> {
        let count = self.levels.len();
        for (level, samples) in self.levels.iter_mut().enumerate() {
            let shown: Vec<bool> = (0..count).map(|other| other == level).collect();
            for &row in rows {
                let decoded = model.decode_levels(&codes.narrow(row, 1)?, &shown)?;
                let pixels = model.config().normalization.denormalize(&decoded)?;
                samples.push(pixels.get(0)?.to_device(&Device::Cpu)?.contiguous()?);
            }
        }
        Ok(())
    }

    /// Means over a batch of `count` images.
    fn losses(&mut self, count: usize, codebook: f32, commitment: f32) {
        self.codebook += f64::from(codebook) * count as f64;
        self.commitment += f64::from(commitment) * count as f64;
    }

    fn codes(&mut self, codes: &[Tensor]) -> Result<()> {
        count_codes(&mut self.usage, codes)
    }

    /// `dimensions` are an image's numbers, where there is a likelihood of them.
    fn finish(self, variance: f64, dimensions: Option<usize>) -> Result<Evaluation> {
        if self.images == 0 {
            return Err(Error::Data(vq_data::Error::EmptySplit { split: "test" }));
        }
        let mean = |sum: f64| sum / self.images as f64;
        let mut score = mean(self.psnr);
        let mut metrics = Metrics::new()
            .with("mse", mean(self.mse))
            .with("nmse", mean(self.mse) / variance)
            .with("psnr", mean(self.psnr))
            .with("ssim", mean(self.ssim))
            .with("codebook", mean(self.codebook))
            .with("commitment", mean(self.commitment));
        if let Some(dimensions) = dimensions {
            let bits = mean(self.nats) / std::f64::consts::LN_2 / dimensions as f64;
            metrics.set("pixel_bits_per_dim", bits);
            score = -bits;
        }
        let samples = if self.originals.is_empty() {
            None
        } else {
            let stack = |images: &Vec<Tensor>| Tensor::stack(images, 0);
            Some(Samples {
                originals: stack(&self.originals)?,
                reconstructions: stack(&self.reconstructions)?,
                levels: self.levels.iter().map(stack).collect::<candle_core::Result<_>>()?,
            })
        };
        Ok(Evaluation {
            metrics: usage_metrics(metrics, &self.usage),
            score,
            usage: self.usage,
            samples,
            drawn: None,
        })
    }
}

fn mse(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    sum / a.len().max(1) as f64
}

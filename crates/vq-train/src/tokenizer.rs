//! A VQ-VAE with its data and its loss, as something to train.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor, Var};
use vq_data::{Batch, Dataset, Loader, LoaderOptions, Splits};
use vq_model::{CodebookUpdate, Codes, Config, QuantizerKind, StepNumber, TrainingStep, VqVae};

use crate::device_images::DeviceImages;
use crate::evaluate::{data_normalization, empty_usage};
use crate::loss::Loss;
use crate::metrics::level_name;
use crate::recipe_toml::first_difference;
use crate::{
    Advice, EpochRecord, Error, EvaluateOptions, Evaluation, Forward, Recipe, Repeats, Result,
    TrainConfig, Trainable, Update, doctor, evaluate,
};

/// A VQ-VAE with its data and its loss.
pub struct Tokenizer {
    model: VqVae,
    loader: Loader,
    /// Where batches are made on the device.
    device_images: Option<DeviceImages>,
    test: Arc<dyn Dataset>,
    variance: f64,
    loss: Loss,
    config: TrainConfig,
}

/// A batch, or a part of one.
pub struct Part {
    images: Tensor,
    /// Which image of the batch the first one is.
    first: usize,
}

/// What a step leaves for the codebooks' update.
pub struct Residue {
    z_e: Vec<Tensor>,
    codes: Codes,
}

impl Tokenizer {
    /// A fresh model of `recipe.model` (with the data's class names, where it has none of its own)
    /// that learns from `splits`. Checks the recipe.
    ///
    /// On a device other than the CPU, the training images go there once and stay, if their pixels are in
    /// memory and take at most 1 GiB; else batches are copied there ahead of the steps.
    pub fn new(recipe: &Recipe, splits: &Splits, device: &Device) -> Result<Self> {
        recipe.validate()?;
        let mut config = recipe.model.clone();
        if config.class_names.is_empty() {
            config.class_names = splits.train.class_names().to_vec();
        }
        check_shape(&config, splits)?;
        let mut model = VqVae::new(&config, recipe.train.seed, device)?;
        model.set_precision(recipe.train.precision);
        let options = LoaderOptions {
            batch_size: recipe.train.batch_size,
            shuffle: true,
            flip: recipe.data.flip,
            drop_last: true,
            seed: recipe.train.seed,
            prefetch: recipe.train.prefetch,
        };
        let normalization = data_normalization(&config.normalization);
        let loader = Loader::new(splits.train.clone(), normalization, options)?.on_device(device);
        let variance = vq_data::pixel_variance(splits.train.as_ref())?;
        let loss = Loss::new(&recipe.train, &config.normalization, variance, device)?;
        let (test, config) = (splits.test.clone(), recipe.train.clone());
        let device_images = None;
        let tokenizer = Self { model, loader, device_images, test, variance, loss, config };
        tokenizer.with_device_images(!device.is_cpu() && DeviceImages::fit(splits.train.as_ref()))
    }

    /// With the training images on the model's device, all of them, or without; [`new`](Self::new) decides
    /// by the device and their size. Changes nothing in what is learnt.
    pub fn with_device_images(mut self, are_there: bool) -> Result<Self> {
        let device = self.model.device();
        self.device_images = if are_there {
            Some(DeviceImages::upload(&self.loader, device)?)
        } else if device.is_cpu() {
            None
        } else {
            Some(DeviceImages::stream(&self.loader, device)?)
        };
        Ok(self)
    }

    /// The model as it stands.
    pub fn model(&self) -> &VqVae {
        &self.model
    }

    pub(crate) fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The train split and the test split.
    pub(crate) fn datasets(&self) -> [&Arc<dyn Dataset>; 2] {
        [self.loader.dataset(), &self.test]
    }

    /// Variance of the training pixels in [0, 1].
    pub fn variance(&self) -> f64 {
        self.variance
    }

    /// The name of the mean distance between vectors and codes, where the commitment loss tells it: with
    /// the kind `residual` that is a sum over the stages.
    fn distance_name(&self, level: usize) -> Option<String> {
        let config = self.model.config().levels.get(level)?;
        let is_one = config.quantizer.kind != QuantizerKind::Residual;
        is_one.then(|| level_name("code_distance", level))
    }

    fn codebook_update(&self) -> CodebookUpdate {
        CodebookUpdate { revive_threshold: self.config.revival.threshold, seed: self.config.seed }
    }

    /// Vectors that each level quantizes in a step.
    fn tokens_per_step(&self) -> Result<Vec<usize>> {
        let [height, width] = self.model.config().image_size;
        let grids = self.model.config().grids(height, width)?;
        Ok(grids.iter().map(|[h, w]| h * w * self.config.batch_size).collect())
    }
}

impl Repeats<Part, Residue> for Tokenizer {
    fn batch_tensors<'a>(&self, batch: &'a mut Part) -> Vec<&'a mut Tensor> {
        vec![&mut batch.images]
    }

    fn residue_tensors<'a>(&self, residue: &'a mut Residue) -> Vec<&'a mut Tensor> {
        residue.z_e.iter_mut().collect()
    }

    fn follow(&self, residue: &Residue, step: StepNumber<'_>) -> Result<()> {
        Ok(self.model.follow_codes(&residue.z_e, &residue.codes, step)?)
    }

    fn revive(&self, residue: &Residue, step: u64) -> Result<Update> {
        let options = self.codebook_update();
        Ok(revivals(self.model.revive_codes(&residue.z_e, &options, step)?))
    }
}

impl Trainable for Tokenizer {
    type Batch = Part;
    type Residue = Residue;

    fn batches_per_epoch(&self) -> usize {
        self.loader.batches_per_epoch()
    }

    fn image_counts(&self) -> Option<[usize; 2]> {
        Some(self.datasets().map(|data| data.len()))
    }

    fn batches(&self, epoch: u64, first: usize) -> Box<dyn Iterator<Item = Result<Part>> + Send> {
        if let Some(images) = &self.device_images {
            let whole = |images| Part { images, first: 0 };
            return Box::new(images.epoch(epoch, first).map(move |images| images.map(whole)));
        }
        let whole = |batch: Batch| Part { images: batch.images, first: 0 };
        let batches = self.loader.epoch(epoch, first);
        Box::new(batches.map(move |batch| batch.map(whole).map_err(Error::from)))
    }

    fn parameters(&self) -> &BTreeMap<String, Var> {
        self.model.parameters()
    }

    /// Weights of convolutions; neither biases nor what code vectors are made of, which a pull to zero
    /// would only harm.
    fn decays(&self, name: &str, parameter: &Var) -> bool {
        parameter.rank() > 1 && !name.contains(".quantizer.")
    }

    /// k-means on the encoder's outputs for the first batches.
    fn prepare(&mut self, stop: &AtomicBool) -> Result<bool> {
        let rounds = self.config.kmeans.rounds;
        if rounds == 0 || self.model.codebooks_initialized()? {
            return Ok(true);
        }
        let is_stopped = || stop.load(Ordering::Relaxed);
        let mut pools: Vec<Vec<Tensor>> = vec![Vec::new(); self.model.config().levels.len()];
        let mut vectors = 0;
        for batch in self.batches(0, 0) {
            for part in self.split(batch?, self.config.accumulate)? {
                let images = part.images.to_device(self.model.device())?;
                for (pool, z_e) in pools.iter_mut().zip(self.model.evaluate(&images)?.z_e) {
                    let dim = z_e.dim(candle_core::D::Minus1)?;
                    pool.push(z_e.reshape(((), dim))?);
                }
                vectors +=
                    pools.first().and_then(|pool| pool.last()).map_or(Ok(0), |z| z.dim(0))?;
            }
            if is_stopped() {
                return Ok(false);
            }
            if vectors >= self.config.kmeans.vectors {
                break;
            }
        }
        let pools: Vec<Tensor> =
            pools.iter().map(|pool| Tensor::cat(pool, 0)).collect::<candle_core::Result<_>>()?;
        let seed = self.config.seed;
        match self.model.initialize_codebooks_unless(&pools, rounds, seed, &is_stopped) {
            Err(vq_model::Error::Stopped) => Ok(false),
            placed => Ok(placed.map(|()| true)?),
        }
    }

    fn split(&self, batch: Part, count: usize) -> Result<Vec<Part>> {
        let images = batch.images.dim(0)?;
        let size = images.div_ceil(count.max(1)).max(1);
        (0..images)
            .step_by(size)
            .map(|first| {
                let part = batch.images.narrow(0, first, size.min(images - first))?;
                Ok(Part { images: part.contiguous()?, first: batch.first + first })
            })
            .collect()
    }

    fn join(&self, parts: Vec<Residue>) -> Result<Option<Residue>> {
        let (mut z_es, mut codes) = (Vec::new(), Vec::new());
        for part in parts {
            z_es.push(part.z_e);
            codes.push(part.codes);
        }
        let Some(levels) = z_es.first().map(Vec::len) else { return Ok(None) };
        let level = |level: usize| -> Result<Tensor> {
            let parts: Vec<&Tensor> = z_es.iter().filter_map(|z_e| z_e.get(level)).collect();
            Ok(Tensor::cat(&parts, 0)?)
        };
        let z_e = (0..levels).map(level).collect::<Result<_>>()?;
        Ok(Some(Residue { z_e, codes: Codes::concat(&codes)? }))
    }

    fn forward(&self, batch: &Part, step: u64) -> Result<Forward<Residue>> {
        let images = batch.images.to_device(self.model.device())?;
        let step = TrainingStep { seed: self.config.seed, step, first_image: batch.first };
        let output = self.model.forward_training(&images, step)?;
        let (loss, mut figures) = self.loss.of(&output, &images)?;
        for (level, commitment) in output.commitment_losses.iter().enumerate() {
            if let Some(name) = self.distance_name(level) {
                let dim = self.model.quantizer(level)?.dim() as f64;
                figures = figures.with_root(name, commitment, dim);
            }
        }
        for (usage, codes) in empty_usage(&self.model).into_iter().zip(&output.codes.levels) {
            figures = figures.with_codes(usage, codes);
        }
        let residue = Residue { z_e: output.z_e, codes: output.codes };
        Ok(Forward { loss, figures, examples: images.dim(0)?, residue })
    }

    fn update(&mut self, residue: Residue, step: u64) -> Result<Update> {
        let options = self.codebook_update();
        let reports = self.model.update_codebooks(&residue.z_e, &residue.codes, &options, step)?;
        Ok(revivals(reports.into_iter().map(|report| (report.parameter, report.revived))))
    }

    fn repeats(&self) -> Option<&dyn Repeats<Part, Residue>> {
        if self.model.repeats() { Some(self) } else { None }
    }

    fn evaluate(&self, stop: &AtomicBool) -> Result<Option<Evaluation>> {
        let options = EvaluateOptions {
            batch_size: self.config.batch_size.div_ceil(self.config.accumulate.max(1)),
            variance: self.variance,
            samples: self.config.samples,
            stop: Some(stop),
        };
        evaluate(&self.model, &self.test, options)
    }

    fn concerns(&self) -> Vec<String> {
        let threshold = self.config.revival.threshold;
        let tokens = self.tokens_per_step().unwrap_or_default();
        let mut concerns = Vec::new();
        for (index, (level, tokens)) in self.model.config().levels.iter().zip(tokens).enumerate() {
            // Only these have codes that die.
            if !level.quantizer.kind.has_key("rule") {
                continue;
            }
            let mean = tokens as f64 / level.quantizer.codebook_size as f64;
            concerns.extend(revival_concern(threshold, mean, level.quantizer.decay).map(
                |problem| {
                    format!(
                        "train.revival.threshold = {threshold} at model.levels.{index}: {problem}"
                    )
                },
            ));
        }
        concerns
    }

    fn notices(&self) -> Vec<String> {
        let broken = self.datasets().into_iter().flat_map(|dataset| dataset.take_broken());
        broken.map(|file| format!("cannot decode {file}; another image takes its place")).collect()
    }

    fn codebooks(&self) -> Result<Vec<Vec<Tensor>>> {
        let copies = |level: usize| -> Result<Vec<Tensor>> {
            let codebooks = self.model.quantizer(level)?.codebooks()?;
            // The model's own move on.
            let copy = |codebook: &Tensor| Ok(codebook.to_device(&Device::Cpu)?.copy()?);
            codebooks.iter().map(copy).collect()
        };
        (0..self.model.config().levels.len()).map(copies).collect()
    }

    fn advise(&self, record: &EpochRecord, is_late: bool) -> Vec<Advice> {
        doctor::advise(self.model.config(), &self.config, record, is_late)
    }

    fn collapse_advice(&self, level: usize) -> String {
        match self.model.config().levels.get(level) {
            Some(config) => doctor::mend_usage(level, &config.quantizer, &self.config),
            None => String::new(),
        }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        Ok(self.model.save(folder)?)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        let mut model = VqVae::from_pretrained(folder, self.model.device())?;
        model.set_precision(self.config.precision);
        if let Some((key, was, now)) = first_difference(model.config(), self.model.config())? {
            return Err(Error::ResumeMismatch { key: format!("model.{key}"), was, now });
        }
        self.model = model;
        Ok(())
    }
}

/// Why revival at this threshold would keep replacing codes that are in use, if it would. `mean` is
/// how often a code is chosen per step on average, `decay` that of its moving average.
fn revival_concern(threshold: f64, mean: f64, decay: f64) -> Option<String> {
    if threshold <= 0.0 {
        return None;
    }
    if threshold >= 1.0 {
        return Some(
            "a code of average use already counts as dead, so the codebook is redrawn all the time; \
             use a share well below 1, such as 0.1"
                .into(),
        );
    }
    // Unused from now on, a code of average use falls under the threshold after this many steps.
    let steps = threshold.ln() / decay.max(f64::MIN_POSITIVE).ln();
    let expected = mean * steps;
    (expected < 3.0).then(|| {
        format!(
            "a code of average use is chosen {mean:.2} times per step, and {expected:.1} times in the \
             steps after which it counts as dead, so chance alone will kill codes; use larger batches, \
             fewer codes, a quantizer.decay nearer to 1, or a lower threshold"
        )
    })
}

/// What reviving codes did, of each codebook: the name of its parameter, if it is one, and its codes.
fn revivals(codebooks: impl IntoIterator<Item = (Option<String>, Vec<usize>)>) -> Update {
    let mut update = Update::default();
    for (parameter, codes) in codebooks {
        update.revived += codes.len();
        if let Some(parameter) = parameter.filter(|_| !codes.is_empty()) {
            update.reset_rows.push((parameter, codes));
        }
    }
    update
}

fn check_shape(config: &Config, splits: &Splits) -> Result<()> {
    for dataset in [&splits.train, &splits.test] {
        let shape = dataset.shape();
        if shape.channels != config.channels {
            let problem = format!(
                "is {}, but the images of {} have {} channels",
                config.channels,
                dataset.name(),
                shape.channels
            );
            return Err(Error::config("model.channels", problem));
        }
        if [shape.height, shape.width] != config.image_size {
            let problem = format!(
                "is {:?}, but the images of {} are {}×{}",
                config.image_size,
                dataset.name(),
                shape.height,
                shape.width
            );
            return Err(Error::config("model.image_size", problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Point 14.
    #[test]
    fn a_threshold_above_what_mean_usage_allows_is_a_concern() {
        assert!(revival_concern(0.1, 16.0, 0.99).is_none());
        assert!(revival_concern(0.0, 1e-6, 0.99).is_none());
        assert!(revival_concern(1.0, 16.0, 0.99).unwrap().contains("below 1"));
        assert!(revival_concern(0.1, 0.001, 0.99).unwrap().contains("chance"));
        assert!(revival_concern(0.1, 0.1, 0.0).is_some());
    }
}

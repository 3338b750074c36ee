//! A prior with its codes, as something to train.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor, Var};
use vq_model::{Codes, Stream, VqVae};
use vq_ops::StepNumber;
use vq_prior::{Conditions, Prior, SampleOptions, Training, TrainingBatch};

use crate::prior_codes::PriorCodes;
use crate::prior_evaluation::judge;
use crate::recipe_toml::first_difference;
use crate::unigram::Unigram;
use crate::{
    Error, Evaluation, Figures, Forward, PriorRecipe, PriorTrainConfig, Repeats, Result, Trainable,
    Update,
};

/// A prior with its codes, and the model that decodes what is drawn from it.
pub struct PriorTask {
    prior: Prior,
    model: VqVae,
    train: PriorCodes,
    held_out: PriorCodes,
    config: PriorTrainConfig,
    /// Of the training codes.
    unigram: Unigram,
    unigram_bits: f64,
    /// The most frequent codes of each level below, `[G]`.
    below: Vec<Vec<u32>>,
}

impl PriorTask {
    /// A fresh prior of `recipe.prior`, whose keys that the codes decide are filled in, for codes of the
    /// model whose [`model_hash`](crate::model_hash) is `hash`; codes of another are refused. Checks the
    /// recipe.
    pub fn new(
        recipe: &mut PriorRecipe,
        model: VqVae,
        hash: &str,
        device: &Device,
    ) -> Result<Self> {
        let (train, held_out) = PriorCodes::open(&recipe.data, hash)?;
        recipe.prior = train.resolve(&recipe.prior);
        recipe.validate()?;
        let config = recipe.train.clone();
        if config.batch_size > train.len() {
            let (batch_size, len) = (config.batch_size, train.len());
            return Err(Error::Data(vq_data::Error::BatchTooLarge { batch_size, len }));
        }
        let histograms = train.histograms()?;
        let unigram = Unigram::of_level(&histograms, train.level());
        let unigram_bits = unigram.bits(&held_out)?;
        let below = histograms.iter().take(train.level());
        let below = below.map(|codes| codes.iter().map(|counts| most_frequent(counts)).collect());
        let below = below.collect();
        let prior = Prior::new(&recipe.prior, config.seed, device)?;
        Ok(Self { prior, model, train, held_out, config, unigram, unigram_bits, below })
    }

    /// The prior as it stands.
    pub fn prior(&self) -> &Prior {
        &self.prior
    }

    /// Images to learn from, and images to judge by.
    pub fn images(&self) -> (usize, usize) {
        (self.train.len(), self.held_out.len())
    }

    /// The level that the prior is for, 0 = bottom.
    pub fn level(&self) -> usize {
        self.train.level()
    }

    /// Bits per held-out code under the frequencies of the training codes: what a prior must beat.
    pub fn unigram_bits(&self) -> f64 {
        self.unigram_bits
    }

    /// Images drawn from the prior, `[N,C,H,W]` f32 in [0, 1]: image i of class i mod classes, under the
    /// codes of held-out images of the levels above. Levels below have their most frequent code everywhere.
    fn draw(&self) -> Result<Option<Tensor>> {
        let config = self.prior.config();
        let mut count = self.config.samples;
        if !config.conditioning.is_empty() {
            count = count.min(self.held_out.len());
        }
        if count == 0 {
            return Ok(None);
        }
        let spacing = (self.held_out.len() / count).max(1);
        let indices: Vec<usize> = (0..count).map(|i| i * spacing % self.held_out.len()).collect();
        let given = self.held_out.batch(&indices)?;
        let classes = config.class_count;
        let labels = if !config.conditioning.is_empty() || classes == 0 {
            given.labels
        } else {
            let labels = (0..count).map(|image| (image % classes) as u32).collect();
            Some(Tensor::from_vec(labels, count, &Device::Cpu)?)
        };
        let conditions = Conditions { labels: labels.as_ref(), conditioning: &given.conditioning };
        let options = SampleOptions { seed: self.config.seed, ..SampleOptions::default() };
        let drawn = self.prior.sample(count, &conditions, &options, None)?;
        let [height, width] = self.model.config().image_size;
        let grids = self.model.config().grids(height, width)?;
        let mut levels = Vec::new();
        for ([h, w], codes) in grids.into_iter().zip(&self.below) {
            let all: Vec<u32> =
                codes.iter().copied().cycle().take(count * h * w * codes.len()).collect();
            levels.push(match codes.len() {
                1 => Tensor::from_vec(all, (count, h, w), &Device::Cpu)?,
                several => Tensor::from_vec(all, (count, h, w, several), &Device::Cpu)?,
            });
        }
        levels.push(drawn);
        levels.extend(given.conditioning.iter().cloned());
        decode(&self.model, &Codes { levels }).map(Some)
    }
}

/// The images of codes of all levels, on any device: `[N,C,H,W]` f32 in [0, 1] on the CPU.
pub fn decode(model: &VqVae, codes: &Codes) -> Result<Tensor> {
    let on_device = |level: &Tensor| level.to_device(model.device());
    let levels = codes.levels.iter().map(on_device).collect::<candle_core::Result<_>>()?;
    let images = model.decode(&Codes { levels })?.to_device(&Device::Cpu)?;
    Ok(model.config().normalization.denormalize(&images)?.contiguous()?)
}

impl Repeats<TrainingBatch, ()> for PriorTask {
    fn batch_tensors<'a>(&self, batch: &'a mut TrainingBatch) -> Vec<&'a mut Tensor> {
        batch.tensors()
    }

    fn residue_tensors<'a>(&self, (): &'a mut ()) -> Vec<&'a mut Tensor> {
        Vec::new()
    }

    fn follow(&self, (): &(), _: StepNumber<'_>) -> Result<()> {
        Ok(())
    }

    fn revive(&self, (): &(), _: u64) -> Result<Update> {
        Ok(Update::default())
    }
}

impl Trainable for PriorTask {
    type Batch = TrainingBatch;
    type Residue = ();

    fn batches_per_epoch(&self) -> usize {
        self.train.len() / self.config.batch_size.max(1)
    }

    fn image_counts(&self) -> Option<[usize; 2]> {
        Some(self.images().into())
    }

    fn batches(
        &self,
        epoch: u64,
        first: usize,
    ) -> Box<dyn Iterator<Item = Result<TrainingBatch>> + Send> {
        let (images, seed) = (self.train.len(), self.config.seed);
        let order = Stream::new(seed, "prior.order", epoch).distinct(images, images);
        let (size, codes) = (self.config.batch_size.max(1), self.train.clone());
        let (config, device) = (self.prior.config().clone(), self.prior.device().clone());
        let before = epoch * self.batches_per_epoch() as u64;
        let batch = move |number: usize| {
            let images = order.get(number * size..(number + 1) * size).unwrap_or_default();
            let batch = codes.batch(images)?;
            let training = Training { seed, step: before + number as u64 + 1 };
            let conditions = batch.conditions();
            Ok(TrainingBatch::new(&config, &batch.codes, &conditions, training, &device)?)
        };
        Box::new((first..self.batches_per_epoch()).map(batch))
    }

    fn parameters(&self) -> &BTreeMap<String, Var> {
        self.prior.parameters()
    }

    /// Weights of convolutions and linear maps; biases, gains and tables of vectors have other names.
    fn decays(&self, name: &str, _: &Var) -> bool {
        name.ends_with(".weight")
    }

    fn prepare(&mut self, _: &AtomicBool) -> Result<bool> {
        Ok(true)
    }

    fn forward(&self, batch: &TrainingBatch, _: u64) -> Result<Forward<()>> {
        let loss = self.prior.loss_of(batch)?;
        let figures = Figures::new().with("loss", &loss).with_divided(
            "bits_per_code",
            &loss,
            std::f64::consts::LN_2,
        );
        Ok(Forward { loss, figures, examples: batch.images(), residue: () })
    }

    fn update(&mut self, (): (), _: u64) -> Result<Update> {
        Ok(Update::default())
    }

    fn repeats(&self) -> Option<&dyn Repeats<TrainingBatch, ()>> {
        Some(self)
    }

    /// On the held-out codes, each with its class and the codes of the levels above:
    /// - `nats_per_code`, `bits_per_code`: −ln p and −log₂ p, means over all codes.
    /// - `bits_per_image`: the sum over an image's codes of this level, a mean over the images.
    /// - `unigram_bits_per_code`: see [`PriorTask::unigram_bits`].
    ///
    /// The score is −`bits_per_code`.
    fn evaluate(&self, stop: &AtomicBool) -> Result<Option<Evaluation>> {
        let (batch, unigram) = (self.config.batch_size, self.unigram_bits);
        let metrics = judge(&self.prior, &self.held_out, unigram, batch, stop)?;
        let Some(metrics) = metrics else { return Ok(None) };
        let bits = metrics.get("bits_per_code").unwrap_or(f64::NAN);
        let drawn = self.draw()?;
        Ok(Some(Evaluation { metrics, score: -bits, usage: Vec::new(), samples: None, drawn }))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.prior.save(folder)?;
        self.unigram.save(folder)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        let prior = Prior::from_pretrained(folder, self.prior.device())?;
        if let Some((key, was, now)) = first_difference(prior.config(), self.prior.config())? {
            return Err(Error::ResumeMismatch { key: format!("prior.{key}"), was, now });
        }
        self.prior = prior;
        Ok(())
    }
}

fn most_frequent(counts: &[u64]) -> u32 {
    let most = counts.iter().copied().max().unwrap_or(0);
    counts.iter().position(|&count| count == most).unwrap_or(0) as u32
}

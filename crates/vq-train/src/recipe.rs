//! A recipe: everything that decides how a run goes, in one TOML document.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vq_data::{Indexing, OnBroken, OpenOptions, Source, Splits};
use vq_model::{CodebookRule, Config, Precision};

use crate::{Error, Result, Schedule};

/// Everything that decides how a run goes. The default is `configs/cifar10.toml`.
///
/// [`Recipe::from_toml`] reads one; keys that are left out take the default recipe's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The architecture.
    pub model: Config,
    /// Where the images come from.
    pub data: DataConfig,
    /// How the model is trained.
    pub train: TrainConfig,
}

/// Where the images come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// `auto`, `cifar10`, `cifar10:PATH`, `shapes`, `plain-shapes` or `folder:PATH`.
    pub source: Source,
    /// The folder in which `auto` and `cifar10` look for CIFAR-10.
    pub dir: PathBuf,
    /// Whether training images are mirrored left to right in half of the epochs.
    pub flip: bool,
    /// What to do about broken files in a folder of images.
    pub on_broken: OnBroken,
    /// Images in the train split of the built-in set.
    pub train_count: usize,
    /// Images in the test split of the built-in set.
    pub test_count: usize,
}

/// How the model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Parts in which a step's images go through the model, to need less memory: each part's gradient is
    /// added to those before, and the optimizer and the codebooks move once, by the whole batch. The same
    /// to rounding, except for `entropy_weight` with its diversity, which looks at a part at a time.
    pub accumulate: usize,
    /// Decides the initial weights, the order of the images, the flips and the revived codes.
    pub seed: u64,

    /// The highest learning rate.
    pub lr: f64,
    /// Steps over which the learning rate rises to `lr`.
    pub warmup_steps: u64,
    /// What the learning rate does afterwards.
    pub schedule: Schedule,
    /// Where a cosine ends.
    pub min_lr: f64,
    /// `AdamW`'s decay of the first moment.
    pub beta1: f64,
    /// `AdamW`'s decay of the second moment.
    pub beta2: f64,
    /// `AdamW`'s ε.
    pub eps: f64,
    /// `AdamW`'s decoupled decay; of weights only, not of biases and codebooks.
    pub weight_decay: f64,
    /// The gradient's global norm is clipped to this; 0 = off.
    pub grad_clip: f64,
    /// Decay of the moving average of the weights, which is evaluated and saved as the model;
    /// 0 = off.
    pub weight_ema: f64,

    /// β, the factor of the commitment loss (van den Oord et al. 2017, eq. 3).
    pub beta: f64,
    /// Whether the reconstruction error is divided by the variance of the training pixels. Of no meaning
    /// with a likelihood (`model.likelihood`).
    pub normalize_by_variance: bool,
    /// Factor of the mean absolute error, which is added to the mean squared error.
    pub l1: f64,

    /// Where the codes start.
    pub kmeans: KMeansConfig,
    /// What happens to codes that are not in use.
    pub revival: RevivalConfig,

    /// Epochs between evaluations on the test split. The last epoch is always evaluated.
    pub eval_every: usize,
    /// Images in the pictures that are made after every evaluation.
    pub samples: usize,
    /// Steps between lines of the metrics file.
    pub log_every: u64,
    /// The format of the convolutions' factors; parameters and everything else stay f32.
    pub precision: Precision,

    /// Steps between checkpoints within an epoch; 0 = only at the end of each epoch.
    pub checkpoint_every_steps: u64,
    /// Checkpoints that are kept, besides the best one.
    pub keep_checkpoints: usize,
    /// Batches that are prepared ahead.
    pub prefetch: usize,
}

/// Where the codes start: k-means among the encoder's first outputs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KMeansConfig {
    /// Rounds of Lloyd's algorithm; 0 = the codes start at random.
    pub rounds: usize,
    /// Vectors (of the finest level) to gather; 0 = those of one batch.
    pub vectors: usize,
}

/// What happens to codes that are not in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RevivalConfig {
    /// A code whose average use per step falls under this share of the mean (tokens per step / K)
    /// is put in the place of a random vector of the batch; 0 = off.
    pub threshold: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        let mut model = Config::default();
        for level in &mut model.levels {
            level.relu_before_residual = false;
            level.quantizer.rule = CodebookRule::Ema;
            level.quantizer.decay_warmup = 9.0;
        }
        Self { model, data: DataConfig::default(), train: TrainConfig::default() }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        let open = OpenOptions::default();
        Self {
            source: Source::Auto,
            dir: open.data_dir,
            flip: false,
            on_broken: open.on_broken,
            train_count: open.train_count,
            test_count: open.test_count,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 50,
            batch_size: 128,
            accumulate: 1,
            seed: 0,
            lr: 3e-3,
            warmup_steps: 100,
            schedule: Schedule::Cosine,
            min_lr: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 1e-4,
            grad_clip: 1.0,
            weight_ema: 0.0,
            beta: 2.0,
            normalize_by_variance: true,
            l1: 0.0,
            kmeans: KMeansConfig::default(),
            revival: RevivalConfig::default(),
            eval_every: 1,
            samples: 64,
            log_every: 10,
            checkpoint_every_steps: 0,
            keep_checkpoints: 2,
            precision: Precision::F32,
            prefetch: 4,
        }
    }
}

impl Default for KMeansConfig {
    fn default() -> Self {
        Self { rounds: 10, vectors: 0 }
    }
}

impl Default for RevivalConfig {
    fn default() -> Self {
        Self { threshold: 0.1 }
    }
}

impl Recipe {
    /// Checks every value; the error names the dotted key, e.g.
    /// `train.batch_size must be at least 1, got 0`.
    pub fn validate(&self) -> Result<()> {
        self.model.validate().map_err(|error| match error {
            vq_model::Error::Config { key, problem } => {
                Error::Config { key: format!("model.{key}"), problem }
            }
            other => other.into(),
        })?;
        if self.model.pixel_distribution().is_some() && self.train.l1 > 0.0 {
            let problem = format!(
                "must be 0 with a likelihood (model.likelihood), whose loss is −ln p(x|z) alone, got {}",
                self.train.l1
            );
            return Err(Error::config("train.l1", problem));
        }
        self.data.validate()?;
        self.train.validate()
    }
}

impl DataConfig {
    /// Opens the data in the size that a model wants, and checks it; see [`vq_data::open`]. What is found
    /// out about a folder is kept in [`vq_data::cache_dir`].
    pub fn open(&self, image_size: [usize; 2]) -> Result<Splits> {
        self.open_watched(image_size, &|_| ())
    }

    /// The same; tells `watch`, from several threads, how far the indexing of a folder is.
    pub fn open_watched(
        &self,
        image_size: [usize; 2],
        watch: &(dyn Fn(Indexing) + Sync),
    ) -> Result<Splits> {
        let options = OpenOptions {
            size: image_size,
            data_dir: self.dir.clone(),
            on_broken: self.on_broken,
            train_count: self.train_count,
            test_count: self.test_count,
            cache_dir: vq_data::cache_dir(),
            ..OpenOptions::default()
        };
        Ok(vq_data::open_watched(&self.source, &options, watch)?)
    }

    fn validate(&self) -> Result<()> {
        at_least("data.train_count", self.train_count, 1)?;
        at_least("data.test_count", self.test_count, 1)
    }
}

impl TrainConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        at_least("train.epochs", self.epochs, 1)?;
        at_least("train.batch_size", self.batch_size, 1)?;
        at_least("train.accumulate", self.accumulate, 1)?;
        if self.accumulate > self.batch_size {
            let problem = format!(
                "must be at most train.batch_size ({}), got {}",
                self.batch_size, self.accumulate
            );
            return Err(Error::config("train.accumulate", problem));
        }
        // TOML's integers are signed.
        if self.seed > i64::MAX as u64 {
            let problem = format!("must be at most {}, got {}", i64::MAX, self.seed);
            return Err(Error::config("train.seed", problem));
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return Err(Error::config("train.lr", format!("must be above 0, got {}", self.lr)));
        }
        if !(0.0..=self.lr).contains(&self.min_lr) {
            let problem = format!("must be from 0 to train.lr, got {}", self.min_lr);
            return Err(Error::config("train.min_lr", problem));
        }
        for (key, value) in [
            ("train.beta1", self.beta1),
            ("train.beta2", self.beta2),
            ("train.weight_ema", self.weight_ema),
        ] {
            if !(0.0..1.0).contains(&value) {
                let problem = format!("must be at least 0 and below 1, got {value}");
                return Err(Error::config(key, problem));
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(Error::config("train.eps", format!("must be above 0, got {}", self.eps)));
        }
        for (key, value) in [
            ("train.weight_decay", self.weight_decay),
            ("train.grad_clip", self.grad_clip),
            ("train.beta", self.beta),
            ("train.l1", self.l1),
            ("train.revival.threshold", self.revival.threshold),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::config(key, format!("must be at least 0, got {value}")));
            }
        }
        at_least("train.eval_every", self.eval_every, 1)?;
        at_least("train.log_every", self.log_every as usize, 1)?;
        at_least("train.keep_checkpoints", self.keep_checkpoints, 1)
    }
}

fn at_least(key: &str, value: usize, least: usize) -> Result<()> {
    if value < least {
        return Err(Error::config(key, format!("must be at least {least}, got {value}")));
    }
    Ok(())
}

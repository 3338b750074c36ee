//! A recipe for a prior over codes, in one TOML document.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vq_prior::{Network, PixelCnnConfig, TransformerConfig};

use crate::{Error, Result, Schedule, TrainConfig, file, recipe_toml};

/// Everything that decides how a prior is trained.
///
/// Keys that are left out take the value of [`PriorRecipe::default`]. Of `[prior]`, what the codes decide
/// (`tokenizer`, `grid`, `codebook_sizes`, `class_count`, `class_names`, `conditioning`) is taken from them
/// whatever the recipe says; the recipe of a run states what they were.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PriorRecipe {
    /// The architecture.
    pub prior: vq_prior::Config,
    /// The codes that it learns.
    pub data: PriorDataConfig,
    /// How it is trained.
    pub train: PriorTrainConfig,
}

/// The codes that a prior learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PriorDataConfig {
    /// The model that made the codes: a run's folder, a checkpoint's or a model's.
    pub model: PathBuf,
    /// The folder of codes to learn from.
    pub codes: PathBuf,
    /// A folder of codes to judge by; none = a share of `codes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<PathBuf>,
    /// Share of `codes` that is judged by and not learned from, rounded up to whole images; without meaning
    /// where there is a folder for that. Which images, is drawn once and for all for their number: the same
    /// ones in every run on the same codes, whatever its seed.
    pub held_out_share: f64,
    /// The level that the prior is for. It sees the whole grids of all levels above.
    pub level: PriorLevel,
}

/// A level of codes: `top`, or its number as text, from 0 (the bottom).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PriorLevel {
    /// The coarsest.
    #[default]
    Top,
    /// By its number.
    Number(usize),
}

/// How a prior is trained: as [`TrainConfig`], without what only a tokenizer has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PriorTrainConfig {
    /// Passes over the images.
    pub epochs: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Decides the initial weights, the order of the images, dropout and the samples in the pictures.
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
    /// `AdamW`'s decoupled decay; of weights only, not of biases, norms and embeddings.
    pub weight_decay: f64,
    /// The gradient's global norm is clipped to this; 0 = off.
    pub grad_clip: f64,
    /// Decay of the moving average of the weights, which is evaluated and saved as the prior; 0 = off.
    pub weight_ema: f64,
    /// Epochs between evaluations on the held-out codes. The last epoch is always evaluated.
    pub eval_every: usize,
    /// Images that are drawn for the picture that is made after every evaluation.
    pub samples: usize,
    /// Steps between lines of the metrics file.
    pub log_every: u64,
    /// Steps between checkpoints within an epoch; 0 = only at the end of each epoch.
    pub checkpoint_every_steps: u64,
    /// Checkpoints that are kept, besides the best one.
    pub keep_checkpoints: usize,
}

impl Default for PriorDataConfig {
    fn default() -> Self {
        Self {
            model: PathBuf::from("results"),
            codes: PathBuf::from("codes"),
            held_out: None,
            held_out_share: 0.1,
            level: PriorLevel::Top,
        }
    }
}

impl Default for PriorTrainConfig {
    fn default() -> Self {
        Self {
            epochs: 30,
            batch_size: 64,
            seed: 0,
            lr: 1e-3,
            warmup_steps: 100,
            schedule: Schedule::Cosine,
            min_lr: 0.0,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            grad_clip: 1.0,
            weight_ema: 0.0,
            eval_every: 1,
            samples: 64,
            log_every: 10,
            checkpoint_every_steps: 0,
            keep_checkpoints: 2,
        }
    }
}

/// What the weights or the data position depend on, beside the prior's keys.
const FIXED: [&str; 4] = ["train.batch_size", "train.seed", "data.level", "data.held_out_share"];
const KIND: &str = "prior.network.kind";

impl PriorRecipe {
    /// Reads a recipe; `origin` is what an error calls it. Does not [`validate`](Self::validate).
    pub fn from_toml(text: &str, origin: &str) -> Result<Self> {
        recipe_toml::from_toml(text, origin)
    }

    /// Reads a recipe from a file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// With one key set as by `--set key=value`; see [`Recipe::with_override`](crate::Recipe::with_override).
    pub fn with_override(&self, assignment: &str) -> Result<Self> {
        match assignment.split_once('=') {
            Some((key, kind)) if key.trim() == KIND => self.with_kind(kind.trim()),
            _ => recipe_toml::with_override(self, assignment),
        }
    }

    /// With a network of that kind: `pixelcnn` or `transformer`, of its default sizes if it is another one
    /// than before.
    pub fn with_kind(&self, kind: &str) -> Result<Self> {
        let mut recipe = self.clone();
        recipe.prior.network = match (kind.trim_matches('"'), &self.prior.network) {
            ("pixelcnn", network @ Network::PixelCnn(_))
            | ("transformer", network @ Network::Transformer(_)) => network.clone(),
            ("pixelcnn", _) => Network::PixelCnn(PixelCnnConfig::default()),
            ("transformer", _) => Network::Transformer(TransformerConfig::default()),
            (other, _) => {
                let problem = format!("must be pixelcnn or transformer, got {other}");
                return Err(Error::config(KIND, problem));
            }
        };
        Ok(recipe)
    }

    /// The whole recipe; [`PriorRecipe::from_toml`] gives the same one back.
    pub fn to_toml(&self) -> Result<String> {
        recipe_toml::to_toml(self)
    }

    /// Writes the whole recipe to a file, atomically.
    pub fn save(&self, path: &Path) -> Result<()> {
        file::write_atomic(path, self.to_toml()?.as_bytes())
    }

    /// Checks every value; the error names the dotted key.
    pub fn validate(&self) -> Result<()> {
        self.prior.validate().map_err(|error| match error {
            vq_prior::Error::Config { key, problem } => {
                Error::Config { key: format!("prior.{key}"), problem }
            }
            other => other.into(),
        })?;
        let share = self.data.held_out_share;
        if self.data.held_out.is_none() && !(share > 0.0 && share < 1.0) {
            let problem = format!("must be above 0 and below 1, got {share}");
            return Err(Error::config("data.held_out_share", problem));
        }
        self.train.resolve().validate()
    }

    /// Whether a run that was started with the recipe `was` can go on with this one. Refuses, by key, what
    /// the weights or the data position depend on; returns the other keys that differ, as `key: was → now`.
    pub fn check_resume(&self, was: &Self) -> Result<Vec<String>> {
        recipe_toml::check_resume(was, self, |key| {
            key.starts_with("prior.") || FIXED.contains(&key)
        })
    }
}

impl PriorTrainConfig {
    /// The same for the trainer.
    pub fn resolve(&self) -> TrainConfig {
        TrainConfig {
            epochs: self.epochs,
            batch_size: self.batch_size,
            seed: self.seed,
            lr: self.lr,
            warmup_steps: self.warmup_steps,
            schedule: self.schedule,
            min_lr: self.min_lr,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            grad_clip: self.grad_clip,
            weight_ema: self.weight_ema,
            eval_every: self.eval_every,
            samples: self.samples,
            log_every: self.log_every,
            checkpoint_every_steps: self.checkpoint_every_steps,
            keep_checkpoints: self.keep_checkpoints,
            ..TrainConfig::default()
        }
    }
}

impl PriorLevel {
    /// Its number among so many levels.
    pub fn of(self, levels: usize) -> Result<usize> {
        match self {
            Self::Top => Ok(levels.saturating_sub(1)),
            Self::Number(level) if level < levels => Ok(level),
            Self::Number(level) => {
                let problem = format!(
                    "is {level}, and the codes have {levels} level(s): 0 (the bottom) to {}",
                    levels.saturating_sub(1)
                );
                Err(Error::config("data.level", problem))
            }
        }
    }
}

impl FromStr for PriorLevel {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "top" => Ok(Self::Top),
            number => number.parse().map(Self::Number).map_err(|_| {
                format!("`{number}` is no level: use top, or its number from 0 (the bottom)")
            }),
        }
    }
}

impl fmt::Display for PriorLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Top => f.write_str("top"),
            Self::Number(level) => write!(f, "{level}"),
        }
    }
}

impl TryFrom<String> for PriorLevel {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<PriorLevel> for String {
    fn from(level: PriorLevel) -> Self {
        level.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_comes_back_as_it_was_written() {
        let recipe = PriorRecipe::default()
            .with_override("prior.network.kind=transformer")
            .unwrap()
            .with_override("prior.network.layers=3")
            .unwrap()
            .with_override("data.level=1")
            .unwrap()
            .with_override("train.lr=2e-3")
            .unwrap();
        assert_eq!(recipe.data.level, PriorLevel::Number(1));
        let again = PriorRecipe::from_toml(&recipe.to_toml().unwrap(), "test").unwrap();
        assert_eq!(again, recipe);
        recipe.validate().unwrap();
        assert_eq!(recipe.with_kind("transformer").unwrap(), recipe);
        assert!(matches!(
            recipe.with_kind("pixelcnn").unwrap().prior.network,
            Network::PixelCnn(_)
        ));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |assignment: &str| {
            let recipe = PriorRecipe::default().with_override(assignment);
            recipe.and_then(|recipe| recipe.validate()).unwrap_err().to_string()
        };
        for (assignment, part) in [
            ("train.beta=1", "beta"),
            ("train.lr=0", "train.lr"),
            ("prior.dropout=2", "prior.dropout"),
            ("prior.network.kind=rnn", "pixelcnn or transformer"),
            ("data.level=middle", "middle"),
            ("data.held_out_share=1", "data.held_out_share"),
        ] {
            assert!(refused(assignment).contains(part), "{}", refused(assignment));
        }
        assert!(
            PriorLevel::Number(2).of(2).unwrap_err().to_string().contains("0 (the bottom) to 1")
        );
        let error = PriorRecipe::from_toml("[train]\nepoch = 3\n", "mine.toml").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn a_resumed_run_keeps_its_prior() {
        let was = PriorRecipe::default();
        let more = was.with_override("train.epochs=99").unwrap();
        assert_eq!(more.check_resume(&was).unwrap(), ["train.epochs: 30 → 99"]);
        let mut other = was.clone();
        other.prior.tokenizer = "x".to_owned();
        assert!(other.check_resume(&was).unwrap_err().to_string().contains("prior.tokenizer"));
    }
}

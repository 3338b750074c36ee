//! One run of a comparison, and where it is.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::statistics::median;
use crate::recipe_toml::first_difference;
use crate::run_folder::FAILURE_FILE;
use crate::{EpochRecord, Error, Recipe, Result, RunFolder, file, read_metrics, read_progress};

/// One run of a comparison.
#[derive(Clone, Debug)]
pub struct PlannedRun {
    /// The index of its variant.
    pub(super) variant: usize,
    /// The name of its variant.
    pub name: String,
    /// Its seed.
    pub seed: u64,
    /// Its run folder.
    pub folder: PathBuf,
    /// Its recipe.
    pub recipe: Recipe,
}

/// Where a run is, as its folder says.
#[derive(Clone, Debug, PartialEq)]
pub enum RunState {
    /// It has not been started.
    Missing,
    /// It was started and can go on.
    Begun,
    /// All its epochs are done.
    Done(RunFigures),
    /// It failed; trying again would give the same. Its error, in one line.
    Failed(String),
}

/// What a run came to, from the evaluation of the whole test split after its last epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct RunFigures {
    /// Mean squared error over all pixels in [0, 1].
    pub mse: f64,
    /// In dB, averaged over the images.
    pub psnr: f64,
    /// Averaged over the images.
    pub ssim: f64,
    /// Of each level; of several codebooks the geometric mean.
    pub perplexity: Vec<f64>,
    /// Of each level; of several codebooks the sum.
    pub codes_in_use: Vec<f64>,
    /// Training speed: the median over the run's steps. None where its metrics file is gone.
    pub images_per_second: Option<f64>,
}

impl PlannedRun {
    /// Where the run is.
    pub fn state(&self) -> Result<RunState> {
        let Ok(folder) = RunFolder::open(&self.folder) else {
            return Ok(RunState::Missing);
        };
        if let Some((key, was, now)) = first_difference(&folder.recipe()?, &self.recipe)? {
            return Err(Error::OtherRecipe { path: self.folder.clone(), key, was, now });
        }
        let failure = self.folder.join(FAILURE_FILE);
        if failure.is_file() {
            let text = fs::read_to_string(&failure).map_err(Error::read(&failure))?;
            return Ok(RunState::Failed(text.trim().to_owned()));
        }
        let Some(checkpoint) = folder.checkpoints().last()? else { return Ok(RunState::Begun) };
        // The trainer finds an earlier checkpoint where this one is damaged.
        let Ok(progress) = read_progress(&checkpoint) else { return Ok(RunState::Begun) };
        let levels = self.recipe.model.levels.len();
        let figures = progress.history.last().and_then(|record| RunFigures::of(record, levels));
        match figures {
            Some(figures) if progress.epoch >= self.recipe.train.epochs => {
                let images_per_second = speed(&folder);
                Ok(RunState::Done(RunFigures { images_per_second, ..figures }))
            }
            _ => Ok(RunState::Begun),
        }
    }

    /// Keeps an error in the run's folder, if it is one of this run alone: diverged, or refused by the
    /// model or the device. Any other, such as a full disk, would befall the other runs too, and is
    /// returned.
    pub fn note_failure(&self, error: Error) -> Result<String> {
        if !matches!(error, Error::NotFinite { .. } | Error::Model(_) | Error::Candle(_)) {
            return Err(error);
        }
        let text = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        file::write_atomic(&self.folder.join(FAILURE_FILE), format!("{text}\n").as_bytes())?;
        Ok(text)
    }
}

impl RunFigures {
    /// Of an epoch's evaluation of a model of so many levels, without the speed; none if there is no
    /// evaluation.
    fn of(record: &EpochRecord, levels: usize) -> Option<Self> {
        let test = record.test.as_ref()?;
        let by_level = |name: &str| {
            let key = |level| if level == 0 { name.to_owned() } else { format!("{name}.{level}") };
            (0..levels).map(|level| test.get(&key(level))).collect::<Option<Vec<f64>>>()
        };
        Some(Self {
            mse: test.get("mse")?,
            psnr: test.get("psnr")?,
            ssim: test.get("ssim")?,
            perplexity: by_level("perplexity")?,
            codes_in_use: by_level("codes_in_use")?,
            images_per_second: None,
        })
    }
}

fn speed(folder: &RunFolder) -> Option<f64> {
    let records = read_metrics(&folder.metrics_file()).ok()?;
    let of_step = |record: &Value| {
        let is_step = record.get("event").is_some_and(|event| event == "step");
        record.get("images_per_second").and_then(Value::as_f64).filter(|_| is_step)
    };
    median(records.iter().filter_map(of_step).collect())
}

//! Pictures in the run folder.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;
use vq_train::{EpochRecord, Event, Observer, RunFolder, Samples, Usage, read_metrics};
use vq_viz::{Panel, Series, image_grid, save_codebook_usage, save_curves, save_png};

use crate::error::{Error, Result};

/// Images in a row of a grid.
pub(crate) const GRID_COLUMNS: usize = 8;
/// White pixels around each.
pub(crate) const GRID_PADDING: u32 = 2;

/// After every evaluation `epoch_N_orig.png` and `epoch_N_recon.png` (with several levels of codes also
/// `epoch_N_recon_level0.png`, … from each alone, 0 = bottom); when the run ends, `curves.svg`
/// and `codebook.svg` (further levels: `codebook.1.svg`, …).
pub(crate) struct Pictures {
    folder: PathBuf,
    metrics: PathBuf,
    /// Of the last evaluation, one histogram per level.
    usage: Vec<Usage>,
}

impl Pictures {
    pub(crate) fn new(run: &RunFolder) -> Self {
        Self { folder: run.path().to_owned(), metrics: run.metrics_file(), usage: Vec::new() }
    }

    fn look(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::EpochFinished(epoch) => {
                let Some(evaluation) = epoch.evaluation else { return Ok(()) };
                self.usage.clone_from(&evaluation.usage);
                let Some(samples) = &evaluation.samples else { return Ok(()) };
                save_samples(&self.folder, &format!("epoch_{}", epoch.record.epoch), samples)
            }
            Event::RunFinished(ended) | Event::RunInterrupted(ended) => {
                self.usage()?;
                self.curves(ended.history)
            }
            _ => Ok(()),
        }
    }

    fn usage(&self) -> Result<()> {
        for (level, usage) in self.usage.iter().enumerate() {
            let (file, title) = match level {
                0 => ("codebook".to_owned(), "Codebook usage on the test split".to_owned()),
                _ => (
                    format!("codebook.{level}"),
                    format!("Codebook usage on the test split, level {level}"),
                ),
            };
            save_usage(&self.folder.join(file), &title, usage)?;
        }
        Ok(())
    }

    /// Losses as in the metrics file, by step; quality and codes, by epoch.
    fn curves(&self, history: &[EpochRecord]) -> Result<()> {
        let records = read_metrics(&self.metrics)?;
        let is_step = |record: &&Value| record.get("event").is_some_and(|event| event == "step");
        let steps: Vec<&Value> = records.iter().filter(is_step).collect();
        let by_step = |name: &str| {
            let number = |record: &Value, key: &str| record.get(key).and_then(Value::as_f64);
            let point = |record: &&Value| Some((number(record, "step")?, number(record, name)?));
            Series::new(name, steps.iter().filter_map(point).collect())
        };
        let test = |name: &str, label: &str| {
            let point =
                |record: &EpochRecord| Some((record.step as f64, record.test.as_ref()?.get(name)?));
            Series::new(label, history.iter().filter_map(point).collect())
        };
        let train = |name: &str, label: &str| {
            let point = |record: &EpochRecord| Some((record.step as f64, record.train.get(name)?));
            Series::new(label, history.iter().filter_map(point).collect())
        };
        // A codebook that is not trained by gradients has no loss.
        let losses = ["loss", "reconstruction", "codebook", "commitment", "entropy"].map(by_step);
        let losses =
            losses.into_iter().filter(|series| series.points.iter().any(|(_, y)| *y > 0.0));
        let codes = [
            train("perplexity", "perplexity, train"),
            test("perplexity", "perplexity, test"),
            test("codes_in_use", "codes in use, test"),
        ];
        let panels = [
            Panel::new("Training loss", losses.collect()).axes("step", "").log_y(),
            Panel::new("PSNR on the test split", vec![test("psnr", "PSNR")]).axes("step", "dB"),
            Panel::new("SSIM on the test split", vec![test("ssim", "SSIM")]).axes("step", ""),
            Panel::new("Codebook", codes.into()).axes("step", "codes"),
        ];
        save_curves(&self.folder.join("curves.svg"), "Training", &panels)?;
        Ok(())
    }
}

/// `NAME_orig.png`, `NAME_recon.png` and, where there are several levels, `NAME_recon_level0.png`, ….
pub(crate) fn save_samples(folder: &Path, name: &str, samples: &Samples) -> Result<()> {
    let save = |images: &Tensor, what: &str| -> Result<()> {
        let grid = image_grid(images, GRID_COLUMNS, GRID_PADDING)?;
        Ok(save_png(&grid, &folder.join(format!("{name}_{what}.png")))?)
    };
    save(&samples.originals, "orig")?;
    save(&samples.reconstructions, "recon")?;
    let mut levels = samples.levels.iter().enumerate();
    levels.try_for_each(|(level, images)| save(images, &format!("recon_level{level}")))
}

/// `PATH.svg`, or `PATH-0.svg`, `PATH-1.svg`, … of each of several codebooks.
pub(crate) fn save_usage(path: &Path, title: &str, usage: &Usage) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    for (codebook, counts) in usage.by_codebook().enumerate() {
        let (file, title) = if usage.codebooks > 1 {
            (format!("{name}-{codebook}.svg"), format!("{title}, codebook {codebook}"))
        } else {
            (format!("{name}.svg"), title.to_owned())
        };
        save_codebook_usage(&path.with_file_name(file), &title, counts)?;
    }
    Ok(())
}

impl Observer for Pictures {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.look(event).map_err(|error: Error| error.into())
    }
}

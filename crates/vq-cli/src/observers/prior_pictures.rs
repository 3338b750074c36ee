//! Pictures in the run folder of a prior.

use std::path::PathBuf;

use vq_train::{EpochRecord, Event, Observer, RunFolder};
use vq_viz::{Panel, Series, image_grid, save_curves, save_png};

use super::class_columns;
use super::pictures::{GRID_COLUMNS, GRID_PADDING};
use crate::error::{Error, Result};

/// After every evaluation `epoch_N_samples.png`; when the run ends, `curves.svg`.
pub(crate) struct PriorPictures {
    folder: PathBuf,
    columns: usize,
}

impl PriorPictures {
    /// A top prior draws its classes in turn, and each gets a column; those of a prior below are the classes of
    /// the held-out images whose codes it is given.
    pub(crate) fn new(run: &RunFolder, config: &vq_prior::Config) -> Self {
        let columns = match config.conditioning[..] {
            [] => class_columns(config.class_count),
            _ => GRID_COLUMNS,
        };
        Self { folder: run.path().to_owned(), columns }
    }

    fn look(&self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::EpochFinished(epoch) => {
                let drawn = epoch.evaluation.and_then(|evaluation| evaluation.drawn.as_ref());
                let Some(drawn) = drawn else { return Ok(()) };
                let file = format!("epoch_{}_samples.png", epoch.record.epoch);
                let grid = image_grid(drawn, self.columns, GRID_PADDING)?;
                Ok(save_png(&grid, &self.folder.join(file))?)
            }
            Event::RunFinished(ended) | Event::RunInterrupted(ended) => self.curves(ended.history),
            _ => Ok(()),
        }
    }

    fn curves(&self, history: &[EpochRecord]) -> Result<()> {
        let train =
            |record: &EpochRecord| Some((record.step as f64, record.train.get("bits_per_code")?));
        let test = |name: &'static str, label: &str| {
            let point = move |record: &EpochRecord| {
                Some((record.step as f64, record.test.as_ref()?.get(name)?))
            };
            Series::new(label, history.iter().filter_map(point).collect())
        };
        let bits = vec![
            Series::new("train", history.iter().filter_map(train).collect()),
            test("bits_per_code", "held out"),
            test("unigram_bits_per_code", "unigram"),
        ];
        let panels = [Panel::new("Bits per code", bits).axes("step", "bits")];
        save_curves(&self.folder.join("curves.svg"), "Training of the prior", &panels)?;
        Ok(())
    }
}

impl Observer for PriorPictures {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.look(event).map_err(|error: Error| error.into())
    }
}

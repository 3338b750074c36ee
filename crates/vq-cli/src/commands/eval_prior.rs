//! `vq eval` of a prior.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::{Map, Value, json};
use vq_prior::Prior;
use vq_train::{RECIPE_FILE, RunFolder, evaluate_prior};

use crate::cli::LogFormat;
use crate::error::{Error, Result};
use crate::output;

/// Judges the prior in `folder` on `codes`, or on those that its run held out.
pub(super) fn run(
    folder: &Path,
    codes: Option<&PathBuf>,
    batch_size: usize,
    device: &Device,
    format: LogFormat,
) -> Result<()> {
    let whole = std::fs::canonicalize(folder).map_err(Error::read(folder))?;
    let run = whole.ancestors().take(3).find(|path| path.join(RECIPE_FILE).is_file());
    let Some(run) = run else {
        return Err(Error::other(format!(
            "{} is a prior without its run, and nothing says what codes it learned: give the run's folder",
            folder.display()
        )));
    };
    let mut data = RunFolder::open(run)?.prior_recipe()?.data;
    if let Some(codes) = codes {
        data.held_out = Some(codes.clone());
    }
    let prior = Prior::from_pretrained(folder, device)?;
    let (metrics, images) = evaluate_prior(&prior, &data, batch_size)?;
    let judged = data.held_out.as_ref().unwrap_or(&data.codes);
    let mut record = Map::new();
    record.insert("event".into(), "evaluated".into());
    record.insert("model".into(), json!(folder));
    record.insert("data".into(), json!(judged));
    record.insert("images".into(), images.into());
    let mut text =
        format!("{} on codes of {images} images of {}", folder.display(), judged.display());
    for (name, value) in metrics.iter() {
        record.insert(name.into(), value.into());
        let _ = write!(text, "\n  {name:22} {value:.6}");
    }
    output::result(format, text, &Value::Object(record))
}

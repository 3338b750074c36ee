//! `vq eval` of a prior.

use std::fmt::Write as _;
use std::path::Path;

use candle_core::Device;
use serde_json::{Map, Value};
use vq_train::{RECIPE_FILE, RunFolder, UnigramSource, evaluate_prior};

use crate::cli::LogFormat;
use crate::error::{Error, Result};
use crate::output;

/// Judges the prior in `folder` on `codes`, or on those that its run held out.
pub(super) fn run(
    folder: &Path,
    codes: Option<&Path>,
    batch_size: usize,
    device: &Device,
    format: LogFormat,
) -> Result<()> {
    let whole = std::fs::canonicalize(folder).map_err(Error::read(folder))?;
    let run = whole.ancestors().take(3).find(|path| path.join(RECIPE_FILE).is_file());
    let data = match run {
        Some(run) => Some(RunFolder::open(run)?.prior_recipe()?.data),
        None => None,
    };
    let figures = evaluate_prior(folder, codes, data.as_ref(), batch_size, device)?;
    let (images, codes) = (figures.images, figures.codes);
    let mut record = Map::new();
    record.insert("event".into(), "evaluated".into());
    record.insert("model".into(), output::path(folder).into());
    record.insert("data".into(), output::path(&codes).into());
    record.insert("images".into(), images.into());
    let mut text =
        format!("{} on codes of {images} images of {}", folder.display(), codes.display());
    for (name, value) in figures.metrics.iter() {
        record.insert(name.into(), value.into());
        let _ = write!(text, "\n  {name:22} {value:.6}");
    }
    let source = match figures.unigram {
        UnigramSource::Training => "training codes",
        UnigramSource::Judged => "judged codes",
    };
    record.insert("unigram_from".into(), source.into());
    if figures.unigram == UnigramSource::Judged {
        text.push_str(
            "\n  unigram: by the frequencies of these codes themselves, since those of the training codes are \
             not stored with the prior and the codes are not there",
        );
    }
    output::result(format, text, &Value::Object(record))
}

//! How well a prior predicts codes.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use vq_model::CONFIG_FILE;
use vq_prior::Prior;

use crate::prior_codes::PriorCodes;
use crate::recipe_toml::first_difference;
use crate::{Error, Metrics, PriorDataConfig, Result};

/// Whether a model's folder (see [`resolve_model`](crate::resolve_model)) holds a prior, and not a tokenizer.
pub fn is_prior(folder: impl AsRef<Path>) -> Result<bool> {
    let path = folder.as_ref().join(CONFIG_FILE);
    let bytes = std::fs::read(&path).map_err(Error::read(&path))?;
    // What is no JSON is for the loader to complain about.
    let config: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
    Ok(config.get("network").is_some() && config.get("codebook_sizes").is_some())
}

/// The figures of [`PriorTask`](crate::PriorTask) of a prior on the held-out codes of `data`, and on how many
/// images. The codes must be of the model that the prior is for.
pub fn evaluate_prior(
    prior: &Prior,
    data: &PriorDataConfig,
    batch_size: usize,
) -> Result<(Metrics, usize)> {
    let (train, held_out) = PriorCodes::open(data, &prior.config().tokenizer)?;
    let expected = held_out.resolve(prior.config());
    if let Some((key, was, now)) = first_difference(prior.config(), &expected)? {
        let problem =
            format!("is {was} in the prior and {now} in the codes: give those of its level");
        return Err(Error::Config { key: format!("prior.{key}"), problem });
    }
    let histograms = train.histograms()?;
    let of_level = histograms.get(train.level()).map(Vec::as_slice).unwrap_or_default();
    let unigram_bits = held_out.unigram_bits(of_level)?;
    let never = AtomicBool::new(false);
    let metrics = judge(prior, &held_out, unigram_bits, batch_size, &never)?;
    metrics
        .map(|metrics| (metrics, held_out.len()))
        .ok_or(Error::Data(vq_data::Error::EmptySplit { split: "held-out" }))
}

/// The same of codes that are open; `None` if stopped.
pub(crate) fn judge(
    prior: &Prior,
    codes: &PriorCodes,
    unigram_bits: f64,
    batch_size: usize,
    stop: &AtomicBool,
) -> Result<Option<Metrics>> {
    let images: Vec<usize> = (0..codes.len()).collect();
    let mut nats = 0.0;
    for indices in images.chunks(batch_size.max(1)) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = codes.batch(indices)?;
        for value in prior.log_likelihood(&batch.codes, &batch.conditions())? {
            nats -= value;
        }
    }
    let per_image = nats / images.len() as f64;
    let per_code = per_image / prior.config().codes_per_image() as f64;
    let metrics = Metrics::new()
        .with("nats_per_code", per_code)
        .with("bits_per_code", per_code / std::f64::consts::LN_2)
        .with("bits_per_image", per_image / std::f64::consts::LN_2)
        .with("unigram_bits_per_code", unigram_bits);
    Ok(Some(metrics))
}

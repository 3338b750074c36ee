//! How well a prior predicts codes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use vq_prior::Prior;

use crate::prior_codes::PriorCodes;
use crate::recipe_toml::first_difference;
use crate::unigram::Unigram;
use crate::{Error, Metrics, PriorDataConfig, Result};

/// What [`evaluate_prior`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct PriorFigures {
    /// The figures of [`PriorTask`](crate::PriorTask) at the end of an epoch.
    pub metrics: Metrics,
    /// The folder of the codes that it was judged on.
    pub codes: PathBuf,
    /// The number of images that it was judged on.
    pub images: usize,
    /// What `unigram_bits_per_code` rests on.
    pub unigram: UnigramSource,
}

/// The codes whose frequencies are the unigram baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnigramSource {
    /// Those that the prior learned.
    Training,
    /// The very ones that it is judged on, where the others are not known: somewhat harder to beat, as they
    /// fit these codes better than frequencies counted elsewhere.
    Judged,
}

/// Judges the prior in a model's folder (see [`resolve_model`](crate::resolve_model)) on the folder `codes`,
/// or without one on the codes that its run held out, which the recipe `data` of the run says. The model that
/// the prior is for must have made them.
///
/// The unigram baseline is that of the prior's training codes: as stored with the prior
/// ([`UNIGRAM_FILE`](crate::UNIGRAM_FILE)), or counted where `data` finds them. Where neither is there it is
/// counted on the codes at hand.
pub fn evaluate_prior(
    folder: &Path,
    codes: Option<&Path>,
    data: Option<&PriorDataConfig>,
    batch_size: usize,
    device: &Device,
) -> Result<PriorFigures> {
    let prior = Prior::from_pretrained(folder, device)?;
    let (hash, above) = (&prior.config().tokenizer, prior.config().conditioning.len());
    let held_out = data.and_then(|data| data.held_out.as_deref());
    let judged = match (codes.or(held_out), data) {
        (Some(path), _) => PriorCodes::open_whole(path, hash, above)?,
        (None, Some(data)) => PriorCodes::open(data, hash)?.1,
        (None, None) => {
            let problem = "is a prior without its run, and nothing says what codes it learned: give the codes to \
                           judge it on (--codes), or the run's folder";
            return Err(Error::NoRun { path: folder.to_path_buf(), problem: problem.to_owned() });
        }
    };
    let expected = judged.resolve(prior.config());
    if let Some((key, was, now)) = first_difference(prior.config(), &expected)? {
        let problem =
            format!("is {was} in the prior and {now} in the codes: give those of its level");
        return Err(Error::Config { key: format!("prior.{key}"), problem });
    }
    let (unigram, source) = match Unigram::load(folder, &prior.config().codebook_sizes)? {
        Some(stored) => (stored, UnigramSource::Training),
        None => match data.map(|data| PriorCodes::open(data, hash)) {
            Some(Ok((train, _))) => (Unigram::of(&train)?, UnigramSource::Training),
            _ => (Unigram::of(&judged)?, UnigramSource::Judged),
        },
    };
    let (bits, never) = (unigram.bits(&judged)?, AtomicBool::new(false));
    let metrics = judge(&prior, &judged, bits, batch_size, &never)?
        .ok_or(Error::Data(vq_data::Error::EmptySplit { split: "held-out" }))?;
    let (codes, images) = (judged.path().to_path_buf(), judged.len());
    Ok(PriorFigures { metrics, codes, images, unigram: source })
}

/// The metrics of a prior on codes; `None` if stopped.
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

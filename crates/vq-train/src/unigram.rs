//! How often a prior's training codes were each code: what the prior must beat, and is stored with it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::prior_codes::PriorCodes;
use crate::{Error, Result, file};

/// The file of the counts, in every checkpoint of a prior: a prior is judged by the same baseline where the
/// codes that it learned are not at hand.
pub const UNIGRAM_FILE: &str = "unigram.json";

/// How often each code of one level was chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Unigram {
    /// `[code of the position][K]`.
    counts: Vec<Vec<u64>>,
}

impl Unigram {
    /// Of the prior's level, counted on those codes.
    pub(crate) fn of(codes: &PriorCodes) -> Result<Self> {
        Ok(Self::of_level(&codes.histograms()?, codes.level()))
    }

    /// Of one level of all.
    pub(crate) fn of_level(histograms: &[Vec<Vec<u64>>], level: usize) -> Self {
        Self { counts: histograms.get(level).cloned().unwrap_or_default() }
    }

    /// Bits per code of `codes` under these frequencies, whatever the position, each count with one added.
    pub(crate) fn bits(&self, codes: &PriorCodes) -> Result<f64> {
        let own = Self::of(codes)?;
        let (mut bits, mut codes) = (0.0, 0);
        for (own, known) in own.counts.iter().zip(&self.counts) {
            let total = (known.iter().sum::<u64>() + known.len() as u64) as f64;
            for (&count, &known) in own.iter().zip(known) {
                bits -= count as f64 * ((known + 1) as f64 / total).log2();
                codes += count;
            }
        }
        Ok(bits / codes.max(1) as f64)
    }

    /// Writes the counts into a checkpoint's folder, atomically.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(UNIGRAM_FILE);
        let json = serde_json::to_vec(self).map_err(|error| damaged(&path, error))?;
        file::write_atomic(&path, &json)
    }

    /// Those in a checkpoint's folder, for a prior of those K; nothing where there are none.
    pub(crate) fn load(folder: &Path, codebook_sizes: &[usize]) -> Result<Option<Self>> {
        let path = folder.join(UNIGRAM_FILE);
        let json = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(Error::read(&path))?,
        };
        let unigram: Self = serde_json::from_slice(&json).map_err(|error| damaged(&path, error))?;
        if !unigram.counts.iter().map(Vec::len).eq(codebook_sizes.iter().copied()) {
            return Err(damaged(&path, "its counts are of other codebooks than the prior's"));
        }
        Ok(Some(unigram))
    }
}

fn damaged(path: &Path, cause: impl std::fmt::Display) -> Error {
    Error::DamagedCheckpoint {
        path: path.to_path_buf(),
        cause: cause.to_string(),
        advice: "copy it again, or delete this file: the frequencies are then counted anew"
            .to_owned(),
    }
}

//! From logits to a code.

use crate::{Error, Result};

/// How codes are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// Logits are divided by it; 0 = always the most probable code.
    pub temperature: f64,
    /// Only so many of the most probable codes can be drawn; 0 = all.
    pub top_k: usize,
    /// Only the fewest most probable codes whose probabilities add up to it can be drawn, at least one
    /// (Holtzman et al. 2020, eq. 2 and 3); 1 = all.
    pub top_p: f64,
    /// s of classifier-free guidance: logits = none + s·(class − none) (Ho & Salimans 2022, eq. 6, with
    /// s = 1 + w). 1 = off, and the cost is half of any other value's.
    pub guidance: f64,
    /// The same seed gives the same codes.
    pub seed: u64,
    /// The number of the first image, for drawing many images in several batches: an image's codes depend
    /// on the seed and its number, not on its batch.
    pub first_image: u64,
    /// Compute everything anew for every code, to check the incremental computation.
    pub recompute: bool,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            guidance: 1.0,
            seed: 0,
            first_image: 0,
            recompute: false,
        }
    }
}

impl SampleOptions {
    /// Checks every value; the error names the key.
    pub fn validate(&self) -> Result<()> {
        let check = |key: &str, fits: bool, problem: &str, value: f64| {
            if fits { Ok(()) } else { Err(Error::config(key, format!("{problem}, got {value}"))) }
        };
        let Self { temperature, top_p, guidance, .. } = *self;
        let fits = temperature >= 0.0 && temperature.is_finite();
        check("temperature", fits, "must be at least 0", temperature)?;
        check("top_p", top_p > 0.0 && top_p <= 1.0, "must be above 0 and at most 1", top_p)?;
        check("guidance", guidance.is_finite(), "must be finite", guidance)
    }
}

/// The probabilities that a code is drawn with, after temperature, top-k and top-p; their sum is 1 to
/// rounding. Among equal logits the lower code counts as the more probable. An error where a logit is not
/// finite (−∞ may stand for a code that is impossible).
pub fn probabilities(logits: &[f32], options: &SampleOptions) -> Result<Vec<f64>> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    if !max.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::Input(
            "the prior's logits are not finite: its weights have diverged; take an earlier checkpoint"
                .to_owned(),
        ));
    }
    // Most probable first. A stable sort keeps the lower of equal ones in front.
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let logit = |index: usize| logits.get(index).copied().unwrap_or(f32::NEG_INFINITY);
    let restricted = options.top_k > 0 || options.top_p < 1.0 || options.temperature <= 0.0;
    if restricted {
        order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
    }
    if options.temperature <= 0.0 {
        order.truncate(1);
    }
    if options.top_k > 0 {
        order.truncate(options.top_k);
    }
    let weight = |&index: &usize| match f64::from(logit(index) - max) {
        // 0 / 0 is no number.
        difference if difference >= 0.0 => 1.0,
        difference => (difference / options.temperature).exp(),
    };
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = order.len();
    if options.top_p < 1.0 {
        let mut sum = 0.0;
        let enough = |weight: &f64| {
            sum += weight;
            sum >= options.top_p * total
        };
        kept = weights.iter().position(enough).map_or(kept, |last| last + 1);
    }
    let total: f64 = weights.iter().take(kept).sum();
    let mut result = vec![0.0; logits.len()];
    for (index, weight) in order.into_iter().zip(weights).take(kept) {
        if let Some(probability) = result.get_mut(index) {
            *probability = weight / total;
        }
    }
    Ok(result)
}

/// The code that `uniform` in [0, 1) draws: the first at which the sum of the
/// [`probabilities`] exceeds it.
pub fn choose(logits: &[f32], options: &SampleOptions, uniform: f64) -> Result<u32> {
    let mut sum = 0.0;
    let mut last = 0;
    for (code, probability) in probabilities(logits, options)?.into_iter().enumerate() {
        if probability > 0.0 {
            sum += probability;
            last = code as u32;
            if sum > uniform {
                break;
            }
        }
    }
    // Rounding may leave the sum just below `uniform`: then it is the last possible code.
    Ok(last)
}

//! What a comparison has come to so far.

use std::cmp::Ordering;

use super::{Comparison, RunFigures, RunState, Spread};
use crate::Metrics;

/// What a comparison has come to so far: its variants, the best first.
#[derive(Clone, Debug)]
pub struct Summary {
    /// One paragraph: what was trained on what.
    pub conditions: String,
    /// The variant that the others are measured against.
    pub baseline: String,
    /// Bits an image of the base recipe.
    pub bits_per_image: f64,
    /// Seeds that each variant gets.
    pub seeds: usize,
    /// The variants by falling PSNR; those without a figure come last.
    pub rows: Vec<Row>,
    /// The runs in their order: variant, seed, bits an image, state.
    pub(super) runs: Vec<(String, u64, f64, RunState)>,
}

/// What has become of a variant so far.
#[derive(Clone, Debug)]
pub struct Row {
    /// The variant.
    pub name: String,
    /// Whether it is the one that the others are measured against.
    pub is_baseline: bool,
    /// Bits an image.
    pub bits_per_image: f64,
    /// How many codebooks of how many codes each level has.
    pub codebooks: Vec<(usize, usize)>,
    /// Over the seeds that are done: `mse`, `psnr`, `ssim`, none if there are none.
    pub mse: Option<Spread>,
    /// As [`RunFigures::psnr`].
    pub psnr: Option<Spread>,
    /// As [`RunFigures::ssim`].
    pub ssim: Option<Spread>,
    /// As [`RunFigures::perplexity`], by level.
    pub perplexity: Vec<Spread>,
    /// As [`RunFigures::codes_in_use`], by level.
    pub codes_in_use: Vec<Spread>,
    /// As [`RunFigures::images_per_second`].
    pub images_per_second: Option<Spread>,
    /// Seeds that are done.
    pub done: usize,
    /// Seeds that failed, and why.
    pub failures: Vec<(u64, String)>,
    /// What differs from the base recipe.
    pub changes: Vec<String>,
}

impl Summary {
    /// Of a comparison whose runs are in these states. `conditions` says what was trained on what.
    pub fn new(comparison: &Comparison, states: &[RunState], conditions: String) -> Self {
        let runs = || comparison.runs.iter().zip(states);
        let mut rows: Vec<Row> = Vec::new();
        for (index, variant) in comparison.variants.iter().enumerate() {
            let own = || runs().filter(|(run, _)| run.variant == index);
            let figures: Vec<&RunFigures> = own()
                .filter_map(|(_, state)| match state {
                    RunState::Done(figures) => Some(figures),
                    _ => None,
                })
                .collect();
            let failures = own().filter_map(|(run, state)| match state {
                RunState::Failed(error) => Some((run.seed, error.clone())),
                _ => None,
            });
            let spread = |of: &dyn Fn(&RunFigures) -> Option<f64>| {
                Spread::of(&figures.iter().filter_map(|figures| of(figures)).collect::<Vec<f64>>())
            };
            let levels = &variant.recipe.model.levels;
            let by_level = |of: &dyn Fn(&RunFigures) -> &[f64]| {
                let level = |level: usize| spread(&|figures| of(figures).get(level).copied());
                (0..levels.len()).filter_map(level).collect::<Vec<Spread>>()
            };
            rows.push(Row {
                name: variant.name.clone(),
                is_baseline: variant.name == comparison.baseline,
                bits_per_image: variant.recipe.model.bits_per_image(),
                codebooks: levels
                    .iter()
                    .map(|level| &level.quantizer)
                    .map(|quantizer| (quantizer.codes_per_position(), quantizer.codebook_size))
                    .collect(),
                mse: spread(&|figures| Some(figures.mse)),
                psnr: spread(&|figures| Some(figures.psnr)),
                ssim: spread(&|figures| Some(figures.ssim)),
                perplexity: by_level(&|figures| &figures.perplexity),
                codes_in_use: by_level(&|figures| &figures.codes_in_use),
                images_per_second: spread(&|figures| figures.images_per_second),
                done: figures.len(),
                failures: failures.collect(),
                changes: variant.changes.clone(),
            });
        }
        rows.sort_by(|a, b| by_psnr(b).partial_cmp(&by_psnr(a)).unwrap_or(Ordering::Equal));
        Self {
            conditions,
            baseline: comparison.baseline.clone(),
            bits_per_image: comparison.base.model.bits_per_image(),
            seeds: runs().filter(|(run, _)| run.variant == 0).count(),
            rows,
            runs: runs()
                .map(|(run, state)| {
                    let bits = run.recipe.model.bits_per_image();
                    (run.name.clone(), run.seed, bits, state.clone())
                })
                .collect(),
        }
    }

    /// The variants whose mean PSNR is below that of the baseline, with the difference in dB and whether
    /// it is larger than the deviation of both. None while the baseline has no figure.
    pub fn worse(&self) -> Option<Vec<(&str, f64, bool)>> {
        let baseline = self.rows.iter().find(|row| row.is_baseline)?.psnr?;
        let worse = self.rows.iter().filter_map(|row| {
            let psnr = row.psnr?;
            let difference = psnr.mean - baseline.mean;
            let deviation = |spread: Spread| spread.deviation.unwrap_or(0.0);
            let is_clear = -difference > deviation(psnr).max(deviation(baseline));
            (difference < 0.0).then_some((row.name.as_str(), difference, is_clear))
        });
        Some(worse.collect())
    }
}

impl Row {
    /// The means by name, with those of further levels as `perplexity.1` and so on.
    pub fn means(&self) -> Metrics {
        let mut metrics = Metrics::new();
        let mut set = |name: &str, spread: Option<Spread>| {
            if let Some(spread) = spread {
                metrics.set(name, spread.mean);
            }
        };
        set("mse", self.mse);
        set("psnr", self.psnr);
        set("ssim", self.ssim);
        for (name, spreads) in
            [("perplexity", &self.perplexity), ("codes_in_use", &self.codes_in_use)]
        {
            for (level, spread) in spreads.iter().enumerate() {
                let suffix = if level == 0 { String::new() } else { format!(".{level}") };
                set(&format!("{name}{suffix}"), Some(*spread));
            }
        }
        set("images_per_second", self.images_per_second);
        metrics
    }

    /// The codes of all codebooks of all levels.
    pub fn codes(&self) -> usize {
        self.codebooks.iter().map(|(count, size)| count * size).sum()
    }
}

/// None sorts below every figure.
fn by_psnr(row: &Row) -> Option<f64> {
    row.psnr.map(|spread| spread.mean)
}

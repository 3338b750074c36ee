//! Codebook maintenance after an optimizer's step: moving averages and the revival of dead codes.

use candle_core::{Tensor, Var};
use vq_ops::{CodebookAverages, StepNumber, average_codebook, code_statistics};

use super::VectorQuantizer;
use super::kmeans::seed_rows;
use crate::random::Stream;
use crate::{Error, Result};

/// Settings of [`VqVae::update_codebooks`](crate::VqVae::update_codebooks).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CodebookUpdate {
    /// A code whose moving average of uses N falls below this share of the mean, tokens per step / K,
    /// is moved onto a vector of the batch. Relative, so that it means the same for every batch size,
    /// grid and K; 0 switches revival off. Must be below 1. Off the CPU it is looked at in every tenth step
    /// only, for that has to wait for the device.
    pub revive_threshold: f64,
    /// Which vectors are drawn depends on this and on the step alone.
    pub seed: u64,
}

/// What an update did to one codebook.
#[derive(Clone, Debug)]
pub struct CodebookReport {
    /// How often each of the K codes was chosen in this step: `[K]` f32, on the model's device.
    pub counts: Tensor,
    /// The codes that were moved onto vectors of the batch, in ascending order.
    pub revived: Vec<usize>,
    /// Which codebook it was, e.g. `levels.0.quantizer` or `levels.0.quantizer.stages.1`: what the names of
    /// its tensors begin with.
    pub codebook: String,
    /// With the rule `gradient`: the name of the codebook's parameter. The optimizer must set its
    /// moments of the revived rows to zero.
    pub parameter: Option<String>,
}

impl CodebookReport {
    /// How often each of the K codes was chosen in this step. Waits for the device.
    pub fn counts(&self) -> Result<Vec<u64>> {
        Ok(self.counts.to_vec1::<f32>()?.into_iter().map(|count| count as u64).collect())
    }

    /// Codes that were chosen at least once in this step.
    pub fn codes_in_use(&self) -> Result<usize> {
        Ok(self.counts()?.iter().filter(|&&count| count > 0).count())
    }

    /// exp of the entropy of this step's codes, in nats: 1 (one code) to K (all alike).
    pub fn perplexity(&self) -> Result<f64> {
        let counts = self.counts()?;
        let total = counts.iter().sum::<u64>() as f64;
        let share = |&count: &u64| count as f64 / total;
        let entropy: f64 = counts.iter().filter(|&&c| c > 0).map(share).map(|p| -p * p.ln()).sum();
        Ok(entropy.exp())
    }
}

/// [`follow`] and then [`revive`]: `z_e` `[…,D]` and its `codes` `[…]` under the codebook as it stands.
pub(super) fn update(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    codes: &Tensor,
    options: &CodebookUpdate,
    step: u64,
) -> Result<CodebookReport> {
    let counts = follow(quantizer, z_e, codes, StepNumber::Known(step))?;
    let revived = revive_if_due(quantizer, z_e, options, step)?;
    Ok(report(quantizer, counts, revived))
}

/// Moves averages and codebook by what was assigned in a step: see [`average_codebook`]. How often each code
/// was chosen, `[K]`. With `cosine`, z and e are of length 1.
pub(super) fn follow(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    codes: &Tensor,
    step: StepNumber<'_>,
) -> Result<Tensor> {
    let z = quantizer.vectors(z_e)?;
    let codes = codes.flatten_all()?;
    let (tokens, config) = (z.dim(0)?, &quantizer.config);
    if codes.dim(0)? != tokens || tokens == 0 {
        let problem = format!("{}: {} codes for {tokens} vectors", quantizer.name, codes.dim(0)?);
        return Err(Error::Input(problem));
    }
    let (counts, sums) = code_statistics(&z, &codes, config.codebook_size)?;
    let vectors = quantizer.sums.as_ref().map(|m| (m.as_tensor(), quantizer.codebook.as_tensor()));
    let averages = CodebookAverages { usage: quantizer.usage.as_tensor(), vectors };
    average_codebook(averages, &counts, &sums, &config.average_rule(), step)?;
    Ok(counts)
}

/// Revives dead codes of a step's `z_e` `[…,D]`, where it is time to look for them.
pub(super) fn revive_if_due(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    options: &CodebookUpdate,
    step: u64,
) -> Result<Vec<usize>> {
    let threshold = options.revive_threshold;
    if threshold <= 0.0 || !looks_for_dead_codes(z_e, step) {
        return Ok(Vec::new());
    }
    let name = format!("{}.revival", quantizer.name);
    let mut stream = Stream::new(options.seed, &name, step);
    revive(quantizer, z_e, threshold, &mut stream)
}

/// What became of the codebook, as it is told.
pub(super) fn report(
    quantizer: &VectorQuantizer,
    counts: Tensor,
    revived: Vec<usize>,
) -> CodebookReport {
    let parameter = quantizer.parameter();
    CodebookReport { counts, revived, codebook: quantizer.name.clone(), parameter }
}

/// Whether codes can be revived after this step: every one on the CPU, every tenth on other devices, where
/// looking means to wait for them.
fn looks_for_dead_codes(z: &Tensor, step: u64) -> bool {
    z.device().is_cpu() || step.is_multiple_of(10)
}

/// The vectors to choose `count` from: on the CPU all of them, elsewhere some, since they have to come from there.
fn sample(z: &Tensor, count: usize, stream: &mut Stream) -> Result<Tensor> {
    let (all, some) = (z.dim(0)?, 2 * count + 256);
    if z.device().is_cpu() || all <= some {
        return Ok(z.clone());
    }
    let rows = stream.distinct(all, some).into_iter().map(|row| row as u32);
    Ok(z.index_select(&Tensor::new(rows.collect::<Vec<u32>>(), z.device())?, 0)?)
}

/// Moves every code with N < `threshold`·tokens/K onto a random vector of `z_e` `[…,D]`; no two onto
/// the same one as long as there are enough. N becomes the mean usage and m = N·e, so that a revived
/// code is no sooner dead than any other, and e = m/N still holds.
fn revive(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    threshold: f64,
    stream: &mut Stream,
) -> Result<Vec<usize>> {
    let (size, dim) = (quantizer.config.codebook_size, quantizer.config.dim);
    let mean_usage = (z_e.elem_count() / dim) as f64 / size as f64;
    let mut usage = quantizer.usage.to_vec1::<f32>()?;
    let is_dead = |&(_, &n): &(usize, &f32)| f64::from(n) < threshold * mean_usage;
    let dead: Vec<usize> = usage.iter().enumerate().filter(is_dead).map(|(code, _)| code).collect();
    if dead.is_empty() {
        return Ok(dead);
    }
    let z = sample(&quantizer.vectors(z_e)?, dead.len(), stream)?;
    let rows = seed_rows(&z.flatten_all()?.to_vec1::<f32>()?, dim, dead.len(), stream);
    let replace = |var: &Var, scale: f32| -> Result<()> {
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        for (&code, row) in dead.iter().zip(rows.chunks_exact(dim)) {
            for (value, z) in values.iter_mut().skip(code * dim).zip(row) {
                *value = z * scale;
            }
        }
        Ok(var.set(&Tensor::from_vec(values, (size, dim), var.device())?)?)
    };
    replace(&quantizer.codebook, 1.0)?;
    if let Some(sums) = &quantizer.sums {
        replace(sums, mean_usage as f32)?;
    }
    for &code in &dead {
        if let Some(n) = usage.get_mut(code) {
            *n = mean_usage as f32;
        }
    }
    quantizer.usage.set(&Tensor::from_vec(usage, size, quantizer.usage.device())?)?;
    Ok(dead)
}

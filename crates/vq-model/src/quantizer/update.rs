//! Codebook maintenance after an optimizer's step: moving averages and the revival of dead codes.

use candle_core::{Tensor, Var};
use vq_ops::code_statistics;

use super::VectorQuantizer;
use super::kmeans::seed_rows;
use crate::random::Stream;
use crate::{CodebookRule, Error, Result};

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

/// `z_e` `[…,D]` and its `codes` `[…]` under the codebook as it stands.
///
/// Rule `ema` (van den Oord et al. 2017, appendix A.1), with n and s the batch's counts and sums:
/// N ← γN + (1 − γ)n, m ← γm + (1 − γ)s, e = m/Ñ. Ñ = (N + ε)/(ΣN + Kε)·ΣN smooths the division and is
/// never kept. A code that was not chosen does not move. With `cosine`, z and e are of length 1.
pub(super) fn update(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    codes: &Tensor,
    options: &CodebookUpdate,
    step: u64,
) -> Result<CodebookReport> {
    let z = quantizer.vectors(z_e)?;
    let codes = codes.flatten_all()?;
    let (tokens, size) = (z.dim(0)?, quantizer.config.codebook_size);
    if codes.dim(0)? != tokens || tokens == 0 {
        let problem = format!("{}: {} codes for {tokens} vectors", quantizer.name, codes.dim(0)?);
        return Err(Error::Input(problem));
    }
    let (counts, sums) = code_statistics(&z, &codes, size)?;
    let decay = quantizer.config.decay_at(step);
    average(&quantizer.usage, &counts, decay)?;
    if let Some(averaged) = &quantizer.sums {
        average(averaged, &sums, decay)?;
        let usage = quantizer.usage.as_detached_tensor();
        let smoothed = smooth(&usage, quantizer.config.epsilon)?;
        let moved = averaged.as_detached_tensor().broadcast_div(&smoothed.unsqueeze(1)?)?;
        let moved = quantizer.scaled(&moved)?;
        let chosen = counts.gt(0.0)?.unsqueeze(1)?.broadcast_as(moved.shape())?.contiguous()?;
        quantizer
            .codebook
            .set(&chosen.where_cond(&moved, &quantizer.codebook.as_detached_tensor())?)?;
    }
    let revived = match options.revive_threshold {
        threshold if threshold > 0.0 && looks_for_dead_codes(&z, step) => {
            let mut stream =
                Stream::new(options.seed, &format!("{}.revival", quantizer.name), step);
            revive(quantizer, &z, threshold, &mut stream)?
        }
        _ => Vec::new(),
    };
    let parameter = match quantizer.config.rule {
        CodebookRule::Gradient => Some(format!("{}.codebook", quantizer.name)),
        CodebookRule::Ema => None,
    };
    Ok(CodebookReport { counts, revived, codebook: quantizer.name.clone(), parameter })
}

/// Whether codes can be revived after this step: every one on the CPU, every tenth on other devices, where
/// looking means to wait for them.
fn looks_for_dead_codes(z: &Tensor, step: u64) -> bool {
    z.device().is_cpu() || step.is_multiple_of(10)
}

/// (N + ε)/(ΣN + Kε)·ΣN of N `[K]`.
fn smooth(usage: &Tensor, epsilon: f64) -> Result<Tensor> {
    let size = usage.elem_count() as f64;
    let total = usage.sum_all()?;
    let sums = usage.affine(1.0, epsilon)?;
    if total.device().is_cpu() {
        let total = f64::from(total.to_scalar::<f32>()?);
        return Ok(sums.affine(total / (total + size * epsilon), 0.0)?);
    }
    // No number leaves the device.
    Ok(sums.broadcast_mul(&(&total / (&total + size * epsilon)?)?)?)
}

/// v ← γv + (1 − γ)x
fn average(var: &Var, x: &Tensor, decay: f64) -> Result<()> {
    let old = var.as_detached_tensor();
    Ok(var.set(&(old.affine(decay, 0.0)? + x.affine(1.0 - decay, 0.0)?)?)?)
}

/// Moves every code with N < `threshold`·tokens/K onto a random vector of `z` `[tokens,D]`; no two onto
/// the same one as long as there are enough. N becomes the mean usage and m = N·e, so that a revived
/// code is no sooner dead than any other, and e = m/N still holds.
fn revive(
    quantizer: &VectorQuantizer,
    z: &Tensor,
    threshold: f64,
    stream: &mut Stream,
) -> Result<Vec<usize>> {
    let (size, dim) = (quantizer.config.codebook_size, quantizer.config.dim);
    let mean_usage = z.dim(0)? as f64 / size as f64;
    let mut usage = quantizer.usage.to_vec1::<f32>()?;
    let is_dead = |&(_, &n): &(usize, &f32)| f64::from(n) < threshold * mean_usage;
    let dead: Vec<usize> = usage.iter().enumerate().filter(is_dead).map(|(code, _)| code).collect();
    if dead.is_empty() {
        return Ok(dead);
    }
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

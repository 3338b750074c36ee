//! A codebook that follows what is assigned to it.

use candle_core::{D, DType, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;

/// The number of a training step, from 1.
#[derive(Clone, Copy, Debug)]
pub enum StepNumber<'a> {
    /// This one.
    Known(u64),
    /// A u32 `[1]` on the device: so that a [recorded](crate::Recording) step can be repeated as another.
    OnDevice(&'a Tensor),
}

impl StepNumber<'_> {
    /// The number; waits for the device where it lies there.
    pub fn read(&self) -> Result<u64> {
        match self {
            Self::Known(step) => Ok(*step),
            Self::OnDevice(step) => Ok(u64::from(step.flatten_all()?.get(0)?.to_scalar::<u32>()?)),
        }
    }
}

/// How a codebook follows its moving averages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AverageRule {
    /// γ, at most.
    pub decay: f64,
    /// In step t, γ is at most t/(t + `warmup`).
    pub warmup: f64,
    /// ε
    pub epsilon: f64,
    /// Whether code vectors are scaled to length 1.
    pub cosine: bool,
}

impl AverageRule {
    /// γ in a step (from 1).
    pub fn decay_at(&self, step: u64) -> f64 {
        let step = step.max(1) as f64;
        self.decay.min(step / (step + self.warmup))
    }
}

/// What moves, in place; f32, contiguous.
#[derive(Clone, Copy, Debug)]
pub struct CodebookAverages<'a> {
    /// N `[K]`: how often each code is chosen in a step.
    pub usage: &'a Tensor,
    /// m `[K, D]`, the sum of the vectors that choose each code in a step, and e `[K, D]`, the code vectors:
    /// of a codebook that is not trained by gradients.
    pub vectors: Option<(&'a Tensor, &'a Tensor)>,
}

/// Moves averages and codebook by a step's `counts` n `[K]` and `sums` s `[K, D]`, as
/// [`code_statistics`](crate::code_statistics) gives them (van den Oord et al. 2017, appendix A.1):
///
/// ```text
/// N ← γN + (1 − γ)n        m ← γm + (1 − γ)s        Ñ = (N + ε)/(ΣN + Kε)·ΣN        e = m/Ñ
/// ```
///
/// Ñ is never kept. A code that was not chosen does not move. On CUDA, nothing waits for the device.
pub fn average_codebook(
    averages: CodebookAverages<'_>,
    counts: &Tensor,
    sums: &Tensor,
    rule: &AverageRule,
    step: StepNumber<'_>,
) -> Result<()> {
    let size = averages.usage.dims1()?;
    let dim = sums.dims2()?.1;
    let fits = counts.dims() == [size]
        && sums.dims() == [size, dim]
        && averages.vectors.is_none_or(|(m, e)| m.dims() == [size, dim] && e.dims() == [size, dim])
        && counts.dtype() == DType::F32
        && sums.dtype() == DType::F32;
    if !fits {
        bail!("counts {:?} and sums {:?} do not fit a codebook of {size}", counts, sums);
    }
    #[cfg(feature = "cuda")]
    if on_cuda(counts.device()) {
        return crate::cuda::codebook::average(averages, counts, sums, rule, step);
    }
    let decay = rule.decay_at(step.read()?);
    average(averages.usage, counts, decay)?;
    let Some((averaged, codebook)) = averages.vectors else { return Ok(()) };
    average(averaged, sums, decay)?;
    let smoothed = smooth(&averages.usage.detach(), rule.epsilon)?;
    let mut moved = averaged.detach().broadcast_div(&smoothed.unsqueeze(1)?)?;
    if rule.cosine {
        let norm = (moved.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        moved = moved.broadcast_div(&norm)?;
    }
    let chosen = counts.gt(0.0)?.unsqueeze(1)?.broadcast_as(moved.shape())?.contiguous()?;
    codebook.slice_set(&chosen.where_cond(&moved, &codebook.detach())?, 0, 0)
}

/// (N + ε)/(ΣN + Kε)·ΣN of N `[K]`.
fn smooth(usage: &Tensor, epsilon: f64) -> Result<Tensor> {
    let size = usage.elem_count() as f64;
    let total = usage.sum_all()?;
    let sums = usage.affine(1.0, epsilon)?;
    if total.device().is_cpu() {
        let total = f64::from(total.to_scalar::<f32>()?);
        return sums.affine(total / (total + size * epsilon), 0.0);
    }
    // No number leaves the device.
    sums.broadcast_mul(&(&total / (&total + size * epsilon)?)?)
}

/// v ← γv + (1 − γ)x
fn average(v: &Tensor, x: &Tensor, decay: f64) -> Result<()> {
    let new = (v.detach().affine(decay, 0.0)? + x.affine(1.0 - decay, 0.0)?)?;
    v.slice_set(&new, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
        Tensor::from_slice(values, dims, &crate::test_device()).unwrap()
    }

    #[test]
    fn averages_move_and_codes_that_were_not_chosen_stay() {
        let rule = AverageRule { decay: 0.9, warmup: 1., epsilon: 1e-5, cosine: false };
        // γ is 1/2 in the first step and 0.9 from the ninth on.
        for (step, decay) in [(1, 0.5f64), (30, 0.9)] {
            let number = tensor(&[0.], &[1]);
            let number = (number + step as f64).unwrap().to_dtype(DType::U32).unwrap();
            for number in [StepNumber::Known(step), StepNumber::OnDevice(&number)] {
                let (usage, sums) = (tensor(&[2., 4.], &[2]), tensor(&[2., 4., 8., 4.], &[2, 2]));
                let codebook = tensor(&[1., 2., 3., 4.], &[2, 2]);
                let averages =
                    CodebookAverages { usage: &usage, vectors: Some((&sums, &codebook)) };
                let (counts, new) = (tensor(&[0., 6.], &[2]), tensor(&[0., 0., 6., 12.], &[2, 2]));
                average_codebook(averages, &counts, &new, &rule, number).unwrap();
                let n = [2. * decay, 4. * decay + 6. * (1. - decay)];
                let m = [8. * decay + 6. * (1. - decay), 4. * decay + 12. * (1. - decay)];
                let total = n[0] + n[1];
                let smoothed = (n[1] + 1e-5) / (total + 2e-5) * total;
                let expected = [1., 2., m[0] / smoothed, m[1] / smoothed];
                for (found, expected) in
                    codebook.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().zip(expected)
                {
                    assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                }
                for (found, expected) in usage.to_vec1::<f32>().unwrap().iter().zip(n) {
                    assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn cosine_codes_are_of_length_1() {
        let rule = AverageRule { decay: 0.5, warmup: 0., epsilon: 1e-5, cosine: true };
        let (usage, sums) = (tensor(&[1.], &[1]), tensor(&[0.6, 0.8, 0.], &[1, 3]));
        let codebook = sums.force_contiguous().unwrap();
        let averages = CodebookAverages { usage: &usage, vectors: Some((&sums, &codebook)) };
        let (counts, new) = (tensor(&[2.], &[1]), tensor(&[0., 1.2, 1.6], &[1, 3]));
        average_codebook(averages, &counts, &new, &rule, StepNumber::Known(5)).unwrap();
        let e = codebook.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = (0.36f32 + 4. + 2.56).sqrt();
        for (found, expected) in e.iter().zip([0.6 / norm, 2. / norm, 1.6 / norm]) {
            assert!((found - expected).abs() < 1e-5, "{e:?}");
        }
    }
}

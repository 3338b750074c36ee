//! The entropy loss of Yu et al. 2023 ("Language Model Beats Diffusion", eq. 5): certain about each
//! vector's code, and all codes in even use.

use candle_core::{D, Tensor};

use crate::Result;

/// Below this a probability counts as 0: p·ln p vanishes, and its gradient stays finite.
const SMALL: f64 = 1e-30;

/// E\[H(code|z)\] − `diversity`·H(E\[code|z\]), in nats, for codes of independent bits with the given
/// log-odds `[N,D]`; a scalar. Differentiable.
///
/// The first term is exact: the entropy of independent bits is the sum of theirs (Zhao et al. 2024, section 4).
/// For the second the bits are cut into groups of `group`, each group's joint distribution is averaged
/// over the N vectors, and the entropies of the groups are added: an upper bound of the entropy of all
/// bits (Zhao et al. 2024, section 4, with groups of 1), and exact where one group holds them all. No table is
/// larger than 2^`group` or N × 2^⌈`group`/2⌉, whatever K is.
pub(super) fn bitwise_entropy_loss(
    log_odds: &Tensor,
    group: usize,
    diversity: f64,
) -> Result<Tensor> {
    // With a = |x|: H(σ(x)) = ln(1 + e⁻ᵃ) + a·σ(−a), which neither overflows nor cancels.
    let size = log_odds.abs()?;
    let small = size.neg()?.exp()?;
    let rest = (&small + 1.0)?;
    let entropy = (rest.log()? + (&size * small.div(&rest)?)?)?;
    let certainty = entropy.sum(D::Minus1)?.mean_all()?;
    if diversity == 0.0 {
        return Ok(certainty);
    }
    let (count, bits) = log_odds.dims2()?;
    // σ(x) = (1 + tanh(x/2))/2 has finite gradients for every x.
    let half = ((log_odds * 0.5)?.tanh()? * 0.5)?;
    let both = Tensor::stack(&[half.affine(-1.0, 0.5)?, half.affine(1.0, 0.5)?], D::Minus1)?;
    let mut evenness = certainty.zeros_like()?;
    for first in (0..bits).step_by(group) {
        let width = group.min(bits - first);
        // The joint of N vectors is [2^a, N] × [N, 2^b]: never N × 2^(a+b).
        let left = joint(&both, first, width.div_ceil(2))?;
        let right = joint(&both, first + width.div_ceil(2), width / 2)?;
        let mean = (left.t()?.matmul(&right)? / count as f64)?;
        evenness = (evenness + entropy_of(&mean)?)?;
    }
    Ok((certainty - (evenness * diversity)?)?)
}

/// E\[H(p)\] − `diversity`·H(E\[p\]), in nats, with p `[N,K]` the softmax of `logits` `[N,K]`; a scalar.
/// Differentiable.
pub(super) fn entropy_loss(logits: &Tensor, diversity: f64) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let exp = shifted.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    let p = exp.broadcast_div(&sum)?;
    let ln_p = shifted.broadcast_sub(&sum.log()?)?;
    let certainty = (&p * ln_p)?.sum(D::Minus1)?.mean_all()?.neg()?;
    Ok((certainty - (entropy_of(&p.mean(0)?)? * diversity)?)?)
}

/// The joint distribution `[N,2^width]` of `width` bits from number `first` on; `both` `[N,D,2]` holds the
/// probabilities of 0 and 1.
fn joint(both: &Tensor, first: usize, width: usize) -> Result<Tensor> {
    let count = both.dim(0)?;
    let mut joint = Tensor::ones((count, 1), both.dtype(), both.device())?;
    for bit in first..first + width {
        let pair = both.narrow(1, bit, 1)?;
        let size = joint.dim(1)? * 2;
        joint = joint.unsqueeze(2)?.broadcast_mul(&pair)?.reshape((count, size))?;
    }
    Ok(joint)
}

/// −Σ p ln p over all elements.
fn entropy_of(p: &Tensor) -> Result<Tensor> {
    Ok((p * p.maximum(SMALL)?.log()?)?.sum_all()?.neg()?)
}

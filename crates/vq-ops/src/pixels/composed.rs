//! The same, composed of candle's operations: for other devices, and for the tests.

use candle_core::{D, DType, Result, Tensor};

use super::{LOG_SCALES, PixelDistribution};

/// As [`super::pixel_likelihood`].
pub(super) fn pixel_likelihood(
    params: &Tensor,
    pixels: &Tensor,
    distribution: PixelDistribution,
) -> Result<Tensor> {
    match distribution {
        PixelDistribution::Categorical => categorical(params, pixels),
        PixelDistribution::LogisticMixture { mixtures } => logistic(params, pixels, mixtures),
    }
}

fn categorical(params: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    let (rows, channels) = pixels.dims2()?;
    let logits = params.reshape((rows, channels, 256))?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(2)?.detach())?;
    let powers = shifted.exp()?;
    let totals = powers.sum_keepdim(2)?;
    let targets = pixels.to_dtype(DType::U32)?.unsqueeze(2)?.contiguous()?;
    let nats = (totals.log()? - shifted.gather(&targets, 2)?)?.squeeze(2)?.sum_keepdim(1)?;
    let ramp: Vec<f32> = (0..256).map(|value| value as f32 / 255.0).collect();
    let ramp = Tensor::from_vec(ramp, (1, 1, 256), params.device())?;
    let means = powers.broadcast_div(&totals)?.broadcast_mul(&ramp)?.sum(2)?.detach();
    Tensor::cat(&[nats, means], 1)
}

fn logistic(params: &Tensor, pixels: &Tensor, mixtures: usize) -> Result<Tensor> {
    let (rows, channels) = pixels.dims2()?;
    let parts = params.reshape((rows, (), mixtures))?;
    // Number `index` of the groups of M numbers: [N,M].
    let part = |index: usize| parts.narrow(1, index, 1)?.squeeze(1);
    let logits = part(0)?;
    let weights = log_softmax(&logits)?;
    let values = (pixels.to_dtype(DType::F32)? * (1.0 / 127.5))?.affine(1.0, -1.0)?;
    let mut terms = weights.clone();
    let (mut means, mut averages): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
    for channel in 0..channels {
        let own = part(1 + channel)?;
        let (mut mean, mut expected) = (own.clone(), own);
        for (before, average) in means.iter().enumerate() {
            let pair = channel * (channel - 1) / 2 + before;
            let coefficient = part(1 + 2 * channels + pair)?.tanh()?;
            mean = (mean + coefficient.broadcast_mul(&values.narrow(1, before, 1)?)?)?;
            expected = (expected + coefficient.mul(average)?)?;
        }
        let expected = expected.clamp(-1f32, 1f32)?;
        let average = (weights.exp()?.mul(&expected)?.sum_keepdim(1)? * 0.5)?.affine(1.0, 0.5)?;
        averages.push(average.detach());
        means.push(expected);
        let log_scale = part(1 + channels + channel)?;
        let log_scale = log_scale.clamp(*LOG_SCALES.start(), *LOG_SCALES.end())?;
        let inverse = log_scale.neg()?.exp()?;
        let centred = values.narrow(1, channel, 1)?.broadcast_sub(&mean)?;
        let (p, q) = (
            centred.affine(1.0, 1.0 / 255.0)?.mul(&inverse)?,
            centred.affine(1.0, -1.0 / 255.0)?.mul(&inverse)?,
        );
        // 1 − e^(−w) = 2t / (1 + t) with t = tanh(w / 2), which does not cancel for small w.
        let t = (inverse * (1.0 / 255.0))?.tanh()?;
        let width = (&t * 2.0)?.div(&t.affine(1.0, 1.0)?)?.log()?;
        let (low, high) = (log_sigmoid(&p)?, log_sigmoid(&q.neg()?)?);
        let between = ((&low + &high)? + width)?;
        let pixel = pixels.narrow(1, channel, 1)?.broadcast_as(p.shape())?;
        let mass = pixel.eq(255u8)?.where_cond(&high, &between)?;
        terms = (terms + pixel.eq(0u8)?.where_cond(&low, &mass)?)?;
    }
    let max = terms.max_keepdim(1)?.detach();
    let nats = (terms.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?.neg()?;
    let mut columns = vec![nats];
    columns.extend(averages);
    Tensor::cat(&columns, 1)
}

fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// ln σ(x) = min(x, 0) − ln(1 + e^(−|x|)).
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    x.neg()?.relu()?.neg()? - x.abs()?.neg()?.exp()?.affine(1.0, 1.0)?.log()?
}

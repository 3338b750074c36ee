//! A softmax over the 256 values of every channel.

use super::Positions;
use crate::math::{dot, exp, max_of, sum_of};

/// Values of a channel.
const VALUES: usize = 256;

/// 0, 1/255, … 1.
const RAMP: [f32; VALUES] = {
    let mut ramp = [0f32; VALUES];
    let mut value = 0;
    while value < VALUES {
        ramp[value] = value as f32 / 255.0;
        value += 1;
    }
    ramp
};

pub(super) struct Categorical;

impl Positions for Categorical {
    #[inline(always)]
    fn forward(&self, params: &[f32], pixels: &[u8], channels: usize, out: &mut [f32]) {
        let positions = params.chunks_exact(channels * VALUES).zip(pixels.chunks_exact(channels));
        for ((params, pixels), out) in positions.zip(out.chunks_exact_mut(1 + channels)) {
            position_forward(params, pixels, out);
        }
    }

    #[inline(always)]
    fn backward(
        &self,
        params: &[f32],
        pixels: &[u8],
        channels: usize,
        grad: &[f32],
        out: &mut [f32],
    ) {
        let size = channels * VALUES;
        let positions = params.chunks_exact(size).zip(pixels.chunks_exact(channels));
        for (((params, pixels), grad), out) in positions.zip(grad).zip(out.chunks_exact_mut(size)) {
            position_backward(params, pixels, *grad, out);
        }
    }
}

#[inline(always)]
fn position_forward(params: &[f32], pixels: &[u8], out: &mut [f32]) {
    let mut powers = [0f32; VALUES];
    let (nats, means) = out.split_at_mut(1);
    let channels = params.chunks_exact(VALUES).zip(pixels);
    for ((logits, value), mean) in channels.zip(means) {
        let max = powers_of(logits, &mut powers);
        let total = sum_of(&powers, |power| power);
        nats[0] += total.ln() - (logits[*value as usize] - max);
        *mean = dot(&powers, &RAMP) / total;
    }
}

#[inline(always)]
fn position_backward(params: &[f32], pixels: &[u8], grad: f32, out: &mut [f32]) {
    let mut powers = [0f32; VALUES];
    let channels = params.chunks_exact(VALUES).zip(pixels);
    for ((logits, value), out) in channels.zip(out.chunks_exact_mut(VALUES)) {
        powers_of(logits, &mut powers);
        let factor = grad / sum_of(&powers, |power| power);
        for (out, power) in out.iter_mut().zip(&powers) {
            *out = power * factor;
        }
        out[*value as usize] -= grad;
    }
}

/// e^(logit − max) of all values, and max.
#[inline(always)]
fn powers_of(logits: &[f32], powers: &mut [f32; VALUES]) -> f32 {
    let max = max_of(logits);
    for (power, logit) in powers.iter_mut().zip(logits) {
        *power = exp(logit - max);
    }
    max
}

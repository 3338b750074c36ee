//! The distributions of a position's channels, one given those before.

use vq_ops::{LOG_SCALES, Logistic, PixelDistribution};

use super::CompressError;
use super::coder::Coder;
use super::distribution::{Distribution, Softmax};
use super::exp::{exp, sigmoid, tanh};

/// Writes or reads the channels of one position, from its numbers `params`; their bits.
pub(super) fn code_position(
    coder: &mut Coder,
    distribution: PixelDistribution,
    params: &[f32],
    pixels: &mut [u8],
) -> Result<f64, CompressError> {
    if !params.iter().all(|param| param.is_finite()) {
        return Err(CompressError::NotFinite(DECODER));
    }
    let mut bits = 0.0;
    match distribution {
        PixelDistribution::Categorical => {
            for (pixel, logits) in pixels.iter_mut().zip(params.chunks(VALUES as usize)) {
                let softmax = Softmax::new(logits, DECODER)?;
                *pixel = coder.code(&softmax, u32::from(*pixel))? as u8;
                bits += softmax.bits(u32::from(*pixel));
            }
        }
        PixelDistribution::LogisticMixture { mixtures } => {
            let mixture = Logistic::new(params, mixtures, pixels.len());
            let mut weights = normalized(mixture.logits());
            let mut before = Vec::with_capacity(pixels.len());
            for (channel, pixel) in pixels.iter_mut().enumerate() {
                let logistics = Channel::new(&mixture, channel, &before, weights);
                *pixel = coder.code(&logistics, u32::from(*pixel))? as u8;
                bits += logistics.bits(u32::from(*pixel));
                before.push(f64::from(*pixel) / 127.5 - 1.0);
                weights = logistics.given(u32::from(*pixel));
            }
        }
    }
    Ok(bits)
}

const VALUES: u32 = 256;
const DECODER: &str = "decoder";

/// A mixture of logistics, rounded to the 256 values.
struct Channel {
    /// Weight, mean and 1 / scale of every component.
    components: Vec<(f64, f64, f64)>,
}

impl Channel {
    fn new(mixture: &Logistic, channel: usize, before: &[f64], weights: Vec<f64>) -> Self {
        let component = |(m, weight)| {
            let mut mean = f64::from(mixture.mean(m, channel));
            for (other, value) in before.iter().enumerate() {
                mean += tanh(f64::from(mixture.coefficient(m, channel, other))) * value;
            }
            (weight, mean, exp(-f64::from(mixture.log_scale(m, channel))))
        };
        Self { components: weights.into_iter().enumerate().map(component).collect() }
    }

    /// Every component's mass on a value: σ(p) − σ(q) as σ(p) σ(−q) (1 − e^(q−p)), which does not cancel.
    fn masses(&self, value: u32) -> impl Iterator<Item = f64> {
        let (below, above) = (edge(value), edge(value + 1));
        self.components.iter().map(move |(_, mean, inverse)| {
            let (q, p) = ((below - mean) * inverse, (above - mean) * inverse);
            match value {
                0 => sigmoid(p),
                255 => sigmoid(-q),
                _ => sigmoid(p) * sigmoid(-q) * (1.0 - exp(q - p)),
            }
        })
    }

    /// The weights once the value is known.
    fn given(&self, value: u32) -> Vec<f64> {
        let joint = self.masses(value).zip(&self.components);
        let joint: Vec<f64> = joint.map(|(mass, (weight, ..))| weight * mass).collect();
        let total: f64 = joint.iter().sum();
        if total > 0.0 {
            joint.into_iter().map(|weight| weight / total).collect()
        } else {
            // A value so far out that nothing is left of any component.
            self.components.iter().map(|(weight, ..)| *weight).collect()
        }
    }
}

/// [`LOG_SCALES`] bounds how near two values' quantiles come to each other: at least 10⁻⁶ apart in the
/// argument of the sigmoid, far more than its rounding. So sums of sigmoids never fall.
impl Distribution for Channel {
    fn symbols(&self) -> u32 {
        VALUES
    }

    fn below(&self, symbol: u32) -> f64 {
        debug_assert!(*LOG_SCALES.end() < 8.0);
        let edge = edge(symbol);
        let terms = self.components.iter();
        terms.map(|(weight, mean, inverse)| weight * sigmoid((edge - mean) * inverse)).sum()
    }

    fn bits(&self, symbol: u32) -> f64 {
        let masses = self.masses(symbol).zip(&self.components);
        let mass: f64 = masses.map(|(mass, (weight, ..))| weight * mass).sum();
        -mass.max(f64::MIN_POSITIVE).log2()
    }
}

/// Between the values v − 1 and v, in [−1, 1].
fn edge(value: u32) -> f64 {
    (2.0 * f64::from(value) - 1.0) / 255.0 - 1.0
}

fn normalized(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers = logits.iter().map(|logit| exp(f64::from(*logit) - f64::from(max)));
    let powers: Vec<f64> = powers.collect();
    let total: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / total).collect()
}

//! A mixture of discretised logistics.

use super::{PixelDistribution, Positions, ROWS};
use crate::math::{exp, ln, one_minus_exp, tanh};

/// A position's numbers, read as a mixture of M discretised logistics.
///
/// M logits of the components; M means of the first channel, of the second, …; M logarithms of the
/// scales, channel by channel likewise; and M coefficients for each pair (channel, channel before it), in the
/// order (1, 0), (2, 0), (2, 1), …, whose tanh is what a value of the channel before moves the mean by.
/// Values are in [−1, 1]: v is v / 127.5 − 1.
#[derive(Clone, Copy, Debug)]
pub struct Logistic<'a> {
    params: &'a [f32],
    mixtures: usize,
    channels: usize,
}

/// The logarithm of a scale is kept within this. e⁻⁷ is an eighth of the distance of two values (as in
/// Salimans et al. 2017); at e⁷ a component is as good as flat.
pub const LOG_SCALES: std::ops::RangeInclusive<f32> = -7.0..=7.0;

/// Half of the distance of two values.
const HALF: f32 = 1.0 / 255.0;

impl<'a> Logistic<'a> {
    /// `params` must be as long as [`PixelDistribution::parameters`](super::PixelDistribution::parameters)
    /// says.
    pub fn new(params: &'a [f32], mixtures: usize, channels: usize) -> Self {
        Self { params, mixtures, channels }
    }

    /// Logits of the components.
    pub fn logits(&self) -> &'a [f32] {
        &self.params[..self.mixtures]
    }

    /// Mean of a component's channel where all channels before are 0.
    pub fn mean(&self, component: usize, channel: usize) -> f32 {
        self.params[self.at().mean(component, channel)]
    }

    /// Its tanh times the value of the channel `before` is added to the mean of `channel`.
    pub fn coefficient(&self, component: usize, channel: usize, before: usize) -> f32 {
        self.params[self.at().coefficient(component, channel, before)]
    }

    /// Logarithm of the scale of a component's channel, within [`LOG_SCALES`].
    pub fn log_scale(&self, component: usize, channel: usize) -> f32 {
        let scale = self.params[self.at().log_scale(component, channel)];
        scale.max(*LOG_SCALES.start()).min(*LOG_SCALES.end())
    }

    fn at(&self) -> Places {
        Places { mixtures: self.mixtures, channels: self.channels }
    }
}

/// Where the numbers of a position stand.
#[derive(Clone, Copy, Debug)]
struct Places {
    mixtures: usize,
    channels: usize,
}

impl Places {
    fn mean(self, component: usize, channel: usize) -> usize {
        (1 + channel) * self.mixtures + component
    }

    fn log_scale(self, component: usize, channel: usize) -> usize {
        (1 + self.channels + channel) * self.mixtures + component
    }

    fn coefficient(self, component: usize, channel: usize, before: usize) -> usize {
        (1 + 2 * self.channels + pair(channel, before)) * self.mixtures + component
    }
}

/// The number of a pair of channels.
fn pair(channel: usize, before: usize) -> usize {
    channel * (channel - 1) / 2 + before
}

/// A number of each position of a block.
type Lanes = [f32; ROWS];

/// A number of each position, computed one like the other, so that it is done in vectors.
#[inline(always)]
fn lanes(of: impl FnMut(usize) -> f32) -> Lanes {
    std::array::from_fn(of)
}

pub(super) struct Mixture {
    pub(super) mixtures: usize,
}

impl Positions for Mixture {
    #[inline(always)]
    fn forward(&self, params: &[f32], pixels: &[u8], channels: usize, out: &mut [f32]) {
        let block = Block::new(self.mixtures, params, pixels, channels);
        let mut terms = Vec::with_capacity(self.mixtures);
        let total = log_sum_exp(block.logits());
        let mut means = vec![[0.; ROWS]; channels];
        let mut before = vec![[0.; ROWS]; channels];
        for component in 0..self.mixtures {
            let slopes = block.slopes(component);
            terms.push(block.term(component, &slopes, |_, _| ()));
            let weight = lanes(|i| exp(block.params[component][i] - total[i]));
            for channel in 0..channels {
                let mean = block.mean(component, channel, &slopes, &before);
                before[channel] = lanes(|i| mean[i].clamp(-1.0, 1.0));
                let sum = &mut means[channel];
                *sum = lanes(|i| sum[i] + weight[i] * (0.5 * before[channel][i] + 0.5));
            }
        }
        let joint = log_sum_exp(&terms);
        for (i, out) in out.chunks_exact_mut(1 + channels).enumerate() {
            out[0] = total[i] - joint[i];
            for (out, mean) in out[1..].iter_mut().zip(&means) {
                *out = mean[i];
            }
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
        let block = Block::new(self.mixtures, params, pixels, channels);
        let grad = lanes(|i| grad.get(i).copied().unwrap_or(0.));
        let slopes: Vec<_> = (0..self.mixtures).map(|m| block.slopes(m)).collect();
        // Derivatives of every component's term by what is centred and by the logarithm of the scale.
        let mut by_centred = vec![[0.; ROWS]; self.mixtures * channels];
        let mut by_log_scale = by_centred.clone();
        let mut terms = Vec::with_capacity(self.mixtures);
        for (component, slopes) in slopes.iter().enumerate() {
            terms.push(block.term(component, slopes, |channel, mass| {
                by_centred[component * channels + channel] = mass.by_centred;
                by_log_scale[component * channels + channel] = mass.by_log_scale;
            }));
        }
        let (prior, joint) = (log_sum_exp(block.logits()), log_sum_exp(&terms));
        let mut gradient = vec![[0.; ROWS]; block.params.len()];
        let at = &block.at;
        for (component, (term, slopes)) in terms.iter().zip(&slopes).enumerate() {
            // The component's share of the pixel's probability.
            let share = lanes(|i| exp(term[i] - joint[i]));
            let logit = &block.params[component];
            gradient[component] = lanes(|i| grad[i] * (exp(logit[i] - prior[i]) - share[i]));
            for channel in 0..channels {
                let mean = &by_centred[component * channels + channel];
                let mean = lanes(|i| grad[i] * share[i] * mean[i]);
                gradient[at.mean(component, channel)] = mean;
                let log_scale = at.log_scale(component, channel);
                let (given, scale) =
                    (&block.params[log_scale], &by_log_scale[component * channels + channel]);
                gradient[log_scale] = lanes(|i| {
                    let inside = given[i] >= *LOG_SCALES.start() && given[i] <= *LOG_SCALES.end();
                    if inside { -grad[i] * share[i] * scale[i] } else { 0. }
                });
                for (before, value) in block.values.iter().enumerate().take(channel) {
                    let slope = &slopes[pair(channel, before)];
                    gradient[at.coefficient(component, channel, before)] =
                        lanes(|i| mean[i] * value[i] * (1.0 - slope[i] * slope[i]));
                }
            }
        }
        let size = block.params.len();
        for (i, out) in out.chunks_exact_mut(size).enumerate() {
            for (out, gradient) in out.iter_mut().zip(&gradient) {
                *out = gradient[i];
            }
        }
    }
}

/// Up to [`ROWS`] positions side by side.
struct Block {
    at: Places,
    /// By place; zeros in lanes without a position.
    params: Vec<Lanes>,
    /// The pixels in [−1, 1], by channel.
    values: Vec<Lanes>,
}

impl Block {
    #[inline(always)]
    fn new(mixtures: usize, params: &[f32], pixels: &[u8], channels: usize) -> Self {
        let at = Places { mixtures, channels };
        let mut block = Self {
            at,
            params: vec![
                [0.; ROWS];
                PixelDistribution::LogisticMixture { mixtures }.parameters(channels)
            ],
            values: vec![[0.; ROWS]; channels],
        };
        for (i, params) in params.chunks_exact(block.params.len()).enumerate() {
            for (to, from) in block.params.iter_mut().zip(params) {
                to[i] = *from;
            }
        }
        for (i, pixels) in pixels.chunks_exact(channels).enumerate() {
            for (to, from) in block.values.iter_mut().zip(pixels) {
                to[i] = f32::from(*from) / 127.5 - 1.0;
            }
        }
        block
    }

    fn logits(&self) -> &[Lanes] {
        &self.params[..self.at.mixtures]
    }

    /// The tanh of a component's coefficients, by [`pair`].
    #[inline(always)]
    fn slopes(&self, component: usize) -> Vec<Lanes> {
        let pairs =
            (1..self.at.channels).flat_map(|channel| (0..channel).map(move |b| (channel, b)));
        let slope = |(channel, before)| {
            let coefficient = &self.params[self.at.coefficient(component, channel, before)];
            lanes(|i| tanh(coefficient[i]))
        };
        pairs.map(slope).collect()
    }

    /// Mean of a component's channel, given the values of the channels before in [−1, 1].
    #[inline(always)]
    fn mean(&self, component: usize, channel: usize, slopes: &[Lanes], before: &[Lanes]) -> Lanes {
        let mut mean = self.params[self.at.mean(component, channel)];
        for (other, value) in before.iter().enumerate().take(channel) {
            let slope = &slopes[pair(channel, other)];
            mean = lanes(|i| mean[i] + slope[i] * value[i]);
        }
        mean
    }

    /// ln (π · p) of a component, up to the logarithm of Σ π. Shows every channel's mass.
    #[inline(always)]
    fn term(
        &self,
        component: usize,
        slopes: &[Lanes],
        mut show: impl FnMut(usize, &LogMass),
    ) -> Lanes {
        let mut sum = self.params[component];
        for channel in 0..self.at.channels {
            let mean = self.mean(component, channel, slopes, &self.values);
            let log_scale = &self.params[self.at.log_scale(component, channel)];
            let mass = log_mass(&self.values[channel], &mean, log_scale);
            sum = lanes(|i| sum[i] + mass.value[i]);
            show(channel, &mass);
        }
        sum
    }
}

/// ln of a logistic's mass on pixels' values, and its derivatives.
struct LogMass {
    value: Lanes,
    by_centred: Lanes,
    by_log_scale: Lanes,
}

/// ln (σ(p) − σ(q)) with p and q = (value − mean ± 1/255) / s; the value 0 takes all below it and 255 all above.
///
/// σ(p) − σ(q) = σ(p) σ(−q) (1 − e^(q−p)) holds however narrow the scale and however far the tail; the
/// difference of two sigmoids cancels there, for which PixelCNN++ falls back on the density. All values
/// together have exactly the mass 1.
#[inline(always)]
fn log_mass(value: &Lanes, mean: &Lanes, log_scale: &Lanes) -> LogMass {
    let mut mass = LogMass { value: [0.; ROWS], by_centred: [0.; ROWS], by_log_scale: [0.; ROWS] };
    for i in 0..ROWS {
        let (lowest, highest) = (value[i] <= -1.0, value[i] >= 1.0);
        let log_scale = log_scale[i].clamp(*LOG_SCALES.start(), *LOG_SCALES.end());
        let inverse = exp(-log_scale);
        let centred = value[i] - mean[i];
        let (p, q) = (inverse * (centred + HALF), inverse * (centred - HALF));
        let (of_p, of_q) = (exp(-p.abs()), exp(-q.abs()));
        let (share_p, share_q) = (1.0 / (1.0 + of_p), 1.0 / (1.0 + of_q));
        // σ(−p) and σ(q): what lies above and below.
        let above = if p >= 0.0 { of_p * share_p } else { share_p };
        let below = if q >= 0.0 { share_q } else { of_q * share_q };
        let above = if highest { 0.0 } else { above };
        let below = if lowest { 0.0 } else { below };
        let width = inverse * (2.0 * HALF);
        let inside = one_minus_exp(width);
        // ln σ(p) = min(p, 0) + ln 1/(1 + e^−|p|), and so ln σ(−q).
        let (low, high) = (if p < 0.0 { p } else { 0.0 }, if q > 0.0 { -q } else { 0.0 });
        let edge = lowest || highest;
        let share_p = if highest { 1.0 } else { share_p };
        let share_q = if lowest { 1.0 } else { share_q };
        let logs = if highest { 0.0 } else { low } + if lowest { 0.0 } else { high };
        mass.value[i] = logs + ln(share_p * share_q * if edge { 1.0 } else { inside });
        mass.by_centred[i] = inverse * (above - below);
        let narrowing = if edge { 0.0 } else { width * (1.0 - inside) / inside };
        mass.by_log_scale[i] = q * below - p * above - narrowing;
    }
    mass
}

/// Of the numbers of each position.
#[inline(always)]
fn log_sum_exp(values: &[Lanes]) -> Lanes {
    // NaN is passed over: it comes back through the sum.
    let mut max = [f32::NEG_INFINITY; ROWS];
    for value in values {
        max = lanes(|i| if value[i] > max[i] { value[i] } else { max[i] });
    }
    let mut sum = [0.; ROWS];
    for value in values {
        sum = lanes(|i| sum[i] + exp(value[i] - max[i]));
    }
    lanes(|i| max[i] + ln(sum[i]))
}

//! A mixture of discretised logistics.

use super::Position;

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
        self.params[self.mean_at(component, channel)]
    }

    /// Its tanh times the value of the channel `before` is added to the mean of `channel`.
    pub fn coefficient(&self, component: usize, channel: usize, before: usize) -> f32 {
        self.params[self.coefficient_at(component, channel, before)]
    }

    /// Mean of a component's channel, given the values of the channels before in [−1, 1].
    fn mean_given(&self, component: usize, channel: usize, before: &[f32]) -> f32 {
        let before = before.iter().enumerate().take(channel);
        let moved =
            before.map(|(other, value)| self.coefficient(component, channel, other).tanh() * value);
        self.mean(component, channel) + moved.sum::<f32>()
    }

    /// Logarithm of the scale of a component's channel, within [`LOG_SCALES`].
    pub fn log_scale(&self, component: usize, channel: usize) -> f32 {
        let scale = self.params[self.log_scale_at(component, channel)];
        scale.max(*LOG_SCALES.start()).min(*LOG_SCALES.end())
    }

    fn mean_at(&self, component: usize, channel: usize) -> usize {
        (1 + channel) * self.mixtures + component
    }

    fn log_scale_at(&self, component: usize, channel: usize) -> usize {
        (1 + self.channels + channel) * self.mixtures + component
    }

    fn coefficient_at(&self, component: usize, channel: usize, before: usize) -> usize {
        let pair = channel * (channel - 1) / 2 + before;
        (1 + 2 * self.channels + pair) * self.mixtures + component
    }

    /// ln (π · p) of a component, up to the logarithm of Σ π.
    fn log_term(&self, component: usize, pixels: &[u8], values: &[f32]) -> f32 {
        let mut sum = self.params[component];
        for (channel, pixel) in pixels.iter().enumerate() {
            let centred = values[channel] - self.mean_given(component, channel, values);
            sum += log_mass(*pixel, centred, self.log_scale(component, channel)).value;
        }
        sum
    }
}

pub(super) struct Mixture {
    pub(super) mixtures: usize,
}

impl Position for Mixture {
    #[inline(always)]
    fn forward(&self, params: &[f32], pixels: &[u8], out: &mut [f32]) {
        let mixture = Logistic::new(params, self.mixtures, pixels.len());
        let values: Vec<f32> = pixels.iter().map(|&pixel| value(pixel)).collect();
        let terms = (0..self.mixtures).map(|m| mixture.log_term(m, pixels, &values));
        let terms: Vec<f32> = terms.collect();
        let total = log_sum_exp(mixture.logits());
        out[0] = total - log_sum_exp(&terms);
        for (component, logit) in mixture.logits().iter().enumerate() {
            let weight = (logit - total).exp();
            let mut before = Vec::with_capacity(pixels.len());
            for channel in 0..pixels.len() {
                let mean = mixture.mean_given(component, channel, &before).clamp(-1.0, 1.0);
                out[1 + channel] += weight * (0.5 * mean + 0.5);
                before.push(mean);
            }
        }
    }

    #[inline(always)]
    fn backward(&self, params: &[f32], pixels: &[u8], grad: f32, out: &mut [f32]) {
        let mixture = Logistic::new(params, self.mixtures, pixels.len());
        let values: Vec<f32> = pixels.iter().map(|&pixel| value(pixel)).collect();
        let terms = (0..self.mixtures).map(|m| mixture.log_term(m, pixels, &values));
        let terms: Vec<f32> = terms.collect();
        let (prior, joint) = (log_sum_exp(mixture.logits()), log_sum_exp(&terms));
        for (component, (term, logit)) in terms.iter().zip(mixture.logits()).enumerate() {
            // The component's share of the pixel's probability.
            let share = (term - joint).exp();
            out[component] = grad * ((logit - prior).exp() - share);
            let weight = grad * share;
            for (channel, &pixel) in pixels.iter().enumerate() {
                let centred = values[channel] - mixture.mean_given(component, channel, &values);
                let mass = log_mass(pixel, centred, mixture.log_scale(component, channel));
                out[mixture.mean_at(component, channel)] = weight * mass.by_centred;
                let at = mixture.log_scale_at(component, channel);
                if LOG_SCALES.contains(&params[at]) {
                    out[at] = -weight * mass.by_log_scale;
                }
                for (before, value) in values.iter().enumerate().take(channel) {
                    let at = mixture.coefficient_at(component, channel, before);
                    let tanh = params[at].tanh();
                    out[at] = weight * mass.by_centred * value * (1.0 - tanh * tanh);
                }
            }
        }
    }
}

/// ln of a logistic's mass on a pixel's value, and its derivatives.
struct LogMass {
    value: f32,
    by_centred: f32,
    by_log_scale: f32,
}

/// ln (σ(p) − σ(q)) with p and q = (centred ± 1/255) / s; 0 takes all below it and 255 all above.
///
/// σ(p) − σ(q) = σ(p) σ(−q) (1 − e^(q−p)) holds however narrow the scale and however far the tail; the
/// difference of two sigmoids cancels there, for which PixelCNN++ falls back on the density. All values
/// together have exactly the mass 1.
fn log_mass(pixel: u8, centred: f32, log_scale: f32) -> LogMass {
    let inverse = (-log_scale).exp();
    let (p, q) = (inverse * (centred + HALF), inverse * (centred - HALF));
    // σ(−p) and σ(q): what lies above and below.
    let (above, below) = (sigmoid(-p), sigmoid(q));
    match pixel {
        0 => {
            LogMass { value: log_sigmoid(p), by_centred: inverse * above, by_log_scale: -p * above }
        }
        255 => LogMass {
            value: log_sigmoid(-q),
            by_centred: -inverse * below,
            by_log_scale: q * below,
        },
        _ => {
            let width = inverse * (2.0 * HALF);
            LogMass {
                value: log_sigmoid(p) + log_sigmoid(-q) + (-(-width).exp_m1()).ln(),
                by_centred: inverse * (above - below),
                by_log_scale: q * below - p * above - width / width.exp_m1(),
            }
        }
    }
}

/// A pixel's value in [−1, 1].
fn value(pixel: u8) -> f32 {
    f32::from(pixel) / 127.5 - 1.0
}

fn sigmoid(x: f32) -> f32 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { 1.0 - 1.0 / (1.0 + x.exp()) }
}

/// ln σ(x).
fn log_sigmoid(x: f32) -> f32 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn log_sum_exp(values: &[f32]) -> f32 {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        // All are −∞, or one is not a number, which a maximum passes over.
        return values.iter().sum();
    }
    max + values.iter().map(|value| (value - max).exp()).sum::<f32>().ln()
}

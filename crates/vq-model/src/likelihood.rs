//! What a decoder's output says about the pixels.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use vq_ops::{PixelDistribution, channels_first, pixel_likelihood};

use crate::{Config, Error, Result};

/// What the decoder gives for a pixel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Likelihood {
    /// The pixel itself, for a loss on its error. There is no p(x|z).
    #[default]
    Mse,
    /// A softmax over the 256 values of every channel (van den Oord et al. 2017).
    Categorical,
    /// A mixture of discretised logistics (Salimans et al. 2017, "PixelCNN++"): each channel given those
    /// before it at the same position.
    LogisticMixture,
}

impl Config {
    /// How the decoder's output is read as a distribution of 8-bit pixels; none with
    /// [`Likelihood::Mse`].
    pub fn pixel_distribution(&self) -> Option<PixelDistribution> {
        match self.likelihood {
            Likelihood::Mse => None,
            Likelihood::Categorical => Some(PixelDistribution::Categorical),
            Likelihood::LogisticMixture => {
                Some(PixelDistribution::LogisticMixture { mixtures: self.mixtures })
            }
        }
    }

    /// Numbers that the decoder gives for a position: C, or those that its distribution takes.
    pub(crate) fn decoder_outputs(&self) -> usize {
        let distribution = self.pixel_distribution();
        distribution.map_or(self.channels, |distribution| distribution.parameters(self.channels))
    }

    pub(crate) fn require_distribution(&self) -> Result<PixelDistribution> {
        self.pixel_distribution().ok_or(Error::NoLikelihood)
    }
}

/// −ln p of images and what the decoder makes of them.
pub(crate) struct Judged {
    /// The distributions' means as images `[B,C,H,W]` in the model's range; no gradient.
    pub(crate) means: Tensor,
    /// −ln p of a position's channels together, `[B,H,W]`; differentiable.
    pub(crate) nats: Tensor,
}

/// The distributions of `parameters` `[B,H,W,P]`, on `images` `[B,C,H,W]` in the model's range.
pub(crate) fn judge(
    config: &Config,
    distribution: PixelDistribution,
    parameters: &Tensor,
    images: &Tensor,
) -> Result<Judged> {
    let pixels = config.normalization.pixels(images)?.permute((0, 2, 3, 1))?.contiguous()?;
    judge_pixels(config, distribution, parameters, &pixels)
}

/// The distributions' means `[B,C,H,W]` in the model's range.
pub(crate) fn means(
    config: &Config,
    distribution: PixelDistribution,
    parameters: &Tensor,
) -> Result<Tensor> {
    let (b, h, w, _) = parameters.dims4()?;
    // They do not depend on the pixels.
    let pixels = Tensor::zeros((b, h, w, config.channels), DType::U8, parameters.device())?;
    Ok(judge_pixels(config, distribution, parameters, &pixels)?.means)
}

fn judge_pixels(
    config: &Config,
    distribution: PixelDistribution,
    parameters: &Tensor,
    pixels: &Tensor,
) -> Result<Judged> {
    let (b, h, w, size) = parameters.dims4()?;
    let channels = config.channels;
    let rows = parameters.reshape((b * h * w, size))?;
    let judged = pixel_likelihood(&rows, &pixels.reshape((b * h * w, channels))?, distribution)?;
    let means = judged.detach().narrow(1, 1, channels)?.contiguous()?;
    let means = channels_first(&means.reshape((b, h, w, channels))?)?;
    Ok(Judged {
        means: config.normalization.normalize(&means)?,
        nats: judged.narrow(1, 0, 1)?.reshape((b, h, w))?,
    })
}

//! Distributions of 8-bit pixels, for decoders with a likelihood: each in one pass each way on the CPU.

mod categorical;
mod composed;
mod logistic;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::math::vectorized;
use crate::storage::{f32_elements, f32_slice};

use categorical::Categorical;
use logistic::Mixture;
pub use logistic::{LOG_SCALES, Logistic};

/// How the numbers that a decoder gives for a position are read as a distribution of the position's C
/// channels, each a value of 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelDistribution {
    /// A softmax over the 256 values of every channel (van den Oord et al. 2017): 256 logits of the first
    /// channel, then those of the second, and so on.
    Categorical,
    /// A mixture of discretised logistics (Salimans et al. 2017, "PixelCNN++", eq. 1 to 3), whose component is
    /// shared by the channels of a position, and in which a channel's mean moves with the channels before
    /// it. [`Logistic`] says what stands where.
    LogisticMixture {
        /// M, the number of components.
        mixtures: usize,
    },
}

impl PixelDistribution {
    /// P, the numbers that describe a position of so many channels.
    pub fn parameters(self, channels: usize) -> usize {
        match self {
            Self::Categorical => 256 * channels,
            Self::LogisticMixture { mixtures } => {
                mixtures * (1 + 2 * channels + channels * channels.saturating_sub(1) / 2)
            }
        }
    }
}

/// −ln p of pixels, and the distributions' means. `params` `[N,P]` f32, `pixels` `[N,C]` u8 → `[N,1+C]`.
///
/// The first column is −ln p of a position's C channels together, in nats; differentiable in `params`.
/// The others are the means of the channels in [0, 1] (255 = 1), whatever the pixels are; they have no
/// gradient. Of a mixture they are those of the components before rounding, kept within [0, 1], with the
/// means of the channels before for their values.
pub fn pixel_likelihood(
    params: &Tensor,
    pixels: &Tensor,
    distribution: PixelDistribution,
) -> Result<Tensor> {
    let (rows, channels) = pixels.dims2()?;
    let expected = [rows, distribution.parameters(channels)];
    if channels == 0 || params.dims() != expected || pixels.dtype() != DType::U8 {
        bail!(
            "pixel_likelihood takes {expected:?} parameters for u8 pixels [N, C], got {:?} for {:?} {:?}",
            params.dims(),
            pixels.dtype(),
            pixels.dims()
        );
    }
    #[cfg(feature = "cuda")]
    if on_cuda(params.device())
        && params.dtype() == DType::F32
        && let Some(mixture) = crate::cuda::pixels::Mixture::new(distribution, channels)
    {
        return params.contiguous()?.apply_op2(&pixels.contiguous()?, mixture);
    }
    if params.device().is_cpu() {
        params.contiguous()?.apply_op2(&pixels.contiguous()?, PixelLikelihood { distribution })
    } else {
        composed::pixel_likelihood(params, pixels, distribution)
    }
}

struct PixelLikelihood {
    distribution: PixelDistribution,
}

/// A few positions at a time, [`ROWS`] at most.
trait Positions: Sync {
    /// `out` is \[nats, means …\] of each.
    fn forward(&self, params: &[f32], pixels: &[u8], channels: usize, out: &mut [f32]);
    /// d nats / d params of each, times its `grad`; `out` is zero before.
    fn backward(
        &self,
        params: &[f32],
        pixels: &[u8],
        channels: usize,
        grad: &[f32],
        out: &mut [f32],
    );
}

/// Positions that a task takes.
const ROWS: usize = 16;

impl CustomOp2 for PixelLikelihood {
    fn name(&self) -> &'static str {
        "vq-pixel-likelihood"
    }

    fn cpu_fwd(
        &self,
        params: &CpuStorage,
        params_layout: &Layout,
        pixels: &CpuStorage,
        pixels_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = params_layout.shape().dims2()?;
        let (_, channels) = pixels_layout.shape().dims2()?;
        let params = f32_elements(params, params_layout)?;
        let pixels = match (pixels, pixels_layout.contiguous_offsets()) {
            (CpuStorage::U8(pixels), Some((first, end))) => &pixels[first..end],
            _ => bail!("pixel_likelihood takes contiguous u8 pixels"),
        };
        let out = match self.distribution {
            PixelDistribution::Categorical => forward(&Categorical, params, pixels, channels),
            PixelDistribution::LogisticMixture { mixtures } => {
                forward(&Mixture { mixtures }, params, pixels, channels)
            }
        };
        Ok((CpuStorage::F32(out), (rows, 1 + channels).into()))
    }

    fn bwd(
        &self,
        params: &Tensor,
        pixels: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, channels) = pixels.dims2()?;
        let pixels = pixels.flatten_all()?.to_vec1::<u8>()?;
        // The means have no gradient.
        let grad = grad.narrow(1, 0, 1)?.flatten_all()?.to_vec1::<f32>()?;
        let given = (&pixels[..], &grad[..]);
        let out = f32_slice(params, |params| match self.distribution {
            PixelDistribution::Categorical => backward(&Categorical, params, given, channels),
            PixelDistribution::LogisticMixture { mixtures } => {
                backward(&Mixture { mixtures }, params, given, channels)
            }
        })?;
        Ok((Some(Tensor::from_vec(out, params.shape(), params.device())?), None))
    }
}

fn forward(positions: &impl Positions, params: &[f32], pixels: &[u8], channels: usize) -> Vec<f32> {
    let rows = pixels.len() / channels.max(1);
    let (size, width) = (params.len() / rows.max(1), 1 + channels);
    let mut out = vec![0f32; rows * width];
    let tasks = out
        .par_chunks_mut(ROWS * width)
        .zip(params.par_chunks(ROWS * size))
        .zip(pixels.par_chunks(ROWS * channels));
    tasks.for_each(|((out, params), pixels)| {
        vectorized(
            #[inline(always)]
            || positions.forward(params, pixels, channels, out),
        );
    });
    out
}

/// `given` is the pixels and the gradient of each position's nats.
fn backward(
    positions: &impl Positions,
    params: &[f32],
    given: (&[u8], &[f32]),
    channels: usize,
) -> Vec<f32> {
    let (pixels, grad) = given;
    let size = params.len() / grad.len().max(1);
    let mut out = vec![0f32; params.len()];
    let tasks = out
        .par_chunks_mut(ROWS * size)
        .zip(params.par_chunks(ROWS * size))
        .zip(pixels.par_chunks(ROWS * channels).zip(grad.par_chunks(ROWS)));
    tasks.for_each(|((out, params), (pixels, grad))| {
        vectorized(
            #[inline(always)]
            || positions.backward(params, pixels, channels, grad, out),
        );
    });
    out
}

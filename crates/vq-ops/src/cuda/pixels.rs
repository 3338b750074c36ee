//! The likelihood of pixels under mixtures of logistics.

use candle_core::cuda::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::{CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{address, cuda_device, launch, tensor, view};
use crate::PixelDistribution;
use crate::dispatch::not_on_the_cpu;

/// Threads of a block, and numbers that it has before it, as in `pixels.cu`.
const THREADS: usize = 64;
const ROOM: usize = 11_776;
/// Channels that there are kernels for.
const CHANNELS: usize = 4;
const MOST_BLOCKS: usize = 1 << 16;

/// See [`crate::pixel_likelihood`].
pub(crate) struct Mixture {
    mixtures: usize,
}

impl Mixture {
    /// None of more channels or components than the kernels take.
    pub(crate) fn new(distribution: PixelDistribution, channels: usize) -> Option<Self> {
        let size = distribution.parameters(channels);
        match distribution {
            PixelDistribution::LogisticMixture { mixtures }
                if mixtures > 0 && (1..=CHANNELS).contains(&channels) && (size | 1) <= ROOM =>
            {
                Some(Self { mixtures })
            }
            _ => None,
        }
    }
}

fn config(rows: usize, size: usize) -> LaunchConfig {
    let at_once = (ROOM / (size | 1)).min(THREADS);
    let blocks = rows.div_ceil(at_once).clamp(1, MOST_BLOCKS) as u32;
    let (grid_dim, block_dim) = ((blocks, 1, 1), (THREADS as u32, 1, 1));
    LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }
}

impl CustomOp2 for Mixture {
    fn name(&self) -> &'static str {
        "vq-pixel-likelihood"
    }

    not_on_the_cpu!(_, _);

    fn cuda_fwd(
        &self,
        params: &CudaStorage,
        params_layout: &Layout,
        pixels: &CudaStorage,
        pixels_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, channels) = pixels_layout.shape().dims2()?;
        let (_, size) = params_layout.shape().dims2()?;
        let device = &params.device;
        let params = view::<f32>(params, params_layout)?;
        let pixels = view::<u8>(pixels, pixels_layout)?;
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<f32>(rows * (1 + channels)) }?;
        let (n, mixtures) = (rows as u64, self.mixtures as u32);
        let name = format!("mixture_nats_{channels}");
        launch!(device, &name, config(rows, size), &params, &pixels, &to, &n, &mixtures);
        let shape = (rows, 1 + channels).into();
        Ok((CudaStorage::wrap_cuda_slice(to, device.clone()), shape))
    }

    fn bwd(
        &self,
        params: &Tensor,
        pixels: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let device = cuda_device(params)?;
        let (rows, channels) = pixels.dims2()?;
        let (_, size) = params.dims2()?;
        let grad = grad.contiguous()?;
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<f32>(rows * size) }?;
        let (params_at, pixels_at) = (address::<f32>(params)?, address::<u8>(pixels)?);
        let grad_at = address::<f32>(&grad)?;
        let (n, mixtures) = (rows as u64, self.mixtures as u32);
        let (name, config) = (format!("mixture_gradient_{channels}"), config(rows, size));
        launch!(&device, &name, config, &params_at, &pixels_at, &grad_at, &to, &n, &mixtures);
        Ok((Some(tensor(CudaStorage::wrap_cuda_slice(to, device), params.shape())), None))
    }
}

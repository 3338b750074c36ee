//! The nearest-code search and the statistics of an assignment.

use candle_core::cuda::cudarc::driver::PushKernelArg;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, bail};

use super::{grid, launch, per_element, view};

/// Vectors of a block of `nearest`.
const ROWS: usize = 64;

/// `z` `[N, D]`, `codebook` `[K, D]` → `[N]` u32; `u32::MAX` for a vector that is not finite.
pub(crate) struct Nearest;

/// `z` `[N, D]`, `codes` `[N]` u32 → `[K · (D + 1)]`: the sums `[K, D]` and then the counts `[K]`.
pub(crate) struct Statistics {
    pub(crate) codebook_size: usize,
}

impl CustomOp2 for Nearest {
    fn name(&self) -> &'static str {
        "vq-nearest-codes"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this form of the search is for CUDA")
    }

    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        z_layout: &Layout,
        codebook: &CudaStorage,
        codebook_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (count, dim) = z_layout.shape().dims2()?;
        let (size, _) = codebook_layout.shape().dims2()?;
        let device = &z.device;
        let (z, codebook) = (view::<f32>(z, z_layout)?, view::<f32>(codebook, codebook_layout)?);
        // SAFETY: the kernels write every element.
        #[allow(unsafe_code)]
        let (mean, norms, codes) = unsafe {
            (device.alloc::<f32>(dim)?, device.alloc::<f32>(size)?, device.alloc::<u32>(count)?)
        };
        let (n, k, d) = (count as u32, size as u32, dim as u32);
        launch!(device, "codebook_mean", grid(d, 1), &codebook, &mean, &k, &d);
        launch!(device, "half_norms", per_element(size), &codebook, &mean, &norms, &k, &d);
        if count > 0 {
            let blocks = grid(count.div_ceil(ROWS) as u32, 1);
            launch!(device, "nearest", blocks, &z, &codebook, &mean, &norms, &codes, &n, &k, &d);
        }
        Ok((CudaStorage::wrap_cuda_slice(codes, device.clone()), count.into()))
    }
}

impl CustomOp2 for Statistics {
    fn name(&self) -> &'static str {
        "vq-code-statistics"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this form of the statistics is for CUDA")
    }

    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        z_layout: &Layout,
        codes: &CudaStorage,
        codes_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (count, dim) = z_layout.shape().dims2()?;
        let size = self.codebook_size;
        let device = &z.device;
        let (z, codes) = (view::<f32>(z, z_layout)?, view::<u32>(codes, codes_layout)?);
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let out = unsafe { device.alloc::<f32>(size * (dim + 1)) }?;
        let (sums, counts) = out.split_at(size * dim);
        let (n, k, d) = (count as u32, size as u32, dim as u32);
        let blocks = grid(k, d.div_ceil(256));
        launch!(device, "code_statistics", blocks, &z, &codes, &counts, &sums, &n, &k, &d);
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), (size * (dim + 1)).into()))
    }
}

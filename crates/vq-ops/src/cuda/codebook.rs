//! The nearest-code search and the statistics of an assignment.

use candle_core::cuda::cudarc::driver::LaunchConfig;
use candle_core::cuda::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

use super::{address, grid, launch, per_element, view};
use crate::codebook_average::{AverageRule, CodebookAverages, StepNumber};
use crate::dispatch::not_on_the_cpu;

/// Vectors from which on blocks of 128 of them keep the device busy, which are faster than those of 64.
const MANY: usize = 128 * 264;
/// Vectors of a thread of `add_vectors`.
const RUN: usize = 8;

/// `z` `[N, D]`, `codebook` `[K, D]` → `[N]` u32; `u32::MAX` for a vector that is not finite.
pub(crate) struct Nearest;

/// `z` `[N, D]`, `codes` `[N]` u32 → `[K · (D + 1)]`: the sums `[K, D]` and then the counts `[K]`.
pub(crate) struct Statistics {
    pub(crate) codebook_size: usize,
}

/// `table` `[K, D]`, `codes` `[N]` u32 → `[N, D]`, as [`crate::lookup()`] says.
pub(crate) struct Lookup;

impl CustomOp2 for Nearest {
    fn name(&self) -> &'static str {
        "vq-nearest-codes"
    }

    not_on_the_cpu!(_, _);

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
        let eighths = grid(size.div_ceil(8) as u32, 1);
        launch!(device, "half_norms", eighths, &codebook, &mean, &norms, &k, &d);
        if count > 0 {
            let (name, rows) = if count < MANY { ("nearest_64", 64) } else { ("nearest_128", 128) };
            let blocks = grid(count.div_ceil(rows) as u32, 1);
            launch!(device, name, blocks, &z, &codebook, &mean, &norms, &codes, &n, &k, &d);
        }
        Ok((CudaStorage::wrap_cuda_slice(codes, device.clone()), count.into()))
    }
}

impl CustomOp2 for Lookup {
    fn name(&self) -> &'static str {
        "vq-lookup"
    }

    not_on_the_cpu!(_, _);

    fn cuda_fwd(
        &self,
        table: &CudaStorage,
        table_layout: &Layout,
        codes: &CudaStorage,
        codes_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (size, dim) = table_layout.shape().dims2()?;
        let count = codes_layout.shape().dims1()?;
        let device = &table.device;
        let offset = table_layout.start_offset();
        let (table, codes) = (view::<f32>(table, table_layout)?, view::<u32>(codes, codes_layout)?);
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<f32>(count * dim) }?;
        let is_grouped = dim.is_multiple_of(4) && offset.is_multiple_of(4);
        let (name, group) = if is_grouped { ("lookup_grouped", 4) } else { ("lookup", 1) };
        let groups = count * dim / group;
        let (n, k, d) = (groups as u64, size as u32, dim as u32);
        if groups > 0 {
            launch!(device, name, per_element(groups), &table, &codes, &to, &n, &k, &d);
        }
        Ok((CudaStorage::wrap_cuda_slice(to, device.clone()), (count, dim).into()))
    }

    fn bwd(
        &self,
        table: &Tensor,
        codes: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, sums) = crate::code_statistics(grad, codes, table.dim(0)?)?;
        Ok((Some(sums), None))
    }
}

impl CustomOp2 for Statistics {
    fn name(&self) -> &'static str {
        "vq-code-statistics"
    }

    not_on_the_cpu!(_, _);

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
        // Two more: for the largest, and for whether something is no number.
        let (sums, counts) =
            (device.alloc_zeros::<u64>(size * dim)?, device.alloc_zeros::<u32>(size + 2)?);
        let (counts, rest) = counts.split_at(size);
        let (largest, unclean) = rest.split_at(1);
        // The sum of `count` numbers below 2^digits must be one of 63 bits.
        let digits = (62 - count.max(1).next_power_of_two().trailing_zeros() as i32).min(40);
        let (n, all) = (z.len() as u64, (size * dim) as u64);
        let (rows, k, d) = (count as u32, size as u32, dim as u32);
        launch!(device, "largest", per_element(z.len().div_ceil(8)), &z, &largest, &n);
        let config = per_element(count.div_ceil(RUN) * dim);
        launch!(
            device,
            "add_vectors",
            config,
            &z,
            &codes,
            &largest,
            &sums,
            &counts,
            &unclean,
            &rows,
            &k,
            &d,
            &digits
        );
        let config = per_element(size * (dim + 1));
        launch!(
            device,
            "code_statistics",
            config,
            &sums,
            &counts,
            &largest,
            &unclean,
            &out,
            &all,
            &k,
            &digits
        );
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), (size * (dim + 1)).into()))
    }
}

/// `codes` `[…]` u32 → `[G · K]` u32, as [`crate::count_codes`] says.
pub(crate) struct Count {
    pub(crate) codebooks: usize,
    pub(crate) codebook_size: usize,
}

impl CustomOp1 for Count {
    fn name(&self) -> &'static str {
        "vq-count-codes"
    }

    not_on_the_cpu!(_);

    fn cuda_fwd(&self, codes: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = &codes.device;
        let codes = view::<u32>(codes, layout)?;
        let all = self.codebooks * self.codebook_size;
        let counts = device.alloc_zeros::<u32>(all)?;
        let blocks = grid(codes.len().div_ceil(2048).clamp(1, 128) as u32, 1);
        let n = codes.len() as u64;
        let (codebooks, size) = (self.codebooks as u32, self.codebook_size as u32);
        launch!(device, "count_codes", blocks, &codes, &counts, &n, &codebooks, &size);
        Ok((CudaStorage::wrap_cuda_slice(counts, device.clone()), all.into()))
    }
}

/// See [`crate::average_codebook`], which has compared the shapes.
pub(crate) fn average(
    averages: CodebookAverages<'_>,
    counts: &Tensor,
    sums: &Tensor,
    rule: &AverageRule,
    step: StepNumber<'_>,
) -> Result<()> {
    let Device::Cuda(device) = counts.device() else { bail!("needs tensors on the CUDA device") };
    let (size, dim) = sums.dims2()?;
    let (counts, sums) = (counts.contiguous()?, sums.contiguous()?);
    let number = match step {
        StepNumber::Known(step) => {
            Tensor::new(&[u32::try_from(step).unwrap_or(u32::MAX)], counts.device())?
        }
        StepNumber::OnDevice(step) => step.clone(),
    };
    // SAFETY: the kernel writes it.
    #[allow(unsafe_code)]
    let total = unsafe { device.alloc::<f32>(1) }?;
    let (counts_at, usage_at) = (address::<f32>(&counts)?, address::<f32>(averages.usage)?);
    let (step_at, k, d) = (address::<u32>(&number)?, size as u32, dim as u32);
    let AverageRule { decay, warmup, epsilon, cosine } = *rule;
    launch!(
        device,
        "average_usage",
        grid(1, 1),
        &counts_at,
        &usage_at,
        &total,
        &step_at,
        &decay,
        &warmup,
        &k
    );
    let Some((averaged, codebook)) = averages.vectors else { return Ok(()) };
    let (sums_at, averaged_at) = (address::<f32>(&sums)?, address::<f32>(averaged)?);
    let (codebook_at, is_cosine) = (address::<f32>(codebook)?, u32::from(cosine));
    let config = LaunchConfig { grid_dim: (k, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    launch!(
        device,
        "average_codebook",
        config,
        &counts_at,
        &sums_at,
        &usage_at,
        &total,
        &averaged_at,
        &codebook_at,
        &step_at,
        &decay,
        &warmup,
        &epsilon,
        &k,
        &d,
        &is_cosine
    );
    Ok(())
}

//! Nearest-code search and the statistics of an assignment.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::composed;
use crate::cpu::nearest::{self as kernel, NotFinite};
use crate::dispatch::on_cpu;
#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::nearest_by_scores::nearest_by_scores;
use crate::storage::f32_slice;

/// The code nearest to each vector: `z` `[N, D]` and `codebook` `[K, D]`, f32 → `[N]` u32.
///
/// `argmin_k ‖z − e_k‖²` (van den Oord et al. 2017, eq. 1–2). The answer is that of exact
/// distances; among ties the lowest index wins. It depends neither on the other rows nor on the
/// number of threads, and the search never holds an `N × K` matrix. Not differentiable. A value
/// that is not finite is an error; on CUDA, where an error would have to be waited for, the code of such a
/// vector is `u32::MAX`.
pub fn nearest_codes(z: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let (count, dim) = z.dims2()?;
    let (codebook_size, codebook_dim) = codebook.dims2()?;
    if dim != codebook_dim || codebook_size == 0 || dim == 0 {
        bail!("vectors {:?} do not fit a codebook {:?}", z.shape(), codebook.shape());
    }
    if z.dtype() != DType::F32 || codebook.dtype() != DType::F32 {
        bail!("nearest_codes needs f32, got {:?} and {:?}", z.dtype(), codebook.dtype());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(z.device()) {
        let (z, codebook) = (z.contiguous()?, codebook.contiguous()?);
        return z.apply_op2_no_bwd(&codebook, &crate::cuda::codebook::Nearest);
    }
    if !on_cpu(z.device()) {
        return nearest_by_scores(&z.detach(), &codebook.detach());
    }
    let (z, codebook) = (z.contiguous()?, codebook.contiguous()?);
    let codes = f32_slice(&z, |z| f32_slice(&codebook, |e| kernel::nearest(z, e, dim)))??;
    match codes {
        Ok(codes) => Tensor::from_vec(codes, count, &Device::Cpu),
        Err(NotFinite::Vector(row)) => bail!("vector {row} holds a value that is not finite"),
        Err(NotFinite::Code(code)) => {
            bail!("code {code} of the codebook holds a value that is not finite")
        }
    }
}

/// How often each code was chosen and the sum of the vectors that chose it: `z` `[N, D]`, `codes`
/// `[N]` → (counts `[K]`, sums `[K, D]`), f32. The order of summation is fixed. A code that is not
/// below `codebook_size` is an error on the CPU, and counts for nothing elsewhere.
pub fn code_statistics(
    z: &Tensor,
    codes: &Tensor,
    codebook_size: usize,
) -> Result<(Tensor, Tensor)> {
    let (count, dim) = z.dims2()?;
    if codes.dims1()? != count {
        bail!("{count} vectors, but {} codes", codes.elem_count());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(z.device()) {
        let statistics = crate::cuda::codebook::Statistics { codebook_size };
        let both = z.contiguous()?.apply_op2_no_bwd(&codes.contiguous()?, &statistics)?;
        let (all, sums) = (codebook_size * (dim + 1), codebook_size * dim);
        return Ok((
            both.narrow(0, sums, all - sums)?,
            both.narrow(0, 0, sums)?.reshape((codebook_size, dim))?,
        ));
    }
    if !on_cpu(z.device()) {
        return composed::code_statistics(&z.detach(), codes, codebook_size);
    }
    let z = z.contiguous()?;
    let codes: Vec<u32> = codes.to_vec1()?;
    if let Some(code) = codes.iter().find(|code| **code as usize >= codebook_size) {
        bail!("code {code} is not below the codebook's size, {codebook_size}");
    }
    let (counts, sums) = f32_slice(&z, |z| kernel::statistics(z, &codes, dim, codebook_size))?;
    Ok((
        Tensor::from_vec(counts, codebook_size, &Device::Cpu)?,
        Tensor::from_vec(sums, (codebook_size, dim), &Device::Cpu)?,
    ))
}

/// How often each code was chosen: `codes` u32, of G = `codebooks` codebooks in turn → `[G · K]` u32. Codes that
/// are not below `codebook_size` count for nothing. On CUDA, nothing waits for the device.
pub fn count_codes(codes: &Tensor, codebooks: usize, codebook_size: usize) -> Result<Tensor> {
    let codes = codes.flatten_all()?.contiguous()?;
    if codes.dtype() != DType::U32 || codebooks == 0 {
        bail!("count_codes needs u32 codes of one codebook or more, got {:?}", codes.dtype());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(codes.device()) {
        return codes.apply_op1_no_bwd(&crate::cuda::codebook::Count { codebooks, codebook_size });
    }
    let mut counts = vec![0u32; codebooks * codebook_size];
    for (index, code) in codes.to_vec1::<u32>()?.into_iter().enumerate() {
        if (code as usize) < codebook_size {
            counts[index % codebooks * codebook_size + code as usize] += 1;
        }
    }
    Tensor::from_vec(counts, codebooks * codebook_size, codes.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_several_codebooks_are_counted_apart() -> Result<()> {
        let codes = Tensor::new(&[[0u32, 2], [1, 2], [1, 3]], &crate::test_device())?;
        assert_eq!(count_codes(&codes, 2, 3)?.to_vec1::<u32>()?, [1, 2, 0, 0, 0, 2]);
        assert_eq!(count_codes(&codes, 1, 4)?.to_vec1::<u32>()?, [1, 2, 2, 1]);
        Ok(())
    }
}

//! Nearest-code search and the statistics of an assignment.

use candle_core::{DType, Result, Tensor, bail};

use crate::composed;

/// The code nearest to each vector: `z` `[N, D]` and `codebook` `[K, D]`, f32 → `[N]` u32.
///
/// `argmin_k ‖z − e_k‖²` (van den Oord et al. 2017, eq. 1–2). The answer is that of exact
/// distances; among ties the lowest index wins. It depends neither on the other rows nor on the
/// number of threads. Not differentiable. A value that is not finite is an error.
pub fn nearest_codes(z: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let (_, dim) = z.dims2()?;
    let (codebook_size, codebook_dim) = codebook.dims2()?;
    if dim != codebook_dim || codebook_size == 0 {
        bail!("vectors {:?} do not fit a codebook {:?}", z.shape(), codebook.shape());
    }
    if z.dtype() != DType::F32 || codebook.dtype() != DType::F32 {
        bail!("nearest_codes needs f32, got {:?} and {:?}", z.dtype(), codebook.dtype());
    }
    for (name, tensor) in [("a vector", z), ("the codebook", codebook)] {
        let sum: f32 = (tensor.detach() * 0f64)?.sum_all()?.to_scalar()?;
        if sum != 0. {
            bail!("{name} holds a value that is not finite");
        }
    }
    composed::nearest_codes(&z.detach(), &codebook.detach())
}

/// How often each code was chosen and the sum of the vectors that chose it: `z` `[N, D]`, `codes`
/// `[N]` → (counts `[K]`, sums `[K, D]`), f32. The order of summation is fixed.
pub fn code_statistics(
    z: &Tensor,
    codes: &Tensor,
    codebook_size: usize,
) -> Result<(Tensor, Tensor)> {
    composed::code_statistics(&z.detach(), codes, codebook_size)
}

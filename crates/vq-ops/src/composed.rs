//! The operations composed of candle's own: slow and obvious, for any device, and the oracle that
//! the kernels are tested against.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::nchw::{Convolution, convolve};
use crate::{Conv2d, ConvTranspose2d, Precision};

/// Runs `work` with operations of this crate in their composed form alone, whatever the device: what a
/// device without kernels of ours does, on one that has them. For tests; concerns this thread.
///
/// The environment variable `VQ_OPS_FORM=composed` does the same for a whole process.
pub fn only<R>(work: impl FnOnce() -> R) -> R {
    crate::dispatch::only_composed(work)
}

/// ReLU whose gradient is 0 at 0, as PyTorch's (candle's is 1 there), and that lets NaN through
/// (candle's makes it 0, which would hide a model that diverged).
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let kept = x.detach().le(0f64)?.to_dtype(x.dtype())?.affine(-1., 1.)?;
    x * kept
}

/// [`crate::conv2d`] through candle's NCHW convolution.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2d,
) -> Result<Tensor> {
    let Conv2d { stride, padding, dilation, relu_input, precision } = config;
    let how = Convolution { stride, padding, dilation, transposed: None };
    convolve_channels_last(x, weight, bias, how, (relu_input, precision))
}

/// [`crate::conv_transpose2d`] through candle's NCHW transposed convolution.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: ConvTranspose2d,
) -> Result<Tensor> {
    let ConvTranspose2d { stride, padding, output_padding, dilation, relu_input, precision } =
        config;
    let how = Convolution { stride, padding, dilation, transposed: Some(output_padding) };
    convolve_channels_last(x, weight, bias, how, (relu_input, precision))
}

fn convolve_channels_last(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    how: Convolution,
    (relu_input, precision): (bool, Precision),
) -> Result<Tensor> {
    let x = if relu_input { relu(x)? } else { x.clone() };
    let (x, weight) = (rounded(&x, precision)?, rounded(weight, precision)?);
    let y = convolve(&x.permute((0, 3, 1, 2))?, &weight, how)?;
    let y = y.permute((0, 2, 3, 1))?.contiguous()?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// Nearest codes by direct differences in f64: `z` `[N, D]`, `codebook` `[K, D]` → `[N]` u32, the
/// lowest index among ties. Holds one `[K, D]` difference at a time, on the CPU: not every device has f64.
pub fn nearest_codes(z: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let device = z.device();
    let z = z.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let codebook = codebook.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let mut codes = Vec::with_capacity(z.dim(0)?);
    for row in 0..z.dim(0)? {
        let distances: Vec<f64> =
            codebook.broadcast_sub(&z.narrow(0, row, 1)?)?.sqr()?.sum(D::Minus1)?.to_vec1()?;
        let mut best = 0;
        for (code, distance) in distances.iter().enumerate() {
            if distance < &distances[best] {
                best = code;
            }
        }
        codes.push(best as u32);
    }
    let n = codes.len();
    Tensor::from_vec(codes, n, device)
}

/// Elements of the largest matrix that is held for vectors × codes.
pub(crate) const MATRIX: usize = 1 << 25;

/// [`crate::code_statistics`] as a one-hot matrix product. A code that is out of range counts for nothing.
pub fn code_statistics(
    z: &Tensor,
    codes: &Tensor,
    codebook_size: usize,
) -> Result<(Tensor, Tensor)> {
    let ids = Tensor::arange(0u32, codebook_size as u32, z.device())?.unsqueeze(1)?;
    let (count, dim) = z.dims2()?;
    let mut counts = Tensor::zeros(codebook_size, z.dtype(), z.device())?;
    let mut sums = Tensor::zeros((codebook_size, dim), z.dtype(), z.device())?;
    let at_once = (MATRIX / codebook_size.max(1)).max(1);
    for first in (0..count).step_by(at_once) {
        let rows = at_once.min(count - first);
        let codes = codes.narrow(0, first, rows)?.unsqueeze(0)?;
        let one_hot = codes.broadcast_eq(&ids)?.to_dtype(z.dtype())?;
        counts = (counts + one_hot.sum(1)?)?;
        sums = (sums + one_hot.matmul(&z.narrow(0, first, rows)?)?)?;
    }
    Ok((counts, sums))
}

/// The values that products are taken of. Rounding has the gradient 1; the gradient of the products
/// themselves stays in f32, while the kernels round it as a factor.
fn rounded(x: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::F32 => Ok(x.clone()),
        Precision::Bf16 => {
            crate::replace_value(x, &x.detach().to_dtype(DType::BF16)?.to_dtype(x.dtype())?)
        }
    }
}

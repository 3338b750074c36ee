//! The nearest-code search composed of candle's own operations, for devices without kernels of ours.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::composed::MATRIX;

/// [`crate::nearest_codes`] on any device: scores `½‖e‖² − z·e` by a matrix product, in f32, of vectors
/// and codes shifted by the codebook's mean. A row whose best score is closer to another than rounding can
/// tell apart is searched again in f64 by the CPU. Holds a part of the matrix of scores at a time.
pub(crate) fn nearest_by_scores(z: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let (count, dim) = z.dims2()?;
    let codes_on_cpu = codebook.to_vec2::<f32>()?;
    if let Some(code) = codes_on_cpu.iter().position(|code| !is_finite(code)) {
        bail!("code {code} of the codebook holds a value that is not finite");
    }
    let mean = codebook.mean_keepdim(0)?;
    let shifted = codebook.broadcast_sub(&mean)?;
    let half_norms = (shifted.sqr()?.sum(D::Minus1)? * 0.5)?.unsqueeze(0)?;
    let radius = (half_norms.max(D::Minus1)? * 2.)?.sqrt()?;
    let transposed = shifted.t()?.contiguous()?;
    let mut codes = Vec::with_capacity(count);
    let at_once = (MATRIX / codes_on_cpu.len()).max(1);
    for first in (0..count).step_by(at_once) {
        let rows = z.narrow(0, first, at_once.min(count - first))?.broadcast_sub(&mean)?;
        let scores = rows.matmul(&transposed)?.neg()?.broadcast_add(&half_norms)?;
        // A score is a sum of `dim` rounded products of at most ‖z‖·‖e‖ in all, and of ½‖e‖², itself a
        // sum of as many.
        let norms = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
        let rounding = 2. * f64::from(f32::EPSILON) * (dim as f64 + 8.);
        let rounding = (norms.broadcast_add(&radius)?.broadcast_mul(&radius)? * rounding)?;
        let limit = (scores.min_keepdim(D::Minus1)? + (rounding * 2.)?)?;
        // None for a row that holds NaN.
        let close = scores.broadcast_le(&limit)?.to_dtype(DType::F32)?.sum(D::Minus1)?;
        let close = close.to_vec1::<f32>()?;
        for (row, (code, close)) in
            scores.argmin(D::Minus1)?.to_vec1::<u32>()?.into_iter().zip(close).enumerate()
        {
            let is_clear = (0.5..1.5).contains(&close);
            codes.push(if is_clear { code } else { exact(z, first + row, &codes_on_cpu)? });
        }
    }
    Tensor::from_vec(codes, count, z.device())
}

/// Direct differences in f64; the lowest index among ties.
fn exact(z: &Tensor, row: usize, codebook: &[Vec<f32>]) -> Result<u32> {
    let z = z.get(row)?.to_vec1::<f32>()?;
    if !is_finite(&z) {
        bail!("vector {row} holds a value that is not finite");
    }
    let mut best = (f64::INFINITY, 0);
    for (code, e) in (0u32..).zip(codebook) {
        let squares = z.iter().zip(e).map(|(z, e)| (f64::from(*z) - f64::from(*e)).powi(2));
        let distance: f64 = squares.sum();
        if distance < best.0 {
            best = (distance, code);
        }
    }
    Ok(best.1)
}

fn is_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

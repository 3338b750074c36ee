//! Elementwise operations in one pass each way on the CPU and on CUDA. candle's own take several, each with
//! a new tensor. Other devices run candle's.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

use crate::dispatch::{on_cpu, on_cuda};
use crate::storage::f32_elements;

/// The value of `b` with the gradient of `a`: ∂/∂a = the gradient of the result, ∂/∂b = 0. Equal shapes.
pub fn replace_value(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let b = b.detach();
    if has_kernels(a) {
        a.apply_op2(&b.contiguous()?, ReplaceValue)
    } else {
        // a + (b − a) would round; (a − a) + b does not.
        a.sub(&a.detach())?.add(&b)
    }
}

/// The mean of (a − b)² over all elements of two tensors of the same shape; a scalar.
pub fn squared_error(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    scaled_squared_error(a, b, 1.)
}

/// [`squared_error`] times `factor`.
pub fn scaled_squared_error(a: &Tensor, b: &Tensor, factor: f64) -> Result<Tensor> {
    if on_cuda(a.device()) && has_kernels(a) {
        return a.contiguous()?.apply_op2(&b.contiguous()?, SquaredError { factor });
    }
    let error = mean_squared_error(a, b)?;
    if is_one(factor) { Ok(error) } else { error * factor }
}

fn mean_squared_error(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if has_kernels(a) {
        a.contiguous()?.apply_op2(&b.contiguous()?, SquaredError { factor: 1. })
    } else {
        // First over each row: that loses less to rounding.
        a.sub(b)?.sqr()?.mean(D::Minus1)?.mean_all()
    }
}

/// `[B,H,W,C]` to `[B,C,H,W]`, contiguous, in one pass each way.
pub fn channels_first(x: &Tensor) -> Result<Tensor> {
    if has_kernels(x) {
        x.contiguous()?.apply_op1(ChannelsFirst { back: false })
    } else {
        x.permute((0, 3, 1, 2))?.contiguous()
    }
}

/// `[B,C,H,W]` to `[B,H,W,C]`, contiguous, in one pass each way.
pub fn channels_last(x: &Tensor) -> Result<Tensor> {
    if has_kernels(x) {
        x.contiguous()?.apply_op1(ChannelsFirst { back: true })
    } else {
        x.permute((0, 2, 3, 1))?.contiguous()
    }
}

/// Whether a factor changes nothing.
#[allow(clippy::float_cmp)]
pub(crate) fn is_one(factor: f64) -> bool {
    factor == 1.
}

fn has_kernels(x: &Tensor) -> bool {
    on_cpu(x.device()) || (on_cuda(x.device()) && x.dtype() == DType::F32)
}

struct ReplaceValue;

/// With another factor than 1 on CUDA only.
struct SquaredError {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    factor: f64,
}

/// The step between channels-last and channels-first, either way.
struct ChannelsFirst {
    back: bool,
}

impl CustomOp1 for ChannelsFirst {
    fn name(&self) -> &'static str {
        "channels-first"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, a, b, c) = layout.shape().dims4()?;
        let values = f32_elements(x, layout)?;
        // One matrix [rows, columns] per image, to be transposed.
        let (rows, columns, shape) =
            if self.back { (a, b * c, (batch, b, c, a)) } else { (a * b, c, (batch, c, a, b)) };
        let mut to = vec![0f32; values.len()];
        let size = (rows * columns).max(1);
        to.par_chunks_mut(size).zip(values.par_chunks(size)).for_each(|(to, from)| {
            for (column, to) in to.chunks_mut(rows).enumerate() {
                for (to, row) in to.iter_mut().zip(from.chunks(columns)) {
                    *to = row[column];
                }
            }
        });
        Ok((CpuStorage::F32(to), shape.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (batch, a, b, c) = layout.shape().dims4()?;
        let (rows, columns, shape) =
            if self.back { (a, b * c, (batch, b, c, a)) } else { (a * b, c, (batch, c, a, b)) };
        let swapped = crate::cuda::layers::swap_axes(x, layout, (rows, columns))?;
        Ok((swapped, shape.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if self.back { channels_first(grad).map(Some) } else { channels_last(grad).map(Some) }
    }
}

impl CustomOp2 for ReplaceValue {
    fn name(&self) -> &'static str {
        "replace-value"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_layout.shape() != b_layout.shape() {
            bail!("shapes differ: {:?} and {:?}", a_layout.shape(), b_layout.shape());
        }
        Ok((CpuStorage::F32(f32_elements(b, b_layout)?.to_vec()), b_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        a_layout: &Layout,
        b: &candle_core::CudaStorage,
        b_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        if a_layout.shape() != b_layout.shape() {
            bail!("shapes differ: {:?} and {:?}", a_layout.shape(), b_layout.shape());
        }
        Ok((b.try_clone(b_layout)?, b_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), None))
    }
}

impl CustomOp2 for SquaredError {
    fn name(&self) -> &'static str {
        "squared-error"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_layout.shape() != b_layout.shape() {
            bail!("shapes differ: {:?} and {:?}", a_layout.shape(), b_layout.shape());
        }
        let (a, b) = (f32_elements(a, a_layout)?, f32_elements(b, b_layout)?);
        let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
        // Eight sums, so that they fill vector registers.
        let mut sums = [0f64; 8];
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum += f64::from(a - b).powi(2);
            }
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let mean = (sums.iter().sum::<f64>() + rest) / a.len() as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &candle_core::CudaStorage,
        a_layout: &Layout,
        b: &candle_core::CudaStorage,
        b_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let factor = self.factor / a_layout.shape().elem_count() as f64;
        let sum = crate::cuda::training::squared_error((a, a_layout), (b, b_layout), factor)?;
        Ok((sum, Shape::from(())))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            let factor = self.factor / a.elem_count() as f64;
            return crate::cuda::training::squared_error_gradients(a, b, grad, factor);
        }
        let scale = 2.0 * f64::from(grad.to_scalar::<f32>()?) / a.elem_count() as f64;
        let gradient = |x: &Tensor, other: &Tensor| -> Result<Option<Tensor>> {
            if !x.track_op() {
                return Ok(None);
            }
            x.apply_op2_no_bwd(other, &ScaledDifference(scale as f32)).map(Some)
        };
        Ok((gradient(a, b)?, gradient(b, a)?))
    }
}

/// (a − b) times a factor.
struct ScaledDifference(f32);

impl CustomOp2 for ScaledDifference {
    fn name(&self) -> &'static str {
        "scaled-difference"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let pairs = f32_elements(a, a_layout)?.iter().zip(f32_elements(b, b_layout)?);
        let values = pairs.map(|(a, b)| (a - b) * self.0).collect();
        Ok((CpuStorage::F32(values), a_layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn random(name: &str, rows: usize) -> Var {
        let start = f32::from(name.as_bytes()[0]);
        let values = (0..rows * 5).map(|i| (i as f32 * 12.9898 + start).sin()).collect();
        Var::from_vec(values, (rows, 5), &crate::test_device()).unwrap()
    }

    /// Values and both gradients, with random weights on the result.
    fn run(f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>, rows: usize) -> Vec<Option<Vec<f32>>> {
        let (a, b, weights) = (random("a", rows), random("b", rows), random("w", rows));
        let y = f(&a, &b).unwrap();
        let loss = match y.rank() {
            0 => (&y * 3.0).unwrap(),
            _ => (&y * weights.as_tensor()).unwrap().sum_all().unwrap(),
        };
        let gradients = loss.backward().unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        vec![Some(values(&y)), gradients.get(&a).map(values), gradients.get(&b).map(values)]
    }

    fn assert_close(ours: &[Option<Vec<f32>>], theirs: &[Option<Vec<f32>>]) {
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours.is_some(), theirs.is_some());
            for (a, b) in ours.iter().flatten().zip(theirs.iter().flatten()) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
        }
    }

    #[test]
    fn they_agree_with_candles_operations() {
        for rows in [1, 2, 13, 800] {
            assert_close(&run(squared_error, rows), &run(|a, b| a.sub(b)?.sqr()?.mean_all(), rows));
            let composed = |a: &Tensor, b: &Tensor| a.sub(&a.detach())?.add(&b.detach());
            assert_close(&run(replace_value, rows), &run(composed, rows));
        }
    }

    #[test]
    fn layouts_turn_into_each_other() {
        let x = Tensor::arange(0f32, 120., &crate::test_device())
            .unwrap()
            .reshape((2, 3, 4, 5))
            .unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let first = channels_first(&x).unwrap();
        assert_eq!(first.dims(), [2, 5, 3, 4]);
        assert_eq!(values(&first), values(&x.permute((0, 3, 1, 2)).unwrap()));
        assert_eq!(values(&channels_last(&first).unwrap()), values(&x));
        let weights = channels_last(&first.detach()).unwrap().permute((0, 3, 1, 2)).unwrap();
        let gradients = (first * weights).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(values(gradients.get(&x).unwrap()), values(&x));
    }

    #[test]
    fn an_operand_that_is_no_variable_gets_no_gradient() {
        let (a, b) = (random("a", 3), random("b", 3));
        let loss = squared_error(&a.as_detached_tensor(), &b).unwrap();
        let gradients = loss.backward().unwrap();
        assert!(gradients.get(&b).is_some() && gradients.get(&a).is_none());
        assert!(squared_error(&a, &random("b", 4)).is_err());
        assert!(replace_value(&a, &random("b", 4)).is_err());
    }
}

//! A few numbers on a device, without waiting for it and in one launch on CUDA.

use candle_core::{CustomOp3, DType, Result, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{Layout, Shape};

use crate::dispatch::not_on_the_cpu;
#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::pointwise::is_one;

/// wx·x + wy·y + wz·z of f32 scalars. Differentiable.
pub fn weighted_sum(terms: [(&Tensor, f64); 3]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    {
        let [(x, wx), (y, wy), (z, wz)] = terms;
        let is_f32 = [x, y, z].iter().all(|t| t.dtype() == DType::F32 && t.elem_count() == 1);
        if on_cuda(x.device()) && is_f32 {
            return x.apply_op3(y, z, WeightedSum([wx, wy, wz]));
        }
    }
    let [x, y, z] =
        terms.map(|(x, weight)| if is_one(weight) { Ok(x.clone()) } else { x * weight });
    (x? + y?)? + z?
}

/// f32 scalars side by side, `[n]`; without gradients.
pub fn collect_scalars(scalars: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(first) = scalars.first()
        && on_cuda(first.device())
    {
        return crate::cuda::training::collect(scalars);
    }
    let flat = scalars.iter().map(|scalar| {
        if scalar.dtype() != DType::F32 || scalar.elem_count() != 1 {
            bail!("{:?} {:?} is no f32 scalar", scalar.dtype(), scalar.shape());
        }
        scalar.detach().reshape(1)
    });
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
struct WeightedSum([f64; 3]);

impl CustomOp3 for WeightedSum {
    fn name(&self) -> &'static str {
        "vq-weighted-sum"
    }

    not_on_the_cpu!(_, _, _);

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        y: &candle_core::CudaStorage,
        y_layout: &Layout,
        z: &candle_core::CudaStorage,
        z_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let numbers = [(x, x_layout), (y, y_layout), (z, z_layout)];
        Ok((crate::cuda::training::weighted_sum(numbers, self.0)?, Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [wx, wy, wz] = self.0;
        let of = |operand: &Tensor, weight: f64| -> Result<Option<Tensor>> {
            if !operand.track_op() {
                return Ok(None);
            }
            let grad = if is_one(weight) { grad.clone() } else { (grad * weight)? };
            grad.reshape(operand.shape()).map(Some)
        };
        Ok((of(x, wx)?, of(y, wy)?, of(z, wz)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn sums_have_their_weights_and_so_have_gradients() -> Result<()> {
        let device = crate::test_device();
        let (x, y) = (Var::new(2f32, &device)?, Var::new(3f32, &device)?);
        let z = Tensor::new(5f32, &device)?;
        let sum = weighted_sum([(&x, 1.), (&y, 10.), (&z, 100.)])?;
        assert!((sum.to_scalar::<f32>()? - 532.).abs() < 1e-3);
        let gradients = sum.backward()?;
        let of = |var: &Var| gradients.get(var).map(Tensor::to_scalar::<f32>).transpose();
        assert_eq!((of(&x)?, of(&y)?), (Some(1.), Some(10.)));
        Ok(())
    }

    #[test]
    fn scalars_come_side_by_side() -> Result<()> {
        let device = crate::test_device();
        let scalars: Vec<Tensor> =
            (0..40).map(|i| Tensor::new(i as f32, &device)).collect::<Result<_>>()?;
        let both = collect_scalars(&scalars)?;
        assert_eq!(both.to_vec1::<f32>()?, (0..40).map(|i| i as f32).collect::<Vec<_>>());
        Ok(())
    }
}

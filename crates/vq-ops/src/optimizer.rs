//! The optimizer's step.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};

/// The numbers of one AdamW step (Loshchilov & Hutter 2019, algorithm 2, with PyTorch's
/// conventions).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, as a fraction of the learning rate.
    pub weight_decay: f64,
    /// Number of this step, from 1; enters the bias correction.
    pub step: u64,
    /// Factor on the gradient, as from clipping; 1 leaves it as it is.
    pub grad_scale: f64,
    /// Decay of the moving average of the parameters, where one is kept.
    pub ema_decay: Option<f64>,
}

/// One AdamW step in place. All tensors are f32, contiguous and of one shape; `param`, the moments
/// and `ema` are changed, `grad` is not:
///
/// ```text
/// g ← grad·grad_scale            m ← β₁m + (1 − β₁)g            v ← β₂v + (1 − β₂)g²
/// p ← p·(1 − lr·decay) − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
/// ema ← d·ema + (1 − d)·p
/// ```
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    ema: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<()> {
    for tensor in [Some(grad), Some(first_moment), Some(second_moment), ema].into_iter().flatten() {
        if tensor.shape() != param.shape() || tensor.dtype() != DType::F32 {
            bail!(
                "adamw_step needs f32 tensors of one shape, got {:?} {:?} beside {:?}",
                tensor.dtype(),
                tensor.shape(),
                param.shape()
            );
        }
    }
    let grad = grad.contiguous()?;
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let scale = step.grad_scale as f32;
    first_moment.inplace_op2(&grad, &Zip(|m: f32, g: f32| m + (1. - beta1) * (g * scale - m)))?;
    second_moment.inplace_op2(
        &grad,
        &Zip(|v: f32, g: f32| beta2 * v + (1. - beta2) * (g * scale) * (g * scale)),
    )?;
    let correction1 = 1. - step.beta1.powf(step.step as f64);
    let correction2 = 1. - step.beta2.powf(step.step as f64);
    let rate = (step.lr / correction1) as f32;
    let root = (1. / correction2.sqrt()) as f32;
    let keep = (1. - step.lr * step.weight_decay) as f32;
    let eps = step.eps as f32;
    // The second moment's share first, so that two operands do for an in-place op.
    let denominator = second_moment.sqrt()?.affine(f64::from(root), f64::from(eps))?;
    let update = (first_moment / denominator)?;
    param.inplace_op2(&update, &Zip(|p: f32, u: f32| p * keep - rate * u))?;
    if let (Some(ema), Some(decay)) = (ema, step.ema_decay) {
        let decay = decay as f32;
        ema.inplace_op2(&param.detach(), &Zip(|e: f32, p: f32| e + (1. - decay) * (p - e)))?;
    }
    Ok(())
}

/// Sum of the squares of all elements, in f64 and in a fixed order.
pub fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let values = tensor.detach().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    Ok(values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum())
}

struct Zip<F>(F);

impl<F: Fn(f32, f32) -> f32> InplaceOp2 for Zip<F> {
    fn name(&self) -> &'static str {
        "zip"
    }

    fn cpu_fwd(
        &self,
        left: &mut CpuStorage,
        left_layout: &Layout,
        right: &CpuStorage,
        right_layout: &Layout,
    ) -> Result<()> {
        let (Some((l0, l1)), Some((r0, r1))) =
            (left_layout.contiguous_offsets(), right_layout.contiguous_offsets())
        else {
            bail!("adamw_step needs contiguous tensors");
        };
        let (CpuStorage::F32(left), CpuStorage::F32(right)) = (left, right) else {
            bail!("adamw_step needs f32 tensors");
        };
        for (l, r) in left[l0..l1].iter_mut().zip(&right[r0..r1]) {
            *l = (self.0)(*l, *r);
        }
        Ok(())
    }
}

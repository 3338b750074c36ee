//! The optimizer's step.

use candle_core::{DType, Result, Tensor, bail};

use crate::cpu::adamw as kernel;
use crate::storage::{f32_slice, with_f32_mut};

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
    let grad = grad.detach().contiguous()?;
    if !param.device().is_cpu() {
        return composed(param, &grad, first_moment, second_moment, ema, step);
    }
    let mut addresses: Vec<usize> = Vec::new();
    for tensor in [Some(param), Some(&grad), Some(first_moment), Some(second_moment), ema] {
        let Some(tensor) = tensor else { continue };
        let address = f32_slice(tensor, |values| values.as_ptr().addr())?;
        if param.elem_count() > 0 && addresses.contains(&address) {
            bail!("adamw_step was given one tensor in two places");
        }
        addresses.push(address);
    }
    f32_slice(&grad, |grad| {
        with_f32_mut(param, |param| {
            with_f32_mut(first_moment, |first| {
                with_f32_mut(second_moment, |second| {
                    if let Some(ema) = ema {
                        with_f32_mut(ema, |ema| {
                            kernel::adamw(param, grad, first, second, Some(ema), step);
                        })
                    } else {
                        kernel::adamw(param, grad, first, second, None, step);
                        Ok(())
                    }
                })
            })
        })
    })????
}

/// Sum of the squares of all elements, in f64 and in a fixed order.
pub fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let tensor = tensor.detach().contiguous()?;
    if tensor.device().is_cpu() {
        return f32_slice(&tensor, kernel::sum_of_squares);
    }
    tensor.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}

/// The step in candle's own operations.
fn composed(
    param: &Tensor,
    grad: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    ema: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<()> {
    let grad = (grad * step.grad_scale)?;
    let first = ((first_moment * step.beta1)? + (&grad * (1. - step.beta1))?)?;
    let second = ((second_moment * step.beta2)? + (grad.sqr()? * (1. - step.beta2))?)?;
    let correction1 = 1. - step.beta1.powf(step.step as f64);
    let correction2 = 1. - step.beta2.powf(step.step as f64);
    let denominator = second.sqrt()?.affine(1. / correction2.sqrt(), step.eps)?;
    let update = (first.div(&denominator)? * (step.lr / correction1))?;
    let updated = ((param.detach() * (1. - step.lr * step.weight_decay))? - update)?;
    if let (Some(ema), Some(decay)) = (ema, step.ema_decay) {
        let average = ((ema * decay)? + (&updated * (1. - decay))?)?;
        ema.slice_set(&average.reshape(ema.shape())?, 0, 0)?;
    }
    first_moment.slice_set(&first, 0, 0)?;
    second_moment.slice_set(&second, 0, 0)?;
    param.slice_set(&updated, 0, 0)
}

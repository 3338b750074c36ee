//! The optimizer's step.

use candle_core::{DType, Result, Tensor, bail};

use crate::cpu::adamw as kernel;
use crate::dispatch::on_cpu;
#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::storage::{f32_slice, storage_address, with_f32_mut};

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

impl AdamWStep {
    /// How many [`numbers`](Self::numbers) there are.
    pub const NUMBERS: usize = 8;

    /// What the step's arithmetic takes: for [`adamw_steps_by`].
    pub fn numbers(&self) -> [f32; Self::NUMBERS] {
        let correction1 = 1. - self.beta1.powf(self.step as f64);
        let correction2 = 1. - self.beta2.powf(self.step as f64);
        [
            self.grad_scale,
            self.beta1,
            self.beta2,
            self.lr / correction1,
            1. / correction2.sqrt(),
            self.eps,
            1. - self.ema_decay.unwrap_or(1.),
            1. - self.lr * self.weight_decay,
        ]
        .map(|number| number as f32)
    }
}

/// What one tensor brings to a step: all f32, contiguous and of one shape.
#[derive(Clone, Copy, Debug)]
pub struct AdamWSlot<'a> {
    /// Changed by the step, as are the moments and `ema`.
    pub param: &'a Tensor,
    /// The gradient.
    pub grad: &'a Tensor,
    /// m
    pub first_moment: &'a Tensor,
    /// v
    pub second_moment: &'a Tensor,
    /// The moving average of the parameter, where one is kept.
    pub ema: Option<&'a Tensor>,
    /// Whether [`AdamWStep::weight_decay`] is for it.
    pub decays: bool,
}

impl AdamWSlot<'_> {
    /// The share of the parameter that a step leaves.
    pub(crate) fn keep(&self, step: &AdamWStep) -> f64 {
        if self.decays { 1. - step.lr * step.weight_decay } else { 1. }
    }
}

/// [`adamw_steps`] for one tensor, which decays.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    ema: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<()> {
    let slot = AdamWSlot { param, grad, first_moment, second_moment, ema, decays: true };
    adamw_steps(&[slot], step, None)
}

/// One AdamW step in place on every slot; on CUDA in few launches:
///
/// ```text
/// g ← grad·grad_scale            m ← β₁m + (1 − β₁)g            v ← β₂v + (1 − β₂)g²
/// p ← p·(1 − lr·decay) − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
/// ema ← d·ema + (1 − d)·p
/// ```
///
/// `scale`, one f32 on the same device, multiplies the gradients as well: the factor of
/// [`norm_and_scale`]. On CUDA nothing changes where it is not finite.
pub fn adamw_steps(
    slots: &[AdamWSlot<'_>],
    step: &AdamWStep,
    scale: Option<&Tensor>,
) -> Result<()> {
    let grads = checked_gradients(slots)?;
    let slots: Vec<AdamWSlot<'_>> = slots
        .iter()
        .zip(&grads)
        .map(|(slot, grad)| AdamWSlot {
            grad,
            ema: slot.ema.filter(|_| step.ema_decay.is_some()),
            ..*slot
        })
        .collect();
    let Some(first) = slots.first() else { return Ok(()) };
    #[cfg(feature = "cuda")]
    if on_cuda(first.param.device()) {
        let numbers = Tensor::new(&step.numbers(), first.param.device())?;
        return crate::cuda::training::adamw(&slots, &numbers, scale);
    }
    if !on_cpu(first.param.device()) {
        return slots.iter().try_for_each(|slot| composed(slot, step, scale));
    }
    let factor = match scale {
        Some(scale) => f64::from(scale.flatten_all()?.get(0)?.to_scalar::<f32>()?),
        None => 1.,
    };
    let step = AdamWStep { grad_scale: step.grad_scale * factor, ..*step };
    slots.iter().try_for_each(|slot| on_the_cpu(slot, &step))
}

/// [`adamw_steps`] by the numbers of an [`AdamWStep`] that lie on the device, f32 `[8]`: so that a
/// [recorded](crate::Recording) step can be repeated with the numbers of another. On CUDA only.
pub fn adamw_steps_by(
    slots: &[AdamWSlot<'_>],
    numbers: &Tensor,
    scale: Option<&Tensor>,
) -> Result<()> {
    let grads = checked_gradients(slots)?;
    let slots: Vec<AdamWSlot<'_>> =
        slots.iter().zip(&grads).map(|(slot, grad)| AdamWSlot { grad, ..*slot }).collect();
    #[cfg(feature = "cuda")]
    if slots.first().is_some_and(|first| on_cuda(first.param.device())) {
        return crate::cuda::training::adamw(&slots, numbers, scale);
    }
    let _ = (slots, numbers, scale);
    bail!("AdamW takes its numbers from the device on CUDA only")
}

/// The slots' gradients, contiguous; an error where something does not fit.
fn checked_gradients(slots: &[AdamWSlot<'_>]) -> Result<Vec<Tensor>> {
    let mut grads = Vec::with_capacity(slots.len());
    for slot in slots {
        let AdamWSlot { param, grad, first_moment, second_moment, ema, .. } = *slot;
        let others = [Some(grad), Some(first_moment), Some(second_moment), ema];
        for tensor in others.into_iter().flatten() {
            if tensor.shape() != param.shape() || tensor.dtype() != DType::F32 {
                bail!(
                    "AdamW needs f32 tensors of one shape, got {:?} {:?} beside {:?}",
                    tensor.dtype(),
                    tensor.shape(),
                    param.shape()
                );
            }
        }
        grads.push(grad.detach().contiguous()?);
    }
    Ok(grads)
}

fn on_the_cpu(slot: &AdamWSlot<'_>, step: &AdamWStep) -> Result<()> {
    let AdamWSlot { param, grad, first_moment, second_moment, ema, .. } = *slot;
    let keep = slot.keep(step);
    // Each storage is locked while it is written, so that two views of one would wait for each other.
    let mut storages: Vec<usize> = Vec::new();
    for tensor in [Some(param), Some(grad), Some(first_moment), Some(second_moment), ema] {
        let Some(address) = tensor.and_then(storage_address) else { continue };
        if storages.contains(&address) {
            bail!("AdamW was given one tensor, or two views of one, in two places");
        }
        storages.push(address);
    }
    f32_slice(grad, |grad| {
        with_f32_mut(param, |param| {
            with_f32_mut(first_moment, |first| {
                with_f32_mut(second_moment, |second| {
                    if let Some(ema) = ema {
                        with_f32_mut(ema, |ema| {
                            kernel::adamw(param, grad, first, second, Some(ema), step, keep);
                        })
                    } else {
                        kernel::adamw(param, grad, first, second, None, step, keep);
                        Ok(())
                    }
                })
            })
        })
    })????
}

/// The norm of all tensors together, and the factor that brings it down to `limit` (1 where it is no more
/// than that, or the limit is 0): `[2]` f32, without waiting for the device. `None` of no tensors.
pub fn norm_and_scale(tensors: &[Tensor], limit: f64) -> Result<Option<Tensor>> {
    let tensors: Vec<Tensor> =
        tensors.iter().map(|tensor| tensor.detach().contiguous()).collect::<Result<_>>()?;
    if tensors.is_empty() {
        return Ok(None);
    }
    #[cfg(feature = "cuda")]
    if let Some(first) = tensors.first().filter(|first| on_cuda(first.device())) {
        let op = crate::cuda::training::NormAndScale { tensors: &tensors, limit };
        return first.flatten_all()?.apply_op1_no_bwd(&op).map(Some);
    }
    let squares: Vec<Tensor> =
        tensors.iter().map(|tensor| tensor.sqr()?.sum_all()).collect::<Result<_>>()?;
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    let scale = match limit {
        0. => norm.ones_like()?,
        limit => (norm.maximum(limit)?.recip()? * limit)?,
    };
    Tensor::stack(&[norm, scale], 0).map(Some)
}

/// Sum of the squares of all elements, in f64 and in a fixed order.
pub fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let tensor = tensor.detach().contiguous()?;
    if on_cpu(tensor.device()) {
        return f32_slice(&tensor, kernel::sum_of_squares);
    }
    // Metal has no f64.
    Ok(f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

/// The step in candle's own operations.
fn composed(slot: &AdamWSlot<'_>, step: &AdamWStep, scale: Option<&Tensor>) -> Result<()> {
    let AdamWSlot { param, grad, first_moment, second_moment, ema, .. } = *slot;
    let keep = slot.keep(step);
    let mut grad = (grad * step.grad_scale)?;
    if let Some(scale) = scale {
        grad = grad.broadcast_mul(&scale.flatten_all()?.get(0)?)?;
    }
    let first = ((first_moment * step.beta1)? + (&grad * (1. - step.beta1))?)?;
    let second = ((second_moment * step.beta2)? + (grad.sqr()? * (1. - step.beta2))?)?;
    let correction1 = 1. - step.beta1.powf(step.step as f64);
    let correction2 = 1. - step.beta2.powf(step.step as f64);
    let denominator = second.sqrt()?.affine(1. / correction2.sqrt(), step.eps)?;
    let update = (first.div(&denominator)? * (step.lr / correction1))?;
    let updated = ((param.detach() * keep)? - update)?;
    if let (Some(ema), Some(decay)) = (ema, step.ema_decay) {
        let average = ((ema * decay)? + (&updated * (1. - decay))?)?;
        ema.slice_set(&average.reshape(ema.shape())?, 0, 0)?;
    }
    first_moment.slice_set(&first, 0, 0)?;
    second_moment.slice_set(&second, 0, 0)?;
    param.slice_set(&updated, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: f32) -> Tensor {
        let values = (0..n).map(|i| (i as f32 * 12.9898 + seed).sin()).collect();
        Tensor::from_vec(values, n, &crate::test_device()).unwrap()
    }

    #[test]
    fn norm_and_scale_say_what_clipping_needs() {
        let tensors = [noise(7, 1.), noise(300, 2.)];
        let norm = tensors.iter().map(|t| sum_of_squares(t).unwrap()).sum::<f64>().sqrt();
        for (limit, scale) in [(0., 1.), (1e9, 1.), (0.5, 0.5 / norm)] {
            let found = norm_and_scale(&tensors, limit).unwrap().unwrap().to_vec1::<f32>().unwrap();
            assert!((f64::from(found[0]) / norm - 1.).abs() < 1e-6);
            assert!((f64::from(found[1]) / scale - 1.).abs() < 1e-6);
        }
        assert!(norm_and_scale(&[], 1.).unwrap().is_none());
    }

    #[test]
    fn two_views_of_one_tensor_are_refused() {
        if !on_cpu(&candle_core::Device::Cpu) {
            // candle's operations lock nothing.
            return;
        }
        let step = AdamWStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.,
            step: 1,
            grad_scale: 1.,
            ema_decay: None,
        };
        let all = Tensor::zeros(100, DType::F32, &candle_core::Device::Cpu).unwrap();
        let view = |start| all.narrow(0, start, 40).unwrap();
        let [a, b, c] =
            [(); 3].map(|()| Tensor::zeros(40, DType::F32, &candle_core::Device::Cpu).unwrap());
        assert!(adamw_step(&a, &b, &c, &view(0), None, &step).is_ok());
        // Overlapping, apart, and the same.
        for start in [20, 60, 0] {
            let error = adamw_step(&view(0), &a, &view(start), &b, None, &step).unwrap_err();
            assert!(error.to_string().contains("two views"), "{error}");
        }
    }

    #[test]
    fn the_composed_step_agrees_with_the_kernel() {
        let step = AdamWStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 3,
            grad_scale: 0.5,
            ema_decay: Some(0.9),
        };
        let run = |is_composed: bool| {
            let tensors: Vec<Tensor> = (0..5).map(|seed| noise(40, seed as f32)).collect();
            let [param, grad, first, second, ema] = &tensors[..] else { unreachable!() };
            let slot = AdamWSlot {
                param,
                grad,
                first_moment: first,
                second_moment: &second.abs().unwrap(),
                ema: Some(ema),
                decays: true,
            };
            let scale = Tensor::new(&[0.25f32], &crate::test_device()).unwrap();
            let work = || adamw_steps(&[slot], &step, Some(&scale)).unwrap();
            if is_composed {
                crate::composed::only(work);
            } else {
                work();
            }
            [param, first, slot.second_moment, ema].map(|t| t.to_vec1::<f32>().unwrap())
        };
        for (ours, theirs) in run(false).iter().flatten().zip(run(true).iter().flatten()) {
            // Some roundings of numbers of about 1.
            assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
        }
    }
}

//! A linear map of many rows, as training needs it: candle's matrix products, with bias and `ReLU` fused.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::composed::relu;
use crate::cpu::weight_gradient::column_sums;
use crate::dispatch::on_cpu;
use crate::storage::{f32_elements, f32_slice};

/// `x Wᵀ + b` along the last axis, through `ReLU` first where `relu_input`. `x` `[…, I]`, `weight`
/// `[O, I]`, `bias` `[O]` → `[…, O]`. Differentiable in all three.
///
/// The same as a 1×1 [`conv2d`](crate::conv2d), and faster for many rows; but a row's rounding may depend
/// on how many rows there are.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, relu_input: bool) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    if x.dim(D::Minus1)? != inputs || bias.dims() != [outputs] {
        bail!("linear: {:?}, {:?} and {:?} do not fit", x.dims(), weight.dims(), bias.dims());
    }
    if on_cpu(x.device()) {
        let op = Linear { relu: relu_input };
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
    } else {
        composed_linear(x, weight, bias, relu_input)
    }
}

fn composed_linear(x: &Tensor, weight: &Tensor, bias: &Tensor, relu_input: bool) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let rows = x.reshape(((), weight.dim(1)?))?;
    let rows = if relu_input { relu(&rows)? } else { rows };
    if let Some(last) = dims.last_mut() {
        *last = weight.dim(0)?;
    }
    rows.matmul(&weight.t()?)?.broadcast_add(bias)?.reshape(dims)
}

struct Linear {
    relu: bool,
}

/// The first operand where the second is above zero (or not a number), 0 elsewhere.
struct WherePositive;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "vq-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = weight_layout.shape().dims2()?;
        let rows = x_layout.shape().elem_count() / inputs.max(1);
        let sizes = (1, rows, outputs, inputs);
        let transposed = weight_layout.transpose(0, 1)?;
        let product = if self.relu {
            let positive = |&v: &f32| if v <= 0.0 { 0.0 } else { v };
            let x = f32_elements(x, x_layout)?.iter().map(positive).collect();
            let layout = Layout::contiguous((rows, inputs));
            CpuStorage::F32(x).matmul(weight, sizes, &layout, &transposed)?
        } else {
            let layout = Layout::contiguous_with_offset((rows, inputs), x_layout.start_offset());
            x.matmul(weight, sizes, &layout, &transposed)?
        };
        let CpuStorage::F32(mut y) = product else { bail!("linear takes f32") };
        let bias = f32_elements(bias, bias_layout)?;
        y.par_chunks_mut(64 * outputs.max(1)).for_each(|rows| {
            for row in rows.chunks_exact_mut(outputs) {
                for (y, bias) in row.iter_mut().zip(bias) {
                    *y += bias;
                }
            }
        });
        let mut dims = x_layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let grad = grad.contiguous()?.reshape(((), outputs))?;
        let rows = x.detach().reshape(((), inputs))?;
        let of_x = if x.track_op() {
            let of_input = grad.matmul(&weight.detach())?;
            let of_x = if self.relu {
                of_input.apply_op2_no_bwd(&rows, &WherePositive)?
            } else {
                of_input
            };
            Some(of_x.reshape(x.shape())?)
        } else {
            None
        };
        let of_weight = if weight.track_op() {
            let rows = if self.relu { rows.apply_op2_no_bwd(&rows, &WherePositive)? } else { rows };
            Some(grad.t()?.matmul(&rows)?)
        } else {
            None
        };
        let of_bias = if bias.track_op() {
            let mut sums = vec![0f32; outputs];
            f32_slice(&grad, |grad| column_sums(grad.into(), outputs, &mut sums))?;
            Some(Tensor::from_vec(sums, outputs, x.device())?)
        } else {
            None
        };
        Ok((of_x, of_weight, of_bias))
    }
}

impl CustomOp2 for WherePositive {
    fn name(&self) -> &'static str {
        "vq-where-positive"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        values_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gate = f32_elements(gate, gate_layout)?;
        let pairs = f32_elements(values, values_layout)?.iter().zip(gate);
        let kept = pairs.map(|(value, gate)| if *gate <= 0.0 { 0.0 } else { *value }).collect();
        Ok((CpuStorage::F32(kept), values_layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn values_and_gradients_agree_with_candles_operations() {
        let random = |start: f32, dims: &[usize]| {
            let n = dims.iter().product();
            let values = (0..n).map(|i| (i as f32 * 12.9898 + start).sin()).collect();
            Var::from_vec(values, dims, &crate::test_device()).unwrap()
        };
        for (dims, outputs) in [(vec![5, 3], 4), (vec![2, 7, 9, 40], 33), (vec![1, 1], 1)] {
            let inputs = *dims.last().unwrap();
            let (x, weight) = (random(1.0, &dims), random(2.0, &[outputs, inputs]));
            let bias = random(3.0, &[outputs]);
            for relu_input in [false, true] {
                let run = |y: Tensor| {
                    let weights = random(4.0, y.dims()).as_detached_tensor();
                    let loss = (&y * weights).unwrap().sum_all().unwrap();
                    let gradients = loss.backward().unwrap();
                    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let of = |var: &Var| values(gradients.get(var).unwrap());
                    [values(&y), of(&x), of(&weight), of(&bias)]
                };
                let ours = run(linear(&x, &weight, &bias, relu_input).unwrap());
                let theirs = run(composed_linear(&x, &weight, &bias, relu_input).unwrap());
                for (ours, theirs) in ours.iter().zip(&theirs) {
                    assert_eq!(ours.len(), theirs.len());
                    // Up to 126 products of numbers up to 1 are added, in any order.
                    for (a, b) in ours.iter().zip(theirs) {
                        assert!((a - b).abs() < 126.0 * 126f32.sqrt() * f32::EPSILON, "{a} {b}");
                    }
                }
            }
        }
        let x = random(0.0, &[2, 3]);
        assert!(linear(&x, &random(0.0, &[2, 4]), &random(0.0, &[2]), false).is_err());
    }
}

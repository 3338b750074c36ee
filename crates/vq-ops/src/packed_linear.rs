//! A linear map for a few rows at a time, as sampling needs it: its weight is laid out once.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::composed::relu;
use crate::dispatch::on_cpu;
use crate::math::vectorized;
use crate::storage::f32_slice;

/// `y = x Wᵀ + b` for few rows of `x`, without gradients.
///
/// On the CPU, a row's result depends on that row alone, to the bit: not on the other rows, nor on the
/// number of threads.
#[derive(Clone, Debug)]
pub struct PackedLinear {
    inputs: usize,
    outputs: usize,
    layout: Layout,
}

#[derive(Clone, Debug)]
enum Layout {
    /// For the CPU: panels of [`PANEL`] outputs, each `[inputs, PANEL]`, zeros behind the last.
    Panels { weight: Arc<Vec<f32>>, bias: Arc<Vec<f32>> },
    /// For other devices: `[inputs, outputs]` and `[outputs]`.
    Tensors { weight: Tensor, bias: Tensor },
}

/// Outputs of a panel.
const PANEL: usize = 32;
/// Multiply-adds from which on it pays to wake other threads.
const WORTH_THREADS: usize = 1 << 18;

impl PackedLinear {
    /// `weight` `[outputs, inputs]` (PyTorch's layout) and `bias` `[outputs]`; copies of their present
    /// values.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        if bias.dims() != [outputs] || outputs == 0 || inputs == 0 {
            bail!("the weight is {:?} and the bias {:?}", weight.dims(), bias.dims());
        }
        let layout = if on_cpu(weight.device()) {
            let values = weight.flatten_all()?.to_vec1::<f32>()?;
            let panels = outputs.div_ceil(PANEL);
            let mut packed = vec![0f32; panels * inputs * PANEL];
            for (output, row) in values.chunks(inputs).enumerate() {
                let panel = output / PANEL * inputs * PANEL;
                for (input, value) in row.iter().enumerate() {
                    packed[panel + input * PANEL + output % PANEL] = *value;
                }
            }
            let mut padded = bias.to_vec1::<f32>()?;
            padded.resize(panels * PANEL, 0.0);
            Layout::Panels { weight: Arc::new(packed), bias: Arc::new(padded) }
        } else {
            Layout::Tensors { weight: weight.t()?.contiguous()?.detach(), bias: bias.detach() }
        };
        Ok(Self { inputs, outputs, layout })
    }

    /// `x` `[N, inputs]`, through ReLU first where `relu_input` → `[N, outputs]`.
    pub fn forward(&self, x: &Tensor, relu_input: bool) -> Result<Tensor> {
        let (rows, inputs) = x.dims2()?;
        if inputs != self.inputs {
            bail!("the input has {inputs} columns, the weight takes {}", self.inputs);
        }
        match &self.layout {
            Layout::Panels { weight, bias } => {
                let mut y = vec![0f32; rows * self.outputs];
                f32_slice(&x.contiguous()?, |x| {
                    if relu_input {
                        // NaN must not vanish.
                        let x: Vec<f32> =
                            x.iter().map(|&v| if v <= 0.0 { 0.0 } else { v }).collect();
                        self.multiply(&x, weight, bias, &mut y);
                    } else {
                        self.multiply(x, weight, bias, &mut y);
                    }
                })?;
                Tensor::from_vec(y, (rows, self.outputs), x.device())
            }
            Layout::Tensors { weight, bias } => {
                let x = if relu_input { relu(x)? } else { x.clone() };
                x.detach().matmul(weight)?.broadcast_add(bias)
            }
        }
    }

    fn multiply(&self, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
        let size = self.inputs * PANEL;
        let rows = x.len() / self.inputs;
        let panels = |first: usize, count: usize| {
            let mut sums = vec![0f32; rows * count * PANEL];
            vectorized(
                #[inline(always)]
                || {
                    for (index, sums) in sums.chunks_mut(rows * PANEL).enumerate() {
                        let panel = first + index;
                        let weight = &weight[panel * size..(panel + 1) * size];
                        let bias = &bias[panel * PANEL..(panel + 1) * PANEL];
                        panel_rows(x, self.inputs, weight, bias, sums);
                    }
                },
            );
            sums
        };
        let count = self.outputs.div_ceil(PANEL);
        let at_once = if rows * self.inputs * self.outputs < WORTH_THREADS {
            count
        } else {
            (WORTH_THREADS / 4).div_ceil(rows * size)
        };
        let tasks: Vec<usize> = (0..count).step_by(at_once.max(1)).collect();
        let run = |&first: &usize| (first, panels(first, at_once.min(count - first)));
        let results: Vec<(usize, Vec<f32>)> = match tasks.as_slice() {
            [only] => vec![run(only)],
            _ => tasks.par_iter().map(run).collect(),
        };
        for (first, sums) in results {
            for (index, sums) in sums.chunks(rows * PANEL).enumerate() {
                let column = (first + index) * PANEL;
                let width = PANEL.min(self.outputs - column);
                for (y, sums) in y.chunks_mut(self.outputs).zip(sums.chunks(PANEL)) {
                    y[column..column + width].copy_from_slice(&sums[..width]);
                }
            }
        }
    }
}

/// One panel for all rows, two at a time: the inputs are added in order, whichever way.
#[inline(always)]
fn panel_rows(x: &[f32], inputs: usize, weight: &[f32], bias: &[f32], sums: &mut [f32]) {
    let (weight, _) = weight.as_chunks::<PANEL>();
    let (sums, _) = sums.as_chunks_mut::<PANEL>();
    let mut start = [0f32; PANEL];
    start.copy_from_slice(bias);
    for (x, sums) in x.chunks(2 * inputs).zip(sums.chunks_mut(2)) {
        if let [first, second] = sums {
            let (x0, x1) = x.split_at(inputs);
            let (mut a, mut b) = (start, start);
            for ((w, x0), x1) in weight.iter().zip(x0).zip(x1) {
                for ((a, b), w) in a.iter_mut().zip(&mut b).zip(w) {
                    *a += x0 * w;
                    *b += x1 * w;
                }
            }
            (*first, *second) = (a, b);
        } else if let [only] = sums {
            let mut a = start;
            for (w, x) in weight.iter().zip(x) {
                for (a, w) in a.iter_mut().zip(w) {
                    *a += x * w;
                }
            }
            *only = a;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(start: f32, dims: (usize, usize)) -> Tensor {
        let values = (0..dims.0 * dims.1).map(|i| (i as f32 * 12.9898 + start).sin()).collect();
        Tensor::from_vec(values, dims, &crate::test_device()).unwrap()
    }

    #[test]
    fn it_agrees_with_matmul_and_a_row_does_not_depend_on_the_others() {
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 5, 33), (4, 70, 64), (9, 300, 517)] {
            let (x, weight) = (random(1.0, (rows, inputs)), random(2.0, (outputs, inputs)));
            let bias = random(3.0, (1, outputs)).squeeze(0).unwrap();
            let linear = PackedLinear::new(&weight, &bias).unwrap();
            for relu_input in [false, true] {
                let y = linear.forward(&x, relu_input).unwrap().to_vec2::<f32>().unwrap();
                let input = if relu_input { relu(&x).unwrap() } else { x.clone() };
                let theirs = input.matmul(&weight.t().unwrap()).unwrap();
                let theirs = theirs.broadcast_add(&bias).unwrap().to_vec2::<f32>().unwrap();
                // Each of the roundings is below ε/2 times the sum of the sizes of the products.
                let bound = 2.0 * f32::EPSILON * (inputs as f32 + 1.0) * (inputs as f32).sqrt();
                for (a, b) in y.iter().flatten().zip(theirs.iter().flatten()) {
                    assert!((a - b).abs() <= bound, "{a} {b}");
                }
                for (row, y) in y.iter().enumerate() {
                    let alone = x.narrow(0, row, 1).unwrap();
                    let alone = linear.forward(&alone, relu_input).unwrap();
                    let alone = &alone.to_vec2::<f32>().unwrap()[0];
                    // To the bit on the CPU.
                    let bound = if crate::test_device().is_cpu() { 0. } else { bound };
                    assert!(alone.iter().zip(y).all(|(a, b)| (a - b).abs() <= bound));
                }
            }
        }
        let linear =
            PackedLinear::new(&random(0., (2, 3)), &random(0., (1, 2)).squeeze(0).unwrap());
        assert!(linear.unwrap().forward(&random(0., (1, 4)), false).is_err());
    }
}

//! A stack as one operation on the CPU.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::cpu::buffers::{Buffer, Buffers};
use crate::cpu::conv::{Finish, Geometry, large_to_small, small_to_large};
use crate::cpu::weight_gradient::{column_sums, weight_gradient};
use crate::stack::{Layer, residual_1x1, residual_3x3};
use crate::storage::{f32_elements, f32_slice};
use crate::{Conv2d, ConvTranspose2d, Precision};

/// A stack's forward and backward pass for one input shape; operands are the input and all
/// parameters, flat and side by side.
pub(crate) struct FusedStack {
    steps: Vec<Step>,
    output: Vec<usize>,
    buffers: Buffers,
    /// Whether a backward pass can follow, which needs what is between the layers.
    keep: bool,
    saved: Mutex<Option<Vec<Saved>>>,
}

/// A convolution within the stack.
pub(crate) struct Convolution {
    pub(crate) geometry: Geometry,
    pub(crate) transposed: bool,
    /// Whether its input goes through ReLU first.
    pub(crate) relu: bool,
    /// Where its parameters are among all.
    pub(crate) weight: Range<usize>,
    pub(crate) bias: Range<usize>,
}

/// What a layer comes to for one input shape.
pub(crate) enum Step {
    Convolution(Convolution),
    /// ReLU of that many dimensions.
    Relu(Vec<usize>),
    /// `h + second(relu(first(relu(h))))`.
    Residual {
        first: Convolution,
        second: Convolution,
    },
}

/// What a step's backward pass needs beside its input.
struct Saved {
    /// The step's output, for all but the last.
    output: Option<Buffer>,
    /// Between the two convolutions of a residual step.
    hidden: Option<Buffer>,
}

impl FusedStack {
    pub(crate) fn new(
        layers: &[Layer],
        precision: Precision,
        input: &[usize],
        buffers: &Buffers,
        keep: bool,
    ) -> Result<Self> {
        let (steps, output) = plan(layers, precision, input)?;
        let (buffers, saved) = (buffers.clone(), Mutex::new(None));
        Ok(Self { steps, output, buffers, keep, saved })
    }

    /// Runs all steps; gives the last one's output and, where asked for, the others'.
    fn run(&self, x: &[f32], theta: &[f32], keep: bool) -> (Vec<f32>, Vec<Saved>) {
        let mut saved: Vec<Saved> = Vec::with_capacity(self.steps.len());
        let mut last = Vec::new();
        let mut previous: Option<Buffer> = None;
        for (index, step) in self.steps.iter().enumerate() {
            let length = step.output_dims().iter().product();
            let mut output = (index + 1 < self.steps.len()).then(|| self.buffers.take(length));
            let to: &mut [f32] = if let Some(buffer) = &mut output {
                buffer
            } else {
                last = vec![0.; length];
                &mut last
            };
            let from: &[f32] = match (&previous, saved.last()) {
                (Some(buffer), _) | (None, Some(Saved { output: Some(buffer), .. })) => buffer,
                _ => x,
            };
            let hidden = match step {
                Step::Convolution(convolution) => {
                    convolution.forward(from, theta, None, &self.buffers, to);
                    None
                }
                Step::Relu(_) => {
                    relu(from, from, to);
                    None
                }
                Step::Residual { first, second } => {
                    let mut hidden = self.buffers.take(first.output_len());
                    first.forward(from, theta, None, &self.buffers, &mut hidden);
                    second.forward(&hidden, theta, Some(from), &self.buffers, to);
                    Some(hidden)
                }
            };
            if keep {
                saved.push(Saved { output, hidden });
            } else {
                previous = output;
            }
        }
        (last, saved)
    }

    /// Gradients of the input (where asked for) and of all parameters.
    fn gradients(
        &self,
        x: &[f32],
        theta: &[f32],
        grad: &[f32],
        of_input: bool,
    ) -> (Option<Vec<f32>>, Vec<f32>) {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A second backward pass through the same graph finds nothing and computes it anew.
        let mut saved = saved.unwrap_or_else(|| self.run(x, theta, true).1);
        let mut of_theta = vec![0.; theta.len()];
        let mut of_output: Option<Buffer> = None;
        for (index, step) in self.steps.iter().enumerate().rev() {
            let hidden = saved.pop().and_then(|saved| saved.hidden);
            let input: &[f32] = match saved.last() {
                Some(Saved { output: Some(buffer), .. }) => buffer,
                _ => x,
            };
            let grad: &[f32] = of_output.as_deref().unwrap_or(grad);
            let wanted = index > 0 || of_input;
            let mut of_step_input = wanted.then(|| self.buffers.take(input.len()));
            match step {
                Step::Convolution(convolution) => {
                    convolution.parameter_gradients(input, grad, &self.buffers, &mut of_theta);
                    if let Some(to) = &mut of_step_input {
                        convolution.input_gradient(input, theta, grad, None, &self.buffers, to);
                    }
                }
                Step::Relu(_) => {
                    if let Some(to) = &mut of_step_input {
                        relu(grad, input, to);
                    }
                }
                Step::Residual { first, second } => {
                    let Some(hidden) = hidden else { continue };
                    second.parameter_gradients(&hidden, grad, &self.buffers, &mut of_theta);
                    let mut of_hidden = self.buffers.take(hidden.len());
                    second.input_gradient(
                        &hidden,
                        theta,
                        grad,
                        None,
                        &self.buffers,
                        &mut of_hidden,
                    );
                    first.parameter_gradients(input, &of_hidden, &self.buffers, &mut of_theta);
                    if let Some(to) = &mut of_step_input {
                        first.input_gradient(
                            input,
                            theta,
                            &of_hidden,
                            Some(grad),
                            &self.buffers,
                            to,
                        );
                    }
                }
            }
            of_output = of_step_input;
        }
        (of_output.map(|buffer| buffer.to_vec()), of_theta)
    }
}

/// The steps of a chain of layers for an input of that shape, and the shape of its output.
pub(crate) fn plan(
    layers: &[Layer],
    precision: Precision,
    input: &[usize],
) -> Result<(Vec<Step>, Vec<usize>)> {
    let mut dims = input.to_vec();
    let mut offset = 0;
    let mut take = |shape: &[usize]| {
        let start = offset;
        offset += shape.iter().product::<usize>();
        start..offset
    };
    let mut steps = Vec::with_capacity(layers.len());
    for layer in layers {
        let shapes: Vec<Vec<usize>> =
            layer.parameters().into_iter().map(|(_, shape)| shape).collect();
        let mut convolution = |geometry, transposed, relu, at: usize| -> Result<Convolution> {
            let (Some(weight), Some(bias)) = (shapes.get(at), shapes.get(at + 1)) else {
                bail!("a layer without weight and bias");
            };
            let (weight, bias) = (take(weight), take(bias));
            Ok(Convolution { geometry, transposed, relu, weight, bias })
        };
        let step = match layer {
            Layer::Conv2d { config, .. } => Step::Convolution(convolution(
                Conv2d { precision, ..*config }.geometry(&dims, &shapes[0])?,
                false,
                config.relu_input,
                0,
            )?),
            Layer::ConvTranspose2d { config, .. } => Step::Convolution(convolution(
                ConvTranspose2d { precision, ..*config }.geometry(&dims, &shapes[0])?,
                true,
                config.relu_input,
                0,
            )?),
            Layer::Relu { .. } => Step::Relu(dims.clone()),
            Layer::Residual { .. } => {
                let first = convolution(
                    residual_3x3(precision).geometry(&dims, &shapes[0])?,
                    false,
                    true,
                    0,
                )?;
                let hidden = first.output_dims();
                let second = convolution(
                    residual_1x1(precision).geometry(&hidden, &shapes[2])?,
                    false,
                    true,
                    2,
                )?;
                Step::Residual { first, second }
            }
        };
        dims = step.output_dims();
        steps.push(step);
    }
    Ok((steps, dims))
}

/// `values` where `gate` is above zero (or not a number), zero elsewhere.
fn relu(values: &[f32], gate: &[f32], to: &mut [f32]) {
    const CHUNK: usize = 1 << 15;
    let chunks = values.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK));
    to.par_chunks_mut(CHUNK).zip(chunks).for_each(|(to, (values, gate))| {
        for ((to, value), gate) in to.iter_mut().zip(values).zip(gate) {
            *to = if *gate <= 0. { 0. } else { *value };
        }
    });
}

impl Step {
    fn output_dims(&self) -> Vec<usize> {
        match self {
            Self::Convolution(convolution) => convolution.output_dims(),
            Self::Relu(dims) => dims.clone(),
            Self::Residual { second, .. } => second.output_dims(),
        }
    }
}

impl Convolution {
    fn output_dims(&self) -> Vec<usize> {
        let out = if self.transposed { self.geometry.large } else { self.geometry.small };
        vec![out.batch, out.height, out.width, out.channels]
    }

    fn output_len(&self) -> usize {
        self.output_dims().iter().product()
    }

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        residual: Option<&[f32]>,
        buffers: &Buffers,
        to: &mut [f32],
    ) {
        let finish = Finish { bias: Some(&theta[self.bias.clone()]), mask: None, residual };
        let run = if self.transposed { small_to_large } else { large_to_small };
        run(&self.geometry, x, self.relu, &theta[self.weight.clone()], finish, buffers, to);
    }

    fn input_gradient(
        &self,
        x: &[f32],
        theta: &[f32],
        grad: &[f32],
        residual: Option<&[f32]>,
        buffers: &Buffers,
        to: &mut [f32],
    ) {
        let finish = Finish { bias: None, mask: self.relu.then_some(x), residual };
        let run = if self.transposed { large_to_small } else { small_to_large };
        run(&self.geometry, grad, false, &theta[self.weight.clone()], finish, buffers, to);
    }

    fn parameter_gradients(
        &self,
        x: &[f32],
        grad: &[f32],
        buffers: &Buffers,
        of_theta: &mut [f32],
    ) {
        let (x, grad) = ((x, self.relu), (grad, false));
        let (large, small) = if self.transposed { (grad, x) } else { (x, grad) };
        let of_weight = &mut of_theta[self.weight.clone()];
        weight_gradient(&self.geometry, large, small, buffers, of_weight);
        let of_bias = &mut of_theta[self.bias.clone()];
        column_sums(grad.0, of_bias.len(), of_bias);
    }
}

impl CustomOp2 for FusedStack {
    fn name(&self) -> &'static str {
        "vq-stack"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        theta: &CpuStorage,
        theta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, theta) = (f32_elements(x, x_layout)?, f32_elements(theta, theta_layout)?);
        let (output, saved) = self.run(x, theta, self.keep);
        if self.keep {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        Ok((CpuStorage::F32(output), Shape::from(self.output.clone())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_input = x.track_op();
        let (of_x, of_theta) = f32_slice(x, |x| {
            f32_slice(theta, |theta| {
                f32_slice(&grad, |grad| self.gradients(x, theta, grad, of_input))
            })
        })???;
        let of_x =
            of_x.map(|values| Tensor::from_vec(values, x.shape(), x.device())).transpose()?;
        Ok((of_x, Some(Tensor::from_vec(of_theta, theta.shape(), x.device())?)))
    }
}

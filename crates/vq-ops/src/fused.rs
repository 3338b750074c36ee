//! A stack as one operation on the CPU.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::cpu::activation::{Activation, Read, Reading};
use crate::cpu::buffers::Buffers;
use crate::cpu::conv::{Finish, Geometry, large_to_small, small_to_large};
use crate::cpu::elements::{Elements, Output};
use crate::cpu::pack::Images;
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
    /// Of the parameter: the geometry may be that of the same product in another form.
    pub(crate) kernel: (usize, usize),
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
    output: Option<Activation>,
    /// Between the two convolutions of a residual step.
    hidden: Option<Activation>,
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
        buffers.begin_pass();
        let (buffers, saved) = (buffers.clone(), Mutex::new(None));
        Ok(Self { steps, output, buffers, keep, saved })
    }

    /// Runs all steps; gives the last one's output and, where asked for, the others'.
    fn run(&self, x: &[f32], theta: &[f32], keep: bool) -> (Vec<f32>, Vec<Saved>) {
        let mut saved: Vec<Saved> = Vec::with_capacity(self.steps.len());
        let mut last = Vec::new();
        let mut previous: Option<Activation> = None;
        for (index, step) in self.steps.iter().enumerate() {
            let length = step.output_dims().iter().product();
            let next = self.steps.get(index + 1);
            let mut output =
                next.map(|next| Activation::new(length, next.reads_input(), &self.buffers));
            let to = if let Some(activation) = &mut output {
                activation.output()
            } else {
                last = vec![0.; length];
                Output::F32(&mut last)
            };
            let from: Read<'_> = match (&previous, saved.last()) {
                (Some(input), _) | (None, Some(Saved { output: Some(input), .. })) => input.read(),
                _ => x.into(),
            };
            let hidden = match step {
                Step::Convolution(convolution) => {
                    convolution.forward(from.elements, theta, None, &self.buffers, to);
                    None
                }
                Step::Relu(_) => {
                    to.through_f32(&self.buffers, |to| relu(from.values, from.values, to));
                    None
                }
                Step::Residual { first, second } => {
                    let reading = second.reads_input();
                    let mut hidden = Activation::new(first.output_len(), reading, &self.buffers);
                    first.forward(from.elements, theta, None, &self.buffers, hidden.output());
                    let (x, residual) = (hidden.read().elements, Some(from.values));
                    second.forward(x, theta, residual, &self.buffers, to);
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

    /// Gradients of the input and of all parameters, each where it is asked for.
    fn gradients(
        &self,
        x: &[f32],
        theta: &[f32],
        grad: &[f32],
        (of_input, of_parameters): (bool, bool),
    ) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A second backward pass through the same graph finds nothing and computes it anew.
        let mut saved = saved.unwrap_or_else(|| self.run(x, theta, true).1);
        let mut of_theta = of_parameters.then(|| vec![0.; theta.len()]);
        let mut of_output: Option<Activation> = None;
        for (index, step) in self.steps.iter().enumerate().rev() {
            let hidden = saved.pop().and_then(|saved| saved.hidden);
            let input: Read<'_> = match saved.last() {
                Some(Saved { output: Some(input), .. }) => input.read(),
                _ => x.into(),
            };
            let grad: Read<'_> = of_output.as_ref().map_or(grad.into(), Activation::read);
            // Read by the step before this one, or by whoever asked for it.
            let reading = match index.checked_sub(1).and_then(|before| self.steps.get(before)) {
                Some(before) => Some(before.reads_gradient()),
                None => of_input.then_some(Reading::VALUES),
            };
            let mut of_step_input =
                reading.map(|reading| Activation::new(step.input_len(), reading, &self.buffers));
            let to = of_step_input.as_mut().map(Activation::output);
            match step {
                Step::Convolution(convolution) => {
                    let (x, grad) = (input.elements, grad.elements);
                    if let Some(of_theta) = &mut of_theta {
                        convolution.parameter_gradients(x, grad, &self.buffers, of_theta);
                    }
                    if let Some(to) = to {
                        convolution.input_gradient(x, theta, grad, None, &self.buffers, to);
                    }
                }
                Step::Relu(_) => {
                    if let Some(to) = to {
                        to.through_f32(&self.buffers, |to| relu(grad.values, input.values, to));
                    }
                }
                Step::Residual { first, second } => {
                    let Some(hidden) = hidden else { continue };
                    let x = hidden.read().elements;
                    if let Some(of_theta) = &mut of_theta {
                        second.parameter_gradients(x, grad.elements, &self.buffers, of_theta);
                    }
                    let reading = first.reads_gradient();
                    let mut of_hidden = Activation::new(first.output_len(), reading, &self.buffers);
                    let to_hidden = of_hidden.output();
                    second.input_gradient(x, theta, grad.elements, None, &self.buffers, to_hidden);
                    let (x, of_hidden) = (input.elements, of_hidden.read().elements);
                    if let Some(of_theta) = &mut of_theta {
                        first.parameter_gradients(x, of_hidden, &self.buffers, of_theta);
                    }
                    if let Some(to) = to {
                        let residual = Some(grad.values);
                        first.input_gradient(x, theta, of_hidden, residual, &self.buffers, to);
                    }
                }
            }
            of_output = of_step_input;
        }
        (of_output.map(|gradient| gradient.read().values.to_vec()), of_theta)
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
        let mut convolution =
            |geometry: Geometry, transposed, relu, at: usize| -> Result<Convolution> {
                let (Some(weight), Some(bias)) = (shapes.get(at), shapes.get(at + 1)) else {
                    bail!("a layer without weight and bias");
                };
                let (weight, bias) = (take(weight), take(bias));
                let kernel = geometry.kernel;
                Ok(Convolution { geometry, transposed, relu, kernel, weight, bias })
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

    fn input_len(&self) -> usize {
        match self {
            Self::Convolution(convolution) => convolution.ends().0.len(),
            Self::Relu(dims) => dims.iter().product(),
            Self::Residual { first, .. } => first.ends().0.len(),
        }
    }

    fn reads_input(&self) -> Reading {
        match self {
            Self::Convolution(convolution) => convolution.reads_input(),
            Self::Relu(_) => Reading::VALUES,
            // The sum's second term is the input itself.
            Self::Residual { first, .. } => Reading { values: true, ..first.reads_input() },
        }
    }

    /// As `reads_input`, for the gradient of the output.
    fn reads_gradient(&self) -> Reading {
        match self {
            Self::Convolution(convolution) => convolution.reads_gradient(),
            Self::Relu(_) => Reading::VALUES,
            Self::Residual { second, .. } => Reading { values: true, ..second.reads_gradient() },
        }
    }
}

impl Convolution {
    /// (input, output) sizes.
    pub(crate) fn ends(&self) -> (Images, Images) {
        let Geometry { large, small, .. } = self.geometry;
        if self.transposed { (small, large) } else { (large, small) }
    }

    fn output_dims(&self) -> Vec<usize> {
        let (_, out) = self.ends();
        vec![out.batch, out.height, out.width, out.channels]
    }

    pub(crate) fn output_len(&self) -> usize {
        self.ends().1.len()
    }

    pub(crate) fn reads_input(&self) -> Reading {
        match self.geometry.precision {
            Precision::F32 => Reading::VALUES,
            Precision::Bf16 => Reading { values: false, rounded: Some(self.relu) },
        }
    }

    pub(crate) fn reads_gradient(&self) -> Reading {
        let rounded = self.reads_input().rounded.map(|_| false);
        Reading { rounded, ..self.reads_input() }
    }

    pub(crate) fn forward(
        &self,
        x: Elements<'_>,
        theta: &[f32],
        residual: Option<&[f32]>,
        buffers: &Buffers,
        to: Output<'_>,
    ) {
        let finish = Finish { bias: Some(&theta[self.bias.clone()]), mask: None, residual };
        let run = if self.transposed { small_to_large } else { large_to_small };
        run(&self.geometry, x, self.relu, &theta[self.weight.clone()], finish, buffers, to);
    }

    pub(crate) fn input_gradient(
        &self,
        x: Elements<'_>,
        theta: &[f32],
        grad: Elements<'_>,
        residual: Option<&[f32]>,
        buffers: &Buffers,
        to: Output<'_>,
    ) {
        let finish = Finish { bias: None, mask: self.relu.then_some(x), residual };
        let run = if self.transposed { large_to_small } else { small_to_large };
        run(&self.geometry, grad, false, &theta[self.weight.clone()], finish, buffers, to);
    }

    pub(crate) fn parameter_gradients(
        &self,
        x: Elements<'_>,
        grad: Elements<'_>,
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

/// Runs `work` on a thread of the pool. Its many parallel loops then find the other threads awake, and do
/// not each hand over to the pool and wait.
pub(crate) fn on_a_worker<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
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
        let (output, saved) = on_a_worker(|| self.run(x, theta, self.keep));
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
        let wanted = (x.track_op(), theta.track_op());
        let (of_x, of_theta) = f32_slice(x, |x| {
            f32_slice(theta, |theta| {
                f32_slice(&grad, |grad| on_a_worker(|| self.gradients(x, theta, grad, wanted)))
            })
        })???;
        let of_x =
            of_x.map(|values| Tensor::from_vec(values, x.shape(), x.device())).transpose()?;
        let of_theta = of_theta
            .map(|values| Tensor::from_vec(values, theta.shape(), x.device()))
            .transpose()?;
        Ok((of_x, of_theta))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn gradients_that_nobody_asks_for_are_not_computed() -> Result<()> {
        let config = Conv2d { padding: 1, ..Conv2d::default() };
        let layers = [
            Layer::Conv2d { in_channels: 3, out_channels: 8, kernel: 3, config },
            Layer::Relu { channels: 8 },
            Layer::Residual { channels: 8, hidden: 4 },
        ];
        let count: usize = layers
            .iter()
            .flat_map(Layer::parameters)
            .map(|(_, s)| s.iter().product::<usize>())
            .sum();
        let random = |shape: &[usize]| {
            Tensor::rand(-1f32, 1., shape, &Device::Cpu).and_then(|t| Var::from_tensor(&t))
        };
        let (x, theta) = (random(&[2, 5, 4, 3])?, random(&[count])?);
        let grad = random(&[2, 5, 4, 8])?.as_detached_tensor();
        let (x, theta) = (x.as_tensor(), theta.as_tensor());
        let run = |x: &Tensor, theta: &Tensor| {
            let buffers = Buffers::default();
            FusedStack::new(&layers, Precision::F32, x.dims(), &buffers, true)?
                .bwd(x, theta, &grad, &grad)
        };
        let bits = |t: Option<Tensor>| t.map(|t| t.flatten_all()?.to_vec1::<f32>()).transpose();
        let (of_x, of_theta) = run(x, theta)?;
        let (only_x, none) = run(x, &theta.detach())?;
        assert!(none.is_none());
        assert_eq!(bits(only_x)?, bits(of_x)?);
        let (none, only_theta) = run(&x.detach(), theta)?;
        assert!(none.is_none());
        assert_eq!(bits(only_theta)?, bits(of_theta)?);
        Ok(())
    }
}

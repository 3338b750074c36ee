//! A stack as one operation made of [primitives](crate::primitives): what runs on CUDA, and on the CPU in
//! tests.
//!
//! Between the layers, everything is kept in the format of the products. A layer's bias, residual and the
//! ReLU that its successor wants are one pass behind its product.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail};

use crate::Precision;
use crate::fused::{Convolution, Step};
use crate::primitives::{
    Outputs, Product, column_sums, finish, mask, multiply, pack_weight, unpack_weight,
};

/// Runs the steps on `x` `[B, H, W, C]` f32, with all parameters side by side in `theta`. Differentiable in
/// both.
pub(crate) fn run(
    steps: Vec<Step>,
    precision: Precision,
    x: &Tensor,
    theta: &Tensor,
) -> Result<Tensor> {
    let dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    let (x, theta) = (x.contiguous()?, theta.contiguous()?);
    let (output, tape) = forward(&steps, dtype, &x.detach(), &theta.detach())?;
    if !x.track_op() && !theta.track_op() {
        return Ok(output);
    }
    let tape = Mutex::new(Some(tape));
    x.apply_op2(&theta, DeviceStack { steps, dtype, output, tape })
}

/// The operation that the graph knows: its forward pass has run already.
struct DeviceStack {
    steps: Vec<Step>,
    dtype: DType,
    output: Tensor,
    /// Gone after the first backward pass.
    tape: Mutex<Option<Vec<Kept>>>,
}

/// What a step's backward pass needs.
struct Kept {
    input: Map,
    /// The rectified map between a residual step's convolutions.
    hidden: Option<Tensor>,
    /// Of its convolutions.
    weights: Vec<Tensor>,
}

/// A feature map, as far as the step that takes it wants it.
#[derive(Default)]
struct Map {
    plain: Option<Tensor>,
    rectified: Option<Tensor>,
}

impl Map {
    fn plain(&self) -> Result<&Tensor> {
        self.plain.as_ref().ok_or_else(missing)
    }

    fn rectified(&self) -> Result<&Tensor> {
        self.rectified.as_ref().ok_or_else(missing)
    }

    fn of(&self, convolution: &Convolution) -> Result<&Tensor> {
        if convolution.relu { self.rectified() } else { self.plain() }
    }

    /// `y` with what is added to it, in the forms that `wanted` names.
    fn finish(
        y: &Tensor,
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
        wanted: Outputs,
    ) -> Result<Self> {
        // Two tensors in one must both lie where vector instructions can reach them.
        if wanted.count() == 2 && y.elem_count().is_multiple_of(8) {
            let both = finish(y, bias, residual, wanted)?;
            return Ok(Self { plain: Some(both.get(0)?), rectified: Some(both.get(1)?) });
        }
        let only = |is_wanted: bool, outputs| {
            is_wanted.then(|| finish(y, bias, residual, outputs)).transpose()
        };
        Ok(Self {
            plain: only(wanted.plain, Outputs::PLAIN)?,
            rectified: only(wanted.rectified, Outputs::RECTIFIED)?,
        })
    }
}

impl Step {
    /// The forms of its input that the step uses.
    fn wants(&self) -> Outputs {
        match self {
            Self::Convolution(convolution) => {
                Outputs { plain: !convolution.relu, rectified: convolution.relu }
            }
            Self::Relu(_) => Outputs::RECTIFIED,
            Self::Residual { .. } => Outputs { plain: true, rectified: true },
        }
    }
}

impl Convolution {
    fn weight(&self, theta: &Tensor, dtype: DType) -> Result<Tensor> {
        let (outer, inner, _) = self.geometry.weight_shape();
        let (kh, kw) = self.geometry.kernel;
        let flat = theta.narrow(0, self.weight.start, self.weight.len())?;
        pack_weight(&flat.reshape((outer, inner, kh, kw))?, dtype)
    }

    fn bias(&self, theta: &Tensor) -> Result<Tensor> {
        theta.narrow(0, self.bias.start, self.bias.len())
    }

    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let product = if self.transposed { Product::SmallToLarge } else { Product::LargeToSmall };
        multiply(&self.geometry, product, x, weight)
    }

    fn gradient_product(&self, grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let product = if self.transposed { Product::LargeToSmall } else { Product::SmallToLarge };
        multiply(&self.geometry, product, grad, weight)
    }

    /// Of weight and bias, flat, in f32.
    fn gradients(&self, x: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
        let (large, small) = if self.transposed { (grad, x) } else { (x, grad) };
        let weight = multiply(&self.geometry, Product::Weight, large, small)?;
        Ok([unpack_weight(&weight)?.flatten_all()?, column_sums(grad)?])
    }
}

fn forward(
    steps: &[Step],
    dtype: DType,
    x: &Tensor,
    theta: &Tensor,
) -> Result<(Tensor, Vec<Kept>)> {
    let x = x.to_dtype(dtype)?;
    let wants = |index: usize| steps.get(index).map_or(Outputs::PLAIN, Step::wants);
    let wanted = wants(0);
    let mut map = Map {
        plain: wanted.plain.then(|| x.clone()),
        rectified: wanted
            .rectified
            .then(|| finish(&x, None, None, Outputs::RECTIFIED))
            .transpose()?,
    };
    let mut tape = Vec::with_capacity(steps.len());
    for (index, step) in steps.iter().enumerate() {
        let wanted = wants(index + 1);
        let (next, hidden, weights) = match step {
            Step::Convolution(convolution) => {
                let weight = convolution.weight(theta, dtype)?;
                let y = convolution.product(map.of(convolution)?, &weight)?;
                let next = Map::finish(&y, Some(&convolution.bias(theta)?), None, wanted)?;
                (next, None, vec![weight])
            }
            Step::Relu(_) => {
                // Rectifying twice changes nothing.
                let y = map.rectified()?.clone();
                (Map { plain: Some(y.clone()), rectified: Some(y) }, None, Vec::new())
            }
            Step::Residual { first, second } => {
                let weights = [first.weight(theta, dtype)?, second.weight(theta, dtype)?];
                let y = first.product(map.rectified()?, &weights[0])?;
                let bias = first.bias(theta)?;
                let hidden = finish(&y, Some(&bias), None, Outputs::RECTIFIED)?;
                let y = second.product(&hidden, &weights[1])?;
                let bias = second.bias(theta)?;
                let next = Map::finish(&y, Some(&bias), Some(map.plain()?), wanted)?;
                (next, Some(hidden), weights.to_vec())
            }
        };
        tape.push(Kept { input: std::mem::replace(&mut map, next), hidden, weights });
    }
    Ok((map.plain()?.to_dtype(DType::F32)?, tape))
}

/// The gradients of the input and of all parameters, each where it is asked for.
fn backward(
    steps: &[Step],
    tape: &[Kept],
    grad: &Tensor,
    (of_input, of_parameters): (bool, bool),
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    // Last first until the end.
    let mut of_theta: Vec<Tensor> = Vec::new();
    let mut grad = grad.clone();
    for (index, (step, Kept { input, hidden, weights })) in steps.iter().zip(tape).enumerate().rev()
    {
        let is_wanted = index > 0 || of_input;
        match (step, &weights[..], hidden) {
            (Step::Convolution(convolution), [weight], _) => {
                if of_parameters {
                    let x = input.of(convolution)?;
                    let [of_weight, of_bias] = convolution.gradients(x, &grad)?;
                    of_theta.extend([of_bias, of_weight]);
                }
                if is_wanted {
                    grad = convolution.gradient_product(&grad, weight)?;
                    if convolution.relu {
                        grad = mask(&grad, input.rectified()?, None)?;
                    }
                }
            }
            (Step::Relu(_), ..) => grad = mask(&grad, input.rectified()?, None)?,
            (Step::Residual { first, second }, [weight1, weight2], Some(hidden)) => {
                if of_parameters {
                    let [of_weight, of_bias] = second.gradients(hidden, &grad)?;
                    of_theta.extend([of_bias, of_weight]);
                }
                let of_hidden = mask(&second.gradient_product(&grad, weight2)?, hidden, None)?;
                let x = input.rectified()?;
                if of_parameters {
                    let [of_weight, of_bias] = first.gradients(x, &of_hidden)?;
                    of_theta.extend([of_bias, of_weight]);
                }
                if is_wanted {
                    grad = mask(&first.gradient_product(&of_hidden, weight1)?, x, Some(&grad))?;
                }
            }
            _ => return Err(missing()),
        }
    }
    of_theta.reverse();
    let of_theta = if of_parameters { Some(Tensor::cat(&of_theta, 0)?) } else { None };
    let of_x = if of_input { Some(grad.to_dtype(DType::F32)?) } else { None };
    Ok((of_x, of_theta))
}

impl CustomOp2 for DeviceStack {
    fn name(&self) -> &'static str {
        "vq-device-stack"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.output.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a stack's output is on another device"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (storage, layout) = self.output.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a stack's output is on another device"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tape = match tape {
            Some(tape) => tape,
            // A second backward pass through the same graph.
            None => forward(&self.steps, self.dtype, &x.detach(), &theta.detach())?.1,
        };
        let grad = grad.detach().contiguous()?.to_dtype(self.dtype)?;
        backward(&self.steps, &tape, &grad, (x.track_op(), theta.track_op()))
    }
}

fn missing() -> candle_core::Error {
    candle_core::Error::Msg("a stack's step was left without its input".to_owned())
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use crate::dispatch::only_primitives;
    use crate::fused::plan;
    use crate::{Conv2d, ConvTranspose2d, Layer, Precision, Stack, conv_transpose2d, conv2d};

    use super::*;

    fn noise(dims: &[usize], seed: f32) -> Var {
        let n = dims.iter().product();
        let mut state = 1 + seed as u64;
        let values = (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
            })
            .collect();
        Var::from_vec(values, dims, &crate::test_device()).unwrap()
    }

    /// Value and gradients.
    fn run(y: &Tensor, vars: &[Var]) -> Vec<Vec<f32>> {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let weights = noise(y.dims(), 9.).as_detached_tensor();
        let gradients = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let of = vars.iter().map(|var| values(gradients.get(var).unwrap()));
        std::iter::once(values(y)).chain(of).collect()
    }

    #[track_caller]
    fn assert_alike(ours: &[Vec<f32>], theirs: &[Vec<f32>], allowed: f32) {
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours.len(), theirs.len());
            let scale = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
            for (a, b) in ours.iter().zip(theirs) {
                assert!((a - b).abs() <= allowed * scale, "{a} {b} {scale}");
            }
        }
    }

    fn stacks() -> Vec<Vec<Layer>> {
        let conv = |in_channels, out_channels, kernel, stride, padding, relu_input| {
            let config = Conv2d { stride, padding, relu_input, ..Conv2d::default() };
            Layer::Conv2d { in_channels, out_channels, kernel, config }
        };
        let up = |in_channels, out_channels, relu_input| Layer::ConvTranspose2d {
            in_channels,
            out_channels,
            kernel: 4,
            config: ConvTranspose2d { stride: 2, padding: 1, relu_input, ..Default::default() },
        };
        let residual = Layer::Residual { channels: 8, hidden: 3 };
        let relu = |channels| Layer::Relu { channels };
        vec![
            vec![conv(3, 8, 4, 2, 1, false), conv(8, 8, 3, 1, 1, true), residual.clone(), relu(8)],
            vec![relu(3), conv(3, 5, 1, 1, 0, true), up(5, 8, false), residual.clone(), residual],
            vec![up(3, 4, true), relu(4), relu(4), up(4, 3, true)],
            vec![Layer::Residual { channels: 3, hidden: 2 }, relu(3)],
        ]
    }

    #[test]
    fn a_stack_of_primitives_agrees_with_its_layers_one_by_one() {
        for layers in stacks() {
            for (precision, allowed) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.15)] {
                for size in [[2, 6, 8, 3], [1, 6, 6, 3]] {
                    let mut stack = Stack::new(layers.clone()).unwrap();
                    let params: Vec<Var> = layers
                        .iter()
                        .flat_map(Layer::parameters)
                        .enumerate()
                        .map(|(i, (_, shape))| noise(&shape, i as f32))
                        .collect();
                    let tensors: Vec<Tensor> =
                        params.iter().map(|var| var.as_tensor().clone()).collect();
                    let x = noise(&size, 5.);
                    let vars = [std::slice::from_ref(&x), &params[..]].concat();
                    let exact = run(&stack.forward_layerwise(&x, &tensors).unwrap(), &vars);
                    stack.set_precision(precision);
                    let ours =
                        only_primitives(|| run(&stack.forward(&x, &tensors).unwrap(), &vars));
                    if precision == Precision::F32 {
                        assert_alike(&ours, &exact, allowed);
                    } else {
                        // 8 bits of mantissa make a fraction of a percent; but a value at ReLU's edge
                        // that falls to its other side changes the gradients of some hundred others.
                        let pairs = exact.iter().flatten().zip(ours.iter().flatten());
                        let error: f32 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
                        let size: f32 = exact.iter().flatten().map(|v| v * v).sum();
                        assert!((error / size).sqrt() < allowed, "{}", (error / size).sqrt());
                        assert_alike(&ours[..1], &exact[..1], 0.02);
                    }
                }
            }
        }
    }

    #[test]
    fn single_convolutions_agree_and_a_second_backward_pass_runs() {
        let (x, w, b) = (noise(&[2, 5, 7, 3], 1.), noise(&[4, 3, 3, 3], 2.), noise(&[4], 3.));
        let config = Conv2d { padding: 1, relu_input: true, ..Conv2d::default() };
        let run_conv = |bias: Option<&Tensor>| {
            let y = conv2d(&x, &w, bias, config).unwrap();
            (run(&y, &[x.clone(), w.clone()]), run(&y, &[x.clone(), w.clone()]))
        };
        for bias in [None, Some(b.as_tensor())] {
            let (first, second) = only_primitives(|| run_conv(bias));
            assert_eq!(first, second);
            assert_alike(&first, &run_conv(bias).0, 1e-5);
        }
        let config = ConvTranspose2d { stride: 2, output_padding: 1, ..Default::default() };
        let w = noise(&[3, 4, 3, 3], 2.);
        let up = || {
            let y = conv_transpose2d(&x, &w, Some(&b), config).unwrap();
            run(&y, &[x.clone(), w.clone(), b.clone()])
        };
        assert_alike(&only_primitives(up), &up(), 1e-5);
    }

    #[test]
    fn gradients_that_nobody_asks_for_are_not_computed() {
        for layers in stacks() {
            let channels = layers[0].in_channels();
            let (steps, output) = plan(&layers, Precision::F32, &[2, 6, 8, channels]).unwrap();
            let shapes = layers.iter().flat_map(Layer::parameters);
            let count = shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let (x, theta) = (noise(&[2, 6, 8, channels], 1.), noise(&[count], 2.));
            let grad = noise(&output, 3.).as_detached_tensor();
            let op = DeviceStack {
                steps,
                dtype: DType::F32,
                output: grad.clone(),
                tape: Mutex::new(None),
            };
            let run = |x: &Tensor, theta: &Tensor| op.bwd(x, theta, &grad, &grad).unwrap();
            let values =
                |t: Option<Tensor>| t.map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let (of_x, of_theta) = run(&x, &theta);
            let (only_x, none) = run(&x, &theta.detach());
            assert!(none.is_none());
            assert_eq!(values(only_x), values(of_x));
            let (none, only_theta) = run(&x.detach(), &theta);
            assert!(none.is_none());
            assert_eq!(values(only_theta), values(of_theta));
        }
    }
}

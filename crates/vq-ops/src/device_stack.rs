//! A stack as one operation made of [primitives](crate::primitives): what runs on CUDA, and on the CPU in
//! tests.
//!
//! Between the layers, everything is kept in the format of the products. A layer's bias, residual and the
//! ReLU that its successor wants are one pass behind its product.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use crate::Precision;
use crate::cpu::conv::Geometry;
use crate::cpu::pack::Images;
use crate::feature_map::{Beside, Collected, FeatureMap, cpu_storage, place_on_cpu};
use crate::fused::{Convolution, Step};
use crate::gradients::{self, Delivery};
use crate::joined::Joined;
use crate::primitives::{
    Aside, Gradient, Outputs, Product, column_sums, enter, finish, fold, leave, mask, multiply,
    pack_weights, unfold, unpack_gradients,
};

/// Runs the steps on `x` `[B, H, W, C]` f32, with the parameters of all layers in their order. Differentiable in
/// all of them.
pub(crate) fn run(
    steps: Vec<Step>,
    precision: Precision,
    x: &Tensor,
    params: &[Tensor],
) -> Result<Tensor> {
    run_joined(steps, precision, Joined::of(x)?, params, false)?.tensor()
}

/// [`run`] on maps side by side. What it gives stays beside the graph where `beside`.
pub(crate) fn run_joined(
    mut steps: Vec<Step>,
    precision: Precision,
    x: Joined,
    params: &[Tensor],
    beside: bool,
) -> Result<FeatureMap> {
    let detached: Vec<Tensor> = params.iter().map(Tensor::detach).collect();
    let [.., channels] = x.dims();
    let ends = Ends::new(&mut steps, precision, channels, detached.last())?;
    let packed = Packed::new(&steps, &detached, ends.dtype)?;
    let (output, tape) = forward(&steps, &ends, &x, &packed)?;
    let map = match &ends.last {
        _ if !beside => None,
        // Images, put together of windows.
        Some(_) => Some(Beside::new(ends.leave(&output)?, ends.channels)),
        None => Some(Beside::new(output.clone(), ends.channels)),
    };
    let tracked = params.iter().find(|param| param.track_op());
    if x.lead.is_none() && tracked.is_none() {
        return match map {
            Some(map) => Ok(FeatureMap::beside(map)),
            None => ends.leave(&output).map(FeatureMap::from),
        };
    }
    // The graph's second operand: all parameters side by side, or, where their gradients are delivered beside
    // the graph, any of them, for the operation's sake.
    let (second, delivery) = match (tracked, gradients::delivery(params)) {
        (Some(tracked), Some(delivery)) => (tracked.clone(), Some(delivery)),
        (Some(_), None) => {
            let flat = params.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
            (Tensor::cat(&flat, 0)?, None)
        }
        (None, _) => (output.detach(), None),
    };
    let tape = Mutex::new(Some(tape));
    let lead = match &x.lead {
        Some(lead) => lead.clone(),
        None => x.any()?.detach(),
    };
    let of_output = map.as_ref().map(|map| map.gradient.clone());
    let op = DeviceStack { steps, ends, x, params: detached, output, tape, delivery, of_output };
    let result = lead.apply_op2(&second, op)?;
    Ok(match map {
        Some(map) => FeatureMap::beside(Beside { place: Some(result), ..map }),
        None => result.into(),
    })
}

/// The operation that the graph knows: its forward pass has run already.
struct DeviceStack {
    steps: Vec<Step>,
    ends: Ends,
    x: Joined,
    params: Vec<Tensor>,
    /// As the last step left it.
    output: Tensor,
    /// Gone after the first backward pass.
    tape: Mutex<Option<Vec<Kept>>>,
    /// Where the parameters' gradients go, if not into the graph.
    delivery: Option<Delivery>,
    /// Where the output's gradient comes from, if not from the graph.
    of_output: Option<Collected>,
}

/// How maps enter and leave a stack. Inside, their number of channels is a multiple of 16 bytes, with zeros beyond
/// those that count, since cuDNN would otherwise copy them to such maps for every product. Where a convolution
/// takes images of fewer channels than that, or gives them, it is a product of matrices: of the images' windows,
/// which are taken on the way in and put together on the way out.
struct Ends {
    dtype: DType,
    /// Elements of 16 bytes.
    group: usize,
    /// Of the output.
    channels: usize,
    /// The first convolution as it was, where its input comes as windows.
    first: Option<Geometry>,
    /// The last convolution as it was and its bias, where its output are windows.
    last: Option<(Geometry, Tensor)>,
}

impl Ends {
    /// Changes the steps' geometries to those of maps as they are inside.
    fn new(
        steps: &mut [Step],
        precision: Precision,
        channels: usize,
        last_bias: Option<&Tensor>,
    ) -> Result<Self> {
        let (dtype, group) = match precision {
            Precision::F32 => (DType::F32, 4),
            Precision::Bf16 => (DType::BF16, 8),
        };
        let channels = steps.iter().rev().find_map(Step::out_channels).unwrap_or(channels);
        let as_windows = |geometry: &Geometry| {
            let Geometry { large, kernel: (kh, kw), dilation, .. } = *geometry;
            let few = large.channels < group && dilation == 1;
            few && (kh * kw * large.channels).is_multiple_of(group)
        };
        let (mut first, mut last) = (None, None);
        if let Some(Step::Convolution(convolution)) = steps.first_mut()
            && !convolution.transposed
            && !convolution.relu
            && as_windows(&convolution.geometry)
        {
            first = Some(convolution.geometry);
            convolution.geometry = of_windows(&convolution.geometry);
        }
        if let Some(Step::Convolution(convolution)) = steps.last_mut()
            && convolution.transposed
            && as_windows(&convolution.geometry)
            && let Some(bias) = last_bias
        {
            last = Some((convolution.geometry, bias.contiguous()?));
            convolution.geometry = of_windows(&convolution.geometry);
        }
        for convolution in steps.iter_mut().flat_map(Step::convolutions_mut) {
            let Geometry { large, small, .. } = &mut convolution.geometry;
            large.channels = large.channels.next_multiple_of(group);
            small.channels = small.channels.next_multiple_of(group);
        }
        Ok(Self { dtype, group, channels, first, last })
    }

    /// The input `[B, H, W, C]` as the first step takes it.
    fn enter(&self, x: &Joined) -> Result<Tensor> {
        let [.., channels] = x.dims();
        match &self.first {
            Some(geometry) => unfold(&x.join(DType::F32, channels)?, geometry, self.dtype),
            None => x.join(self.dtype, channels.next_multiple_of(self.group)),
        }
    }

    /// What the last step gives, as the output.
    fn leave(&self, y: &Tensor) -> Result<Tensor> {
        match &self.last {
            Some((geometry, bias)) => fold(y, geometry, Some(bias)),
            None => leave(y, self.channels),
        }
    }

    /// The output's gradient as the last step takes it.
    fn enter_back(&self, grad: &Tensor) -> Result<Back> {
        match &self.last {
            Some((geometry, _)) => {
                let sums = Some(column_sums(grad)?);
                Ok(Back { grad: unfold(grad, geometry, self.dtype)?, sums })
            }
            None => {
                let channels = self.channels.next_multiple_of(self.group);
                Ok(Back { grad: enter(grad, self.dtype, channels)?, sums: None })
            }
        }
    }

    /// The gradient of a map that was left beside the graph as the last step takes it.
    fn take_back(&self, grad: Tensor) -> Result<Back> {
        match &self.last {
            Some(_) => self.enter_back(&grad),
            None => Ok(Back { grad, sums: None }),
        }
    }

    /// The gradient that the first step gives, as that of the input, as far as it is for the graph.
    fn leave_back(&self, grad: &Tensor, x: &Joined) -> Result<Option<Tensor>> {
        match &self.first {
            Some(geometry) => x.part(&fold(grad, geometry, None)?),
            None => x.part(grad),
        }
    }
}

/// The same products for windows that lie one beside the other.
fn of_windows(geometry: &Geometry) -> Geometry {
    let Geometry { large, small, kernel: (kh, kw), .. } = *geometry;
    let large = Images { channels: kh * kw * large.channels, ..small };
    Geometry { large, kernel: (1, 1), stride: 1, padding: 0, dilation: 1, ..*geometry }
}

/// The parameters as the products take them: of each convolution in turn.
struct Packed {
    weights: Vec<Tensor>,
    biases: Vec<Tensor>,
}

impl Packed {
    fn new(steps: &[Step], params: &[Tensor], dtype: DType) -> Result<Self> {
        let convolutions = || steps.iter().flat_map(Step::convolutions);
        let weights: Vec<_> = params
            .iter()
            .step_by(2)
            .cloned()
            .zip(convolutions().map(Convolution::packed_channels))
            .collect();
        let packed = pack_weights(&weights, dtype)?;
        let as_products = packed.iter().zip(convolutions()).map(|(weight, convolution)| {
            let (outer, inner, _) = convolution.geometry.weight_shape();
            let (kh, kw) = convolution.geometry.kernel;
            weight.reshape((outer, kh, kw, inner))
        });
        let biases = params.iter().skip(1).step_by(2).map(Tensor::contiguous);
        Ok(Self {
            weights: as_products.collect::<Result<_>>()?,
            biases: biases.collect::<Result<_>>()?,
        })
    }

    fn of(&self, index: usize) -> Result<(Tensor, &Tensor)> {
        let both = self.weights.get(index).zip(self.biases.get(index));
        both.map(|(weight, bias)| (weight.clone(), bias)).ok_or_else(missing)
    }
}

/// A gradient on its way back, with the sums of its columns where they are known already.
struct Back {
    grad: Tensor,
    sums: Option<Tensor>,
}

impl Back {
    /// Masked by `gate`, with `more` added.
    fn masked(grad: &Tensor, gate: &Tensor, more: Option<&Tensor>) -> Result<Self> {
        let (grad, sums) = mask(grad, gate, more)?;
        Ok(Self { grad, sums: Some(sums) })
    }

    fn sums(&self) -> Result<Tensor> {
        self.sums.as_ref().map_or_else(|| column_sums(&self.grad), |sums| Ok(sums.clone()))
    }
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
    fn convolutions(&self) -> impl Iterator<Item = &Convolution> {
        let both = match self {
            Self::Convolution(convolution) => [Some(convolution), None],
            Self::Relu(_) => [None, None],
            Self::Residual { first, second } => [Some(first), Some(second)],
        };
        both.into_iter().flatten()
    }

    fn convolutions_mut(&mut self) -> impl Iterator<Item = &mut Convolution> {
        let both = match self {
            Self::Convolution(convolution) => [Some(convolution), None],
            Self::Relu(_) => [None, None],
            Self::Residual { first, second } => [Some(first), Some(second)],
        };
        both.into_iter().flatten()
    }

    fn out_channels(&self) -> Option<usize> {
        self.convolutions().last().map(|last| {
            let Geometry { large, small, .. } = last.geometry;
            if last.transposed { large.channels } else { small.channels }
        })
    }

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
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let product = if self.transposed { Product::SmallToLarge } else { Product::LargeToSmall };
        multiply(&self.geometry, product, x, weight)
    }

    fn gradient_product(&self, grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let product = if self.transposed { Product::LargeToSmall } else { Product::SmallToLarge };
        multiply(&self.geometry, product, grad, weight)
    }

    /// Of weight and bias.
    fn gradients(&self, x: &Tensor, back: &Back, aside: &mut Aside) -> Result<[Gradient; 2]> {
        let (large, small) = if self.transposed { (&back.grad, x) } else { (x, &back.grad) };
        let weight = aside.weight_gradient(&self.geometry, large, small)?;
        let (outer, inner) = self.packed_channels();
        let weight = weight.reshape((outer, self.kernel.0, self.kernel.1, inner))?;
        let shape = self.weight_dims();
        Ok([Gradient::Packed(weight, shape), Gradient::Plain(back.sums()?, self.bias.len())])
    }

    /// Of the packed weight: (outer, inner) with what fills them up. A weight of windows has all of its taps
    /// side by side, where there is no room for more channels.
    fn packed_channels(&self) -> (usize, usize) {
        let (outer, inner, _) = self.geometry.weight_shape();
        if self.kernel == self.geometry.kernel {
            return (outer, inner);
        }
        (outer, inner / (self.kernel.0 * self.kernel.1).max(1))
    }

    /// Of the parameter, without what fills channels up.
    fn weight_dims(&self) -> [usize; 4] {
        let (kh, kw) = self.kernel;
        let pairs = (self.weight.len() / (kh * kw).max(1)).max(1);
        // Of the two numbers of channels, one is that of the biases.
        let (own, other) = (self.bias.len(), pairs / self.bias.len().max(1));
        if self.transposed { [other, own, kh, kw] } else { [own, other, kh, kw] }
    }
}

/// The output, as the last step leaves it.
fn forward(
    steps: &[Step],
    ends: &Ends,
    x: &Joined,
    packed: &Packed,
) -> Result<(Tensor, Vec<Kept>)> {
    let x = ends.enter(x)?;
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
    let mut convolutions = 0;
    for (index, step) in steps.iter().enumerate() {
        let wanted = wants(index + 1);
        let (next, hidden, weights) = match step {
            Step::Convolution(convolution) => {
                let (weight, bias) = packed.of(convolutions)?;
                convolutions += 1;
                let y = convolution.product(map.of(convolution)?, &weight)?;
                let next = match &ends.last {
                    // Its bias is added to the pixels.
                    Some(_) if index + 1 == steps.len() => Map { plain: Some(y), rectified: None },
                    _ => Map::finish(&y, Some(bias), None, wanted)?,
                };
                (next, None, vec![weight])
            }
            Step::Relu(_) => {
                // Rectifying twice changes nothing.
                let y = map.rectified()?.clone();
                (Map { plain: Some(y.clone()), rectified: Some(y) }, None, Vec::new())
            }
            Step::Residual { first, second } => {
                let (weight1, bias1) = packed.of(convolutions)?;
                let (weight2, bias2) = packed.of(convolutions + 1)?;
                convolutions += 2;
                let y = first.product(map.rectified()?, &weight1)?;
                let hidden = finish(&y, Some(bias1), None, Outputs::RECTIFIED)?;
                let y = second.product(&hidden, &weight2)?;
                let next = Map::finish(&y, Some(bias2), Some(map.plain()?), wanted)?;
                (next, Some(hidden), vec![weight1, weight2])
            }
        };
        tape.push(Kept { input: std::mem::replace(&mut map, next), hidden, weights });
    }
    Ok((map.plain()?.clone(), tape))
}

/// The gradients of the input, as the first step takes it, and of all parameters, side by side, each where it is
/// asked for.
fn backward(
    steps: &[Step],
    tape: &[Kept],
    mut back: Back,
    (of_input, of_parameters): (bool, bool),
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    // Last first until the end.
    let mut of_params: Vec<Gradient> = Vec::new();
    let mut aside = Aside::default();
    for (index, (step, Kept { input, hidden, weights })) in steps.iter().zip(tape).enumerate().rev()
    {
        let is_wanted = index > 0 || of_input;
        match (step, &weights[..], hidden) {
            (Step::Convolution(convolution), [weight], _) => {
                if of_parameters {
                    let x = input.of(convolution)?;
                    let [of_weight, of_bias] = convolution.gradients(x, &back, &mut aside)?;
                    of_params.extend([of_bias, of_weight]);
                }
                if is_wanted {
                    let grad = convolution.gradient_product(&back.grad, weight)?;
                    back = if convolution.relu {
                        Back::masked(&grad, input.rectified()?, None)?
                    } else {
                        Back { grad, sums: None }
                    };
                }
            }
            (Step::Relu(_), ..) => back = Back::masked(&back.grad, input.rectified()?, None)?,
            (Step::Residual { first, second }, [weight1, weight2], Some(hidden)) => {
                if of_parameters {
                    let [of_weight, of_bias] = second.gradients(hidden, &back, &mut aside)?;
                    of_params.extend([of_bias, of_weight]);
                }
                let grad = second.gradient_product(&back.grad, weight2)?;
                let of_hidden = Back::masked(&grad, hidden, None)?;
                let x = input.rectified()?;
                if of_parameters {
                    let [of_weight, of_bias] = first.gradients(x, &of_hidden, &mut aside)?;
                    of_params.extend([of_bias, of_weight]);
                }
                if is_wanted {
                    let grad = first.gradient_product(&of_hidden.grad, weight1)?;
                    back = Back::masked(&grad, x, Some(&back.grad))?;
                }
            }
            _ => return Err(missing()),
        }
    }
    of_params.reverse();
    aside.wait()?;
    let of_params = if of_parameters { Some(unpack_gradients(&of_params)?) } else { None };
    Ok((of_input.then_some(back.grad), of_params))
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
        match &self.of_output {
            Some(_) => Ok(place_on_cpu()),
            None => cpu_storage(&self.ends.leave(&self.output)?),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::layers::left;
        use crate::cuda::windows::folded;
        match (&self.of_output, &self.ends.last) {
            (Some(_), _) => crate::feature_map::place_on_cuda(&x.device),
            (None, Some((geometry, bias))) => folded(&self.output, geometry, Some(bias)),
            (None, None) => left(&self.output, self.ends.channels),
        }
    }

    fn bwd(
        &self,
        lead: &Tensor,
        second: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tape = match tape {
            Some(tape) => tape,
            // A second backward pass through the same graph.
            None => {
                let packed = Packed::new(&self.steps, &self.params, self.ends.dtype)?;
                forward(&self.steps, &self.ends, &self.x, &packed)?.1
            }
        };
        let back = match &self.of_output {
            Some(collected) => self.ends.take_back(collected.take()?)?,
            None => self.ends.enter_back(&grad.detach().contiguous()?)?,
        };
        let of_parameters = self.delivery.is_some() || second.track_op();
        let asked_for = (lead.track_op(), of_parameters);
        let (of_x, of_params) = backward(&self.steps, &tape, back, asked_for)?;
        let of_x = match of_x {
            Some(of_x) => self.ends.leave_back(&of_x, &self.x)?,
            None => None,
        };
        if let (Some(delivery), Some(of_params)) = (&self.delivery, &of_params) {
            delivery.add(of_params.clone())?;
            return Ok((of_x, None));
        }
        Ok((of_x, of_params))
    }
}

fn missing() -> candle_core::Error {
    candle_core::Error::Msg("a stack's step was left without its input".to_owned())
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use crate::dispatch::only_primitives;
    use crate::testing::{noise, values};
    use crate::{Conv2d, ConvTranspose2d, Layer, Precision, Stack, conv_transpose2d, conv2d};

    use super::*;

    /// Value and gradients.
    fn run(y: &Tensor, vars: &[Var]) -> Vec<Vec<f32>> {
        let weights = noise(y.dims(), 9).as_detached_tensor();
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
                        .map(|(i, (_, shape))| noise(&shape, i as u64))
                        .collect();
                    let tensors: Vec<Tensor> =
                        params.iter().map(|var| var.as_tensor().clone()).collect();
                    let x = noise(&size, 5);
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
        let (x, w, b) = (noise(&[2, 5, 7, 3], 1), noise(&[4, 3, 3, 3], 2), noise(&[4], 3));
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
        let w = noise(&[3, 4, 3, 3], 2);
        let up = || {
            let y = conv_transpose2d(&x, &w, Some(&b), config).unwrap();
            run(&y, &[x.clone(), w.clone(), b.clone()])
        };
        assert_alike(&only_primitives(up), &up(), 1e-5);
    }

    #[test]
    fn gradients_that_nobody_asks_for_are_not_computed() {
        for layers in stacks() {
            let size = [2, 6, 8, layers[0].in_channels()];
            let shapes = layers.iter().flat_map(Layer::parameters).enumerate();
            let params: Vec<Var> = shapes.map(|(i, (_, shape))| noise(&shape, i as u64)).collect();
            let tracked: Vec<Tensor> = params.iter().map(|var| var.as_tensor().clone()).collect();
            let still: Vec<Tensor> = params.iter().map(Var::as_detached_tensor).collect();
            let x = noise(&size, 50);
            let gradients = |x: &Tensor, params: &[Tensor]| {
                let stack = Stack::new(layers.clone()).unwrap();
                let y = only_primitives(|| stack.forward(x, params).unwrap());
                only_primitives(|| y.sqr().unwrap().sum_all().unwrap().backward().unwrap())
            };
            let all = gradients(&x, &tracked);
            let of_x = gradients(&x, &still);
            let of_params = gradients(&x.as_detached_tensor(), &tracked);
            assert_eq!(of_x.get(&x).map(values), all.get(&x).map(values));
            assert!(of_params.get(&x).is_none());
            for var in &params {
                assert!(of_x.get(var).is_none());
                assert_eq!(of_params.get(var).map(values), all.get(var).map(values));
            }
        }
    }
}

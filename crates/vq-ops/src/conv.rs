//! Convolutions on `[B, H, W, C]` tensors.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use crate::cpu::buffers::Buffers;
use crate::cpu::conv::{Finish, Geometry, large_to_small, small_to_large};
use crate::cpu::elements::Output;
use crate::cpu::pack::Images;
use crate::cpu::weight_gradient::{column_sums, weight_gradient};
use crate::dispatch::{on_cpu, on_primitives};
use crate::fused::{Convolution, Step};
use crate::storage::{f32_elements, f32_slice};
use crate::{Precision, composed, device_stack};

/// How a kernel moves over its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Step between neighbouring outputs, in input pixels (both axes).
    pub stride: usize,
    /// Zeros added on every side, in pixels.
    pub padding: usize,
    /// Distance between neighbouring kernel taps, in pixels.
    pub dilation: usize,
    /// Whether ReLU is applied to the input first (fused: no extra pass over memory).
    pub relu_input: bool,
    /// In which numbers the products are taken.
    pub precision: Precision,
}

impl Default for Conv2d {
    fn default() -> Self {
        Self { stride: 1, padding: 0, dilation: 1, relu_input: false, precision: Precision::F32 }
    }
}

impl Conv2d {
    /// Length of the output along an axis of length `input`, for a kernel of `kernel` taps:
    /// `(input + 2·padding − dilation·(kernel − 1) − 1) / stride + 1`.
    pub fn output_length(&self, input: usize, kernel: usize) -> Result<usize> {
        if self.stride == 0 || self.dilation == 0 || kernel == 0 {
            bail!("a convolution needs stride, dilation and kernel of at least 1, got {self:?}");
        }
        let span = self.dilation * (kernel - 1) + 1;
        let padded = input + 2 * self.padding;
        if padded < span {
            bail!("a kernel that spans {span} pixels does not fit an input of {padded} (padded)");
        }
        Ok((padded - span) / self.stride + 1)
    }
}

/// How a transposed kernel moves over its output: the gradient of [`Conv2d`] with the same
/// numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTranspose2d {
    /// Step between neighbouring inputs, in output pixels (both axes).
    pub stride: usize,
    /// Pixels cut from every side of the full output.
    pub padding: usize,
    /// Pixels added at the bottom and right of the output; less than the larger of `stride` and `dilation`.
    pub output_padding: usize,
    /// Distance between neighbouring kernel taps, in pixels.
    pub dilation: usize,
    /// Whether ReLU is applied to the input first (fused: no extra pass over memory).
    pub relu_input: bool,
    /// In which numbers the products are taken.
    pub precision: Precision,
}

impl Default for ConvTranspose2d {
    fn default() -> Self {
        Self {
            stride: 1,
            padding: 0,
            output_padding: 0,
            dilation: 1,
            relu_input: false,
            precision: Precision::F32,
        }
    }
}

impl ConvTranspose2d {
    /// Length of the output along an axis of length `input`, for a kernel of `kernel` taps:
    /// `(input − 1)·stride − 2·padding + dilation·(kernel − 1) + output_padding + 1`.
    pub fn output_length(&self, input: usize, kernel: usize) -> Result<usize> {
        if self.stride == 0 || self.dilation == 0 || kernel == 0 || input == 0 {
            bail!(
                "a transposed convolution needs input, stride, dilation and kernel of at least 1, got {self:?}"
            );
        }
        if self.output_padding >= self.stride.max(self.dilation) {
            bail!(
                "output_padding ({}) must be below the stride ({}) or the dilation ({})",
                self.output_padding,
                self.stride,
                self.dilation
            );
        }
        let full =
            (input - 1) * self.stride + self.dilation * (kernel - 1) + self.output_padding + 1;
        if full <= 2 * self.padding {
            bail!("padding {} leaves nothing of an output of {full} pixels", self.padding);
        }
        Ok(full - 2 * self.padding)
    }
}

/// Convolution. `x` `[B, H, W, Cin]`, `weight` `[Cout, Cin, KH, KW]`, `bias` `[Cout]` →
/// `[B, H', W', Cout]`, with H', W' by [`Conv2d::output_length`].
///
/// Differentiable in all three operands; a gradient that nobody asks for is not computed. An empty batch gives
/// an empty output, and zeros as gradients of weight and bias. An error
/// names the shapes that do not fit.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2d,
) -> Result<Tensor> {
    let geometry = config.geometry(x.dims(), weight.dims())?;
    let op = ConvOp {
        geometry,
        transposed: false,
        relu: config.relu_input,
        buffers: Buffers::default(),
    };
    check_bias(bias, geometry.small.channels)?;
    if on_primitives(x.device()) && x.dtype() == DType::F32 {
        return op.apply_on_device(x, weight, bias);
    }
    if !on_cpu(x.device()) {
        return composed::conv2d(x, weight, bias, config);
    }
    op.apply(x, weight, bias)
}

/// Transposed convolution. `x` `[B, H, W, Cin]`, `weight` `[Cin, Cout, KH, KW]`, `bias` `[Cout]` →
/// `[B, H', W', Cout]`, with H', W' by [`ConvTranspose2d::output_length`].
///
/// Differentiable in all three operands; a gradient that nobody asks for is not computed. An empty batch gives
/// an empty output, and zeros as gradients of weight and bias. An error
/// names the shapes that do not fit.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: ConvTranspose2d,
) -> Result<Tensor> {
    let geometry = config.geometry(x.dims(), weight.dims())?;
    let op =
        ConvOp { geometry, transposed: true, relu: config.relu_input, buffers: Buffers::default() };
    check_bias(bias, geometry.large.channels)?;
    if on_primitives(x.device()) && x.dtype() == DType::F32 {
        return op.apply_on_device(x, weight, bias);
    }
    if !on_cpu(x.device()) {
        return composed::conv_transpose2d(x, weight, bias, config);
    }
    op.apply(x, weight, bias)
}

impl Conv2d {
    /// The kernels' view of this convolution of `x` `[B, H, W, Cin]` with `[Cout, Cin, KH, KW]`.
    pub(crate) fn geometry(&self, x: &[usize], weight: &[usize]) -> Result<Geometry> {
        let (&[batch, height, width, channels], &[outer, inner, kh, kw]) = (x, weight) else {
            bail!("conv2d takes [B, H, W, C] and [Cout, Cin, KH, KW], got {x:?} and {weight:?}");
        };
        if channels != inner {
            bail!(
                "the input has {channels} channels {x:?} and the weight takes {inner} {weight:?}"
            );
        }
        let large = Images { batch, height, width, channels };
        let small = Images {
            batch,
            height: self.output_length(height, kh)?,
            width: self.output_length(width, kw)?,
            channels: outer,
        };
        let Self { stride, padding, dilation, precision, .. } = *self;
        Ok(Geometry { large, small, kernel: (kh, kw), stride, padding, dilation, precision })
    }
}

impl ConvTranspose2d {
    /// The kernels' view of this transposed convolution of `x` `[B, h, w, Cin]` with
    /// `[Cin, Cout, KH, KW]`.
    pub(crate) fn geometry(&self, x: &[usize], weight: &[usize]) -> Result<Geometry> {
        let (&[batch, height, width, channels], &[outer, inner, kh, kw]) = (x, weight) else {
            bail!(
                "conv_transpose2d takes [B, H, W, C] and [Cin, Cout, KH, KW], got {x:?} and {weight:?}"
            );
        };
        if channels != outer {
            bail!(
                "the input has {channels} channels {x:?} and the weight takes {outer} {weight:?}"
            );
        }
        let small = Images { batch, height, width, channels };
        let large = Images {
            batch,
            height: self.output_length(height, kh)?,
            width: self.output_length(width, kw)?,
            channels: inner,
        };
        let Self { stride, padding, dilation, precision, .. } = *self;
        Ok(Geometry { large, small, kernel: (kh, kw), stride, padding, dilation, precision })
    }
}

fn check_bias(bias: Option<&Tensor>, channels: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [channels] => {
            bail!("the bias has shape {:?}, not [{channels}]", bias.dims())
        }
        _ => Ok(()),
    }
}

/// A convolution (or its transpose) on the CPU, with or without bias.
struct ConvOp {
    geometry: Geometry,
    transposed: bool,
    relu: bool,
    buffers: Buffers,
}

impl ConvOp {
    fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        match bias {
            Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, self),
            None => x.apply_op2(&weight, self),
        }
    }

    /// As a stack of one layer.
    fn apply_on_device(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let bias = match bias {
            Some(bias) => bias.clone(),
            None => Tensor::zeros(self.ends().1.channels, DType::F32, x.device())?,
        };
        let (Self { geometry, transposed, relu, .. }, split) = (self, weight.elem_count());
        let step = Step::Convolution(Convolution {
            geometry: *geometry,
            transposed: *transposed,
            relu: *relu,
            kernel: geometry.kernel,
            weight: 0..split,
            bias: split..split + bias.elem_count(),
        });
        device_stack::run(vec![step], geometry.precision, x, &[weight.clone(), bias])
    }

    /// (input, output) sizes.
    fn ends(&self) -> (Images, Images) {
        let Geometry { large, small, .. } = self.geometry;
        if self.transposed { (small, large) } else { (large, small) }
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> (CpuStorage, Shape) {
        let out = self.ends().1;
        let mut y = vec![0.; out.len()];
        let finish = Finish { bias, ..Finish::default() };
        let run = if self.transposed { small_to_large } else { large_to_small };
        let to = Output::F32(&mut y);
        run(&self.geometry, x.into(), self.relu, weight, finish, &self.buffers, to);
        (CpuStorage::F32(y), (out.batch, out.height, out.width, out.channels).into())
    }

    /// The gradients of input, weight and bias, where they are asked for.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.contiguous()?;
        let (_, out) = self.ends();
        let of_x = if x.track_op() {
            let run = if self.transposed { large_to_small } else { small_to_large };
            let mut dx = vec![0.; x.elem_count()];
            f32_slice(x, |x| {
                f32_slice(weight, |weight| {
                    f32_slice(&grad, |grad| {
                        let mask = self.relu.then_some(x.into());
                        let finish = Finish { mask, ..Finish::default() };
                        let to = Output::F32(&mut dx);
                        run(&self.geometry, grad.into(), false, weight, finish, &self.buffers, to);
                    })
                })
            })???;
            Some(Tensor::from_vec(dx, x.shape(), x.device())?)
        } else {
            None
        };
        let of_weight = if weight.track_op() {
            let mut dw = vec![0.; weight.elem_count()];
            f32_slice(x, |x| {
                f32_slice(&grad, |grad| {
                    let (x, grad) = ((x.into(), self.relu), (grad.into(), false));
                    let (large, small) = if self.transposed { (grad, x) } else { (x, grad) };
                    weight_gradient(&self.geometry, large, small, &self.buffers, &mut dw);
                })
            })??;
            Some(Tensor::from_vec(dw, weight.shape(), x.device())?)
        } else {
            None
        };
        let of_bias = match bias {
            Some(bias) if bias.track_op() => {
                let mut db = vec![0.; out.channels];
                f32_slice(&grad, |grad| column_sums(grad.into(), out.channels, &mut db))?;
                Some(Tensor::from_vec(db, out.channels, x.device())?)
            }
            _ => None,
        };
        Ok([of_x, of_weight, of_bias])
    }
}

impl CustomOp2 for ConvOp {
    fn name(&self) -> &'static str {
        "vq-conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (f32_elements(x, x_layout)?, f32_elements(weight, weight_layout)?);
        Ok(self.forward(x, weight, None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, weight, _] = self.backward(x, weight, None, grad)?;
        Ok((x, weight))
    }
}

impl CustomOp3 for ConvOp {
    fn name(&self) -> &'static str {
        "vq-conv2d-bias"
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
        let (x, weight) = (f32_elements(x, x_layout)?, f32_elements(weight, weight_layout)?);
        Ok(self.forward(x, weight, Some(f32_elements(bias, bias_layout)?)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, weight, bias] = self.backward(x, weight, Some(bias), grad)?;
        Ok((x, weight, bias))
    }
}

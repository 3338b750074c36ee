//! Convolutions on `[B, H, W, C]` tensors.

use candle_core::{Result, Tensor, bail};

use crate::composed;

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
}

impl Default for Conv2d {
    fn default() -> Self {
        Self { stride: 1, padding: 0, dilation: 1, relu_input: false }
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
    /// Pixels added at the bottom and right of the output; less than `stride`.
    pub output_padding: usize,
    /// Distance between neighbouring kernel taps, in pixels.
    pub dilation: usize,
    /// Whether ReLU is applied to the input first (fused: no extra pass over memory).
    pub relu_input: bool,
}

impl Default for ConvTranspose2d {
    fn default() -> Self {
        Self { stride: 1, padding: 0, output_padding: 0, dilation: 1, relu_input: false }
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
/// Differentiable in all three operands. An error names the shapes that do not fit.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2d,
) -> Result<Tensor> {
    composed::conv2d(x, weight, bias, config)
}

/// Transposed convolution. `x` `[B, H, W, Cin]`, `weight` `[Cin, Cout, KH, KW]`, `bias` `[Cout]` →
/// `[B, H', W', Cout]`, with H', W' by [`ConvTranspose2d::output_length`].
///
/// Differentiable in all three operands. An error names the shapes that do not fit.
pub fn conv_transpose2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: ConvTranspose2d,
) -> Result<Tensor> {
    composed::conv_transpose2d(x, weight, bias, config)
}

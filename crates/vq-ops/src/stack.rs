//! Chains of layers that run as one operation.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::cpu::buffers::Buffers;
use crate::dispatch::{on_cpu, on_primitives};
use crate::feature_map::FeatureMap;
use crate::fused::{FusedStack, plan};
use crate::joined::{Joined, joined_dims};
use crate::{Conv2d, ConvTranspose2d, Precision, device_stack, repeat_pixels};

/// One layer of a [`Stack`].
#[derive(Clone, Debug, PartialEq)]
pub enum Layer {
    /// A convolution with a bias.
    Conv2d {
        /// Channels of the input.
        in_channels: usize,
        /// Channels of the output.
        out_channels: usize,
        /// Height and width of the kernel.
        kernel: usize,
        /// Stride, padding, dilation and the ReLU before it.
        config: Conv2d,
    },
    /// A transposed convolution with a bias.
    ConvTranspose2d {
        /// Channels of the input.
        in_channels: usize,
        /// Channels of the output.
        out_channels: usize,
        /// Height and width of the kernel.
        kernel: usize,
        /// Stride, padding, dilation and the ReLU before it.
        config: ConvTranspose2d,
    },
    /// ReLU by itself. Where a convolution follows, its `relu_input` does the same without a pass over
    /// memory; this is for what comes before a residual layer.
    Relu {
        /// Channels.
        channels: usize,
    },
    /// `h + conv1×1(relu(conv3×3(relu(h))))`, both convolutions with a bias.
    Residual {
        /// Channels of `h`.
        channels: usize,
        /// Channels between the two convolutions.
        hidden: usize,
    },
}

/// The 3×3 convolution of a residual layer.
pub(crate) const fn residual_3x3(precision: Precision) -> Conv2d {
    Conv2d { stride: 1, padding: 1, dilation: 1, relu_input: true, precision }
}
/// The 1×1 convolution of a residual layer.
pub(crate) const fn residual_1x1(precision: Precision) -> Conv2d {
    Conv2d { stride: 1, padding: 0, dilation: 1, relu_input: true, precision }
}

impl Layer {
    /// The layer's parameters in order: names relative to the layer, and shapes in PyTorch's
    /// layout.
    pub fn parameters(&self) -> Vec<(&'static str, Vec<usize>)> {
        match *self {
            Self::Conv2d { in_channels, out_channels, kernel, .. } => vec![
                ("weight", vec![out_channels, in_channels, kernel, kernel]),
                ("bias", vec![out_channels]),
            ],
            Self::ConvTranspose2d { in_channels, out_channels, kernel, .. } => vec![
                ("weight", vec![in_channels, out_channels, kernel, kernel]),
                ("bias", vec![out_channels]),
            ],
            Self::Relu { .. } => Vec::new(),
            Self::Residual { channels, hidden } => vec![
                ("conv1.weight", vec![hidden, channels, 3, 3]),
                ("conv1.bias", vec![hidden]),
                ("conv2.weight", vec![channels, hidden, 1, 1]),
                ("conv2.bias", vec![channels]),
            ],
        }
    }

    /// Channels that the layer takes.
    pub fn in_channels(&self) -> usize {
        match *self {
            Self::Conv2d { in_channels, .. } | Self::ConvTranspose2d { in_channels, .. } => {
                in_channels
            }
            Self::Residual { channels, .. } | Self::Relu { channels } => channels,
        }
    }

    /// Channels that the layer gives.
    pub fn out_channels(&self) -> usize {
        match *self {
            Self::Conv2d { out_channels, .. } | Self::ConvTranspose2d { out_channels, .. } => {
                out_channels
            }
            Self::Residual { channels, .. } | Self::Relu { channels } => channels,
        }
    }

    /// (height, width) of the output for an input of that size.
    pub fn output_size(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        match *self {
            Self::Conv2d { kernel, config, .. } => {
                Ok((config.output_length(height, kernel)?, config.output_length(width, kernel)?))
            }
            Self::ConvTranspose2d { kernel, config, .. } => {
                Ok((config.output_length(height, kernel)?, config.output_length(width, kernel)?))
            }
            Self::Residual { .. } | Self::Relu { .. } => Ok((height, width)),
        }
    }

    /// Multiply-adds for one image of that size: kernel taps × channels × outputs (inputs, for a
    /// transposed convolution), borders counted as if they were inside.
    pub fn multiply_adds(&self, height: usize, width: usize) -> Result<u64> {
        let (out_height, out_width) = self.output_size(height, width)?;
        Ok(match *self {
            Self::Conv2d { in_channels, out_channels, kernel, .. } => {
                out_height * out_width * kernel * kernel * in_channels * out_channels
            }
            Self::ConvTranspose2d { in_channels, out_channels, kernel, .. } => {
                height * width * kernel * kernel * in_channels * out_channels
            }
            Self::Relu { .. } => 0,
            Self::Residual { channels, hidden } => height * width * channels * hidden * 10,
        } as u64)
    }
}

/// A chain of layers, run as one operation on the CPU and on CUDA: ReLU, bias and residual additions are fused
/// into the convolutions, and what the backward pass needs stays in buffers that are used again.
#[derive(Clone, Debug)]
pub struct Stack {
    layers: Vec<Layer>,
    precision: Precision,
    buffers: Buffers,
}

impl Stack {
    /// A chain of at least one layer, each of which takes the channels that the one before gives.
    pub fn new(layers: Vec<Layer>) -> Result<Self> {
        if layers.is_empty() {
            bail!("a stack needs at least one layer");
        }
        for (index, pair) in layers.windows(2).enumerate() {
            if let [before, after] = pair
                && before.out_channels() != after.in_channels()
            {
                bail!(
                    "layer {index} gives {} channels and layer {} takes {}",
                    before.out_channels(),
                    index + 1,
                    after.in_channels()
                );
            }
        }
        Ok(Self { layers, precision: Precision::default(), buffers: Buffers::default() })
    }

    /// In which numbers the products of all layers are taken from now on, whatever their own
    /// configuration says. f32 at first.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// (height, width) of the output for an input of that size.
    pub fn output_size(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        self.layers.iter().try_fold((height, width), |(h, w), layer| layer.output_size(h, w))
    }

    /// Multiply-adds for one image of that size; see [`Layer::multiply_adds`].
    pub fn multiply_adds(&self, height: usize, width: usize) -> Result<u64> {
        let (mut size, mut total) = ((height, width), 0);
        for layer in &self.layers {
            total += layer.multiply_adds(size.0, size.1)?;
            size = layer.output_size(size.0, size.1)?;
        }
        Ok(total)
    }

    /// `x` `[B, H, W, Cin]` → `[B, H', W', Cout]`. `params` holds every layer's
    /// [`Layer::parameters`], in order. Differentiable in `x` and in `params`.
    pub fn forward(&self, x: &Tensor, params: &[Tensor]) -> Result<Tensor> {
        self.forward_joined(&[(&x.clone().into(), 1)], params)
    }

    /// [`forward`](Self::forward) where no primitives run.
    fn forward_at_once(&self, x: &Tensor, params: &[Tensor]) -> Result<Tensor> {
        if !on_cpu(x.device()) || x.dtype() != DType::F32 {
            return self.forward_layerwise(x, params);
        }
        self.check_parameters(params)?;
        let flat = params.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
        let theta = Tensor::cat(&flat, 0)?;
        let keep = x.track_op() || theta.track_op();
        let op = FusedStack::new(&self.layers, self.precision, x.dims(), &self.buffers, keep)?;
        x.contiguous()?.apply_op2(&theta, op)
    }

    /// [`Stack::forward`] on maps side by side, each pixel repeated the given number of times in both directions:
    /// `[Bᵢ, Hᵢ, Wᵢ, Cᵢ]` and nᵢ ≥ 1 with equal Bᵢ, Hᵢ·nᵢ and Wᵢ·nᵢ, as `x` `[B, H, W, ΣCᵢ]`, to `[B, H', W', Cout]`.
    /// Differentiable in all maps and in `params`. An error without a map, where sizes differ, and where `params` do
    /// not fit.
    pub fn forward_joined(&self, x: &[(&FeatureMap, usize)], params: &[Tensor]) -> Result<Tensor> {
        self.run_joined(x, params, false)?.tensor()
    }

    /// [`forward_joined`](Self::forward_joined) to a map for other stacks.
    pub fn forward_map(&self, x: &[(&FeatureMap, usize)], params: &[Tensor]) -> Result<FeatureMap> {
        self.run_joined(x, params, true)
    }

    fn run_joined(
        &self,
        x: &[(&FeatureMap, usize)],
        params: &[Tensor],
        beside: bool,
    ) -> Result<FeatureMap> {
        let is_fit = |(map, _): &(&FeatureMap, usize)| {
            on_primitives(map.device())
                && map.in_graph().is_none_or(|map| map.dtype() == DType::F32)
        };
        if !x.is_empty() && x.iter().all(is_fit) {
            self.check_parameters(params)?;
            let x = Joined::new(x)?;
            let (steps, _) = plan(&self.layers, self.precision, &x.dims())?;
            return device_stack::run_joined(steps, self.precision, x, params, beside);
        }
        joined_dims(x)?;
        let parts = x.iter().map(|&(map, times)| {
            let map = map.tensor()?;
            if times == 1 { Ok(map) } else { repeat_pixels(&map, times) }
        });
        let joined = match &parts.collect::<Result<Vec<_>>>()?[..] {
            [one] => one.clone(),
            parts => Tensor::cat(parts, D::Minus1)?,
        };
        self.forward_at_once(&joined, params).map(FeatureMap::from)
    }

    /// [`Stack::forward`] through [`crate::conv2d`] and [`crate::conv_transpose2d`], one by one:
    /// any device, and the oracle of the fused form.
    pub fn forward_layerwise(&self, x: &Tensor, params: &[Tensor]) -> Result<Tensor> {
        self.check_parameters(params)?;
        let (mut x, mut params, precision) = (x.clone(), params, self.precision);
        for layer in &self.layers {
            let (own, rest) = params.split_at(layer.parameters().len());
            params = rest;
            x = match (layer, own) {
                (Layer::Conv2d { config, .. }, [weight, bias]) => {
                    crate::conv2d(&x, weight, Some(bias), Conv2d { precision, ..*config })?
                }
                (Layer::ConvTranspose2d { config, .. }, [weight, bias]) => {
                    let config = ConvTranspose2d { precision, ..*config };
                    crate::conv_transpose2d(&x, weight, Some(bias), config)?
                }
                (Layer::Relu { .. }, []) => crate::composed::relu(&x)?,
                (Layer::Residual { .. }, [weight1, bias1, weight2, bias2]) => {
                    let hidden = crate::conv2d(&x, weight1, Some(bias1), residual_3x3(precision))?;
                    (&x + crate::conv2d(&hidden, weight2, Some(bias2), residual_1x1(precision))?)?
                }
                _ => bail!("a layer was given {} parameters", own.len()),
            };
        }
        Ok(x)
    }

    fn check_parameters(&self, params: &[Tensor]) -> Result<()> {
        let expected: Vec<_> = self.layers.iter().flat_map(Layer::parameters).collect();
        if expected.len() != params.len() {
            bail!("the stack has {} parameters, {} were given", expected.len(), params.len());
        }
        for (index, ((name, shape), param)) in expected.iter().zip(params).enumerate() {
            if param.dims() != shape.as_slice() {
                bail!("parameter {index} ({name}) has shape {:?}, not {shape:?}", param.dims());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::composed;

    #[test]
    fn a_chain_whose_channels_do_not_fit_is_refused() {
        let layer = |i, o| Layer::Conv2d {
            in_channels: i,
            out_channels: o,
            kernel: 1,
            config: Conv2d::default(),
        };
        assert!(Stack::new(vec![layer(3, 4), layer(4, 5)]).is_ok());
        let error = Stack::new(vec![layer(3, 4), layer(5, 5)]).unwrap_err().to_string();
        assert!(error.contains("layer 0 gives 4 channels and layer 1 takes 5"), "{error}");
    }

    #[test]
    fn composed_operations_are_reachable() -> Result<()> {
        let z = Tensor::new(&[[0f32, 1.], [2., 2.]], &crate::test_device())?;
        assert_eq!(composed::nearest_codes(&z, &z)?.to_vec1::<u32>()?, [0, 1]);
        Ok(())
    }
}

//! A named chain of layers with its parameters, and how parameters start.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor, Var};
use vq_ops::{FeatureMap, Layer, Precision, Stack};

use crate::random::Stream;
use crate::{Error, Result};

/// Layers with a name each.
pub(crate) type NamedLayers = Vec<(String, Layer)>;

/// A chain of layers with its parameters.
#[derive(Debug)]
pub(crate) struct Part {
    stack: Stack,
    params: Vec<Var>,
}

impl Part {
    pub(crate) fn new(layers: NamedLayers, builder: &mut Builder) -> Result<Self> {
        let mut params = Vec::new();
        for (name, layer) in &layers {
            for ((parameter, shape), fan_in) in layer.parameters().into_iter().zip(fan_ins(layer)) {
                let bound = 1.0 / (fan_in as f64).sqrt();
                params.push(builder.parameter(&format!("{name}.{parameter}"), &shape, bound)?);
            }
        }
        let stack = Stack::new(layers.into_iter().map(|(_, layer)| layer).collect())?;
        Ok(Self { stack, params })
    }

    pub(crate) fn set_precision(&mut self, precision: Precision) {
        self.stack.set_precision(precision);
    }

    /// Maps side by side, each pixel so many times in both directions, `[B,h,w,ΣC]`, to `[B,h',w',C']`.
    /// Differentiable where `tracked`; otherwise no graph is recorded and no activation kept.
    pub(crate) fn forward(&self, x: &[(&FeatureMap, usize)], tracked: bool) -> Result<FeatureMap> {
        Ok(self.stack.forward_map(x, &self.params(tracked))?)
    }

    fn params(&self, tracked: bool) -> Vec<Tensor> {
        let tensor = |var: &Var| {
            if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() }
        };
        self.params.iter().map(tensor).collect()
    }

    /// About how many values are held for one image between its forward and its backward pass: the
    /// outputs of all layers, the insides of residual blocks, and one gradient of each length. And the size
    /// that comes out.
    pub(crate) fn activations(&self, size: (usize, usize)) -> Result<(u64, (usize, usize))> {
        let (mut size, mut kept, mut gradients) = (size, 0, BTreeSet::new());
        for layer in self.stack.layers() {
            let area = size.0 * size.1;
            gradients.insert(area * layer.in_channels());
            if let Layer::Residual { hidden, .. } = layer {
                kept += area * hidden;
                gradients.insert(area * hidden);
            }
            size = layer.output_size(size.0, size.1)?;
            kept += size.0 * size.1 * layer.out_channels();
        }
        Ok(((kept + gradients.into_iter().sum::<usize>()) as u64, size))
    }

    /// Multiply-adds for one image, and the size that comes out.
    pub(crate) fn multiply_adds(&self, size: (usize, usize)) -> Result<(u64, (usize, usize))> {
        let total = self.stack.multiply_adds(size.0, size.1)?;
        Ok((total, self.stack.output_size(size.0, size.1)?))
    }
}

/// Makes a model's tensors. What a parameter starts as depends on the seed and its own name alone,
/// not on which others were made before it.
pub(crate) struct Builder {
    seed: u64,
    device: Device,
    pub(crate) parameters: BTreeMap<String, Var>,
    pub(crate) buffers: BTreeMap<String, Var>,
}

impl Builder {
    pub(crate) fn new(seed: u64, device: &Device) -> Self {
        let (parameters, buffers) = (BTreeMap::new(), BTreeMap::new());
        Self { seed, device: device.clone(), parameters, buffers }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// A parameter that starts uniform in ±`bound`.
    pub(crate) fn parameter(&mut self, name: &str, shape: &[usize], bound: f64) -> Result<Var> {
        let values = self.uniform(name, shape, bound);
        insert(&mut self.parameters, name, Var::from_vec(values, shape, &self.device)?)
    }

    /// Saved with the model, but not trained by gradients.
    pub(crate) fn buffer(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Result<Var> {
        insert(&mut self.buffers, name, Var::from_vec(values, shape, &self.device)?)
    }

    /// What [`Builder::parameter`] of that name starts as.
    pub(crate) fn uniform(&self, name: &str, shape: &[usize], bound: f64) -> Vec<f32> {
        Stream::new(self.seed, name, 0).uniform(shape.iter().product(), bound)
    }

    /// Values for a [`Builder::buffer`] of that name: normal with mean 0.
    pub(crate) fn normal(&self, name: &str, shape: &[usize], deviation: f64) -> Vec<f32> {
        Stream::new(self.seed, name, 0).normal(shape.iter().product(), deviation)
    }
}

fn insert(map: &mut BTreeMap<String, Var>, name: &str, var: Var) -> Result<Var> {
    match map.insert(name.to_owned(), var.clone()) {
        None => Ok(var),
        Some(_) => Err(Error::Input(format!("two tensors are called `{name}`"))),
    }
}

/// The fan-in of each of the layer's parameters. PyTorch's default initialisation of a convolution
/// is U(±1/√fan-in) for weight and bias alike (`kaiming_uniform_` with a = √5).
fn fan_ins(layer: &Layer) -> Vec<usize> {
    match *layer {
        Layer::Conv2d { in_channels, kernel, .. } => vec![in_channels * kernel * kernel; 2],
        // PyTorch reckons the fan-in from the weight's second dimension, here the output channels.
        Layer::ConvTranspose2d { out_channels, kernel, .. } => {
            vec![out_channels * kernel * kernel; 2]
        }
        Layer::Relu { .. } => Vec::new(),
        Layer::Residual { channels, hidden } => {
            vec![channels * 9, channels * 9, hidden, hidden]
        }
    }
}

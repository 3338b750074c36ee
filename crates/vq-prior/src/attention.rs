//! Multi-head attention over the positions of a grid, at once or one by one with a cache.

use candle_core::{DType, Tensor};
use vq_ops::{PackedLinear, attention_weights, matmul_transposed, merge_heads, split_heads};

use crate::Result;
use crate::layers::{Builder, Conv, Mode, columns};

/// Multi-head attention (Vaswani et al. 2017, section 3.2.2).
#[derive(Debug)]
pub(crate) struct Attention {
    query: Conv,
    key: Conv,
    value: Conv,
    output: Conv,
    channels: usize,
    heads: usize,
}

impl Attention {
    /// `gain` scales the start of the last map, which ends on a residual stream.
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        channels: usize,
        heads: usize,
        gain: f64,
    ) -> Result<Self> {
        let mut map =
            |part: &str| Conv::linear(builder, &format!("{name}.{part}"), channels, channels);
        let (query, key, value) = (map("query")?, map("key")?, map("value")?);
        let name = format!("{name}.output");
        let output = Conv::new(builder, &name, (channels, channels), [1, 1], gain)?;
        Ok(Self { query, key, value, output, channels, heads })
    }

    /// Query, key, value, output.
    pub(crate) fn parts(&self) -> [&Conv; 4] {
        [&self.query, &self.key, &self.value, &self.output]
    }

    /// `[B,h,w,C]` to the same shape. Where `causal`, a position sees itself and those before it in raster
    /// order; otherwise all.
    pub(crate) fn forward(&self, x: &Tensor, causal: bool, mode: Mode) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let heads = |map: &Conv| -> Result<Tensor> {
            Ok(split_heads(&map.apply(x, mode)?.reshape((b, h * w, c))?, self.heads)?)
        };
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let weights = attention_weights(&matmul_transposed(&query, &key)?, self.scale(), causal)?;
        let read = merge_heads(&weights.matmul(&value)?)?.reshape((b, h, w, c))?;
        self.output.apply(&read, mode)
    }

    /// The same, causally, one position at a time, for up to `length` positions.
    pub(crate) fn steps(&self, batch: usize, length: usize) -> Result<AttentionSteps> {
        let size = self.channels / self.heads;
        let projections = [&self.query, &self.key, &self.value];
        let cache = || -> Result<Tensor> {
            let shape = (batch, self.heads, length, size);
            Ok(Tensor::zeros(shape, DType::F32, self.query.device())?)
        };
        Ok(AttentionSteps {
            projections: Conv::packed_side_by_side(&projections)?,
            output: self.output.packed()?,
            keys: cache()?,
            values: cache()?,
            scale: self.scale(),
            heads: self.heads,
            channels: self.channels,
            length: 0,
        })
    }

    fn scale(&self) -> f64 {
        1.0 / ((self.channels / self.heads) as f64).sqrt()
    }
}

/// Attention with the keys and values of the positions so far.
#[derive(Debug)]
pub(crate) struct AttentionSteps {
    projections: PackedLinear,
    output: PackedLinear,
    /// `[B, heads, T, D]`, filled up to `length`.
    keys: Tensor,
    values: Tensor,
    scale: f64,
    heads: usize,
    channels: usize,
    length: usize,
}

impl AttentionSteps {
    /// The next position: `[B,C]` to `[B,C]`.
    pub(crate) fn step(&mut self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels) = x.dims2()?;
        let projected = self.projections.forward(x, false)?;
        let part = |index: usize| -> Result<Tensor> {
            let shape = (batch, self.heads, 1, channels / self.heads);
            Ok(columns(&projected, index * self.channels, self.channels)?.reshape(shape)?)
        };
        self.keys.slice_set(&part(1)?, 2, self.length)?;
        self.values.slice_set(&part(2)?, 2, self.length)?;
        self.length += 1;
        let keys = self.keys.narrow(2, 0, self.length)?;
        let values = self.values.narrow(2, 0, self.length)?;
        let scores = part(0)?.matmul(&keys.t()?)?;
        let weights = attention_weights(&scores, self.scale, false)?;
        let read = weights.matmul(&values)?.reshape((batch, channels))?;
        Ok(self.output.forward(&read, false)?)
    }
}

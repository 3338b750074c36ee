//! The decoder-only Transformer, all positions at once and one at a time.

use candle_core::{DType, Tensor};
use vq_ops::{Dropout, PackedLinear, TransformerLayers, shift, swiglu};

use crate::attention::{Attention, AttentionSteps};
use crate::layers::{
    Builder, ClassNorm, CodeTable, Context, Conv, EPSILON, Mode, Positions, normalize,
};
use crate::{Config, Result, TransformerConfig};

/// A decoder-only Transformer over the positions in raster order, one token per position: RMS norms before
/// each part (Zhang & Sennrich 2019), `SwiGLU` (Shazeer 2020), causal attention, and learned vectors for
/// the row and the column of the position that is to be predicted. Classes scale and shift every norm;
/// the levels above are added before every layer.
#[derive(Debug)]
pub(crate) struct Transformer {
    pub(crate) codes: CodeTable,
    positions: Positions,
    layers: Vec<Layer>,
    norm: ClassNorm,
    channels: usize,
    /// All layers as one operation.
    fused: TransformerLayers,
}

#[derive(Debug)]
struct Layer {
    map: Option<Conv>,
    attention_norm: ClassNorm,
    attention: Attention,
    mlp_norm: ClassNorm,
    /// C → 2H, for the two halves of the gate.
    mlp_in: Conv,
    mlp_out: Conv,
}

impl Transformer {
    pub(crate) fn new(
        config: &Config,
        network: &TransformerConfig,
        builder: &mut Builder,
    ) -> Result<Self> {
        let (channels, classes) = (network.channels, config.class_count);
        let layers = (0..network.layers)
            .map(|index| Layer::new(config, network, index, builder))
            .collect::<Result<_>>()?;
        let map_channels =
            if config.conditioning.is_empty() { 0 } else { config.conditioner.channels };
        let fused = TransformerLayers::new(
            channels,
            network.heads,
            network.mlp_hidden,
            map_channels,
            network.layers,
            EPSILON,
        )?;
        Ok(Self {
            fused,
            codes: CodeTable::new(builder, "codes", &config.codebook_sizes, channels)?,
            positions: Positions::new(builder, "positions", config.grid, channels)?,
            layers,
            norm: ClassNorm::new(builder, "norm", classes, channels)?,
            channels,
        })
    }

    /// Codes `[B,h,w,G]` → features `[B,h,w,C]`, at each position of what came before it.
    pub(crate) fn forward(&self, codes: &Tensor, context: &Context, mode: Mode) -> Result<Tensor> {
        let embedded = self.codes.sums(codes, mode)?;
        let (b, h, w, c) = embedded.dims4()?;
        let labels = context.labels.as_ref();
        // Every position gets the codes of the one before; the first gets zeros.
        let before = shift(&embedded.reshape((b, 1, h * w, c))?, [1, h * w], [0, 1])?;
        let mut x = before.reshape((b, h, w, c))?.broadcast_add(&self.positions.map(mode)?)?;
        x = mode.drop(&x, 0)?;
        x = if TransformerLayers::runs_on(x.device()) {
            self.at_once(&x, context, mode)?
        } else {
            self.layer_by_layer(&x, context, mode)?
        };
        self.norm.forward(&x, labels, mode)
    }

    /// All layers as one operation, `[B,h,w,C]` to the same shape.
    pub(crate) fn at_once(&self, x: &Tensor, context: &Context, mode: Mode) -> Result<Tensor> {
        let labels = context.labels.as_ref();
        let mut vectors = Vec::new();
        for layer in &self.layers {
            let (gain, shift) = layer.attention_norm.vectors(labels, mode)?;
            let (mlp_gain, mlp_shift) = layer.mlp_norm.vectors(labels, mode)?;
            vectors.push(Tensor::cat(&[gain, shift, mlp_gain, mlp_shift], 1)?);
        }
        let vectors = Tensor::stack(&vectors, 1)?;
        let parts = self.layers.iter().flat_map(Layer::parts);
        let params: Vec<Tensor> = parts.flat_map(|part| part.tensors(mode)).collect();
        let seeds = |i| Ok([mode.drop_seed(2 * i + 1)?, mode.drop_seed(2 * i + 2)?]);
        let seeds = (0..self.layers.len()).map(seeds).collect::<Result<_>>()?;
        let dropout = Dropout { p: mode.dropout, seeds };
        Ok(self.fused.forward(x, context.map.as_ref(), &vectors, &params, Some(&dropout))?)
    }

    /// The same of an operation for every part: any device, and the oracle of the other form.
    pub(crate) fn layer_by_layer(
        &self,
        x: &Tensor,
        context: &Context,
        mode: Mode,
    ) -> Result<Tensor> {
        let labels = context.labels.as_ref();
        let mut x = x.clone();
        for (index, layer) in self.layers.iter().enumerate() {
            if let (Some(conv), Some(map)) = (&layer.map, &context.map) {
                x = (x + conv.apply(map, mode)?)?;
            }
            let normed = layer.attention_norm.forward(&x, labels, mode)?;
            let read = layer.attention.forward(&normed, /* causal */ true, mode)?;
            x = (x + mode.drop(&read, 2 * index + 1)?)?;
            let normed = layer.mlp_norm.forward(&x, labels, mode)?;
            let hidden = swiglu(&layer.mlp_in.apply(&normed, mode)?)?;
            let out = layer.mlp_out.apply(&hidden, mode)?;
            x = (x + mode.drop(&out, 2 * index + 2)?)?;
        }
        Ok(x)
    }

    /// The same, one position at a time, with a cache of keys and values.
    pub(crate) fn steps(
        &self,
        context: &Context,
        batch: usize,
        grid: [usize; 2],
    ) -> Result<TransformerSteps<'_>> {
        let mode = Mode::EVALUATE;
        let labels = context.labels.as_ref();
        let positions = grid[0] * grid[1];
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(LayerSteps {
                map: match (&layer.map, &context.map) {
                    (Some(conv), Some(map)) => {
                        Some(conv.apply(map, mode)?.reshape((batch, positions, ()))?)
                    }
                    _ => None,
                },
                attention_norm: layer.attention_norm.vectors(labels, mode)?,
                attention: layer.attention.steps(batch, positions)?,
                mlp_norm: layer.mlp_norm.vectors(labels, mode)?,
                mlp_in: layer.mlp_in.packed()?,
                mlp_out: layer.mlp_out.packed()?,
            });
        }
        let positions = self.positions.map(mode)?.reshape((positions, self.channels))?;
        let before = Tensor::zeros((batch, self.channels), DType::F32, positions.device())?;
        let norm = self.norm.vectors(labels, mode)?;
        Ok(TransformerSteps { codes: &self.codes, layers, norm, positions, before, position: 0 })
    }
}

impl Layer {
    /// What has a weight and a bias, as [`TransformerLayers::parameters`] wants them.
    fn parts(&self) -> impl Iterator<Item = &Conv> {
        let attention = self.attention.parts();
        self.map.iter().chain(attention).chain([&self.mlp_in, &self.mlp_out])
    }

    fn new(
        config: &Config,
        network: &TransformerConfig,
        index: usize,
        builder: &mut Builder,
    ) -> Result<Self> {
        let (channels, classes) = (network.channels, config.class_count);
        let name = |part: &str| format!("layers.{index}.{part}");
        // The residual stream then grows by about as much in all as one part alone would add.
        let gain = 1.0 / (2.0 * network.layers as f64).sqrt();
        Ok(Self {
            map: if config.conditioning.is_empty() {
                None
            } else {
                Some(Conv::linear(builder, &name("map"), config.conditioner.channels, channels)?)
            },
            attention_norm: ClassNorm::new(builder, &name("attention.norm"), classes, channels)?,
            attention: Attention::new(builder, &name("attention"), channels, network.heads, gain)?,
            mlp_norm: ClassNorm::new(builder, &name("mlp.norm"), classes, channels)?,
            mlp_in: Conv::linear(builder, &name("mlp.in"), channels, 2 * network.mlp_hidden)?,
            mlp_out: Conv::new(
                builder,
                &name("mlp.out"),
                (network.mlp_hidden, channels),
                [1, 1],
                gain,
            )?,
        })
    }
}

/// A Transformer with the keys and values of the positions so far.
#[derive(Debug)]
pub(crate) struct TransformerSteps<'a> {
    codes: &'a CodeTable,
    layers: Vec<LayerSteps>,
    norm: (Tensor, Tensor),
    /// `[h·w, C]`.
    positions: Tensor,
    /// The embedded codes `[B,C]` of the position before.
    before: Tensor,
    position: usize,
}

#[derive(Debug)]
struct LayerSteps {
    /// `[B, h·w, C]`.
    map: Option<Tensor>,
    attention_norm: (Tensor, Tensor),
    attention: AttentionSteps,
    mlp_norm: (Tensor, Tensor),
    mlp_in: PackedLinear,
    mlp_out: PackedLinear,
}

impl TransformerSteps<'_> {
    /// Features `[B,C]` of the next position.
    pub(crate) fn features(&mut self) -> Result<Tensor> {
        let mut x = self.before.broadcast_add(&self.positions.narrow(0, self.position, 1)?)?;
        for layer in &mut self.layers {
            if let Some(map) = &layer.map {
                x = (x + map.narrow(1, self.position, 1)?.contiguous()?.squeeze(1)?)?;
            }
            let normed = normalize(&x, &layer.attention_norm)?;
            x = (x + layer.attention.step(&normed)?)?;
            let normed = normalize(&x, &layer.mlp_norm)?;
            let hidden = swiglu(&layer.mlp_in.forward(&normed, false)?)?;
            x = (x + layer.mlp_out.forward(&hidden, false)?)?;
        }
        normalize(&x, &self.norm)
    }

    /// Takes the codes `[B,G]` of the position whose features were asked for last.
    pub(crate) fn push(&mut self, codes: &Tensor) -> Result<()> {
        self.before = self.codes.sums(codes, Mode::EVALUATE)?;
        self.position += 1;
        Ok(())
    }
}

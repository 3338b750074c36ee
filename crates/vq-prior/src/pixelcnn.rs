//! The gated PixelCNN, all positions at once.

use candle_core::Tensor;
use vq_ops::{Conv2d, Dropout, GatedLayers, gate, gate_sum, shift};

use crate::attention::Attention;
use crate::layers::{
    Builder, ClassNorm, ClassTable, CodeTable, Context, Conv, Mode, Positions, columns,
};
use crate::{Config, PixelCnnConfig, Result};

/// The gated PixelCNN of van den Oord et al. (2016b), section 2: a vertical stack that sees the rows above
/// and a horizontal stack that sees the row so far, so that there is no blind spot.
///
/// No kernel is masked. The causal half of each is all there is, and its padding is shifted: nothing is
/// computed only to be thrown away, and no optimizer step can unmask anything. What the paper's mask A
/// does, hiding a position from itself, happens once, where the codes enter: the vertical stack gets them
/// one row further down and the horizontal stack one column further right. Every layer after that may look
/// at its own position. The link from the vertical stack, which the paper shifts down by a row in every
/// layer, is then in its place.
#[derive(Debug)]
pub(crate) struct PixelCnn {
    pub(super) codes: CodeTable,
    pub(super) layers: Vec<GatedLayer>,
    pub(super) positions: Option<Positions>,
    pub(super) channels: usize,
    /// All layers as one operation, where no attention comes between them.
    pub(crate) fused: Option<GatedLayers>,
}

/// One layer of both stacks (van den Oord et al. 2016b, figure 2).
#[derive(Debug)]
pub(crate) struct GatedLayer {
    /// Rows up to the own, centred columns: n×n cut to the upper half, C → 2C.
    pub(super) vertical: Conv,
    /// The own row up to the own column, C → 2C.
    pub(super) horizontal: Conv,
    /// From the vertical stack before its gate to the horizontal one, 2C → 2C.
    pub(super) link: Conv,
    /// None in the last layer, whose output nobody takes.
    pub(super) residual: Option<Conv>,
    pub(super) skip: Conv,
    /// What the class adds before the gates: vertical, then horizontal.
    pub(super) classes: ClassTable,
    /// What the levels above add before the vertical gate, and through the link to the horizontal one.
    pub(super) map: Option<Conv>,
    pub(super) attention: Option<AttentionBlock>,
    /// Height and width of the kernels: `[rows, columns]` of the vertical one, columns of the horizontal
    /// one.
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// Causal self-attention on the horizontal stack (Chen et al. 2018, section 2.2), as a residual.
#[derive(Debug)]
pub(crate) struct AttentionBlock {
    pub(super) norm: ClassNorm,
    pub(super) attention: Attention,
}

impl PixelCnn {
    pub(crate) fn new(
        config: &Config,
        network: &PixelCnnConfig,
        builder: &mut Builder,
    ) -> Result<Self> {
        let channels = network.channels;
        let codes = CodeTable::new(builder, "codes", &config.codebook_sizes, channels)?;
        let layers = (0..network.layers)
            .map(|index| GatedLayer::new(config, network, index, builder))
            .collect::<Result<Vec<_>>>()?;
        let positions = if layers.iter().any(|layer| layer.attention.is_some()) {
            Some(Positions::new(builder, "positions", config.grid, channels)?)
        } else {
            None
        };
        let fused = if positions.is_none() {
            let map = layers.first().and_then(|layer| layer.map.as_ref());
            let map_channels = map.map_or(0, |_| config.conditioner.channels);
            let kernels = layers.iter().map(|layer| [layer.rows, layer.columns]).collect();
            Some(GatedLayers::new(channels, network.skip_channels, map_channels, kernels)?)
        } else {
            None
        };
        Ok(Self { codes, layers, positions, channels, fused })
    }

    /// Codes `[B,h,w,G]` → features `[B,h,w,S]`, at each position of what came before it.
    pub(crate) fn forward(&self, codes: &Tensor, context: &Context, mode: Mode) -> Result<Tensor> {
        let embedded = self.codes.sums(codes, mode)?;
        match &self.fused {
            Some(fused) if GatedLayers::runs_on(embedded.device()) => {
                self.at_once(fused, &embedded, context, mode)
            }
            _ => self.layer_by_layer(&embedded, context, mode),
        }
    }

    /// Embedded codes to features, as one operation.
    pub(crate) fn at_once(
        &self,
        fused: &GatedLayers,
        embedded: &Tensor,
        context: &Context,
        mode: Mode,
    ) -> Result<Tensor> {
        let labels = context.labels.as_ref();
        let vectors: Vec<Tensor> = self
            .layers
            .iter()
            .map(|layer| layer.classes.vectors(labels, mode))
            .collect::<Result<_>>()?;
        let vectors = Tensor::stack(&vectors, 1)?;
        let parts = self.layers.iter().flat_map(GatedLayer::parts);
        let params: Vec<Tensor> = parts.flat_map(|part| part.tensors(mode)).collect();
        let seeds = |i| Ok([mode.drop_seed(2 * i + 1)?, mode.drop_seed(2 * i)?]);
        let seeds = (0..self.layers.len()).map(seeds).collect::<Result<_>>()?;
        let dropout = Dropout { p: mode.dropout, seeds };
        Ok(fused.forward(embedded, context.map.as_ref(), &vectors, &params, Some(&dropout))?)
    }

    /// The same of an operation for every part: any device, with attention, and the oracle of the other form.
    pub(crate) fn layer_by_layer(
        &self,
        embedded: &Tensor,
        context: &Context,
        mode: Mode,
    ) -> Result<Tensor> {
        let (_, h, w, _) = embedded.dims4()?;
        let positions = self.positions.as_ref().map(|positions| positions.map(mode)).transpose()?;
        let mut vertical = shift(embedded, [h, w], [1, 0])?;
        let mut horizontal = shift(embedded, [h, w], [0, 1])?;
        let mut skips: Option<Tensor> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let classes = layer.classes.vectors(context.labels.as_ref(), mode)?;
            let before = layer.vertical(&vertical, context.map.as_ref(), mode)?;
            let gated = layer.horizontal(&horizontal, &before, &classes, mode)?;
            let gated = mode.drop(&gated, 2 * index)?;
            let skip = layer.skip.apply(&gated, mode)?;
            skips = Some(match skips {
                None => skip,
                Some(skips) => (skips + skip)?,
            });
            if let Some(residual) = &layer.residual {
                horizontal = (horizontal + residual.apply(&gated, mode)?)?;
                vertical = gate(&before, &columns(&classes, 0, 2 * self.channels)?)?;
                vertical = mode.drop(&vertical, 2 * index + 1)?;
            }
            if let (Some(block), Some(positions)) = (&layer.attention, &positions) {
                let x = horizontal.broadcast_add(positions)?;
                let x = block.norm.forward(&x, context.labels.as_ref(), mode)?;
                horizontal =
                    (horizontal + block.attention.forward(&x, /* causal */ true, mode)?)?;
            }
        }
        skips.ok_or_else(|| crate::Error::config("network.layers", "must be at least 1"))
    }
}

impl GatedLayer {
    fn new(
        config: &Config,
        network: &PixelCnnConfig,
        index: usize,
        builder: &mut Builder,
    ) -> Result<Self> {
        let channels = network.channels;
        let size = if index == 0 { network.first_kernel } else { network.kernel };
        let half = size.div_ceil(2);
        let name = |part: &str| format!("layers.{index}.{part}");
        let last = index + 1 == network.layers;
        let both = (channels, 2 * channels);
        Ok(Self {
            vertical: Conv::new(builder, &name("vertical"), both, [half, size], 1.0)?,
            horizontal: Conv::new(builder, &name("horizontal"), both, [1, half], 1.0)?,
            link: Conv::linear(builder, &name("link"), 2 * channels, 2 * channels)?,
            residual: if last {
                None
            } else {
                Some(Conv::linear(builder, &name("residual"), channels, channels)?)
            },
            skip: Conv::linear(builder, &name("skip"), channels, network.skip_channels)?,
            classes: ClassTable::new(builder, &name("class"), config.class_count, 4 * channels)?,
            map: if config.conditioning.is_empty() {
                None
            } else {
                let inputs = config.conditioner.channels;
                Some(Conv::linear(builder, &name("map"), inputs, 2 * channels)?)
            },
            attention: if network.attends_after(index) {
                Some(AttentionBlock {
                    norm: ClassNorm::new(
                        builder,
                        &name("attention.norm"),
                        config.class_count,
                        channels,
                    )?,
                    attention: Attention::new(
                        builder,
                        &name("attention"),
                        channels,
                        network.heads,
                        1.0,
                    )?,
                })
            } else {
                None
            },
            rows: half,
            columns: size,
        })
    }

    /// What has a weight and a bias, as [`GatedLayers::parameters`] wants them.
    fn parts(&self) -> impl Iterator<Item = &Conv> {
        [&self.vertical, &self.horizontal, &self.link]
            .into_iter()
            .chain(&self.residual)
            .chain([&self.skip])
            .chain(&self.map)
    }

    /// The vertical stack before its gate: `[B,h,w,C]` → `[B,h,w,2C]`, row i of the rows up to i.
    fn vertical(&self, x: &Tensor, map: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        let above = self.rows - 1;
        let padded = shift(x, [h + above, w + self.columns - 1], [above as isize, self.side()])?;
        let y = self.vertical.forward(&padded, Conv2d::default(), mode)?;
        match (&self.map, map) {
            (Some(conv), Some(map)) => Ok((y + conv.apply(map, mode)?)?),
            _ => Ok(y),
        }
    }

    /// The horizontal stack after its gate: `[B,h,w,C]` and the vertical stack before its gate → `[B,h,w,C]`.
    fn horizontal(
        &self,
        x: &Tensor,
        vertical: &Tensor,
        classes: &Tensor,
        mode: Mode,
    ) -> Result<Tensor> {
        let (_, h, w, c) = x.dims4()?;
        let left = self.rows - 1;
        let padded = shift(x, [h, w + left], [0, left as isize])?;
        let y = self.horizontal.forward(&padded, Conv2d::default(), mode)?;
        let link = self.link.apply(vertical, mode)?;
        Ok(gate_sum(&y, &link, &columns(classes, 2 * c, 2 * c)?)?)
    }

    /// Columns of padding on either side of the vertical kernel.
    pub(super) fn side(&self) -> isize {
        (self.columns / 2) as isize
    }
}

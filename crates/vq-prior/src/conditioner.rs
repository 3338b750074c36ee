//! What a prior sees of the levels above.

use candle_core::Tensor;
use vq_ops::{Conv2d, Precision};

use crate::attention::Attention;
use crate::layers::{Builder, ClassNorm, CodeTable, Conv, Mode, Positions};
use crate::{Config, GridConfig, Result};

/// Reads the whole grids of the levels above and spreads them over the prior's own grid.
///
/// As the conditioning stack of VQ-VAE-2 (Razavi et al. 2019, appendix B) it is a residual network on the
/// coarse grid; attention without a mask follows, so that every position is told of every code above.
#[derive(Debug)]
pub(crate) struct Conditioner {
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    codes: CodeTable,
    positions: Positions,
    blocks: Vec<(Conv, Conv)>,
    norm: ClassNorm,
    attention: Attention,
    output: Conv,
    /// Positions of the prior's grid per position of this one.
    ratio: [usize; 2],
    channels: usize,
}

const CONV_3X3: Conv2d =
    Conv2d { stride: 1, padding: 1, dilation: 1, relu_input: true, precision: Precision::F32 };
const CONV_1X1: Conv2d =
    Conv2d { stride: 1, padding: 0, dilation: 1, relu_input: true, precision: Precision::F32 };

impl Conditioner {
    pub(crate) fn new(config: &Config, builder: &mut Builder) -> Result<Self> {
        let level =
            |(index, grid)| Level::new(config, grid, &format!("conditioner.{index}"), builder);
        let levels = config.conditioning.iter().enumerate().map(level).collect::<Result<_>>()?;
        Ok(Self { levels })
    }

    /// The codes of every level above, `[B,h',w',G']` u32 → `[B,h,w,C]`; nothing without such levels.
    pub(crate) fn forward(&self, grids: &[Tensor], mode: Mode) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (level, codes) in self.levels.iter().zip(grids) {
            let map = level.forward(codes, mode)?;
            sum = Some(match sum {
                None => map,
                Some(sum) => (sum + map)?,
            });
        }
        Ok(sum)
    }
}

impl Level {
    fn new(config: &Config, grid: &GridConfig, name: &str, builder: &mut Builder) -> Result<Self> {
        let (channels, heads) = (config.conditioner.channels, config.conditioner.heads);
        let [h, w] = grid.grid;
        let ratio = [config.grid[0] / h, config.grid[1] / w];
        let mut blocks = Vec::new();
        for index in 0..config.conditioner.residual_blocks {
            let sizes = (channels, channels);
            let first = format!("{name}.blocks.{index}.conv1");
            let second = format!("{name}.blocks.{index}.conv2");
            blocks.push((
                Conv::new(builder, &first, sizes, [3, 3], 1.0)?,
                Conv::new(builder, &second, sizes, [1, 1], 1.0)?,
            ));
        }
        let outputs = channels * ratio[0] * ratio[1];
        Ok(Self {
            codes: CodeTable::new(
                builder,
                &format!("{name}.codes"),
                &grid.codebook_sizes,
                channels,
            )?,
            positions: Positions::new(builder, &format!("{name}.positions"), [h, w], channels)?,
            blocks,
            norm: ClassNorm::new(builder, &format!("{name}.norm"), /* classes */ 0, channels)?,
            attention: Attention::new(builder, &format!("{name}.attention"), channels, heads, 1.0)?,
            output: Conv::linear(builder, &format!("{name}.output"), channels, outputs)?,
            ratio,
            channels,
        })
    }

    fn forward(&self, codes: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.codes.sums(codes, mode)?.broadcast_add(&self.positions.map(mode)?)?;
        for (first, second) in &self.blocks {
            let hidden = first.forward(&x, CONV_3X3, mode)?;
            x = (x + second.forward(&hidden, CONV_1X1, mode)?)?;
        }
        let normed = self.norm.forward(&x, None, mode)?;
        x = (x + self.attention.forward(&normed, /* causal */ false, mode)?)?;
        let (b, h, w, _) = x.dims4()?;
        let ([down, right], c) = (self.ratio, self.channels);
        // Each coarse position gives a vector of its own to every position that it covers.
        let blocks = self.output.apply(&x, mode)?.reshape((b, h, w, down, right, c))?;
        let blocks = blocks.permute((0, 1, 3, 2, 4, 5))?.contiguous()?;
        Ok(blocks.reshape((b, h * down, w * right, c))?)
    }
}

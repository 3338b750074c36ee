//! The gated PixelCNN, one position at a time.

use candle_core::{DType, Device, Tensor};
use vq_ops::{Conv2d, PackedLinear, gate, shift};

use crate::attention::AttentionSteps;
use crate::layers::{Context, Conv, Mode, columns, normalize};
use crate::pixelcnn::{GatedLayer, PixelCnn};
use crate::{Error, Result};

/// A PixelCNN with what it has computed so far.
///
/// The vertical stack at a row depends on the rows above alone: it moves a whole row at a time, and each
/// layer keeps as many rows of its input as its kernel is high. The horizontal stack moves a position at a
/// time, and each layer keeps as many positions as its kernel is wide.
#[derive(Debug)]
pub(crate) struct PixelCnnSteps<'a> {
    network: &'a PixelCnn,
    layers: Vec<LayerSteps<'a>>,
    /// Learned positions `[h·w, C]` for attention.
    positions: Option<Tensor>,
    /// Embedded codes `[B,1,1,C]` of the row that is being filled.
    row: Vec<Tensor>,
    /// `[B,C]`: what stands outside of the grid.
    zeros: Tensor,
    grid: [usize; 2],
    batch: usize,
    position: usize,
}

#[derive(Debug)]
struct LayerSteps<'a> {
    layer: &'a GatedLayer,
    horizontal: PackedLinear,
    /// The residual, where there is one, then the skip.
    outputs: PackedLinear,
    /// What the class adds: `[B or 1, 2C]` each.
    vertical_class: Tensor,
    horizontal_class: Tensor,
    /// What the levels above add, `[B,h,w,2C]`.
    map: Option<Tensor>,
    attention: Option<(AttentionSteps, (Tensor, Tensor))>,
    /// The last rows `[B,1,w,C]` of the vertical stack that comes in, at most as many as the kernel.
    rows: Vec<Tensor>,
    /// What the vertical stack sends to every position of this row, `[B, 2C]`.
    links: Vec<Tensor>,
    /// The last positions `[B,C]` of the horizontal stack that comes in, as many as the kernel.
    window: Vec<Tensor>,
}

impl PixelCnn {
    pub(crate) fn steps(
        &self,
        context: &Context,
        batch: usize,
        grid: [usize; 2],
        device: &Device,
    ) -> Result<PixelCnnSteps<'_>> {
        let c = self.channels;
        let mode = Mode::EVALUATE;
        let labels = context.labels.as_ref();
        let mut layers = Vec::new();
        for layer in &self.layers {
            let classes = layer.classes.vectors(labels, mode)?;
            let attention = match &layer.attention {
                Some(block) => Some((
                    block.attention.steps(batch, grid[0] * grid[1])?,
                    block.norm.vectors(labels, mode)?,
                )),
                None => None,
            };
            let map = match (&layer.map, &context.map) {
                (Some(conv), Some(map)) => Some(conv.apply(map, mode)?),
                _ => None,
            };
            let outputs: Vec<&Conv> = layer.residual.iter().chain([&layer.skip]).collect();
            layers.push(LayerSteps {
                layer,
                horizontal: layer.horizontal.packed()?,
                outputs: Conv::packed_side_by_side(&outputs)?,
                vertical_class: columns(&classes, 0, 2 * c)?,
                horizontal_class: columns(&classes, 2 * c, 2 * c)?,
                map,
                attention,
                rows: Vec::new(),
                links: Vec::new(),
                window: Vec::new(),
            });
        }
        let positions = match &self.positions {
            Some(positions) => Some(positions.map(mode)?.reshape(((), c))?),
            None => None,
        };
        let zeros = Tensor::zeros((batch, c), DType::F32, device)?;
        let (row, position) = (Vec::new(), 0);
        Ok(PixelCnnSteps { network: self, layers, positions, row, zeros, grid, batch, position })
    }
}

impl PixelCnnSteps<'_> {
    /// Features `[B,S]` of the next position.
    pub(crate) fn features(&mut self) -> Result<Tensor> {
        let column = self.position % self.grid[1];
        let channels = self.network.channels;
        if column == 0 {
            self.start_row()?;
        }
        let mut x = match self.row.last() {
            Some(left) => left.reshape((self.batch, channels))?,
            None => self.zeros.clone(),
        };
        let mut skips: Option<Tensor> = None;
        for layer in &mut self.layers {
            let (residual, skip) = layer.step(&x, column, channels)?;
            skips = Some(match skips {
                None => skip,
                Some(skips) => (skips + skip)?,
            });
            if let Some(residual) = residual {
                x = (x + residual)?;
            }
            if let (Some((attention, norm)), Some(positions)) =
                (&mut layer.attention, &self.positions)
            {
                let normed = x.broadcast_add(&positions.narrow(0, self.position, 1)?)?;
                x = (&x + attention.step(&normalize(&normed, norm)?)?)?;
            }
        }
        skips.ok_or_else(|| Error::config("network.layers", "must be at least 1"))
    }

    /// Takes the codes `[B,G]` of the position whose features were asked for last.
    pub(crate) fn push(&mut self, codes: &Tensor) -> Result<()> {
        let vectors = self.network.codes.sums(codes, Mode::EVALUATE)?;
        self.row.push(vectors.reshape((self.batch, 1, 1, self.network.channels))?);
        self.position += 1;
        Ok(())
    }

    /// The vertical stack at the row that begins, from the row that is full.
    fn start_row(&mut self) -> Result<()> {
        let zeros = &self.zeros;
        let width = self.grid[1];
        let row = self.position / width;
        let mut vertical = if self.row.is_empty() {
            zeros.reshape((self.batch, 1, 1, ()))?.repeat((1, 1, width, 1))?
        } else {
            Tensor::cat(&self.row, 2)?
        };
        self.row.clear();
        for layer in &mut self.layers {
            vertical = layer.start_row(vertical, row)?;
            layer.window = vec![zeros.clone(); layer.layer.rows];
        }
        Ok(())
    }
}

impl LayerSteps<'_> {
    /// The next row `[B,1,w,C]` of the vertical stack to the one that comes out.
    fn start_row(&mut self, x: Tensor, row: usize) -> Result<Tensor> {
        let (_, _, w, _) = x.dims4()?;
        let (height, width) = (self.layer.rows, self.layer.columns);
        self.rows.push(x);
        if self.rows.len() > height {
            self.rows.remove(0);
        }
        let rows = Tensor::cat(&self.rows, 1)?;
        // Above the first row there are zeros.
        let missing = (height - self.rows.len()) as isize;
        let padded = shift(&rows, [height, w + width - 1], [missing, self.layer.side()])?;
        let mode = Mode::EVALUATE;
        let mut before = self.layer.vertical.forward(&padded, Conv2d::default(), mode)?;
        if let Some(map) = &self.map {
            before = (before + map.narrow(1, row, 1)?.contiguous()?)?;
        }
        let links = self.layer.link.apply(&before, mode)?;
        let link = |column| Ok(links.narrow(2, column, 1)?.contiguous()?.flatten(1, 3)?);
        self.links = (0..w).map(link).collect::<Result<_>>()?;
        Ok(gate(&before, &self.vertical_class)?)
    }

    /// The horizontal stack `[B,C]` at a column to (what is added to it, what is skipped ahead).
    fn step(
        &mut self,
        x: &Tensor,
        column: usize,
        channels: usize,
    ) -> Result<(Option<Tensor>, Tensor)> {
        self.window.rotate_left(1);
        if let Some(last) = self.window.last_mut() {
            *last = x.clone();
        }
        let before = self.horizontal.forward(&Tensor::cat(&self.window, 1)?, false)?;
        let before = match self.links.get(column) {
            Some(link) => (before + link)?,
            None => before,
        };
        let both = self.outputs.forward(&gate(&before, &self.horizontal_class)?, false)?;
        if self.layer.residual.is_none() {
            return Ok((None, both));
        }
        let skips = both.dim(1)? - channels;
        Ok((Some(columns(&both, 0, channels)?), columns(&both, channels, skips)?))
    }
}

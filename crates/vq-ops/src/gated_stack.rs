//! A PixelCNN's gated layers as one operation on the CPU.

use candle_core::{Device, Result, Tensor, bail};

use crate::cpu::blocks::{Gradients, Pass};
use crate::cpu::buffers::Buffers;
use crate::cpu::gated::{Block, Layer, Plan};
use crate::dispatch::on_cpu;
use crate::network::{Dropout, Network, Operands, Parts, Taken, run};

/// The gated layers of a PixelCNN (van den Oord et al. 2016b, section 2 and figure 2), run as one operation: a
/// vertical stack v that sees the rows above and a horizontal stack h that sees the row so far.
///
/// The first layer gets the embedded codes e, in v one row further down, in h one column further right, so that
/// no position sees itself. With s the layer's vector for the image and m the map, each layer is
///
/// ```text
/// a = conv(v) + map(m)              conv: the rows up to the own one, centred
/// b = conv(h) + link(a)             conv: the columns up to the own one
/// g = drop(gate(b + s[2C..]))       gate: tanh of the first half ⊙ σ of the second
/// h ← h + residual(g)               but in the last layer
/// v ← drop(gate(a + s[..2C]))       likewise
/// ```
///
/// and the result is the sum of all layers' skip(g).
#[derive(Clone, Debug)]
pub struct GatedLayers {
    /// C, of both stacks.
    channels: usize,
    /// S, of the result.
    skip_channels: usize,
    /// M, of the map; 0 for none.
    map_channels: usize,
    /// `[rows, columns]` of each layer's vertical kernel.
    kernels: Vec<[usize; 2]>,
    buffers: Buffers,
}

impl GatedLayers {
    /// Layers of C channels with results of S, at least one; a map of M, or 0 for none. `kernels` are
    /// `[rows, columns]` of each layer's vertical kernel, whose last row is a pixel's own and whose column
    /// number `columns / 2` is; the horizontal kernel has as many columns as the vertical one rows.
    pub fn new(
        channels: usize,
        skip_channels: usize,
        map_channels: usize,
        kernels: Vec<[usize; 2]>,
    ) -> Result<Self> {
        if channels == 0 || skip_channels == 0 || kernels.iter().flatten().any(|&n| n == 0) {
            bail!("gated layers need channels and kernels of at least 1");
        }
        if kernels.is_empty() {
            bail!("a PixelCNN needs at least one gated layer");
        }
        Ok(Self { channels, skip_channels, map_channels, kernels, buffers: Buffers::default() })
    }

    /// Whether this operation runs on that device: on the CPU, unless candle's own operations are asked for.
    pub fn runs_on(device: &Device) -> bool {
        on_cpu(device)
    }

    /// Names and shapes of a layer's parameters, in order: weights as PyTorch's `[Cout, Cin, KH, KW]`, each with
    /// its bias `[Cout]`.
    pub fn parameters(&self, layer: usize) -> Vec<(&'static str, [usize; 4])> {
        let (c, s, m) = (self.channels, self.skip_channels, self.map_channels);
        let [rows, columns] = self.kernels.get(layer).copied().unwrap_or([1, 1]);
        let mut all = vec![
            ("vertical", [2 * c, c, rows, columns]),
            ("horizontal", [2 * c, c, 1, rows]),
            ("link", [2 * c, 2 * c, 1, 1]),
        ];
        if layer + 1 < self.kernels.len() {
            all.push(("residual", [c, c, 1, 1]));
        }
        all.push(("skip", [s, c, 1, 1]));
        if m > 0 {
            all.push(("map", [2 * c, m, 1, 1]));
        }
        all
    }

    /// Embedded codes `[B,h,w,C]`, with a map `[B,h,w,M]` if the layers take one, and the layers' vectors
    /// `[B,L,4C]`, or `[1,L,4C]` for all images (vertical gate, then horizontal) → `[B,h,w,S]`.
    ///
    /// `params` holds weight and bias of all layers' [`parameters`](Self::parameters). A layer's dropout has
    /// one seed for its vertical stack and one for its horizontal one. f32 on the CPU; differentiable in all
    /// tensors. An image's result does not depend on the others of its batch.
    pub fn forward(
        &self,
        codes: &Tensor,
        map: Option<&Tensor>,
        vectors: &Tensor,
        params: &[Tensor],
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        let operands = Operands {
            name: "gated layers",
            channels: self.channels,
            map_channels: self.map_channels,
            layers: self.kernels.len(),
        };
        let sizes = operands.check(codes, map, vectors)?;
        let mut parts = Parts::new(params);
        let mut layers = Vec::with_capacity(self.kernels.len());
        for index in 0..self.kernels.len() {
            let shapes = self.parameters(index);
            let mut shapes = shapes.into_iter().peekable();
            let mut next = |wanted: &str| match shapes.next_if(|(name, _)| *name == wanted) {
                Some((name, shape)) => parts.next(name, shape).map(Some),
                None => Ok(None),
            };
            let vertical = next("vertical")?;
            let (horizontal, link) = (next("horizontal")?, next("link")?);
            let (residual, skip, map) = (next("residual")?, next("skip")?, next("map")?);
            let (Some(vertical), Some(horizontal), Some(link), Some(skip)) =
                (vertical, horizontal, link, skip)
            else {
                bail!("a gated layer lacks a part");
            };
            layers.push(Layer { vertical, horizontal, link, residual, skip, map });
        }
        parts.end()?;
        let plan = Plan {
            batch: sizes.batch,
            grid: (sizes.height, sizes.width),
            channels: self.channels,
            skip_channels: self.skip_channels,
            map_channels: self.map_channels,
            layers,
            own_vectors: sizes.own_vectors,
            masks: operands.masks(dropout)?,
        };
        let shape = (sizes.batch, sizes.height, sizes.width, self.skip_channels);
        run(plan, Taken::new(codes, map, vectors, params)?, shape, &self.buffers)
    }
}

impl Network for Plan {
    const NAME: &'static str = "vq-gated-layers";
    type Block = Block;

    fn forward(pass: &Pass<'_, Self>, x: &[f32], keep: bool) -> (Vec<f32>, Vec<Block>) {
        pass.forward(x, keep)
    }

    fn backward(
        pass: &Pass<'_, Self>,
        blocks: &[Block],
        grad: &[f32],
        of_theta: bool,
    ) -> Gradients {
        pass.backward(blocks, grad, of_theta)
    }
}

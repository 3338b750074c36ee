//! A Transformer's layers as one operation on the CPU.

use candle_core::{Device, Result, Tensor, bail};

use crate::cpu::blocks::{Gradients, Pass};
use crate::cpu::buffers::Buffers;
use crate::cpu::transformer::{Block, Layer, Plan};
use crate::dispatch::on_cpu;
use crate::network::{Dropout, Network, Operands, Parts, Taken, run};

/// The layers of a decoder-only Transformer, run as one operation. With (g, s) the gain and shift of a norm for
/// the image and m the map, each layer is
///
/// ```text
/// x ← x + map(m)
/// x ← x + drop(output(attention(query(n), key(n), value(n))))     n = rms_norm(x, g, s), causal
/// x ← x + drop(mlp_out(swiglu(mlp_in(n))))                        n = rms_norm(x, g', s')
/// ```
///
/// (Vaswani et al. 2017; Zhang & Sennrich 2019; Shazeer 2020).
#[derive(Clone, Debug)]
pub struct TransformerLayers {
    /// C, of the residual stream.
    channels: usize,
    /// Heads of the attention; they divide C.
    heads: usize,
    /// H, of what the gate gives.
    mlp_hidden: usize,
    /// M, of the map; 0 for none.
    map_channels: usize,
    /// L.
    layers: usize,
    /// ε of the norms.
    epsilon: f64,
    buffers: Buffers,
}

impl TransformerLayers {
    /// `layers` of C channels and networks of H, at least one; a map of M, or 0 for none; the ε of the norms.
    pub fn new(
        channels: usize,
        heads: usize,
        mlp_hidden: usize,
        map_channels: usize,
        layers: usize,
        epsilon: f64,
    ) -> Result<Self> {
        if [channels, heads, mlp_hidden, layers].contains(&0) || !channels.is_multiple_of(heads) {
            bail!("a Transformer needs layers and channels that its heads divide");
        }
        let buffers = Buffers::default();
        Ok(Self { channels, heads, mlp_hidden, map_channels, layers, epsilon, buffers })
    }

    /// Whether this operation runs on that device: on the CPU, unless candle's own operations are asked for.
    pub fn runs_on(device: &Device) -> bool {
        on_cpu(device)
    }

    /// Names and shapes of a layer's parameters, in order: weights as PyTorch's `[Cout, Cin, 1, 1]`, each with
    /// its bias `[Cout]`.
    pub fn parameters(&self) -> Vec<(&'static str, [usize; 4])> {
        let (c, h, m) = (self.channels, self.mlp_hidden, self.map_channels);
        let mut all = if m > 0 { vec![("map", [c, m, 1, 1])] } else { Vec::new() };
        all.extend(["query", "key", "value", "output"].map(|name| (name, [c, c, 1, 1])));
        all.extend([("mlp.in", [2 * h, c, 1, 1]), ("mlp.out", [c, h, 1, 1])]);
        all
    }

    /// `x` `[B,h,w,C]`, with a map `[B,h,w,M]` if the layers take one, and the layers' vectors `[B,L,4C]`, or
    /// `[1,L,4C]` for all images (gain and shift of the first norm, then of the second) → `[B,h,w,C]`.
    ///
    /// `params` holds weight and bias of all layers' [`parameters`](Self::parameters). A layer's dropout has
    /// one seed after the attention and one after the network. f32 on the CPU; differentiable in all tensors.
    /// An image's result does not depend on the others of its batch.
    pub fn forward(
        &self,
        x: &Tensor,
        map: Option<&Tensor>,
        vectors: &Tensor,
        params: &[Tensor],
        dropout: Option<&Dropout>,
    ) -> Result<Tensor> {
        let operands = Operands {
            name: "a Transformer's layers",
            channels: self.channels,
            map_channels: self.map_channels,
            layers: self.layers,
        };
        let sizes = operands.check(x, map, vectors)?;
        let mut parts = Parts::new(params);
        let mut layers = Vec::with_capacity(self.layers);
        for _ in 0..self.layers {
            let mut given = Vec::new();
            for (name, shape) in self.parameters() {
                given.push(parts.next(name, shape)?);
            }
            let mut given = given.into_iter();
            let map = if self.map_channels > 0 { given.next() } else { None };
            let mut next = || given.next();
            let (Some(query), Some(key), Some(value), Some(output), Some(mlp_in), Some(mlp_out)) =
                (next(), next(), next(), next(), next(), next())
            else {
                bail!("a layer lacks a part");
            };
            layers.push(Layer { map, query, key, value, output, mlp_in, mlp_out });
        }
        parts.end()?;
        let plan = Plan {
            batch: sizes.batch,
            positions: sizes.height * sizes.width,
            channels: self.channels,
            heads: self.heads,
            hidden: self.mlp_hidden,
            map_channels: self.map_channels,
            layers,
            own_vectors: sizes.own_vectors,
            epsilon: self.epsilon as f32,
            masks: operands.masks(dropout)?,
        };
        let shape = (sizes.batch, sizes.height, sizes.width, self.channels);
        run(plan, Taken::new(x, map, vectors, params)?, shape, &self.buffers)
    }
}

impl Network for Plan {
    const NAME: &'static str = "vq-transformer-layers";
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

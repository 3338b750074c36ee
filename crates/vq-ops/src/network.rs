//! What the operations that are whole networks have in common: operands, parameters, gradients.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};

use crate::cpu::blocks::{Gradients, Part, Pass};
use crate::cpu::buffers::Buffers;
use crate::dropout::Mask;
use crate::fused::on_a_worker;
use crate::gradients::{Delivery, delivery};
use crate::storage::{f32_elements, f32_slice};

/// What is dropped in the layers of a network; see [`dropout`](crate::dropout()).
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The probability, in [0, 1).
    pub p: f64,
    /// Each layer's two seeds.
    pub seeds: Vec<[u64; 2]>,
}

/// What a network of layers takes: x `[B,h,w,C]`, a map `[B,h,w,M]`, vectors `[B or 1, L, 4C]`.
pub(crate) struct Operands {
    /// Of the network, for errors.
    pub name: &'static str,
    pub channels: usize,
    /// M, or 0 for no map.
    pub map_channels: usize,
    pub layers: usize,
}

/// The sizes of operands that fit.
pub(crate) struct Sizes {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    /// Whether each image has vectors of its own.
    pub own_vectors: bool,
}

impl Operands {
    pub(crate) fn check(
        &self,
        x: &Tensor,
        map: Option<&Tensor>,
        vectors: &Tensor,
    ) -> Result<Sizes> {
        let Self { name, channels, map_channels, layers } = *self;
        let (batch, height, width, given) = x.dims4()?;
        let map_dims = map.map_or_else(|| vec![batch, height, width, 0], |map| map.dims().to_vec());
        let images = vectors.dim(0)?;
        let fits = batch * height * width > 0
            && given == channels
            && map_dims == [batch, height, width, map_channels]
            && (images == 1 || images == batch)
            && vectors.dims() == [images, layers, 4 * channels];
        if !fits {
            bail!(
                "{name} take [B,h,w,{channels}], a map of {map_channels} channels and [B or 1, {layers}, {}], got \
                 {:?}, {map_dims:?} and {:?}",
                4 * channels,
                x.dims(),
                vectors.dims()
            );
        }
        if x.dtype() != DType::F32 || !x.device().is_cpu() {
            bail!("{name} as one operation are for f32 on the CPU");
        }
        Ok(Sizes { batch, height, width, own_vectors: images == batch })
    }

    pub(crate) fn masks(&self, dropout: Option<&Dropout>) -> Result<Option<Vec<[Mask; 2]>>> {
        let Some(Dropout { p, seeds }) = dropout else { return Ok(None) };
        if !(0.0..1.0).contains(p) || seeds.len() != self.layers {
            bail!(
                "dropout needs a probability of at least 0 and below 1, and seeds for {} layers; got {p} and {}",
                self.layers,
                seeds.len()
            );
        }
        let masks = || seeds.iter().map(|pair| pair.map(|seed| Mask::new(*p, seed))).collect();
        Ok((*p > 0.0).then(masks))
    }
}

/// Parameters, taken one by one: each a weight and its bias.
pub(crate) struct Parts<'a> {
    given: std::slice::Iter<'a, Tensor>,
    offset: usize,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(params: &'a [Tensor]) -> Self {
        Self { given: params.iter(), offset: 0 }
    }

    /// The next one, which must have a weight of that shape.
    pub(crate) fn next(&mut self, name: &str, shape: [usize; 4]) -> Result<Part> {
        let [outputs, inputs, kh, kw] = shape;
        let dims = [self.given.next().map(Tensor::dims), self.given.next().map(Tensor::dims)];
        if dims != [Some(&shape[..]), Some(&[outputs])] {
            bail!(
                "{name} must have a weight {shape:?} and a bias [{outputs}], got {:?} and {:?}",
                dims[0],
                dims[1]
            );
        }
        let weight = self.offset..self.offset + shape.iter().product::<usize>();
        let bias = weight.end..weight.end + outputs;
        self.offset = bias.end;
        Ok(Part { weight, bias, outputs, inputs, kernel: [kh, kw] })
    }

    pub(crate) fn end(mut self) -> Result<()> {
        match self.given.next() {
            None => Ok(()),
            Some(tensor) => bail!("one parameter too many: {:?}", tensor.dims()),
        }
    }
}

/// The operands as the operation takes them.
pub(crate) struct Taken {
    /// With the map behind its channels.
    pub x: Tensor,
    pub vectors: Tensor,
    /// All parameters, flat and side by side.
    pub theta: Tensor,
    /// Whether a backward pass can follow.
    pub keep: bool,
    pub delivery: Option<Delivery>,
}

impl Taken {
    pub(crate) fn new(
        x: &Tensor,
        map: Option<&Tensor>,
        vectors: &Tensor,
        params: &[Tensor],
    ) -> Result<Self> {
        let x = match map {
            Some(map) => Tensor::cat(&[x, map], D::Minus1)?.contiguous()?,
            None => x.contiguous()?,
        };
        let vectors = vectors.contiguous()?;
        let tracked = params.iter().any(Tensor::track_op);
        let others = x.track_op() || vectors.track_op();
        // Where the gradients of the parameters go around the graph, something else must lead it here.
        let delivery = if tracked && others { delivery(params) } else { None };
        let flat = |param: &Tensor| match delivery {
            Some(_) => param.detach().flatten_all(),
            None => param.flatten_all(),
        };
        let theta = Tensor::cat(&params.iter().map(flat).collect::<Result<Vec<_>>>()?, 0)?;
        Ok(Self { x, vectors, theta, keep: tracked || others, delivery })
    }
}

/// What the passes of a network's operation do.
pub(crate) trait Network: Send + Sync + Sized {
    /// Of the operation.
    const NAME: &'static str;
    /// What some images leave behind for their gradients.
    type Block: Send;

    /// The result, and what the backward pass needs if it is to follow.
    fn forward(pass: &Pass<'_, Self>, x: &[f32], keep: bool) -> (Vec<f32>, Vec<Self::Block>);

    /// The gradients, given that of the result; those of the parameters where `of_theta`.
    fn backward(
        pass: &Pass<'_, Self>,
        blocks: &[Self::Block],
        grad: &[f32],
        of_theta: bool,
    ) -> Gradients;
}

/// Runs a network, whose result has that shape. Differentiable in all tensors.
pub(crate) fn run<N: Network + 'static>(
    network: N,
    taken: Taken,
    shape: impl Into<Shape>,
    buffers: &Buffers,
) -> Result<Tensor> {
    buffers.begin_pass();
    let Taken { x, vectors, theta, keep, delivery } = taken;
    let (saved, buffers) = (Mutex::new(None), buffers.clone());
    let op = NetworkOp { network, shape: shape.into(), keep, saved, buffers, delivery };
    x.apply_op3(&vectors, &theta, op)
}

struct NetworkOp<N: Network> {
    network: N,
    shape: Shape,
    /// Whether a backward pass can follow.
    keep: bool,
    saved: Mutex<Option<Vec<N::Block>>>,
    buffers: Buffers,
    delivery: Option<Delivery>,
}

impl<N: Network> NetworkOp<N> {
    fn pass<'a>(&'a self, vectors: &'a [f32], theta: &'a [f32]) -> Pass<'a, N> {
        Pass { plan: &self.network, theta, vectors, buffers: &self.buffers }
    }
}

impl<N: Network> CustomOp3 for NetworkOp<N> {
    fn name(&self) -> &'static str {
        N::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        vectors: &CpuStorage,
        vectors_layout: &Layout,
        theta: &CpuStorage,
        theta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_elements(x, x_layout)?;
        let vectors = f32_elements(vectors, vectors_layout)?;
        let theta = f32_elements(theta, theta_layout)?;
        let pass = self.pass(vectors, theta);
        let (out, saved) = on_a_worker(|| N::forward(&pass, x, self.keep));
        if self.keep {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        Ok((CpuStorage::F32(out), self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        vectors: &Tensor,
        theta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_theta = theta.track_op() || self.delivery.is_some();
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let work = |x: &[f32], vectors: &[f32], theta: &[f32], grad: &[f32]| {
            let pass = self.pass(vectors, theta);
            // A second backward pass through the same graph computes it anew.
            let saved = saved.unwrap_or_else(|| N::forward(&pass, x, true).1);
            N::backward(&pass, &saved, grad, of_theta)
        };
        let gradients = f32_slice(x, |x| {
            f32_slice(vectors, |vectors| {
                f32_slice(theta, |theta| {
                    f32_slice(&grad, |grad| on_a_worker(|| work(x, vectors, theta, grad)))
                })
            })
        })????;
        let tensor = |values: Vec<f32>, like: &Tensor| {
            let wanted = like.track_op();
            wanted.then(|| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        let of_theta = match (&self.delivery, gradients.theta) {
            (Some(delivery), Some(values)) => {
                delivery.add(Tensor::from_vec(values, theta.shape(), theta.device())?)?;
                None
            }
            (_, Some(values)) => tensor(values, theta)?,
            (_, None) => None,
        };
        Ok((tensor(gradients.input, x)?, tensor(gradients.vectors, vectors)?, of_theta))
    }
}

//! The layers of a Transformer, forwards and backwards.
//!
//! As in [`super::gated`], a task takes a few images through all layers, and the weights' gradients are taken
//! afterwards.

use rayon::prelude::*;

use super::blocks::{
    Gradients, Part, Pass, Place, Vectors, block_images, multiply, own_pixel, pack,
    parameter_gradients, product,
};
use super::buffers::{Buffer, Buffers};
use super::conv::{Finish, Rows};
use super::pack::{Axes, DepthAxis, Matrix, Patches};
use super::weight_gradient::Piece;
use crate::dropout::Mask;
use crate::math::vectorized;
use crate::norm::{norm_row, norm_row_gradient};
use crate::softmax::{softmax, softmax_gradient};
use crate::swiglu::{swiglu_row, swiglu_row_gradient};

/// What is asked for: the sizes and where the parameters lie.
#[derive(Debug)]
pub(crate) struct Plan {
    pub batch: usize,
    /// T.
    pub positions: usize,
    /// C.
    pub channels: usize,
    pub heads: usize,
    /// H.
    pub hidden: usize,
    /// M, or 0.
    pub map_channels: usize,
    pub layers: Vec<Layer>,
    /// Whether each image has vectors of its own.
    pub own_vectors: bool,
    pub epsilon: f32,
    /// After each layer's attention and after its network.
    pub masks: Option<Vec<[Mask; 2]>>,
}

/// The parameters of one layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub map: Option<Part>,
    pub query: Part,
    pub key: Part,
    pub value: Part,
    pub output: Part,
    pub mlp_in: Part,
    pub mlp_out: Part,
}

impl Plan {
    fn rows(&self) -> usize {
        self.batch * self.positions
    }

    /// Images of a block: by shape alone.
    fn block_images(&self) -> usize {
        block_images(self.batch, self.positions)
    }

    fn scale(&self) -> f32 {
        1.0 / ((self.channels / self.heads) as f32).sqrt()
    }
}

/// How the rows of a block of images are read: C, H, 2H and M channels.
struct Views {
    images: usize,
    own: Patches,
    own_hidden: Patches,
    own_both: Patches,
    own_map: Patches,
}

impl Views {
    fn new(plan: &Plan, images: usize) -> Self {
        let own = |channels: usize| own_pixel(images, (1, plan.positions), channels);
        Self {
            images,
            own: own(plan.channels),
            own_hidden: own(plan.hidden),
            own_both: own(2 * plan.hidden),
            own_map: own(plan.map_channels),
        }
    }

    fn rows(&self) -> usize {
        self.own.rows()
    }
}

/// The weights of a layer as the passes take them.
struct Panels {
    map: Option<Buffer>,
    projections: [Buffer; 3],
    output: Buffer,
    mlp_in: Buffer,
    mlp_out: Buffer,
}

struct GradientPanels {
    map: Option<Buffer>,
    normed: Buffer,
    read: Buffer,
    mlp_normed: Buffer,
    hidden: Buffer,
}

/// What a block of images leaves behind for its gradients.
pub(crate) struct Block {
    layers: Vec<BlockLayer>,
    map: Option<Buffer>,
}

struct BlockLayer {
    /// `[rows, C]`: the residual stream before the attention, …
    x: Buffer,
    normed: Buffer,
    query: Buffer,
    key: Buffer,
    value: Buffer,
    /// … what the heads read, and the stream before the network.
    read: Buffer,
    between: Buffer,
    mlp_normed: Buffer,
    /// `[rows, 2H]` and, after the gate, `[rows, H]`.
    both: Buffer,
    hidden: Buffer,
}

/// The gradients of a block's layer that its weights' gradients need.
struct BlockGradients {
    /// Of the network's output and of what goes into its gate.
    mlp_out: Buffer,
    both: Buffer,
    output: Buffer,
    projections: [Buffer; 3],
    /// Of the layer's input, where the map was added to it.
    x: Option<Buffer>,
}

/// The norms of a layer.
const ATTENTION: usize = 0;
const MLP: usize = 1;

/// The vectors are `[B or 1, L, 4C]`: gain and shift of the attention's norm, then of the network's.
impl Pass<'_, Plan> {
    /// `x` `[B,T,C+M]` → `[B,T,C]`, and what [`backward`](Self::backward) needs if it is to follow.
    pub(crate) fn forward(&self, x: &[f32], keep: bool) -> (Vec<f32>, Vec<Block>) {
        let Plan { channels, map_channels, positions, .. } = *self.plan;
        let all = Views::new(self.plan, self.plan.block_images());
        let panels: Vec<Panels> =
            self.plan.layers.par_iter().map(|layer| self.panels(&all, layer)).collect();
        let mut out = vec![0.; self.plan.rows() * channels];
        let rows = positions * all.images;
        let blocks = x
            .par_chunks(rows * (channels + map_channels))
            .zip(out.par_chunks_mut(rows * channels))
            .enumerate()
            .map(|(index, (x, out))| {
                let block = self.forward_block(&all, &panels, index, x, out, keep);
                keep.then_some(block)
            });
        let blocks = blocks.collect::<Vec<_>>();
        (out, blocks.into_iter().flatten().collect())
    }

    fn forward_block(
        &self,
        all: &Views,
        panels: &[Panels],
        index: usize,
        input: &[f32],
        out: &mut [f32],
        keep: bool,
    ) -> Block {
        let Plan { channels: c, map_channels: m, hidden, .. } = *self.plan;
        let views = self.views(all, index);
        let first = index * all.images;
        let rows = views.rows();
        let mut x = self.take(rows * c);
        let mut map = (m > 0).then(|| self.take(rows * m));
        for (row, input) in input.chunks_exact(c + m).enumerate() {
            x[row * c..][..c].copy_from_slice(&input[..c]);
            if let Some(map) = &mut map {
                map[row * m..][..m].copy_from_slice(&input[c..]);
            }
        }
        let mut layers = Vec::new();
        for (index, (layer, panels)) in self.plan.layers.iter().zip(panels).enumerate() {
            if let (Some(part), Some(panels), Some(map)) = (&layer.map, &panels.map, &map) {
                let finish = self.biased(part);
                product(&[views.own_map.rows_of(map)], panels, finish, true, &mut x);
            }
            let mut normed = self.take(rows * c);
            self.norm(&x, (index, ATTENTION), first, &mut normed);
            let parts = [&layer.query, &layer.key, &layer.value];
            let mut parts = parts.into_iter().zip(&panels.projections);
            let mut project = || {
                let mut to = self.take(rows * c);
                if let Some((part, panels)) = parts.next() {
                    let finish = self.biased(part);
                    multiply(&[views.own.rows_of(&normed)], panels, finish, &mut to);
                }
                to
            };
            let (query, key, value) = (project(), project(), project());
            let mut read = self.take(rows * c);
            self.attention(&query, &key, &value, &mut read);
            let between = self.add_to(
                &x,
                (&layer.output, &panels.output),
                views.own.rows_of(&read),
                (index, ATTENTION),
                first,
            );
            let mut mlp_normed = self.take(rows * c);
            self.norm(&between, (index, MLP), first, &mut mlp_normed);
            let mut both = self.take(rows * 2 * hidden);
            let finish = self.biased(&layer.mlp_in);
            multiply(&[views.own.rows_of(&mlp_normed)], &panels.mlp_in, finish, &mut both);
            let mut gated = self.take(rows * hidden);
            vectorized(
                #[inline(always)]
                || {
                    let rows = gated.chunks_exact_mut(hidden).zip(both.chunks_exact(2 * hidden));
                    for (to, x) in rows {
                        swiglu_row(x, to);
                    }
                },
            );
            let next = self.add_to(
                &between,
                (&layer.mlp_out, &panels.mlp_out),
                views.own_hidden.rows_of(&gated),
                (index, MLP),
                first,
            );
            let x = std::mem::replace(&mut x, next);
            if keep {
                let hidden = gated;
                layers.push(BlockLayer {
                    x,
                    normed,
                    query,
                    key,
                    value,
                    read,
                    between,
                    mlp_normed,
                    both,
                    hidden,
                });
            }
        }
        out.copy_from_slice(&x);
        Block { layers, map }
    }

    /// `x` + what is left by dropout of the product with a part.
    fn add_to(
        &self,
        x: &[f32],
        (part, panels): (&Part, &[f32]),
        source: Rows<'_>,
        place: Place,
        first: usize,
    ) -> Buffer {
        let mut to = self.take(x.len());
        match self.mask(place) {
            None => {
                let finish = Finish { residual: Some(x), ..self.biased(part) };
                multiply(&[source], panels, finish, &mut to);
            }
            Some(mask) => {
                multiply(&[source], panels, self.biased(part), &mut to);
                vectorized(
                    #[inline(always)]
                    || {
                        mask.apply(&mut to, first * self.plan.positions * self.plan.channels);
                        for (to, x) in to.iter_mut().zip(x) {
                            *to += x;
                        }
                    },
                );
            }
        }
        to
    }

    /// The gradients of everything, given that of the output `[B,T,C]`.
    pub(crate) fn backward(&self, blocks: &[Block], grad: &[f32], of_theta: bool) -> Gradients {
        let Plan { batch, channels, map_channels, positions, .. } = *self.plan;
        let all = Views::new(self.plan, self.plan.block_images());
        let panels: Vec<GradientPanels> =
            self.plan.layers.par_iter().map(|layer| self.gradient_panels(&all, layer)).collect();
        let rows = positions * all.images;
        let width = self.vectors().width();
        let mut input = vec![0.; self.plan.rows() * (channels + map_channels)];
        let mut vectors = vec![0.; batch * width];
        let gradients: Vec<Vec<BlockGradients>> = input
            .par_chunks_mut(rows * (channels + map_channels))
            .zip(vectors.par_chunks_mut(all.images * width))
            .zip(grad.par_chunks(rows * channels))
            .zip(blocks)
            .enumerate()
            .map(|(index, (((input, vectors), grad), block))| {
                self.backward_block(&all, &panels, index, block, grad, (input, vectors))
            })
            .collect();
        let theta = of_theta.then(|| self.parameter_gradients(&all, blocks, &gradients));
        let vectors = self.vectors().shared(vectors);
        Gradients { input, vectors, theta }
    }

    fn backward_block(
        &self,
        all: &Views,
        panels: &[GradientPanels],
        number: usize,
        block: &Block,
        grad: &[f32],
        (input, vectors): (&mut [f32], &mut [f32]),
    ) -> Vec<BlockGradients> {
        let Plan { channels: c, map_channels: m, hidden, .. } = *self.plan;
        let views = self.views(all, number);
        let first = number * all.images;
        let rows = views.rows();
        let plain = Finish::default();
        let mut of_map = (m > 0).then(|| self.take(rows * m));
        let mut of_x = self.take(rows * c);
        of_x.copy_from_slice(grad);
        let mut gradients = Vec::with_capacity(panels.len());
        for (index, (layer, panels)) in block.layers.iter().zip(panels).enumerate().rev() {
            let of_mlp_out = self.dropped(&of_x, (index, MLP), first);
            let mut of_hidden = self.take(rows * hidden);
            let sources = [views.own.rows_of(&of_mlp_out)];
            multiply(&sources, &panels.hidden, plain, &mut of_hidden);
            let mut of_both = self.take(rows * 2 * hidden);
            vectorized(
                #[inline(always)]
                || {
                    let rows = of_both.chunks_exact_mut(2 * hidden);
                    let rows = rows.zip(layer.both.chunks_exact(2 * hidden));
                    for ((to, x), grad) in rows.zip(of_hidden.chunks_exact(hidden)) {
                        swiglu_row_gradient(x, grad, to);
                    }
                },
            );
            let mut of_normed = self.take(rows * c);
            let sources = [views.own_both.rows_of(&of_both)];
            multiply(&sources, &panels.mlp_normed, plain, &mut of_normed);
            let mut of_between = self.take(rows * c);
            let place = (index, MLP);
            self.norm_gradient(&layer.between, place, first, &of_normed, &mut of_between, vectors);
            add(&mut of_between, &of_x);

            let of_output = self.dropped(&of_between, (index, ATTENTION), first);
            let mut of_read = self.take(rows * c);
            multiply(&[views.own.rows_of(&of_output)], &panels.read, plain, &mut of_read);
            let of_projections = self.attention_gradient(layer, &of_read);
            let sources = [0, 1, 2].map(|i| views.own.rows_of(&of_projections[i]));
            multiply(&sources, &panels.normed, plain, &mut of_normed);
            let mut of_input = self.take(rows * c);
            let place = (index, ATTENTION);
            self.norm_gradient(&layer.x, place, first, &of_normed, &mut of_input, vectors);
            add(&mut of_input, &of_between);
            if let (Some(of_map), Some(panels)) = (&mut of_map, &panels.map) {
                let accumulate = index + 1 < block.layers.len();
                product(&[views.own.rows_of(&of_input)], panels, plain, accumulate, of_map);
            }
            let of_layer = of_map.is_some().then(|| {
                let mut of_layer = self.take(rows * c);
                of_layer.copy_from_slice(&of_input);
                of_layer
            });
            of_x = of_input;
            gradients.push(BlockGradients {
                mlp_out: of_mlp_out,
                both: of_both,
                output: of_output,
                projections: of_projections,
                x: of_layer,
            });
        }
        for (row, input) in input.chunks_exact_mut(c + m).enumerate() {
            input[..c].copy_from_slice(&of_x[row * c..][..c]);
            if let Some(of_map) = &of_map {
                input[c..].copy_from_slice(&of_map[row * m..][..m]);
            }
        }
        gradients.reverse();
        gradients
    }

    fn parameter_gradients(
        &self,
        all: &Views,
        blocks: &[Block],
        gradients: &[Vec<BlockGradients>],
    ) -> Vec<f32> {
        let last = self.views(all, blocks.len().saturating_sub(1));
        let mut parts = Vec::new();
        for (index, layer) in self.plan.layers.iter().enumerate() {
            for part in layer.parts() {
                let of_block = |number: usize| {
                    let views = if number + 1 == blocks.len() { &last } else { all };
                    let block = &blocks[number];
                    let (saved, of) = (&block.layers[index], &gradients[number][index]);
                    let is = |other: &Part| std::ptr::eq(part, other);
                    let [query, key, value] = &of.projections;
                    let (large, small) = if is(&layer.query) {
                        (views.own.rows_of(&saved.normed), query)
                    } else if is(&layer.key) {
                        (views.own.rows_of(&saved.normed), key)
                    } else if is(&layer.value) {
                        (views.own.rows_of(&saved.normed), value)
                    } else if is(&layer.output) {
                        (views.own.rows_of(&saved.read), &of.output)
                    } else if is(&layer.mlp_in) {
                        (views.own.rows_of(&saved.mlp_normed), &of.both)
                    } else if is(&layer.mlp_out) {
                        (views.own_hidden.rows_of(&saved.hidden), &of.mlp_out)
                    } else {
                        (views.own_map.rows_of(block.map.as_deref()?), of.x.as_ref()?)
                    };
                    Some(Piece { large, small })
                };
                parts.push((part, (0..blocks.len()).filter_map(of_block).collect()));
            }
        }
        parameter_gradients(&parts, self.theta.len())
    }

    /// What each head reads: `read` `[rows, C]`.
    fn attention(&self, query: &[f32], key: &[f32], value: &[f32], read: &mut [f32]) {
        let (head, mut scratch) = Head::new(self);
        for at in self.heads(read.len()) {
            head.weights(&query[at..], &key[at..], &mut scratch);
            let Scratch { rows, weights, .. } = &mut scratch;
            head.combine(weights, &value[at..], rows, &mut read[at..]);
        }
    }

    /// The gradients of query, key and value.
    fn attention_gradient(&self, layer: &BlockLayer, of_read: &[f32]) -> [Buffer; 3] {
        let mut to = [0, 1, 2].map(|_| self.take(of_read.len()));
        let (head, mut scratch) = Head::new(self);
        for at in self.heads(of_read.len()) {
            let [query, key, value] = [&layer.query, &layer.key, &layer.value].map(|x| &x[at..]);
            head.weights(query, key, &mut scratch);
            let to = to.each_mut().map(|to| &mut to[at..]);
            head.gradients([query, key, value], &of_read[at..], to, &mut scratch);
        }
        to
    }

    /// Where each head of each image begins in `[rows, C]` of that length.
    fn heads(&self, length: usize) -> impl Iterator<Item = usize> + use<> {
        let Plan { positions, channels, heads, .. } = *self.plan;
        let images = length / (positions * channels);
        let first = move |image| image * positions * channels;
        (0..images)
            .flat_map(move |image| (0..heads).map(move |h| first(image) + h * channels / heads))
    }

    /// The norms of a block's rows; `first` is the number of its first image.
    fn norm(&self, x: &[f32], place: Place, first: usize, to: &mut [f32]) {
        let (c, vectors) = (self.plan.channels, self.vectors());
        let size = self.plan.positions * c;
        let images = to.chunks_exact_mut(size).zip(x.chunks_exact(size));
        for (image, (to, x)) in images.enumerate() {
            let halves = vectors.halves(place, first + image);
            vectorized(
                #[inline(always)]
                || {
                    for (to, x) in to.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                        norm_row(x, halves, self.plan.epsilon, to);
                    }
                },
            );
        }
    }

    fn norm_gradient(
        &self,
        x: &[f32],
        place: Place,
        first: usize,
        grad: &[f32],
        to: &mut [f32],
        of_vectors: &mut [f32],
    ) {
        let (c, vectors) = (self.plan.channels, self.vectors());
        let size = self.plan.positions * c;
        let width = vectors.width();
        let images = to
            .chunks_exact_mut(size)
            .zip(of_vectors.chunks_exact_mut(width))
            .zip(x.chunks_exact(size))
            .zip(grad.chunks_exact(size));
        for (image, (((to, of_vectors), x), grad)) in images.enumerate() {
            let (gain, _) = vectors.halves(place, first + image);
            let sums = &mut of_vectors[vectors.offset(place)..][..2 * c];
            let (of_gain, of_shift) = sums.split_at_mut(c);
            vectorized(
                #[inline(always)]
                || {
                    let rows = to.chunks_exact_mut(c).zip(x.chunks_exact(c));
                    for ((to, x), grad) in rows.zip(grad.chunks_exact(c)) {
                        let sums = (&mut *of_gain, &mut *of_shift);
                        norm_row_gradient(x, gain, self.plan.epsilon, grad, to, sums);
                    }
                },
            );
        }
    }

    fn vectors(&self) -> Vectors<'_> {
        let Plan { channels, own_vectors: own, .. } = *self.plan;
        Vectors { values: self.vectors, channels, layers: self.plan.layers.len(), own }
    }

    fn mask(&self, (layer, which): Place) -> Option<Mask> {
        Some(self.plan.masks.as_ref()?[layer][which])
    }

    /// A copy of the gradient behind a dropout.
    fn dropped(&self, grad: &[f32], place: Place, first: usize) -> Buffer {
        let mut to = self.take(grad.len());
        to.copy_from_slice(grad);
        if let Some(mask) = self.mask(place) {
            let first = first * self.plan.positions * self.plan.channels;
            vectorized(
                #[inline(always)]
                || mask.apply(&mut to, first),
            );
        }
        to
    }

    fn biased(&self, part: &Part) -> Finish<'_> {
        Finish { bias: Some(&self.theta[part.bias.clone()]), ..Finish::default() }
    }

    /// The views of block number `index`: the last one may have fewer images.
    fn views(&self, all: &Views, index: usize) -> Views {
        Views::new(self.plan, all.images.min(self.plan.batch - index * all.images))
    }

    /// A buffer whose content is whatever it was.
    fn take(&self, length: usize) -> Buffer {
        self.buffers.take(length)
    }

    fn panels(&self, views: &Views, layer: &Layer) -> Panels {
        let one = &views.own.taps[..];
        let panels =
            |part: &Part| pack(&[part.matrix(self.theta, DepthAxis::Inner, one)], self.buffers);
        Panels {
            map: layer.map.as_ref().map(panels),
            projections: [&layer.query, &layer.key, &layer.value].map(panels),
            output: panels(&layer.output),
            mlp_in: panels(&layer.mlp_in),
            mlp_out: panels(&layer.mlp_out),
        }
    }

    fn gradient_panels(&self, views: &Views, layer: &Layer) -> GradientPanels {
        let one = &views.own.taps[..];
        let panels = |parts: &[&Part]| {
            let matrix = |part: &&Part| part.matrix(self.theta, DepthAxis::Outer, one);
            pack(&parts.iter().map(matrix).collect::<Vec<_>>(), self.buffers)
        };
        GradientPanels {
            map: layer.map.as_ref().map(|map| panels(&[map])),
            normed: panels(&[&layer.query, &layer.key, &layer.value]),
            read: panels(&[&layer.output]),
            mlp_normed: panels(&[&layer.mlp_in]),
            hidden: panels(&[&layer.mlp_out]),
        }
    }
}

impl Layer {
    /// In the order in which they lie.
    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.map.iter().chain([
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.mlp_in,
            &self.mlp_out,
        ])
    }
}

fn add(to: &mut [f32], values: &[f32]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

/// One head of one image, causally. Its vectors lie `step` apart.
struct Head<'a> {
    buffers: &'a Buffers,
    /// T and D.
    positions: usize,
    size: usize,
    step: usize,
    scale: f32,
    /// T rows of D and of T numbers.
    vectors: Patches,
    scores: Patches,
}

/// What a head computes with.
struct Scratch {
    /// `[T, D]`: a factor, or a product.
    rows: Buffer,
    /// `[T, T]`: the weights, and something like them.
    weights: Buffer,
    other: Buffer,
}

impl<'a> Head<'a> {
    fn new(pass: &Pass<'a, Plan>) -> (Self, Scratch) {
        let Plan { positions, channels, heads, .. } = *pass.plan;
        let size = channels / heads;
        let own = |channels| own_pixel(1, (1, positions), channels);
        let take = |columns: usize| pass.take(positions * columns);
        let scratch =
            Scratch { rows: take(size), weights: take(positions), other: take(positions) };
        let (vectors, scores) = (own(size), own(positions));
        let (buffers, scale) = (pass.buffers, pass.plan.scale());
        (Self { buffers, positions, size, step: channels, scale, vectors, scores }, scratch)
    }

    /// Softmax of the scaled products of queries and keys, into the weights.
    fn weights(&self, query: &[f32], key: &[f32], scratch: &mut Scratch) {
        let t = self.positions;
        let Scratch { rows, weights, other: scores } = scratch;
        self.products(query, key, rows, scores);
        vectorized(
            #[inline(always)]
            || {
                let rows = weights.chunks_exact_mut(t).zip(scores.chunks_exact(t));
                for (row, (weights, scores)) in rows.enumerate() {
                    let (seen, hidden) = weights.split_at_mut(row + 1);
                    softmax(&scores[..=row], self.scale, seen);
                    hidden.fill(0.);
                }
            },
        );
    }

    /// Of query, key and value, from that of what was read with these weights, which are lost.
    fn gradients(
        &self,
        [query, key, value]: [&[f32]; 3],
        of_read: &[f32],
        [of_query, of_key, of_value]: [&mut [f32]; 3],
        scratch: &mut Scratch,
    ) {
        let t = self.positions;
        let Scratch { rows, weights, other } = scratch;
        transpose(weights, other, t);
        self.combine(other, of_read, rows, of_value);
        self.products(of_read, value, rows, other);
        vectorized(
            #[inline(always)]
            || {
                // The gradients of the scores take the weights' place.
                let mut of_scores = vec![0.; t];
                let rows = weights.chunks_exact_mut(t).zip(other.chunks_exact(t));
                for (row, (weights, grad)) in rows.enumerate() {
                    let of_scores = &mut of_scores[..=row];
                    softmax_gradient(&weights[..=row], self.scale, &grad[..=row], of_scores);
                    weights[..=row].copy_from_slice(of_scores);
                }
            },
        );
        self.combine(weights, key, rows, of_query);
        transpose(weights, other, t);
        self.combine(other, query, rows, of_key);
    }

    /// `to` `[T, T]`: the products of every row of `a` with every row of `b`.
    fn products(&self, a: &[f32], b: &[f32], rows: &mut [f32], to: &mut [f32]) {
        let (channels, columns) = (self.size, self.positions);
        let axes = Axes { channels, columns, channel_step: 1, column_step: self.step };
        let panels = pack(&[Matrix { weight: b, axes, taps: &self.vectors.taps }], self.buffers);
        for (to, from) in rows.chunks_exact_mut(self.size).zip(a.chunks(self.step)) {
            to.copy_from_slice(&from[..self.size]);
        }
        multiply(&[self.vectors.rows_of(rows)], &panels, Finish::default(), to);
    }

    /// `to` = `weights` `[T, T]` × the rows of `b`.
    fn combine(&self, weights: &[f32], b: &[f32], rows: &mut [f32], to: &mut [f32]) {
        let (channels, columns) = (self.positions, self.size);
        let axes = Axes { channels, columns, channel_step: self.step, column_step: 1 };
        let panels = pack(&[Matrix { weight: b, axes, taps: &self.scores.taps }], self.buffers);
        multiply(&[self.scores.rows_of(weights)], &panels, Finish::default(), rows);
        for (to, from) in to.chunks_mut(self.step).zip(rows.chunks_exact(self.size)) {
            to[..self.size].copy_from_slice(from);
        }
    }
}

/// `[T, T]` the other way round.
fn transpose(from: &[f32], to: &mut [f32], t: usize) {
    for (row, values) in from.chunks_exact(t).enumerate() {
        for (column, value) in values.iter().enumerate() {
            to[column * t + row] = *value;
        }
    }
}

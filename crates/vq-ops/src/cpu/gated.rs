//! The gated layers of a PixelCNN, forwards and backwards.
//!
//! A task takes a few images through all layers, so that what lies between the layers stays in its core's
//! cache; only what the weights' gradients are summed over goes back to memory. Those are taken afterwards, a
//! task for some columns of one weight, over all images in order.

use rayon::prelude::*;

use super::blocks::{
    Gradients, Part, Pass, Place, Vectors, block_images, multiply, own_pixel, pack,
    parameter_gradients, product, sum_of_biases,
};
use super::buffers::Buffer;
use super::conv::{Finish, Rows};
use super::pack::{DepthAxis, Images, Matrix, Patches, Tap};
use super::weight_gradient::Piece;
use crate::dropout::Mask;
use crate::gate::{gate_row, gate_row_gradient};
use crate::math::vectorized;

/// What is asked for: the sizes and where the parameters lie.
#[derive(Debug)]
pub(crate) struct Plan {
    pub batch: usize,
    pub grid: (usize, usize),
    /// C.
    pub channels: usize,
    /// S.
    pub skip_channels: usize,
    /// M, or 0.
    pub map_channels: usize,
    pub layers: Vec<Layer>,
    /// Whether each image has vectors of its own.
    pub own_vectors: bool,
    /// After each layer's gates: vertical, horizontal.
    pub masks: Option<Vec<[Mask; 2]>>,
}

/// The parameters of one layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub vertical: Part,
    pub horizontal: Part,
    pub link: Part,
    pub residual: Option<Part>,
    pub skip: Part,
    pub map: Option<Part>,
}

impl Layer {
    /// In the order in which they lie.
    fn parts(&self) -> impl Iterator<Item = &Part> {
        [&self.vertical, &self.horizontal, &self.link]
            .into_iter()
            .chain(&self.residual)
            .chain([&self.skip])
            .chain(&self.map)
    }
}

/// How the rows of a block of images are read.
struct Views {
    images: usize,
    layers: Vec<LayerViews>,
    /// C, 2C, S and M channels of the pixel itself.
    own: Patches,
    own_both: Patches,
    own_skip: Patches,
    own_map: Patches,
}

struct LayerViews {
    vertical: Patches,
    horizontal: Patches,
    of_vertical: Patches,
    of_horizontal: Patches,
}

impl Views {
    fn new(plan: &Plan, images: usize) -> Self {
        let (height, width) = plan.grid;
        let view = |channels: usize, taps: Vec<Tap>| {
            let images = Images { batch: images, height, width, channels };
            Patches::new(images, plan.grid, 1, taps, false)
        };
        let own = |channels: usize| own_pixel(images, plan.grid, channels);
        let c = plan.channels;
        let layer = |Layer { vertical, horizontal, .. }: &Layer| {
            // The vertical kernel is centred, the horizontal one looks back.
            let (centre, end) = (vertical.kernel[1] / 2, horizontal.kernel[1] - 1);
            LayerViews {
                vertical: view(c, vertical.taps(centre, false)),
                horizontal: view(c, horizontal.taps(end, false)),
                of_vertical: view(2 * c, vertical.taps(centre, true)),
                of_horizontal: view(2 * c, horizontal.taps(end, true)),
            }
        };
        Self {
            images,
            layers: plan.layers.iter().map(layer).collect(),
            own: own(c),
            own_both: own(2 * c),
            own_skip: own(plan.skip_channels),
            own_map: own(plan.map_channels),
        }
    }

    fn rows(&self) -> usize {
        self.own.rows()
    }
}

/// The weights of a layer as the passes take them.
struct Panels {
    before: Buffer,
    both: Buffer,
    residual: Option<Buffer>,
}

struct GradientPanels {
    gated: Buffer,
    before: Buffer,
    horizontal: Buffer,
    vertical: Buffer,
    map: Option<Buffer>,
}

/// What a block of images leaves behind for its gradients.
pub(crate) struct Block {
    layers: Vec<BlockLayer>,
    map: Option<Buffer>,
}

struct BlockLayer {
    /// Inputs of the stacks, `[rows, C]`.
    vertical: Buffer,
    horizontal: Buffer,
    /// Before the gates of the two, `[rows, 2C]`.
    before: Buffer,
    both: Buffer,
    /// The horizontal stack's after its gate and dropout, `[rows, C]`.
    gated: Buffer,
}

/// The gradients of a block's layer that its weights' gradients need.
struct BlockGradients {
    before: Buffer,
    both: Buffer,
    /// Of the horizontal stack's output.
    output: Option<Buffer>,
}

/// The vectors are `[B or 1, L, 4C]`: what is added before the vertical gate, then before the horizontal one.
impl Pass<'_, Plan> {
    /// `x` `[B,h,w,C+M]` → `[B,h,w,S]`, and what [`backward`](Self::backward) needs if it is to follow.
    pub(crate) fn forward(&self, x: &[f32], keep: bool) -> (Vec<f32>, Vec<Block>) {
        let Plan { skip_channels, channels, map_channels, .. } = *self.plan;
        let mut skips = vec![0.; self.plan.rows() * skip_channels];
        let all = Views::new(self.plan, self.plan.block_images());
        let panels: Vec<Panels> =
            (0..self.plan.layers.len()).into_par_iter().map(|l| self.panels(&all, l)).collect();
        let (skip_panels, skip_bias) = self.skip_panels(&all);
        let pixels = self.plan.pixels() * self.plan.block_images();
        let blocks = x
            .par_chunks(pixels * (channels + map_channels))
            .zip(skips.par_chunks_mut(pixels * skip_channels))
            .enumerate()
            .map(|(index, (x, skips))| {
                let views = self.views(&all, index);
                let first = index * all.images;
                let block = self.forward_block(&views, &panels, first, x);
                let sources: Vec<Rows<'_>> =
                    block.layers.iter().map(|layer| views.own.rows_of(&layer.gated)).collect();
                let finish = Finish { bias: Some(&skip_bias), ..Finish::default() };
                multiply(&sources, &skip_panels, finish, skips);
                keep.then_some(block)
            });
        let blocks = blocks.collect::<Vec<_>>();
        (skips, blocks.into_iter().flatten().collect())
    }

    fn forward_block(&self, views: &Views, panels: &[Panels], first: usize, x: &[f32]) -> Block {
        let Plan { channels, map_channels, .. } = *self.plan;
        let rows = views.rows();
        let (mut vertical, mut horizontal) =
            (self.take(rows * channels), self.take(rows * channels));
        let mut map = (map_channels > 0).then(|| self.take(rows * map_channels));
        self.enter(x, &mut vertical, &mut horizontal, map.as_deref_mut());
        let mut inputs = Some((vertical, horizontal));
        let mut layers = Vec::with_capacity(panels.len());
        for (index, (layer, panels)) in self.plan.layers.iter().zip(panels).enumerate() {
            let Some((vertical, horizontal)) = inputs.take() else { break };
            let own = &views.layers[index];
            let mut before = self.take(rows * 2 * channels);
            let mut sources = vec![own.vertical.rows_of(&vertical)];
            sources.extend(map.as_ref().map(|map| views.own_map.rows_of(map)));
            let bias = self.sum_of_biases([&layer.vertical].into_iter().chain(&layer.map));
            let finish = Finish { bias: Some(&bias), ..Finish::default() };
            multiply(&sources, &panels.before, finish, &mut before);

            let mut both = self.take(rows * 2 * channels);
            let sources = [own.horizontal.rows_of(&horizontal), views.own_both.rows_of(&before)];
            let bias = self.sum_of_biases([&layer.horizontal, &layer.link]);
            let finish = Finish { bias: Some(&bias), ..Finish::default() };
            multiply(&sources, &panels.both, finish, &mut both);

            let mut gated = self.take(rows * channels);
            self.gate(&both, (index, HORIZONTAL), first, &mut gated);
            if let (Some(residual), Some(panels)) = (&layer.residual, &panels.residual) {
                let mut next_vertical = self.take(rows * channels);
                self.gate(&before, (index, VERTICAL), first, &mut next_vertical);
                let mut next_horizontal = self.take(rows * channels);
                let bias = Some(&self.theta[residual.bias.clone()]);
                let finish = Finish { bias, mask: None, residual: Some(&*horizontal) };
                let sources = [views.own.rows_of(&gated)];
                multiply(&sources, panels, finish, &mut next_horizontal);
                inputs = Some((next_vertical, next_horizontal));
            }
            layers.push(BlockLayer { vertical, horizontal, before, both, gated });
        }
        Block { layers, map }
    }

    /// The gradients of everything, given that of the output `[B,h,w,S]`.
    pub(crate) fn backward(&self, blocks: &[Block], grad: &[f32], of_theta: bool) -> Gradients {
        let Plan { batch, channels, skip_channels, map_channels, .. } = *self.plan;
        let all = Views::new(self.plan, self.plan.block_images());
        let panels: Vec<GradientPanels> = (0..self.plan.layers.len())
            .into_par_iter()
            .map(|l| self.gradient_panels(&all, l))
            .collect();
        let images = self.plan.block_images();
        let pixels = self.plan.pixels() * images;
        let width = self.vectors().width();
        let mut input = vec![0.; self.plan.rows() * (channels + map_channels)];
        let mut vectors = vec![0.; batch * width];
        let gradients: Vec<Vec<BlockGradients>> = input
            .par_chunks_mut(pixels * (channels + map_channels))
            .zip(vectors.par_chunks_mut(images * width))
            .zip(grad.par_chunks(pixels * skip_channels))
            .zip(blocks)
            .enumerate()
            .map(|(index, (((input, vectors), grad), block))| {
                let views = self.views(&all, index);
                self.backward_block(&views, &panels, index * images, block, grad, input, vectors)
            })
            .collect();
        let theta = of_theta.then(|| self.parameter_gradients(&all, blocks, &gradients, grad));
        let vectors = self.vectors().shared(vectors);
        Gradients { input, vectors, theta }
    }

    #[allow(clippy::too_many_arguments)]
    fn backward_block(
        &self,
        views: &Views,
        panels: &[GradientPanels],
        first: usize,
        block: &Block,
        grad: &[f32],
        input: &mut [f32],
        vectors: &mut [f32],
    ) -> Vec<BlockGradients> {
        let Plan { channels, map_channels, .. } = *self.plan;
        let rows = views.rows();
        let mut of_map = (map_channels > 0).then(|| self.take(rows * map_channels));
        // Of the two stacks' inputs to the layer after this one.
        let mut of_next: Option<(Buffer, Buffer)> = None;
        let mut all = Vec::with_capacity(panels.len());
        for (index, (layer, panels)) in block.layers.iter().zip(panels).enumerate().rev() {
            let own = &views.layers[index];
            let plain = Finish::default();
            let mut of_gated = self.take(rows * channels);
            let mut sources = vec![views.own_skip.rows_of(grad)];
            sources.extend(of_next.as_ref().map(|(_, h)| views.own.rows_of(h)));
            multiply(&sources, &panels.gated, plain, &mut of_gated);

            let mut of_both = self.take(rows * 2 * channels);
            let place = (index, HORIZONTAL);
            self.gate_gradient(&layer.both, place, first, &mut of_gated, &mut of_both, vectors);

            let mut of_before = self.take(rows * 2 * channels);
            let (of_vertical_next, of_output) = of_next.take().unzip();
            let accumulate = of_vertical_next.is_some();
            if let Some(mut of_next) = of_vertical_next {
                let place = (index, VERTICAL);
                let to = &mut of_before;
                self.gate_gradient(&layer.before, place, first, &mut of_next, to, vectors);
            }
            let sources = [views.own_both.rows_of(&of_both)];
            product(&sources, &panels.before, plain, accumulate, &mut of_before);

            let mut of_horizontal = self.take(rows * channels);
            let sources = [own.of_horizontal.rows_of(&of_both)];
            let finish = Finish { residual: of_output.as_deref(), ..plain };
            multiply(&sources, &panels.horizontal, finish, &mut of_horizontal);
            let mut of_vertical = self.take(rows * channels);
            let sources = [own.of_vertical.rows_of(&of_before)];
            multiply(&sources, &panels.vertical, plain, &mut of_vertical);
            if let (Some(of_map), Some(panels)) = (&mut of_map, &panels.map) {
                let sources = [views.own_both.rows_of(&of_before)];
                let accumulate = index + 1 < block.layers.len();
                product(&sources, panels, plain, accumulate, of_map);
            }
            all.push(BlockGradients { before: of_before, both: of_both, output: of_output });
            of_next = Some((of_vertical, of_horizontal));
        }
        if let Some((vertical, horizontal)) = of_next {
            self.leave(&vertical, &horizontal, of_map.as_deref(), input);
        }
        all.reverse();
        all
    }

    /// The gradients of all parameters, in the order in which they lie.
    fn parameter_gradients(
        &self,
        all: &Views,
        blocks: &[Block],
        gradients: &[Vec<BlockGradients>],
        grad: &[f32],
    ) -> Vec<f32> {
        let skip_channels = self.plan.skip_channels;
        let last = self.views(all, blocks.len().saturating_sub(1));
        let skip_len = self.plan.pixels() * all.images * skip_channels;
        let mut parts = Vec::new();
        for (index, layer) in self.plan.layers.iter().enumerate() {
            for part in layer.parts() {
                let of_block = |number: usize| {
                    let views = if number + 1 == blocks.len() { &last } else { all };
                    let block = &blocks[number];
                    let (saved, of) = (&block.layers[index], &gradients[number][index]);
                    let own = &views.layers[index];
                    let is = |other: &Part| std::ptr::eq(part, other);
                    let (large, small) = if is(&layer.vertical) {
                        (own.vertical.rows_of(&saved.vertical), &of.before[..])
                    } else if is(&layer.horizontal) {
                        (own.horizontal.rows_of(&saved.horizontal), &of.both[..])
                    } else if is(&layer.link) {
                        (views.own_both.rows_of(&saved.before), &of.both[..])
                    } else if is(&layer.skip) {
                        let grad = &grad[number * skip_len..][..views.rows() * skip_channels];
                        (views.own.rows_of(&saved.gated), grad)
                    } else if layer.residual.as_ref().is_some_and(is) {
                        (views.own.rows_of(&saved.gated), of.output.as_deref()?)
                    } else {
                        (views.own_map.rows_of(block.map.as_deref()?), &of.before[..])
                    };
                    Some(Piece { large, small })
                };
                parts.push((part, (0..blocks.len()).filter_map(of_block).collect()));
            }
        }
        parameter_gradients(&parts, self.theta.len())
    }

    /// The views for block number `index`: the last one may have fewer images.
    fn views(&self, all: &Views, index: usize) -> Views {
        Views::new(self.plan, all.images.min(self.plan.batch - index * all.images))
    }

    /// A buffer whose content is whatever it was.
    fn take(&self, length: usize) -> Buffer {
        self.buffers.take(length)
    }

    fn pack(&self, matrices: &[Matrix<'_>]) -> Buffer {
        pack(matrices, self.buffers)
    }

    fn panels(&self, views: &Views, index: usize) -> Panels {
        use DepthAxis::Inner;
        let (layer, own) = (&self.plan.layers[index], &views.layers[index]);
        let one = &views.own.taps[..];
        let mut before = vec![layer.vertical.matrix(self.theta, Inner, &own.vertical.taps)];
        before.extend(layer.map.as_ref().map(|map| map.matrix(self.theta, Inner, one)));
        let horizontal = layer.horizontal.matrix(self.theta, Inner, &own.horizontal.taps);
        Panels {
            before: self.pack(&before),
            both: self.pack(&[horizontal, layer.link.matrix(self.theta, Inner, one)]),
            residual: layer
                .residual
                .as_ref()
                .map(|part| self.pack(&[part.matrix(self.theta, Inner, one)])),
        }
    }

    fn gradient_panels(&self, views: &Views, index: usize) -> GradientPanels {
        use DepthAxis::Outer;
        let (layer, own) = (&self.plan.layers[index], &views.layers[index]);
        let one = &views.own.taps[..];
        let mut of_gated = vec![layer.skip.matrix(self.theta, Outer, one)];
        of_gated.extend(layer.residual.as_ref().map(|part| part.matrix(self.theta, Outer, one)));
        let vertical = layer.vertical.matrix(self.theta, Outer, &own.of_vertical.taps);
        let horizontal = layer.horizontal.matrix(self.theta, Outer, &own.of_horizontal.taps);
        GradientPanels {
            gated: self.pack(&of_gated),
            before: self.pack(&[layer.link.matrix(self.theta, Outer, one)]),
            horizontal: self.pack(&[horizontal]),
            vertical: self.pack(&[vertical]),
            map: layer.map.as_ref().map(|map| self.pack(&[map.matrix(self.theta, Outer, one)])),
        }
    }

    /// All layers' skip connections as one product, and the sum of their biases.
    fn skip_panels(&self, views: &Views) -> (Buffer, Vec<f32>) {
        let layers = &self.plan.layers;
        let one = &views.own.taps[..];
        let matrix = |layer: &Layer| layer.skip.matrix(self.theta, DepthAxis::Inner, one);
        let matrices: Vec<Matrix<'_>> = layers.iter().map(matrix).collect();
        (self.pack(&matrices), self.sum_of_biases(layers.iter().map(|layer| &layer.skip)))
    }

    fn sum_of_biases<'p>(&self, parts: impl IntoIterator<Item = &'p Part>) -> Vec<f32> {
        sum_of_biases(parts, self.theta)
    }

    /// The embedded codes as the first layer takes them: one row further down for the vertical stack, one
    /// column further right for the horizontal one.
    fn enter(
        &self,
        x: &[f32],
        vertical: &mut [f32],
        horizontal: &mut [f32],
        mut map: Option<&mut [f32]>,
    ) {
        let Plan { channels: c, map_channels: m, .. } = *self.plan;
        let (width, pixels) = (self.plan.grid.1, self.plan.pixels());
        for (pixel, x) in x.chunks_exact(c + m).enumerate() {
            let (codes, conditions) = x.split_at(c);
            let (image, place) = (pixel / pixels, pixel % pixels);
            if place < width {
                vertical[(image * pixels + place) * c..][..c].fill(0.);
            }
            if place + width < pixels {
                vertical[(pixel + width) * c..][..c].copy_from_slice(codes);
            }
            if place.is_multiple_of(width) {
                horizontal[pixel * c..][..c].fill(0.);
            }
            if !(place + 1).is_multiple_of(width) {
                horizontal[(pixel + 1) * c..][..c].copy_from_slice(codes);
            }
            if let Some(map) = &mut map {
                map[pixel * m..][..m].copy_from_slice(conditions);
            }
        }
    }

    /// The way back of [`enter`](Self::enter).
    fn leave(&self, vertical: &[f32], horizontal: &[f32], map: Option<&[f32]>, x: &mut [f32]) {
        let Plan { channels: c, map_channels: m, .. } = *self.plan;
        let (width, pixels) = (self.plan.grid.1, self.plan.pixels());
        for (pixel, x) in x.chunks_exact_mut(c + m).enumerate() {
            let (codes, conditions) = x.split_at_mut(c);
            let place = pixel % pixels;
            codes.fill(0.);
            if place + width < pixels {
                codes.copy_from_slice(&vertical[(pixel + width) * c..][..c]);
            }
            if !(place + 1).is_multiple_of(width) {
                for (to, value) in codes.iter_mut().zip(&horizontal[(pixel + 1) * c..][..c]) {
                    *to += value;
                }
            }
            if let Some(map) = map {
                conditions.copy_from_slice(&map[pixel * m..][..m]);
            }
        }
    }

    fn vectors(&self) -> Vectors<'_> {
        let Plan { channels, own_vectors: own, .. } = *self.plan;
        Vectors { values: self.vectors, channels, layers: self.plan.layers.len(), own }
    }

    fn mask(&self, (layer, gate): Place) -> Option<Mask> {
        Some(self.plan.masks.as_ref()?[layer][gate])
    }

    /// A gate and what is dropped after it; `first` is the number of the block's first image.
    fn gate(&self, x: &[f32], place: Place, first: usize, out: &mut [f32]) {
        let (c, vectors) = (self.plan.channels, self.vectors());
        let size = self.plan.pixels() * c;
        let mask = self.mask(place);
        let images = out.chunks_exact_mut(size).zip(x.chunks_exact(2 * size));
        for (image, (out, x)) in images.enumerate() {
            let (s_a, s_b) = vectors.halves(place, first + image);
            vectorized(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
                        gate_row(x, s_a, s_b, out);
                    }
                    if let Some(mask) = mask {
                        mask.apply(out, (first + image) * size);
                    }
                },
            );
        }
    }

    /// The gradient of [`gate`](Self::gate): of what went in, and added up of the block's vectors; `grad` is
    /// changed.
    fn gate_gradient(
        &self,
        x: &[f32],
        place: Place,
        first: usize,
        grad: &mut [f32],
        of_x: &mut [f32],
        of_vectors: &mut [f32],
    ) {
        let (c, vectors) = (self.plan.channels, self.vectors());
        let size = self.plan.pixels() * c;
        let mask = self.mask(place);
        let width = vectors.width();
        let images = of_x
            .chunks_exact_mut(2 * size)
            .zip(of_vectors.chunks_exact_mut(width))
            .zip(x.chunks_exact(2 * size))
            .zip(grad.chunks_exact_mut(size));
        for (image, (((of_x, of_vectors), x), grad)) in images.enumerate() {
            let vector = vectors.halves(place, first + image);
            let sums = &mut of_vectors[vectors.offset(place)..][..2 * c];
            vectorized(
                #[inline(always)]
                || {
                    if let Some(mask) = mask {
                        mask.apply(grad, (first + image) * size);
                    }
                    let rows = of_x.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c));
                    for ((of_x, x), grad) in rows.zip(grad.chunks_exact(c)) {
                        gate_row_gradient(x, vector, grad, of_x);
                        for (sum, value) in sums.iter_mut().zip(of_x) {
                            *sum += *value;
                        }
                    }
                },
            );
        }
    }
}

const VERTICAL: usize = 0;
const HORIZONTAL: usize = 1;

impl Plan {
    fn pixels(&self) -> usize {
        self.grid.0 * self.grid.1
    }

    fn rows(&self) -> usize {
        self.batch * self.pixels()
    }

    /// Images of a block: by shape alone.
    fn block_images(&self) -> usize {
        block_images(self.batch, self.pixels())
    }
}

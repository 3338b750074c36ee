//! Convolution and transposed convolution, forward and with respect to the input, as implicit
//! matrix products: each is a *patch* convolution over one or several phases of the output.

use std::borrow::Cow;
use std::cell::RefCell;

use rayon::prelude::*;

use super::SharedMut;
use super::bf16::conv::PatchProduct;
use super::bf16::{self, Rounded};
use super::buffers::Buffers;
use super::elements::{Elements, Output};
use super::ending::Sink;
use super::pack::{
    Axes, DepthAxis, Gather, Images, Matrix, Patches, Place, Tap, panels_len, weight_panels,
};
use super::tile::{DEPTH, Kernels, Operand, ROW, Tile, kernels};
use super::winograd::{self, Plan};
use crate::Precision;

/// Rows of patches that a task gathers and multiplies at a time.
const BLOCK: usize = 112;
/// From so many blocks on, a product of one task's rows is shared with the other threads.
const MANY_BLOCKS: usize = 4;
/// Up to that many output channels, a transposed convolution multiplies first and adds the
/// overlapping results afterwards: a register of columns would be nearly empty otherwise.
const FEW_CHANNELS: usize = 8;

/// The geometry of a convolution `large → small` (and of its transpose `small → large`), with the
/// weight `[outer, inner, KH, KW]`, `outer` the channels of `small`, `inner` those of `large`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub large: Images,
    pub small: Images,
    pub kernel: (usize, usize),
    pub stride: usize,
    pub padding: usize,
    pub dilation: usize,
    pub precision: Precision,
}

impl Geometry {
    #[cfg(test)]
    pub(crate) fn weight_len(&self) -> usize {
        self.small.channels * self.large.channels * self.kernel.0 * self.kernel.1
    }

    /// (outer, inner, taps).
    pub(crate) fn weight_shape(&self) -> (usize, usize, usize) {
        (self.small.channels, self.large.channels, self.kernel.0 * self.kernel.1)
    }

    /// The patches of `large` under each pixel of `small`.
    pub(crate) fn patches(&self, relu: bool) -> Patches {
        let taps = self.kernel_taps().map(|(ky, kx)| Tap {
            dy: (ky * self.dilation) as isize - self.padding as isize,
            dx: (kx * self.dilation) as isize - self.padding as isize,
            index: ky * self.kernel.1 + kx,
        });
        let grid = (self.small.height, self.small.width);
        Patches::new(self.large, grid, self.stride, taps.collect(), relu)
    }

    /// The patches of `small` that the pixels `(q·stride + phase)` of `large` sum over.
    fn phase_patches(&self, phase: (usize, usize), relu: bool) -> Patches {
        let stride = self.stride as isize;
        let reach =
            |phase: usize, k: usize| (phase + self.padding) as isize - (k * self.dilation) as isize;
        let taps = self.kernel_taps().filter_map(|(ky, kx)| {
            let (dy, dx) = (reach(phase.0, ky), reach(phase.1, kx));
            (dy % stride == 0 && dx % stride == 0).then_some(Tap {
                dy: dy / stride,
                dx: dx / stride,
                index: ky * self.kernel.1 + kx,
            })
        });
        let count = |length: usize, phase: usize| (length - phase).div_ceil(self.stride);
        let grid = (count(self.large.height, phase.0), count(self.large.width, phase.1));
        Patches::new(self.small, grid, /* step */ 1, taps.collect(), relu)
    }

    /// Every phase of `large`, and the patches that its pixels sum over.
    fn phases(&self, relu: bool) -> impl Iterator<Item = (Patches, Target)> {
        let (height, width) =
            (self.stride.min(self.large.height), self.stride.min(self.large.width));
        (0..height).flat_map(move |y| (0..width).map(move |x| (y, x))).map(move |phase| {
            let target = Target { images: self.large, scale: self.stride, phase };
            (self.phase_patches(phase, relu), target)
        })
    }

    fn kernel_taps(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (height, width) = self.kernel;
        (0..height).flat_map(move |ky| (0..width).map(move |kx| (ky, kx)))
    }
}

/// What happens to a sum before it is stored: bias, then mask, then residual.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a, M = &'a [f32]> {
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
    /// As the output: where it is not above zero, the sum becomes zero (ReLU's gradient).
    pub mask: Option<M>,
    /// As the output: added last.
    pub residual: Option<&'a [f32]>,
}

impl<M> Default for Finish<'_, M> {
    fn default() -> Self {
        Self { bias: None, mask: None, residual: None }
    }
}

impl<'a> Finish<'a> {
    fn of_elements(self) -> Finish<'a, Elements<'a>> {
        let Self { bias, mask, residual } = self;
        Finish { bias, mask: mask.map(Elements::F32), residual }
    }
}

impl<'a> Finish<'a, Elements<'a>> {
    /// With the mask in f32.
    fn widened<R>(self, work: impl FnOnce(Finish<'_>) -> R) -> R {
        let mask = self.mask.map(Elements::widen);
        work(Finish { bias: self.bias, mask: mask.as_deref(), residual: self.residual })
    }
}

/// `large` `[B, H, W, inner]` → `small` `[B, h, w, outer]`: a convolution forward, and a transposed
/// convolution's gradient with respect to its input.
pub(crate) fn large_to_small(
    geometry: &Geometry,
    large: Elements<'_>,
    relu: bool,
    weight: &[f32],
    finish: Finish<'_, Elements<'_>>,
    buffers: &Buffers,
    small: Output<'_>,
) {
    if geometry.small.len() == 0 {
        return;
    }
    let patches = geometry.patches(relu);
    let target = Target { images: geometry.small, scale: 1, phase: (0, 0) };
    let axes = Axes::new(geometry.weight_shape(), DepthAxis::Inner);
    match Source::new(geometry, large, relu, buffers) {
        Source::F32(large) => finish.widened(|finish| {
            small.through_f32(buffers, |small| {
                multiply(&patches, &large, weight, axes, finish, target, buffers, small);
            });
        }),
        Source::Bf16(large) => {
            let (large, sink) = (large.halves(), Sink::new(small));
            multiply_halves(&patches, large, weight, axes, finish, target, buffers, sink);
        }
    }
}

/// `small` `[B, h, w, outer]` → `large` `[B, H, W, inner]`: a transposed convolution forward, and a
/// convolution's gradient with respect to its input.
pub(crate) fn small_to_large(
    geometry: &Geometry,
    small: Elements<'_>,
    relu: bool,
    weight: &[f32],
    finish: Finish<'_, Elements<'_>>,
    buffers: &Buffers,
    large: Output<'_>,
) {
    if geometry.large.len() == 0 {
        return;
    }
    let small = Source::new(geometry, small, relu, buffers);
    if geometry.large.channels <= FEW_CHANNELS {
        return finish.widened(|finish| {
            large.through_f32(buffers, |large| {
                scatter(geometry, &small, relu, weight, finish, large);
            });
        });
    }
    let axes = Axes::new(geometry.weight_shape(), DepthAxis::Outer);
    match small {
        Source::F32(small) => finish.widened(|finish| {
            large.through_f32(buffers, |large| {
                for (patches, target) in geometry.phases(relu) {
                    multiply(&patches, &small, weight, axes, finish, target, buffers, large);
                }
            });
        }),
        Source::Bf16(small) => {
            let (small, sink) = (small.halves(), Sink::new(large));
            for (patches, target) in geometry.phases(relu) {
                multiply_halves(&patches, small, weight, axes, finish, target, buffers, sink);
            }
        }
    }
}

/// What patches are cut from.
enum Source<'a> {
    /// As it is; ReLU comes with the cutting.
    F32(Cow<'a, [f32]>),
    /// Rounded, after the ReLU.
    Bf16(Rounded<'a>),
}

impl<'a> Source<'a> {
    fn new(geometry: &Geometry, x: Elements<'a>, relu: bool, buffers: &Buffers) -> Self {
        match geometry.precision {
            Precision::F32 => Self::F32(x.widen()),
            Precision::Bf16 => Self::Bf16(Rounded::new(x, relu, buffers)),
        }
    }
}

/// Where the result of patch `(y, x)` goes: pixel `(y·scale + phase.0, x·scale + phase.1)`.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    images: Images,
    scale: usize,
    phase: (usize, usize),
}

impl Target {
    /// Every patch's pixel, one after the other.
    pub(super) fn dense(batch: usize, grid: (usize, usize), channels: usize) -> Self {
        let images = Images { batch, height: grid.0, width: grid.1, channels };
        Self { images, scale: 1, phase: (0, 0) }
    }

    /// Channels of a pixel.
    pub(super) fn channels(&self) -> usize {
        self.images.channels
    }

    /// The first element of that pixel.
    pub(super) fn offset(&self, place: Place) -> usize {
        let y = place.y * self.scale + self.phase.0;
        let x = place.x * self.scale + self.phase.1;
        ((place.image * self.images.height + y) * self.images.width + x) * self.images.channels
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static PANELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` on this thread's scratch buffer of that name, grown to `length`. Nested calls (a
/// thread that steals work while it waits) get a buffer of their own.
pub(super) fn with_scratch<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.take();
    if buffer.len() < length {
        buffer.resize(length, 0.);
    }
    let result = work(&mut buffer[..length]);
    SCRATCH.set(buffer);
    result
}

#[allow(clippy::too_many_arguments)]
fn multiply(
    patches: &Patches,
    x: &[f32],
    weight: &[f32],
    axes: Axes,
    finish: Finish<'_>,
    target: Target,
    buffers: &Buffers,
    out: &mut [f32],
) {
    let kernels = kernels();
    if let Some(plan) = Plan::new(patches, axes.columns, kernels, Precision::F32) {
        let (finish, sink) = (finish.of_elements(), Sink::new(Output::F32(out)));
        winograd::multiply(&plan, kernels, patches, x, weight, axes, finish, target, buffers, sink);
        return;
    }
    let mut panels = PANELS.take();
    cut_panels(Matrix { weight, axes, taps: &patches.taps }, kernels, &mut panels);
    let rows = patches.rows();
    let sources = [Rows { patches, x }];
    let product =
        Product { kernels, sources: &sources, panels: &panels, accumulate: false, finish, target };
    let out = SharedMut::new(out);
    (0..rows.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
        let first = block * BLOCK;
        product.block(first..(first + BLOCK).min(rows), out);
    });
    PANELS.set(panels);
}

/// As [`multiply`], with both factors rounded.
#[allow(clippy::too_many_arguments)]
fn multiply_halves(
    patches: &Patches,
    x: &[u16],
    weight: &[f32],
    axes: Axes,
    finish: Finish<'_, Elements<'_>>,
    target: Target,
    buffers: &Buffers,
    sink: Sink,
) {
    let kernels = kernels();
    if let Some(plan) = Plan::new(patches, axes.columns, kernels, Precision::Bf16) {
        winograd::multiply(&plan, kernels, patches, x, weight, axes, finish, target, buffers, sink);
    } else {
        bf16::conv::multiply(patches, x, weight, axes, finish, target, buffers, sink);
    }
}

/// One matrix in its panels, grown or cut to their length.
fn cut_panels(matrix: Matrix<'_>, kernels: &Kernels, panels: &mut Vec<f32>) {
    panels.resize(panels_len(&[matrix], kernels.panel), 0.);
    weight_panels(&[matrix], kernels.panel, panels);
}

/// The patches of a batch of images, as the rows of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub patches: &'a Patches,
    pub x: &'a [f32],
}

/// Matrices side by side, all with as many rows, times panels: each row's patches of all sources, one after
/// the other, are the depth.
pub(super) struct Product<'a> {
    pub kernels: &'a Kernels,
    pub sources: &'a [Rows<'a>],
    pub panels: &'a [f32],
    /// Whether it is added to what is there.
    pub accumulate: bool,
    pub finish: Finish<'a>,
    pub target: Target,
}

impl Product<'_> {
    /// All rows: few of them on this thread, many on all.
    pub(super) fn run(&self, out: &mut [f32]) {
        let rows = self.sources.first().map_or(0, |source| source.patches.rows());
        let depth: usize = self.sources.iter().map(|source| source.patches.depth()).sum();
        let (columns, panel) = (self.target.images.channels, self.kernels.panel);
        assert!(
            out.len() == rows * columns && self.sources.iter().all(|s| s.patches.rows() == rows)
        );
        assert!(self.panels.len() >= columns.div_ceil(panel) * depth * panel);
        for values in [self.finish.mask, self.finish.residual].into_iter().flatten() {
            assert!(values.len() == out.len());
        }
        assert!(self.finish.bias.is_none_or(|bias| bias.len() == columns));
        let blocks = rows.div_ceil(BLOCK);
        let out = SharedMut::new(out);
        let block =
            |block: usize| self.block(rows * block / blocks..rows * (block + 1) / blocks, out);
        if blocks < MANY_BLOCKS {
            (0..blocks).for_each(block);
        } else {
            (0..blocks).into_par_iter().for_each(block);
        }
    }

    /// All columns of a block of rows.
    fn block(&self, rows: std::ops::Range<usize>, out: SharedMut) {
        let Some(Rows { patches, .. }) = self.sources.first() else { return };
        let depth: usize = self.sources.iter().map(|source| source.patches.depth()).sum();
        let columns = self.target.images.channels;
        let panel = self.kernels.panel;
        let mut offsets = [0usize; BLOCK];
        let mut place = Place::at(rows.start, patches.grid);
        for offset in offsets.iter_mut().take(rows.len()) {
            *offset = self.target.offset(place);
            place.next(patches.grid);
        }
        // A phase without taps (a kernel smaller than the stride) still stores bias and residual.
        let chunks = depth.div_ceil(DEPTH).max(1);
        with_scratch(BLOCK * ROW, |gathered| {
            for chunk in 0..chunks {
                let (start, end) = (depth * chunk / chunks, depth * (chunk + 1) / chunks);
                self.gather(rows.clone(), start..end, gathered);
                let last = chunk + 1 == chunks;
                for first in (0..columns).step_by(panel) {
                    let b = self.panels[first * depth + start * panel..].as_ptr();
                    for (row, count) in self.kernels.tiles(rows.len()) {
                        let at = |values: Option<&[f32]>| match values {
                            Some(values) if last => values[first..].as_ptr(),
                            _ => std::ptr::null(),
                        };
                        let tile = Tile {
                            depth: end - start,
                            a: gathered[row * ROW..].as_ptr(),
                            a_step: 1,
                            b,
                            c: out.get().wrapping_add(first),
                            rows: offsets[row..].as_ptr(),
                            columns: panel.min(columns - first),
                            accumulate: self.accumulate || chunk > 0,
                            bias: at(self.finish.bias),
                            mask: at(self.finish.mask),
                            residual: at(self.finish.residual),
                        };
                        // SAFETY: the block's rows are written by this task alone; `gathered` holds
                        // its rows at the distance ROW, and the panels were cut for these kernels.
                        #[allow(unsafe_code)]
                        unsafe {
                            self.kernels.run(Operand::Gathered, count, &tile);
                        }
                    }
                }
            }
        });
    }

    /// That part of the depth of these rows, a row every `ROW` elements.
    fn gather(
        &self,
        rows: std::ops::Range<usize>,
        depth: std::ops::Range<usize>,
        gathered: &mut [f32],
    ) {
        let mut first = 0;
        for Rows { patches, x } in self.sources {
            let end = first + patches.depth();
            let part = depth.start.max(first)..depth.end.min(end);
            if !part.is_empty() {
                let piece = Gather {
                    patches,
                    x,
                    rows: rows.clone(),
                    depth: part.start - first..part.end - first,
                    to: &mut gathered[part.start - depth.start..],
                    stride: ROW,
                };
                // SAFETY: the kernels fit this CPU.
                #[allow(unsafe_code)]
                unsafe {
                    self.kernels.gather[usize::from(patches.relu)](piece);
                }
            }
            first = end;
        }
    }
}

/// [`small_to_large`] for few channels: per image, `[pixels, outer] × [outer, taps · inner]`, then
/// every output pixel collects what falls on it.
fn scatter(
    geometry: &Geometry,
    small: &Source<'_>,
    relu: bool,
    weight: &[f32],
    finish: Finish<'_>,
    large: &mut [f32],
) {
    let (kernels, bf16_kernels) = (kernels(), bf16::kernels::kernels());
    let Geometry { large: to, small: from, kernel, stride, padding, dilation, .. } = *geometry;
    let area = kernel.0 * kernel.1;
    let columns = area * to.channels;
    // [outer, inner, area] → [outer, area · inner], so that a tap's channels lie side by side.
    let mut by_tap = vec![0.; weight.len()];
    for (from, to_row) in weight.chunks(columns).zip(by_tap.chunks_mut(columns)) {
        for (channel, taps) in from.chunks(area).enumerate() {
            for (tap, value) in taps.iter().enumerate() {
                to_row[tap * to.channels + channel] = *value;
            }
        }
    }
    let one = Images { batch: 1, ..from };
    let tap = Tap { dy: 0, dx: 0, index: 0 };
    let axes = Axes::new((from.channels, columns, 1), DepthAxis::Outer);
    let patches = Patches::new(one, (from.height, from.width), 1, vec![tap], relu);
    let target = Target { images: Images { channels: columns, ..one }, scale: 1, phase: (0, 0) };
    let (mut panels, mut pairs) = (PANELS.take(), Vec::new());
    match small {
        Source::F32(_) => {
            cut_panels(Matrix { weight: &by_tap, axes, taps: &[tap] }, kernels, &mut panels);
        }
        Source::Bf16(_) => {
            pairs.resize(bf16::conv::panels_len(from.channels, columns), 0);
            bf16::conv::weight_panels(&by_tap, axes, &[tap], &mut pairs);
        }
    }
    // [pixels, columns] of one image.
    let multiply = |image: usize, products: &mut [f32]| {
        let rows = one.pixels();
        let elements = image * one.len()..(image + 1) * one.len();
        match small {
            Source::F32(x) => {
                let (x, out, finish) = (&x[elements], SharedMut::new(products), Finish::default());
                let (sources, panels) = ([Rows { patches: &patches, x }], &panels[..]);
                let product = Product {
                    kernels,
                    sources: &sources,
                    panels,
                    accumulate: false,
                    finish,
                    target,
                };
                for first in (0..rows).step_by(BLOCK) {
                    product.block(first..(first + BLOCK).min(rows), out);
                }
            }
            Source::Bf16(x) => {
                let (x, sink) = (&x.halves()[elements], Sink::new(Output::F32(products)));
                let (patches, panels, finish) = (&patches, &pairs, Finish::default());
                let kernels = bf16_kernels;
                PatchProduct { kernels, patches, x, panels, finish, target }.rows(0..rows, sink);
            }
        }
    };
    // With dilation 1, the taps of a kernel's row fall on pixels side by side.
    let run = if dilation == 1 { kernel.1 } else { 1 };
    let products = || vec![0.; one.pixels() * columns];
    let images = large.par_chunks_mut(to.len() / to.batch).enumerate();
    images.for_each_init(products, |products, (image, large)| {
        let at = image * large.len()..(image + 1) * large.len();
        let mask = finish.mask.map(|mask| &mask[at.clone()]);
        let residual = finish.residual.map(|residual| &residual[at]);
        multiply(image, products);
        match finish.bias {
            Some(bias) => large.chunks_mut(to.channels).for_each(|p| p.copy_from_slice(bias)),
            None => large.fill(0.),
        }
        for (pixel, products) in products.chunks(columns).enumerate() {
            let (y, x) = (pixel / from.width * stride, pixel % from.width * stride);
            for (index, values) in products.chunks(run * to.channels).enumerate() {
                let row = y + index * run / kernel.1 * dilation;
                let column = x + index * run % kernel.1 * dilation;
                if row < padding || row - padding >= to.height {
                    continue;
                }
                // The run's pixels that lie inside the image.
                let first = padding.saturating_sub(column).min(run);
                let end = (to.width + padding).saturating_sub(column).min(run);
                if first < end {
                    let at = (row - padding) * to.width + column + first - padding;
                    let values = &values[first * to.channels..end * to.channels];
                    for (to, value) in large[at * to.channels..].iter_mut().zip(values) {
                        *to += value;
                    }
                }
            }
        }
        if let Some(mask) = mask {
            for (value, gate) in large.iter_mut().zip(mask) {
                *value = if *gate <= 0. { 0. } else { *value };
            }
        }
        if let Some(residual) = residual {
            for (value, more) in large.iter_mut().zip(residual) {
                *value += more;
            }
        }
    });
    PANELS.set(panels);
}

//! The gradients of a convolution's weight and bias.

use rayon::prelude::*;

use super::bf16::Rounded;
use super::buffers::Buffers;
use super::conv::{Geometry, Rows, with_scratch};
use super::elements::Elements;
use super::pack::{Axes, DepthAxis, Gather};
use super::tile::{DEPTH, Kernels, Operand, ROW, Tile, kernels};
use super::winograd::{self, Plan};
use super::{SharedMut, bf16};
use crate::Precision;

/// Pixels that a task multiplies at a time.
const CHUNK: usize = 192;
/// Partial sums are kept for at most that many elements in all, …
const PARTIAL_ELEMENTS: usize = 1 << 23;
/// … and in at most that many parts.
const PARTS: usize = 32;

/// The weight's gradient `[outer, inner, KH, KW]`, `Σ_m small[m, outer] · patch_m(large)[inner, ky,
/// kx]`: for a convolution `small` is the output's gradient and `large` the input; for a transposed
/// one `small` is the input and `large` the output's gradient. Zeros for an empty batch.
pub(crate) fn weight_gradient(
    geometry: &Geometry,
    large: (Elements<'_>, /* relu */ bool),
    small: (Elements<'_>, /* relu */ bool),
    buffers: &Buffers,
    gradient: &mut [f32],
) {
    let patches = geometry.patches(large.1);
    if patches.rows() == 0 {
        gradient.fill(0.);
        return;
    }
    let kernels = kernels();
    let plan = Plan::new(&patches, geometry.small.channels, kernels, geometry.precision);
    let axes = Axes::new(geometry.weight_shape(), DepthAxis::Inner);
    if geometry.precision == Precision::Bf16 {
        let [large, small] = [large, small].map(|(x, relu)| Rounded::new(x, relu, buffers));
        let (large, small) = (large.halves(), small.halves());
        if let Some(plan) = plan {
            let small = (small, /* relu, again */ false);
            winograd::weight_gradient(
                &plan, kernels, &patches, large, small, axes, buffers, gradient,
            );
        } else {
            bf16::weight_gradient::weight_gradient(
                geometry, &patches, large, small, buffers, gradient,
            );
        }
        return;
    }
    let large = (&*large.0.widen(), large.1);
    let small = (&*small.0.widen(), small.1);
    if let Some(plan) = plan {
        winograd::weight_gradient(
            &plan, kernels, &patches, large.0, small, axes, buffers, gradient,
        );
        return;
    }
    let (depth, columns, pixels) = (patches.depth(), geometry.small.channels, patches.rows());
    let size = depth * columns;
    // Parts are cut by shape alone, so that sums do not depend on the number of threads.
    let parts = (PARTIAL_ELEMENTS / size.max(1)).clamp(1, PARTS).min(pixels.div_ceil(CHUNK));
    let stripes = depth.div_ceil(DEPTH);
    // Few parts (a large weight): let the stripes of the depth run side by side instead.
    let split = if parts < 8 { stripes } else { 1 };
    let mut partial = buffers.take(parts * size);
    let shared = SharedMut::new(&mut partial);
    (0..parts * split).into_par_iter().for_each(|task| {
        let (part, piece) = (task / split, task % split);
        let pixels = pixels * part / parts..pixels * (part + 1) / parts;
        let stripes = stripes * piece / split..stripes * (piece + 1) / split;
        let sums = shared.get().wrapping_add(part * size);
        let bounds = |stripe: usize| depth * stripe / depth.div_ceil(DEPTH);
        let panels = columns.div_ceil(kernels.panel);
        let scratch = CHUNK * (ROW + panels * kernels.panel);
        with_scratch(scratch, |scratch| {
            let (gathered, panels) = scratch.split_at_mut(CHUNK * ROW);
            let mut start = pixels.start;
            while start < pixels.end {
                let end = (start + CHUNK).min(pixels.end);
                cut_panels(kernels, (small, columns), start..end, 0..columns, panels);
                for stripe in stripes.clone() {
                    let (first, last) = (bounds(stripe), bounds(stripe + 1));
                    let piece = Gather {
                        patches: &patches,
                        x: large.0,
                        rows: start..end,
                        depth: first..last,
                        to: &mut *gathered,
                        stride: ROW,
                    };
                    // SAFETY: the kernels fit this CPU.
                    #[allow(unsafe_code)]
                    unsafe {
                        kernels.gather[usize::from(large.1)](piece);
                    }
                    let job = Job {
                        kernels,
                        pixels: end - start,
                        gathered,
                        panels,
                        columns,
                        accumulate: start > pixels.start,
                    };
                    job.run(first..last, sums);
                }
                start = end;
            }
        });
    });
    reduce(geometry, &patches.taps, &partial, parts, gradient);
}

/// Sums of each column: `[M, columns]` → `[columns]`, a bias's gradient.
pub(crate) fn column_sums(values: Elements<'_>, columns: usize, sums: &mut [f32]) {
    let kernels = bf16::kernels::kernels();
    match values {
        Elements::F32(values) => sum_columns(values, kernels.add, columns, sums),
        Elements::Bf16(values) => sum_columns(values, kernels.add_halves, columns, sums),
    }
}

/// `add` adds so many elements to f32 ones and fits this CPU.
fn sum_columns<T: Sync>(
    values: &[T],
    add: unsafe fn(*const T, *mut f32, usize),
    columns: usize,
    sums: &mut [f32],
) {
    const ROWS: usize = 1024;
    /// Few columns: several rows are added as if they were one, up to about that wide.
    const WIDTH: usize = 64;
    let width = (WIDTH / columns.max(1)).max(1) * columns;
    let partial: Vec<Vec<f32>> = values
        .par_chunks((ROWS * columns).max(1))
        .map(|rows| {
            let mut sums = vec![0.; width];
            for row in rows.chunks(width) {
                // SAFETY: the row has that many elements, and there are at least as many sums.
                #[allow(unsafe_code)]
                unsafe {
                    add(row.as_ptr(), sums.as_mut_ptr(), row.len());
                }
            }
            sums
        })
        .collect();
    sums.fill(0.);
    for part in partial.iter().flat_map(|part| part.chunks(columns)) {
        for (sum, value) in sums.iter_mut().zip(part) {
            *sum += value;
        }
    }
}

/// Rows `pixels` and those `columns` of `[M, width]` as panels `[panels][pixels][panel]`; the last panel's
/// missing columns are not read by the kernels' results.
fn cut_panels(
    kernels: &Kernels,
    ((small, relu), width): ((&[f32], bool), usize),
    pixels: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    panels: &mut [f32],
) {
    let copy = kernels.copy[usize::from(relu)];
    let panel = kernels.panel;
    for (index, to) in panels.chunks_mut(CHUNK * panel).enumerate() {
        let first = columns.start + index * panel;
        let count = panel.min(columns.end - first);
        for (pixel, to) in pixels.clone().zip(to.chunks_mut(panel)) {
            let from = &small[pixel * width + first..][..count];
            // SAFETY: both slices have `count` elements; `kernels` fits this CPU.
            #[allow(unsafe_code)]
            unsafe {
                copy(from.as_ptr(), to.as_mut_ptr(), count);
            }
        }
    }
}

/// Rows of patches and what their products' gradients are, `[rows, width]`.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    pub large: Rows<'a>,
    pub small: &'a [f32],
}

/// The gradients of some columns of a matrix of rows' factors, added up over all pieces in order on this
/// thread: of the weight `[columns, inner, KH, KW]` and of the bias `[columns]`. `width` is that of all columns.
pub(super) fn column_gradients(
    pieces: &[Piece<'_>],
    width: usize,
    columns: std::ops::Range<usize>,
    area: usize,
    (of_weight, of_bias): (&mut [f32], &mut [f32]),
) {
    let kernels = kernels();
    let add = bf16::kernels::kernels().add;
    let Some(Piece { large: Rows { patches, .. }, .. }) = pieces.first() else { return };
    let (depth, count, panel) = (patches.depth(), columns.len(), kernels.panel);
    let (inner, taps) = (patches.images.channels, patches.taps.clone());
    let (sums, rows, cut) = (depth * count, CHUNK * ROW, CHUNK * count.div_ceil(panel) * panel);
    of_bias.fill(0.);
    let mut of_chunk = vec![0.; count];
    with_scratch(sums + rows + cut, |scratch| {
        let (sums, scratch) = scratch.split_at_mut(sums);
        let (gathered, panels) = scratch.split_at_mut(rows);
        let mut accumulate = false;
        for Piece { large, small } in pieces {
            let pixels = large.patches.rows();
            let chunks = pixels.div_ceil(CHUNK);
            for chunk in 0..chunks {
                let (start, end) = (pixels * chunk / chunks, pixels * (chunk + 1) / chunks);
                cut_panels(kernels, ((small, false), width), start..end, columns.clone(), panels);
                of_chunk.fill(0.);
                for pixel in start..end {
                    let row = &small[pixel * width..][columns.clone()];
                    // SAFETY: both have as many elements.
                    #[allow(unsafe_code)]
                    unsafe {
                        add(row.as_ptr(), of_chunk.as_mut_ptr(), count);
                    }
                }
                for (sum, value) in of_bias.iter_mut().zip(&of_chunk) {
                    *sum += value;
                }
                let stripes = depth.div_ceil(DEPTH);
                for stripe in 0..stripes {
                    let stripe = depth * stripe / stripes..depth * (stripe + 1) / stripes;
                    let piece = Gather {
                        patches: large.patches,
                        x: large.x,
                        rows: start..end,
                        depth: stripe.clone(),
                        to: &mut *gathered,
                        stride: ROW,
                    };
                    // SAFETY: the kernels fit this CPU.
                    #[allow(unsafe_code)]
                    unsafe {
                        kernels.gather[usize::from(large.patches.relu)](piece);
                    }
                    let pixels = end - start;
                    let job = Job { kernels, pixels, gathered, panels, columns: count, accumulate };
                    job.run(stripe, sums.as_mut_ptr());
                }
                accumulate = true;
            }
        }
        for (row, sums) in sums.chunks_exact(count).enumerate() {
            let at = row % inner * area + taps[row / inner].index;
            for (gradient, sum) in of_weight.chunks_exact_mut(inner * area).zip(sums) {
                gradient[at] = *sum;
            }
        }
    });
}

struct Job<'a> {
    kernels: &'a Kernels,
    pixels: usize,
    gathered: &'a [f32],
    panels: &'a [f32],
    columns: usize,
    accumulate: bool,
}

impl Job<'_> {
    /// `sums[depth][columns] (+)= gatheredᵀ · panels` for a stripe of the depth.
    fn run(&self, depth: std::ops::Range<usize>, sums: *mut f32) {
        let panel = self.kernels.panel;
        for first in (0..self.columns).step_by(panel) {
            let b = self.panels[first / panel * CHUNK * panel..].as_ptr();
            for (row, count) in self.kernels.tiles(depth.len()) {
                let mut rows = [0usize; 16];
                for (i, offset) in rows.iter_mut().enumerate().take(count) {
                    *offset = (depth.start + row + i) * self.columns;
                }
                let tile = Tile {
                    depth: self.pixels,
                    a: self.gathered[row..].as_ptr(),
                    a_step: ROW,
                    b,
                    c: sums.wrapping_add(first),
                    rows: rows.as_ptr(),
                    columns: panel.min(self.columns - first),
                    accumulate: self.accumulate,
                    bias: std::ptr::null(),
                    mask: std::ptr::null(),
                    residual: std::ptr::null(),
                };
                // SAFETY: this task alone writes these rows of its part; `gathered` holds `pixels`
                // rows at the distance ROW, and the panels were cut for these kernels.
                #[allow(unsafe_code)]
                unsafe {
                    self.kernels.run(Operand::Transposed, count, &tile);
                }
            }
        }
    }
}

/// Adds the parts in order and brings `[taps · inner][outer]` to `[outer, inner, KH, KW]`.
fn reduce(
    geometry: &Geometry,
    taps: &[super::pack::Tap],
    partial: &[f32],
    parts: usize,
    gradient: &mut [f32],
) {
    let (outer, inner) = (geometry.small.channels, geometry.large.channels);
    let area = geometry.kernel.0 * geometry.kernel.1;
    let size = taps.len() * inner * outer;
    let to = SharedMut::new(gradient);
    (0..taps.len() * inner).into_par_iter().with_min_len(16).for_each_init(
        || vec![0.; outer],
        |sums, row| {
            sums.fill(0.);
            for part in 0..parts {
                let from = &partial[part * size + row * outer..][..outer];
                for (sum, value) in sums.iter_mut().zip(from) {
                    *sum += value;
                }
            }
            let (tap, channel) = (row / inner, row % inner);
            for (o, sum) in sums.iter().enumerate() {
                let at = (o * inner + channel) * area + taps[tap].index;
                // SAFETY: `at` is below outer · inner · area, the gradient's length, and each
                // (row, o) has an `at` of its own.
                #[allow(unsafe_code)]
                unsafe {
                    *to.get().add(at) = *sum;
                }
            }
        },
    );
}

//! The gradient of a convolution's weight in bfloat16.

use rayon::prelude::*;

use super::kernels::{Kernels, PANEL, Product, SQUARE, STEP, kernels};
use super::{LINE, halves, with_words, words};
use crate::cpu::SharedMut;
use crate::cpu::buffers::Buffers;
use crate::cpu::conv::Geometry;
use crate::cpu::pack::{Gather, Patches};

/// Pixels whose products are summed before the sums go back to memory.
const CHUNK: usize = 256;
/// Pairs of pixels in a chunk.
const PAIRS: usize = CHUNK / 2;
/// Distance between channels in a transposed chunk: an odd number of cache lines.
const CHANNEL_STEP: usize = PAIRS + LINE;
/// Columns of patches that a task gathers at a time.
const STRIPE: usize = 256;
/// About how many tasks there are.
const TASKS: usize = 32;
/// Pixels that are gathered before they are paired.
const BAND: usize = 2 * SQUARE;

/// As [`crate::cpu::weight_gradient::weight_gradient`], with both factors rounded (after their ReLU).
pub(crate) fn weight_gradient(
    geometry: &Geometry,
    patches: &Patches,
    large: &[u16],
    small: &[u16],
    buffers: &Buffers,
    gradient: &mut [f32],
) {
    let kernels = kernels();
    let (depth, channels, pixels) = (patches.depth(), geometry.small.channels, patches.rows());
    let chunks = pixels.div_ceil(CHUNK);
    let height = kernels.padded(channels);
    let tile = kernels.tile(channels);
    let width = depth.next_multiple_of(PANEL);
    // What the tasks are depends on the shape alone, so that sums do not depend on threads.
    let stripes = depth.div_ceil(STRIPE).max(1);
    let parts = (TASKS / stripes).clamp(2, 16).min(chunks.max(1));

    let mut transposed = buffers.take(chunks * height * CHANNEL_STEP + LINE);
    let transposed = words(&mut transposed, chunks * height * CHANNEL_STEP);
    transposed.par_chunks_mut((height * CHANNEL_STEP).max(1)).enumerate().for_each(
        |(chunk, to)| {
            let first = chunk * CHUNK;
            transpose(kernels, small, first..(first + CHUNK).min(pixels), channels, to);
        },
    );

    let mut sums = buffers.take(parts * height * width + LINE);
    let skip = sums.as_ptr().align_offset(64);
    let shared = SharedMut::new(&mut sums[skip..]);
    (0..parts * stripes).into_par_iter().for_each(|task| {
        let (part, stripe) = (task / stripes, task % stripes);
        let panels = width / PANEL;
        let columns = panels * stripe / stripes * PANEL..panels * (stripe + 1) / stripes * PANEL;
        let (first, end) = (chunks * part / parts, chunks * (part + 1) / parts);
        let (panel_words, band_words) = (columns.len() * PAIRS, BAND * columns.len() / 2);
        with_words(panel_words + band_words, |scratch| {
            let (panels, band) = scratch.split_at_mut(panel_words);
            for chunk in first..end {
                let pixels = chunk * CHUNK..((chunk + 1) * CHUNK).min(pixels);
                let pairs = pixels.len().div_ceil(2).next_multiple_of(STEP);
                paired_panels(kernels, patches, large, pixels, columns.clone(), panels, band);
                let a = &transposed[chunk * height * CHANNEL_STEP..];
                // SAFETY: the kernels fit this CPU; `a` and `panels` hold `pairs` pairs; this task
                // alone writes these columns of its part of the sums.
                #[allow(unsafe_code)]
                unsafe {
                    (kernels.enter)();
                    for (panel, column) in columns.clone().step_by(PANEL).enumerate() {
                        for row in (0..channels).step_by(tile) {
                            let at = (part * height + row) * width + column;
                            (kernels.product)(&Product {
                                rows: tile.min(channels - row),
                                pairs,
                                a: a[row * CHANNEL_STEP..].as_ptr(),
                                a_step: CHANNEL_STEP,
                                b: panels[panel * PAIRS * PANEL..].as_ptr(),
                                c: shared.get().wrapping_add(at),
                                c_step: width,
                                accumulate: chunk > first,
                            });
                        }
                    }
                    (kernels.leave)();
                }
            }
        });
    });
    reduce(kernels, geometry, patches, &sums[skip..], (parts, height, width), gradient);
}

/// Rows `pixels` of `[M, channels]` as pairs of pixels, `[channels][CHANNEL_STEP]`; zeros behind the
/// last pixel, and in rows beyond the channels.
fn transpose(
    kernels: &Kernels,
    small: &[u16],
    pixels: std::ops::Range<usize>,
    channels: usize,
    to: &mut [u32],
) {
    if pixels.len() < CHUNK || to.len() > channels * CHANNEL_STEP {
        to.fill(0);
    }
    let mut last = [0; BAND * SQUARE];
    for start in pixels.clone().step_by(BAND) {
        for channel in (0..channels).step_by(SQUARE) {
            let (rows, columns) = (BAND.min(pixels.end - start), SQUARE.min(channels - channel));
            let mut from = &small[start * channels + channel..];
            let mut step = channels;
            if rows < BAND || columns < SQUARE {
                last.fill(0);
                for (to, from) in last.chunks_mut(SQUARE).zip(from.chunks(channels)).take(rows) {
                    to[..columns].copy_from_slice(&from[..columns]);
                }
                (from, step) = (&last, SQUARE);
            }
            let first = channel * CHANNEL_STEP + (start - pixels.start) / 2;
            let to = &mut to[first..];
            // SAFETY: `from` holds BAND rows of SQUARE halves at that distance, and `to` a row of
            // SQUARE words for each of the columns; the kernels fit this CPU.
            #[allow(unsafe_code)]
            unsafe {
                (kernels.transpose)(from.as_ptr(), step, to.as_mut_ptr(), CHANNEL_STEP, columns);
            }
        }
    }
}

/// Elements `columns` of the patches `pixels` as pairs of pixels, `[panels][PAIRS][PANEL]`; zeros
/// behind the last pixel and beyond the patches' depth.
fn paired_panels(
    kernels: &Kernels,
    patches: &Patches,
    x: &[u16],
    pixels: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    panels: &mut [u32],
    band: &mut [u32],
) {
    let width = columns.len();
    let depth = columns.start..columns.end.min(patches.depth());
    let band = halves(band);
    for start in pixels.clone().step_by(BAND) {
        let end = (start + BAND).min(pixels.end);
        if end - start < BAND || depth.end < columns.end {
            band.fill(0);
        }
        let rows = start..end;
        let job = Gather { patches, x, rows, depth: depth.clone(), to: &mut *band, stride: width };
        // SAFETY: the kernels fit this CPU.
        #[allow(unsafe_code)]
        unsafe {
            (kernels.gather)(job);
        }
        for (i, two) in band.chunks_exact(2 * width).enumerate() {
            let (low, high) = two.split_at(width);
            let pair = (start - pixels.start) / 2 + i;
            for first in (0..width).step_by(PANEL) {
                let to = &mut panels[(first / PANEL * PAIRS + pair) * PANEL..][..PANEL];
                // SAFETY: all three have PANEL elements from here on; the kernels fit this CPU.
                #[allow(unsafe_code)]
                unsafe {
                    (kernels.pair)(
                        low[first..].as_ptr(),
                        high[first..].as_ptr(),
                        to.as_mut_ptr(),
                        PANEL,
                    );
                }
            }
        }
    }
}

/// Adds the parts in order and brings `[outer][taps · inner]` to `[outer, inner, KH, KW]`.
fn reduce(
    kernels: &Kernels,
    geometry: &Geometry,
    patches: &Patches,
    sums: &[f32],
    (parts, height, width): (usize, usize, usize),
    gradient: &mut [f32],
) {
    let inner = geometry.large.channels;
    let area = geometry.kernel.0 * geometry.kernel.1;
    let depth = patches.depth();
    gradient.par_chunks_mut((inner * area).max(1)).enumerate().for_each_init(
        || vec![0.; depth],
        |total, (outer, to)| {
            total.fill(0.);
            for part in 0..parts {
                let from = &sums[(part * height + outer) * width..][..depth];
                // SAFETY: both have `depth` elements; the kernels fit this CPU.
                #[allow(unsafe_code)]
                unsafe {
                    (kernels.add)(from.as_ptr(), total.as_mut_ptr(), depth);
                }
            }
            for (tap, values) in patches.taps.iter().zip(total.chunks(inner)) {
                for (to, value) in to.iter_mut().skip(tap.index).step_by(area).zip(values) {
                    *to = *value;
                }
            }
        },
    );
}

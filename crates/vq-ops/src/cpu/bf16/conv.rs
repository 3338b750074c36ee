//! A patch convolution in bfloat16.

use std::ops::Range;

use rayon::prelude::*;

use super::kernels::{Kernels, PANEL, Product, STEP, Store, kernels, round};
use super::{LINE, halves, with_words, words};
use crate::cpu::buffers::Buffers;
use crate::cpu::conv::{Finish, Target};
use crate::cpu::elements::Elements;
use crate::cpu::ending::{Ending, Sink};
use crate::cpu::pack::{Axes, Gather, Patches, Place, Tap};

/// Patches that are gathered and multiplied at a time, at most: a tile of the widest kernels.
const BLOCK: usize = 32;
/// Blocks of a task.
const BLOCKS: usize = 4;
/// Pairs that are gathered and multiplied at a time, at most: the block's patches, their sums and two tiles of
/// the weight stay in the first-level cache. An even number of cache lines.
const DEPTH: usize = 12 * LINE;

/// The product of patches and a weight, finished and stored; see [`crate::cpu::conv`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn multiply(
    patches: &Patches,
    x: &[u16],
    weight: &[f32],
    axes: Axes,
    finish: Finish<'_, Elements<'_>>,
    target: Target,
    buffers: &Buffers,
    sink: Sink,
) {
    let length = panels_len(patches.depth(), axes.columns);
    let mut memory = buffers.take(length + LINE);
    let panels = words(&mut memory, length);
    weight_panels(weight, axes, &patches.taps, panels);
    let kernels = kernels();
    let job = PatchProduct { kernels, patches, x, panels, finish, target };
    let rows = patches.rows();
    let task_rows = BLOCKS * block(kernels.rows);
    (0..rows.div_ceil(task_rows)).into_par_iter().for_each(|task| {
        let first = task * task_rows;
        job.rows(first..(first + task_rows).min(rows), sink);
    });
}

/// As many whole tiles of that height as a block can hold.
fn block(tile: usize) -> usize {
    BLOCK / tile * tile
}

/// Patches times a weight that was cut into panels.
pub(crate) struct PatchProduct<'a> {
    /// Of the thread that began: tests choose them by thread.
    pub kernels: &'static Kernels,
    pub patches: &'a Patches,
    /// After the ReLU that the patches may ask for.
    pub x: &'a [u16],
    /// By [`weight_panels`].
    pub panels: &'a [u32],
    pub finish: Finish<'a, Elements<'a>>,
    pub target: Target,
}

impl PatchProduct<'_> {
    /// All columns of some rows. No two tasks may take the same row.
    pub(crate) fn rows(&self, rows: Range<usize>, sink: Sink) {
        let block = block(self.kernels.rows);
        for first in rows.clone().step_by(block) {
            self.block(first..(first + block).min(rows.end), sink);
        }
    }

    fn block(&self, rows: Range<usize>, sink: Sink) {
        let kernels = self.kernels;
        let columns = self.target.channels();
        let pairs = padded_pairs(self.patches.depth());
        // A depth without taps still stores bias and residual.
        let pieces = pairs.div_ceil(DEPTH).max(1);
        let cut = |piece: usize| pairs / STEP * piece / pieces * STEP;
        let a_step = DEPTH + LINE;
        let mut offsets = [0usize; BLOCK];
        let mut place = Place::at(rows.start, self.patches.grid);
        for offset in offsets.iter_mut().take(rows.len()) {
            *offset = self.target.offset(place);
            place.next(self.patches.grid);
        }
        // Rows that a product may read and write: it works on whole tiles.
        let height = kernels.padded(rows.len());
        let tile = kernels.tile(rows.len());
        let sums = height * columns.next_multiple_of(PANEL);
        with_words(height * a_step + sums, |scratch| {
            let (gathered, sums) = scratch.split_at_mut(height * a_step);
            let sums = sums.as_mut_ptr().cast::<f32>();
            // SAFETY: gives back what it takes below.
            #[allow(unsafe_code)]
            unsafe {
                (kernels.enter)();
            }
            for piece in 0..pieces {
                let (start, end) = (cut(piece), cut(piece + 1));
                self.gather(rows.clone(), start..end, gathered, a_step);
                for first in (0..columns).step_by(PANEL) {
                    for row in (0..rows.len()).step_by(tile) {
                        let count = tile.min(rows.len() - row);
                        // SAFETY: the kernels fit this CPU. `gathered` and `sums` hold the rows of
                        // the block, and as many more as a product may touch; the panels are `pairs`
                        // deep.
                        #[allow(unsafe_code)]
                        unsafe {
                            (kernels.product)(&Product {
                                rows: count,
                                pairs: end - start,
                                a: gathered[row * a_step..].as_ptr(),
                                a_step,
                                b: self.panels[first * pairs + start * PANEL..].as_ptr(),
                                c: sums.wrapping_add(first * height + row * PANEL),
                                c_step: PANEL,
                                accumulate: piece > 0,
                            });
                        }
                    }
                }
            }
            // SAFETY: as above; the block's rows of the sink are written by this task alone, and what is
            // as large as the result covers the same elements; gives back what `enter` took.
            #[allow(unsafe_code)]
            unsafe {
                (kernels.store)(&Store {
                    from: sums,
                    panel_step: height * PANEL,
                    rows: offsets.as_ptr(),
                    count: rows.len(),
                    columns,
                    ending: Ending::new(self.finish, sink),
                });
                (kernels.leave)();
            }
        });
    }

    /// Copies a piece of the patches, cut at those pairs, to rows `step` words apart; zeros behind the
    /// last pair.
    fn gather(&self, rows: Range<usize>, pairs: Range<usize>, to: &mut [u32], step: usize) {
        let depth = self.patches.depth();
        let piece = 2 * pairs.start..depth.min(2 * pairs.end);
        let to = halves(to);
        if piece.len() < 2 * pairs.len() {
            for row in to.chunks_mut(2 * step).take(rows.len()) {
                row[piece.len()..2 * pairs.len()].fill(0);
            }
        }
        let job =
            Gather { patches: self.patches, x: self.x, rows, depth: piece, to, stride: 2 * step };
        // SAFETY: the kernels fit this CPU.
        #[allow(unsafe_code)]
        unsafe {
            (self.kernels.gather)(job);
        }
    }
}

/// Pairs that a depth takes, filled up.
pub(super) fn padded_pairs(depth: usize) -> usize {
    depth.div_ceil(2).next_multiple_of(STEP)
}

/// Words that [`weight_panels`] fills.
pub(crate) fn panels_len(depth: usize, columns: usize) -> usize {
    columns.div_ceil(PANEL) * padded_pairs(depth) * PANEL
}

/// A weight as pairs `[panels][pairs][PANEL]`: the depth is taps × channels, as in a patch; what is
/// beyond depth and columns is zero.
pub(crate) fn weight_panels(weight: &[f32], axes: Axes, taps: &[Tap], to: &mut [u32]) {
    let Axes { channels, columns, channel_step, column_step } = axes;
    let pairs = padded_pairs(taps.len() * channels);
    to.par_chunks_mut((pairs * PANEL).max(1)).enumerate().for_each(|(index, to)| {
        let first = index * PANEL;
        let width = PANEL.min(columns - first);
        let to = halves(to);
        to.fill(0);
        for (t, tap) in taps.iter().enumerate() {
            for channel in 0..channels {
                let from = tap.index + channel * channel_step + first * column_step;
                let depth = t * channels + channel;
                let row = &mut to[depth / 2 * 2 * PANEL..][..2 * width];
                for (j, value) in row.iter_mut().skip(depth % 2).step_by(2).enumerate() {
                    *value = round(weight[from + j * column_step]);
                }
            }
        }
    });
}

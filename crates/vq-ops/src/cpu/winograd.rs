//! Convolutions of 3×3 taps, and of 4×4 taps at stride 2 (which are four of 2×2 taps, one for each
//! phase of the input), by Winograd's minimal filtering: 4 and 2.56 times fewer multiplications
//! than the definition, at an error of a few units in the sixth digit.

use rayon::prelude::*;

use super::buffers::Buffers;
use super::conv::{Finish, Target, with_scratch};
use super::elements::Elements;
use super::ending::{Ending, Sink};
use super::pack::{Axes, Patches, Place};
use super::tile::{DEPTH, Kernels, Operand, ROW, Tile};
use super::winograd_transform::{Element, Input, OUT, Output, Transforms};
use super::{SharedMut, bf16};
use crate::Precision;

/// Tiles that a task transforms and multiplies at a time: as many rows as the widest kernels take.
const BLOCK: usize = 14;
/// Tiles whose transforms a weight gradient holds at a time: few megabytes, which stay in the caches.
const GRADIENT_TILES: usize = 96;

/// How a patch convolution is cut into tiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Taps along an axis, 2 or 3.
    taps: usize,
    /// One for each phase of the input.
    groups: Vec<Group>,
    /// Tiles per image.
    tiles: (usize, usize),
    /// Depth of the products: groups × channels.
    depth: usize,
    /// The depth is multiplied in pieces of that many (the last may be shorter).
    piece: usize,
}

/// The taps that read one phase of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    /// Offset of its first tap.
    dy: isize,
    /// As `dy`, along the row.
    dx: isize,
    /// Place of each tap in the weight, row by row.
    index: Vec<usize>,
}

impl Plan {
    /// A plan for these patches with that many output channels, where it is faster than the definition with its
    /// products in that precision. All arithmetic is f32 either way: factors in bfloat16 are rounded before the
    /// transforms.
    pub(crate) fn new(
        patches: &Patches,
        columns: usize,
        kernels: &Kernels,
        precision: Precision,
    ) -> Option<Self> {
        let (channels, lanes) = (patches.images.channels, kernels.lanes);
        if !channels.is_multiple_of(lanes)
            || !columns.is_multiple_of(lanes)
            || columns == 0
            || patches.grid.0 == 0
        {
            return None;
        }
        let (step, count) = (patches.step as isize, patches.step * patches.step);
        let taps = match patches.taps.len().checked_div(count)? {
            4 => 2,
            9 => 3,
            _ => return None,
        };
        if precision == Precision::Bf16 && taps < bf16::kernels::kernels().filters_from {
            return None;
        }
        let mut groups: Vec<Group> = Vec::new();
        // The taps are sorted, so a group meets its first tap first and the others row by row.
        for tap in &patches.taps {
            let same = |g: &&mut Group| (tap.dy - g.dy) % step == 0 && (tap.dx - g.dx) % step == 0;
            let group = if let Some(group) = groups.iter_mut().find(same) {
                group
            } else {
                groups.push(Group { dy: tap.dy, dx: tap.dx, index: Vec::new() });
                groups.last_mut()?
            };
            let (y, x) = ((group.index.len() / taps) as isize, (group.index.len() % taps) as isize);
            if (tap.dy, tap.dx) != (group.dy + y * step, group.dx + x * step) {
                return None;
            }
            group.index.push(tap.index);
        }
        if groups.len() != count || groups.iter().any(|g| g.index.len() != taps * taps) {
            return None;
        }
        let tiles = (patches.grid.0.div_ceil(OUT), patches.grid.1.div_ceil(OUT));
        // Tiles that hang over the edge may eat up what the fewer multiplications save.
        let side = taps + OUT - 1;
        if tiles.0 * tiles.1 * side * side * 3 > patches.grid.0 * patches.grid.1 * taps * taps * 2 {
            return None;
        }
        let depth = groups.len() * channels;
        let pieces = depth.div_ceil(DEPTH);
        let piece = depth.div_ceil(pieces).next_multiple_of(lanes);
        Some(Self { taps, groups, tiles, depth, piece })
    }

    fn transforms<'a>(&self, kernels: &'a Kernels) -> &'a Transforms {
        &kernels.winograd[usize::from(self.taps == 3)]
    }

    fn side(&self) -> usize {
        self.taps + OUT - 1
    }

    fn elements(&self) -> usize {
        self.side() * self.side()
    }

    fn pieces(&self) -> usize {
        self.depth.div_ceil(self.piece)
    }

    /// Transforms the patches of `tile` (counted over all images) of every group to
    /// `[elements][pieces][rows][ROW]`, row `row`.
    fn input<T: Element>(
        &self,
        kernels: &Kernels,
        patches: &Patches,
        x: &[T],
        tile: usize,
        (row, rows): (usize, usize),
        to: SharedMut,
    ) {
        let images = patches.images;
        let place = Place::at(tile, self.tiles);
        let side = self.side();
        for (index, group) in self.groups.iter().enumerate() {
            let mut pixels = [None; 36];
            for (i, pixel) in pixels.iter_mut().enumerate().take(self.elements()) {
                let y = ((place.y * OUT + i / side) * patches.step) as isize + group.dy;
                let x = ((place.x * OUT + i % side) * patches.step) as isize + group.dx;
                let inside =
                    y >= 0 && x >= 0 && y < images.height as isize && x < images.width as isize;
                *pixel = inside.then(|| {
                    ((place.image * images.height + y as usize) * images.width + x as usize)
                        * images.channels
                });
            }
            // Channel c of this group is at depth index · channels + c.
            for (start, end) in self.runs(index * images.channels, images.channels) {
                let first = start - index * images.channels;
                let at = (start / self.piece * rows + row) * ROW + start % self.piece;
                let job = Input {
                    from: x.as_ptr().wrapping_add(first),
                    pixels: &pixels,
                    channels: end - start,
                    relu: patches.relu,
                    to: to.get().wrapping_add(at),
                    step: self.pieces() * rows * ROW,
                    run: end - start,
                    run_step: 0,
                };
                // SAFETY: `pixels` lie inside `x`, channels and pieces are multiples of the lanes,
                // and each (group, run, row) has elements of its own in `to`.
                #[allow(unsafe_code)]
                unsafe {
                    T::reader(&self.transforms(kernels).input)(&job);
                }
            }
        }
    }

    /// Cuts `count` depths from `start` on at the borders of the pieces.
    fn runs(&self, start: usize, count: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (piece, end) = (self.piece, start + count);
        let mut at = start;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let next = ((at / piece + 1) * piece).min(end);
                (std::mem::replace(&mut at, next), next)
            })
        })
    }

    /// Where the 4×4 outputs of a tile begin.
    fn outputs(
        &self,
        tile: usize,
        grid: (usize, usize),
        target: &Target,
    ) -> [Option<usize>; OUT * OUT] {
        let place = Place::at(tile, self.tiles);
        std::array::from_fn(|i| {
            let (y, x) = (place.y * OUT + i / OUT, place.x * OUT + i % OUT);
            (y < grid.0 && x < grid.1).then(|| target.offset(Place { image: place.image, y, x }))
        })
    }

    /// The transformed weight, `[elements][panels][depth][panel]`.
    fn weight<T: Element>(
        &self,
        kernels: &Kernels,
        weight: &[f32],
        axes: Axes,
        buffers: &Buffers,
    ) -> super::buffers::Buffer {
        let (panel, lanes) = (kernels.panel, kernels.lanes);
        let panels = axes.columns.div_ceil(panel);
        let step = panels * self.depth * panel;
        let mut all = buffers.take(self.elements() * step);
        let to = SharedMut::new(&mut all);
        (0..panels * self.depth).into_par_iter().with_min_len(8).for_each(|row| {
            let (index, depth) = (row / self.depth, row % self.depth);
            let (group, channel) = (depth / axes.channels, depth % axes.channels);
            let mut taps = [0f32; 9 * 16];
            for half in (0..panel).step_by(lanes) {
                let first = index * panel + half;
                if first >= axes.columns {
                    break;
                }
                for (place, to) in self.groups[group].index.iter().zip(taps.chunks_mut(lanes)) {
                    let from = place + channel * axes.channel_step + first * axes.column_step;
                    for (j, value) in to.iter_mut().enumerate() {
                        *value = T::weight(weight[from + j * axes.column_step]);
                    }
                }
                // SAFETY: `taps` holds R·R registers; each (row, half) has elements of its own, and
                // the buffer holds `elements` times `step`.
                #[allow(unsafe_code)]
                unsafe {
                    let to = to.get().wrapping_add(row * panel + half);
                    (self.transforms(kernels).kernel)(taps.as_ptr(), to, step);
                }
            }
        });
        all
    }
}

/// A patch convolution by `plan`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn multiply<T: Element>(
    plan: &Plan,
    kernels: &Kernels,
    patches: &Patches,
    x: &[T],
    weight: &[f32],
    axes: Axes,
    finish: Finish<'_, Elements<'_>>,
    target: Target,
    buffers: &Buffers,
    sink: Sink,
) {
    let columns = axes.columns;
    let weight = plan.weight::<T>(kernels, weight, axes, buffers);
    let tiles = patches.images.batch * plan.tiles.0 * plan.tiles.1;
    let size = plan.elements() * BLOCK * (plan.pieces() * ROW + columns);
    (0..tiles.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
        let (first, end) = (block * BLOCK, ((block + 1) * BLOCK).min(tiles));
        with_scratch(size, |scratch| {
            let (inputs, products) =
                scratch.split_at_mut(plan.elements() * plan.pieces() * BLOCK * ROW);
            let shared = SharedMut::new(inputs);
            for tile in first..end {
                plan.input(kernels, patches, x, tile, (tile - first, BLOCK), shared);
            }
            let products = SharedMut::new(products);
            let offsets: [usize; BLOCK] = std::array::from_fn(|row| row * columns);
            for element in 0..plan.elements() {
                for piece in 0..plan.pieces() {
                    let start = piece * plan.piece;
                    let depth = plan.piece.min(plan.depth - start);
                    for column in (0..columns).step_by(kernels.panel) {
                        let panels = columns.div_ceil(kernels.panel);
                        let b = (element * panels * plan.depth + start) * kernels.panel
                            + column * plan.depth;
                        for (row, count) in kernels.tiles(end - first) {
                            let a = ((element * plan.pieces() + piece) * BLOCK + row) * ROW;
                            let tile = Tile {
                                depth,
                                a: inputs[a..].as_ptr(),
                                a_step: 1,
                                b: weight[b..].as_ptr(),
                                c: products.get().wrapping_add(element * BLOCK * columns + column),
                                rows: offsets[row..].as_ptr(),
                                columns: kernels.panel.min(columns - column),
                                accumulate: piece > 0,
                                bias: std::ptr::null(),
                                mask: std::ptr::null(),
                                residual: std::ptr::null(),
                            };
                            // SAFETY: the scratch is this task's own; `inputs` holds rows at the
                            // distance ROW, and the weight was cut for these kernels.
                            #[allow(unsafe_code)]
                            unsafe {
                                kernels.run(Operand::Gathered, count, &tile);
                            }
                        }
                    }
                }
            }
            for tile in first..end {
                let job = Output {
                    from: products.get().wrapping_add((tile - first) * columns),
                    step: BLOCK * columns,
                    channels: columns,
                    pixels: &plan.outputs(tile, patches.grid, &target),
                    ending: Ending::new(finish, sink),
                };
                // SAFETY: each output pixel belongs to one tile, each tile to one task.
                #[allow(unsafe_code)]
                unsafe {
                    (plan.transforms(kernels).output)(&job);
                }
            }
        });
    });
}

/// The weight gradient of a patch convolution by `plan`: `small` is `[M, columns]`, one row per
/// patch; adds to nothing, overwrites `gradient` `[outer, inner, KH, KW]` read by `axes`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn weight_gradient<T: Element>(
    plan: &Plan,
    kernels: &Kernels,
    patches: &Patches,
    large: &[T],
    small: (&[T], /* relu */ bool),
    axes: Axes,
    buffers: &Buffers,
    gradient: &mut [f32],
) {
    let (columns, panel, lanes) = (axes.columns, kernels.panel, kernels.lanes);
    let panels = columns.div_ceil(panel);
    let (elements, pieces) = (plan.elements(), plan.pieces());
    let tiles = patches.images.batch * plan.tiles.0 * plan.tiles.1;
    let held = GRADIENT_TILES.min(tiles);
    let mut inputs = buffers.take(elements * pieces * held * ROW);
    let mut outputs = buffers.take(elements * panels * held * panel);
    // [elements][depth][columns]
    let mut sums = buffers.take(elements * plan.depth * columns);
    let target = Target::dense(patches.images.batch, patches.grid, columns);
    for first in (0..tiles).step_by(held) {
        let count = held.min(tiles - first);
        let (to_inputs, to_outputs) = (SharedMut::new(&mut inputs), SharedMut::new(&mut outputs));
        (0..count).into_par_iter().with_min_len(4).for_each(|row| {
            let tile = first + row;
            plan.input(kernels, patches, large, tile, (row, held), to_inputs);
            let job = Input {
                from: small.0.as_ptr(),
                pixels: &plan.outputs(tile, patches.grid, &target),
                channels: columns,
                relu: small.1,
                to: to_outputs.get().wrapping_add(row * panel),
                step: panels * held * panel,
                run: panel,
                run_step: held * panel,
            };
            // SAFETY: the pixels lie inside `small`; each row has elements of its own.
            #[allow(unsafe_code)]
            unsafe {
                T::reader(&plan.transforms(kernels).gradient)(&job);
            }
        });
        let shared = SharedMut::new(&mut sums);
        (0..elements * pieces).into_par_iter().for_each(|task| {
            let (element, piece) = (task / pieces, task % pieces);
            let start = piece * plan.piece;
            let depth = plan.piece.min(plan.depth - start);
            for column in (0..columns).step_by(panel) {
                let b = (element * panels * held + column / panel * held) * panel;
                for (row, height) in kernels.tiles(depth) {
                    let mut rows = [0usize; 16];
                    for (i, offset) in rows.iter_mut().enumerate().take(height) {
                        *offset = (element * plan.depth + start + row + i) * columns;
                    }
                    let tile = Tile {
                        depth: count,
                        a: inputs[task * held * ROW + row..].as_ptr(),
                        a_step: ROW,
                        b: outputs[b..].as_ptr(),
                        c: shared.get().wrapping_add(column),
                        rows: rows.as_ptr(),
                        columns: panel.min(columns - column),
                        accumulate: first > 0,
                        bias: std::ptr::null(),
                        mask: std::ptr::null(),
                        residual: std::ptr::null(),
                    };
                    // SAFETY: each (element, piece) writes rows of its own; `inputs` holds `count`
                    // rows at the distance ROW, `outputs` panels for these kernels.
                    #[allow(unsafe_code)]
                    unsafe {
                        kernels.run(Operand::Transposed, height, &tile);
                    }
                }
            }
        });
    }
    let to = SharedMut::new(gradient);
    (0..plan.depth).into_par_iter().with_min_len(8).for_each(|depth| {
        let (group, channel) = (depth / axes.channels, depth % axes.channels);
        let mut taps = [0f32; 9 * 16];
        for first in (0..columns).step_by(lanes) {
            // SAFETY: `sums` holds `elements` times depth × columns; `taps` has room for R·R
            // registers.
            #[allow(unsafe_code)]
            unsafe {
                let from = sums[depth * columns + first..].as_ptr();
                let step = plan.depth * columns;
                (plan.transforms(kernels).kernel_gradient)(from, step, taps.as_mut_ptr());
            }
            for (place, taps) in plan.groups[group].index.iter().zip(taps.chunks(lanes)) {
                let at = place + channel * axes.channel_step + first * axes.column_step;
                for (j, value) in taps.iter().enumerate() {
                    // SAFETY: below outer · inner · area; each (depth, column, tap) has a place of
                    // its own.
                    #[allow(unsafe_code)]
                    unsafe {
                        *to.get().add(at + j * axes.column_step) = *value;
                    }
                }
            }
        }
    });
}

//! From images and weights to the operands of a tile.
//!
//! A convolution is a product of *patches* (one row per output pixel, the taps' channels side by
//! side) and weights. Patches are gathered for a few rows at a time, never as a whole matrix.

use std::ops::Range;

use rayon::prelude::*;

/// The sizes of a channels-last batch of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Images {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

impl Images {
    pub(crate) fn pixels(self) -> usize {
        self.batch * self.height * self.width
    }

    pub(crate) fn len(self) -> usize {
        self.pixels() * self.channels
    }
}

/// Copies that many elements.
///
/// # Safety
/// The pointers must cover them, and the CPU must have the function's instruction set.
pub(crate) type CopyFn = unsafe fn(*const f32, *mut f32, usize);

/// One tap of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tap {
    /// Offset of the pixel it reads from the patch's base pixel.
    pub dy: isize,
    /// As `dy`, along the row.
    pub dx: isize,
    /// `ky · KW + kx`: its place in the weight.
    pub index: usize,
}

/// Taps that lie side by side in memory: `count` pixels from `(dy, dx)` on.
#[derive(Clone, Copy, Debug)]
struct Run {
    dy: isize,
    dx: isize,
    count: usize,
    first_tap: usize,
}

/// How patches are read: output pixel `(y, x)` reads `(y·step + dy, x·step + dx)` for each tap.
#[derive(Clone, Debug)]
pub(crate) struct Patches {
    pub images: Images,
    /// Rows and columns of patches per image.
    pub grid: (usize, usize),
    pub step: usize,
    pub taps: Vec<Tap>,
    runs: Vec<Run>,
    /// Whether ReLU is applied to what is read.
    pub relu: bool,
}

impl Patches {
    pub(crate) fn new(
        images: Images,
        grid: (usize, usize),
        step: usize,
        mut taps: Vec<Tap>,
        relu: bool,
    ) -> Self {
        taps.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for (first_tap, tap) in taps.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.dy == tap.dy && run.dx + run.count as isize == tap.dx => {
                    run.count += 1;
                }
                _ => runs.push(Run { dy: tap.dy, dx: tap.dx, count: 1, first_tap }),
            }
        }
        Self { images, grid, step, taps, runs, relu }
    }

    /// Length of a patch: taps × channels.
    pub(crate) fn depth(&self) -> usize {
        self.taps.len() * self.images.channels
    }

    /// Number of patches.
    pub(crate) fn rows(&self) -> usize {
        self.images.batch * self.grid.0 * self.grid.1
    }
}

/// Elements `depth` of the patches `rows`, copied to `to`, a row every `stride` elements.
pub(crate) struct Gather<'a, T> {
    pub patches: &'a Patches,
    pub x: &'a [T],
    pub rows: Range<usize>,
    pub depth: Range<usize>,
    pub to: &'a mut [T],
    pub stride: usize,
}

/// Does a [`Gather`].
///
/// # Safety
/// The CPU must have the function's instruction set.
pub(crate) type GatherFn<T> = unsafe fn(Gather<'_, T>);

/// Does a [`Gather`] by functions that copy (or clear) as many elements as their last argument says.
///
/// # Safety
/// The functions must do no more than that.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn gather<T>(
    job: Gather<'_, T>,
    copy: impl Fn(*const T, *mut T, usize),
    clear: impl Fn(*mut T, usize),
) {
    let Gather { patches, x, rows, depth, to, stride } = job;
    let Images { height, width, channels, .. } = patches.images;
    assert!(x.len() == patches.images.len() && rows.end <= patches.rows());
    assert!(depth.end <= patches.depth() && depth.len() <= stride);
    assert!(rows.is_empty() || (rows.len() - 1) * stride + depth.len() <= to.len());
    for run in &patches.runs {
        // This run's share of the patch, in elements from the run's start.
        let start = run.first_tap * channels;
        let first = depth.start.max(start) - start;
        let end = depth.end.min(start + run.count * channels).saturating_sub(start);
        if first >= end {
            continue;
        }
        let mut to = to.as_mut_ptr().wrapping_add(start + first - depth.start);
        let mut place = Place::at(rows.start, patches.grid);
        let mut left = rows.len();
        while left > 0 {
            // The patches of one row of the grid, or the wanted part of it.
            let count = left.min(patches.grid.1 - place.x);
            let y = (place.y * patches.step) as isize + run.dy;
            let row = (0..height as isize).contains(&y).then(|| {
                let pixels = (place.image * height + y as usize) * width;
                x.as_ptr().wrapping_add(pixels * channels)
            });
            for column in place.x..place.x + count {
                let x0 = (column * patches.step) as isize + run.dx;
                // The part of the run that lies inside the image: nearly always all of it.
                let (from, until) = if x0 >= 0 && x0 + run.count as isize <= width as isize {
                    (first, end)
                } else {
                    let outside = (-x0).clamp(0, run.count as isize) as usize * channels;
                    let inside = (width as isize - x0).clamp(0, run.count as isize) as usize;
                    (first.max(outside), end.min(inside * channels))
                };
                match row {
                    Some(row) if from < until => {
                        if from > first {
                            clear(to, from - first);
                        }
                        // SAFETY of what the pointers are used for: pixels x0 + from/channels to
                        // x0 + until/channels lie in a row of the image, and the asserted lengths cover
                        // every row of `to`.
                        let at = x0 * channels as isize + from as isize;
                        let to = to.wrapping_add(from - first);
                        copy(row.wrapping_offset(at), to, until - from);
                        if until < end {
                            clear(to.wrapping_add(until - from), end - until);
                        }
                    }
                    _ => clear(to, end - first),
                }
                to = to.wrapping_add(stride);
            }
            left -= count;
            place.next_row(patches.grid);
        }
    }
}

/// A patch's image, row and column.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub image: usize,
    pub y: usize,
    pub x: usize,
}

impl Place {
    pub(crate) fn at(row: usize, grid: (usize, usize)) -> Self {
        let (image, rest) = (row / (grid.0 * grid.1), row % (grid.0 * grid.1));
        Self { image, y: rest / grid.1, x: rest % grid.1 }
    }

    pub(crate) fn next(&mut self, grid: (usize, usize)) {
        self.x += 1;
        if self.x == grid.1 {
            self.next_row(grid);
        }
    }

    /// The first column of the next row.
    fn next_row(&mut self, grid: (usize, usize)) {
        self.x = 0;
        self.y += 1;
        if self.y == grid.0 {
            self.y = 0;
            self.image += 1;
        }
    }
}

/// Which axis of a weight `[outer, inner, KH, KW]` runs along the depth of the product; the other
/// one gives its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DepthAxis {
    Outer,
    Inner,
}

/// How a weight `[outer, inner, KH, KW]` is read as depth × columns.
#[derive(Clone, Copy)]
pub(crate) struct Axes {
    /// Channels along the depth.
    pub channels: usize,
    /// Channels along the columns.
    pub columns: usize,
    /// Elements between neighbouring channels of the depth.
    pub channel_step: usize,
    /// Elements between neighbouring columns.
    pub column_step: usize,
}

impl Axes {
    /// For a weight of that shape, (outer, inner, KH · KW).
    pub(crate) fn new((outer, inner, area): (usize, usize, usize), axis: DepthAxis) -> Self {
        let (channels, columns, channel_step, column_step) = match axis {
            DepthAxis::Outer => (outer, inner, inner * area, area),
            DepthAxis::Inner => (inner, outer, area, inner * area),
        };
        Self { channels, columns, channel_step, column_step }
    }
}

/// A weight `[outer, inner, KH, KW]` as a matrix `[taps · depth channels, columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub weight: &'a [f32],
    pub axes: Axes,
    /// The taps that are taken, in the order of the depth.
    pub taps: &'a [Tap],
}

impl Matrix<'_> {
    fn depth(&self) -> usize {
        self.taps.len() * self.axes.channels
    }
}

/// How long the panels of matrices are that stand one on top of the other.
pub(crate) fn panels_len(matrices: &[Matrix<'_>], panel: usize) -> usize {
    let depth: usize = matrices.iter().map(Matrix::depth).sum();
    let columns = matrices.first().map_or(0, |matrix| matrix.axes.columns);
    columns.div_ceil(panel) * depth * panel
}

/// Matrices with the same columns, one on top of the other, cut into panels of `panel` columns
/// (`[panels][depth][panel]`, the last one filled up with zeros).
pub(crate) fn weight_panels(matrices: &[Matrix<'_>], panel: usize, to: &mut [f32]) {
    let depth: usize = matrices.iter().map(Matrix::depth).sum();
    let cut = |(index, mut to): (usize, &mut [f32])| {
        let first = index * panel;
        for Matrix { weight, axes, taps } in matrices {
            let width = panel.min(axes.columns - first);
            for tap in *taps {
                for channel in 0..axes.channels {
                    let from = tap.index + channel * axes.channel_step + first * axes.column_step;
                    let (row, rest) = to.split_at_mut(panel);
                    for (j, value) in row[..width].iter_mut().enumerate() {
                        *value = weight[from + j * axes.column_step];
                    }
                    row[width..].fill(0.);
                    to = rest;
                }
            }
        }
    };
    // Little is not worth another thread's while.
    if to.len() < 1 << 14 {
        to.chunks_mut((depth * panel).max(1)).enumerate().for_each(cut);
    } else {
        to.par_chunks_mut((depth * panel).max(1)).enumerate().for_each(cut);
    }
}

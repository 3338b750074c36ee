//! What the passes of the priors' networks are made of: products over the rows of a few images, and the
//! gradients of all weights over all of them.

use std::ops::Range;

use rayon::prelude::*;

use super::buffers::{Buffer, Buffers};
use super::conv::{Finish, Product, Rows, Target};
use super::pack::{Axes, DepthAxis, Images, Matrix, Patches, Tap, panels_len, weight_panels};
use super::tile::kernels;
use super::weight_gradient::{Piece, column_gradients};

/// Rows that a task takes through the layers at a time, about.
const ROWS: usize = 128;
/// Columns of a weight whose gradients a task sums.
const COLUMNS: usize = 64;

/// Images that a task takes through the layers at a time: by shape alone.
pub(super) fn block_images(batch: usize, pixels: usize) -> usize {
    (ROWS / pixels.max(1)).clamp(1, batch.max(1))
}

/// A layer, and which of its two vectors and masks.
pub(super) type Place = (usize, usize);

/// The vectors `[B or 1, L, 4C]` that the layers are given: two of two halves for each.
#[derive(Clone, Copy)]
pub(super) struct Vectors<'a> {
    pub values: &'a [f32],
    pub channels: usize,
    pub layers: usize,
    /// Whether each image has its own.
    pub own: bool,
}

impl<'a> Vectors<'a> {
    /// The halves of a vector of that image of the batch.
    pub(super) fn halves(&self, place: Place, image: usize) -> (&'a [f32], &'a [f32]) {
        let image = if self.own { image } else { 0 };
        let first = image * self.width() + self.offset(place);
        self.values[first..first + 2 * self.channels].split_at(self.channels)
    }

    /// Where in an image's vectors one begins.
    pub(super) fn offset(&self, (layer, which): Place) -> usize {
        (2 * layer + which) * 2 * self.channels
    }

    /// Length of an image's vectors.
    pub(super) fn width(&self) -> usize {
        self.layers * 4 * self.channels
    }

    /// Gradients `[B, L, 4C]`, added up in order where all images share the vectors.
    pub(super) fn shared(&self, of_images: Vec<f32>) -> Vec<f32> {
        if self.own {
            return of_images;
        }
        let mut sum = vec![0.; self.width()];
        for vectors in of_images.chunks(self.width()) {
            for (sum, value) in sum.iter_mut().zip(vectors) {
                *sum += value;
            }
        }
        sum
    }
}

/// The gradients of a network's input, vectors and parameters.
pub(crate) struct Gradients {
    pub input: Vec<f32>,
    pub vectors: Vec<f32>,
    pub theta: Option<Vec<f32>>,
}

/// A weight `[outputs, inputs, KH, KW]` and its bias within all parameters.
#[derive(Debug)]
pub(crate) struct Part {
    pub weight: Range<usize>,
    pub bias: Range<usize>,
    pub outputs: usize,
    pub inputs: usize,
    pub kernel: [usize; 2],
}

impl Part {
    fn area(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// The weight as a matrix of those taps.
    pub(super) fn matrix<'a>(
        &self,
        theta: &'a [f32],
        axis: DepthAxis,
        taps: &'a [Tap],
    ) -> Matrix<'a> {
        let axes = Axes::new((self.outputs, self.inputs, self.area()), axis);
        Matrix { weight: &theta[self.weight.clone()], axes, taps }
    }

    /// The taps of a kernel whose last row is the pixel's own, and whose column `left` is; `mirrored` for those
    /// that look at a pixel.
    pub(super) fn taps(&self, left: usize, mirrored: bool) -> Vec<Tap> {
        let [rows, columns] = self.kernel;
        let sign = if mirrored { -1 } else { 1 };
        (0..rows * columns)
            .map(|index| Tap {
                dy: sign * ((index / columns) as isize - (rows - 1) as isize),
                dx: sign * ((index % columns) as isize - left as isize),
                index,
            })
            .collect()
    }
}

/// Every pixel's channels by themselves.
pub(super) fn own_pixel(images: usize, grid: (usize, usize), channels: usize) -> Patches {
    let (height, width) = grid;
    let images = Images { batch: images, height, width, channels };
    Patches::new(images, grid, 1, vec![Tap { dy: 0, dx: 0, index: 0 }], false)
}

impl Patches {
    pub(super) fn rows_of<'a>(&'a self, x: &'a [f32]) -> Rows<'a> {
        Rows { patches: self, x }
    }
}

/// The panels of matrices that stand one on top of the other.
pub(super) fn pack(matrices: &[Matrix<'_>], buffers: &Buffers) -> Buffer {
    let panel = kernels().panel;
    let mut to = buffers.take(panels_len(matrices, panel));
    weight_panels(matrices, panel, &mut to);
    to
}

/// A pass over a network.
pub(crate) struct Pass<'a, P> {
    pub plan: &'a P,
    /// All parameters, side by side.
    pub theta: &'a [f32],
    /// Those that the layers are given for each image, or for all.
    pub vectors: &'a [f32],
    pub buffers: &'a Buffers,
}

/// `out` = the sources side by side × the panels; see [`Product::run`].
pub(super) fn multiply(sources: &[Rows<'_>], panels: &[f32], finish: Finish<'_>, out: &mut [f32]) {
    product(sources, panels, finish, false, out);
}

/// [`multiply`], added to what is there if `accumulate`.
pub(super) fn product(
    sources: &[Rows<'_>],
    panels: &[f32],
    finish: Finish<'_>,
    accumulate: bool,
    out: &mut [f32],
) {
    let Some(Rows { patches, .. }) = sources.first() else { return };
    let columns = out.len() / patches.rows().max(1);
    let target = Target::dense(patches.images.batch, patches.grid, columns);
    Product { kernels: kernels(), sources, panels, accumulate, finish, target }.run(out);
}

/// The biases of parts that are added up, as one.
pub(super) fn sum_of_biases<'p>(
    parts: impl IntoIterator<Item = &'p Part>,
    theta: &[f32],
) -> Vec<f32> {
    let mut sum: Vec<f32> = Vec::new();
    for part in parts {
        let bias = &theta[part.bias.clone()];
        sum.resize(bias.len(), 0.);
        for (sum, value) in sum.iter_mut().zip(bias) {
            *sum += value;
        }
    }
    sum
}

/// The gradients of all parameters `[length]`, whose parts are given in the order in which they lie, each with
/// what it is summed over.
pub(super) fn parameter_gradients(parts: &[(&Part, Vec<Piece<'_>>)], length: usize) -> Vec<f32> {
    let mut theta = vec![0.; length];
    let mut rest = &mut theta[..];
    let mut tasks = Vec::new();
    for (part, pieces) in parts {
        let size = part.inputs * part.area();
        let (of_weight, after) = std::mem::take(&mut rest).split_at_mut(part.weight.len());
        let (of_bias, after) = after.split_at_mut(part.bias.len());
        rest = after;
        let columns = of_weight.chunks_mut(COLUMNS * size).zip(of_bias.chunks_mut(COLUMNS));
        for (number, gradients) in columns.enumerate() {
            let first = number * COLUMNS;
            tasks.push((*part, pieces, first..first + gradients.1.len(), gradients));
        }
    }
    tasks.into_par_iter().for_each(|(part, pieces, columns, gradients)| {
        column_gradients(pieces, part.outputs, columns, part.area(), gradients);
    });
    theta
}

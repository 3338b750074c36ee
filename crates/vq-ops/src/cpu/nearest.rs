//! The nearest code of each vector, without a matrix of distances.
//!
//! `argmin_k ‖z − e_k‖² = argmin_k (½‖e_k‖² − z·e_k)`: tiles of products in f32 find the best and
//! the second-best score of a row. Where the two are closer than rounding can tell apart, that row
//! is searched again with exact differences in f64, so that the answer is the true nearest code,
//! whatever the tiles, the instruction set or the other rows. Vectors and codes are first shifted
//! by the codebook's mean, which leaves distances as they are and keeps the products small.

use rayon::prelude::*;

use super::conv::with_scratch;
use super::tile::{Kernels, SearchTile, kernels};

/// Rows that a task holds at a time; they stay in the second-level cache.
const BLOCK: usize = 448;
/// Rows that meet a panel of codes at a time; they stay in the first-level cache, where tiles of 14, 6
/// and 4 rows leave few over.
const ROWS: usize = 56;
/// Elements of the codebook that all rows of a block meet before the next ones are read.
const CODES: usize = 1 << 16;

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotFinite {
    /// That row of the vectors.
    Vector(usize),
    /// That row of the codebook.
    Code(usize),
}

/// `z` `[N, dim]`, `codebook` `[K, dim]` → `[N]`.
pub(crate) fn nearest(z: &[f32], codebook: &[f32], dim: usize) -> Result<Vec<u32>, NotFinite> {
    let search = Search::new(z, codebook, dim)?;
    let count = z.len() / dim;
    let mut codes = vec![0u32; count];
    let found: Vec<Option<usize>> = codes
        .par_chunks_mut(BLOCK)
        .enumerate()
        .map(|(block, codes)| search.block(block * BLOCK, codes))
        .collect();
    match found.into_iter().flatten().next() {
        Some(row) => Err(NotFinite::Vector(row)),
        None => Ok(codes),
    }
}

struct Search<'a> {
    kernels: &'static Kernels,
    z: &'a [f32],
    codebook: &'a [f32],
    dim: usize,
    mean: Vec<f32>,
    /// `−(e_k − mean)`, `[panels][dim][panel]`.
    panels: Vec<f32>,
    /// `½‖e_k − mean‖²`, filled up to whole panels with infinity.
    half_norms: Vec<f32>,
    /// The greatest `‖e_k − mean‖`.
    radius: f32,
}

impl<'a> Search<'a> {
    fn new(z: &'a [f32], codebook: &'a [f32], dim: usize) -> Result<Self, NotFinite> {
        let kernels = kernels();
        if let Some(code) =
            codebook.par_chunks(dim).position_first(|e| e.iter().any(|v| !v.is_finite()))
        {
            return Err(NotFinite::Code(code));
        }
        let count = codebook.len() / dim;
        let mut mean = vec![0f64; dim];
        for code in codebook.chunks(dim) {
            for (sum, value) in mean.iter_mut().zip(code) {
                *sum += f64::from(*value) / count as f64;
            }
        }
        let mean: Vec<f32> = mean.into_iter().map(|v| v as f32).collect();
        let panel = kernels.panel;
        let mut panels = vec![0.; count.div_ceil(panel) * dim * panel];
        panels.par_chunks_mut(dim * panel).zip(codebook.par_chunks(dim * panel)).for_each(
            |(to, codes)| {
                for (j, code) in codes.chunks(dim).enumerate() {
                    for (d, (value, mean)) in code.iter().zip(&mean).enumerate() {
                        to[d * panel + j] = mean - value;
                    }
                }
            },
        );
        let mut half_norms: Vec<f32> = codebook
            .par_chunks(dim)
            .map(|code| {
                let norm: f64 = code.iter().zip(&mean).map(|(v, m)| f64::from(v - m).powi(2)).sum();
                (0.5 * norm) as f32
            })
            .collect();
        let radius = (2. * half_norms.iter().copied().fold(0., f32::max)).sqrt();
        half_norms.resize(count.div_ceil(panel) * panel, f32::INFINITY);
        Ok(Self { kernels, z, codebook, dim, mean, panels, half_norms, radius })
    }

    /// The codes of the rows from `first` on, or the row that is not finite.
    fn block(&self, first: usize, codes: &mut [u32]) -> Option<usize> {
        let (dim, rows, lanes) = (self.dim, codes.len(), self.kernels.lanes);
        let total = self.codebook.len() / dim;
        // An odd number of cache lines, so that the rows of a tile fall into different cache sets.
        let step = (dim.div_ceil(16) | 1) * 16;
        let mut best = [(f32::INFINITY, 0u32); BLOCK];
        let mut second = [f32::INFINITY; BLOCK];
        with_scratch(rows * (step + 3 * lanes), |scratch| {
            let (shifted, state) = scratch.split_at_mut(rows * step);
            for (row, to) in shifted.chunks_mut(step).enumerate() {
                let z = &self.z[(first + row) * dim..][..dim];
                for ((to, value), mean) in to.iter_mut().zip(z).zip(&self.mean) {
                    *to = value - mean;
                }
            }
            state.fill(f32::INFINITY);
            self.scores(shifted, step, rows, state);
            for (row, state) in state.chunks(3 * lanes).enumerate() {
                (best[row], second[row]) = merge(state, lanes);
            }
        });
        for (row, code) in codes.iter_mut().enumerate() {
            let z = &self.z[(first + row) * dim..][..dim];
            let norm: f32 =
                z.iter().zip(&self.mean).map(|(v, m)| (v - m) * (v - m)).sum::<f32>().sqrt();
            // Each score is a sum of `dim` rounded products of at most ‖z‖·‖e‖ in all.
            let rounding = f32::EPSILON * (dim as f32 + 8.) * self.radius * (norm + self.radius);
            *code = best[row].1;
            // A value that is not a number makes this false.
            let clear = total == 1 || second[row] - best[row].0 > 2. * rounding;
            if !clear || !norm.is_finite() {
                if z.iter().any(|v| !v.is_finite()) {
                    return Some(first + row);
                }
                *code = exact(z, self.codebook);
            }
        }
        None
    }

    /// Takes the scores of all codes into `state`.
    fn scores(&self, shifted: &[f32], step: usize, rows: usize, state: &mut [f32]) {
        let (dim, panel, lanes) = (self.dim, self.kernels.panel, self.kernels.lanes);
        let panels = self.half_norms.len() / panel;
        let group = (CODES / (dim * panel)).max(1);
        for start in (0..panels).step_by(group) {
            for first in (0..rows).step_by(ROWS) {
                for index in start..(start + group).min(panels) {
                    for (row, height) in self.kernels.tiles(ROWS.min(rows - first)) {
                        let row = first + row;
                        let tile = SearchTile {
                            depth: dim,
                            a: shifted[row * step..].as_ptr(),
                            a_step: step,
                            b: self.panels[index * dim * panel..].as_ptr(),
                            norms: self.half_norms[index * panel..].as_ptr(),
                            register: (index * panel / lanes) as u32,
                            state: state[row * 3 * lanes..].as_mut_ptr(),
                        };
                        // SAFETY: `shifted` and `state` hold all rows, and the panels were cut for
                        // these kernels.
                        #[allow(unsafe_code)]
                        unsafe {
                            self.kernels.search(height, &tile);
                        }
                    }
                }
            }
        }
    }
}

/// A row's best score with its code (the lowest among equals), and its second-best score, from those
/// of each lane.
fn merge(state: &[f32], lanes: usize) -> ((f32, u32), f32) {
    let (mut best, mut second) = ((f32::INFINITY, 0), f32::INFINITY);
    for lane in 0..lanes {
        let score = state[lane];
        let code = state[2 * lanes + lane].to_bits().wrapping_mul(lanes as u32) + lane as u32;
        #[allow(clippy::float_cmp)] // a tie is exact equality
        let closer = score < best.0 || (score == best.0 && code < best.1);
        second = second.min(if closer { best.0 } else { score }).min(state[lanes + lane]);
        if closer {
            best = (score, code);
        }
    }
    (best, second)
}

/// Direct differences in f64; the lowest index among ties.
fn exact(z: &[f32], codebook: &[f32]) -> u32 {
    let mut best = (f64::INFINITY, 0);
    for (code, e) in (0u32..).zip(codebook.chunks(z.len())) {
        let mut distance = 0.;
        for (z, e) in z.chunks(32).zip(e.chunks(32)) {
            distance +=
                z.iter().zip(e).map(|(z, e)| (f64::from(*z) - f64::from(*e)).powi(2)).sum::<f64>();
            if distance > best.0 {
                break;
            }
        }
        if distance < best.0 {
            best = (distance, code);
        }
    }
    best.1
}

/// Counts `[K]` and sums `[K, dim]` of the vectors that chose each code, added in the order of the
/// vectors: tasks take ranges of codes, not of vectors.
pub(crate) fn statistics(
    z: &[f32],
    codes: &[u32],
    dim: usize,
    codebook_size: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut counts = vec![0f32; codebook_size];
    // A counting sort: the vectors of each code, in order.
    let mut starts = vec![0usize; codebook_size + 1];
    for code in codes {
        counts[*code as usize] += 1.;
        starts[*code as usize + 1] += 1;
    }
    for i in 1..starts.len() {
        starts[i] += starts[i - 1];
    }
    let mut order = vec![0u32; codes.len()];
    let mut next = starts.clone();
    for (row, code) in (0u32..).zip(codes) {
        let place = &mut next[*code as usize];
        order[*place] = row;
        *place += 1;
    }
    let mut sums = vec![0f32; codebook_size * dim];
    sums.par_chunks_mut(dim).enumerate().with_min_len(16).for_each(|(code, sum)| {
        for row in &order[starts[code]..starts[code + 1]] {
            for (sum, value) in sum.iter_mut().zip(&z[*row as usize * dim..][..dim]) {
                *sum += value;
            }
        }
    });
    (counts, sums)
}

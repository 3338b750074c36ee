//! The nearest code of each vector, without a matrix of distances.
//!
//! `argmin_k ‖z − e_k‖² = argmin_k (½‖e_k‖² − z·e_k)`: tiles of products in f32 find the best and
//! the second-best score of a row. Where the two are closer than rounding can tell apart, that row
//! is searched again with exact differences in f64, so that the answer is the true nearest code,
//! whatever the tiles, the instruction set or the other rows. Vectors and codes are first shifted
//! by the codebook's mean, which leaves distances as they are and keeps the products small.

use rayon::prelude::*;

use super::SharedMut;
use super::conv::with_scratch;
use super::tile::{DEPTH, Kernels, Operand, ROW, Tile, kernels};

/// Rows that a task holds at a time.
const BLOCK: usize = 112;
/// Codes whose scores a task holds at a time: `BLOCK × CODES` f32 stay in the second-level cache.
const CODES: usize = 512;

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
    /// `½‖e_k − mean‖²`.
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
        let half_norms: Vec<f32> = codebook
            .par_chunks(dim)
            .map(|code| {
                let norm: f64 = code.iter().zip(&mean).map(|(v, m)| f64::from(v - m).powi(2)).sum();
                (0.5 * norm) as f32
            })
            .collect();
        let radius = (2. * half_norms.iter().copied().fold(0., f32::max)).sqrt();
        Ok(Self { kernels, z, codebook, dim, mean, panels, half_norms, radius })
    }

    /// The codes of the rows from `first` on, or the row that is not finite.
    fn block(&self, first: usize, codes: &mut [u32]) -> Option<usize> {
        let (dim, rows) = (self.dim, codes.len());
        let depths = dim.div_ceil(DEPTH);
        let mut best = [(f32::INFINITY, 0u32); BLOCK];
        let mut second = [f32::INFINITY; BLOCK];
        let scratch = BLOCK * (ROW * depths + CODES);
        let total = self.codebook.len() / dim;
        with_scratch(scratch, |scratch| {
            let (shifted, scores) = scratch.split_at_mut(BLOCK * ROW * depths);
            for row in 0..rows {
                let z = &self.z[(first + row) * dim..][..dim];
                for (d, (value, mean)) in z.iter().zip(&self.mean).enumerate() {
                    // Depth d of row r lies in the slab d / DEPTH, as the kernels read it.
                    shifted[(d / DEPTH * BLOCK + row) * ROW + d % DEPTH] = value - mean;
                }
            }
            for start in (0..total).step_by(CODES) {
                let count = CODES.min(total - start);
                self.scores(shifted, rows, start, count, scores);
                for row in 0..rows {
                    let scores = &scores[row * CODES..][..count];
                    // SAFETY: `kernels()` chose what this CPU has.
                    #[allow(unsafe_code)]
                    unsafe {
                        (self.kernels.merge)(
                            scores,
                            start as u32,
                            &mut best[row],
                            &mut second[row],
                        );
                    }
                }
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

    /// Scores of `count` codes from `start` on, `[rows, CODES]`.
    fn scores(&self, shifted: &[f32], rows: usize, start: usize, count: usize, scores: &mut [f32]) {
        let (dim, panel) = (self.dim, self.kernels.panel);
        let depths = dim.div_ceil(DEPTH);
        let offsets: [usize; BLOCK] = std::array::from_fn(|row| row * CODES);
        let scores = SharedMut::new(scores);
        for slab in 0..depths {
            let depth = DEPTH.min(dim - slab * DEPTH);
            for column in (0..count).step_by(panel) {
                let b = &self.panels[(start + column) * dim + slab * DEPTH * panel..];
                for (row, height) in self.kernels.tiles(rows) {
                    let last = slab + 1 == depths;
                    let tile = Tile {
                        depth,
                        a: shifted[(slab * BLOCK + row) * ROW..].as_ptr(),
                        a_step: 1,
                        b: b.as_ptr(),
                        c: scores.get().wrapping_add(column),
                        rows: offsets[row..].as_ptr(),
                        columns: panel.min(count - column),
                        accumulate: slab > 0,
                        bias: if last {
                            self.half_norms[start + column..].as_ptr()
                        } else {
                            std::ptr::null()
                        },
                        mask: std::ptr::null(),
                        residual: std::ptr::null(),
                    };
                    // SAFETY: `scores` belongs to this task; `shifted` holds its rows at the
                    // distance ROW, and the panels were cut for these kernels.
                    #[allow(unsafe_code)]
                    unsafe {
                        self.kernels.run(Operand::Gathered, height, &tile);
                    }
                }
            }
        }
    }
}

/// Takes a run of scores, of the codes from `start` on, into the best (lowest index among equals)
/// and the second-best score so far.
#[inline(always)]
pub(super) fn merge(scores: &[f32], start: u32, best: &mut (f32, u32), second: &mut f32) {
    const LANES: usize = 16;
    let (mut lane_best, mut lane_second) = ([f32::INFINITY; LANES], [f32::INFINITY; LANES]);
    let mut lane_step = [0u32; LANES];
    for (step, chunk) in (0u32..).zip(scores.chunks(LANES)) {
        for (lane, &score) in chunk.iter().enumerate() {
            let closer = score < lane_best[lane];
            lane_second[lane] = lane_second[lane].min(if closer { lane_best[lane] } else { score });
            lane_best[lane] = if closer { score } else { lane_best[lane] };
            lane_step[lane] = if closer { step } else { lane_step[lane] };
        }
    }
    for lane in 0..LANES {
        let candidate = (lane_best[lane], start + lane_step[lane] * LANES as u32 + lane as u32);
        #[allow(clippy::float_cmp)] // a tie is exact equality
        let closer = candidate.0 < best.0 || (candidate.0 == best.0 && candidate.1 < best.1);
        let loser = if closer { best.0 } else { candidate.0 };
        *second = second.min(loser).min(lane_second[lane]);
        if closer {
            *best = candidate;
        }
    }
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

//! The nearest code of each vector, without a matrix of distances.
//!
//! `argmin_k ‖z − e_k‖² = argmin_k (½‖e_k‖² − z·e_k)`: tiles of products in f32 find the best and
//! the second-best score of a row in each lane. Where a lane's score is closer to the row's best than rounding
//! can tell apart, its code is compared with the best one by exact differences in f64, so that the answer is
//! the true nearest code, whatever the tiles, the instruction set or the other rows. Vectors and codes are
//! first shifted by the codebook's middle, which leaves distances as they are and keeps the products small.

use rayon::prelude::*;

use super::codebook::Codebook;
use super::conv::with_scratch;
use super::tile::{Kernels, PANEL_REGISTERS, SearchTile, kernels};

/// Rows that a task holds at a time; they stay in the second-level cache.
pub(super) const BLOCK: usize = 448;
/// Rows that meet a panel of codes at a time; they stay in the first-level cache, where tiles of 14, 6
/// and 4 rows leave few over.
const ROWS: usize = 56;
/// Elements of the codebook that all rows of a block meet before the next ones are read.
const CODES: usize = 1 << 16;
/// A row whose products may be larger is searched in f64: a score in f32 might overflow.
const LARGEST: f64 = 1e37;

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
    let kernels = kernels();
    let codebook = Codebook::new(codebook, dim, kernels).map_err(NotFinite::Code)?;
    let search = Search { kernels, z, codebook };
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
    codebook: Codebook<'a>,
}

/// A row for which the lanes' best and second-best scores do not tell all codes that may be the nearest.
struct Unclear {
    /// Counted from the block's first.
    row: usize,
    /// Codes of a higher score are farther away than another one.
    limit: f32,
    /// The nearest code so far.
    best: u32,
}

impl Search<'_> {
    /// The codes of the rows from `first` on, or the row that is not finite.
    fn block(&self, first: usize, codes: &mut [u32]) -> Option<usize> {
        let (dim, rows, lanes) = (self.codebook.dim, codes.len(), self.kernels.lanes);
        // An odd number of cache lines, so that the rows of a tile fall into different cache sets.
        let step = (dim.div_ceil(16) | 1) * 16;
        with_scratch(rows * (step + 3 * lanes), |scratch| {
            let (shifted, state) = scratch.split_at_mut(rows * step);
            for (row, to) in shifted.chunks_mut(step).enumerate() {
                let z = &self.z[(first + row) * dim..][..dim];
                for ((to, value), center) in to.iter_mut().zip(z).zip(&self.codebook.center) {
                    *to = value - center;
                }
            }
            state.fill(f32::INFINITY);
            self.scores(shifted, step, rows, state);
            let mut unclear = Vec::new();
            let each = shifted.chunks(step).zip(state.chunks(3 * lanes)).zip(&mut *codes);
            for (row, ((shifted, state), code)) in each.enumerate() {
                let z = &self.z[(first + row) * dim..][..dim];
                match self.judge(row, z, &shifted[..dim], state, code) {
                    Ok(more) => unclear.extend(more),
                    Err(()) => return Some(first + row),
                }
            }
            self.settle(first, shifted, step, state, &mut unclear);
            for Unclear { row, best, .. } in unclear {
                codes[row] = best;
            }
            None
        })
    }

    /// Finds a row's code in its scores, as far as they tell. An error if the row is not finite.
    fn judge(
        &self,
        row: usize,
        z: &[f32],
        shifted: &[f32],
        state: &[f32],
        code: &mut u32,
    ) -> Result<Option<Unclear>, ()> {
        let (codebook, lanes) = (&self.codebook, self.kernels.lanes);
        let norm = length(shifted);
        // True of what is not a number, too.
        let fits = codebook.radius * (norm + codebook.radius) < LARGEST;
        if !fits {
            if z.iter().any(|value| !value.is_finite()) {
                return Err(());
            }
            *code = exact(z, codebook);
            return Ok(None);
        }
        let ((score, best), second) = merge(state, lanes);
        *code = best;
        let gap = f64::from(second) - f64::from(score);
        if codebook.len() == 1 || gap > 2. * self.rounding(norm, codebook.radius) {
            return Ok(None);
        }
        // The nearest code is no farther from the vector than this one, and so not that far from the middle.
        let reach = (norm + distance(z, codebook.code(best))) * (1. + 1e-6);
        let margin = 2. * self.rounding(norm, reach.min(codebook.radius));
        if gap > margin {
            return Ok(None);
        }
        let limit = ((f64::from(score) + margin) as f32).next_up();
        for lane in (0..lanes).filter(|lane| state[*lane] <= limit) {
            *code = nearer(z, codebook, *code, lane_code(state, lanes, lane));
        }
        let is_unclear = state[lanes..2 * lanes].iter().any(|second| *second <= limit);
        Ok(is_unclear.then_some(Unclear { row, limit, best: *code }))
    }

    /// By how much the score of a code may be off that is at most `reach` from the middle: it is a sum of `dim`
    /// rounded products of at most `norm · reach` in all, and each may lose what is below the least number.
    fn rounding(&self, norm: f64, reach: f64) -> f64 {
        let least = f64::from(f32::from_bits(1));
        let terms = self.codebook.dim as f64 + 8.;
        terms * (f64::from(f32::EPSILON) * reach * (norm + reach) + least)
    }

    /// Takes the scores of all codes into `state`.
    fn scores(&self, shifted: &[f32], step: usize, rows: usize, state: &mut [f32]) {
        let lanes = self.kernels.lanes;
        self.visit(rows, |panel, row, height| {
            self.panel(panel, &shifted[row * step..], step, height, &mut state[row * 3 * lanes..]);
        });
    }

    /// Scores the codes again for those rows, panel by panel, and compares all those that may be the nearest.
    fn settle(
        &self,
        first: usize,
        shifted: &mut [f32],
        step: usize,
        state: &mut [f32],
        unclear: &mut [Unclear],
    ) {
        // A lane holds its best and its second-best score: after one panel, all there are.
        const { assert!(PANEL_REGISTERS == 2) };
        let (dim, lanes) = (self.codebook.dim, self.kernels.lanes);
        for (to, Unclear { row, .. }) in unclear.iter().enumerate() {
            shifted.copy_within(row * step..row * step + dim, to * step);
        }
        self.visit(unclear.len(), |panel, row, height| {
            let state = &mut state[..height * 3 * lanes];
            state.fill(f32::INFINITY);
            self.panel(panel, &shifted[row * step..], step, height, state);
            for (state, unclear) in state.chunks(3 * lanes).zip(&mut unclear[row..]) {
                let limit = unclear.limit;
                // Counted, which is vector code; a search that stops at the first is not.
                if state[..lanes].iter().filter(|score| **score <= limit).count() == 0 {
                    continue;
                }
                let z = &self.z[(first + unclear.row) * dim..][..dim];
                for lane in (0..lanes).filter(|lane| state[*lane] <= limit) {
                    let code = lane_code(state, lanes, lane);
                    let other = self.other_code(panel, lane, code);
                    let is_near = state[lanes + lane] <= limit;
                    for code in std::iter::once(code).chain(is_near.then_some(other)) {
                        unclear.best = nearer(z, &self.codebook, unclear.best, code);
                    }
                }
            }
        });
    }

    /// The code of the panel's lane that is not this one.
    fn other_code(&self, panel: usize, lane: usize, code: u32) -> u32 {
        let first = panel * self.kernels.panel + lane;
        (2 * first + self.kernels.lanes) as u32 - code
    }

    /// Calls `work(panel, row, height)` for every panel of codes and every tile of that many rows, in an order
    /// that keeps both in the caches.
    fn visit(&self, rows: usize, mut work: impl FnMut(usize, usize, usize)) {
        let panel = self.kernels.panel;
        let panels = self.codebook.half_norms.len() / panel;
        let group = (CODES / (self.codebook.dim * panel)).max(1);
        for start in (0..panels).step_by(group) {
            for first in (0..rows).step_by(ROWS) {
                for index in start..(start + group).min(panels) {
                    for (row, height) in self.kernels.tiles(ROWS.min(rows - first)) {
                        work(index, first + row, height);
                    }
                }
            }
        }
    }

    /// Takes the scores of one panel of codes for the first `height` rows of `shifted` into `state`.
    fn panel(&self, index: usize, shifted: &[f32], step: usize, height: usize, state: &mut [f32]) {
        let (panel, lanes, codebook) = (self.kernels.panel, self.kernels.lanes, &self.codebook);
        assert!(shifted.len() >= (height - 1) * step + codebook.dim);
        assert!(state.len() >= height * 3 * lanes);
        let tile = SearchTile {
            depth: codebook.dim,
            a: shifted.as_ptr(),
            a_step: step,
            b: codebook.panels[index * codebook.dim * panel..].as_ptr(),
            norms: codebook.half_norms[index * panel..].as_ptr(),
            register: (index * panel / lanes) as u32,
            state: state.as_mut_ptr(),
        };
        // SAFETY: `shifted` and `state` hold as many rows, as asserted, and the panels were cut for these
        // kernels.
        #[allow(unsafe_code)]
        unsafe {
            self.kernels.search(height, &tile);
        }
    }
}

/// The code that a lane's best score belongs to.
fn lane_code(state: &[f32], lanes: usize, lane: usize) -> u32 {
    state[2 * lanes + lane].to_bits().wrapping_mul(lanes as u32) + lane as u32
}

/// A row's best score with its code (the lowest among equals), and its second-best score, from those
/// of each lane.
fn merge(state: &[f32], lanes: usize) -> ((f32, u32), f32) {
    let (mut best, mut second) = ((f32::INFINITY, 0), f32::INFINITY);
    for lane in 0..lanes {
        let (score, code) = (state[lane], lane_code(state, lanes, lane));
        #[allow(clippy::float_cmp)] // a tie is exact equality
        let closer = score < best.0 || (score == best.0 && code < best.1);
        second = second.min(if closer { best.0 } else { score }).min(state[lanes + lane]);
        if closer {
            best = (score, code);
        }
    }
    (best, second)
}

/// The nearest of all codes by exact differences alone.
fn exact(z: &[f32], codebook: &Codebook<'_>) -> u32 {
    (1..codebook.len() as u32).fold(0, |best, code| nearer(z, codebook, best, code))
}

/// The nearer one of two codes; the lower one where both are equally near.
fn nearer(z: &[f32], codebook: &Codebook<'_>, one: u32, other: u32) -> u32 {
    let (a, b) = (codebook.code(one.min(other)), codebook.code(one.max(other)));
    // ‖z − a‖² − ‖z − b‖², without squares that cancel.
    let difference = sum(z.len(), |i| {
        let [z, a, b] = [z[i], a[i], b[i]].map(f64::from);
        (b - a) * ((z - a) + (z - b))
    });
    if difference > 0. { one.max(other) } else { one.min(other) }
}

/// `‖z − e‖`.
fn distance(z: &[f32], e: &[f32]) -> f64 {
    sum(z.len(), |i| (f64::from(z[i]) - f64::from(e[i])).powi(2)).sqrt()
}

/// The norm of a row.
fn length(values: &[f32]) -> f64 {
    sum(values.len(), |i| f64::from(values[i]).powi(2)).sqrt()
}

/// Several sums side by side, which become vector code, added in order.
fn sum(count: usize, term: impl Fn(usize) -> f64) -> f64 {
    const WIDTH: usize = 8;
    let mut sums = [0f64; WIDTH];
    let whole = count / WIDTH * WIDTH;
    for first in (0..whole).step_by(WIDTH) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
    }
    for (sum, i) in sums.iter_mut().zip(whole..count) {
        *sum += term(i);
    }
    sums.iter().sum()
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

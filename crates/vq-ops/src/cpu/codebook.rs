//! A codebook as the search for the nearest code takes it.

use rayon::prelude::*;

use super::tile::Kernels;

/// As many codes tell where the middle of the codebook is.
const SAMPLE: usize = 255;

pub(super) struct Codebook<'a> {
    pub codes: &'a [f32],
    pub dim: usize,
    /// What codes and vectors are shifted by.
    pub center: Vec<f32>,
    /// `−(e_k − center)`, `[panels][dim][panel]`.
    pub panels: Vec<f32>,
    /// `½‖e_k − center‖²`, filled up to whole panels with infinity. Infinite too where the same code stands
    /// at a lower index: that one is the answer wherever this one would be.
    pub half_norms: Vec<f32>,
    /// The greatest `‖e_k − center‖`.
    pub radius: f64,
}

impl<'a> Codebook<'a> {
    /// `codes` `[K, dim]`; the error is the row that is not finite.
    pub(super) fn new(codes: &'a [f32], dim: usize, kernels: &Kernels) -> Result<Self, usize> {
        let is_broken = |code: &[f32]| code.iter().any(|value| !value.is_finite());
        if let Some(code) = codes.par_chunks(dim).position_first(is_broken) {
            return Err(code);
        }
        let count = codes.len() / dim;
        let center = center(codes, dim);
        let panel = kernels.panel;
        let mut panels = vec![0.; count.div_ceil(panel) * dim * panel];
        panels.par_chunks_mut(dim * panel).zip(codes.par_chunks(dim * panel)).for_each(
            |(to, codes)| {
                for (j, code) in codes.chunks(dim).enumerate() {
                    for (d, (value, center)) in code.iter().zip(&center).enumerate() {
                        to[d * panel + j] = center - value;
                    }
                }
            },
        );
        let square = |code: &[f32]| -> f64 {
            code.iter().zip(&center).map(|(v, c)| f64::from(v - c).powi(2)).sum()
        };
        let squares: Vec<f64> = codes.par_chunks(dim).map(square).collect();
        let radius = squares.iter().copied().fold(0., f64::max).sqrt();
        let mut half_norms: Vec<f32> = squares.iter().map(|square| (0.5 * square) as f32).collect();
        half_norms.resize(count.div_ceil(panel) * panel, f32::INFINITY);
        for code in repeated(codes, dim) {
            half_norms[code] = f32::INFINITY;
        }
        Ok(Self { codes, dim, center, panels, half_norms, radius })
    }

    pub(super) fn len(&self) -> usize {
        self.codes.len() / self.dim
    }

    pub(super) fn code(&self, index: u32) -> &[f32] {
        &self.codes[index as usize * self.dim..][..self.dim]
    }
}

/// The median of each element over some of the codes. A mean would follow a few codes that are far away,
/// and all others would then be far from it.
fn center(codes: &[f32], dim: usize) -> Vec<f32> {
    let count = codes.len() / dim;
    let taken = count.min(SAMPLE);
    let mut values = vec![0.; taken];
    (0..dim)
        .map(|d| {
            for (i, value) in values.iter_mut().enumerate() {
                *value = codes[count * i / taken * dim + d];
            }
            *values.select_nth_unstable_by(taken / 2, f32::total_cmp).1
        })
        .collect()
}

/// The codes that equal one of a lower index.
fn repeated(codes: &[f32], dim: usize) -> Vec<usize> {
    let mut order: Vec<(u64, u32)> =
        codes.par_chunks(dim).map(hash).zip(0..(codes.len() / dim) as u32).collect();
    order.par_sort_unstable();
    let code = |index: u32| &codes[index as usize * dim..][..dim];
    let mut repeated = Vec::new();
    for run in order.chunk_by(|a, b| a.0 == b.0).filter(|run| run.len() > 1) {
        // Different codes of one hash are rare, so that there is nearly always one.
        let mut first: Vec<u32> = Vec::new();
        for (_, index) in run {
            if first.iter().any(|first| code(*first) == code(*index)) {
                repeated.push(*index as usize);
            } else {
                first.push(*index);
            }
        }
    }
    repeated
}

/// The same for equal codes.
fn hash(code: &[f32]) -> u64 {
    // Zero may have a sign, and equals itself without.
    let bits = |value: &f32| u64::from((value + 0.).to_bits());
    code.chunks(2).fold(0, |hash: u64, two| {
        let word = two.iter().fold(0, |word, value| word << 32 | bits(value));
        (hash.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_that_were_there_before_are_found() {
        let codes = [1., 2., 0., 1., 1., 2., 1., 0., -0., 1., 2., 1.];
        let mut found = repeated(&codes, 2);
        found.sort_unstable();
        assert_eq!(found, [2, 4]);
        let mut found = repeated(&codes, 1);
        found.sort_unstable();
        assert_eq!(found, [3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(repeated(&[3., 4., 3.], 1), [2]);
    }

    #[test]
    #[allow(clippy::float_cmp)] // one of the codes' own numbers
    fn the_center_does_not_follow_a_code_that_is_far_away() {
        assert_eq!(center(&[1., 1e9, 1., 2., 1., 3., 0., 2.], 2), [1., 3.]);
    }
}

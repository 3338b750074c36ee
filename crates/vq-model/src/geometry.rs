//! What a codebook looks like by itself: lengths, distances, duplicates, and how far it has moved.

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// The lengths and distances of one codebook's vectors; see [`CodebookGeometry::of`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodebookGeometry {
    /// K.
    pub codes: usize,
    /// ‖e‖ over all codes.
    pub norms: Range,
    /// The root of the mean over all codes of ‖e − ē‖², ē being their mean: how widely they are spread.
    pub spread: f64,
    /// How many codes were compared with all others. All of them, unless the codebook is large.
    pub compared: usize,
    /// The distance to the nearest other code, over those that were compared. 0 where K = 1.
    pub nearest: Range,
    /// Codes, of those compared, that have another one within a hundredth of the spread: the two stand
    /// for the same.
    pub duplicates: usize,
}

/// The least, the mean and the greatest of several numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// The least.
    pub least: f64,
    /// The mean.
    pub mean: f64,
    /// The greatest.
    pub greatest: f64,
}

/// Two codes nearer to each other than this share of the spread are duplicates.
const DUPLICATE: f64 = 0.01;

/// Numbers that are subtracted, at most: about a second of work. A pair takes as long as this many even
/// where D is smaller.
const MOST_WORK: usize = 1 << 30;
const LEAST_PER_PAIR: usize = 64;

impl CodebookGeometry {
    /// Of a codebook `[K,D]`.
    ///
    /// Distances are reckoned from differences, not from products, in which those of near codes would
    /// drown. Where comparing all pairs would take long (K above 4096 with D = 64), fewer codes, evenly spaced from
    /// the first on, are compared with all others.
    pub fn of(codebook: &Tensor) -> Result<Self> {
        let (values, codes, dim) = rows(codebook)?;
        let row = |index: usize| values.get(index * dim..(index + 1) * dim).unwrap_or_default();
        let spread = spread(&values, dim);
        let compared = codes.min((MOST_WORK / (codes * dim.max(LEAST_PER_PAIR))).max(1));
        let mut nearest = Vec::with_capacity(compared);
        for number in 0..compared {
            let index = number * codes / compared;
            let others = (0..codes).filter(|&other| other != index);
            let squares = others.map(|other| squared_distance(row(index), row(other)));
            let least = squares.fold(f32::INFINITY, f32::min);
            nearest.push(if codes > 1 { f64::from(least).sqrt() } else { 0.0 });
        }
        let is_double = |&&distance: &&f64| distance <= DUPLICATE * spread;
        let origin = vec![0.0; dim];
        let norms = (0..codes).map(|index| f64::from(squared_distance(row(index), &origin)).sqrt());
        Ok(Self {
            codes,
            norms: Range::of(norms),
            spread,
            compared,
            duplicates: if codes > 1 { nearest.iter().filter(is_double).count() } else { 0 },
            nearest: Range::of(nearest.into_iter()),
        })
    }
}

/// How far a codebook `[K,D]` has moved: the root of the mean over all codes of ‖e − e₀‖², in units of its
/// [spread](CodebookGeometry::spread) now. 0 where nothing moved, infinite where all codes fell together.
pub fn codebook_drift(before: &Tensor, now: &Tensor) -> Result<f64> {
    let ((before, ..), (now, codes, dim)) = (rows(before)?, rows(now)?);
    if before.len() != now.len() {
        return Err(Error::Input("a codebook does not change its shape".to_owned()));
    }
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    let moved = (before.iter().zip(&now).map(square).sum::<f64>() / codes as f64).sqrt();
    Ok(if moved == 0.0 { 0.0 } else { moved / spread(&now, dim) })
}

impl Range {
    /// Of no numbers, all 0.
    fn of(numbers: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut greatest) = (f64::INFINITY, f64::NEG_INFINITY);
        let (mut sum, mut count) = (0.0, 0);
        for number in numbers {
            (least, greatest) = (number.min(least), number.max(greatest));
            (sum, count) = (sum + number, count + 1);
        }
        if count == 0 {
            return Self::default();
        }
        Self { least, mean: sum / f64::from(count), greatest }
    }
}

/// The numbers of `[K,D]`, K and D.
fn rows(codebook: &Tensor) -> Result<(Vec<f32>, usize, usize)> {
    let (codes, dim) = codebook.dims2()?;
    if codes == 0 || dim == 0 {
        return Err(Error::Input(format!("a codebook of [{codes}, {dim}] holds nothing")));
    }
    let values = codebook.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok((values.flatten_all()?.to_vec1::<f32>()?, codes, dim))
}

fn spread(values: &[f32], dim: usize) -> f64 {
    let codes = (values.len() / dim) as f64;
    let mut mean = vec![0.0; dim];
    for row in values.chunks_exact(dim) {
        for (mean, &x) in mean.iter_mut().zip(row) {
            *mean += f64::from(x) / codes;
        }
    }
    let square = |row: &[f32]| -> f64 {
        row.iter().zip(&mean).map(|(&x, mean)| (f64::from(x) - mean).powi(2)).sum()
    };
    (values.chunks_exact(dim).map(square).sum::<f64>() / codes).sqrt()
}

/// In eight sums side by side, so that the compiler can use the machine's vectors.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a - b) * (a - b);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b)).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(values: &[f32], dim: usize) -> Tensor {
        Tensor::from_slice(values, (values.len() / dim, dim), &Device::Cpu).unwrap()
    }

    #[test]
    fn of_a_square_with_a_double_corner() {
        let corners = tensor(&[1., 1., 1., -1., -1., 1., -1., -1., 1.0, 1.005], 2);
        let found = CodebookGeometry::of(&corners).unwrap();
        assert_eq!((found.codes, found.compared, found.duplicates), (5, 5, 2));
        assert!((found.nearest.least - 0.005).abs() < 1e-5);
        assert!((found.nearest.greatest - 2.0).abs() < 1e-6);
        assert!((found.norms.least - 2f64.sqrt()).abs() < 1e-6);
        let alone = CodebookGeometry::of(&tensor(&[3., 4.], 2)).unwrap();
        assert_eq!((alone.duplicates, alone.norms.mean), (0, 5.0));
        // All in one place.
        assert_eq!(CodebookGeometry::of(&tensor(&[0.0; 12], 2)).unwrap().duplicates, 6);
        assert!(CodebookGeometry::of(&tensor(&[], 1)).is_err());
    }

    #[test]
    fn of_a_large_codebook_a_part_is_compared() {
        let values: Vec<f32> = (0..1 << 16).map(|i| i as f32).collect();
        let found = CodebookGeometry::of(&tensor(&values, 1)).unwrap();
        assert_eq!((found.codes, found.compared), (1 << 16, 1 << 8));
        assert!((found.nearest.mean - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn drift_is_in_units_of_the_spread() {
        let before = tensor(&[1., -1., 1., -1.], 1);
        assert!(codebook_drift(&before, &before).unwrap().abs() < f64::EPSILON);
        // Everything twice as far out: moved by 1, with a spread of 2.
        let after = tensor(&[2., -2., 2., -2.], 1);
        assert!((codebook_drift(&before, &after).unwrap() - 0.5).abs() < 1e-12);
        assert!(codebook_drift(&before, &tensor(&[5.0; 4], 1)).unwrap().is_infinite());
        assert!(codebook_drift(&before, &tensor(&[5.0; 2], 1)).is_err());
    }

    proptest! {
        #[test]
        fn distances_are_those_of_the_plain_formula(
            values in proptest::collection::vec(-2f32..2.0, 40..400), dim in 1usize..21,
        ) {
            let values = &values[..values.len() / dim * dim];
            let found = CodebookGeometry::of(&tensor(values, dim)).unwrap();
            let rows: Vec<&[f32]> = values.chunks_exact(dim).collect();
            let distance = |a: &[f32], b: &[f32]| {
                let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
                a.iter().zip(b).map(square).sum::<f64>().sqrt()
            };
            let nearest: Vec<f64> = (0..rows.len())
                .map(|i| {
                    (0..rows.len())
                        .filter(|&j| i != j)
                        .map(|j| distance(rows[i], rows[j]))
                        .fold(f64::INFINITY, f64::min)
                })
                .collect();
            if rows.len() > 1 {
                let mean = nearest.iter().sum::<f64>() / rows.len() as f64;
                // f32 sums of at most 20 squares.
                prop_assert!((found.nearest.mean - mean).abs() < 1e-5 * (1.0 + mean));
            }
        }
    }
}

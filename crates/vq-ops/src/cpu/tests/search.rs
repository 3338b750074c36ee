//! The search for the nearest code against direct differences.

use proptest::prelude::*;

use super::{noise, on_every_cpu};
use crate::cpu::nearest::{BLOCK, NotFinite, nearest, statistics};

/// The nearest code by differences of squared distances, `Σ (b − a)·(2z − a − b)`: in f64, a distance itself
/// does not tell codes apart that are far from the vector and next to each other.
fn direct(z: &[f32], codebook: &[f32]) -> u32 {
    let code = |index: usize| &codebook[index * z.len()..][..z.len()];
    let is_nearer = |a: usize, b: usize| {
        let each = z.iter().zip(code(a)).zip(code(b));
        let term = |((z, a), b): ((&f32, &f32), &f32)| {
            let [z, a, b] = [z, a, b].map(|v| f64::from(*v));
            (b - a) * (2. * z - a - b)
        };
        each.map(term).sum::<f64>() < 0.
    };
    let count = codebook.len() / z.len();
    (1..count).fold(0, |best, code| if is_nearer(code, best) { code } else { best }) as u32
}

/// The answer is that of direct differences, and however the vectors are split.
#[track_caller]
fn check(z: &[f32], codebook: &[f32], dim: usize) {
    let expected: Vec<u32> = z.chunks(dim).map(|z| direct(z, codebook)).collect();
    on_every_cpu(|cpu| {
        let found = nearest(z, codebook, dim).unwrap();
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{cpu}: row {row}");
        }
        assert_eq!(found.len(), expected.len(), "{cpu}");
        let split = z.len() / dim / 3 * dim;
        let parts = [&z[..split], &z[split..]].map(|z| nearest(z, codebook, dim).unwrap());
        assert!(parts.concat() == found, "{cpu}: a row depends on its batch");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn nearest_codes_equal_direct_differences_in_f64(
        count in 1usize..300, codes in 1usize..1100, dim in 1usize..70, seed in any::<u64>(),
        offset in prop::sample::select(vec![0f32, 1., 1e3]), grid in any::<bool>(),
    ) {
        // On a coarse grid many distances tie; far from the origin the expanded form cancels.
        let place = |v: f32| offset + if grid { (v * 2.).round() } else { v };
        let z: Vec<f32> = noise(count * dim, seed).into_iter().map(place).collect();
        let codebook: Vec<f32> = noise(codes * dim, !seed).into_iter().map(place).collect();
        let expected: Vec<u32> = z.chunks(dim).map(|z| direct(z, &codebook)).collect();
        on_every_cpu(|cpu| {
            assert_eq!(nearest(&z, &codebook, dim).as_ref(), Ok(&expected), "{cpu}");
            let alone = nearest(&z[..dim], &codebook, dim);
            assert_eq!(alone, Ok(vec![expected[0]]), "{cpu}: a row depends on its batch");
        });
    }

    #[test]
    fn several_blocks_of_vectors(
        count in BLOCK + 1..3 * BLOCK, codes in 1usize..200, dim in 1usize..20, seed in any::<u64>(),
        grid in any::<bool>(),
    ) {
        let place = |v: f32| if grid { (v * 2.).round() } else { v };
        let z: Vec<f32> = noise(count * dim, seed).into_iter().map(place).collect();
        let codebook: Vec<f32> = noise(codes * dim, !seed).into_iter().map(place).collect();
        check(&z, &codebook, dim);
    }

    #[test]
    fn codes_that_repeat_nearly_repeat_or_lie_far_away(
        codes in 1usize..150, dim in 1usize..40, seed in any::<u64>(),
        outlier in prop::sample::select(vec![1f32, 1e4, 1e9, 1e18, 1e25, f32::MAX]),
        near in 0u32..3,
    ) {
        let mut codebook = noise(codes * dim, seed);
        // Once more as they are, and moved by so many units in the last place.
        let again: Vec<f32> = codebook.iter().map(|v| f32::from_bits(v.to_bits() + near)).collect();
        codebook.extend_from_slice(&codebook.clone());
        codebook.extend(again);
        codebook.extend(noise(dim, !seed).iter().map(|v| v * outlier));
        let mut z = noise(60 * dim, seed ^ 1);
        z.extend(noise(2 * dim, seed ^ 2).iter().map(|v| v * outlier));
        z.extend_from_slice(&codebook);
        check(&z, &codebook, dim);
    }

    #[test]
    fn numbers_next_to_the_least_and_the_greatest(
        count in 1usize..60, codes in 1usize..100, dim in 1usize..70, seed in any::<u64>(),
        scale in prop::sample::select(vec![1e-45f32, 1e-42, 1e-38, 1e-30, 1e-23, 1e-20, 1e-19, 1e18, 1e19, 3e38]),
        far in any::<bool>(),
    ) {
        // Vectors of the codes' size, or so much greater that f64 still tells direct differences apart.
        let far = if far && scale < 1. { 1e4 } else { 1. };
        let z: Vec<f32> = noise(count * dim, seed).into_iter().map(|v| v * scale * far).collect();
        let codebook: Vec<f32> = noise(codes * dim, !seed).into_iter().map(|v| v * scale).collect();
        check(&z, &codebook, dim);
    }
}

/// All codes lie within rounding of each other: every one is a candidate.
#[test]
fn codes_that_no_score_tells_apart() {
    let codebook: Vec<f32> = noise(700 * 6, 3).into_iter().map(|v| 1000. + v * 1e-3).collect();
    let z: Vec<f32> = noise(500 * 6, 4).into_iter().map(|v| v * 1e3).collect();
    check(&z, &codebook, 6);
}

#[test]
fn values_that_are_not_finite_are_named() {
    let codebook = noise(600 * 5, 1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut z = noise(200 * 5, 2);
        z[131 * 5 + 3] = bad;
        let mut broken = codebook.clone();
        broken[17 * 5] = bad;
        on_every_cpu(|cpu| {
            assert_eq!(nearest(&z, &codebook, 5), Err(NotFinite::Vector(131)), "{cpu}");
            assert_eq!(nearest(&codebook, &broken, 5), Err(NotFinite::Code(17)), "{cpu}");
        });
    }
}

#[test]
fn equal_codes_give_the_lowest_index() {
    let codebook = vec![0.25; 1000 * 3];
    let z = noise(500 * 3, 7);
    on_every_cpu(|_| assert_eq!(nearest(&z, &codebook, 3), Ok(vec![0; 500])));
}

#[test]
fn statistics_count_and_add() {
    let z = [1., 2., 10., 20., 100., 200.];
    let (counts, sums) = statistics(&z, &[2, 0, 2], 2, 4);
    assert_eq!(counts, [1., 0., 2., 0.]);
    assert_eq!(sums, [10., 20., 0., 0., 101., 202., 0., 0.]);
}

//! What the tests of several modules need.

use candle_core::{Tensor, Var};

/// Numbers in [-1, 1), on the device of the tests.
pub(crate) fn noise(dims: &[usize], seed: u64) -> Var {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values = (0..dims.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
        })
        .collect();
    Var::from_vec(values, dims, &crate::test_device()).unwrap()
}

pub(crate) fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

/// √(Σ (a − b)² / Σ b²)
pub(crate) fn relative_error(ours: &[f32], exact: &[f32]) -> f32 {
    assert_eq!(ours.len(), exact.len());
    let error: f32 = ours.iter().zip(exact).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f32 = exact.iter().map(|v| v * v).sum();
    (error / size).sqrt()
}

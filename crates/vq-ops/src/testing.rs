//! What the tests of several modules need.

use std::cell::Cell;

use candle_core::{Device, Tensor, Var};

thread_local! {
    static ON_CPU: Cell<bool> = const { Cell::new(false) };
}

/// `work` by candle's own operations, on the CPU: what the others are compared with. Its [`noise`] lies there.
pub(crate) fn exactly<R>(work: impl FnOnce() -> R) -> R {
    ON_CPU.set(true);
    let done = crate::composed::only(work);
    ON_CPU.set(false);
    done
}

/// Numbers in [-1, 1), on the device of the tests.
pub(crate) fn noise(dims: &[usize], seed: u64) -> Var {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values = (0..dims.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
        })
        .collect();
    let device = if ON_CPU.get() { Device::Cpu } else { crate::test_device() };
    Var::from_vec(values, dims, &device).unwrap()
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

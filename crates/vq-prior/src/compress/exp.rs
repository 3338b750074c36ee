//! Powers that are the same to the bit on every machine.

/// eˣ to about a unit in the last place, 0 below −700, e⁷⁰⁰ above 700, NaN for NaN.
///
/// The standard library's calls the system's, whose last bit differs from one system to another. This is
/// plain f64 arithmetic, which IEEE 754 fixes.
pub(super) fn exp(x: f64) -> f64 {
    // ln 2 in two parts; the first has its last 20 bits free, so that n times it is exact.
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if x.is_nan() {
        return x;
    }
    if x < -700.0 {
        return 0.0;
    }
    let x = x.min(700.0);
    let n = (x * std::f64::consts::LOG2_E + 0.5).floor();
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // Taylor's series on |r| ≤ ln 2 / 2, where what follows its last term is below 10⁻¹⁷.
    let mut sum = 1.0;
    for k in (1..=14).rev() {
        sum = 1.0 + sum * r / f64::from(k);
    }
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// 1 / (1 + e⁻ˣ).
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x.
pub(super) fn tanh(x: f64) -> f64 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

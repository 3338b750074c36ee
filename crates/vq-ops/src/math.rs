//! exp and what is made of it, in plain Rust that the compiler turns into vector code.

/// Runs `work` compiled for this CPU's vectors: a closure, and all that it calls, must be
/// `#[inline(always)]`, or it stays compiled for any CPU. Nothing in it fuses multiplications with additions,
/// so that the results are the same to the bit on every x86-64 CPU.
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the CPU has the instructions.
            #[allow(unsafe_code)]
            return unsafe { avx512(work) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the instructions.
            #[allow(unsafe_code)]
            return unsafe { avx2(work) };
        }
    }
    work()
}

/// eˣ to about 2 units in the last place; 0 below −87.3, the largest finite power above 88.3, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5·2²³: adding it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let tiny = x < -87.3;
    // Comparisons that are false for NaN let it through.
    let x = if x > 88.3 { 88.3 } else { x };
    let x = if tiny { -87.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // Cephes' polynomial for eʳ on [−ln 2 / 2, ln 2 / 2].
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let power = p * (r * r) + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    let scaled = power * f32::from_bits(exponent << 23);
    if tiny { 0.0 } else { scaled }
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh to about 10⁻⁷ absolute.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// ln x of a positive, normal x, to about 10⁻⁷ of the larger of its magnitude and 1; NaN for NaN.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    // x = m · 2ⁿ with m from √½ to √2.
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    let n = (bits.cast_signed() >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    // Cephes' polynomial for ln (1 + m).
    let mut p = 7.037_683_6e-2;
    p = p * m - 1.151_461e-1;
    p = p * m + 1.167_699_9e-1;
    p = p * m - 1.242_014_1e-1;
    p = p * m + 1.424_932_3e-1;
    p = p * m - 1.666_805_8e-1;
    p = p * m + 2.000_071_5e-1;
    p = p * m - 2.499_999_4e-1;
    p = p * m + 3.333_333e-1;
    let square = m * m;
    let low = p * m * square + n * -2.121_944_4e-4 - 0.5 * square;
    let value = m + low + n * 0.693_359_4;
    if x.is_nan() { x } else { value }
}

/// 1 − e⁻ˣ for x ≥ 0, to a few units in the last place.
#[inline(always)]
pub(crate) fn one_minus_exp(x: f32) -> f32 {
    // Its series where the difference would cancel.
    let mut p = 1.0 - x * (1.0 / 8.0);
    for n in [1.0 / 7.0, 1.0 / 6.0, 1.0 / 5.0, 1.0 / 4.0, 1.0 / 3.0, 1.0 / 2.0] {
        p = 1.0 - x * n * p;
    }
    if x < 0.35 { x * p } else { 1.0 - exp(-x) }
}

/// Sum of `f` over the values, in sixteen lanes that are added in order at the end.
#[inline(always)]
pub(crate) fn sum_of(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(*value);
    }
    lanes.iter().sum()
}

/// Sum of products, in lanes as [`sum_of`].
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut lanes = [0f32; 16];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += a * b;
    }
    lanes.iter().sum()
}

/// The largest value; −∞ for none. NaN is passed over: it comes back through the sums.
#[inline(always)]
pub(crate) fn max_of(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library_over_its_range() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp(-1e9).to_bits(), 0);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert!(exp(1e9).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_and_tanh_agree_with_the_library() {
        for i in -2000..2000 {
            let x = i as f32 * 0.02;
            assert!((tanh(x) - x.tanh()).abs() < 3e-7, "{x}");
            assert!((sigmoid(x) - 1.0 / (1.0 + (-x).exp())).abs() < 3e-7, "{x}");
        }
        assert!(tanh(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn ln_and_one_minus_exp_agree_with_f64() {
        for i in 1..40_000 {
            for x in [i as f32 * 1e-4, i as f32 * 1e-9, i as f32 * 1e7] {
                let exact = f64::from(x).ln();
                assert!((f64::from(ln(x)) - exact).abs() < 1.5e-7 * exact.abs().max(1.0), "{x}");
                let exact = -(-f64::from(x)).exp_m1();
                assert!((f64::from(one_minus_exp(x)) - exact).abs() < 4e-7 * exact, "{x}");
            }
        }
        assert!(ln(f32::NAN).is_nan() && one_minus_exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_value_once() {
        for n in [0, 1, 15, 16, 17, 40] {
            let values: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            assert!((sum_of(&values, |v| v) - values.iter().sum::<f32>()).abs() < 1e-3);
            let squares: f32 = values.iter().map(|v| v * v).sum();
            assert!((dot(&values, &values) - squares).abs() < 1e-2);
            let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max_of(&values).to_bits(), largest.to_bits());
        }
    }
}

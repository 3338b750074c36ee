//! Elements of the device's tensors as f32, and the product of matrices that all else is made of.

use std::ops::{AddAssign, Mul};

use crate::memory::MEMORY;
use crate::queue::Failure;

/// What tensors are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Format {
    F32,
    F64,
    F16,
    Bf16,
}

impl Format {
    /// The one of that number; libraries differ in the number of bf16.
    pub(crate) fn of(number: u32, bf16: u32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            1 => Some(Self::F64),
            2 => Some(Self::F16),
            _ => (number == bf16).then_some(Self::Bf16),
        }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// What is computed in.
pub(crate) trait Real:
    Copy + Default + Mul<Output = Self> + AddAssign + Send + Sync + 'static
{
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    fn from_f64(x: f64) -> Self {
        x as Self
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn from_f64(x: f64) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// The elements there.
pub(crate) fn load<T: Real>(
    format: Format,
    address: u64,
    len: usize,
    what: &str,
) -> Result<Vec<T>, Failure> {
    fn all<F: Copy + 'static, T: Real>(
        address: u64,
        len: usize,
        what: &str,
        exact: impl Fn(F) -> f64,
    ) -> Result<Vec<T>, Failure> {
        let elements = MEMORY.slice::<F>(address, len, what)?;
        Ok(elements.iter().map(|&x| T::from_f64(exact(x))).collect())
    }
    match format {
        Format::F32 => all(address, len, what, f64::from as fn(f32) -> f64),
        Format::F64 => all(address, len, what, |x: f64| x),
        Format::F16 => all(address, len, what, |x| f64::from(from_f16(x))),
        Format::Bf16 => all(address, len, what, |x| f64::from(from_bf16(x))),
    }
}

/// Writes elements of `len` that lie there: α of each value and, where β is not 0, β of what is there.
pub(crate) fn store<T: Real>(
    format: Format,
    address: u64,
    len: usize,
    [alpha, beta]: [f64; 2],
    values: impl Iterator<Item = (usize, T)>,
    what: &str,
) -> Result<(), Failure> {
    MEMORY.check(address, len * format.bytes(), what)?;
    let before: Vec<T> = if beta == 0. { Vec::new() } else { load(format, address, len, what)? };
    for (at, value) in values {
        let mut sum = T::from_f64(alpha) * value;
        if beta != 0. {
            sum += T::from_f64(beta) * before[at];
        }
        assert!(at < len, "{what}: element {at} of {len}");
        // SAFETY: the element is one of those that were checked.
        unsafe { write(format, address, at, sum.to_f64()) };
    }
    Ok(())
}

/// Rounds once more where it is in 16 bits.
///
/// # Safety
///
/// The element is there, and nothing else runs on the device.
unsafe fn write(format: Format, address: u64, at: usize, value: f64) {
    let address = address + (at * format.bytes()) as u64;
    unsafe {
        match format {
            Format::F32 => (address as *mut f32).write(value as f32),
            Format::F64 => (address as *mut f64).write(value),
            Format::F16 => (address as *mut u16).write(to_f16(value as f32)),
            Format::Bf16 => (address as *mut u16).write(to_bf16(value as f32)),
        }
    }
}

pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest, of two the even one.
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

pub(crate) fn from_f16(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (bits >> 15, bits >> 10 & 31, bits & 0x3ff);
    let size = match exponent {
        0 => f32::from(mantissa) * 2f32.powi(-24),
        31 if mantissa == 0 => f32::INFINITY,
        31 => f32::NAN,
        _ => f32::from(mantissa | 0x400) * 2f32.powi(i32::from(exponent) - 25),
    };
    if sign == 1 { -size } else { size }
}

pub(crate) fn to_f16(x: f32) -> u16 {
    let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
    let size = x.abs();
    if size.is_nan() {
        return sign | 0x7e00;
    }
    if size >= 65_520. {
        return sign | 0x7c00;
    }
    // The step between neighbours there.
    let exponent = ((size.to_bits() >> 23) as i32 - 127).max(-14);
    let steps = (size / 2f32.powi(exponent - 10)).round_ties_even() as u32;
    // A carry goes into the exponent, as it should.
    sign | (((exponent + 14) as u32 * 1024) + steps) as u16
}

/// As tensor cores take it: 10 bits after the point.
pub(crate) fn to_tf32(x: f32) -> f32 {
    if x.is_finite() { f32::from_bits((x.to_bits() + 0x1000) & !0x1fff) } else { x }
}

/// to += a·b, where a is [depth][rows] and b is [depth][columns], to [columns][rows].
pub(crate) fn multiply<T: Real>(a: &[T], b: &[T], to: &mut [T], rows: usize, columns: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        fn wide<T: Real>(a: &[T], b: &[T], to: &mut [T], rows: usize, columns: usize) {
            loops(a, b, to, rows, columns);
        }
        // SAFETY: the machine has these instructions.
        return unsafe { wide(a, b, to, rows, columns) };
    }
    loops(a, b, to, rows, columns);
}

#[inline(always)]
#[allow(clippy::inline_always)]
fn loops<T: Real>(a: &[T], b: &[T], to: &mut [T], rows: usize, columns: usize) {
    // So that a part of each column stays near.
    const DEPTH: usize = 64;
    if rows == 0 || columns == 0 {
        return;
    }
    for (a, b) in a.chunks(DEPTH * rows).zip(b.chunks(DEPTH * columns)) {
        for (column, to) in to.chunks_exact_mut(rows).enumerate() {
            for (a, b) in a.chunks_exact(rows).zip(b.chunks_exact(columns)) {
                let factor = b[column];
                for (to, &a) in to.iter_mut().zip(a) {
                    *to += factor * a;
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn formats_round_to_the_nearest_and_of_two_to_the_even_one() {
        assert_eq!(from_bf16(to_bf16(1.003_906_3)), 1.);
        assert_eq!(from_bf16(to_bf16(1.011_718_8)), 1.015_625);
        assert!(from_bf16(to_bf16(f32::NAN)).is_nan());
        for bits in 0..=u16::MAX {
            let x = from_f16(bits);
            assert!(x.is_nan() || to_f16(x) == bits, "{bits:#x}");
        }
        assert_eq!(to_f16(1. + 2f32.powi(-11)), 0x3c00);
        assert_eq!(to_f16(1. + 3. * 2f32.powi(-11)), 0x3c02);
        assert_eq!(to_f16(65_519.), 0x7bff);
        assert_eq!(to_f16(65_520.), 0x7c00);
        assert_eq!(to_f16(2f32.powi(-25)), 0);
        assert_eq!(to_f16(2f32.powi(-24)), 1);
        assert_eq!(to_tf32(1. + 2f32.powi(-10)), 1. + 2f32.powi(-10));
        assert_eq!(to_tf32(1. + 2f32.powi(-12)), 1.);
    }

    #[test]
    fn products_are_those_of_matrices() {
        // [[1, 3], [2, 4]] · [[5, 6, 7], [8, 9, 10]], columns first.
        let mut to = [1.; 6];
        multiply(&[1., 2., 3., 4.], &[5., 6., 7., 8., 9., 10.], &mut to, 2, 3);
        assert_eq!(to, [30., 43., 34., 49., 38., 55.]);
    }
}

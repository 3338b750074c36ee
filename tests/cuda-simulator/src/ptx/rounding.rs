//! Arithmetic of floats that the host does not have as PTX means it.

use crate::numbers;

/// How a result is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    Nearest,
    Zero,
    Down,
    Up,
}

impl Mode {
    pub(super) fn of(parts: &[&str]) -> Self {
        parts[1..]
            .iter()
            .find_map(|part| match *part {
                "rz" | "rzi" => Some(Self::Zero),
                "rm" | "rmi" => Some(Self::Down),
                "rp" | "rpi" => Some(Self::Up),
                "rn" | "rni" => Some(Self::Nearest),
                _ => None,
            })
            .unwrap_or(Self::Nearest)
    }

    pub(super) fn integral(self, x: f64) -> f64 {
        match self {
            Self::Nearest => x.round_ties_even(),
            Self::Zero => x.trunc(),
            Self::Down => x.floor(),
            Self::Up => x.ceil(),
        }
    }

    /// Whether what is nearest has to give way to its neighbour below (−1) or above (1), where the exact number is
    /// above it by something of the sign of `rest`.
    fn correction(self, nearest: f64, rest: f64) -> i32 {
        match self {
            Self::Down if rest < 0. => -1,
            Self::Up if rest > 0. => 1,
            Self::Zero if rest < 0. && nearest > 0. => -1,
            Self::Zero if rest > 0. && nearest < 0. => 1,
            _ => 0,
        }
    }
}

/// a + b as the nearest number and what is missing, which are exact together.
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let of_b = sum - a;
    (sum, (a - (sum - of_b)) + (b - of_b))
}

/// a·b + c, rounded once.
pub(super) fn fma(a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    if mode == Mode::Nearest {
        return a.mul_add(b, c);
    }
    // A product of two f32 is an f64.
    let (sum, rest) = two_sum(f64::from(a) * f64::from(b), f64::from(c));
    directed(sum, rest, mode)
}

/// a·b.
pub(super) fn multiply(a: f32, b: f32, mode: Mode) -> f32 {
    directed(f64::from(a) * f64::from(b), 0., mode)
}

/// sum + rest, of which the second is less than what the first can tell apart.
fn directed(sum: f64, rest: f64, mode: Mode) -> f32 {
    let nearest = sum as f32;
    if !sum.is_finite() {
        return nearest;
    }
    if nearest.is_infinite() {
        let to_most = matches!(mode, Mode::Zero)
            || mode == Mode::Down && nearest > 0.
            || mode == Mode::Up && nearest < 0.;
        return if to_most { f32::MAX.copysign(nearest) } else { nearest };
    }
    let difference = sum - f64::from(nearest);
    let missing = if difference == 0. { rest } else { difference };
    match mode.correction(f64::from(nearest), missing) {
        -1 => nearest.next_down(),
        1 => nearest.next_up(),
        _ => nearest,
    }
}

pub(super) fn add_long(a: f64, b: f64, mode: Mode) -> f64 {
    let (sum, rest) = two_sum(a, b);
    if !sum.is_finite() {
        return sum;
    }
    match mode.correction(sum, rest) {
        -1 => sum.next_down(),
        1 => sum.next_up(),
        _ => sum,
    }
}

pub(super) fn narrow(x: f64, mode: Mode) -> f32 {
    if mode == Mode::Nearest { x as f32 } else { directed(x, 0., mode) }
}

/// As f64; where that is not exact, so that rounding once more to fewer bits is as if it were.
pub(super) fn from_integer(x: i128, mode: Mode, bits: usize) -> f64 {
    let nearest = x as f64;
    let missing = x - nearest as i128;
    if missing == 0 {
        return nearest;
    }
    if bits == 64 {
        return match mode.correction(nearest, missing as f64) {
            -1 => nearest.next_down(),
            1 => nearest.next_up(),
            _ => nearest,
        };
    }
    odd(nearest, missing > 0)
}

/// The one of two neighbours that is odd; the exact number lies between them, above x or below it.
fn odd(x: f64, above: bool) -> f64 {
    if x.to_bits() & 1 == 1 {
        return x;
    }
    if above { x.next_up() } else { x.next_down() }
}

/// As f32, the odd one of two neighbours: rounding it to 16 bits gives what rounding x would have given.
pub(super) fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    if x > f64::from(nearest) { nearest.next_up() } else { nearest.next_down() }
}

/// Zero for what is too small to have all bits.
pub(super) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// In [0, 1], and NaN is 0.
pub(super) fn saturate(x: f64) -> f64 {
    if x.is_nan() { 0. } else { x.clamp(0., 1.) }
}

/// The number of two where one is none, unless that is to stay; −0 is less than 0.
pub(super) fn least(x: f32, y: f32, keeps_nan: bool) -> f32 {
    if keeps_nan && (x.is_nan() || y.is_nan()) {
        return f32::NAN;
    }
    if x == y { f32::from_bits(x.to_bits() | y.to_bits()) } else { x.min(y) }
}

pub(super) fn most(x: f32, y: f32, keeps_nan: bool) -> f32 {
    -least(-x, -y, keeps_nan)
}

/// The two formats of 16 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Half {
    F16,
    Bf16,
}

impl Half {
    pub(super) fn read(self, bits: u32) -> f32 {
        match self {
            Self::F16 => numbers::from_f16(bits as u16),
            Self::Bf16 => numbers::from_bf16(bits as u16),
        }
    }

    pub(super) fn round(self, x: f32) -> u32 {
        u32::from(match self {
            Self::F16 => numbers::to_f16(x),
            Self::Bf16 => numbers::to_bf16(x),
        })
    }
}

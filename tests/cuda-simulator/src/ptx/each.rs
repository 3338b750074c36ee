//! What most steps are made of: one function for all threads.

use super::Run;
use super::lanes::{Longs, Warp, Words};

/// A step that can't fail, or that says how with `?`.
macro_rules! run {
    (|$w:ident, $m:ident| $body:expr) => {
        Box::new(move |$w: &mut Warp<'_>, $m: u32| -> Result<(), String> {
            $body;
            Ok(())
        }) as $crate::ptx::Run
    };
}
pub(super) use run;

pub(super) fn w1(d: usize, a: usize, f: impl Fn(u32) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.words[a];
        let to: Words = std::array::from_fn(|i| f(x[i]));
        w.set_words(d, m, &to);
    })
}

pub(super) fn w2(
    d: usize,
    a: usize,
    b: usize,
    f: impl Fn(u32, u32) -> u32 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.words[a], &w.words[b]);
        let to: Words = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_words(d, m, &to);
    })
}

pub(super) fn w3(
    d: usize,
    a: [usize; 3],
    f: impl Fn(u32, u32, u32) -> u32 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y, z) = (&w.words[a[0]], &w.words[a[1]], &w.words[a[2]]);
        let to: Words = std::array::from_fn(|i| f(x[i], y[i], z[i]));
        w.set_words(d, m, &to);
    })
}

pub(super) fn l1(d: usize, a: usize, f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.longs[a];
        let to: Longs = std::array::from_fn(|i| f(x[i]));
        w.set_longs(d, m, &to);
    })
}

pub(super) fn l2(
    d: usize,
    a: usize,
    b: usize,
    f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.longs[a], &w.longs[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

pub(super) fn l3(
    d: usize,
    a: [usize; 3],
    f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y, z) = (&w.longs[a[0]], &w.longs[a[1]], &w.longs[a[2]]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i], z[i]));
        w.set_longs(d, m, &to);
    })
}

pub(super) fn wl(d: usize, a: usize, f: impl Fn(u32) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.words[a];
        let to: Longs = std::array::from_fn(|i| f(x[i]));
        w.set_longs(d, m, &to);
    })
}

pub(super) fn lw(d: usize, a: usize, f: impl Fn(u64) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.longs[a];
        let to: Words = std::array::from_fn(|i| f(x[i]));
        w.set_words(d, m, &to);
    })
}

/// Of a long and a word, as in shifts.
pub(super) fn lwl(
    d: usize,
    a: usize,
    b: usize,
    f: impl Fn(u64, u32) -> u64 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.longs[a], &w.words[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

pub(super) fn w2l(
    d: usize,
    a: usize,
    b: usize,
    f: impl Fn(u32, u32) -> u64 + Send + Sync + 'static,
) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.words[a], &w.words[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

/// Which threads it holds of.
pub(super) type Test = Box<dyn Fn(&Warp<'_>) -> u32 + Send + Sync>;

pub(super) fn words_test(
    a: usize,
    b: usize,
    f: impl Fn(u32, u32) -> bool + Send + Sync + 'static,
) -> Test {
    Box::new(move |w| {
        let (x, y) = (&w.words[a], &w.words[b]);
        (0..32).fold(0, |mask, i| mask | u32::from(f(x[i], y[i])) << i)
    })
}

pub(super) fn longs_test(
    a: usize,
    b: usize,
    f: impl Fn(u64, u64) -> bool + Send + Sync + 'static,
) -> Test {
    Box::new(move |w| {
        let (x, y) = (&w.longs[a], &w.longs[b]);
        (0..32).fold(0, |mask, i| mask | u32::from(f(x[i], y[i])) << i)
    })
}

pub(super) fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

pub(super) fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

pub(super) fn short(x: u32) -> i32 {
    i32::from(x as i16)
}

/// With its sign above.
pub(super) fn extend(x: u64, bits: usize) -> u64 {
    let drop = 64 - bits;
    ((x << drop) as i64 >> drop) as u64
}

pub(super) fn truncate(x: u64, bits: usize) -> u64 {
    if bits == 64 { x } else { x & ((1 << bits) - 1) }
}

pub(super) fn high(x: u32, y: u32, signed: bool) -> u32 {
    if signed {
        ((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32
    } else {
        ((u64::from(x) * u64::from(y)) >> 32) as u32
    }
}

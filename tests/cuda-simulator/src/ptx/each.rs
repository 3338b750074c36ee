//! What most steps are made of: one function for all threads.

use super::Run;
use super::lanes::Warp;

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

/// Makes the function that makes a step of `f`: from registers of these kinds to one of that kind.
macro_rules! each {
    ($(#[$doc:meta])* $name:ident: $($x:ident in $of:ident: $T:ty),+ => $set:ident: $R:ty) => {
        $(#[$doc])*
        pub(super) fn $name(
            to: usize,
            $($x: usize,)+
            f: impl Fn($($T),+) -> $R + Send + Sync + 'static,
        ) -> Run {
            run!(|w, m| {
                $(let $x = &w.$of[$x];)+
                let results: [$R; 32] = std::array::from_fn(|i| f($($x[i]),+));
                w.$set(to, m, &results);
            })
        }
    };
}

each!(w1: x in words: u32 => set_words: u32);
each!(w2: x in words: u32, y in words: u32 => set_words: u32);
each!(w3: x in words: u32, y in words: u32, z in words: u32 => set_words: u32);
each!(l1: x in longs: u64 => set_longs: u64);
each!(l2: x in longs: u64, y in longs: u64 => set_longs: u64);
each!(l3: x in longs: u64, y in longs: u64, z in longs: u64 => set_longs: u64);
each!(wl: x in words: u32 => set_longs: u64);
each!(lw: x in longs: u64 => set_words: u32);
each!(
    /// Of a long and a word, as in shifts.
    lwl: x in longs: u64, y in words: u32 => set_longs: u64
);
each!(w2l: x in words: u32, y in words: u32 => set_longs: u64);

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

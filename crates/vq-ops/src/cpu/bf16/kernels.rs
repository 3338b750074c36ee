//! The innermost loops for bfloat16, for each instruction set.

use std::sync::OnceLock;

use crate::cpu::choice::wanted;
use crate::cpu::ending::Ending;
use crate::cpu::pack::{self, Gather, GatherFn};
use crate::cpu::vector::{Portable, Vector};

/// Columns in a panel of the second operand.
pub(crate) const PANEL: usize = 32;
/// Depths are filled up to a multiple of that many pairs.
pub(crate) const STEP: usize = 16;

/// Words along each side of what is transposed at a time.
pub(crate) const SQUARE: usize = 16;

/// One product: `c[i·c_step + j] (+)= Σ_p a(i, p) · b[p][j]`, each term the sum over a pair.
pub(crate) struct Product {
    /// Between 1 and [`Kernels::rows`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86 kernels ask"))]
    pub rows: usize,
    /// Pairs to sum over, a multiple of [`STEP`].
    pub pairs: usize,
    /// Row i begins at `a + i·a_step`. Readable up to [`Kernels::rows`] rows, whatever they hold.
    pub a: *const u32,
    /// See `a`.
    pub a_step: usize,
    /// `[pairs][PANEL]`.
    pub b: *const u32,
    /// [`PANEL`] columns, writable up to [`Kernels::rows`] rows; what the rows from `rows` on hold
    /// afterwards does not matter.
    pub c: *mut f32,
    /// See `c`.
    pub c_step: usize,
    /// Whether the sums are added to what is in `c`.
    pub accumulate: bool,
}

/// Where a product's rows go, and what is done to them on the way.
pub(crate) struct Store {
    /// `[panels][rows][PANEL]`.
    pub from: *const f32,
    /// Elements between panels.
    pub panel_step: usize,
    /// Where each row begins in all that is as large as the result.
    pub rows: *const usize,
    /// Number of rows.
    pub count: usize,
    /// How many columns are stored.
    pub columns: usize,
    /// What is done to the sums, and where they go.
    pub ending: Ending,
}

/// The loops for one instruction set.
pub(crate) struct Kernels {
    /// The most rows in a product.
    pub rows: usize,
    /// Whether a product of fewer rows touches no others.
    pub exact: bool,
    /// Prepares this thread for products; call `leave` after the last one.
    pub enter: unsafe fn(),
    /// See `enter`.
    pub leave: unsafe fn(),
    /// See [`Product`].
    pub product: unsafe fn(&Product),
    /// See [`Store`].
    pub store: unsafe fn(&Store),
    /// Rounds `count` elements to bfloat16, after a ReLU in the second one.
    pub narrow: [unsafe fn(*const f32, *mut u16, usize); 2],
    /// `to[i] = low[i] | high[i] << 16` for `count` elements.
    pub pair: unsafe fn(*const u16, *const u16, *mut u32, usize),
    /// `to[i] += from[i]` for `count` elements.
    pub add: unsafe fn(*const f32, *mut f32, usize),
    /// The same from bfloat16.
    pub add_halves: unsafe fn(*const u16, *mut f32, usize),
    /// Copies patches.
    pub gather: GatherFn<u16>,
    /// See [`Transpose`].
    pub transpose: Transpose,
    /// From so many taps along an axis on, minimal filtering in f32 is faster than these products.
    pub filters_from: usize,
    /// Whether the CPU has instructions for it.
    pub native: bool,
    /// Name of the instruction set, as in `VQ_CPU`.
    pub name: &'static str,
}

/// From rows to columns of pairs: `to[c · to_step + p] = from[2p · step + c] | from[(2p + 1) · step + c]
/// << 16`, for [`SQUARE`] pairs of rows and as many columns as the last argument says. All [`SQUARE`]
/// columns are read.
///
/// # Safety
/// `from` covers `2 · SQUARE` rows of [`SQUARE`] halves, `step` apart, and `to` a row of [`SQUARE`] words for
/// each column, `to_step` apart; the CPU has the instruction set.
type Transpose =
    unsafe fn(from: *const u16, step: usize, to: *mut u32, to_step: usize, columns: usize);

impl Kernels {
    /// The height of the tiles that `rows` rows are best cut into.
    pub(crate) fn tile(&self, rows: usize) -> usize {
        if self.exact && rows > 0 { rows.div_ceil(rows.div_ceil(self.rows)) } else { self.rows }
    }

    /// How many rows the tiles that cover `rows` may touch.
    pub(crate) fn padded(&self, rows: usize) -> usize {
        if self.exact { rows } else { rows.next_multiple_of(self.rows) }
    }
}

/// The best kernels for this CPU. `VQ_CPU=avx512bf16`, `avx512`, `avx2` or `portable` asks for less,
/// for comparisons.
pub(crate) fn kernels() -> &'static Kernels {
    static CHOICE: OnceLock<&'static Kernels> = OnceLock::new();
    #[cfg(test)]
    if let Some(forced) = FORCED.get() {
        return forced;
    }
    CHOICE.get_or_init(|| wanted(available(), |kernels| kernels.name).unwrap_or(&PORTABLE))
}

#[cfg(test)]
thread_local! {
    /// What `kernels()` answers on this thread, so that tests reach every instruction set.
    pub(crate) static FORCED: std::cell::Cell<Option<&'static Kernels>> =
        const { std::cell::Cell::new(None) };
}

/// All kernels that this CPU can run, best first.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut all: Vec<&'static Kernels> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vl") {
                if super::amx::is_available() {
                    all.push(&AMX);
                }
                all.push(&AVX512_BF16);
            }
            all.push(&AVX512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(&AVX2);
        }
    }
    all.push(&PORTABLE);
    all
}

/// An element rounded to bfloat16, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // A NaN keeps its sign and is made quiet; rounding might carry it to infinity or to zero.
    (if value.is_nan() { bits | 0x0040_0000 } else { rounded } >> 16) as u16
}

/// # Safety
/// `from` and `to` cover `count` elements, and the CPU has the instruction set of the caller.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn narrow<const RELU: bool>(from: *const f32, to: *mut u16, count: usize) {
    for i in 0..count {
        // SAFETY: the caller's promise.
        unsafe {
            let value = *from.add(i);
            *to.add(i) = round(if RELU && value <= 0. { 0. } else { value });
        }
    }
}

/// # Safety
/// As [`narrow`].
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn pair(low: *const u16, high: *const u16, to: *mut u32, count: usize) {
    for i in 0..count {
        // SAFETY: the caller's promise.
        unsafe { *to.add(i) = u32::from(*low.add(i)) | u32::from(*high.add(i)) << 16 }
    }
}

/// # Safety
/// `to` covers `count` elements, `from(i, n)` gives the n from the i-th on, and the CPU has `V`'s instruction
/// set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn add<V: Vector>(to: *mut f32, count: usize, from: impl Fn(usize, usize) -> V) {
    // SAFETY: the caller's promise.
    unsafe {
        for i in (0..count).step_by(V::LANES) {
            let to = to.add(i);
            let lanes = (count - i).min(V::LANES);
            if lanes == V::LANES {
                V::load(to).add(from(i, lanes)).store(to);
            } else {
                V::load_partial(to, lanes).add(from(i, lanes)).store_partial(to, lanes);
            }
        }
    }
}

/// Without a call: runs of few channels are short, and there are many of them.
///
/// # Safety
/// `from` and `to` cover `count` elements and do not overlap.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn copy_few(from: *const u16, to: *mut u16, count: usize) {
    /// Elements in 128 bits.
    const STEP: usize = 8;
    // SAFETY: the caller's promise.
    unsafe {
        let copy = |i: usize| {
            to.add(i).cast::<u128>().write_unaligned(from.add(i).cast::<u128>().read_unaligned());
        };
        if count < STEP {
            for i in 0..count {
                *to.add(i) = *from.add(i);
            }
        } else {
            (0..count - STEP).step_by(STEP).for_each(copy);
            // Overlaps the one before.
            copy(count - STEP);
        }
    }
}

/// # Safety
/// The CPU has `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn gather<V: Vector>(job: Gather<'_, u16>) {
    // SAFETY: both functions touch what they are told to. A register of f32 carries any bits.
    unsafe {
        let copy = |from: *const u16, to: *mut u16, count: usize| {
            let step = 2 * V::LANES;
            let whole = count / step * step;
            for i in (0..whole).step_by(step) {
                V::load(from.add(i).cast()).store(to.add(i).cast());
            }
            copy_few(from.add(whole), to.add(whole), count - whole);
        };
        let clear = |to: *mut u16, count: usize| {
            let step = 2 * V::LANES;
            let whole = count / step * step;
            for i in (0..whole).step_by(step) {
                V::splat(0.).store(to.add(i).cast());
            }
            to.add(whole).write_bytes(0, count - whole);
        };
        pack::gather(job, copy, clear);
    }
}

/// # Safety
/// As [`Transpose`].
#[allow(unsafe_code)]
unsafe fn transpose(from: *const u16, step: usize, to: *mut u32, to_step: usize, columns: usize) {
    for column in 0..columns {
        for pair in 0..SQUARE {
            // SAFETY: the caller's promise.
            unsafe {
                let low = *from.add(2 * pair * step + column);
                let high = *from.add((2 * pair + 1) * step + column);
                *to.add(column * to_step + pair) = u32::from(low) | u32::from(high) << 16;
            }
        }
    }
}

/// A product in f32, whose factors are widened as they are read: exact products, sums in f32.
///
/// # Safety
/// The pointers cover what [`Product`] says, and the CPU has `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn emulated<V: Vector, const ROWS: usize>(job: &Product) {
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..PANEL).step_by(V::LANES) {
            let mut sums = [V::splat(0.); ROWS];
            for p in 0..job.pairs {
                let b = job.b.add(p * PANEL + first);
                let (low, high) = (V::load_low_halves(b), V::load_high_halves(b));
                for (i, sum) in sums.iter_mut().enumerate() {
                    let a = *job.a.add(i * job.a_step + p);
                    *sum = V::splat(f32::from_bits(a << 16)).mul_add(low, *sum);
                    *sum = V::splat(f32::from_bits(a & 0xFFFF_0000)).mul_add(high, *sum);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let c = job.c.add(i * job.c_step + first);
                let sum = if job.accumulate { sum.add(V::load(c)) } else { sum };
                sum.store(c);
            }
        }
    }
}

/// # Safety
/// The pointers cover what [`Store`] says, and the CPU has `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn store<V: Vector>(job: &Store) {
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..job.count {
            for first in (0..job.columns).step_by(V::LANES) {
                let count = (job.columns - first).min(V::LANES);
                let at = *job.rows.add(i) + first;
                let from = first / PANEL * job.panel_step + i * PANEL + first % PANEL;
                job.ending.store(V::load(job.from.add(from)), first, at, count);
            }
        }
    }
}

macro_rules! helpers {
    ($module:ident, $vector:ty, $($feature:literal)?) => {
        #[allow(unsafe_code)]
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn emulated<const ROWS: usize>(job: &Product) {
                // SAFETY: the caller's promise; the instruction set is enabled above.
                unsafe { super::emulated::<$vector, ROWS>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn add(from: *const f32, to: *mut f32, count: usize) {
                // SAFETY: as above.
                unsafe { super::add::<$vector>(to, count, |i, lanes| <$vector>::load_partial(from.add(i), lanes)) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn add_halves(from: *const u16, to: *mut f32, count: usize) {
                // SAFETY: as above.
                unsafe { super::add::<$vector>(to, count, |i, lanes| <$vector>::load_halves(from.add(i), lanes)) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn gather(job: Gather<'_, u16>) {
                // SAFETY: as above.
                unsafe { super::gather::<$vector>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn store(job: &Store) {
                // SAFETY: as above.
                unsafe { super::store::<$vector>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn narrow<const RELU: bool>(from: *const f32, to: *mut u16, count: usize) {
                // SAFETY: as above.
                unsafe { super::narrow::<RELU>(from, to, count) }
            }

            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn pair(low: *const u16, high: *const u16, to: *mut u32, count: usize) {
                // SAFETY: as above.
                unsafe { super::pair(low, high, to, count) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
helpers!(avx512, std::arch::x86_64::__m512, "avx512f,avx512bw");
#[cfg(target_arch = "x86_64")]
helpers!(avx2, std::arch::x86_64::__m256, "avx2,fma");
helpers!(portable, Portable,);

macro_rules! emulated_kernels {
    ($table:ident, $module:ident, $name:literal, $rows:literal) => {
        static $table: Kernels = Kernels {
            rows: $rows,
            exact: false,
            enter: nothing,
            leave: nothing,
            product: $module::emulated::<$rows>,
            store: $module::store,
            narrow: [$module::narrow::<false>, $module::narrow::<true>],
            pair: $module::pair,
            add: $module::add,
            add_halves: $module::add_halves,
            gather: $module::gather,
            transpose,
            filters_from: 2,
            native: false,
            name: $name,
        };
    };
}

#[cfg(target_arch = "x86_64")]
static AMX: Kernels = Kernels {
    rows: 32,
    exact: false,
    enter: super::amx::enter,
    leave: super::amx::leave,
    product: super::amx::product,
    filters_from: usize::MAX,
    native: true,
    name: "amx",
    ..AVX512_BF16
};

#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Kernels = Kernels {
    exact: true,
    product: dot::product,
    transpose: dot::transpose,
    narrow: [dot::narrow::<false>, dot::narrow::<true>],
    filters_from: 3,
    native: true,
    name: "avx512bf16",
    ..AVX512
};

#[cfg(target_arch = "x86_64")]
emulated_kernels!(AVX512, avx512, "avx512", 14);
#[cfg(target_arch = "x86_64")]
emulated_kernels!(AVX2, avx2, "avx2", 6);
emulated_kernels!(PORTABLE, portable, "portable", 4);

#[allow(unsafe_code)]
unsafe fn nothing() {}

/// Products by `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod dot {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;

    use super::{PANEL, Product};

    /// For each number of rows.
    const TILES: [unsafe fn(&Product); 14] = [
        tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>, tile::<7>, tile::<8>,
        tile::<9>, tile::<10>, tile::<11>, tile::<12>, tile::<13>, tile::<14>,
    ];

    /// # Safety
    /// The pointers cover what [`Product`] says, and the CPU has the instructions.
    pub(super) unsafe fn product(job: &Product) {
        // SAFETY: the caller's promise.
        unsafe { TILES[job.rows - 1](job) }
    }

    /// # Safety
    /// As [`product`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn tile<const ROWS: usize>(job: &Product) {
        // SAFETY: the caller's promise. A register of words and one of pairs are the same bits.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            let (mut a, mut b) = (job.a, job.b);
            for _ in 0..job.pairs {
                let columns = [
                    pairs(_mm512_loadu_si512(b.cast())),
                    pairs(_mm512_loadu_si512(b.add(16).cast())),
                ];
                for (i, row) in sums.iter_mut().enumerate() {
                    let factor =
                        pairs(_mm512_set1_epi32(a.add(i * job.a_step).read().cast_signed()));
                    row[0] = _mm512_dpbf16_ps(row[0], factor, columns[0]);
                    row[1] = _mm512_dpbf16_ps(row[1], factor, columns[1]);
                }
                a = a.add(1);
                b = b.add(PANEL);
            }
            for (i, row) in sums.into_iter().enumerate() {
                for (j, sum) in row.into_iter().enumerate() {
                    let c = job.c.add(i * job.c_step + 16 * j);
                    let sum =
                        if job.accumulate { _mm512_add_ps(sum, _mm512_loadu_ps(c)) } else { sum };
                    _mm512_storeu_ps(c, sum);
                }
            }
        }
    }

    /// # Safety
    /// `from` and `to` cover `count` elements, and the CPU has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn narrow<const RELU: bool>(from: *const f32, to: *mut u16, count: usize) {
        // SAFETY: the caller's promise; the masks leave out what lies behind `count`.
        unsafe {
            for first in (0..count).step_by(16) {
                let lanes = if count - first >= 16 { !0 } else { (1 << (count - first)) - 1 };
                let mut value = _mm512_maskz_loadu_ps(lanes, from.add(first));
                if RELU {
                    let kept = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(value, _mm512_setzero_ps());
                    value = _mm512_maskz_mov_ps(kept, value);
                }
                let halves: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
                _mm256_mask_storeu_epi16(to.add(first).cast(), lanes, halves);
            }
        }
    }

    /// # Safety
    /// As [`super::Transpose`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(
        from: *const u16,
        step: usize,
        to: *mut u32,
        to_step: usize,
        columns: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                let half =
                    |i: usize| _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.add(i * step).cast()));
                *row = _mm512_or_si512(half(2 * i), _mm512_slli_epi32::<16>(half(2 * i + 1)));
            }
            // Afterwards, quarter q of `mixed[4i + j]` is column 4q + j of the rows 4i to 4i + 3.
            let mut mixed = [_mm512_setzero_si512(); 16];
            for i in 0..4 {
                let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
                let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
                let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
                mixed[4 * i] = _mm512_unpacklo_epi64(low_ab, low_cd);
                mixed[4 * i + 1] = _mm512_unpackhi_epi64(low_ab, low_cd);
                mixed[4 * i + 2] = _mm512_unpacklo_epi64(high_ab, high_cd);
                mixed[4 * i + 3] = _mm512_unpackhi_epi64(high_ab, high_cd);
            }
            let mut all = [_mm512_setzero_si512(); 16];
            for j in 0..4 {
                let [a, b, c, d] = [mixed[j], mixed[4 + j], mixed[8 + j], mixed[12 + j]];
                let even = |x, y| _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y);
                let odd = |x, y| _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y);
                all[j] = even(even(a, b), even(c, d));
                all[4 + j] = even(odd(a, b), odd(c, d));
                all[8 + j] = odd(even(a, b), even(c, d));
                all[12 + j] = odd(odd(a, b), odd(c, d));
            }
            for (i, column) in all.into_iter().enumerate() {
                if i < columns {
                    _mm512_storeu_si512(to.add(i * to_step).cast(), column);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn pairs(words: __m512i) -> __m512bh {
        // SAFETY: both types are 512 bits without invalid values.
        unsafe { std::mem::transmute(words) }
    }
}

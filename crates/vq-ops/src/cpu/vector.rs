//! One register of f32 lanes, for each instruction set that we write for.

use super::bf16::kernels::round;
use super::bf16::widen;

/// Lanes of f32 that are worked on at once.
///
/// # Safety
/// The CPU must have the instruction set of the implementing type, and the pointers must be good
/// for as many elements as the method says.
#[allow(unsafe_code)]
pub(crate) trait Vector: Copy {
    /// How many elements a register holds.
    const LANES: usize;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// `LANES` elements from `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// The first `count` (at most `LANES`) elements from `from`, zeros behind them.
    unsafe fn load_partial(from: *const f32, count: usize) -> Self;
    /// The lower halves of `LANES` words, as bfloat16.
    unsafe fn load_low_halves(from: *const u32) -> Self;
    /// The upper halves of `LANES` words, as bfloat16.
    unsafe fn load_high_halves(from: *const u32) -> Self;
    /// The first `count` (at most `LANES`) elements from `from`, bfloat16; zeros behind them.
    unsafe fn load_halves(from: *const u16, count: usize) -> Self;
    /// The first `count` (at most `LANES`) lanes to `to`, rounded to bfloat16 by
    /// [`super::bf16::kernels::round`].
    unsafe fn store_halves(self, to: *mut u16, count: usize);
    /// `LANES` elements to `to`.
    unsafe fn store(self, to: *mut f32);
    /// The first `count` (at most `LANES`) lanes to `to`.
    unsafe fn store_partial(self, to: *mut f32, count: usize);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self − other`.
    unsafe fn sub(self, other: Self) -> Self;
    /// `self · factor + addend`.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The smaller one, lane by lane.
    unsafe fn min(self, other: Self) -> Self;
    /// The larger one, lane by lane.
    unsafe fn max(self, other: Self) -> Self;
    /// Lane by lane, `yes` where `self` is below `other`, and `no` elsewhere.
    unsafe fn choose_below(self, other: Self, yes: Self, no: Self) -> Self;
    /// The lanes where `gate` is above zero (or not a number, which must not vanish in a ReLU); zero
    /// elsewhere.
    unsafe fn where_positive(self, gate: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // the trait's safety section covers all
mod x86 {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;

    use super::Vector;

    impl Vector for __m512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, count: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps(mask16(count), from) }
        }

        #[inline(always)]
        unsafe fn load_low_halves(from: *const u32) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_high_halves(from: *const u32) -> Self {
            unsafe {
                let mask = _mm512_set1_epi32(-0x1_0000);
                _mm512_castsi512_ps(_mm512_and_si512(mask, _mm512_loadu_si512(from.cast())))
            }
        }

        #[inline(always)]
        unsafe fn load_halves(from: *const u16, count: usize) -> Self {
            unsafe {
                let halves = _mm256_loadu_si256(whole::<16, u16>(from, count, &mut [0; 16]).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }

        #[inline(always)]
        unsafe fn store_halves(self, to: *mut u16, count: usize) {
            unsafe {
                let bits = _mm512_castps_si512(self);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded =
                    _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self, self);
                let quiet = _mm512_set1_epi32(0x0040_0000);
                let rounded = _mm512_mask_or_epi32(rounded, nan, bits, quiet);
                let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
                if count >= 16 {
                    _mm256_storeu_si256(to.cast(), halves);
                } else {
                    let all: [u16; 16] = std::mem::transmute(halves);
                    to.copy_from_nonoverlapping(all.as_ptr(), count);
                }
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn store_partial(self, to: *mut f32, count: usize) {
            unsafe { _mm512_mask_storeu_ps(to, mask16(count), self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { _mm512_sub_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, factor, addend) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            unsafe { _mm512_min_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm512_max_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn choose_below(self, other: Self, yes: Self, no: Self) -> Self {
            unsafe {
                let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self, other);
                _mm512_mask_blend_ps(below, no, yes)
            }
        }

        #[inline(always)]
        unsafe fn where_positive(self, gate: Self) -> Self {
            unsafe {
                let positive = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(gate, _mm512_setzero_ps());
                _mm512_maskz_mov_ps(positive, self)
            }
        }
    }

    /// `from` itself if `N` elements may be read there, else their copy with zeros behind the `count`-th.
    #[inline(always)]
    unsafe fn whole<const N: usize, T>(
        from: *const T,
        count: usize,
        copy: &mut [T; N],
    ) -> *const T {
        if count >= N {
            return from;
        }
        unsafe { copy.as_mut_ptr().copy_from_nonoverlapping(from, count) };
        copy.as_ptr()
    }

    #[inline(always)]
    fn mask16(count: usize) -> __mmask16 {
        if count >= 16 { !0 } else { (1 << count) - 1 }
    }

    impl Vector for __m256 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, count: usize) -> Self {
            unsafe { _mm256_maskload_ps(from, mask8(count)) }
        }

        #[inline(always)]
        unsafe fn load_low_halves(from: *const u32) -> Self {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_high_halves(from: *const u32) -> Self {
            unsafe {
                let mask = _mm256_set1_epi32(-0x1_0000);
                _mm256_castsi256_ps(_mm256_and_si256(mask, _mm256_loadu_si256(from.cast())))
            }
        }

        #[inline(always)]
        unsafe fn load_halves(from: *const u16, count: usize) -> Self {
            unsafe {
                let halves = _mm_loadu_si128(whole::<8, u16>(from, count, &mut [0; 8]).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }
        }

        #[inline(always)]
        unsafe fn store_halves(self, to: *mut u16, count: usize) {
            unsafe {
                let bits = _mm256_castps_si256(self);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let rounded =
                    _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(self, self);
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                let rounded =
                    _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
                let words = _mm256_srli_epi32::<16>(_mm256_castps_si256(rounded));
                let packed = _mm256_packus_epi32(words, words);
                let halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed));
                if count >= 8 {
                    _mm_storeu_si128(to.cast(), halves);
                } else {
                    let all: [u16; 8] = std::mem::transmute(halves);
                    to.copy_from_nonoverlapping(all.as_ptr(), count);
                }
            }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn store_partial(self, to: *mut f32, count: usize) {
            unsafe { _mm256_maskstore_ps(to, mask8(count), self) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { _mm256_sub_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, addend) }
        }

        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            unsafe { _mm256_min_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { _mm256_max_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn choose_below(self, other: Self, yes: Self, no: Self) -> Self {
            unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(self, other)) }
        }

        #[inline(always)]
        unsafe fn where_positive(self, gate: Self) -> Self {
            unsafe { _mm256_and_ps(self, _mm256_cmp_ps::<_CMP_NLE_UQ>(gate, _mm256_setzero_ps())) }
        }
    }

    #[inline(always)]
    unsafe fn mask8(count: usize) -> __m256i {
        const MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - count.min(8)).cast()) }
    }
}

/// Eight lanes in plain Rust, which the compiler turns into the vector instructions of its target.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // the trait's safety section covers all
impl Vector for Portable {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        let mut lanes = [0.; 8];
        for (i, lane) in lanes.iter_mut().enumerate().take(count) {
            *lane = unsafe { *from.add(i) };
        }
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn load_low_halves(from: *const u32) -> Self {
        let words = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Self(words.map(|word| f32::from_bits(word << 16)))
    }

    #[inline(always)]
    unsafe fn load_high_halves(from: *const u32) -> Self {
        let words = unsafe { from.cast::<[u32; 8]>().read_unaligned() };
        Self(words.map(|word| f32::from_bits(word & 0xFFFF_0000)))
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const u16, count: usize) -> Self {
        let mut lanes = [0.; 8];
        for (i, lane) in lanes.iter_mut().enumerate().take(count) {
            *lane = widen(unsafe { *from.add(i) });
        }
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn store_halves(self, to: *mut u16, count: usize) {
        for (i, lane) in self.0.iter().enumerate().take(count) {
            unsafe { *to.add(i) = round(*lane) };
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        for (i, lane) in self.0.iter().enumerate().take(count) {
            unsafe { *to.add(i) = *lane };
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| {
            // Without the instruction, a fused multiply-add is a slow call into the C library.
            if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                self.0[i].mul_add(factor.0[i], addend.0[i])
            } else {
                self.0[i] * factor.0[i] + addend.0[i]
            }
        }))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    unsafe fn choose_below(self, other: Self, yes: Self, no: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < other.0[i] { yes.0[i] } else { no.0[i] }))
    }

    #[inline(always)]
    unsafe fn where_positive(self, gate: Self) -> Self {
        Self(std::array::from_fn(|i| if gate.0[i] <= 0. { 0. } else { self.0[i] }))
    }
}

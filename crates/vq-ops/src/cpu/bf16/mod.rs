//! Convolutions whose factors are rounded to bfloat16, as implicit matrix products.
//!
//! A depth is cut into pairs: a `u32` holds two neighbouring elements of a patch, the first one in its
//! lower half, and the second operand holds the two weights that they meet in the same way. That is
//! what AMX (`tdpbf16ps`) and AVX512-BF16 (`vdpbf16ps`) multiply.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod conv;
pub(crate) mod kernels;
pub(crate) mod weight_gradient;

/// Whether this CPU has instructions for products of bfloat16.
pub(crate) fn is_native() -> bool {
    kernels::kernels().native
}

/// Calls `work` with a piece of this thread's scratch memory that begins at a cache line, `length`
/// elements long. What is in it is left over from earlier use.
fn with_words<R>(length: usize, work: impl FnOnce(&mut [u32]) -> R) -> R {
    super::conv::with_scratch(length + LINE, |scratch| work(words(scratch, length)))
}

/// `u32`s in a cache line.
const LINE: usize = 16;

/// The first `length` elements of a buffer from a cache line's beginning on, as words. The buffer must
/// be longer by [`LINE`].
fn words(buffer: &mut [f32], length: usize) -> &mut [u32] {
    let skip = buffer.as_ptr().align_offset(64);
    let part = &mut buffer[skip..skip + length];
    // SAFETY: f32 and u32 have the same size and alignment, and every bit pattern is a value of both.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), length)
    }
}

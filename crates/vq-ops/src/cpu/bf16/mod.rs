//! Convolutions whose factors are rounded to bfloat16, as implicit matrix products.
//!
//! A depth is cut into pairs: a `u32` holds two neighbouring elements of a patch, the first one in its
//! lower half, and the second operand holds the two weights that they meet in the same way. That is
//! what AMX (`tdpbf16ps`) and AVX512-BF16 (`vdpbf16ps`) multiply.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod conv;
pub(crate) mod kernels;
pub(crate) mod peak;
pub(crate) mod weight_gradient;

use rayon::prelude::*;

use super::buffers::{Buffer, Buffers};
use super::elements::Elements;

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

/// A tensor's elements rounded to bfloat16.
pub(crate) struct Narrow {
    /// Two elements in each f32's place.
    buffer: Buffer,
    length: usize,
}

impl Narrow {
    /// Rounds `values`, after a ReLU where wanted.
    pub(crate) fn new(values: &[f32], relu: bool, buffers: &Buffers) -> Self {
        let mut narrow = Self::left_over(values.len(), buffers);
        narrow.round(values, relu);
        narrow
    }

    /// Elements left over from earlier use.
    pub(crate) fn left_over(length: usize, buffers: &Buffers) -> Self {
        Self { buffer: buffers.take(length.div_ceil(2) + LINE), length }
    }

    /// Takes over `values`, after a ReLU where wanted.
    pub(crate) fn round(&mut self, values: &[f32], relu: bool) {
        const CHUNK: usize = 1 << 14;
        let narrow = kernels::kernels().narrow[usize::from(relu)];
        let chunks = values.par_chunks(CHUNK);
        self.halves_mut().par_chunks_mut(CHUNK).zip(chunks).for_each(|(to, from)| {
            // SAFETY: both have as many elements; the kernels fit this CPU.
            #[allow(unsafe_code)]
            unsafe {
                narrow(from.as_ptr(), to.as_mut_ptr(), from.len());
            }
        });
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The elements, to be changed.
    pub(crate) fn halves_mut(&mut self) -> &mut [u16] {
        &mut halves(words(&mut self.buffer, self.length.div_ceil(2)))[..self.length]
    }

    /// The elements.
    pub(crate) fn halves(&self) -> &[u16] {
        let skip = self.buffer.as_ptr().align_offset(64);
        let part = &self.buffer[skip..skip + self.length.div_ceil(2)];
        // SAFETY: the same memory, less strictly aligned; every bit pattern is a value of both types.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(part.as_ptr().cast(), self.length)
        }
    }
}

/// Elements that are rounded, or were so already.
pub(crate) enum Rounded<'a> {
    /// Just now.
    Now(Narrow),
    /// Already.
    Before(&'a [u16]),
}

impl<'a> Rounded<'a> {
    /// Rounds f32 elements, after a ReLU where wanted.
    pub(crate) fn new(x: Elements<'a>, relu: bool, buffers: &Buffers) -> Self {
        match x {
            Elements::F32(x) => Self::Now(Narrow::new(x, relu, buffers)),
            Elements::Bf16(x) => Self::Before(x),
        }
    }

    /// The elements.
    pub(crate) fn halves(&self) -> &[u16] {
        match self {
            Self::Now(narrow) => narrow.halves(),
            Self::Before(halves) => halves,
        }
    }
}

/// A bfloat16 as an f32.
pub(crate) fn widen(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// Words as twice as many halves, the lower one first.
fn halves(words: &mut [u32]) -> &mut [u16] {
    const { assert!(cfg!(target_endian = "little"), "the lower half must come first in memory") };
    // SAFETY: as in `Narrow::halves`.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len())
    }
}

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

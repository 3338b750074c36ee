//! CPU kernels over plain slices: convolutions as implicit matrix products, nearest codes, AdamW.
//!
//! Every kernel splits its work by shape alone, never by the number of threads, and adds partial
//! sums in a fixed order: the results are the same to the bit whatever the thread pool.

pub(crate) mod activation;
pub(crate) mod adamw;
pub(crate) mod bf16;
pub(crate) mod blocks;
pub(crate) mod buffers;
pub(crate) mod choice;
mod codebook;
pub(crate) mod conv;
pub(crate) mod elements;
pub(crate) mod ending;
pub(crate) mod gated;
pub(crate) mod nearest;
pub(crate) mod pack;
pub(crate) mod tile;
pub(crate) mod transformer;
pub(crate) mod vector;
pub(crate) mod weight_gradient;
pub(crate) mod winograd;
pub(crate) mod winograd_transform;

#[cfg(test)]
mod tests;

/// A pointer that tasks on several threads write through, each to its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T = f32>(*mut T);

// SAFETY: whoever dereferences the pointer promises (at its `unsafe` block) that no two tasks touch
// the same element.
#[allow(unsafe_code)]
unsafe impl<T> Send for SharedMut<T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T> Sync for SharedMut<T> {}

impl<T: Copy> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

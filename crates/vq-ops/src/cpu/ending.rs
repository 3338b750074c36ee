//! What happens to the sums of a convolution on their way to memory.

use std::ptr::{null, null_mut};

use super::SharedMut;
use super::conv::Finish;
use super::elements::{Elements, Output};
use super::vector::Vector;

/// An [`Output`] that several tasks write, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Sink {
    values: Option<SharedMut<f32>>,
    halves: Option<SharedMut<u16>>,
    /// Whether a ReLU comes before the rounding.
    relu: bool,
}

impl Sink {
    /// The output must outlive all tasks.
    pub(crate) fn new(out: Output<'_>) -> Self {
        match out {
            Output::F32(to) => Self { values: Some(SharedMut::new(to)), halves: None, relu: false },
            Output::Bf16 { to, relu, also } => Self {
                values: also.map(SharedMut::new),
                halves: Some(SharedMut::new(to.halves_mut())),
                relu,
            },
        }
    }
}

/// A [`Finish`] and a [`Sink`] as the kernels take them: bias, then mask, then residual. All but the bias are
/// as large as the result.
pub(crate) struct Ending {
    /// Result. May be null.
    values: *mut f32,
    /// Result, rounded to bfloat16. May be null.
    halves: *mut u16,
    /// Whether a ReLU comes before the rounding.
    relu: bool,
    /// Added to every row, where not null.
    bias: *const f32,
    /// Where it is not above zero the sum becomes zero. May be null.
    mask: *const f32,
    /// The same in bfloat16. May be null.
    mask_halves: *const u16,
    /// Added last. May be null.
    residual: *const f32,
}

impl Ending {
    pub(crate) fn new(finish: Finish<'_, Elements<'_>>, sink: Sink) -> Self {
        let (mask, mask_halves) = match finish.mask {
            None => (null(), null()),
            Some(Elements::F32(mask)) => (mask.as_ptr(), null()),
            Some(Elements::Bf16(mask)) => (null(), mask.as_ptr()),
        };
        let from = |values: Option<&[f32]>| values.map_or(null(), <[f32]>::as_ptr);
        Self {
            values: sink.values.map_or(null_mut(), SharedMut::get),
            halves: sink.halves.map_or(null_mut(), SharedMut::get),
            relu: sink.relu,
            bias: from(finish.bias),
            mask,
            mask_halves,
            residual: from(finish.residual),
        }
    }

    /// Finishes and stores the first `count` (at most a register's) sums, of the columns from `column` on, which
    /// begin at `at` in all that is as large as the result.
    ///
    /// # Safety
    /// The CPU has `V`'s instruction set, those elements exist, and no other task touches the result's.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) unsafe fn store<V: Vector>(&self, sums: V, column: usize, at: usize, count: usize) {
        let whole = count == V::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let fetch =
                |from: *const f32| if whole { V::load(from) } else { V::load_partial(from, count) };
            let mut value = sums;
            if !self.bias.is_null() {
                value = value.add(fetch(self.bias.add(column)));
            }
            if !self.mask.is_null() {
                value = value.where_positive(fetch(self.mask.add(at)));
            }
            if !self.mask_halves.is_null() {
                value = value.where_positive(V::load_halves(self.mask_halves.add(at), count));
            }
            if !self.residual.is_null() {
                value = value.add(fetch(self.residual.add(at)));
            }
            if !self.values.is_null() {
                if whole {
                    value.store(self.values.add(at));
                } else {
                    value.store_partial(self.values.add(at), count);
                }
            }
            if !self.halves.is_null() {
                let value = if self.relu { value.where_positive(value) } else { value };
                value.store_halves(self.halves.add(at), count);
            }
        }
    }
}

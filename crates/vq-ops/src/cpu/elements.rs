//! A tensor's elements as convolutions read and write them.

use std::borrow::Cow;

use super::bf16::{self, Narrow};
use super::buffers::Buffers;

/// What a convolution reads.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    /// As they are; a ReLU comes with the reading.
    F32(&'a [f32]),
    /// Rounded to bfloat16, after the reader's ReLU.
    Bf16(&'a [u16]),
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

impl<'a> Elements<'a> {
    /// The elements in f32.
    pub(crate) fn widen(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(values) => Cow::Borrowed(values),
            Self::Bf16(values) => values.iter().map(|half| bf16::widen(*half)).collect(),
        }
    }
}

/// Where a convolution writes its result.
pub(crate) enum Output<'a> {
    /// As it is.
    F32(&'a mut [f32]),
    /// Rounded to bfloat16, for whoever reads it next.
    Bf16 {
        /// The rounded elements.
        to: &'a mut Narrow,
        /// Whether a ReLU comes before the rounding.
        relu: bool,
        /// The elements as they are, without the ReLU, where they are wanted as well.
        also: Option<&'a mut [f32]>,
    },
}

impl Output<'_> {
    /// Lets `work` write f32 elements, and rounds them afterwards where that is asked for.
    pub(crate) fn through_f32(self, buffers: &Buffers, work: impl FnOnce(&mut [f32])) {
        match self {
            Self::F32(to) => work(to),
            Self::Bf16 { to, relu, also: Some(values) } => {
                work(values);
                to.round(values, relu);
            }
            Self::Bf16 { to, relu, also: None } => {
                let mut values = buffers.take(to.len());
                work(&mut values);
                to.round(&values, relu);
            }
        }
    }
}

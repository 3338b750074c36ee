//! What lies between two steps of a stack, in the forms in which it is read.

use super::bf16::Narrow;
use super::buffers::{Buffer, Buffers};
use super::elements::{Elements, Output};

/// How a step reads what lies before it, or the gradient of what it gives.
#[derive(Clone, Copy)]
pub(crate) struct Reading {
    /// As f32.
    pub values: bool,
    /// Rounded to bfloat16, and whether after a ReLU.
    pub rounded: Option<bool>,
}

impl Reading {
    /// As f32 alone.
    pub(crate) const VALUES: Self = Self { values: true, rounded: None };
}

/// An activation, or its gradient.
pub(crate) struct Activation {
    values: Option<Buffer>,
    rounded: Option<(Narrow, /* relu */ bool)>,
}

impl Activation {
    /// With elements left over from earlier use.
    pub(crate) fn new(length: usize, reading: Reading, buffers: &Buffers) -> Self {
        let rounded = reading.rounded.map(|relu| (Narrow::left_over(length, buffers), relu));
        Self { values: reading.values.then(|| buffers.take(length)), rounded }
    }

    /// To be written.
    pub(crate) fn output(&mut self) -> Output<'_> {
        match (&mut self.rounded, &mut self.values) {
            (Some((to, relu)), values) => {
                Output::Bf16 { to, relu: *relu, also: values.as_deref_mut() }
            }
            (None, values) => Output::F32(values.as_deref_mut().unwrap_or_default()),
        }
    }

    /// To be read.
    pub(crate) fn read(&self) -> Read<'_> {
        let values = self.values.as_deref().unwrap_or_default();
        let elements = match &self.rounded {
            Some((narrow, _)) => Elements::Bf16(narrow.halves()),
            None => Elements::F32(values),
        };
        Read { values, elements }
    }
}

/// An activation or an operand.
#[derive(Clone, Copy)]
pub(crate) struct Read<'a> {
    /// As f32; empty where the [`Reading`] does not ask for it.
    pub values: &'a [f32],
    /// As a convolution takes it.
    pub elements: Elements<'a>,
}

impl<'a> From<&'a [f32]> for Read<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self { values, elements: values.into() }
    }
}

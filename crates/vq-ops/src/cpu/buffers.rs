//! Buffers that are handed out, returned and handed out again, so that a training step touches
//! the same memory every time instead of fresh pages.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A set of buffers shared by the operations of one network.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers(Arc<Mutex<BTreeMap<usize, Vec<Vec<f32>>>>>);

impl Buffers {
    /// A buffer of that length; its content is left over from earlier use (zeros at first).
    pub(crate) fn take(&self, length: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let data = free.get_mut(&length).and_then(Vec::pop).unwrap_or_else(|| vec![0.; length]);
        Buffer { data, home: self.clone() }
    }
}

/// A buffer that goes back where it came from when dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    data: Vec<f32>,
    home: Buffers,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut free = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(data.len()).or_default().push(data);
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

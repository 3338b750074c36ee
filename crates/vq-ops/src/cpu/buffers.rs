//! Buffers that are handed out, returned and handed out again, so that a training step touches
//! the same memory every time instead of fresh pages.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A buffer that was not used in that many passes is given back to the allocator: another batch size or
/// image size took its place.
const KEPT_PASSES: u64 = 16;

/// A set of buffers shared by the operations of one network.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers(Arc<Mutex<Free>>);

/// What waits to be used again.
#[derive(Debug, Default)]
struct Free {
    /// By length, each with the pass in which it came back; the last one to come back goes first.
    buffers: BTreeMap<usize, Vec<(u64, Vec<f32>)>>,
    pass: u64,
}

impl Buffers {
    /// A buffer of that length; its content is left over from earlier use (zeros at first).
    pub(crate) fn take(&self, length: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free.buffers.get_mut(&length).and_then(Vec::pop);
        drop(free);
        let data = found.map_or_else(|| vec![0.; length], |(_, data)| data);
        Buffer { data, home: self.clone() }
    }

    /// Says that a pass over the network begins.
    pub(crate) fn begin_pass(&self) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.pass += 1;
        let pass = free.pass;
        free.buffers.retain(|_, buffers| {
            buffers.retain(|(last, _)| pass - last <= KEPT_PASSES);
            !buffers.is_empty()
        });
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
        let pass = free.pass;
        free.buffers.entry(data.len()).or_default().push((pass, data));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn free(buffers: &Buffers) -> Vec<usize> {
        let free = buffers.0.lock().unwrap();
        free.buffers.iter().flat_map(|(length, all)| all.iter().map(|_| *length)).collect()
    }

    #[test]
    fn what_every_pass_uses_is_kept_and_the_rest_goes() {
        let buffers = Buffers::default();
        buffers.begin_pass();
        // An epoch's last batch is smaller.
        drop((buffers.take(10), buffers.take(10), buffers.take(7)));
        let address = buffers.take(10).as_ptr();
        for _ in 0..KEPT_PASSES {
            buffers.begin_pass();
            assert_eq!(buffers.take(10).as_ptr(), address);
            assert_eq!(free(&buffers), [7, 10, 10]);
        }
        buffers.begin_pass();
        assert_eq!(free(&buffers), [10]);
        assert_eq!(buffers.take(10).as_ptr(), address);
    }

    #[test]
    fn one_that_is_out_comes_back_whenever_it_likes() {
        let buffers = Buffers::default();
        let held = buffers.take(3);
        (0..100).for_each(|_| buffers.begin_pass());
        drop(held);
        buffers.begin_pass();
        assert_eq!(free(&buffers), [3]);
    }
}

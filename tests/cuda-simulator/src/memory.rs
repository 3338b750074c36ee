//! The device's memory, which is the host's: what is allocated, and whether an access is to it.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ptx;
use crate::queue::{Code, Failure};

/// As the driver aligns.
const ALIGNMENT: usize = 256;
/// Bytes of freed memory that are not given out again yet, so that late uses of them are seen.
const WITHHELD: usize = 256 << 20;
/// What memory holds before it is written: NaN in every floating-point format.
const NEVER_WRITTEN: u8 = 0xff;

/// All that is allocated.
pub(crate) static MEMORY: Memory = Memory { inner: Mutex::new(Inner::new()) };

pub(crate) struct Memory {
    inner: Mutex<Inner>,
}

struct Inner {
    /// By the first address. Ranges of a graph are there from its recording on, and live while it has them.
    ranges: BTreeMap<u64, Range>,
    freed: VecDeque<(u64, usize)>,
    withheld: usize,
}

struct Range {
    len: usize,
    is_live: bool,
}

impl Inner {
    const fn new() -> Self {
        Self { ranges: BTreeMap::new(), freed: VecDeque::new(), withheld: 0 }
    }
}

impl Memory {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of that many bytes; None where there is none.
    pub(crate) fn allocate(&self, len: usize, is_live: bool) -> Option<u64> {
        let layout = layout(len)?;
        // SAFETY: the layout is not of size 0.
        let first = unsafe { alloc(layout) };
        if first.is_null() {
            return None;
        }
        // SAFETY: these bytes were allocated just now.
        unsafe { first.write_bytes(NEVER_WRITTEN, layout.size()) };
        self.inner().ranges.insert(first as u64, Range { len, is_live });
        Some(first as u64)
    }

    /// Gives memory back. An error where that address is not the first one of live memory.
    pub(crate) fn free(&self, address: u64) -> Result<(), Failure> {
        let mut inner = self.inner();
        match inner.ranges.get(&address) {
            Some(range) if range.is_live => {}
            _ => {
                return Err(Failure::new(
                    Code::INVALID_VALUE,
                    format!("{address:#x} is freed and is not allocated"),
                ));
            }
        }
        inner.release(address);
        Ok(())
    }

    /// Gives back a graph's memory, live or not.
    pub(crate) fn release(&self, address: u64) {
        self.inner().release(address);
    }

    /// Has a graph's memory come to life, with nothing in it, or end.
    pub(crate) fn set_live(&self, address: u64, is_live: bool) {
        if let Some(range) = self.inner().ranges.get_mut(&address) {
            range.is_live = is_live;
            // SAFETY: the range is allocated, and nothing runs on the device beside this.
            unsafe { (address as *mut u8).write_bytes(NEVER_WRITTEN, range.len) };
        }
    }

    /// Whether memory starts there and is live.
    pub(crate) fn is_live(&self, address: u64) -> bool {
        self.inner().ranges.get(&address).is_some_and(|range| range.is_live)
    }

    /// An error unless all of it is allocated. What for is for the error's text.
    pub(crate) fn check(&self, address: u64, len: usize, what: &str) -> Result<(), Failure> {
        if len == 0 || ptx::Memory::find(self, address, len as u64).is_some() {
            return Ok(());
        }
        let text = format!("{what}: {len} bytes at {address:#x} are not allocated");
        Err(Failure::new(Code::ILLEGAL_ADDRESS, text))
    }

    /// Elements that lie there, checked. Whoever calls must be the only one on the device.
    pub(crate) fn slice<T: Copy>(
        &self,
        address: u64,
        len: usize,
        what: &str,
    ) -> Result<&'static [T], Failure> {
        if len == 0 {
            return Ok(&[]);
        }
        self.aligned::<T>(address, len, what)?;
        // SAFETY: it is allocated and aligned, and T is a number, which any bits are one of.
        Ok(unsafe { std::slice::from_raw_parts(address as *const T, len) })
    }

    /// As [`slice`](Self::slice), to be written.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn slice_mut<T: Copy>(
        &self,
        address: u64,
        len: usize,
        what: &str,
    ) -> Result<&'static mut [T], Failure> {
        if len == 0 {
            return Ok(&mut []);
        }
        self.aligned::<T>(address, len, what)?;
        // SAFETY: as above; the device does one thing at a time.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) })
    }

    fn aligned<T>(&self, address: u64, len: usize, what: &str) -> Result<(), Failure> {
        self.check(address, len * size_of::<T>(), what)?;
        if address.is_multiple_of(size_of::<T>() as u64) {
            return Ok(());
        }
        Err(Failure::new(Code::MISALIGNED_ADDRESS, format!("{what}: {address:#x} is not aligned")))
    }

    /// Bytes that are allocated and live.
    pub(crate) fn used(&self) -> usize {
        self.inner().ranges.values().filter(|range| range.is_live).map(|range| range.len).sum()
    }
}

impl Inner {
    fn release(&mut self, address: u64) {
        let Some(Range { len, .. }) = self.ranges.remove(&address) else { return };
        // SAFETY: it was allocated until now, and nothing else runs on the device.
        unsafe { (address as *mut u8).write_bytes(NEVER_WRITTEN, len) };
        self.freed.push_back((address, len));
        self.withheld += len;
        while self.withheld > WITHHELD {
            let Some((address, len)) = self.freed.pop_front() else { return };
            self.withheld -= len;
            if let Some(layout) = layout(len) {
                // SAFETY: it was allocated with this layout, and is in no list any more.
                unsafe { dealloc(address as *mut u8, layout) };
            }
        }
    }
}

fn layout(len: usize) -> Option<Layout> {
    Layout::from_size_align(len.max(1), ALIGNMENT).ok()
}

impl ptx::Memory for Memory {
    fn find(&self, address: u64, bytes: u64) -> Option<(u64, u64)> {
        let inner = self.inner();
        let (&first, range) = inner.ranges.range(..=address).next_back()?;
        let end = first + range.len as u64;
        (range.is_live && address.checked_add(bytes)? <= end).then_some((first, end))
    }
}

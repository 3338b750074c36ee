//! From candle's tensors to slices.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// Calls `work` with the elements of a contiguous f32 tensor on the CPU.
pub(crate) fn f32_slice<R>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(work(f32_elements(storage, layout)?)),
        _ => bail!("expected a tensor on the CPU"),
    }
}

/// Where the f32 storage that a tensor is a view of begins; `None` where it is empty or not on the CPU.
pub(crate) fn storage_address(tensor: &Tensor) -> Option<usize> {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) if !values.is_empty() => Some(values.as_ptr().addr()),
        _ => None,
    }
}

/// The elements of a contiguous f32 storage.
pub(crate) fn f32_elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((first, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor");
    };
    match storage {
        CpuStorage::F32(values) => Ok(&values[first..end]),
        _ => bail!("expected f32 elements"),
    }
}

/// [`f32_elements`], to be changed.
pub(crate) fn f32_elements_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    let Some((first, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor");
    };
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[first..end]),
        _ => bail!("expected f32 elements"),
    }
}

/// Calls `work` with the elements of a contiguous f32 tensor on the CPU, to be changed in place.
pub(crate) fn with_f32_mut<R>(tensor: &Tensor, work: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    let op = InPlace(RefCell::new(Some(work)), RefCell::new(None));
    tensor.inplace_op1(&op)?;
    match op.1.into_inner() {
        Some(result) => Ok(result),
        None => bail!("an operation in place did not run"),
    }
}

/// A closure as an in-place operation that runs once.
struct InPlace<F, R>(RefCell<Option<F>>, RefCell<Option<R>>);

impl<R, F: FnOnce(&mut [f32]) -> R> InplaceOp1 for InPlace<F, R> {
    fn name(&self) -> &'static str {
        "vq-in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let values = f32_elements_mut(storage, layout)?;
        if let Some(work) = self.0.take() {
            self.1.replace(Some(work(values)));
        }
        Ok(())
    }
}

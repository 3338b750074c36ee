//! Opening a device.

use std::panic::{self, AssertUnwindSafe};

use candle_core::{Device, Error, Result};

/// Opens CUDA device `number`, cuDNN and the kernels' compiler on it. An error where anything of that is
/// missing: also in a build that opens CUDA's libraries at run time, where the bindings panic on a missing
/// one.
pub fn open_cuda(number: usize) -> Result<Device> {
    if !candle_core::utils::cuda_is_available() {
        return Err(Error::NotCompiledWithCudaSupport);
    }
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let opened = panic::catch_unwind(AssertUnwindSafe(|| {
        let device = Device::new_cuda(number)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &device {
            crate::cuda::prepare(device)?;
        }
        Ok(device)
    }));
    panic::set_hook(hook);
    opened.unwrap_or_else(|problem| {
        let text = problem
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| problem.downcast_ref::<&str>().copied());
        Err(Error::Msg(text.unwrap_or("CUDA's libraries cannot be opened").to_owned()))
    })
}

/// Whether convolutions in [`Precision::F32`](crate::Precision::F32) take their factors in full on CUDA, and
/// not rounded to TF32. For the whole process, from now on; nothing else has TF32.
pub fn set_strict_f32(strict: bool) {
    #[cfg(feature = "cuda")]
    crate::cuda::set_strict(strict);
    #[cfg(not(feature = "cuda"))]
    let _ = strict;
}

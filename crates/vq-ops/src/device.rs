//! Opening a device.

use std::cell::{Cell, OnceCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::OnceLock;

use candle_core::{Device, Error, Result};

/// Opens CUDA device `number`, cuDNN and the kernels' compiler on it. This thread waits for it when it ends. An error
/// where anything of that is missing: also in a build that opens CUDA's libraries at run time, where the bindings panic
/// on a missing one.
pub fn open_cuda(number: usize) -> Result<Device> {
    if !candle_core::utils::cuda_is_available() {
        return Err(Error::NotCompiledWithCudaSupport);
    }
    // Of a missing library the bindings list some thirty names that it could have.
    let why = |said: Option<&str>| {
        let said = said.and_then(|said| said.split(" - searched for").next());
        said.unwrap_or("CUDA's libraries cannot be opened").to_owned()
    };
    open(why, || {
        let device = Device::new_cuda(number)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &device {
            crate::cuda::prepare(device)?;
        }
        finish_with_the_thread(&device);
        Ok(device)
    })
}

/// Waits until a device has done what this thread gave it. On CUDA each thread has a queue of its own: a tensor may go
/// to another thread only after this, and a thread should not end before it.
///
/// An error where anything that was given to the device before has failed; it is waited for in that case too.
pub fn wait_for(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::wait(&device.cuda_stream()),
        _ => device.synchronize(),
    }
}

/// Opens the Metal device. An error where there is none: candle panics there.
pub fn open_metal() -> Result<Device> {
    let why = |said: Option<&str>| match said {
        Some(said) => format!("there is no Metal device ({said})"),
        None => "there is no Metal device".to_owned(),
    };
    open(why, || Device::new_metal(0))
}

/// What `work` opens; where it panics, an error: `why`, given what the panic says.
fn open(
    why: impl Fn(Option<&str>) -> String,
    work: impl FnOnce() -> Result<Device>,
) -> Result<Device> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let opened = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(hook);
    opened.unwrap_or_else(|said| {
        let text = said
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| said.downcast_ref::<&str>().copied());
        Err(Error::Msg(why(text)))
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

/// What [`set_strict_f32`] last said; false before, and in a build without CUDA.
pub fn is_strict_f32() -> bool {
    #[cfg(feature = "cuda")]
    return crate::cuda::is_strict();
    #[cfg(not(feature = "cuda"))]
    false
}

/// What a GPU is called, e.g. `NVIDIA H100 PCIe`; nothing for other devices than CUDA's, or where the driver
/// does not say.
pub fn gpu_name(device: &Device) -> Option<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device.cuda_stream().context().name().ok(),
        _ => None,
    }
}

/// The device of tests that can run on any: what `VQ_TEST_DEVICE` says, one of `cpu` (without it), `cuda`,
/// `cuda:N` and `metal`; with f32 in full. The same for the whole process, since tensors of a device that was
/// opened twice do not go together.
///
/// # Panics
///
/// Where there is no such device: a test must not pass on another one.
#[doc(hidden)]
#[allow(clippy::panic)]
pub fn test_device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        let name = std::env::var("VQ_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        let opened = match name.split_once(':').unwrap_or((name.as_str(), "0")) {
            ("cpu", _) => Ok(Device::Cpu),
            ("metal", _) => open_metal(),
            ("cuda", number) => number.parse().map_err(Error::wrap).and_then(open_cuda),
            _ => Err(Error::Msg("it is none of cpu, cuda, cuda:N, metal".to_owned())),
        };
        set_strict_f32(true);
        opened.unwrap_or_else(|error| panic!("VQ_TEST_DEVICE={name}: {error}"))
    };
    let device = DEVICE.get_or_init(open);
    finish_with_the_thread(device);
    device.clone()
}

/// Has this thread, when it ends, wait for what it gave to a CUDA device. Each thread has a queue there, and of
/// processes whose threads ended with something left in it, one in four hung.
fn finish_with_the_thread(device: &Device) {
    struct Finish(Device);
    impl Drop for Finish {
        fn drop(&mut self) {
            // What failed has said so already.
            let _ = wait_for(&self.0);
        }
    }
    thread_local! {
        static IS_TO_FINISH: Cell<bool> = const { Cell::new(false) };
        static FINISH: OnceCell<Finish> = const { OnceCell::new() };
    }
    if device.is_cuda() && !IS_TO_FINISH.replace(true) {
        // What CUDA keeps for a thread must be there first, to be taken down last.
        let _ = wait_for(device);
        FINISH.with(|finish| {
            finish.get_or_init(|| Finish(device.clone()));
        });
    }
}

//! A device's work, recorded once and repeated.

#[cfg(not(feature = "cuda"))]
use std::convert::Infallible;

use candle_core::{Device, Result};

/// Work that a device was given once, to be repeated without the host's share of it: a CUDA graph. What it
/// computes goes into the tensors that it was recorded with, from what these hold at the time.
pub struct Recording {
    #[cfg(feature = "cuda")]
    graph: candle_core::cuda::cudarc::driver::CudaGraph,
    #[cfg(not(feature = "cuda"))]
    never: Infallible,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").finish_non_exhaustive()
    }
}

/// Whether work of that device can be recorded: on CUDA.
pub fn can_record(device: &Device) -> bool {
    cfg!(feature = "cuda") && device.is_cuda()
}

/// Runs `work` as it will run to be recorded: what it uploads on the way, such as the strides of a tensor, is
/// kept, since a recording must find it there. What it uploads must not change from one time to the next.
pub fn rehearse<R>(device: &Device, work: impl FnOnce() -> R) -> R {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let _kept = device.enable_cuda_graph_htod_cache();
        return work();
    }
    let _ = device;
    work()
}

impl Recording {
    /// Records what `work` asks of the device, which does none of it now. The work must have been
    /// [rehearsed](rehearse) on this thread, must not wait for the device, and must leave its results in tensors that were
    /// there before: all others have to be gone when it returns.
    ///
    /// An error of `work`, or of the device where something cannot be recorded; the device is as good as
    /// before.
    pub fn new(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = device {
            let graph = crate::cuda::recording::record(cuda, || rehearse(device, work))?;
            return Ok(Self { graph });
        }
        let _ = work;
        candle_core::bail!("{:?} cannot record its work", device.location())
    }

    /// Has the device do it all again, after what it was given before.
    pub fn repeat(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        return candle_core::cuda::WrapErr::w(self.graph.launch());
        #[cfg(not(feature = "cuda"))]
        match self.never {}
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor, Var};

    use super::*;
    use crate::testing::{noise, values};
    use crate::{Conv2d, conv2d};

    #[test]
    fn a_recording_stays_right_when_larger_convolutions_come_after_it() -> Result<()> {
        let device = crate::test_device();
        if !can_record(&device) {
            assert!(Recording::new(&device, || Ok(())).is_err());
            return Ok(());
        }
        let config = Conv2d { padding: 1, ..Conv2d::default() };
        let (x, weight) = (noise(&[2, 5, 4, 8], 1), noise(&[8, 8, 3, 3], 2));
        let to = Var::zeros((2, 5, 4, 8), DType::F32, &device)?;
        let convolve = |x: &Tensor| conv2d(&x.detach(), &weight.detach(), None, config);
        let work = || to.set(&convolve(&x)?);
        rehearse(&device, work)?;
        let recording = Recording::new(&device, work)?;
        for seed in 3..6 {
            // What it was recorded with holds other numbers each time.
            let new = noise(x.dims(), seed);
            x.set(&new)?;
            recording.repeat()?;
            assert_eq!(values(&to), values(&convolve(&new)?));
            let large = noise(&[3, 8 * seed as usize, 16, 8], seed);
            assert_eq!(convolve(&large)?.dims(), large.dims());
            crate::wait_for(&device)?;
        }
        Ok(())
    }
}

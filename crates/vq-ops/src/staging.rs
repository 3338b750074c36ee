//! Bytes on their way to a device.

use candle_core::{Device, Result, Shape, Tensor, bail};

/// Memory of the host that bytes are written to and then copied to a device from, again and again. On CUDA it is
/// page-locked: the device fetches such memory by itself, while it and the host go on with other work. Elsewhere it is
/// memory like any other.
pub struct Staging {
    device: Device,
    bytes: Bytes,
}

enum Bytes {
    Plain(Vec<u8>),
    #[cfg(feature = "cuda")]
    Locked(candle_core::cuda::cudarc::driver::PinnedHostSlice<u8>),
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Staging").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Staging {
    /// Room for `len` bytes, which are 0.
    pub fn new(len: usize, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = device
            && len > 0
        {
            let bytes = Bytes::Locked(crate::cuda::lock_memory(cuda, len)?);
            return Ok(Self { device: device.clone(), bytes });
        }
        Ok(Self { device: device.clone(), bytes: Bytes::Plain(vec![0; len]) })
    }

    /// How many bytes there is room for.
    pub fn len(&self) -> usize {
        match &self.bytes {
            Bytes::Plain(bytes) => bytes.len(),
            #[cfg(feature = "cuda")]
            Bytes::Locked(bytes) => bytes.len(),
        }
    }

    /// Whether there is room for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, as they were left.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        match &mut self.bytes {
            Bytes::Plain(bytes) => Ok(bytes),
            #[cfg(feature = "cuda")]
            Bytes::Locked(bytes) => candle_core::cuda::WrapErr::w(bytes.as_mut_slice()),
        }
    }

    /// All of them on the device, u8 of that shape; comes back when they are there.
    pub fn upload(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.elem_count() != self.len() {
            bail!("{} bytes are none of shape {shape:?}", self.len());
        }
        match &self.bytes {
            Bytes::Plain(bytes) => Tensor::from_slice(bytes, shape, &self.device),
            #[cfg(feature = "cuda")]
            Bytes::Locked(bytes) => crate::cuda::upload(bytes, shape, &self.device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_as_they_were_written_each_time() {
        let device = crate::test_device();
        let mut staging = Staging::new(6, &device).unwrap();
        assert_eq!((staging.len(), staging.is_empty()), (6, false));
        assert_eq!(staging.bytes().unwrap(), [0; 6]);
        let mut arrived = Vec::new();
        for first in [1u8, 10] {
            for (byte, value) in staging.bytes().unwrap().iter_mut().zip(first..) {
                *byte = value;
            }
            arrived.push(staging.upload((2, 3)).unwrap());
        }
        let expected = [[1u8, 2, 3, 4, 5, 6], [10, 11, 12, 13, 14, 15]];
        for (arrived, expected) in arrived.iter().zip(expected) {
            assert_eq!(arrived.dims(), [2, 3]);
            assert_eq!(arrived.flatten_all().unwrap().to_vec1::<u8>().unwrap(), expected);
        }
        assert!(staging.upload((2, 2)).is_err());
    }
}

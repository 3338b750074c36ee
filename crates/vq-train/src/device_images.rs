//! Images on the device, and batches made of them there.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use vq_data::{Dataset, Loader, PixelRoute, RawBatch};
use vq_ops::{MIRRORED, Staging};

use crate::Result;

/// Bytes of pixels that are taken to a device unasked: CIFAR-10 is a seventh of it.
const MOST_BYTES: usize = 1 << 30;

/// Batches of a [`Loader`] made on a device of pixels that come there as u8: the same to the bit, since the pixels
/// are looked up in the same tables.
///
/// Where the whole data set lies there, a step moves four bytes an image to the device, and no thread of the CPU
/// makes batches. Else a step's pixels are copied there ahead of it, a quarter of the bytes that f32 would be.
pub struct DeviceImages {
    loader: Loader,
    /// u8 `[N,C,H,W]`, where all of them are there.
    pixels: Option<Tensor>,
    /// f32 `[C,256]`: what each pixel value becomes.
    tables: Tensor,
}

impl DeviceImages {
    /// Whether a dataset is taken to a device unasked: its pixels are in memory as they are, and at most
    /// 1 GiB of them.
    pub fn fit(dataset: &dyn Dataset) -> bool {
        !dataset.is_costly() && dataset.len() * dataset.shape().pixels() <= MOST_BYTES
    }

    /// Reads all images of the loader's dataset and takes them to `device`.
    pub fn upload(loader: &Loader, device: &Device) -> Result<Self> {
        let dataset = loader.dataset();
        let shape = dataset.shape();
        let mut pixels = vec![0; dataset.len() * shape.pixels()];
        for (index, out) in pixels.chunks_exact_mut(shape.pixels().max(1)).enumerate() {
            dataset.read(index, out)?;
        }
        let dims = (dataset.len(), shape.channels, shape.height, shape.width);
        let pixels = Tensor::from_vec(pixels, dims, device)?;
        Ok(Self { pixels: Some(pixels), ..Self::stream(loader, device)? })
    }

    /// Takes each batch's images to `device` when it is due: on CUDA through page-locked memory, from which they are
    /// copied beside the device's other work.
    pub fn stream(loader: &Loader, device: &Device) -> Result<Self> {
        let channels = loader.dataset().shape().channels;
        let tables = loader.normalization().tables().concat();
        let tables = Tensor::from_vec(tables, (channels, 256), device)?;
        let route = Arc::new(Route { device: device.clone(), spare: Mutex::default() });
        let loader = loader.clone().on_device(device).with_route(route);
        Ok(Self { loader, pixels: None, tables })
    }

    /// What [`Loader::epoch`] gives: f32 `[B,C,H,W]` of each batch from number `first_batch` on, on the
    /// device.
    pub fn epoch(
        &self,
        epoch: u64,
        first_batch: usize,
    ) -> Box<dyn Iterator<Item = Result<Tensor>> + Send> {
        let tables = self.tables.clone();
        let Some(pixels) = self.pixels.clone() else {
            let batches = self.loader.raw_epoch(epoch, first_batch);
            return Box::new(batches.map(move |batch| {
                let RawBatch { pixels, mirrored } = batch?;
                gather(&pixels, (0..).zip(mirrored), &tables)
            }));
        };
        Box::new(self.loader.picks(epoch, first_batch).map(move |picks| {
            gather(&pixels, picks.indices.into_iter().zip(picks.mirrored), &tables)
        }))
    }
}

/// To the device by way of memory that is used again.
struct Route {
    device: Device,
    spare: Mutex<Vec<Staging>>,
}

impl PixelRoute for Route {
    fn take(
        &self,
        shape: [usize; 4],
        write: &mut dyn FnMut(&mut [u8]) -> std::result::Result<(), vq_data::Error>,
    ) -> std::result::Result<Tensor, vq_data::Error> {
        let len = shape.iter().product();
        let spare = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // A last batch can be smaller.
        let fits = spare().pop().filter(|staging| staging.len() == len);
        let mut staging = match fits {
            Some(staging) => staging,
            None => Staging::new(len, &self.device)?,
        };
        write(staging.bytes()?)?;
        let pixels = staging.upload(&shape[..])?;
        spare().push(staging);
        Ok(pixels)
    }
}

/// The images of these numbers, mirrored or not.
fn gather(
    pixels: &Tensor,
    picks: impl Iterator<Item = (usize, bool)>,
    tables: &Tensor,
) -> Result<Tensor> {
    let coded = picks.map(|(index, mirrored)| index as u32 | if mirrored { MIRRORED } else { 0 });
    let coded = Tensor::new(coded.collect::<Vec<u32>>(), &Device::Cpu)?;
    Ok(vq_ops::gather_images(pixels, &coded, tables)?)
}

//! A whole data set's images on the device, and batches made of them there.

use candle_core::{Device, Tensor};
use vq_data::{Dataset, Loader};
use vq_ops::MIRRORED;

use crate::Result;

/// Bytes of pixels that are taken to a device unasked: CIFAR-10 is a seventh of it.
const MOST_BYTES: usize = 1 << 30;

/// The images of a [`Loader`]'s dataset on a device, as u8, and the loader's batches made of them: the same
/// to the bit, since the pixels are looked up in the same tables.
///
/// A step then moves four bytes an image to the device, and no thread of the CPU makes batches.
pub struct DeviceImages {
    loader: Loader,
    /// u8 `[N,C,H,W]`.
    pixels: Tensor,
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
        let tables = loader.normalization().tables().concat();
        Ok(Self {
            loader: loader.clone(),
            pixels: Tensor::from_vec(pixels, dims, device)?,
            tables: Tensor::from_vec(tables, (shape.channels, 256), device)?,
        })
    }

    /// What [`Loader::epoch`] gives: f32 `[B,C,H,W]` of each batch from number `first_batch` on, on the
    /// device.
    pub fn epoch(
        &self,
        epoch: u64,
        first_batch: usize,
    ) -> impl Iterator<Item = Result<Tensor>> + Send + use<> {
        let (pixels, tables) = (self.pixels.clone(), self.tables.clone());
        self.loader.picks(epoch, first_batch).map(move |picks| {
            let coded = picks.indices.iter().zip(&picks.mirrored);
            let coded: Vec<u32> = coded
                .map(|(&index, &mirrored)| index as u32 | if mirrored { MIRRORED } else { 0 })
                .collect();
            let coded = Tensor::new(coded, &Device::Cpu)?;
            Ok(vq_ops::gather_images(&pixels, &coded, &tables)?)
        })
    }
}

//! Batches of images from pixels that lie on the device.

use candle_core::{DType, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;

/// Set in a pick whose image is to be mirrored left to right.
pub const MIRRORED: u32 = 1 << 31;

/// `pixels` `[N, C, H, W]` u8, `picks` `[B]` u32, `tables` `[C, 256]` f32 → `[B, C, H, W]` f32: the images of
/// these numbers, mirrored left to right where [`MIRRORED`] is set, each pixel as its channel's table says. An
/// image that is not there is an error on the CPU, and anything elsewhere. The picks may lie on the CPU in any
/// case, which is best: where there is no kernel for this, they are read.
pub fn gather_images(pixels: &Tensor, picks: &Tensor, tables: &Tensor) -> Result<Tensor> {
    let (count, channels, ..) = pixels.dims4()?;
    let fits =
        (pixels.dtype(), picks.dtype(), tables.dtype()) == (DType::U8, DType::U32, DType::F32);
    if !fits || tables.dims() != [channels, 256] || count >= MIRRORED as usize {
        bail!("gather_images takes u8 [N, C, H, W], u32 [B] and f32 [C, 256]");
    }
    #[cfg(feature = "cuda")]
    if on_cuda(pixels.device()) {
        let (pixels, tables) = (pixels.contiguous()?, tables.contiguous()?);
        let picks = picks.to_device(pixels.device())?.contiguous()?;
        return pixels.apply_op3_no_bwd(&picks, &tables, &crate::cuda::training::Images);
    }
    composed(pixels, picks, tables)
}

fn composed(pixels: &Tensor, picks: &Tensor, tables: &Tensor) -> Result<Tensor> {
    let device = pixels.device();
    let (_, channels, _, width) = pixels.dims4()?;
    // candle has no operations on the bits of integers.
    let picks = picks.to_vec1::<u32>()?;
    let numbers: Vec<u32> = picks.iter().map(|pick| pick & !MIRRORED).collect();
    let is_mirrored: Vec<u8> = picks.iter().map(|&pick| u8::from(pick >= MIRRORED)).collect();
    let numbers = Tensor::new(numbers, device)?;
    let is_mirrored = Tensor::new(is_mirrored, device)?;
    let chosen = pixels.index_select(&numbers, 0)?.to_dtype(DType::U32)?;
    let first = Tensor::arange_step(0u32, 256 * channels as u32, 256, device)?;
    let entries = chosen.broadcast_add(&first.reshape((1, channels, 1, 1))?)?;
    let images = tables.flatten_all()?.index_select(&entries.flatten_all()?, 0)?;
    let images = images.reshape(chosen.shape())?;
    let reversed: Vec<u32> = (0..width as u32).rev().collect();
    let mirrored = images.index_select(&Tensor::new(reversed, device)?, 3)?;
    is_mirrored.reshape(((), 1, 1, 1))?.broadcast_as(images.shape())?.where_cond(&mirrored, &images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_picked_looked_up_and_mirrored() -> Result<()> {
        let (n, c, h, w) = (3, 2, 2, 3);
        let pixels: Vec<u8> = (0..n * c * h * w).map(|i| (i * 37 % 256) as u8).collect();
        let tables: Vec<f32> = (0..c * 256).map(|i| i as f32 * 0.5 - 3.).collect();
        let picks = [2, MIRRORED, MIRRORED | 1, 0];
        let images = gather_images(
            &Tensor::from_slice(&pixels, (n, c, h, w), &crate::test_device())?,
            &Tensor::new(&picks, &crate::test_device())?,
            &Tensor::from_slice(&tables, (c, 256), &crate::test_device())?,
        )?;
        assert_eq!(images.dims(), [4, c, h, w]);
        let images = images.flatten_all()?.to_vec1::<f32>()?;
        for (at, value) in images.iter().enumerate() {
            let (pick, channel, y, x) =
                (picks[at / (c * h * w)], at / (h * w) % c, at / w % h, at % w);
            let x = if pick >= MIRRORED { w - 1 - x } else { x };
            let image = (pick & !MIRRORED) as usize;
            let pixel = pixels[((image * c + channel) * h + y) * w + x];
            assert_eq!(value.to_bits(), tables[channel * 256 + usize::from(pixel)].to_bits());
        }
        Ok(())
    }
}

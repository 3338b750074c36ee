//! Tensors as images.

use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage, imageops};

use crate::{Error, Result};

/// What lies between and around images.
const BACKGROUND: Rgb<u8> = Rgb([255; 3]);

/// A batch of images as one picture, row by row: `[N, C, H, W] → (columns·(W + padding) + padding) ×
/// (rows·(H + padding) + padding)` pixels.
///
/// `C` is 1 (grey) or 3 (red, green, blue); values run from 0 to 1 and are clamped to that. The padding goes between
/// the images and around them; it is white, as are the places that the last row leaves empty. A batch of fewer images
/// than `columns` makes a narrower grid.
///
/// # Errors
/// A shape other than that, no image at all, a type that is not a float, a value that is not finite, no columns.
pub fn image_grid(images: &Tensor, columns: usize, padding: u32) -> Result<RgbImage> {
    let [count, channels, height, width] = *images.dims() else {
        return Err(shape_error("[N, C, H, W]", images));
    };
    if columns == 0 {
        return Err(Error::Argument("a grid of images needs at least one column".into()));
    }
    let pixels = pixels(images, "[N, C, H, W] with N ≥ 1 and C = 1 or 3", channels)?;
    let columns = columns.min(count);
    let rows = count.div_ceil(columns);
    let extent = |tiles: usize, size: usize| {
        (tiles as u64).saturating_mul(size as u64 + u64::from(padding)) + u64::from(padding)
    };
    let mut grid = blank(extent(columns, width), extent(rows, height))?;
    let size = channels * height * width;
    for (i, image) in pixels.chunks_exact(size).enumerate() {
        let place = |tile: usize, size: usize| tile as u32 * (size as u32 + padding) + padding;
        let (left, top) = (place(i % columns, width), place(i / columns, height));
        draw(&mut grid, image, (channels, height, width), (left, top));
    }
    Ok(grid)
}

/// One image: `[C, H, W] → W × H` pixels; `C` is 1 or 3, values from 0 to 1, clamped to that.
///
/// # Errors
/// As [`image_grid`].
pub fn tensor_to_image(image: &Tensor) -> Result<RgbImage> {
    let [channels, height, width] = *image.dims() else {
        return Err(shape_error("[C, H, W]", image));
    };
    let pixels = pixels(image, "[C, H, W] with C = 1 or 3", channels)?;
    let mut picture = blank(width as u64, height as u64)?;
    draw(&mut picture, &pixels, (channels, height, width), (0, 0));
    Ok(picture)
}

/// Two pictures beside each other, `padding` white pixels between them; the lower one is centred vertically.
///
/// # Errors
/// [`Error::TooLarge`] where the result has more pixels than an image can have.
pub fn side_by_side(left: &RgbImage, right: &RgbImage, padding: u32) -> Result<RgbImage> {
    let height = left.height().max(right.height());
    let start = u64::from(left.width()) + u64::from(padding);
    let mut picture = blank(start + u64::from(right.width()), u64::from(height))?;
    for (image, x) in [(left, 0), (right, start)] {
        let y = (height - image.height()) / 2;
        imageops::replace(&mut picture, image, x as i64, i64::from(y));
    }
    Ok(picture)
}

fn shape_error(expected: &'static str, tensor: &Tensor) -> Error {
    Error::Shape { expected, actual: tensor.dims().to_vec() }
}

/// The values in their order, all of them finite.
fn pixels(images: &Tensor, expected: &'static str, channels: usize) -> Result<Vec<f32>> {
    if !matches!(channels, 1 | 3) || images.elem_count() == 0 {
        return Err(shape_error(expected, images));
    }
    if !images.dtype().is_float() {
        return Err(Error::DType(images.dtype()));
    }
    let values =
        images.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if let Some((i, &value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        let mut rest = i;
        let mut position: Vec<usize> = images
            .dims()
            .iter()
            .rev()
            .map(|&size| {
                let index = rest % size;
                rest /= size;
                index
            })
            .collect();
        position.reverse();
        return Err(Error::NotFinite { position, value });
    }
    Ok(values)
}

/// A white picture. PNG and the image crate count pixels in u32; a gigabyte is a bug, not a picture.
fn blank(width: u64, height: u64) -> Result<RgbImage> {
    let too_large = || Error::TooLarge { width, height };
    if width.saturating_mul(height) > 1 << 28 {
        return Err(too_large());
    }
    let width = u32::try_from(width).map_err(|_| too_large())?;
    let height = u32::try_from(height).map_err(|_| too_large())?;
    Ok(RgbImage::from_pixel(width, height, BACKGROUND))
}

/// Draws `[C, H, W]` values with their upper left corner at a place.
fn draw(
    picture: &mut RgbImage,
    image: &[f32],
    (channels, height, width): (usize, usize, usize),
    (left, top): (u32, u32),
) {
    let plane = height * width;
    for (i, _) in image.iter().take(plane).enumerate() {
        let at = |c: usize| (image[c % channels * plane + i].clamp(0.0, 1.0) * 255.0).round() as u8;
        let (x, y) = ((i % width) as u32, (i / width) as u32);
        picture.put_pixel(left + x, top + y, Rgb([at(0), at(1), at(2)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHITE: [u8; 3] = [255; 3];

    /// Image n of the batch holds red = n·10, green = y, blue = x, each over 255.
    fn batch(count: usize, height: usize, width: usize) -> Tensor {
        let mut values = Vec::new();
        for n in 0..count {
            for channel in 0..3 {
                for y in 0..height {
                    for x in 0..width {
                        values.push([n * 10, y, x][channel] as f32 / 255.0);
                    }
                }
            }
        }
        Tensor::from_vec(values, (count, 3, height, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn every_pixel_of_a_grid_is_in_its_place() {
        let (height, width, padding) = (4, 6, 2);
        let grid = image_grid(&batch(5, height, width), 3, padding).unwrap();
        assert_eq!(grid.dimensions(), (3 * 8 + 2, 2 * 6 + 2));
        for (x, y, pixel) in grid.enumerate_pixels() {
            let (column, row) = (x / 8, y / 6);
            let inside = x % 8 >= 2 && y % 6 >= 2;
            let n = row * 3 + column;
            let expected = if inside && n < 5 {
                [n as u8 * 10, (y % 6) as u8 - 2, (x % 8) as u8 - 2]
            } else {
                WHITE
            };
            assert_eq!(pixel.0, expected, "at ({x}, {y})");
        }
    }

    #[test]
    fn the_last_row_ends_in_background() {
        let black = Tensor::zeros((4, 1, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let grid = image_grid(&black, 3, 0).unwrap();
        assert_eq!(grid.dimensions(), (6, 4));
        assert_eq!(grid.get_pixel(1, 3).0, [0; 3]);
        assert_eq!(grid.get_pixel(2, 2).0, WHITE);
        assert_eq!(grid.get_pixel(5, 3).0, WHITE);
    }

    #[test]
    fn a_small_batch_makes_a_narrow_grid() {
        let grid = image_grid(&batch(2, 4, 4), 8, 1).unwrap();
        assert_eq!(grid.dimensions(), (11, 6));
    }

    #[test]
    fn values_are_rounded_and_clamped() {
        let values: [f32; 6] = [-3.0, 0.0, 0.4999 / 255.0, 0.5001 / 255.0, 1.0, 7.0];
        let image = Tensor::from_slice(&values, (1, 1, 6), &Device::Cpu).unwrap();
        let picture = tensor_to_image(&image).unwrap();
        let row: Vec<_> = picture.pixels().map(|p| p.0).collect();
        assert_eq!(row, [0, 0, 0, 1, 255, 255].map(|v| [v; 3]));
    }

    #[test]
    fn eight_bits_survive_the_way_through_floats() {
        let values: Vec<f32> = (0..256).map(|v| v as f32 / 255.0).collect();
        let image = Tensor::from_vec(values, (1, 16, 16), &Device::Cpu).unwrap();
        let picture = tensor_to_image(&image).unwrap();
        assert!(picture.pixels().enumerate().all(|(i, p)| p.0 == [i as u8; 3]));
    }

    #[test]
    fn channels_are_red_green_blue() {
        let image = Tensor::new(&[1f32, 0.5, 0.0], &Device::Cpu).unwrap();
        let picture = tensor_to_image(&image.reshape((3, 1, 1)).unwrap()).unwrap();
        assert_eq!(picture.get_pixel(0, 0).0, [255, 128, 0]);
    }

    #[test]
    fn layout_and_float_type_do_not_matter() {
        let images = batch(3, 4, 6);
        let expected = image_grid(&images, 2, 1).unwrap();
        let strided = images.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
        let strided = strided.permute((0, 3, 1, 2)).unwrap();
        assert!(!strided.is_contiguous());
        assert_eq!(image_grid(&strided, 2, 1).unwrap(), expected);
        let wide = images.to_dtype(DType::F64).unwrap();
        assert_eq!(image_grid(&wide, 2, 1).unwrap(), expected);
    }

    #[test]
    fn what_is_not_finite_is_an_error_with_its_place() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5f32; 2 * 3 * 4 * 5];
            values[60 + 20 + 2 * 5 + 4] = bad;
            let images = Tensor::from_vec(values, (2, 3, 4, 5), &Device::Cpu).unwrap();
            match image_grid(&images, 2, 0).unwrap_err() {
                Error::NotFinite { position, .. } => assert_eq!(position, [1, 1, 2, 4]),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        for shape in [&[3, 4, 4][..], &[1, 2, 4, 4], &[1, 4, 4, 4], &[0, 3, 4, 4], &[1, 3, 0, 4]] {
            let error = image_grid(&zeros(shape), 2, 0).unwrap_err();
            assert!(matches!(&error, Error::Shape { actual, .. } if actual == shape), "{error}");
        }
        assert!(tensor_to_image(&zeros(&[1, 3, 4, 4])).is_err());
        assert!(tensor_to_image(&zeros(&[2, 4, 4])).is_err());
        assert!(image_grid(&zeros(&[1, 3, 4, 4]), 0, 0).is_err());
        let bytes = zeros(&[1, 3, 4, 4]).to_dtype(DType::U8).unwrap();
        assert!(matches!(image_grid(&bytes, 1, 0), Err(Error::DType(DType::U8))));
        let error = image_grid(&zeros(&[1, 3, 4, 4]), 1, u32::MAX).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }

    #[test]
    fn side_by_side_puts_padding_between() {
        let red = RgbImage::from_pixel(3, 4, Rgb([255, 0, 0]));
        let blue = RgbImage::from_pixel(2, 2, Rgb([0, 0, 255]));
        let picture = side_by_side(&red, &blue, 1).unwrap();
        assert_eq!(picture.dimensions(), (6, 4));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let expected = match (x, y) {
                (0..=2, _) => [255, 0, 0],
                (4..=5, 1 | 2) => [0, 0, 255],
                _ => WHITE,
            };
            assert_eq!(pixel.0, expected, "at ({x}, {y})");
        }
        assert!(side_by_side(&red, &blue, u32::MAX).is_err());
    }
}

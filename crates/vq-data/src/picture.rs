//! Image files as the models see them: decoded by content, upright, RGB, cropped to a size.

mod exact;
mod header;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

pub use exact::load_exact;
pub(crate) use header::check;

use crate::Error;

/// Reads an image file: the format is told by its content, the EXIF orientation is applied,
/// transparency is laid over white, grey and 16-bit images become 8-bit RGB, and of an animation
/// the first picture is taken. [`load_exact`] refuses what loses something by that.
pub fn load(path: impl AsRef<Path>) -> Result<RgbImage, Error> {
    let path = path.as_ref();
    let (file, format) = open(path)?;
    let reader = ImageReader::with_format(BufReader::new(file), format);
    guarded(path, || decode(reader).map(to_rgb))
}

/// Scales the shorter side to a size and cuts the middle out of the longer one: any size →
/// `[height, width]` pixels. An image of that size stays as it is, to the bit.
pub fn fit(image: &RgbImage, size: [usize; 2]) -> RgbImage {
    let [height, width] = size.map(|side| side.clamp(1, 1 << 16) as u32);
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    // Cropping first gives the same picture and never makes a large one in between.
    let (w, h) = (u64::from(image.width()), u64::from(image.height()));
    let (crop_w, crop_h) = if w * u64::from(height) > h * u64::from(width) {
        (rounded_ratio(h * u64::from(width), u64::from(height)), h)
    } else {
        (w, rounded_ratio(w * u64::from(height), u64::from(width)))
    };
    let (crop_w, crop_h) = (crop_w.clamp(1, w.max(1)), crop_h.clamp(1, h.max(1)));
    let (x, y) = ((w - crop_w) / 2, (h - crop_h) / 2);
    let crop = imageops::crop_imm(image, x as u32, y as u32, crop_w as u32, crop_h as u32);
    if (crop_w, crop_h) == (u64::from(width), u64::from(height)) {
        return crop.to_image();
    }
    imageops::resize(&*crop, width, height, FilterType::Lanczos3)
}

/// The pixels of an image plane by plane, u8 `[3,H,W]`.
pub fn to_chw(image: &RgbImage) -> Vec<u8> {
    let plane = image.width() as usize * image.height() as usize;
    let mut chw = vec![0; 3 * plane];
    for (i, pixel) in image.as_raw().chunks_exact(3).enumerate() {
        for (c, &value) in pixel.iter().enumerate() {
            chw[c * plane + i] = value;
        }
    }
    chw
}

/// Whether the content of a file starts like that of an image, whatever its name.
pub(crate) fn is_image(path: &Path) -> Result<bool, Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    Ok(image::guess_format(&start(path, &mut file)?).is_ok())
}

/// An image file, at its start, and the format that its content has.
fn open(path: &Path) -> Result<(File, ImageFormat), Error> {
    let broken = |reason: String| Error::Image { path: path.into(), reason };
    let mut file = File::open(path).map_err(Error::io(path))?;
    // The content alone: a text file named .png is no PNG.
    let format = image::guess_format(&start(path, &mut file)?)
        .map_err(|_| broken("its content is not PNG, JPEG, WebP, GIF, BMP or TIFF".to_owned()))?;
    if !format.reading_enabled() {
        let name = format.extensions_str().first().unwrap_or(&"this");
        return Err(broken(format!("the format {name} is not supported")));
    }
    file.rewind().map_err(Error::io(path))?;
    Ok((file, format))
}

/// The first bytes of a file, by which its format is told.
fn start(path: &Path, file: &mut File) -> Result<Vec<u8>, Error> {
    let mut start = Vec::with_capacity(32);
    file.take(32).read_to_end(&mut start).map_err(Error::io(path))?;
    Ok(start)
}

/// What a decoder says of a file; its own bug must not end the program.
fn guarded<T>(path: &Path, decode: impl FnOnce() -> Result<T, String>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err("its decoder failed".to_owned()))
        .map_err(|reason| Error::Image { path: path.into(), reason })
}

/// What an image may take once it is decoded: a few kilobytes can claim to be many gigabytes.
const MOST_BYTES: u64 = 1 << 30;

/// The image as it is, upright.
fn decode(reader: ImageReader<impl BufRead + Seek>) -> Result<DynamicImage, String> {
    let mut decoder = decoder(reader)?;
    let orientation = decoder.orientation().map_err(one_line)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Reads the header.
fn decoder<'a, R: BufRead + Seek + 'a>(
    mut reader: ImageReader<R>,
) -> Result<impl ImageDecoder + 'a, String> {
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(MOST_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(one_line)?;
    // The limits count what decoders take beside the image, not the image itself.
    if decoder.total_bytes() > MOST_BYTES {
        let (width, height) = decoder.dimensions();
        return Err(format!("it claims {width}×{height} pixels, more than 1 GiB"));
    }
    Ok(decoder)
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err gives it")]
fn one_line(error: image::ImageError) -> String {
    error.to_string().replace('\n', " ")
}

fn rounded_ratio(numerator: u64, denominator: u64) -> u64 {
    (numerator + denominator / 2) / denominator.max(1)
}

fn to_rgb(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    let (width, height) = rgba.dimensions();
    let over_white = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    RgbImage::from_fn(width, height, |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0;
        image::Rgb([r, g, b].map(|value| over_white(value, a)))
    })
}

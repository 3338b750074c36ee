//! Reading image files where nothing may be lost.

use std::io::{BufRead, BufReader, Seek};
use std::path::Path;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, ColorType, DynamicImage, ImageFormat, ImageReader, RgbImage};

use super::{decode, guarded, open};
use crate::Error;

/// As [`load`](super::load), but an image of which that would lose something is refused: one with
/// transparency, of more than 8 bits a channel, or of several pictures. Grey becomes RGB with three equal
/// channels, and an alpha channel that is opaque everywhere is left out. Of a JPEG these are the pixels that
/// it decodes to; metadata, colour profiles among them, are no pixels.
pub fn load_exact(path: impl AsRef<Path>) -> Result<RgbImage, Error> {
    let path = path.as_ref();
    let (file, format) = open(path)?;
    let is_animated = guarded(path, || Ok(is_animated(BufReader::new(file), format)))?;
    let lossy = |what: &str| Error::NotExact { path: path.into(), what: what.to_owned() };
    if is_animated {
        return Err(lossy("holds several pictures, of which the first would be kept alone"));
    }
    let (file, format) = open(path)?;
    let reader = ImageReader::with_format(BufReader::new(file), format);
    let image = guarded(path, || decode(reader))?;
    match image.color() {
        ColorType::L8 | ColorType::Rgb8 => Ok(image.into_rgb8()),
        ColorType::La8 | ColorType::Rgba8 => {
            let rgba = image.into_rgba8();
            if rgba.pixels().any(|pixel| pixel.0[3] != u8::MAX) {
                return Err(lossy("has transparent pixels, which would be laid over white"));
            }
            Ok(DynamicImage::ImageRgba8(rgba).into_rgb8())
        }
        _ => Err(lossy("has more than 8 bits a channel, of which 8 would be kept")),
    }
}

/// Whether there is more than one picture. False where that cannot be told: decoding will say why.
fn is_animated(reader: impl BufRead + Seek, format: ImageFormat) -> bool {
    match format {
        ImageFormat::Gif => {
            GifDecoder::new(reader).is_ok_and(|decoder| decoder.into_frames().take(2).count() > 1)
        }
        ImageFormat::WebP => WebPDecoder::new(reader).is_ok_and(|decoder| decoder.has_animation()),
        ImageFormat::Png => {
            PngDecoder::new(reader).is_ok_and(|decoder| decoder.is_apng().unwrap_or(false))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use image::{Delay, Frame, Luma, LumaA, Rgb, Rgba};

    use super::*;
    use crate::picture::load;

    #[test]
    fn what_would_be_lost_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let rgb = RgbImage::from_fn(3, 2, |x, y| Rgb([x as u8, y as u8, 7]));
        rgb.save(path("rgb.png")).unwrap();
        image::GrayImage::from_pixel(3, 2, Luma([9])).save(path("grey.png")).unwrap();
        image::RgbaImage::from_pixel(3, 2, Rgba([1, 2, 3, 255])).save(path("opaque.png")).unwrap();
        for name in ["rgb.png", "grey.png", "opaque.png"] {
            assert_eq!(load_exact(path(name)).unwrap(), load(path(name)).unwrap(), "{name}");
        }
        let mut clear = image::RgbaImage::from_pixel(3, 2, Rgba([1, 2, 3, 255]));
        clear.put_pixel(2, 1, Rgba([1, 2, 3, 254]));
        clear.save(path("clear.png")).unwrap();
        image::GrayAlphaImage::from_pixel(3, 2, LumaA([1, 0])).save(path("pale.png")).unwrap();
        image::ImageBuffer::from_pixel(3, 2, Rgb([256u16, 2, 3])).save(path("deep.png")).unwrap();
        image::ImageBuffer::from_pixel(3, 2, Luma([256u16])).save(path("deep.tiff")).unwrap();
        let frame = |value| {
            let pixels = image::RgbaImage::from_pixel(3, 2, Rgba([value, 0, 0, 255]));
            Frame::from_parts(pixels, 0, 0, Delay::from_numer_denom_ms(100, 1))
        };
        for (name, frames) in [("one.gif", 1), ("two.gif", 2)] {
            let file = std::fs::File::create(path(name)).unwrap();
            let mut encoder = image::codecs::gif::GifEncoder::new(file);
            encoder.encode_frames((0..frames).map(|value| frame(value * 100))).unwrap();
        }
        load_exact(path("one.gif")).unwrap();
        for (name, part) in [
            ("clear.png", "transparent"),
            ("pale.png", "transparent"),
            ("deep.png", "8 bits"),
            ("deep.tiff", "8 bits"),
            ("two.gif", "several pictures"),
        ] {
            load(path(name)).unwrap();
            let error = load_exact(path(name)).unwrap_err().to_string();
            for part in [name, part, "convert it"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }
}

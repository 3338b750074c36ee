//! Charts as pixels: rectangles, dots and text, for what is to be a PNG. A font comes with it, since a program
//! cannot count on finding one on the machine.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use plotters::style::RGBColor;

use crate::{Error, Result};

/// A white page. What falls outside it is left out.
pub(crate) struct Raster {
    image: RgbImage,
}

/// The look of a text.
#[derive(Clone, Copy)]
pub(crate) struct Font {
    pub(crate) is_bold: bool,
    pub(crate) colour: RGBColor,
}

const HEIGHT: RasterHeight = RasterHeight::Size20;

impl Raster {
    pub(crate) fn new(width: i32, height: i32) -> Result<Self> {
        let (width, height) = (i64::from(width).max(0) as u64, i64::from(height).max(0) as u64);
        if width * height > 1 << 28 {
            return Err(Error::TooLarge { width, height });
        }
        Ok(Self { image: RgbImage::from_pixel(width as u32, height as u32, Rgb([255; 3])) })
    }

    pub(crate) fn into_image(self) -> RgbImage {
        self.image
    }

    /// A filled rectangle, its upper left corner at (x, y).
    pub(crate) fn rectangle(
        &mut self,
        (x, y): (i32, i32),
        (width, height): (i32, i32),
        colour: RGBColor,
    ) {
        for row in y..y + height {
            for column in x..x + width {
                self.mix(column, row, colour, 1.0);
            }
        }
    }

    /// A filled disc around the middle of a pixel.
    pub(crate) fn disc(&mut self, (x, y): (i32, i32), radius: i32, colour: RGBColor) {
        for dy in -radius..=radius {
            for dx in -radius..=radius {
                let distance = f64::from(dx * dx + dy * dy).sqrt();
                self.mix(
                    x + dx,
                    y + dy,
                    colour,
                    (f64::from(radius) + 0.5 - distance).clamp(0.0, 1.0),
                );
            }
        }
    }

    /// Text with its left end at `x`, in the middle of its height at `y`.
    pub(crate) fn text(&mut self, text: &str, (x, y): (i32, i32), font: Font) {
        let weight = if font.is_bold { FontWeight::Bold } else { FontWeight::Regular };
        let top = y - HEIGHT.val() as i32 / 2;
        for (index, character) in text.chars().enumerate() {
            let known = get_raster(character, weight, HEIGHT);
            let Some(glyph) = known.or_else(|| get_raster('?', weight, HEIGHT)) else { continue };
            let left = x + index as i32 * character_width();
            for (dy, row) in glyph.rows().enumerate() {
                for (dx, ink) in row.iter().enumerate() {
                    let part = f64::from(*ink) / 255.0;
                    self.mix(left + dx as i32, top + dy as i32, font.colour, part);
                }
            }
        }
    }

    fn mix(&mut self, x: i32, y: i32, colour: RGBColor, part: f64) {
        let place = u32::try_from(x).ok().zip(u32::try_from(y).ok());
        let Some(pixel) = place.and_then(|(x, y)| self.image.get_pixel_mut_checked(x, y)) else {
            return;
        };
        for (channel, ink) in pixel.0.iter_mut().zip([colour.0, colour.1, colour.2]) {
            *channel = (f64::from(*channel) * (1.0 - part) + f64::from(ink) * part).round() as u8;
        }
    }
}

/// The width of a text in pixels: every character is as wide as any other.
pub(crate) fn text_width(text: &str) -> i32 {
    text.chars().count() as i32 * character_width()
}

fn character_width() -> i32 {
    get_raster_width(FontWeight::Regular, HEIGHT) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLACK: RGBColor = RGBColor(0, 0, 0);

    fn inked(image: &RgbImage) -> usize {
        image.pixels().filter(|pixel| pixel.0 != [255; 3]).count()
    }

    #[test]
    fn rectangles_and_discs_cover_what_they_should() {
        let mut raster = Raster::new(40, 30).unwrap();
        raster.rectangle((2, 3), (5, 4), RGBColor(1, 2, 3));
        let image = raster.into_image();
        assert_eq!(inked(&image), 20);
        assert_eq!(image.get_pixel(6, 6).0, [1, 2, 3]);
        let mut raster = Raster::new(40, 30).unwrap();
        raster.disc((20, 15), 5, BLACK);
        let image = raster.into_image();
        let ink: f64 = image.pixels().map(|pixel| 1.0 - f64::from(pixel.0[0]) / 255.0).sum();
        // A pixel's part is taken from the distance of its middle alone, which is good to a pixel or two.
        assert!((ink - std::f64::consts::PI * 25.0).abs() < 2.0, "{ink}");
    }

    #[test]
    fn text_is_as_wide_as_is_said_and_unknown_characters_show() {
        let font = Font { is_bold: false, colour: BLACK };
        let mut raster = Raster::new(200, 30).unwrap();
        raster.text("PSNR ±", (10, 15), font);
        let image = raster.into_image();
        let columns: Vec<u32> =
            (0..200).filter(|x| (0..30).any(|y| image.get_pixel(*x, y).0 != [255; 3])).collect();
        assert!(columns[0] >= 10 && columns.last().unwrap() < &(10 + text_width("PSNR ±") as u32));
        let one = |text: &str| {
            let mut raster = Raster::new(30, 30).unwrap();
            raster.text(text, (5, 15), font);
            raster.into_image()
        };
        assert_eq!(one("語"), one("?"));
        assert!(inked(&one("±")) > 10 && one("±") != one("?"));
    }

    #[test]
    fn what_is_outside_is_left_out() {
        let mut raster = Raster::new(10, 10).unwrap();
        raster.rectangle((-5, -5), (8, 8), BLACK);
        raster.disc((10, 10), 3, BLACK);
        raster.text("far away", (500, -40), Font { is_bold: true, colour: BLACK });
        assert!(inked(&raster.into_image()) > 9);
        assert!(Raster::new(i32::MAX, i32::MAX).is_err());
    }
}

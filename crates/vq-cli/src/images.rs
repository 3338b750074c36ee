//! Image files for a model that is there already.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use image::{RgbImage, imageops};
use vq_data::{Dataset, ImageShape, InMemory, LARGEST_SIDE, picture};
use vq_model::Config;

use crate::cli::LogFormat;
use crate::error::{Error, Result};
use crate::output;

#[derive(Clone, Debug, Args)]
pub(crate) struct ImageArgs {
    /// Image files (PNG, JPEG, WebP, GIF, BMP, TIFF).
    #[arg(required = true, value_name = "IMAGE")]
    files: Vec<PathBuf>,

    /// Scale and crop the images to this size first: N for N×N, or `WIDTHxHEIGHT`. Without it they
    /// keep their size, less the margin that the model's downsampling does not divide.
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
}

/// A size in pixels: N for N×N, or `WIDTHxHEIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (width, height) = text.split_once('x').unwrap_or((text, text));
        match (width.parse::<usize>(), height.parse::<usize>()) {
            (Ok(width), Ok(height))
                if width.min(height) > 0 && width.max(height) <= LARGEST_SIDE =>
            {
                Ok(Self { height, width })
            }
            _ => Err(format!("give N or WIDTHxHEIGHT, in pixels, at most {LARGEST_SIDE} each")),
        }
    }
}

/// An image file in the size in which the model gets it.
pub(crate) struct Picture {
    pub(crate) path: PathBuf,
    pub(crate) image: RgbImage,
}

impl ImageArgs {
    /// Reads all files before anything is done with one of them.
    pub(crate) fn load(&self, config: &Config, format: LogFormat) -> Result<Vec<Picture>> {
        require_rgb(config)?;
        if let Some(size) = self.size {
            // Refuses a size that the model cannot take.
            config.grids(size.height, size.width)?;
        }
        let mut pictures = Vec::with_capacity(self.files.len());
        let mut cropped = 0;
        for path in &self.files {
            let original = picture::load(path)?;
            let image = match self.size {
                Some(size) => picture::fit(&original, [size.height, size.width]),
                None => crop(&original, config.downsampling()).ok_or_else(|| {
                    let (width, height) = original.dimensions();
                    Error::other(format!(
                        "{} is {width}×{height}, smaller than one code of the model (downsampling {}): \
                         scale it up with --size",
                        path.display(),
                        config.downsampling()
                    ))
                })?,
            };
            cropped +=
                usize::from(self.size.is_none() && image.dimensions() != original.dimensions());
            pictures.push(Picture { path: path.clone(), image });
        }
        if cropped > 0 {
            let multiple = config.downsampling();
            let message = format!(
                "{cropped} of {} images cropped to multiples of {multiple} pixels; --size scales instead",
                pictures.len()
            );
            output::note(format, &message)?;
        }
        Ok(pictures)
    }

    /// Reads all files where no pixel may be changed: what [`load`](Self::load) would scale, cut or convert
    /// is refused.
    pub(crate) fn load_exact(&self, config: &Config) -> Result<Vec<Picture>> {
        require_rgb(config)?;
        if self.size.is_some() {
            return Err(Error::other(
                "--size scales the images and --lossless keeps every pixel: leave out one of them",
            ));
        }
        let mut pictures: Vec<Picture> = Vec::with_capacity(self.files.len());
        for path in &self.files {
            let image = picture::load_exact(path)?;
            let (size, multiple) = (image.dimensions(), config.downsampling() as u32);
            let (width, height) = size;
            if !width.is_multiple_of(multiple) || !height.is_multiple_of(multiple) {
                return Err(Error::other(format!(
                    "{} is {width}×{height}, and the model takes multiples of {multiple} pixels: pad it or cut it to \
                     such a size first, since --lossless keeps every pixel",
                    path.display()
                )));
            }
            if let Some(first) = pictures.first().filter(|first| first.image.dimensions() != size) {
                let (w, h) = first.image.dimensions();
                return Err(Error::other(format!(
                    "{} is {w}×{h} and {} is {width}×{height}, and a file holds images of one size: compress them \
                     into a file each",
                    first.path.display(),
                    path.display()
                )));
            }
            pictures.push(Picture { path: path.clone(), image });
        }
        Ok(pictures)
    }
}

fn require_rgb(config: &Config) -> Result<()> {
    if config.channels == 3 {
        return Ok(());
    }
    Err(Error::other(format!(
        "the model takes images of {} channels, and image files give 3: use another model",
        config.channels
    )))
}

/// The middle of an image, as much as is a multiple of `multiple` on both sides; `None` if that is
/// nothing.
fn crop(image: &RgbImage, multiple: usize) -> Option<RgbImage> {
    let multiple = multiple as u32;
    let (width, height) =
        (image.width() / multiple * multiple, image.height() / multiple * multiple);
    if width == 0 || height == 0 {
        return None;
    }
    let (x, y) = ((image.width() - width) / 2, (image.height() - height) / 2);
    Some(imageops::crop_imm(image, x, y, width, height).to_image())
}

/// Pictures of one size as a data set.
pub(crate) fn dataset(pictures: &[Picture]) -> Result<Arc<dyn Dataset>> {
    let Some(first) = pictures.first() else {
        return Err(Error::other("there is no image"));
    };
    let (width, height) = first.image.dimensions();
    for picture in pictures {
        if picture.image.dimensions() != (width, height) {
            let (w, h) = picture.image.dimensions();
            return Err(Error::other(format!(
                "{} is {width}×{height} and {} is {w}×{h}: bring them to one size with --size",
                first.path.display(),
                picture.path.display()
            )));
        }
    }
    let shape = ImageShape { channels: 3, height: height as usize, width: width as usize };
    let pixels = pictures.iter().flat_map(|picture| picture::to_chw(&picture.image)).collect();
    let labels = vec![0; pictures.len()];
    Ok(Arc::new(InMemory::new("the given images", shape, pixels, labels, Vec::new())?))
}

/// `FOLDER/STEM_SUFFIX.png` for each path, with numbers where two would be the same.
pub(crate) fn outputs<'a>(
    folder: &Path,
    paths: impl IntoIterator<Item = &'a Path>,
    suffix: &str,
) -> Vec<PathBuf> {
    let mut taken = BTreeSet::new();
    let mut outputs = Vec::new();
    for path in paths {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let names = std::iter::once(format!("{stem}_{suffix}.png"))
            .chain((2..).map(|number| format!("{stem}_{suffix}_{number}.png")));
        for name in names {
            if taken.insert(name.clone()) {
                outputs.push(folder.join(name));
                break;
            }
        }
    }
    outputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_width_by_height() {
        assert_eq!("64x48".parse(), Ok(Size { height: 48, width: 64 }));
        assert_eq!("32".parse(), Ok(Size { height: 32, width: 32 }));
        for text in ["", "x", "0", "32x", "32x0", "-1", "1x2x3"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_middle_is_kept() {
        let image = RgbImage::from_fn(10, 7, |x, y| image::Rgb([x as u8, y as u8, 0]));
        let cropped = crop(&image, 4).unwrap();
        assert_eq!(cropped.dimensions(), (8, 4));
        assert_eq!(cropped.get_pixel(0, 0).0, [1, 1, 0]);
        assert!(crop(&image, 8).is_none());
    }

    #[test]
    fn names_do_not_collide() {
        let paths = ["a/x.png", "b/x.jpg", "y"].map(Path::new);
        let outputs = outputs(Path::new("out"), paths, "recon");
        let expected = ["out/x_recon.png", "out/x_recon_2.png", "out/y_recon.png"];
        assert_eq!(outputs, expected.map(PathBuf::from));
    }
}

//! What can go wrong.

use std::{io, path::PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a picture could not be made or written. Each message is one line and holds its cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// candle refused an operation, for example a copy from a device.
    #[error("cannot read the tensor of a picture: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A tensor's shape is not that of images.
    #[error("expected images of shape {expected}, got {actual:?}")]
    Shape {
        /// What the function takes.
        expected: &'static str,
        /// What it got.
        actual: Vec<usize>,
    },
    /// A tensor does not hold floats.
    #[error("expected images as floats between 0 and 1, got the type {}", .0.as_str())]
    DType(candle_core::DType),
    /// A pixel is NaN or infinite.
    #[error(
        "the pixel at {position:?} is {value}: the picture would hide that the model broke down"
    )]
    NotFinite {
        /// The index of the first such pixel, one number for each dimension of the tensor.
        position: Vec<usize>,
        /// Its value.
        value: f32,
    },
    /// An argument out of its range.
    #[error("{0}")]
    Argument(String),
    /// The picture has more pixels than a picture can have.
    #[error("a picture of {width}×{height} pixels is too large")]
    TooLarge {
        /// Width in pixels.
        width: u64,
        /// Height in pixels.
        height: u64,
    },
    /// An SVG could not be drawn.
    #[error("cannot draw the chart: {0}")]
    Draw(String),
    /// An image could not be encoded.
    #[error("cannot encode {}: {cause}", path.display())]
    Encode {
        /// The file that was to hold it.
        path: PathBuf,
        /// The encoder's words.
        cause: image::ImageError,
    },
    /// A file could not be written; what was there before is untouched.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's words.
        cause: io::Error,
    },
}

//! Pictures of training: grids of images and comparisons as PNG, curves and codebook usage as SVG.
//!
//! Plain tensors and numbers go in, files come out; nothing here knows of a model or of a trainer. Every file is
//! written whole or not at all: into a temporary file in the same folder, synced, then renamed over its name.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use vq_viz::{Panel, Series, image_grid, save_curves, save_png};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! let images = Tensor::rand(0f32, 1f32, (6, 3, 32, 32), &Device::Cpu)?;
//! save_png(&image_grid(&images, 4, 2)?, &folder.join("grid.png"))?;
//!
//! let loss = Series::new("train", vec![(1.0, 0.31), (2.0, 0.12), (3.0, 0.07)]);
//! let panel = Panel::new("Loss", vec![loss]).axes("epoch", "").log_y();
//! save_curves(&folder.join("curves.svg"), "A run", &[panel])?;
//! # Ok(())
//! # }
//! ```

mod axis;
mod canvas;
mod comparison;
mod curves;
mod error;
mod file;
mod grid;
mod raster;
#[cfg(test)]
mod test_svg;
mod usage;

pub use comparison::{Compared, comparison_chart, save_comparison};
pub use curves::{Panel, Series, curves_svg, save_curves};
pub use error::{Error, Result};
pub use file::save_png;
pub use grid::{image_grid, side_by_side, tensor_to_image};
pub use image::RgbImage;
pub use usage::{Usage, codebook_heat_map, codebook_usage_svg, save_codebook_usage};

//! Image data for training tokenizers: where the pictures come from, and the batches that a
//! training loop eats.
//!
//! [`open`] turns a [`Source`] (`auto`, `cifar10`, `shapes`, `folder:PATH`) into the [`Splits`]
//! `train` and `test`, two [`Dataset`]s of u8 images `[C,H,W]`. A [`Loader`] shuffles, flips,
//! normalises and batches one of them on a thread of its own. What batch `n` of epoch `e` holds
//! depends on the seed, `e` and `n` alone, so a run can resume anywhere.
//!
//! What a tokenizer makes of a whole data set is kept in a [`CodesFolder`], which a [`CodesWriter`] writes.
//!
//! ```
//! use vq_data::{Loader, LoaderOptions, Normalization, OpenOptions, Source, open};
//!
//! # fn main() -> Result<(), vq_data::Error> {
//! let options = OpenOptions { train_count: 64, test_count: 16, ..OpenOptions::default() };
//! let splits = open(&Source::Shapes, &options)?;
//! let normalization = Normalization { mean: vec![0.5; 3], std: vec![1.0; 3] };
//! let options = LoaderOptions { batch_size: 32, ..LoaderOptions::default() };
//! let loader = Loader::new(splits.train, normalization, options)?;
//! for batch in loader.epoch(/* epoch */ 0, /* first batch */ 0) {
//!     assert_eq!(batch?.images.dims(), [32, 3, 32, 32]);
//! }
//! # Ok(())
//! # }
//! ```

mod cache;
mod cifar;
mod codes;
mod dataset;
mod error;
mod file;
mod folder;
mod loader;
mod normalization;
pub mod picture;
mod random;
pub mod shapes;
mod source;

pub use cache::cache_dir;
pub use codes::{
    CODES_FORMAT_VERSION, CODES_ORDER, CodesFolder, CodesLevel, CodesManifest, CodesWriter,
    ImageCodes, MANIFEST_FILE,
};
pub use dataset::{BrokenFile, Dataset, ImageShape, InMemory, Splits, pixel_variance};
pub use error::Error;
pub use folder::Indexing;
pub use loader::{Batch, Batches, Loader, LoaderOptions, Picks, PixelRoute, RawBatch};
pub use normalization::Normalization;
pub use source::{LARGEST_SIDE, OnBroken, OpenOptions, Source, open, open_watched};

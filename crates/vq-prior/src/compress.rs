//! Images as files of entropy-coded codes and, where nothing may be lost, pixels.
//!
//! A file holds the codes of a batch of images after the other, each code under the distribution that a
//! prior gives it (all codes equally probable without one), and, if it is lossless, the pixels under
//! p(x|z). Its size is the bits that are computed for it plus a head and some 30 bytes a block.
//!
//! Writing and reading run the same function over the same batches in the same order, one with a range
//! encoder and one with a decoder: the networks run the same kernels on the same numbers, and from their
//! f32 output on everything is integers or f64 arithmetic that is the same on every machine. The networks'
//! kernels are not, from one kind of CPU to another: every block carries a hash of its contents, so that a
//! machine that reads something else notices.

mod block;
mod coder;
mod distribution;
mod error;
mod exp;
mod file;
mod pixels;
#[cfg(test)]
mod tests;

pub use block::{Block, BlockBits, Codec};
pub use error::CompressError;
pub use file::{CompressedHead, CompressedReader, CompressedWriter, IMAGES_PER_BLOCK};

//! Operations that VQ-VAEs spend their time in, for candle tensors.
//!
//! Everything here is channels-last: images and feature maps are `[B, H, W, C]`. Weights keep
//! PyTorch's layouts, so that parameters can be exchanged with it.
//!
//! Each operation exists twice: composed of candle's own operations (any device; the oracle of the
//! tests, in [`composed`]) and, on the CPU, as a kernel of our own.

// The kernels' innermost functions only become vector code when they are inlined into a function
// with the instruction set enabled.
#![allow(clippy::inline_always)]
// A match that names both cases reads better than `if let … else` across several lines.
#![allow(clippy::single_match_else)]

#[cfg(feature = "allocator")]
pub mod allocator;
pub mod composed;
mod conv;
mod cpu;
mod fused;
mod nearest;
mod optimizer;
mod pointwise;
mod precision;
mod stack;
mod storage;

pub use conv::{Conv2d, ConvTranspose2d, conv_transpose2d, conv2d};
pub use nearest::{code_statistics, nearest_codes};
pub use optimizer::{AdamWStep, adamw_step, sum_of_squares};
pub use pointwise::{channels_first, channels_last, replace_value, squared_error};
pub use precision::Precision;
pub use stack::{Layer, Stack};

//! Operations that VQ-VAEs spend their time in, for candle tensors.
//!
//! Everything here is channels-last: images and feature maps are `[B, H, W, C]`. Weights keep
//! PyTorch's layouts, so that parameters can be exchanged with it.
//!
//! Each operation exists twice: composed of candle's own operations (any device; the oracle of the
//! tests, in [`composed`]) and, on the CPU, as a kernel of our own. On CUDA (feature `cuda`) convolutions are
//! cuDNN's, and the search for codes, the optimizer's step and what surrounds convolutions are kernels of
//! our own.

// The kernels' innermost functions only become vector code when they are inlined into a function
// with the instruction set enabled.
#![allow(clippy::inline_always)]
// A match that names both cases reads better than `if let … else` across several lines.
#![allow(clippy::single_match_else)]

mod codebook_average;
pub mod composed;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod device_stack;
mod dispatch;
mod dropout;
mod feature_map;
mod fused;
mod gate;
mod gated_stack;
mod gradients;
mod heads;
mod image_batch;
mod joined;
mod linear;
mod lookup;
mod math;
mod matmul;
mod nchw;
mod nearest;
mod nearest_by_scores;
mod network;
mod norm;
mod optimizer;
mod packed_linear;
#[doc(hidden)]
pub mod passes;
mod pixels;
mod pointwise;
mod precision;
mod primitives;
#[cfg(feature = "process")]
pub mod process;
mod recording;
mod repeat;
mod scalars;
mod shift;
mod softmax;
mod stack;
mod staging;
mod storage;
mod swiglu;
#[cfg(test)]
mod testing;
mod transformer_stack;

pub use codebook_average::{AverageRule, CodebookAverages, StepNumber, average_codebook};
pub use conv::{Conv2d, ConvTranspose2d, conv_transpose2d, conv2d};
#[doc(hidden)]
pub use device::test_device;
pub use device::{gpu_name, is_strict_f32, open_cuda, open_metal, set_strict_f32, wait_for};
pub use dropout::{DropSeed, dropout};
pub use feature_map::{FeatureMap, Replaced};
pub use gate::{gate, gate_sum};
pub use gated_stack::GatedLayers;
pub use gradients::Gradients;
pub use heads::{merge_heads, split_heads};
pub use image_batch::{MIRRORED, gather_images};
pub use linear::linear;
pub use lookup::lookup;
pub use matmul::matmul_transposed;
pub use nearest::{code_statistics, count_codes, nearest_codes};
pub use network::Dropout;
pub use norm::rms_norm;
pub use optimizer::{
    AdamWSlot, AdamWStep, adamw_step, adamw_steps, adamw_steps_by, norm_and_scale, sum_of_squares,
};
pub use packed_linear::PackedLinear;
pub use pixels::{LOG_SCALES, Logistic, PixelDistribution, pixel_likelihood};
pub use pointwise::{
    channels_first, channels_last, replace_value, scaled_squared_error, squared_error,
};
pub use precision::{Precision, check_cpu_choice};
pub use recording::{Recording, can_record, rehearse};
pub use repeat::repeat_pixels;
pub use scalars::{collect_scalars, weighted_sum};
pub use shift::shift;
pub use softmax::{attention_weights, cross_entropy};
pub use stack::{Layer, Stack};
pub use staging::Staging;
pub use swiglu::swiglu;
pub use transformer_stack::TransformerLayers;

//! VQ-VAEs on candle: images to discrete codes and back.
//!
//! - [`VqVae`] has one level of codes (van den Oord et al. 2017, "Neural Discrete Representation
//!   Learning") or several (Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2").
//! - [`Config`] describes it and is stored beside its tensors.
//! - [`Quantizer`] is the map between vectors and codes; [`QuantizerKind`] lists the kinds there are.
//!
//! Images are `[B,C,H,W]` f32 at the border, normalised by [`Normalization`]; inside, everything is
//! channels-last.
//!
//! ```no_run
//! use candle_core::{Device, Tensor};
//! use vq_model::VqVae;
//!
//! # fn main() -> Result<(), vq_model::Error> {
//! # let pixels = Tensor::zeros((1, 3, 32, 32), candle_core::DType::F32, &Device::Cpu)?;
//! let model = VqVae::from_pretrained("results/best", &Device::Cpu)?;
//! let normalization = &model.config().normalization;
//! let codes = model.encode(&normalization.normalize(&pixels)?)?;
//! let decoded = normalization.denormalize(&model.decode(&codes)?)?;
//! # Ok(())
//! # }
//! ```

mod architecture;
mod codes;
mod config;
mod error;
mod geometry;
mod level;
mod likelihood;
mod model;
mod part;
mod quantizer;
mod quantizer_config;
mod random;
pub mod store;

pub use codes::Codes;
pub use config::{Config, FORMAT_VERSION, LevelConfig, Normalization};
pub use error::{Error, Result};
pub use geometry::{CodebookGeometry, Range, codebook_drift};
pub use likelihood::Likelihood;
pub use model::{Decoded, Output, VqVae};
pub use quantizer::{
    CodebookReport, CodebookUpdate, Quantized, QuantizedMap, Quantizer, TrainingStep,
    VectorQuantizer, rotation, straight_through,
};
pub use quantizer_config::{CodebookRule, GradientEstimator, QuantizerConfig, QuantizerKind};
pub use random::Stream;
pub use store::{CONFIG_FILE, MODEL_FILE};
pub use vq_ops::{PixelDistribution, Precision, StepNumber};

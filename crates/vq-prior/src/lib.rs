//! Autoregressive priors over the codes of VQ-VAEs: with one, a tokenizer becomes a generative model.
//!
//! - [`Prior`] models p(codes of one level | class, codes of the levels above) as a product over the
//!   positions in raster order and, where a position has several codes, over these in order.
//! - [`Config`] describes it: a gated PixelCNN (van den Oord et al. 2016b) or a decoder-only Transformer.
//! - [`Prior::loss`] is what to train on, [`Prior::log_likelihood`] what to report.
//! - [`Stepper`] gives the distribution of one code after the other and computes only what is new;
//!   [`Prior::sample`] draws whole grids with it.
//! - [`compress`] turns images into files as short as their codes' probabilities allow, and back.
//!
//! Codes are u32, `[B,h,w]`, or `[B,h,w,G]` with G codes per position.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use vq_prior::{Conditions, Config, Prior, SampleOptions};
//!
//! # fn main() -> Result<(), vq_prior::Error> {
//! let network = vq_prior::PixelCnnConfig { channels: 8, layers: 2, skip_channels: 8, ..Default::default() };
//! let config = Config {
//!     grid: [4, 4],
//!     codebook_sizes: vec![16],
//!     class_count: 10,
//!     network: vq_prior::Network::PixelCnn(network),
//!     ..Config::default()
//! };
//! let prior = Prior::new(&config, /* seed */ 0, &Device::Cpu)?;
//! let labels = Tensor::new(&[3u32, 7], &Device::Cpu)?;
//! let conditions = Conditions { labels: Some(&labels), ..Conditions::default() };
//! let options = SampleOptions { guidance: 2.0, ..SampleOptions::default() };
//! let codes = prior.sample(2, &conditions, &options, None)?;
//! assert_eq!(codes.dims(), [2, 4, 4]);
//! let nats = prior.log_likelihood(&codes, &conditions)?;
//! assert_eq!(nats.len(), 2);
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
mod at_once_tests;
mod attention;
mod choose;
pub mod compress;
mod conditioner;
mod config;
mod head;
mod inputs;
mod layers;
mod pixelcnn;
mod pixelcnn_steps;
mod prior;
mod sampler;
mod stepper;
mod training;
mod transformer;

pub use choose::{SampleOptions, choose, probabilities};
pub use config::{
    ConditionerConfig, Config, GridConfig, Network, PixelCnnConfig, TransformerConfig,
};
pub use inputs::Conditions;
pub use prior::Prior;
pub use sampler::Completion;
pub use stepper::{Place, Stepper};
pub use training::{Training, TrainingBatch};
pub use vq_model::{Error, Result};

//! The architecture of a model, as it stands in `config.json` and in a recipe's `[model]` table.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Likelihood, QuantizerConfig, Result};

/// The version of the saved model's format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// The architecture of a [`VqVae`](crate::VqVae), its normalisation and the names of the classes.
///
/// The default is the standard model: Sonnet's VQ-VAE for CIFAR-10 (32×32 RGB to 8×8 codes of 512).
/// Keys that are left out take the default's value; unknown keys are refused.
///
/// ```
/// let config = vq_model::Config::default();
/// config.validate().unwrap();
/// assert_eq!(config.downsampling(), 4);
/// assert_eq!(config.bits_per_image(), 576.0);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Channels of the images.
    pub channels: usize,
    /// Height and width of the images that the model is trained on, in pixels. Images of any other
    /// size that [`downsampling`](Self::downsampling) divides can be encoded as well.
    pub image_size: [usize; 2],
    /// From pixels in [0, 1] to the model's range and back.
    pub normalization: Normalization,
    /// Names of the data set's classes in the order of their labels; may be empty.
    pub class_names: Vec<String>,
    /// What the decoder gives for a pixel: its value, or a distribution of it.
    pub likelihood: Likelihood,
    /// Components of the distribution, with [`Likelihood::LogisticMixture`].
    pub mixtures: usize,
    /// The levels of codes, bottom (finest) first. One level is a VQ-VAE (van den Oord et al. 2017),
    /// more are a VQ-VAE-2 (Razavi et al. 2019).
    pub levels: Vec<LevelConfig>,
}

/// One level of codes: an encoder from the level below (level 0: from the image), a quantizer, and
/// a decoder back to the level below.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LevelConfig {
    /// How much smaller than the level below (level 0: than the image) the grid is; a power of two.
    pub downsample: usize,
    /// Channels of the hidden layers.
    pub hidden: usize,
    /// Number of residual blocks, in the encoder and again in the decoder.
    pub residual_blocks: usize,
    /// Channels inside a residual block.
    pub residual_hidden: usize,
    /// Whether a `ReLU` stands before the encoder's residual blocks, as in Sonnet's model. Their skip path
    /// then carries no negative values; without it the encoder learns faster.
    pub relu_before_residual: bool,
    /// The quantizer of this level.
    pub quantizer: QuantizerConfig,
}

/// Per channel: x = (pixel − mean) / std, with the pixel in [0, 1].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Normalization {
    /// Subtracted; one value per channel.
    pub mean: Vec<f32>,
    /// Divided by; one value per channel.
    pub std: Vec<f32>,
}

impl Config {
    /// Checks every value; the error names the dotted key, e.g.
    /// `levels.0.quantizer.codebook_size must be at least 1, got 0`.
    pub fn validate(&self) -> Result<()> {
        within("channels", self.channels, 1, 4096)?;
        within("image_size.0", self.image_size[0], 1, 1 << 16)?;
        within("image_size.1", self.image_size[1], 1, 1 << 16)?;
        self.normalization.validate(self.channels)?;
        within("mixtures", self.mixtures, 1, 1 << 10)?;
        if self.levels.is_empty() {
            return Err(Error::config("levels", "must hold at least one level"));
        }
        for (index, level) in self.levels.iter().enumerate() {
            level.validate(index)?;
        }
        within("levels.*.downsample (their product)", self.downsampling(), 1, 1 << 16)?;
        for (axis, size) in self.image_size.into_iter().enumerate() {
            let downsampling = self.downsampling();
            if !size.is_multiple_of(downsampling) {
                return Err(Error::config(
                    format!("image_size.{axis}"),
                    format!("must be a multiple of the downsampling {downsampling}, got {size}"),
                ));
            }
        }
        Ok(())
    }

    /// How much smaller than the image the top level's grid is.
    pub fn downsampling(&self) -> usize {
        self.levels.iter().fold(1, |all, level| all.saturating_mul(level.downsample))
    }

    /// Height and width of every level's grid of codes, bottom first, for an image of `height` × `width`
    /// pixels. An error where the downsampling does not divide them.
    pub fn grids(&self, height: usize, width: usize) -> Result<Vec<[usize; 2]>> {
        let downsampling = self.downsampling();
        if height == 0
            || width == 0
            || !height.is_multiple_of(downsampling)
            || !width.is_multiple_of(downsampling)
        {
            return Err(Error::Input(format!(
                "images of {height}×{width} pixels do not fit: height and width must be multiples of the \
                 model's downsampling {downsampling}; resize or crop them"
            )));
        }
        let mut factor = 1;
        let grid = |level: &LevelConfig| {
            factor *= level.downsample;
            [height / factor, width / factor]
        };
        Ok(self.levels.iter().map(grid).collect())
    }

    /// Bits that the codes of one image of [`image_size`](Self::image_size) take: Σ h·w·G·log₂K.
    pub fn bits_per_image(&self) -> f64 {
        let [height, width] = self.image_size;
        let mut factor = 1;
        let bits = self.levels.iter().map(|level| {
            factor *= level.downsample;
            let positions = (height / factor) * (width / factor);
            positions as f64 * level.quantizer.bits_per_position()
        });
        bits.sum()
    }
}

impl Normalization {
    /// The same mean and standard deviation in every one of `channels` channels.
    pub fn uniform(channels: usize, mean: f32, std: f32) -> Self {
        Self { mean: vec![mean; channels], std: vec![std; channels] }
    }

    /// Pixels in [0, 1] to the model's range; `[B,C,H,W]` to the same shape.
    pub fn normalize(&self, images: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.tensors(images)?;
        Ok(images.broadcast_sub(&mean)?.broadcast_div(&std)?)
    }

    /// The model's range to pixels, clamped to [0, 1]; `[B,C,H,W]` to the same shape.
    pub fn denormalize(&self, images: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.tensors(images)?;
        Ok(images.broadcast_mul(&std)?.broadcast_add(&mean)?.clamp(0f32, 1f32)?)
    }

    /// The model's range to pixels u8: the nearest of the 256 values; `[B,C,H,W]` to the same shape.
    pub fn pixels(&self, images: &Tensor) -> Result<Tensor> {
        // Conversion cuts off.
        Ok(self.denormalize(&images.detach())?.affine(255.0, 0.5)?.to_dtype(DType::U8)?)
    }

    fn tensors(&self, images: &Tensor) -> Result<(Tensor, Tensor)> {
        let channels = self.mean.len();
        match images.dims() {
            [_, c, _, _] if *c == channels => {}
            dims => {
                return Err(Error::Input(format!(
                    "images must be [B, {channels}, H, W], got {dims:?}"
                )));
            }
        }
        let tensor =
            |values: &[f32]| Tensor::from_slice(values, (1, channels, 1, 1), images.device());
        Ok((tensor(&self.mean)?, tensor(&self.std)?))
    }

    fn validate(&self, channels: usize) -> Result<()> {
        for (key, values) in [("normalization.mean", &self.mean), ("normalization.std", &self.std)]
        {
            if values.len() != channels {
                let problem =
                    format!("must hold one value per channel ({channels}), got {}", values.len());
                return Err(Error::config(key, problem));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(Error::config(key, format!("must be finite, got {value}")));
            }
        }
        match self.std.iter().find(|&&std| std <= 0.0) {
            Some(std) => {
                Err(Error::config("normalization.std", format!("must be above 0, got {std}")))
            }
            None => Ok(()),
        }
    }
}

impl LevelConfig {
    fn validate(&self, index: usize) -> Result<()> {
        let key = |name: &str| format!("levels.{index}.{name}");
        // A level that is no smaller than the one below would hold no longer-range information.
        let smallest = if index == 0 { 1 } else { 2 };
        within(key("downsample"), self.downsample, smallest, 1 << 16)?;
        if !self.downsample.is_power_of_two() {
            let problem = format!("must be a power of two, got {}", self.downsample);
            return Err(Error::config(key("downsample"), problem));
        }
        within(key("hidden"), self.hidden, 2, 1 << 16)?;
        if !self.hidden.is_multiple_of(2) {
            let problem = format!("must be even, got {}", self.hidden);
            return Err(Error::config(key("hidden"), problem));
        }
        within(key("residual_blocks"), self.residual_blocks, 0, 1024)?;
        within(key("residual_hidden"), self.residual_hidden, 1, 1 << 16)?;
        self.quantizer.validate(&format!("levels.{index}.quantizer"))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            channels: 3,
            image_size: [32, 32],
            normalization: Normalization::default(),
            class_names: Vec::new(),
            likelihood: Likelihood::default(),
            mixtures: 10,
            levels: vec![LevelConfig::default()],
        }
    }
}

impl Default for LevelConfig {
    fn default() -> Self {
        Self {
            downsample: 4,
            hidden: 128,
            residual_blocks: 2,
            residual_hidden: 32,
            relu_before_residual: true,
            quantizer: QuantizerConfig::default(),
        }
    }
}

impl Default for Normalization {
    /// RGB pixels to [−0.5, 0.5].
    fn default() -> Self {
        Self::uniform(3, 0.5, 1.0)
    }
}

/// `least ..= most`, or an error that names the key.
pub(crate) fn within(
    key: impl Into<String>,
    value: usize,
    least: usize,
    most: usize,
) -> Result<()> {
    if value < least {
        Err(Error::config(key, format!("must be at least {least}, got {value}")))
    } else if value > most {
        Err(Error::config(key, format!("must be at most {most}, got {value}")))
    } else {
        Ok(())
    }
}

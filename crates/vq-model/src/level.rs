//! One level: an encoder, a quantizer and a decoder.

use crate::part::{Builder, Part};
use crate::quantizer::Quantizer;
use crate::{Config, Error, Result, architecture, quantizer};

#[derive(Debug)]
pub(crate) struct Level {
    /// From the level below (the image) to features; the top level's also holds its projection.
    pub(crate) encoder: Part,
    /// From the features and what the levels above decode to, to `z_e`; none at the top.
    pub(crate) projection: Option<Part>,
    pub(crate) quantizer: Box<dyn Quantizer>,
    /// From this level's and all higher levels' `z_q` to the level below (the image).
    pub(crate) decoder: Part,
}

impl Level {
    /// The level `index` of a config that is valid, with fresh parameters.
    pub(crate) fn new(config: &Config, index: usize, builder: &mut Builder) -> Result<Self> {
        let missing = || Error::config("levels", format!("has no level {index}"));
        let level = config.levels.get(index).ok_or_else(missing)?;
        let below = index.checked_sub(1).and_then(|below| config.levels.get(below));
        let channels_below = below.map_or(config.channels, |below| below.hidden);
        let name = |part: &str| format!("levels.{index}.{part}");
        let dim = level.quantizer.dim;

        let (above_channels, above_dims) = match config.levels.get(index + 1) {
            // A level's decoder gives features like those of the level below.
            Some(_) => (level.hidden, above_dims(config, index)),
            None => (0, 0),
        };
        let is_top = above_channels == 0;
        let mut encoder = architecture::downsampling(
            &name("encoder"),
            level,
            channels_below,
            /* relu_input */ index > 0,
        );
        encoder.extend(architecture::residual_blocks(&name("encoder"), level));
        let projection =
            architecture::projection(&name("projection"), level.hidden + above_channels, dim);
        let projection = if is_top {
            encoder.extend(projection);
            None
        } else {
            Some(Part::new(projection, builder)?)
        };
        let head = config.pixel_distribution().filter(|_| index == 0);
        // As wide as what the last upsampling comes from.
        let features = if head.is_some() { level.hidden / 2 } else { channels_below };
        let mut decoder =
            architecture::decoder(&name("decoder"), level, dim + above_dims, features);
        if head.is_some() {
            let (layers, outputs) = (decoder.len(), config.decoder_outputs());
            let head = architecture::pixel_head(&name("decoder"), layers, features, outputs);
            decoder.extend(head);
        }
        Ok(Self {
            encoder: Part::new(encoder, builder)?,
            projection,
            quantizer: quantizer::build(&name("quantizer"), &level.quantizer, builder)?,
            decoder: Part::new(decoder, builder)?,
        })
    }
}

/// Σ D of the levels above `index`.
fn above_dims(config: &Config, index: usize) -> usize {
    config.levels.iter().skip(index + 1).map(|level| level.quantizer.dim).sum()
}

//! The layers of encoders and decoders.

use vq_ops::{Conv2d, ConvTranspose2d, Layer};

use crate::LevelConfig;
use crate::part::NamedLayers;

/// The encoder of a level without its projection: `in_channels` to [`LevelConfig::hidden`].
///
/// Convolutions 4×4/2, one per halving, then a 3×3 (Sonnet's `Encoder`). Each is followed by a `ReLU`.
/// What comes in is rectified first where `relu_input`.
pub(crate) fn downsampling(
    prefix: &str,
    level: &LevelConfig,
    in_channels: usize,
    relu_input: bool,
) -> NamedLayers {
    let halvings = level.downsample.ilog2() as usize;
    let mut layers = Vec::new();
    let mut channels = in_channels;
    for index in 0..halvings {
        let out_channels = if index == 0 { level.hidden / 2 } else { level.hidden };
        let config = Conv2d {
            stride: 2,
            padding: 1,
            relu_input: relu_input || index > 0,
            ..Conv2d::default()
        };
        let layer = Layer::Conv2d { in_channels: channels, out_channels, kernel: 4, config };
        layers.push((format!("{prefix}.{index}"), layer));
        channels = out_channels;
    }
    let config = Conv2d { padding: 1, relu_input: relu_input || halvings > 0, ..Conv2d::default() };
    let layer =
        Layer::Conv2d { in_channels: channels, out_channels: level.hidden, kernel: 3, config };
    layers.push((format!("{prefix}.{halvings}"), layer));
    layers
}

/// The residual blocks of a level's encoder, after the `ReLU` of its last convolution where
/// [`LevelConfig::relu_before_residual`] asks for it; they are numbered on from its convolutions.
pub(crate) fn residual_blocks(prefix: &str, level: &LevelConfig) -> NamedLayers {
    let first = level.downsample.ilog2() as usize + 1;
    let block = Layer::Residual { channels: level.hidden, hidden: level.residual_hidden };
    let blocks = (first..first + level.residual_blocks)
        .map(|index| (format!("{prefix}.{index}"), block.clone()));
    let relu = (level.residual_blocks > 0 && level.relu_before_residual)
        .then(|| (format!("{prefix}.relu"), Layer::Relu { channels: level.hidden }));
    relu.into_iter().chain(blocks).collect()
}

/// The `ReLU` and the 1×1 convolution from features to `z_e`.
pub(crate) fn projection(prefix: &str, in_channels: usize, out_channels: usize) -> NamedLayers {
    let config = Conv2d { relu_input: true, ..Conv2d::default() };
    let layer = Layer::Conv2d { in_channels, out_channels, kernel: 1, config };
    vec![(prefix.to_owned(), layer)]
}

/// What follows the decoder of the bottom level where it gives distributions of pixels: a `ReLU` and a 1×1
/// convolution from its last features, at the images' size, to the distributions' `out_channels` numbers.
/// Numbered on from the decoder's `layers`.
pub(crate) fn pixel_head(
    prefix: &str,
    layers: usize,
    in_channels: usize,
    out_channels: usize,
) -> NamedLayers {
    projection(&format!("{prefix}.{layers}"), in_channels, out_channels)
}

/// The decoder of a level: `in_channels` to `out_channels` of the level below (or of the image).
///
/// A 3×3 convolution, the residual blocks, then transposed convolutions 4×4/2, one per doubling,
/// each after a `ReLU` (Sonnet's `Decoder`).
pub(crate) fn decoder(
    prefix: &str,
    level: &LevelConfig,
    in_channels: usize,
    out_channels: usize,
) -> NamedLayers {
    let hidden = level.hidden;
    let config = Conv2d { padding: 1, ..Conv2d::default() };
    let mut layers = vec![Layer::Conv2d { in_channels, out_channels: hidden, kernel: 3, config }];
    let block = Layer::Residual { channels: hidden, hidden: level.residual_hidden };
    layers.extend(std::iter::repeat_n(block, level.residual_blocks));

    let doublings = level.downsample.ilog2() as usize;
    let mut channels = hidden;
    for index in 1..=doublings {
        let out_channels = match doublings - index {
            0 => out_channels,
            1 => hidden / 2,
            _ => hidden,
        };
        let config = ConvTranspose2d {
            stride: 2,
            padding: 1,
            relu_input: true,
            ..ConvTranspose2d::default()
        };
        layers.push(Layer::ConvTranspose2d {
            in_channels: channels,
            out_channels,
            kernel: 4,
            config,
        });
        channels = out_channels;
    }
    if doublings == 0 {
        let config = Conv2d { padding: 1, relu_input: true, ..Conv2d::default() };
        layers.push(Layer::Conv2d { in_channels: channels, out_channels, kernel: 3, config });
    }
    let name = |(index, layer)| (format!("{prefix}.{index}"), layer);
    layers.into_iter().enumerate().map(name).collect()
}

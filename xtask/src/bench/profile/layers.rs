//! The convolutions of the standard model.

use vq_ops::passes::LayerPasses;
use vq_ops::{Conv2d, ConvTranspose2d};

use super::{PRECISIONS, Peaks, Row, Work, median};
use crate::bench::worker::{BATCH, Result};

struct Layer {
    name: &'static str,
    /// How often it occurs.
    count: usize,
    size: usize,
    channels: (usize, usize),
    kernel: usize,
    stride: usize,
    transposed: bool,
    /// Whether its input goes through a ReLU.
    relu: bool,
}

const fn layer(
    (name, count): (&'static str, usize),
    size: usize,
    channels: (usize, usize),
    (kernel, stride): (usize, usize),
    (transposed, relu): (bool, bool),
) -> Layer {
    Layer { name, count, size, channels, kernel, stride, transposed, relu }
}

const LAYERS: [Layer; 9] = [
    layer(("encoder 4×4/2, 3→64, of 32×32", 1), 32, (3, 64), (4, 2), (false, false)),
    layer(("encoder 4×4/2, 64→128, of 16×16", 1), 16, (64, 128), (4, 2), (false, true)),
    layer(("encoder 3×3, 128→128, of 8×8", 1), 8, (128, 128), (3, 1), (false, true)),
    layer(("residual 3×3, 128→32, of 8×8", 4), 8, (128, 32), (3, 1), (false, true)),
    layer(("residual 1×1, 32→128, of 8×8", 4), 8, (32, 128), (1, 1), (false, true)),
    layer(("encoder 1×1, 128→64, of 8×8", 1), 8, (128, 64), (1, 1), (false, true)),
    layer(("decoder 3×3, 64→128, of 8×8", 1), 8, (64, 128), (3, 1), (false, false)),
    layer(("decoder transposed 4×4/2, 128→64, of 8×8", 1), 8, (128, 64), (4, 2), (true, true)),
    layer(("decoder transposed 4×4/2, 64→3, of 16×16", 1), 16, (64, 3), (4, 2), (true, true)),
];

/// Every pass of every layer.
pub(super) fn measure(peaks: &mut Peaks) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (index, layer) in LAYERS.iter().enumerate() {
        peaks.sample()?;
        let [f32, bf16] = PRECISIONS.map(|precision| layer.milliseconds(precision));
        let (f32, bf16) = (f32?, bf16?);
        for (pass, name) in ["forward", "input gradient", "weight gradient"].iter().enumerate() {
            // Nobody asks for the gradient of the images.
            if index == 0 && pass == 1 {
                continue;
            }
            rows.push(Row {
                operation: format!("{}: {name}", layer.name),
                times: layer.count,
                milliseconds: [f32[pass], bf16[pass]],
                work: Work::Products(layer.operations()),
            });
        }
    }
    Ok(rows)
}

impl Layer {
    /// Floating-point operations of one pass by the definition.
    fn operations(&self) -> f64 {
        let side = if self.transposed { self.size } else { self.size / self.stride };
        let taps = self.kernel * self.kernel * self.channels.0 * self.channels.1;
        (2 * BATCH * side * side * taps) as f64
    }

    /// Forward, gradient of the input, gradients of weight and bias.
    fn milliseconds(&self, precision: vq_ops::Precision) -> Result<[f64; 3]> {
        let (in_channels, out_channels) = self.channels;
        let (kernel, stride, relu_input) = (self.kernel, self.stride, self.relu);
        let padding = (kernel - stride).div_ceil(2);
        let layer = if self.transposed {
            let config =
                ConvTranspose2d { stride, padding, relu_input, ..ConvTranspose2d::default() };
            vq_ops::Layer::ConvTranspose2d { in_channels, out_channels, kernel, config }
        } else {
            let config = Conv2d { stride, padding, relu_input, ..Conv2d::default() };
            vq_ops::Layer::Conv2d { in_channels, out_channels, kernel, config }
        };
        let input = [BATCH, self.size, self.size, in_channels];
        let mut passes = LayerPasses::new(&layer, precision, &input)?;
        let mut time = |pass: fn(&mut LayerPasses)| {
            median(
                || Ok(()),
                |()| {
                    pass(&mut passes);
                    Ok(())
                },
            )
        };
        Ok([
            time(LayerPasses::forward)?,
            time(LayerPasses::input_gradient)?,
            time(LayerPasses::parameter_gradients)?,
        ])
    }
}

//! What a stack does for one layer, and what the CPU can do at best: for `cargo xtask bench`.

use candle_core::{Result, bail};

use crate::cpu::activation::{Activation, Reading};
use crate::cpu::buffers::Buffers;
use crate::fused::{Convolution, Step, on_a_worker, plan};
use crate::{Layer, Precision};

/// The passes of one convolution on the CPU as a [`Stack`](crate::Stack) runs them, each by itself.
pub struct LayerPasses {
    convolution: Convolution,
    parameters: Vec<f32>,
    of_parameters: Vec<f32>,
    input: Activation,
    output: Activation,
    of_input: Activation,
    of_output: Activation,
    buffers: Buffers,
}

impl LayerPasses {
    /// For an input `[B, H, W, C]`. Layers of more than a convolution are refused.
    pub fn new(layer: &Layer, precision: Precision, input: &[usize]) -> Result<Self> {
        let (mut steps, _) = plan(std::slice::from_ref(layer), precision, input)?;
        let Some(Step::Convolution(convolution)) = steps.pop() else {
            bail!("{layer:?} is not one convolution");
        };
        let buffers = Buffers::default();
        let (input_len, output_len) = (convolution.ends().0.len(), convolution.output_len());
        let made = |length: usize, reading: Reading| {
            let mut activation = Activation::new(length, reading, &buffers);
            activation.output().through_f32(&buffers, noise);
            activation
        };
        // As a layer of the same kind reads it.
        let between = convolution.reads_input();
        let mut parameters = vec![0.; convolution.bias.end];
        noise(&mut parameters);
        Ok(Self {
            of_parameters: vec![0.; parameters.len()],
            parameters,
            input: made(input_len, convolution.reads_input()),
            output: made(output_len, between),
            of_input: made(input_len, between),
            of_output: made(output_len, convolution.reads_gradient()),
            convolution,
            buffers,
        })
    }

    /// The output.
    pub fn forward(&mut self) {
        let Self { convolution, parameters, input, output, buffers, .. } = self;
        on_a_worker(|| {
            convolution.forward(input.read().elements, parameters, None, buffers, output.output());
        });
    }

    /// The gradient of the input.
    pub fn input_gradient(&mut self) {
        let Self { convolution, parameters, input, of_output, of_input, buffers, .. } = self;
        on_a_worker(|| {
            let (x, grad) = (input.read().elements, of_output.read().elements);
            convolution.input_gradient(x, parameters, grad, None, buffers, of_input.output());
        });
    }

    /// The gradients of weight and bias.
    pub fn parameter_gradients(&mut self) {
        let Self { convolution, of_parameters, input, of_output, buffers, .. } = self;
        on_a_worker(|| {
            let (x, grad) = (input.read().elements, of_output.read().elements);
            convolution.parameter_gradients(x, grad, buffers, of_parameters);
        });
    }
}

/// Operations per second of the CPU's kernel for products of bfloat16 on all threads, where both factors are
/// packed and in the first-level cache: what bf16 convolutions could reach at most.
pub fn bf16_peak() -> f64 {
    crate::cpu::bf16::peak::operations_per_second()
}

/// Numbers in [-1, 1).
fn noise(to: &mut [f32]) {
    let mut state = 1u32;
    for value in to {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *value = (state >> 8) as f32 / (1 << 23) as f32 - 1.;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Conv2d;

    #[test]
    fn every_pass_writes_what_it_is_for() {
        let config = Conv2d { padding: 1, relu_input: true, ..Conv2d::default() };
        let layer = Layer::Conv2d { in_channels: 16, out_channels: 32, kernel: 3, config };
        for precision in [Precision::F32, Precision::Bf16] {
            let mut passes = LayerPasses::new(&layer, precision, &[2, 8, 8, 16]).unwrap();
            let read = |activation: &Activation| -> Vec<f32> {
                activation.read().elements.widen().into_owned()
            };
            let before = (read(&passes.output), read(&passes.of_input));
            passes.forward();
            assert_ne!(read(&passes.output), before.0);
            passes.input_gradient();
            assert_ne!(read(&passes.of_input), before.1);
            passes.parameter_gradients();
            assert!(passes.of_parameters.iter().all(|v| *v != 0.));
        }
        let residual = Layer::Residual { channels: 4, hidden: 2 };
        assert!(LayerPasses::new(&residual, Precision::F32, &[1, 4, 4, 4]).is_err());
    }

    #[test]
    fn the_peak_is_a_number() {
        assert!(bf16_peak() > 1e6);
    }
}

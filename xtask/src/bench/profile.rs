//! Where a training step's time goes: every operation of the standard model by itself.

use std::fmt::Write as _;
use std::time::Instant;

use candle_core::{Device, Result, Tensor, Var};
use vq_ops::{AdamWStep, Conv2d, ConvTranspose2d, Precision, Stack};

const BATCH: usize = 128;
/// Each operation runs so often; the median counts.
const RUNS: usize = 15;

/// A layer of the standard model.
struct Layer {
    name: &'static str,
    /// How often it occurs.
    count: usize,
    size: usize,
    channels: (usize, usize),
    kernel: usize,
    stride: usize,
    transposed: bool,
}

const fn layer(
    name: &'static str,
    count: usize,
    size: usize,
    channels: (usize, usize),
    (kernel, stride): (usize, usize),
    transposed: bool,
) -> Layer {
    Layer { name, count, size, channels, kernel, stride, transposed }
}

const LAYERS: [Layer; 9] = [
    layer("encoder 4×4/2, 3→64, of 32×32", 1, 32, (3, 64), (4, 2), false),
    layer("encoder 4×4/2, 64→128, of 16×16", 1, 16, (64, 128), (4, 2), false),
    layer("encoder 3×3, 128→128, of 8×8", 1, 8, (128, 128), (3, 1), false),
    layer("residual 3×3, 128→32, of 8×8", 4, 8, (128, 32), (3, 1), false),
    layer("residual 1×1, 32→128, of 8×8", 4, 8, (32, 128), (1, 1), false),
    layer("encoder 1×1, 128→64, of 8×8", 1, 8, (128, 64), (1, 1), false),
    layer("decoder 3×3, 64→128, of 8×8", 1, 8, (64, 128), (3, 1), false),
    layer("decoder transposed 4×4/2, 128→64, of 8×8", 1, 8, (128, 64), (4, 2), true),
    layer("decoder transposed 4×4/2, 64→3, of 16×16", 1, 16, (64, 3), (4, 2), true),
];

/// A table of milliseconds per training step of 128 images.
pub(super) fn profile(precision: Precision) -> Result<String> {
    let mut text = String::from(
        "| operation | times | forward | input gradient | weight gradient | GFLOP/s |\n|---|---|---|---|---|---|\n",
    );
    let mut total = 0.;
    for (index, layer) in LAYERS.iter().enumerate() {
        let [forward, input, weight] = layer.milliseconds(precision)?;
        // Nobody asks for the gradient of the images.
        let input = if index == 0 { 0. } else { input };
        let passes = if index == 0 { 2. } else { 3. };
        let sum = forward + input + weight;
        total += layer.count as f64 * sum;
        let _ = writeln!(
            text,
            "| {} | {} | {forward:.2} ms | {input:.2} ms | {weight:.2} ms | {:.0} |",
            layer.name,
            layer.count,
            passes * layer.operations() / sum / 1e6,
        );
    }
    for (name, milliseconds) in
        [("nearest of 512 codes, 8,192 × 64", nearest()?), ("AdamW", adamw()?)]
    {
        total += milliseconds;
        let _ = writeln!(text, "| {name} | 1 | {milliseconds:.2} ms | | | |");
    }
    let _ =
        writeln!(text, "\nSum: {total:.1} ms a step, {:.0} images/s.", BATCH as f64 * 1e3 / total);
    Ok(text)
}

impl Layer {
    /// Floating-point operations of one pass by the definition.
    fn operations(&self) -> f64 {
        let side = if self.transposed { self.size } else { self.size / self.stride };
        let taps = self.kernel * self.kernel * self.channels.0 * self.channels.1;
        (2 * BATCH * side * side * taps) as f64
    }

    /// Forward, gradient of the input, gradients of weight and bias. A stack of one layer keeps its
    /// buffers, as it does within a model.
    fn milliseconds(&self, precision: Precision) -> Result<[f64; 3]> {
        let (inner, outer) = self.channels;
        let (kernel, stride) = (self.kernel, self.stride);
        let padding = (kernel - stride) / 2;
        let (in_channels, out_channels) = self.channels;
        let (layer, shape) = if self.transposed {
            let config = ConvTranspose2d { stride, padding, ..ConvTranspose2d::default() };
            (
                vq_ops::Layer::ConvTranspose2d { in_channels, out_channels, kernel, config },
                [inner, outer, kernel, kernel],
            )
        } else {
            let config = Conv2d { stride, padding, ..Conv2d::default() };
            (
                vq_ops::Layer::Conv2d { in_channels, out_channels, kernel, config },
                [outer, inner, kernel, kernel],
            )
        };
        let mut stack = Stack::new(vec![layer])?;
        stack.set_precision(precision);
        let x = Var::from_tensor(&random(&[BATCH, self.size, self.size, inner])?)?;
        let parameters = [random(&shape)?, random(&[outer])?];
        let variables = [Var::from_tensor(&parameters[0])?, Var::from_tensor(&parameters[1])?];
        let variables = variables.map(|var| var.as_tensor().clone());
        let constant = x.as_detached_tensor();
        let backward = |y: Tensor| y.backward().map(|_| ());
        let forward = median(|()| stack.forward(&constant, &parameters).map(|_| ()), || Ok(()))?;
        let of_parameters = median(backward, || stack.forward(&constant, &variables))?;
        let of_all = median(backward, || stack.forward(&x, &variables))?;
        Ok([forward, of_all - of_parameters, of_parameters])
    }
}

fn nearest() -> Result<f64> {
    let (z, codebook) = (random(&[BATCH * 64, 64])?, random(&[512, 64])?);
    median(|()| vq_ops::nearest_codes(&z, &codebook).map(|_| ()), || Ok(()))
}

fn adamw() -> Result<f64> {
    const PARAMETERS: usize = 695_491;
    let parameter = Var::from_tensor(&random(&[PARAMETERS])?)?;
    let [gradient, first, second] = [(); 3].map(|()| random(&[PARAMETERS]));
    let (gradient, first, second) = (gradient?, first?, second?.sqr()?);
    let step = AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.,
        step: 1,
        grad_scale: 1.,
        ema_decay: None,
    };
    median(|()| vq_ops::adamw_step(&parameter, &gradient, &first, &second, None, &step), || Ok(()))
}

/// Milliseconds that `work` takes on what `prepare` makes, whose time does not count.
fn median<T>(work: impl Fn(T) -> Result<()>, prepare: impl Fn() -> Result<T>) -> Result<f64> {
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let prepared = prepare()?;
        let start = Instant::now();
        work(prepared)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(super::median(&times))
}

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::rand(-1f32, 1., shape, &Device::Cpu)
}

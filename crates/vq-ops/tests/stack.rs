//! The fused stack against the same layers one by one, and both against finite differences.

#![allow(clippy::unwrap_used)] // a failing test may panic

use candle_core::{Device, Result, Tensor, Var};
use proptest::prelude::*;
use vq_ops::{Conv2d, ConvTranspose2d, Layer, Precision, Stack, composed};

fn conv(i: usize, o: usize, kernel: usize, stride: usize, relu_input: bool) -> Layer {
    let config = Conv2d {
        stride,
        padding: kernel.saturating_sub(stride) / 2,
        relu_input,
        ..Conv2d::default()
    };
    Layer::Conv2d { in_channels: i, out_channels: o, kernel, config }
}

fn up(i: usize, o: usize, relu_input: bool) -> Layer {
    let config =
        ConvTranspose2d { stride: 2, padding: 1, relu_input, ..ConvTranspose2d::default() };
    Layer::ConvTranspose2d { in_channels: i, out_channels: o, kernel: 4, config }
}

/// Numbers in [-1, 1) that are the same everywhere.
fn noise(shape: &[usize], seed: u32) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count as u32)
        .map(|i| {
            let mut h = i.wrapping_mul(0x9E37_79B1) ^ seed.wrapping_mul(0x85EB_CA77);
            h = (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D);
            h = (h ^ (h >> 12)).wrapping_mul(0x297A_2D39);
            ((h ^ (h >> 15)) >> 8) as f32 / (1 << 23) as f32 - 1.
        })
        .collect();
    Tensor::from_vec(values, shape, &vq_ops::test_device())
}

fn variables(stack: &Stack) -> Result<Vec<Var>> {
    let shapes = stack.layers().iter().flat_map(Layer::parameters);
    shapes
        .zip(10..)
        .map(|((_, shape), seed)| Var::from_tensor(&(noise(&shape, seed)? * 0.3)?))
        .collect()
}

type Gradients = (Tensor, Vec<Tensor>);

fn gradients(
    x: &Var,
    vars: &[Var],
    forward: impl Fn(&Tensor, &[Tensor]) -> Result<Tensor>,
) -> Result<Gradients> {
    let params: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = forward(x.as_tensor(), &params)?;
    let weights = noise(y.dims(), 99)?;
    let grads = (&y * weights)?.sum_all()?.backward()?;
    let mut all = vec![grads.get(x).unwrap().clone()];
    for var in vars {
        all.push(grads.get(var).unwrap().clone());
    }
    Ok((y, all))
}

#[track_caller]
fn assert_same(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    // One of them may have been computed elsewhere.
    let (a, b) = (a.to_device(&Device::Cpu).unwrap(), b.to_device(&Device::Cpu).unwrap());
    let scale = b.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap().max(1e-3);
    let error = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(error <= 1e-5 * scale, "{what}: off by {error}, scale {scale}");
}

fn check(layers: Vec<Layer>, size: (usize, usize, usize)) -> Result<()> {
    let stack = Stack::new(layers)?;
    let vars = variables(&stack)?;
    let (batch, height, width) = size;
    let channels = stack.layers()[0].in_channels();
    let x = Var::from_tensor(&noise(&[batch, height, width, channels], 1)?)?;
    let fused = gradients(&x, &vars, |x, p| stack.forward(x, p))?;
    let single = gradients(&x, &vars, |x, p| stack.forward_layerwise(x, p))?;
    assert_same(&fused.0, &single.0, "output");
    for (i, (a, b)) in fused.1.iter().zip(&single.1).enumerate() {
        assert_same(a, b, &format!("gradient {i}"));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn fused_equals_layer_by_layer(
        batch in 1usize..4, height in 1usize..4, width in 1usize..4,
        hidden in 1usize..40, inner in 1usize..20, blocks in 0usize..3,
    ) {
        let mut layers = vec![conv(3, hidden, 4, 2, false), conv(hidden, hidden, 3, 1, true)];
        layers.push(Layer::Relu { channels: hidden });
        layers.extend((0..blocks).map(|_| Layer::Residual { channels: hidden, hidden: inner }));
        layers.push(conv(hidden, 5, 1, 1, true));
        layers.push(up(5, hidden, false));
        layers.push(up(hidden, 3, true));
        check(layers, (batch, 2 * height, 2 * width)).unwrap();
    }
}

#[test]
fn a_residual_layer_with_zero_weights_is_the_identity() -> Result<()> {
    let stack = Stack::new(vec![Layer::Residual { channels: 6, hidden: 4 }])?;
    let zeros: Vec<Tensor> = stack.layers()[0]
        .parameters()
        .into_iter()
        .map(|(_, shape)| Tensor::zeros(shape, candle_core::DType::F32, &vq_ops::test_device()))
        .collect::<Result<_>>()?;
    let x = noise(&[2, 3, 5, 6], 4)?;
    let y = stack.forward(&x, &zeros)?;
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

#[test]
fn operations_equal_candles_own() -> Result<()> {
    let here = |t: &Tensor| t.to_device(&Device::Cpu);
    let x = noise(&[2, 6, 6, 5], 1)?;
    let (weight, bias) = (noise(&[7, 5, 3, 3], 2)?, noise(&[7], 3)?);
    let config = Conv2d { stride: 2, padding: 1, relu_input: true, ..Conv2d::default() };
    assert_same(
        &vq_ops::conv2d(&x, &weight, Some(&bias), config)?,
        &composed::conv2d(&here(&x)?, &here(&weight)?, Some(&here(&bias)?), config)?,
        "conv2d",
    );
    let (weight, bias) = (noise(&[5, 4, 4, 4], 2)?, noise(&[4], 3)?);
    let config = ConvTranspose2d { stride: 2, padding: 1, ..ConvTranspose2d::default() };
    assert_same(
        &vq_ops::conv_transpose2d(&x, &weight, Some(&bias), config)?,
        &composed::conv_transpose2d(&here(&x)?, &here(&weight)?, Some(&here(&bias)?), config)?,
        "conv_transpose2d",
    );
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    let layers =
        vec![conv(2, 6, 4, 2, false), Layer::Residual { channels: 6, hidden: 3 }, up(6, 2, true)];
    let stack = Stack::new(layers)?;
    let vars = variables(&stack)?;
    let x = Var::from_tensor(&noise(&[2, 4, 6, 2], 1)?)?;
    let (y, grads) = gradients(&x, &vars, |x, p| stack.forward(x, p))?;
    let weights = noise(y.dims(), 99)?;
    let loss = || -> Result<f64> {
        let params: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = stack.forward(x.as_tensor(), &params)?;
        // Not every device has f64.
        let exact = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(candle_core::DType::F64);
        (exact(&y)? * exact(&weights)?)?.sum_all()?.to_scalar()
    };
    for (var, grad) in std::iter::once(&x).chain(&vars).zip(&grads) {
        let original = var.as_tensor().force_contiguous()?;
        let direction = noise(original.dims(), 77)?;
        let step = 1e-4f64;
        let mut ends = [0.; 2];
        for (end, sign) in ends.iter_mut().zip([1., -1.]) {
            var.set(&(&original + (&direction * (sign * step))?)?)?;
            *end = loss()?;
        }
        var.set(&original)?;
        let numeric = (ends[0] - ends[1]) / (2. * step);
        let analytic: f32 = (grad * &direction)?.sum_all()?.to_scalar()?;
        let scale = numeric.abs().max(1.);
        assert!((numeric - f64::from(analytic)).abs() < 2e-2 * scale, "{numeric} {analytic}");
    }
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_output_and_zero_gradients() -> Result<()> {
    // candle's own operations drop terms of an empty tensor's gradient (0.11.1: it adds nothing to nothing).
    // Devices hold no empty tensors.
    let is_composed = std::env::var("VQ_OPS_FORM").as_deref() == Ok("composed");
    if is_composed || !vq_ops::test_device().is_cpu() {
        return Ok(());
    }
    let residual = Layer::Residual { channels: 32, hidden: 16 };
    let chain = |middle: Option<Layer>| {
        let mut layers = vec![conv(3, 16, 4, 2, false), conv(16, 32, 3, 1, true)];
        layers.extend(middle);
        layers.extend([up(32, 16, true), Layer::Relu { channels: 16 }, up(16, 3, true)]);
        layers
    };
    // Layer by layer, candle's own sum of empty tensors forgets one of its terms.
    for (layers, is_fused) in [(chain(Some(residual)), true), (chain(None), false)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut stack = Stack::new(layers.clone())?;
            stack.set_precision(precision);
            let vars = variables(&stack)?;
            let x = Var::from_tensor(&noise(&[0, 8, 8, 3], 1)?)?;
            let (y, grads) = gradients(&x, &vars, |x, p| {
                if is_fused { stack.forward(x, p) } else { stack.forward_layerwise(x, p) }
            })?;
            assert_eq!(y.dims(), [0, 16, 16, 3]);
            assert_eq!(grads[0].dims(), x.dims());
            for (grad, var) in grads[1..].iter().zip(&vars) {
                assert_eq!(grad.dims(), var.dims());
                assert!(grad.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| *v == 0.));
            }
        }
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() -> Result<()> {
    let (x, weight) = (noise(&[1, 4, 4, 3], 1)?, noise(&[8, 2, 3, 3], 2)?);
    let error = vq_ops::conv2d(&x, &weight, None, Conv2d::default()).unwrap_err().to_string();
    assert!(error.contains("3 channels"), "{error}");
    let weight = noise(&[8, 3, 5, 5], 2)?;
    let error = vq_ops::conv2d(&x, &weight, None, Conv2d::default()).unwrap_err().to_string();
    assert!(error.contains("does not fit"), "{error}");
    Ok(())
}

#[test]
fn values_that_are_not_numbers_do_not_vanish() -> Result<()> {
    let stack = Stack::new(vec![
        conv(3, 16, 3, 1, true),
        Layer::Relu { channels: 16 },
        conv(16, 16, 3, 1, true),
    ])?;
    let vars = variables(&stack)?;
    let params: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let mut values = noise(&[1, 8, 8, 3], 1)?.flatten_all()?.to_vec1::<f32>()?;
    values[100] = f32::NAN;
    let x = Tensor::from_vec(values, (1, 8, 8, 3), &vq_ops::test_device())?;
    for y in [stack.forward(&x, &params)?, stack.forward_layerwise(&x, &params)?] {
        assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| v.is_nan()));
    }
    Ok(())
}

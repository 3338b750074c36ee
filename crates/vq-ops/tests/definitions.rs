//! Operations against their definitions in f64, on the device that `VQ_TEST_DEVICE` names.

#![allow(clippy::unwrap_used)] // a failing test may panic

use candle_core::{Device, Result, Tensor, Var};
use vq_ops::{AdamWSlot, AdamWStep, Conv2d, ConvTranspose2d};

fn device() -> Device {
    vq_ops::test_device()
}

/// Numbers in [-1, 1) that are the same everywhere.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32)
        .map(|i| {
            let mut h = i.wrapping_mul(0x9E37_79B1) ^ seed.wrapping_mul(0x85EB_CA77);
            h = (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D);
            h = (h ^ (h >> 12)).wrapping_mul(0x297A_2D39);
            ((h ^ (h >> 15)) >> 8) as f32 / (1 << 23) as f32 - 1.
        })
        .collect()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// Sums of products, and of the products' sizes: rounding is in proportion to these.
#[derive(Clone)]
struct Sums(Vec<[f64; 2]>);

impl Sums {
    fn new(count: usize) -> Self {
        Self(vec![[0.; 2]; count])
    }

    fn add(&mut self, at: usize, product: f64) {
        self.0[at][0] += product;
        self.0[at][1] += product.abs();
    }

    /// Minimal filtering, which the CPU has, multiplies by up to 8 and subtracts again, in two dimensions: the
    /// 64. A wrong or missing product is off by thousands of times that.
    #[track_caller]
    fn assert_close(&self, found: &Tensor, what: &str) {
        let found = values(found).unwrap();
        assert_eq!(found.len(), self.0.len(), "{what}");
        let largest = self.0.iter().fold(1f64, |most, sum| most.max(sum[1]));
        let allowed = 64. * f64::from(f32::EPSILON) * largest;
        for (at, (found, [expected, _])) in found.iter().zip(&self.0).enumerate() {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= allowed, "{what}: element {at} is {found}, not {expected}");
        }
    }
}

/// A convolution from `[batch, height, width, inner]` (large) to `[…, outer]` (small).
struct Shape {
    batch: usize,
    large: [usize; 2],
    small: [usize; 2],
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
}

impl Shape {
    /// Calls `visit(large, small, weight)` with the indices of every product; `weight_at` numbers
    /// (outer, inner, ky, kx).
    fn products(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let ([large_h, large_w], [small_h, small_w]) = (self.large, self.small);
        let ([inner, outer], k) = (self.channels, self.kernel);
        for b in 0..self.batch {
            for (y, x) in (0..small_h).flat_map(|y| (0..small_w).map(move |x| (y, x))) {
                for (ky, kx) in (0..k).flat_map(|ky| (0..k).map(move |kx| (ky, kx))) {
                    let (at_y, at_x) = (y * self.stride + ky, x * self.stride + kx);
                    let inside = |at: usize, length: usize| {
                        at.checked_sub(self.padding).filter(|&at| at < length)
                    };
                    let (Some(at_y), Some(at_x)) = (inside(at_y, large_h), inside(at_x, large_w))
                    else {
                        continue;
                    };
                    let large = ((b * large_h + at_y) * large_w + at_x) * inner;
                    let small = ((b * small_h + y) * small_w + x) * outer;
                    for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
                        visit(large + i, small + o, ((o * inner + i) * k + ky) * k + kx);
                    }
                }
            }
        }
    }

    fn dims(&self, [height, width]: [usize; 2], channels: usize) -> [usize; 4] {
        [self.batch, height, width, channels]
    }
}

/// `relu` as convolutions take it of their input.
fn rectified(values: &[f32], relu_input: bool) -> Vec<f64> {
    values.iter().map(|&v| f64::from(if relu_input && v <= 0. { 0. } else { v })).collect()
}

/// Value and gradients of both directions of the convolution.
fn check(shape: &Shape, relu_input: bool) -> Result<()> {
    let [inner, outer] = shape.channels;
    let dims = [shape.dims(shape.large, inner), shape.dims(shape.small, outer)];
    let counts = dims.map(|dims| dims.iter().product::<usize>());
    let weights = outer * inner * shape.kernel * shape.kernel;
    let weight = noise(weights, 3);
    for is_transposed in [false, true] {
        let (from, to) = if is_transposed { (1, 0) } else { (0, 1) };
        let (x, grad) = (noise(counts[from], 1), noise(counts[to], 2));
        let bias = noise(shape.channels[to], 4);
        let input = rectified(&x, relu_input);
        let mut y = Sums::new(counts[to]);
        for (at, sum) in y.0.iter_mut().enumerate() {
            *sum = [f64::from(bias[at % bias.len()]), 1.];
        }
        let mut of_x = Sums::new(counts[from]);
        let (mut of_weight, mut of_bias) = (Sums::new(weights), Sums::new(bias.len()));
        shape.products(|large, small, w| {
            let (i, o) = if is_transposed { (small, large) } else { (large, small) };
            y.add(o, input[i] * f64::from(weight[w]));
            if !relu_input || x[i] > 0. {
                of_x.add(i, f64::from(grad[o]) * f64::from(weight[w]));
            }
            of_weight.add(w, f64::from(grad[o]) * input[i]);
        });
        for (at, &grad) in grad.iter().enumerate() {
            of_bias.add(at % bias.len(), f64::from(grad));
        }
        let k = shape.kernel;
        // (outer, inner) is (outputs, inputs) of a convolution and (inputs, outputs) of a transposed one.
        let weight = Var::from_slice(&weight, (outer, inner, k, k), &device())?;
        let (x, bias) = (
            Var::from_vec(x, &dims[from], &device())?,
            Var::from_slice(&bias, bias.len(), &device())?,
        );
        let (stride, padding) = (shape.stride, shape.padding);
        let found = if is_transposed {
            let output_padding = shape.large[0] + 2 * padding - k - (shape.small[0] - 1) * stride;
            let config = ConvTranspose2d {
                stride,
                padding,
                output_padding,
                relu_input,
                ..ConvTranspose2d::default()
            };
            vq_ops::conv_transpose2d(&x, &weight, Some(&bias), config)?
        } else {
            let config = Conv2d { stride, padding, relu_input, ..Conv2d::default() };
            vq_ops::conv2d(&x, &weight, Some(&bias), config)?
        };
        assert_eq!(found.dims(), dims[to]);
        let grad = Tensor::from_vec(grad, &dims[to], &device())?;
        let gradients = (&found * grad)?.sum_all()?.backward()?;
        y.assert_close(&found, "value");
        for (sums, var, what) in [
            (of_x, &x, "of the input"),
            (of_weight, &weight, "of the weight"),
            (of_bias, &bias, "of the bias"),
        ] {
            sums.assert_close(gradients.get(var).unwrap(), what);
        }
    }
    Ok(())
}

#[test]
fn convolutions_and_their_gradients_both_ways() -> Result<()> {
    // (batch, size of the small side, channels of the large and the small side, kernel, stride, padding)
    for (batch, [h, w], channels, kernel, stride, padding) in [
        (3, [8, 8], [3, 16], 4, 2, 1),
        (2, [4, 6], [16, 32], 4, 2, 1),
        (2, [8, 8], [32, 32], 3, 1, 1),
        (2, [5, 3], [7, 11], 3, 1, 1),
        (2, [4, 4], [24, 13], 1, 1, 0),
        (1, [3, 4], [5, 6], 3, 2, 1),
        (1, [2, 3], [4, 3], 3, 3, 0),
    ] {
        let length = |small: usize| (small - 1) * stride + kernel - 2 * padding;
        let shape = Shape {
            batch,
            large: [length(h), length(w)],
            small: [h, w],
            channels,
            kernel,
            stride,
            padding,
        };
        for relu_input in [false, true] {
            check(&shape, relu_input)?;
        }
    }
    Ok(())
}

#[test]
fn the_nearest_code_is_that_of_exact_distances_and_the_first_among_equals() -> Result<()> {
    for (count, size, dim) in [(200, 512, 64), (65, 1000, 13), (33, 1, 5), (70, 4096, 8)] {
        // On a coarse grid many distances tie; far from the origin the expanded form cancels.
        for (offset, is_coarse) in [(0., false), (0., true), (1., false), (1e3, true)] {
            let place = |v: f32| offset + if is_coarse { (v * 2.).round() } else { v };
            let z: Vec<f32> = noise(count * dim, 5).into_iter().map(place).collect();
            let codebook: Vec<f32> = noise(size * dim, 6).into_iter().map(place).collect();
            let exact = |z: &[f32]| {
                let mut best = (f64::INFINITY, 0);
                for (code, e) in (0u32..).zip(codebook.chunks(dim)) {
                    let terms =
                        z.iter().zip(e).map(|(z, e)| (f64::from(*z) - f64::from(*e)).powi(2));
                    let distance: f64 = terms.sum();
                    if distance < best.0 {
                        best = (distance, code);
                    }
                }
                best.1
            };
            let expected: Vec<u32> = z.chunks(dim).map(exact).collect();
            let z = Tensor::from_slice(&z, (count, dim), &device())?;
            let codebook = Tensor::from_slice(&codebook, (size, dim), &device())?;
            let found = vq_ops::nearest_codes(&z, &codebook)?.to_vec1::<u32>()?;
            assert_eq!(found, expected, "{count} among {size} of {dim}, {offset}");
        }
    }
    Ok(())
}

#[test]
fn statistics_count_and_add() -> Result<()> {
    for (count, size, dim) in [(3000, 7, 64), (100, 300, 5), (1, 4, 300)] {
        let z = noise(count * dim, 7);
        let codes: Vec<u32> = (0..count as u32).map(|i| i * i % size as u32).collect();
        let (mut counts, mut sums) = (vec![0f32; size], Sums::new(size * dim));
        for (z, &code) in z.chunks(dim).zip(&codes) {
            counts[code as usize] += 1.;
            for (at, &v) in z.iter().enumerate() {
                sums.add(code as usize * dim + at, f64::from(v));
            }
        }
        let z = Tensor::from_slice(&z, (count, dim), &device())?;
        let codes = Tensor::from_slice(&codes, count, &device())?;
        let found = vq_ops::code_statistics(&z, &codes, size)?;
        assert_eq!(values(&found.0)?, counts);
        assert_eq!(found.1.dims(), [size, dim]);
        sums.assert_close(&found.1, "sums");
        // In the same order every time.
        let again = vq_ops::code_statistics(&z, &codes, size)?;
        assert_eq!(values(&again.1)?, values(&found.1)?);
    }
    Ok(())
}

/// Algorithm 2 of Loshchilov & Hutter, clipped by the norm of all gradients, with a moving average.
#[test]
fn adamw_over_many_tensors() -> Result<()> {
    let step = AdamWStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 0.5,
        ema_decay: Some(0.95),
    };
    // More tensors than a launch takes, of many sizes.
    let sizes: Vec<usize> = (1..=40).map(|i| i * i * i % 2000 + 1).collect();
    let limit = 1.5;
    let data: Vec<[Vec<f32>; 5]> = sizes
        .iter()
        .zip(0u32..)
        .map(|(&n, at)| {
            let mut five = [0, 1, 2, 3, 4].map(|part| noise(n, 10 * at + part));
            five[3].iter_mut().for_each(|v| *v = v.abs());
            five
        })
        .collect();
    let norm =
        data.iter().flat_map(|five| &five[1]).map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    assert!(norm > limit);

    let tensors: Vec<Vec<Tensor>> = data
        .iter()
        .map(|five| five.iter().map(|v| Tensor::from_slice(v, v.len(), &device())).collect())
        .collect::<Result<_>>()?;
    let gradients: Vec<Tensor> = tensors.iter().map(|five| five[1].clone()).collect();
    let both = vq_ops::norm_and_scale(&gradients, limit)?.unwrap();
    let found = both.to_vec1::<f32>()?;
    for (found, expected) in found.iter().zip([norm, limit / norm]) {
        assert!((f64::from(*found) / expected - 1.).abs() < 1e-6, "{found} {expected}");
    }
    let slots: Vec<AdamWSlot<'_>> = tensors
        .iter()
        .enumerate()
        .map(|(at, five)| AdamWSlot {
            param: &five[0],
            grad: &five[1],
            first_moment: &five[2],
            second_moment: &five[3],
            ema: Some(&five[4]),
            decays: at % 2 == 0,
        })
        .collect();
    vq_ops::adamw_steps(&slots, &step, Some(&both.narrow(0, 1, 1)?))?;
    for (at, (five, after)) in data.iter().zip(&tensors).enumerate() {
        let after: Vec<Vec<f32>> = after.iter().map(values).collect::<Result<_>>()?;
        assert_eq!(after[1], five[1], "the gradient stays");
        for i in 0..five[0].len() {
            let [p, g, m, v, ema] = [0, 1, 2, 3, 4].map(|part| f64::from(five[part][i]));
            let g = g * 0.5 * limit / norm;
            let (m, v) = (0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g);
            let decay = if at % 2 == 0 { 1. - 1e-2 * 0.1 } else { 1. };
            let (mean, root) = (m / (1. - 0.9f64.powi(3)), (v / (1. - 0.99f64.powi(3))).sqrt());
            let p = p * decay - 1e-2 * mean / (root + 1e-6);
            let ema = 0.95 * ema + 0.05 * p;
            for (part, expected) in [(0, p), (2, m), (3, v), (4, ema)] {
                let found = f64::from(after[part][i]);
                // A few roundings of numbers of about 1.
                let allowed = 1e-6 * expected.abs().max(1.);
                assert!((found - expected).abs() < allowed, "{at}, {part}: {found} {expected}");
            }
        }
    }
    Ok(())
}

//! Every operation, on the device and on the CPU.

use candle_core::{Device, Result, Tensor, Var};
use vq_ops::{
    AdamWSlot, AdamWStep, Conv2d, ConvTranspose2d, DropSeed, FeatureMap, Layer, MIRRORED,
    PackedLinear, PixelDistribution, Precision, Replaced, Stack, Staging,
};

use super::checks::{compare, difference, equal, noise, text, within};
use super::report::Report;

/// f32 in full.
const F32: f64 = 1e-4;
/// Factors of 10 bits of mantissa, 2⁻¹¹ each, some hundred of them added.
const TF32: f64 = 5e-3;
/// Factors of 8 bits, and what lies between layers as well. Of a stack's gradients more: see its check.
const BF16: f64 = 3e-2;

/// Checks all of them.
pub(super) fn check(device: &Device, report: &mut Report) {
    for (format, precision, is_strict, allowed) in [
        ("f32", Precision::F32, true, F32),
        ("tf32", Precision::F32, false, TF32),
        ("bf16", Precision::Bf16, false, BF16),
    ] {
        vq_ops::set_strict_f32(is_strict);
        convolutions(device, report, format, precision, allowed);
        stack(device, report, format, precision, allowed);
        maps(device, report, format, precision, allowed);
    }
    vq_ops::set_strict_f32(true);
    codes(device, report);
    optimizer(device, report);
    pictures(device, report);
    elementwise(device, report);
    of_priors(device, report);
    threads(device, report);
    vq_ops::set_strict_f32(false);
}

fn convolutions(
    device: &Device,
    report: &mut Report,
    format: &str,
    precision: Precision,
    allowed: f64,
) {
    // (name, input, [outputs, kernel, stride, padding])
    let forward: [(&str, [usize; 4], [usize; 4]); 6] = [
        ("4x4/2 from images", [8, 32, 32, 3], [64, 4, 2, 1]),
        ("4x4/2", [8, 16, 16, 64], [128, 4, 2, 1]),
        ("3x3", [8, 8, 8, 128], [128, 3, 1, 1]),
        ("1x1", [8, 8, 8, 128], [64, 1, 1, 0]),
        ("3x3, odd sizes", [3, 7, 9, 5], [11, 3, 1, 1]),
        ("3x3/2, odd sizes", [2, 9, 5, 6], [7, 3, 2, 1]),
    ];
    for (name, [b, h, w, c], [outputs, kernel, stride, padding]) in forward {
        for relu_input in [false, true] {
            let config = Conv2d { stride, padding, relu_input, precision, ..Conv2d::default() };
            let shapes: [&[usize]; 3] = [&[b, h, w, c], &[outputs, c, kernel, kernel], &[outputs]];
            let found = compare(device, &shapes, allowed, |x, _| {
                vq_ops::conv2d(&x[0], &x[1], Some(&x[2]), config)
            });
            let relu = if relu_input { " after relu" } else { "" };
            report.check(&format!("{format} conv2d {name}{relu}"), found);
        }
    }
    for (name, [b, h, w, c], outputs) in [
        ("4x4/2", [8, 8, 8, 128], 64),
        ("4x4/2 to images", [8, 16, 16, 64], 3),
        ("4x4/2, odd sizes", [2, 3, 5, 6], 7),
    ] {
        let config = ConvTranspose2d { stride: 2, padding: 1, precision, ..Default::default() };
        let shapes: [&[usize]; 3] = [&[b, h, w, c], &[c, outputs, 4, 4], &[outputs]];
        let found = compare(device, &shapes, allowed, |x, _| {
            vq_ops::conv_transpose2d(&x[0], &x[1], Some(&x[2]), config)
        });
        report.check(&format!("{format} conv_transpose2d {name}"), found);
    }
}

/// The standard model's encoder. Of tf32 and bf16 the output alone: a value at ReLU's edge that falls to its
/// other side changes gradients by more than rounding.
fn stack(device: &Device, report: &mut Report, format: &str, precision: Precision, allowed: f64) {
    let conv = |in_channels, out_channels, kernel, stride, padding, relu_input| Layer::Conv2d {
        in_channels,
        out_channels,
        kernel,
        config: Conv2d { stride, padding, relu_input, ..Conv2d::default() },
    };
    let residual = Layer::Residual { channels: 128, hidden: 32 };
    let layers = vec![
        conv(3, 64, 4, 2, 1, false),
        conv(64, 128, 4, 2, 1, true),
        conv(128, 128, 3, 1, 1, true),
        residual.clone(),
        residual,
        conv(128, 64, 1, 1, 0, true),
    ];
    let shapes: Vec<Vec<usize>> =
        layers.iter().flat_map(Layer::parameters).map(|(_, shape)| shape).collect();
    let inputs: Vec<&[usize]> =
        std::iter::once(&[8, 32, 32, 3][..]).chain(shapes.iter().map(Vec::as_slice)).collect();
    // Weights as large as those of a network, or the values would grow from layer to layer.
    let scaled = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        x.iter().skip(1).map(|p| p / (p.elem_count() as f64 / p.dim(0)? as f64).sqrt()).collect()
    };
    let found = compare(device, &inputs, allowed, |x, _| {
        let mut stack = Stack::new(layers.clone())?;
        stack.set_precision(precision);
        let y = stack.forward(&x[0], &scaled(x)?)?;
        if format == "f32" { Ok(y) } else { Ok(y.detach()) }
    });
    report.check(&format!("{format} the standard encoder as a stack"), found);
}

/// Features that one stack takes alone, and another beside its output and a tensor, both of half the size: what a
/// model of several levels is made of. No ReLU, whose edge would make more of rounding.
fn maps(device: &Device, report: &mut Report, format: &str, precision: Precision, allowed: f64) {
    let conv = |in_channels, out_channels, kernel, stride, padding| Layer::Conv2d {
        in_channels,
        out_channels,
        kernel,
        config: Conv2d { stride, padding, ..Conv2d::default() },
    };
    for (channels, small) in [(64, 32), (5, 3)] {
        let layers = [
            conv(3, channels, 3, 1, 1),
            conv(channels, 8, 4, 2, 1),
            conv(channels + 8 + small, 16, 1, 1, 0),
        ];
        let shapes: Vec<Vec<usize>> = [vec![4, 8, 12, 3], vec![4, 4, 6, small]]
            .into_iter()
            .chain(layers.iter().flat_map(Layer::parameters).map(|(_, shape)| shape))
            .collect();
        let inputs: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let found = compare(device, &inputs, allowed, |x, _| {
            let stacks = layers.iter().map(|layer| {
                let mut stack = Stack::new(vec![layer.clone()])?;
                stack.set_precision(precision);
                Ok(stack)
            });
            let stacks = stacks.collect::<Result<Vec<_>>>()?;
            let (image, small) = (FeatureMap::from(x[0].clone()), FeatureMap::from(x[1].clone()));
            let features = stacks[0].forward_map(&[(&image, 1)], &x[2..4])?;
            let values = features.values()?;
            let Replaced { map: features, error } =
                features.replace(&values, &values.affine(-0.5, 0.1)?)?;
            let above = stacks[1].forward_map(&[(&features, 1)], &x[4..6])?;
            let y =
                stacks[2].forward_joined(&[(&features, 1), (&above, 2), (&small, 2)], &x[6..8])?;
            let more = (above.tensor()?.mean_all()? + error)?;
            y + more.broadcast_as((4, 8, 12, 16))
        });
        report.check(&format!("{format} maps between stacks, {channels} channels"), found);
    }
}

fn codes(device: &Device, report: &mut Report) {
    for (count, size, dim) in [
        (4096, 512, 64),
        (40_000, 512, 64),
        (35_001, 77, 13),
        (1000, 1000, 13),
        (65, 16_384, 8),
        (300, 3, 256),
    ] {
        let found = || -> Result<std::result::Result<String, String>> {
            let mut z = noise(&[count, dim], 1);
            let mut codebook = noise(&[size, dim], 2);
            // Equal codes, and vectors that are codes.
            codebook.copy_within(0..dim, (size - 1) * dim);
            z[..dim].copy_from_slice(&codebook[..dim]);
            let run = |device: &Device| -> Result<(Vec<u32>, Vec<f32>, Vec<f32>)> {
                let z = Tensor::from_slice(&z, (count, dim), device)?;
                let codebook = Tensor::from_slice(&codebook, (size, dim), device)?;
                let codes = vq_ops::nearest_codes(&z, &codebook)?;
                let (counts, sums) = vq_ops::code_statistics(&z, &codes, size)?;
                Ok((codes.to_vec1()?, counts.to_vec1()?, sums.flatten_all()?.to_vec1()?))
            };
            let (ours, theirs) = (run(device)?, run(&Device::Cpu)?);
            let differing = ours.0.iter().zip(&theirs.0).filter(|(a, b)| a != b).count();
            if differing > 0 || ours.1 != theirs.1 {
                return Ok(Err(format!("{differing} of {count} codes differ")));
            }
            Ok(within(difference(&ours.2, &theirs.2), F32))
        };
        let name = format!("codes of {count} vectors among {size} of {dim}");
        report.check(&name, found().map_err(text).and_then(|found| found));
    }
}

fn optimizer(device: &Device, report: &mut Report) {
    let run = |device: &Device| -> Result<Vec<f32>> {
        let tensor = |n: usize, seed| Tensor::from_vec(noise(&[n], seed), n, device);
        let sizes = (1..=70).map(|i| i * i * 7).collect::<Vec<usize>>();
        let mut tensors = Vec::new();
        for (&n, seed) in sizes.iter().zip(1u64..) {
            let second = tensor(n, seed + 300)?.abs()?;
            tensors.push([
                tensor(n, seed)?,
                tensor(n, seed + 100)?,
                tensor(n, seed + 200)?,
                second,
                tensor(n, seed + 400)?,
            ]);
        }
        let gradients: Vec<Tensor> = tensors.iter().map(|t| t[1].clone()).collect();
        let Some(norm) = vq_ops::norm_and_scale(&gradients, 1.)? else { return Ok(Vec::new()) };
        let slots: Vec<AdamWSlot<'_>> = tensors
            .iter()
            .enumerate()
            .map(|(i, [param, grad, first_moment, second_moment, ema])| AdamWSlot {
                param,
                grad,
                first_moment,
                second_moment,
                ema: Some(ema),
                decays: i % 2 == 0,
            })
            .collect();
        let step = AdamWStep {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 3,
            grad_scale: 1.,
            ema_decay: Some(0.9),
        };
        vq_ops::adamw_steps(&slots, &step, Some(&norm.narrow(0, 1, 1)?))?;
        let all = slots.iter().flat_map(|slot| {
            [Some(slot.param), Some(slot.first_moment), Some(slot.second_moment), slot.ema]
        });
        let mut values = norm.to_vec1::<f32>()?;
        for tensor in all.flatten() {
            values.extend(tensor.to_vec1::<f32>()?);
        }
        Ok(values)
    };
    let found = run(device).and_then(|ours| Ok(difference(&ours, &run(&Device::Cpu)?)));
    report.check("adamw of 70 tensors, clipped", found.map_err(text).and_then(|d| within(d, F32)));
}

fn pictures(device: &Device, report: &mut Report) {
    let run = |device: &Device| -> Result<Vec<f32>> {
        let pixels: Vec<u8> =
            noise(&[20 * 3 * 32 * 32], 1).iter().map(|v| (v * 127.) as u8).collect();
        let pixels = Tensor::from_vec(pixels, (20, 3, 32, 32), device)?;
        let picks = Tensor::new(&[3u32, MIRRORED | 0x13, 0, MIRRORED], device)?;
        let tables = Tensor::from_vec(noise(&[768], 2), (3, 256), device)?;
        vq_ops::gather_images(&pixels, &picks, &tables)?.flatten_all()?.to_vec1()
    };
    let found = run(device).and_then(|ours| Ok(difference(&ours, &run(&Device::Cpu)?)));
    report.check("batches of images", found.map_err(text).and_then(|d| within(d, 0.)));
    let run = || -> Result<bool> {
        let mut staging = Staging::new(60, device)?;
        let mut is_right = true;
        for first in [0u8, 100] {
            for (byte, value) in staging.bytes()?.iter_mut().zip(first..) {
                *byte = value;
            }
            let there = staging.upload((5, 12))?.flatten_all()?.to_vec1::<u8>()?;
            is_right &= there.into_iter().eq((first..).take(60));
        }
        Ok(is_right)
    };
    report.check("bytes on their way", equal(run(), "other bytes arrived"));
}

fn elementwise(device: &Device, report: &mut Report) {
    let square: &[usize] = &[6, 50];
    let found = compare(device, &[square, square], F32, |x, _| vq_ops::squared_error(&x[0], &x[1]));
    report.check("squared_error", found);
    let found = compare(device, &[&[4, 6, 5, 3], &[4, 3, 6, 5]], F32, |x, _| {
        FeatureMap::from(x[0].clone()).image_error(&x[1], 1.5)
    });
    report.check("image_error", found);
    let found = compare(device, &[&[7, 12]], F32, |x, device| {
        vq_ops::lookup(&x[0], &Tensor::new(&[[3u32, 0, 6], [3, 3, 5]], device)?)
    });
    report.check("lookup", found);
    for (channels, mixtures) in [(3, 10), (1, 3)] {
        let distribution = PixelDistribution::LogisticMixture { mixtures };
        let shape = [500, distribution.parameters(channels)];
        let found = compare(device, &[&shape], F32, |x, device| {
            let pixels = (0..500 * channels).map(|i| (i * 37 % 256) as u8).collect();
            let pixels = Tensor::from_vec(pixels, (500, channels), device)?;
            vq_ops::pixel_likelihood(&x[0], &pixels, distribution)
        });
        report
            .check(&format!("pixel_likelihood, {mixtures} logistics, {channels} channels"), found);
    }
    let found = compare(device, &[square, square], F32, |x, _| vq_ops::replace_value(&x[0], &x[1]));
    report.check("replace_value", found);
    let found = compare(device, &[&[2, 5, 6, 7]], F32, |x, _| vq_ops::channels_first(&x[0]));
    report.check("channels_first", found);
    let found = compare(device, &[&[2, 5, 6, 7]], F32, |x, _| vq_ops::channels_last(&x[0]));
    report.check("channels_last", found);
    let found = compare(device, &[&[2, 5, 6, 7]], F32, |x, _| vq_ops::repeat_pixels(&x[0], 3));
    report.check("repeat_pixels", found);
}

fn of_priors(device: &Device, report: &mut Report) {
    let found =
        compare(device, &[&[3, 4, 5, 12], &[3, 12]], F32, |x, _| vq_ops::gate(&x[0], &x[1]));
    report.check("gate", found);
    let found = compare(device, &[&[3, 4, 5, 12], &[3, 4, 5, 12], &[1, 12]], F32, |x, _| {
        vq_ops::gate_sum(&x[0], &x[1], &x[2])
    });
    report.check("gate_sum", found);
    report.check("swiglu", compare(device, &[&[4, 5, 12]], F32, |x, _| vq_ops::swiglu(&x[0])));
    let found = compare(device, &[&[3, 7, 32], &[3, 32], &[3, 32]], F32, |x, _| {
        vq_ops::rms_norm(&x[0], &x[1], &x[2], 1e-6)
    });
    report.check("rms_norm", found);
    for causal in [false, true] {
        let found = compare(device, &[&[2, 3, 9, 9]], F32, |x, _| {
            vq_ops::attention_weights(&x[0], 0.3, causal)
        });
        report.check(&format!("attention_weights, causal: {causal}"), found);
    }
    let found = compare(device, &[&[50, 33]], F32, |x, device| {
        let targets: Vec<u32> = (0..50).map(|i| i * 7 % 33).collect();
        vq_ops::cross_entropy(&x[0], &Tensor::new(targets, device)?)
    });
    report.check("cross_entropy", found);
    let found = compare(device, &[&[64, 64]], F32, |x, device| {
        let known = vq_ops::dropout(&x[0], 0.3, DropSeed::Known(7))?;
        let there = DropSeed::to_device(1 << 63, device)?;
        known + vq_ops::dropout(&x[0], 0.6, DropSeed::OnDevice(&there, 5))?
    });
    report.check("dropout", found);
    let found =
        compare(device, &[&[2, 5, 6, 4]], F32, |x, _| vq_ops::shift(&x[0], [6, 6], [1, -2]));
    report.check("shift", found);
    let found = compare(device, &[&[2, 5, 24]], F32, |x, _| {
        vq_ops::merge_heads(&vq_ops::split_heads(&x[0], 4)?.sqr()?)
    });
    report.check("split_heads, merge_heads", found);
    let found = compare(device, &[&[4, 9, 40], &[50, 40], &[50]], F32, |x, _| {
        vq_ops::linear(&x[0], &x[1], &x[2], true)
    });
    report.check("linear", found);
    let found = compare(device, &[&[2, 3, 9, 16], &[2, 3, 7, 16]], F32, |x, _| {
        vq_ops::matmul_transposed(&x[0], &x[1])
    });
    report.check("matmul_transposed", found);
    let found = compare(device, &[&[5, 40], &[50, 40], &[50]], F32, |x, _| {
        PackedLinear::new(&x[1], &x[2])?.forward(&x[0], true)
    });
    report.check("packed linear", found);
}

/// A convolution and its gradients on threads that come one after the other, to the bit.
fn threads(device: &Device, report: &mut Report) {
    let run = || -> Result<Vec<f32>> {
        let of = |dims: &[usize], seed| -> Result<Var> {
            Var::from_tensor(&Tensor::from_vec(noise(dims, seed), dims, device)?)
        };
        let (x, weight) = (of(&[4, 9, 9, 16], 1)?, of(&[8, 16, 3, 3], 2)?);
        let y = vq_ops::conv2d(&x, &weight, None, Conv2d::default())?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        let mut all = y.flatten_all()?.to_vec1()?;
        for var in [&x, &weight] {
            let Some(gradient) = gradients.get(var) else { candle_core::bail!("no gradient") };
            all.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(all)
    };
    let to_the_end = || {
        let all = run();
        vq_ops::wait_for(device)?;
        all
    };
    let elsewhere = || match std::thread::scope(|scope| scope.spawn(to_the_end).join()) {
        Ok(there) => there,
        Err(_) => candle_core::bail!("a thread panicked"),
    };
    let found = || -> Result<bool> {
        let here = run()?;
        Ok(elsewhere()? == here && elsewhere()? == here)
    };
    report.check("products on other threads", equal(found(), "other bits"));
}

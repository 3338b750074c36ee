//! Every kernel against its definition, on every instruction set that this CPU has.

mod accumulation;
mod empty;
mod search;
mod threads;

use proptest::prelude::*;

use super::bf16;
use super::bf16::Narrow;
use super::bf16::kernels::round;
use super::buffers::Buffers;
use super::conv::{Finish, Geometry, large_to_small, small_to_large};
use super::elements::{Elements, Output};
use super::pack::Images;
use super::tile::{FORCED, available};
use super::weight_gradient::weight_gradient;
use crate::Precision;

/// Numbers in [-1, 1) that look random and are the same everywhere.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.
        })
        .collect()
}

fn on_every_cpu(check: impl Fn(&str)) {
    for kernels in available() {
        FORCED.set(Some(kernels));
        check(kernels.name);
        FORCED.set(None);
    }
}

/// As [`on_every_cpu`], for the kernels of that precision, with f32 kernels of the same instruction set.
fn on_every_cpu_with(precision: Precision, check: impl Fn(&str)) {
    if precision == Precision::F32 {
        return on_every_cpu(check);
    }
    for kernels in bf16::kernels::available() {
        bf16::kernels::FORCED.set(Some(kernels));
        FORCED.set(available().into_iter().find(|of_f32| of_f32.name == kernels.name));
        check(&format!("bf16 {}", kernels.name));
        FORCED.set(None);
        bf16::kernels::FORCED.set(None);
    }
}

/// The value of a factor: itself, or the nearest number with 8 bits of mantissa, the even one of two
/// that are equally near.
fn factor(value: f64, precision: Precision) -> f64 {
    if precision == Precision::F32 || value == 0. {
        return value;
    }
    let unit = value.abs().log2().floor().exp2() / 128.;
    (value / unit).round_ties_even() * unit
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f64], allowed: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - e).abs();
        assert!(error <= allowed, "{what}: element {i} is {a}, not {e} (allowed: {allowed})");
    }
}

/// Calls `visit(large index, small index, weight index)` for every product of a convolution.
fn products(g: &Geometry, mut visit: impl FnMut(usize, usize, usize)) {
    let (l, s) = (g.large, g.small);
    for b in 0..s.batch {
        for (y, x) in (0..s.height).flat_map(|y| (0..s.width).map(move |x| (y, x))) {
            for (ky, kx) in (0..g.kernel.0).flat_map(|ky| (0..g.kernel.1).map(move |kx| (ky, kx))) {
                let ly = (y * g.stride + ky * g.dilation) as isize - g.padding as isize;
                let lx = (x * g.stride + kx * g.dilation) as isize - g.padding as isize;
                if ly < 0 || lx < 0 || ly >= l.height as isize || lx >= l.width as isize {
                    continue;
                }
                for (o, i) in (0..s.channels).flat_map(|o| (0..l.channels).map(move |i| (o, i))) {
                    let large =
                        ((b * l.height + ly as usize) * l.width + lx as usize) * l.channels + i;
                    let small = ((b * s.height + y) * s.width + x) * s.channels + o;
                    let weight = ((o * l.channels + i) * g.kernel.0 + ky) * g.kernel.1 + kx;
                    visit(large, small, weight);
                }
            }
        }
    }
}

fn relu(values: &[f32], on: bool) -> Vec<f64> {
    values.iter().map(|v| f64::from(if on && *v <= 0. { 0. } else { *v })).collect()
}

fn check_geometry(g: &Geometry, relu_on: bool, finish_on: bool) {
    let large = noise(g.large.len(), 1);
    let small = noise(g.small.len(), 2);
    let weight = noise(g.weight_len(), 3);
    let factors = |values: &[f32], relu_on: bool| -> Vec<f64> {
        relu(values, relu_on).into_iter().map(|value| factor(value, g.precision)).collect()
    };
    let (large64, small64) = (factors(&large, relu_on), factors(&small, relu_on));
    let weight64 = factors(&weight, false);
    let mut to_small = vec![0f64; small.len()];
    let mut to_large = vec![0f64; large.len()];
    let mut of_weight = vec![0f64; weight.len()];
    let mut sizes = [vec![0f64; small.len()], vec![0f64; large.len()], vec![0f64; weight.len()]];
    products(g, |l, s, w| {
        sizes[0][s] += (large64[l] * weight64[w]).abs();
        sizes[1][l] += (small64[s] * weight64[w]).abs();
        sizes[2][w] += (large64[l] * small64[s]).abs();
        to_small[s] += large64[l] * weight64[w];
        to_large[l] += small64[s] * weight64[w];
        of_weight[w] += large64[l] * small64[s];
    });
    let finished = |sums: &[f64], channels: usize, bias: &[f32], mask: &[f32], more: &[f32]| {
        let one = |(i, sum): (usize, &f64)| {
            let sum = sum + f64::from(bias[i % channels]);
            (if mask[i] > 0. { sum } else { 0. }) + f64::from(more[i])
        };
        sums.iter().enumerate().map(one).collect::<Vec<f64>>()
    };
    let (small_bias, large_bias) = (noise(g.small.channels, 4), noise(g.large.channels, 5));
    let (small_mask, large_mask) = (noise(small.len(), 6), noise(large.len(), 7));
    let (small_more, large_more) = (noise(small.len(), 8), noise(large.len(), 9));
    if finish_on {
        to_small = finished(&to_small, g.small.channels, &small_bias, &small_mask, &small_more);
        to_large = finished(&to_large, g.large.channels, &large_bias, &large_mask, &large_more);
    }
    // Rounding is in proportion to the sum of the products' sizes, not to the sum itself. Minimal
    // filtering trades accuracy for its fewer multiplications: its transforms multiply by up to 8 and
    // subtract again, in two dimensions. A wrong or missing product is off by thousands of times that.
    let fits = g.small.channels.is_multiple_of(8) && g.large.channels.is_multiple_of(8);
    let taps = g.kernel.0.div_ceil(g.stride);
    let allowed = |sizes: &[f64], minimal: bool| {
        let largest = sizes.iter().fold(1., |a: f64, b| a.max(*b));
        largest * f64::from(f32::EPSILON) * if minimal { 64. } else { 8. }
    };
    on_every_cpu_with(g.precision, |cpu| {
        let is_f32 = g.precision == Precision::F32;
        let minimal = fits && (is_f32 || taps >= bf16::kernels::kernels().filters_from);
        let allowed = sizes.each_ref().map(|sizes| allowed(sizes, minimal));
        let finish = |bias, mask, residual| {
            if finish_on {
                Finish {
                    bias: Some(bias),
                    mask: Some(Elements::F32(mask)),
                    residual: Some(residual),
                }
            } else {
                Finish::default()
            }
        };
        // Whatever was in the output before must not matter.
        let mut out = vec![f32::NAN; small.len()];
        let end = finish(&small_bias[..], &small_mask[..], &small_more[..]);
        let (x, buffers) = (Elements::F32(&large), Buffers::default());
        large_to_small(g, x, relu_on, &weight, end, &buffers, Output::F32(&mut out));
        assert_close(&out, &to_small, allowed[0], &format!("{cpu} large_to_small {g:?}"));
        let mut out = vec![f32::NAN; large.len()];
        let end = finish(&large_bias[..], &large_mask[..], &large_more[..]);
        let x = Elements::F32(&small);
        small_to_large(g, x, relu_on, &weight, end, &buffers, Output::F32(&mut out));
        assert_close(&out, &to_large, allowed[1], &format!("{cpu} small_to_large {g:?}"));
        // Rounded before instead of now, and given rounded as well: the same to the bit.
        let halves = |values: &[f32], relu| {
            let clamp = |v: &f32| if relu && *v <= 0. { 0. } else { *v };
            values.iter().map(|v| round(clamp(v))).collect::<Vec<u16>>()
        };
        if g.precision == Precision::Bf16 {
            let mask = halves(&large_mask, true);
            let end = Finish { mask: end.mask.map(|_| Elements::Bf16(&mask)), ..end };
            let x = halves(&small, relu_on);
            let mut also = vec![f32::NAN; large.len()];
            let mut to = Narrow::left_over(large.len(), &buffers);
            let both = Output::Bf16 { to: &mut to, relu: finish_on, also: Some(&mut also) };
            small_to_large(g, Elements::Bf16(&x), relu_on, &weight, end, &buffers, both);
            assert_eq!(also, out, "{cpu} small_to_large from bf16 {g:?}");
            assert_eq!(to.halves(), halves(&out, finish_on), "{cpu} small_to_large to bf16 {g:?}");
            let mut to = Narrow::left_over(large.len(), &buffers);
            let one = Output::Bf16 { to: &mut to, relu: finish_on, also: None };
            small_to_large(g, Elements::Bf16(&x), relu_on, &weight, end, &buffers, one);
            assert_eq!(to.halves(), halves(&out, finish_on), "{cpu} small_to_large to bf16 {g:?}");
        }
        let mut out = vec![f32::NAN; weight.len()];
        let ends = ((Elements::F32(&large), relu_on), (Elements::F32(&small), relu_on));
        weight_gradient(g, ends.0, ends.1, &Buffers::default(), &mut out);
        assert_close(&out, &of_weight, allowed[2], &format!("{cpu} weight_gradient {g:?}"));
        if g.precision == Precision::Bf16 {
            let (large, small) = (halves(&large, relu_on), halves(&small, relu_on));
            let ends = ((Elements::Bf16(&large), relu_on), (Elements::Bf16(&small), relu_on));
            let mut again = vec![f32::NAN; weight.len()];
            weight_gradient(g, ends.0, ends.1, &Buffers::default(), &mut again);
            assert_eq!(again, out, "{cpu} weight_gradient from bf16 {g:?}");
        }
    });
}

fn geometry(
    (batch, height, width): (usize, usize, usize),
    (inner, outer): (usize, usize),
    kernel: (usize, usize),
    (stride, padding, dilation): (usize, usize, usize),
    precision: Precision,
) -> Option<Geometry> {
    let length = |input: usize, kernel: usize| {
        let span = dilation * (kernel - 1) + 1;
        (input + 2 * padding).checked_sub(span).map(|rest| rest / stride + 1)
    };
    let large = Images { batch, height, width, channels: inner };
    let small = Images {
        batch,
        height: length(height, kernel.0)?,
        width: length(width, kernel.1)?,
        channels: outer,
    };
    Some(Geometry { large, small, kernel, stride, padding, dilation, precision })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn convolutions_and_their_gradients_equal_the_definition(
        size in (1usize..4, 1usize..11, 1usize..11),
        channels in (1usize..40, 1usize..70),
        kernel in (1usize..5, 1usize..5),
        steps in (1usize..4, 0usize..3, 1usize..3),
        relu in any::<bool>(),
        finish in any::<bool>(),
        precision in prop::sample::select(vec![Precision::F32, Precision::Bf16]),
    ) {
        if let Some(g) = geometry(size, channels, kernel, steps, precision) {
            check_geometry(&g, relu, finish);
        }
    }

    #[test]
    fn minimal_filtering_equals_the_definition(
        size in (1usize..4, 1usize..20, 1usize..20),
        channels in (1usize..5, 1usize..5),
        three in any::<bool>(), padding in 0usize..3,
        relu in any::<bool>(), finish in any::<bool>(),
        precision in prop::sample::select(vec![Precision::F32, Precision::Bf16]),
    ) {
        let (kernel, stride) = if three { (3, 1) } else { (4, 2) };
        let channels = (16 * channels.0, 16 * channels.1);
        if let Some(g) = geometry(size, channels, (kernel, kernel), (stride, padding, 1), precision) {
            check_geometry(&g, relu, finish);
        }
    }
}

#[test]
fn the_layers_of_the_standard_model_equal_the_definition() {
    for (size, channels, kernel, steps) in [
        ((2, 32, 32), (3, 64), 4, (2, 1, 1)),
        ((1, 16, 16), (64, 128), 4, (2, 1, 1)),
        ((2, 8, 8), (128, 128), 3, (1, 1, 1)),
        ((2, 8, 8), (128, 32), 3, (1, 1, 1)),
        ((2, 8, 8), (32, 128), 1, (1, 0, 1)),
        ((3, 7, 5), (256, 33), 3, (1, 1, 1)),
    ] {
        for precision in [Precision::F32, Precision::Bf16] {
            let g = geometry(size, channels, (kernel, kernel), steps, precision).unwrap();
            check_geometry(&g, true, true);
        }
    }
}

#[test]
fn a_convolution_with_as_many_channels_as_rows_and_columns() {
    let f32 = Precision::F32;
    check_geometry(&geometry((1, 4, 4), (4, 4), (3, 3), (1, 1, 1), f32).unwrap(), false, false);
}

#[test]
#[allow(clippy::float_cmp)] // rounding is exact or wrong
fn rounding_to_bfloat16_keeps_what_is_no_number() {
    use bf16::kernels::round;
    let back = |value: f32| f32::from_bits(u32::from(round(value)) << 16);
    for value in [0., -0., 1., -2.5, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(back(value).to_bits(), value.to_bits());
    }
    for bits in [0x7F80_0001, 0x7FFF_FFFF, 0xFF80_0001, 0xFFFF_FFFF] {
        assert!(back(f32::from_bits(bits)).is_nan(), "{bits:#x}");
    }
    for value in noise(1000, 5) {
        assert_eq!(f64::from(back(value)), factor(f64::from(value), Precision::Bf16));
    }
    // Half way between two: to the even one, up as well as down.
    assert_eq!(back(1. + 1. / 256.), 1.);
    assert_eq!(back(1. + 3. / 256.), 1. + 4. / 256.);
    assert_eq!(back(f32::MAX), f32::INFINITY);
}

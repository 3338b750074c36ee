//! Weight gradients of whole batches, whose sums go back to memory and are added to several times.

use super::{Geometry, factor, geometry, noise, on_every_cpu_with, relu};
use crate::Precision;
use crate::cpu::bf16;
use crate::cpu::buffers::Buffers;
use crate::cpu::elements::Elements;
use crate::cpu::weight_gradient::{column_sums, weight_gradient};

/// The products that an element of the weight's gradient sums up.
fn terms<'a>(
    g: &'a Geometry,
    (large, small): (&'a [f64], &'a [f64]),
    index: usize,
) -> impl Iterator<Item = f64> + use<'a> {
    let (l, s) = (g.large, g.small);
    let (kx, rest) = (index % g.kernel.1, index / g.kernel.1);
    let (ky, rest) = (rest % g.kernel.0, rest / g.kernel.0);
    let (inner, outer) = (rest % l.channels, rest / l.channels);
    (0..s.pixels()).filter_map(move |pixel| {
        let (x, y, image) =
            (pixel % s.width, pixel / s.width % s.height, pixel / s.width / s.height);
        let y = (y * g.stride + ky * g.dilation).checked_sub(g.padding)?;
        let x = (x * g.stride + kx * g.dilation).checked_sub(g.padding)?;
        let at = (image * l.height + y) * l.width + x;
        (y < l.height && x < l.width)
            .then(|| large[at * l.channels + inner] * small[pixel * s.channels + outer])
    })
}

/// Some hundred elements spread over the weight, the first and the last among them.
fn check(g: &Geometry) {
    const ELEMENTS: usize = 211;
    let (large, small) = (noise(g.large.len(), 1), noise(g.small.len(), 2));
    let factors = |values: &[f32], on| -> Vec<f64> {
        relu(values, on).into_iter().map(|value| factor(value, g.precision)).collect()
    };
    let both = (&factors(&large, true)[..], &factors(&small, false)[..]);
    let count = g.weight_len();
    let expected: Vec<(usize, f64)> = (0..ELEMENTS)
        .map(|i| i * (count - 1) / (ELEMENTS - 1))
        .map(|index| (index, terms(g, both, index).sum()))
        .collect();
    // See `check_geometry`; the sum of the products' sizes is about the same for every element.
    let size: f64 = terms(g, both, count / 2).map(f64::abs).sum();
    let minimal = g.precision == Precision::F32;
    let allowed = 1.5 * size * f64::from(f32::EPSILON) * if minimal { 64. } else { 8. };
    on_every_cpu_with(g.precision, |cpu| {
        let mut found = vec![f32::NAN; count];
        let ends = ((Elements::F32(&large), true), (Elements::F32(&small), false));
        weight_gradient(g, ends.0, ends.1, &Buffers::default(), &mut found);
        for (index, expected) in &expected {
            let error = (f64::from(found[*index]) - expected).abs();
            assert!(
                error <= allowed,
                "{cpu} {g:?}: element {index} is {}, not {expected} (allowed: {allowed})",
                found[*index]
            );
        }
    });
}

/// (batch, height, width), channels, side of the kernel, stride.
type Case = ((usize, usize, usize), (usize, usize), usize, usize);

fn check_all(cases: &[Case], precision: Precision) {
    for (size, channels, kernel, stride) in cases {
        let padding = (kernel - stride).div_ceil(2);
        let steps = (*stride, padding, 1);
        check(&geometry(*size, *channels, (*kernel, *kernel), steps, precision).unwrap());
    }
}

/// No number of lanes divides the channels, so that the products are the definition's.
#[test]
fn direct_weight_gradients_of_whole_batches() {
    check_all(
        &[
            // More pixels than all parts take at once, in one and in two stripes of the depth.
            ((128, 8, 8), (11, 13), 3, 1),
            ((128, 8, 8), (33, 17), 3, 1),
            ((97, 9, 8), (32, 32), 1, 1),
            // So large a weight that there are few parts, whose stripes are tasks of their own.
            ((6, 16, 16), (1100, 1100), 1, 1),
        ],
        Precision::F32,
    );
}

#[test]
fn minimal_filtering_weight_gradients_of_whole_batches() {
    check_all(
        &[
            ((64, 8, 8), (16, 16), 3, 1),
            ((101, 7, 8), (32, 16), 3, 1),
            ((128, 16, 16), (16, 16), 4, 2),
            // In two pieces of the depth.
            ((64, 8, 8), (208, 16), 3, 1),
        ],
        Precision::F32,
    );
}

#[test]
fn bfloat16_weight_gradients_of_whole_batches() {
    check_all(
        &[
            ((128, 8, 8), (11, 13), 3, 1),
            ((128, 8, 8), (33, 17), 3, 1),
            ((65, 8, 8), (48, 64), 3, 1),
            ((67, 16, 16), (16, 40), 4, 2),
            ((97, 9, 8), (32, 32), 1, 1),
        ],
        Precision::Bf16,
    );
}

#[test]
fn bias_gradients_on_every_instruction_set() {
    // Several of the chunks that are summed side by side, and columns that no register divides.
    for (rows, columns) in [(3000, 37), (1, 5), (1024, 16), (2049, 64)] {
        let values = noise(rows * columns, 5);
        let halves: Vec<u16> = values.iter().map(|v| bf16::kernels::round(*v)).collect();
        let sums = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..columns).map(|j| (0..rows).map(|i| value(i * columns + j)).sum()).collect()
        };
        let of_values = sums(&|i| f64::from(values[i]));
        let of_halves = sums(&|i| f64::from(bf16::widen(halves[i])));
        on_every_cpu_with(Precision::Bf16, |cpu| {
            for (elements, expected) in
                [(Elements::F32(&values), &of_values), (Elements::Bf16(&halves), &of_halves)]
            {
                let mut found = vec![f32::NAN; columns];
                column_sums(elements, columns, &mut found);
                let allowed = rows as f64 * f64::from(f32::EPSILON);
                super::assert_close(&found, expected, allowed, cpu);
            }
        });
    }
}

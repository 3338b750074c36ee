//! Batches without images.

use super::{Finish, Output, geometry, large_to_small, on_every_cpu_with, small_to_large};
use crate::Precision;
use crate::cpu::buffers::Buffers;
use crate::cpu::elements::Elements;
use crate::cpu::nearest::{nearest, statistics};
use crate::cpu::weight_gradient::{column_sums, weight_gradient};

#[test]
fn an_empty_batch_gives_nothing_and_no_gradient() {
    // Direct, by minimal filtering, and for few channels.
    for (channels, kernel, stride) in
        [((5, 7), 3, 1), ((16, 32), 3, 1), ((32, 16), 4, 2), ((3, 16), 4, 2)]
    {
        for precision in [Precision::F32, Precision::Bf16] {
            let steps = (stride, 1, 1);
            let g = geometry((0, 8, 8), channels, (kernel, kernel), steps, precision).unwrap();
            let weight = vec![1.; g.weight_len()];
            on_every_cpu_with(precision, |cpu| {
                let (none, buffers) = (Elements::F32(&[]), Buffers::default());
                let finish = Finish::default;
                let to = Output::F32(&mut []);
                large_to_small(&g, none, true, &weight, finish(), &buffers, to);
                let to = Output::F32(&mut []);
                small_to_large(&g, none, true, &weight, finish(), &buffers, to);
                let mut gradient = vec![f32::NAN; weight.len()];
                weight_gradient(&g, (none, true), (none, false), &buffers, &mut gradient);
                assert!(gradient.iter().all(|v| *v == 0.), "{cpu} {g:?}");
                let mut gradient = vec![f32::NAN; channels.1];
                column_sums(none, channels.1, &mut gradient);
                assert!(gradient.iter().all(|v| *v == 0.), "{cpu} {g:?}");
            });
        }
    }
}

#[test]
fn no_vectors_choose_no_codes() {
    assert_eq!(nearest(&[], &[1., 2.], 2), Ok(Vec::new()));
    assert_eq!(statistics(&[], &[], 2, 3), (vec![0.; 3], vec![0.; 6]));
}

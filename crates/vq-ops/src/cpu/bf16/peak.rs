//! What the products of bfloat16 reach when nothing else is in their way.

use std::time::Instant;

use super::kernels::{Kernels, PANEL, Product, kernels};
use super::{LINE, words};

/// Pairs of a product: a panel and the rows of a tile stay in the first-level cache.
const PAIRS: usize = 6 * LINE;
/// Products in a measured piece.
const PRODUCTS: usize = 20_000;

/// Operations (two per multiply-add) per second on all threads.
pub(crate) fn operations_per_second() -> f64 {
    let kernels = kernels();
    // Once for the clock speed to settle.
    rayon::broadcast(|_| products(kernels));
    let start = Instant::now();
    let threads = rayon::broadcast(|_| products(kernels)).len();
    let operations = 2. * (2 * PAIRS * PANEL * kernels.rows) as f64;
    operations * (PRODUCTS * threads) as f64 / start.elapsed().as_secs_f64()
}

fn products(kernels: &Kernels) {
    let (rows, a_step) = (kernels.rows, PAIRS + LINE);
    let lengths = [rows * a_step, PAIRS * PANEL, rows * PANEL];
    let mut memory = lengths.map(|length| vec![0f32; length + LINE]);
    let [a, b, c] = &mut memory;
    let (a, b, c) = (words(a, lengths[0]), words(b, lengths[1]), words(c, lengths[2]));
    // Ones, two in a word.
    a.fill(0x3F80_3F80);
    b.fill(0x3F80_3F80);
    let job = Product {
        rows,
        pairs: PAIRS,
        a: a.as_ptr(),
        a_step,
        b: b.as_ptr(),
        c: c.as_mut_ptr().cast(),
        c_step: PANEL,
        accumulate: false,
    };
    // SAFETY: the kernels fit this CPU; `a` holds so many rows of so many pairs, `b` a panel of them, and `c`
    // a panel's columns of every row.
    #[allow(unsafe_code)]
    unsafe {
        (kernels.enter)();
        for _ in 0..PRODUCTS {
            (kernels.product)(&job);
        }
        (kernels.leave)();
    }
    std::hint::black_box(c);
}

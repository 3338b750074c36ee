//! AdamW in one pass over memory.

use rayon::prelude::*;

use crate::AdamWStep;

/// Elements that a task works on.
const CHUNK: usize = 1 << 14;

/// See [`crate::adamw_steps`]; `keep` is the share of the parameters that decay leaves. All slices have the same length.
pub(crate) fn adamw(
    param: &mut [f32],
    grad: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    ema: Option<&mut [f32]>,
    step: &AdamWStep,
    keep: f64,
) {
    let update = Update::new(step, keep);
    let chunks = param
        .par_chunks_mut(CHUNK)
        .zip(grad.par_chunks(CHUNK))
        .zip(first_moment.par_chunks_mut(CHUNK))
        .zip(second_moment.par_chunks_mut(CHUNK));
    match (ema, step.ema_decay) {
        (Some(ema), Some(decay)) => {
            let keep = (1. - decay) as f32;
            chunks.zip(ema.par_chunks_mut(CHUNK)).for_each(|((((p, g), m), v), ema)| {
                update.run(p, g, m, v);
                for (ema, p) in ema.iter_mut().zip(p) {
                    *ema += keep * (*p - *ema);
                }
            });
        }
        _ => chunks.for_each(|(((p, g), m), v)| update.run(p, g, m, v)),
    }
}

/// The step's numbers, folded into what an element needs.
struct Update {
    grad_scale: f32,
    /// 1 − β₁, taken before the rounding: at β = 0.999 that of the rounded β is off by 10⁻⁵ of it.
    rest1: f32,
    beta2: f32,
    /// 1 − β₂, as `rest1`.
    rest2: f32,
    rate: f32,
    root: f32,
    eps: f32,
    keep: f32,
}

impl Update {
    fn new(step: &AdamWStep, keep: f64) -> Self {
        let correction1 = 1. - step.beta1.powf(step.step as f64);
        let correction2 = 1. - step.beta2.powf(step.step as f64);
        Self {
            grad_scale: step.grad_scale as f32,
            rest1: (1. - step.beta1) as f32,
            beta2: step.beta2 as f32,
            rest2: (1. - step.beta2) as f32,
            rate: (step.lr / correction1) as f32,
            root: (1. / correction2.sqrt()) as f32,
            eps: step.eps as f32,
            keep: keep as f32,
        }
    }

    fn run(&self, param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(first).zip(second) {
            let g = g * self.grad_scale;
            *m += self.rest1 * (g - *m);
            *v = self.beta2 * *v + self.rest2 * g * g;
            *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
        }
    }
}

/// Sum of squares in f64: fixed chunks, added in order.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    let parts: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| chunk.iter().map(|v| f64::from(*v) * f64::from(*v)).sum())
        .collect();
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 12.9898 + seed).sin()).collect()
    }

    /// Several chunks, the last one short, against the definition in f64.
    #[test]
    fn a_step_over_several_chunks_equals_the_definition() {
        const COUNT: usize = 2 * CHUNK + 77;
        let step = AdamWStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 1,
            grad_scale: 0.5,
            ema_decay: Some(0.9999),
        };
        let keep = 1. - step.lr * step.weight_decay;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let [mut p, mut m, mut ema] = [1., 3., 4.].map(|seed| noise(COUNT, seed));
            let (g, mut v) = (noise(COUNT, 2.), vec![0.; COUNT]);
            pool.install(|| adamw(&mut p, &g, &mut m, &mut v, Some(&mut ema), &step, keep));
            [p, m, v, ema]
        };
        let found = run(2);
        assert!(found == run(1) && found == run(3));
        let [p, g, m, ema] = [1., 2., 3., 4.].map(|seed| noise(COUNT, seed));
        for i in 0..COUNT {
            let [p, g, m, ema] = [p[i], g[i], m[i], ema[i]].map(f64::from);
            let g = g * step.grad_scale;
            let m = step.beta1 * m + (1. - step.beta1) * g;
            let v = (1. - step.beta2) * g * g;
            let root = (v / (1. - step.beta2)).sqrt() + step.eps;
            let p = p * keep - step.lr * m / (1. - step.beta1) / root;
            let ema = ema + (1. - 0.9999) * (p - ema);
            let sizes = [p.abs().max(1.), 1., v, 1.];
            for ((found, expected), size) in found.iter().zip([p, m, v, ema]).zip(sizes) {
                let error = (f64::from(found[i]) - expected).abs();
                // Some roundings; 1 − 0.999 of rounded numbers would be off by 10⁻⁵ of v.
                assert!(error <= 1e-6 * size, "{i}: {} {expected}", found[i]);
            }
        }
    }

    #[test]
    fn a_sum_of_squares_over_several_chunks() {
        let values = noise(3 * CHUNK + 5, 1.);
        let expected: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((sum_of_squares(&values) / expected - 1.).abs() < 1e-12);
    }
}

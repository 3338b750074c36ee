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
            let keep = 1. - decay as f32;
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
    beta1: f32,
    beta2: f32,
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
            beta1: step.beta1 as f32,
            beta2: step.beta2 as f32,
            rate: (step.lr / correction1) as f32,
            root: (1. / correction2.sqrt()) as f32,
            eps: step.eps as f32,
            keep: keep as f32,
        }
    }

    fn run(&self, param: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(first).zip(second) {
            let g = g * self.grad_scale;
            *m += (1. - self.beta1) * (g - *m);
            *v = self.beta2 * *v + (1. - self.beta2) * g * g;
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

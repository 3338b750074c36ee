//! `SwiGLU` in one pass each way on the CPU.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::math::{exp, sigmoid, vectorized};
use crate::storage::{f32_elements, f32_slice};

/// silu(a) ⊙ b of the two halves (a, b) of `x` along the channels (Shazeer 2020, eq. 5, without the
/// matrices). `x` `[…, 2C]` → `[…, C]`. Differentiable.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    if channels == 0 || !channels.is_multiple_of(2) {
        bail!("swiglu halves the channels, got {:?}", x.dims());
    }
    if on_cpu(x.device()) { x.contiguous()?.apply_op1(SwiGlu) } else { composed_swiglu(x) }
}

fn composed_swiglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    halves[0].silu()?.mul(&halves[1])
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "vq-swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_elements(x, layout)?;
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut() else { bail!("swiglu takes […, 2C]") };
        *last /= 2;
        let half = *last;
        let mut y = vec![0f32; x.len() / 2];
        let rows = rows_of_a_task(half);
        y.par_chunks_mut(rows * half).zip(x.par_chunks(2 * rows * half)).for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(2 * half)) {
                        swiglu_row(x, y);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let half = x.dim(D::Minus1)? / 2;
        let grad = grad.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        let rows = rows_of_a_task(half);
        f32_slice(x, |x| {
            f32_slice(&grad, |grad| {
                let tasks = dx
                    .par_chunks_mut(2 * rows * half)
                    .zip(x.par_chunks(2 * rows * half))
                    .zip(grad.par_chunks(rows * half));
                tasks.for_each(|((dx, x), grad)| {
                    vectorized(
                        #[inline(always)]
                        || {
                            let rows = dx.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                            for ((dx, x), grad) in rows.zip(grad.chunks_exact(half)) {
                                swiglu_row_gradient(x, grad, dx);
                            }
                        },
                    );
                });
            })
        })??;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// A row `[2C]` to `[C]`.
#[inline(always)]
pub(crate) fn swiglu_row(x: &[f32], y: &mut [f32]) {
    let (a, b) = x.split_at(y.len());
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = a / (1.0 + exp(-a)) * b;
    }
}

/// The gradient of [`swiglu_row`].
#[inline(always)]
pub(crate) fn swiglu_row_gradient(x: &[f32], grad: &[f32], dx: &mut [f32]) {
    let (a, b) = x.split_at(grad.len());
    let (da, db) = dx.split_at_mut(grad.len());
    for (((a, b), grad), (da, db)) in a.iter().zip(b).zip(grad).zip(da.iter_mut().zip(db)) {
        let s = sigmoid(*a);
        *da = grad * b * s * (1.0 + a * (1.0 - s));
        *db = grad * a * s;
    }
}

/// Rows that a task takes: by shape alone.
fn rows_of_a_task(half: usize) -> usize {
    (1usize << 14).div_ceil(half.max(1))
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn random(start: f32, dims: &[usize]) -> Var {
        let n = dims.iter().product();
        let values = (0..n).map(|i| 2.0 * (i as f32 * 12.9898 + start).sin()).collect();
        Var::from_vec(values, dims, &crate::test_device()).unwrap()
    }

    #[test]
    fn it_agrees_with_candles_operations() {
        for dims in [[3, 5, 6], [2, 700, 66]] {
            let x = random(3.0, &dims);
            let run = |y: Tensor| {
                let weights = random(7.0, y.dims()).as_detached_tensor();
                let loss = (&y * weights).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                [values(&y), values(gradients.get(&x).unwrap())]
            };
            let (ours, theirs) = (run(swiglu(&x).unwrap()), run(composed_swiglu(&x).unwrap()));
            for (a, b) in ours.iter().flatten().zip(theirs.iter().flatten()) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
        assert!(swiglu(&random(0.0, &[2, 3, 3])).is_err());
    }
}

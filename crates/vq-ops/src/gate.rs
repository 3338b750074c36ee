//! Gated activations in one pass each way on the CPU.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::math::{exp, sigmoid, tanh, vectorized};
use crate::storage::{f32_elements, f32_slice};

/// tanh(a) ⊙ σ(b) of (a, b) = the two halves of `x` + `per_image` along the channels: the gated
/// activation with a conditioning vector (van den Oord et al. 2016b, eq. 2 and 4).
///
/// `x` `[B, …, 2C]`, `per_image` `[B, 2C]`, or `[1, 2C]` for all → `[B, …, C]`. Differentiable in both.
pub fn gate(x: &Tensor, per_image: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::new(x.dims(), per_image.dims())?;
    if x.device().is_cpu() {
        x.contiguous()?.apply_op2(&per_image.contiguous()?, Gate(sizes))
    } else {
        composed_gate(x, per_image)
    }
}

/// silu(a) ⊙ b of the two halves (a, b) of `x` along the channels (Shazeer 2020, eq. 5, without the
/// matrices). `x` `[…, 2C]` → `[…, C]`. Differentiable.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    if channels == 0 || !channels.is_multiple_of(2) {
        bail!("swiglu halves the channels, got {:?}", x.dims());
    }
    if x.device().is_cpu() { x.contiguous()?.apply_op1(SwiGlu) } else { composed_swiglu(x) }
}

fn composed_gate(x: &Tensor, per_image: &Tensor) -> Result<Tensor> {
    let (rows, channels) = per_image.dims2()?;
    let mut dims = vec![1; x.rank()];
    dims[0] = rows;
    dims[x.rank() - 1] = channels;
    let x = x.broadcast_add(&per_image.reshape(dims)?)?;
    let halves = x.chunk(2, D::Minus1)?;
    let sigmoid = (halves[1].neg()?.exp()? + 1.)?.recip()?;
    halves[0].tanh()?.mul(&sigmoid)
}

fn composed_swiglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    halves[0].silu()?.mul(&halves[1])
}

/// The sizes of a gate's operands.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    /// Rows of channels in an image.
    rows: usize,
    /// Channels of the output.
    half: usize,
    /// Whether each image has its own vector.
    own: bool,
}

impl Sizes {
    fn new(x: &[usize], per_image: &[usize]) -> Result<Self> {
        let (Some((&channels, rest)), &[vectors, width]) = (x.split_last(), per_image) else {
            bail!("gate takes [B, …, 2C] and [B, 2C], got {x:?} and {per_image:?}");
        };
        let Some((&batch, rows)) = rest.split_first() else {
            bail!("gate takes [B, …, 2C], got {x:?}");
        };
        let fits = width == channels && (vectors == 1 || vectors == batch);
        if !fits || channels == 0 || !channels.is_multiple_of(2) {
            bail!("gate takes [B, …, 2C] and [B or 1, 2C], got {x:?} and {per_image:?}");
        }
        let rows = rows.iter().product();
        Ok(Self { batch, rows, half: channels / 2, own: vectors == batch })
    }

    fn vector<'a>(&self, vectors: &'a [f32], image: usize) -> (&'a [f32], &'a [f32]) {
        let first = if self.own { image * 2 * self.half } else { 0 };
        vectors[first..first + 2 * self.half].split_at(self.half)
    }
}

struct Gate(Sizes);
struct SwiGlu;

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "vq-gate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        per_image: &CpuStorage,
        per_image_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, vectors) = (f32_elements(x, x_layout)?, f32_elements(per_image, per_image_layout)?);
        let sizes = self.0;
        let half = sizes.half;
        let mut y = vec![0f32; x.len() / 2];
        let size = (sizes.rows * half).max(1);
        let images = y.par_chunks_mut(size).zip(x.par_chunks(2 * size)).enumerate();
        images.for_each(|(image, (y, x))| {
            let (s_a, s_b) = sizes.vector(vectors, image);
            vectorized(|| {
                for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(2 * half)) {
                    gate_row(x, s_a, s_b, y);
                }
            });
        });
        let mut dims = x_layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = half;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        per_image: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = self.0;
        let half = sizes.half;
        let grad = grad.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        // One sum per image; added up in order where all share a vector.
        let mut sums = vec![0f32; sizes.batch * 2 * half];
        let size = (sizes.rows * half).max(1);
        f32_slice(x, |x| {
            f32_slice(per_image, |vectors| {
                f32_slice(&grad, |grad| {
                    let images = dx
                        .par_chunks_mut(2 * size)
                        .zip(sums.par_chunks_mut(2 * half))
                        .zip(x.par_chunks(2 * size))
                        .zip(grad.par_chunks(size))
                        .enumerate();
                    images.for_each(|(image, (((dx, sums), x), grad))| {
                        let s = sizes.vector(vectors, image);
                        vectorized(|| {
                            let rows = dx.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                            for ((dx, x), grad) in rows.zip(grad.chunks_exact(half)) {
                                gate_row_gradient(x, s, grad, dx);
                                for (sum, dx) in sums.iter_mut().zip(dx) {
                                    *sum += *dx;
                                }
                            }
                        });
                    });
                })
            })
        })???;
        let of_vectors = if per_image.track_op() {
            let sums = Tensor::from_vec(sums, (sizes.batch, 2 * half), x.device())?;
            Some(if sizes.own { sums } else { sums.sum_keepdim(0)? })
        } else {
            None
        };
        let of_x =
            if x.track_op() { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        Ok((of_x, of_vectors))
    }
}

#[inline(always)]
fn gate_row(x: &[f32], s_a: &[f32], s_b: &[f32], y: &mut [f32]) {
    let (a, b) = x.split_at(y.len());
    for ((((y, a), b), s_a), s_b) in y.iter_mut().zip(a).zip(b).zip(s_a).zip(s_b) {
        *y = tanh(a + s_a) * sigmoid(b + s_b);
    }
}

#[inline(always)]
fn gate_row_gradient(x: &[f32], (s_a, s_b): (&[f32], &[f32]), grad: &[f32], dx: &mut [f32]) {
    let (a, b) = x.split_at(grad.len());
    let (da, db) = dx.split_at_mut(grad.len());
    let inputs = a.iter().zip(b).zip(s_a).zip(s_b).zip(grad);
    for (((((a, b), s_a), s_b), grad), (da, db)) in inputs.zip(da.iter_mut().zip(db)) {
        let (t, s) = (tanh(a + s_a), sigmoid(b + s_b));
        *da = grad * s * (1.0 - t * t);
        *db = grad * t * s * (1.0 - s);
    }
}

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
            vectorized(|| {
                for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(2 * half)) {
                    let (a, b) = x.split_at(half);
                    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                        *y = a / (1.0 + exp(-a)) * b;
                    }
                }
            });
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
                    vectorized(|| {
                        let rows = dx.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                        for ((dx, x), grad) in rows.zip(grad.chunks_exact(half)) {
                            swiglu_row_gradient(x, grad, dx);
                        }
                    });
                });
            })
        })??;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

#[inline(always)]
fn swiglu_row_gradient(x: &[f32], grad: &[f32], dx: &mut [f32]) {
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
    use candle_core::{Device, Var};

    use super::*;

    fn random(start: f32, dims: &[usize]) -> Var {
        let n = dims.iter().product();
        let values = (0..n).map(|i| 2.0 * (i as f32 * 12.9898 + start).sin()).collect();
        Var::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn check(ours: &Tensor, composed: &Tensor, vars: &[&Var]) {
        assert_eq!(ours.dims(), composed.dims());
        let weights = random(7.0, ours.dims());
        let gradients = |y: &Tensor| {
            let y = (y * weights.as_detached_tensor()).unwrap();
            y.sum_all().unwrap().backward().unwrap()
        };
        let (mut pairs, ours_by, theirs_by) =
            (vec![(values(ours), values(composed))], gradients(ours), gradients(composed));
        for var in vars {
            pairs.push((values(ours_by.get(var).unwrap()), values(theirs_by.get(var).unwrap())));
        }
        for (ours, theirs) in pairs {
            let scale = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() < 3e-6 * scale, "{a} {b}");
            }
        }
    }

    #[test]
    fn gates_agree_with_candles_operations() {
        for (dims, vectors) in [([3, 2, 5, 6], 3), ([2, 4, 4, 34], 1), ([1, 1, 1, 2], 1)] {
            let (x, s) = (random(1.0, &dims), random(2.0, &[vectors, dims[3]]));
            check(&gate(&x, &s).unwrap(), &composed_gate(&x, &s).unwrap(), &[&x, &s]);
        }
    }

    #[test]
    fn swiglu_agrees_with_candles_operations() {
        for dims in [[3, 5, 6], [2, 700, 66]] {
            let x = random(3.0, &dims);
            check(&swiglu(&x).unwrap(), &composed_swiglu(&x).unwrap(), &[&x]);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = random(0.0, &[2, 3, 3]);
        assert!(swiglu(&x).is_err() && gate(&x, &random(0.0, &[2, 3])).is_err());
        let x = random(0.0, &[2, 3, 4]);
        assert!(gate(&x, &random(0.0, &[3, 4])).is_err());
        assert!(gate(&x, &random(0.0, &[2, 2])).is_err());
    }
}

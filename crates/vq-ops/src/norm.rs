//! Root-mean-square normalisation in one pass each way on the CPU.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::math::{dot, vectorized};
use crate::storage::{f32_elements, f32_slice};

/// `x / √(mean(x²) + ε) ⊙ gain + shift` along the channels (Zhang & Sennrich 2019, eq. 4, with a gain
/// and a shift that may differ from image to image).
///
/// `x` `[B, …, C]`; `gain` and `shift` `[B, C]`, or `[1, C]` for all → the shape of `x`. Differentiable in
/// all three.
pub fn rms_norm(x: &Tensor, gain: &Tensor, shift: &Tensor, epsilon: f64) -> Result<Tensor> {
    let sizes = Sizes::new(x.dims(), gain.dims(), shift.dims())?;
    if on_cpu(x.device()) {
        let op = RmsNorm { sizes, epsilon: epsilon as f32 };
        x.contiguous()?.apply_op3(&gain.contiguous()?, &shift.contiguous()?, op)
    } else {
        composed(x, gain, shift, epsilon)
    }
}

fn composed(x: &Tensor, gain: &Tensor, shift: &Tensor, epsilon: f64) -> Result<Tensor> {
    let (rows, channels) = gain.dims2()?;
    let mut dims = vec![1; x.rank()];
    dims[0] = rows;
    dims[x.rank() - 1] = channels;
    let (gain, shift) = (gain.reshape(dims.as_slice())?, shift.reshape(dims)?);
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(&gain)?.broadcast_add(&shift)
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    /// Rows of channels in an image.
    rows: usize,
    channels: usize,
    /// Whether each image has its own gain and shift.
    own: bool,
}

impl Sizes {
    fn new(x: &[usize], gain: &[usize], shift: &[usize]) -> Result<Self> {
        let problem = || {
            candle_core::Error::Msg(format!(
                "rms_norm takes [B, …, C] and twice [B or 1, C], got {x:?}, {gain:?} and {shift:?}"
            ))
        };
        let (Some((&channels, rest)), &[vectors, width]) = (x.split_last(), gain) else {
            return Err(problem());
        };
        let Some((&batch, rows)) = rest.split_first() else { return Err(problem()) };
        let fits = width == channels && channels > 0 && (vectors == 1 || vectors == batch);
        if !fits || gain != shift {
            return Err(problem());
        }
        Ok(Self { batch, rows: rows.iter().product(), channels, own: vectors == batch })
    }

    fn vector<'a>(&self, vectors: &'a [f32], image: usize) -> &'a [f32] {
        let first = if self.own { image * self.channels } else { 0 };
        &vectors[first..first + self.channels]
    }
}

struct RmsNorm {
    sizes: Sizes,
    epsilon: f32,
}

/// 1 / √(mean(x²) + ε).
#[inline(always)]
pub(crate) fn norm_factor(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// The norm of a row.
#[inline(always)]
pub(crate) fn norm_row(x: &[f32], (gain, shift): (&[f32], &[f32]), epsilon: f32, y: &mut [f32]) {
    let factor = norm_factor(x, epsilon);
    for (((y, x), gain), shift) in y.iter_mut().zip(x).zip(gain).zip(shift) {
        *y = x * factor * gain + shift;
    }
}

impl CustomOp3 for RmsNorm {
    fn name(&self) -> &'static str {
        "vq-rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = f32_elements(x, x_layout)?;
        let (gains, shifts) =
            (f32_elements(gain, gain_layout)?, f32_elements(shift, shift_layout)?);
        let Sizes { rows, channels, .. } = self.sizes;
        let mut y = vec![0f32; x.len()];
        let size = (rows * channels).max(1);
        let images = y.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate();
        images.for_each(|(image, (y, x))| {
            let gain = self.sizes.vector(gains, image);
            let shift = self.sizes.vector(shifts, image);
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                        norm_row(x, (gain, shift), self.epsilon, y);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Sizes { batch, rows, channels, own } = self.sizes;
        let grad = grad.contiguous()?;
        let mut dx = vec![0f32; x.elem_count()];
        // Per image, gain then shift; added up in order where all share them.
        let mut sums = vec![0f32; batch * 2 * channels];
        let size = (rows * channels).max(1);
        f32_slice(x, |x| {
            f32_slice(gain, |gains| {
                f32_slice(&grad, |grad| {
                    let images = dx
                        .par_chunks_mut(size)
                        .zip(sums.par_chunks_mut(2 * channels))
                        .zip(x.par_chunks(size))
                        .zip(grad.par_chunks(size))
                        .enumerate();
                    images.for_each(|(image, (((dx, sums), x), grad))| {
                        let gain = self.sizes.vector(gains, image);
                        let (dgain, dshift) = sums.split_at_mut(channels);
                        vectorized(
                            #[inline(always)]
                            || {
                                let rows =
                                    dx.chunks_exact_mut(channels).zip(x.chunks_exact(channels));
                                for ((dx, x), grad) in rows.zip(grad.chunks_exact(channels)) {
                                    let sums = (&mut *dgain, &mut *dshift);
                                    norm_row_gradient(x, gain, self.epsilon, grad, dx, sums);
                                }
                            },
                        );
                    });
                })
            })
        })???;
        let sums = Tensor::from_vec(sums, (batch, 2 * channels), x.device())?;
        let sums = if own { sums } else { sums.sum_keepdim(0)? };
        let part = |wanted: bool, first| -> Result<Option<Tensor>> {
            if wanted { sums.narrow(1, first, channels)?.contiguous().map(Some) } else { Ok(None) }
        };
        let of_x =
            if x.track_op() { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        Ok((of_x, part(gain.track_op(), 0)?, part(shift.track_op(), channels)?))
    }
}

/// The gradients of a row's norm: of the row, and added to those of gain and shift. With x̂ = x·r and
/// h = grad ⊙ gain: dx = r·(h − x̂·mean(h ⊙ x̂)).
#[inline(always)]
pub(crate) fn norm_row_gradient(
    x: &[f32],
    gain: &[f32],
    epsilon: f32,
    grad: &[f32],
    dx: &mut [f32],
    (dgain, dshift): (&mut [f32], &mut [f32]),
) {
    let factor = norm_factor(x, epsilon);
    for ((dx, gain), g) in dx.iter_mut().zip(gain).zip(grad) {
        *dx = g * gain;
    }
    let mean = dot(dx, x) * factor * factor / x.len() as f32;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = factor * (*dx - x * mean);
    }
    for (((dgain, dshift), x), g) in dgain.iter_mut().zip(dshift).zip(x).zip(grad) {
        *dgain += g * x * factor;
        *dshift += g;
    }
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

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn it_agrees_with_candles_operations() {
        for (dims, vectors) in [([3, 5, 6], 3), ([2, 4, 34], 1), ([1, 1, 1], 1)] {
            let x = random(1.0, &dims);
            let (gain, shift) =
                (random(2.0, &[vectors, dims[2]]), random(3.0, &[vectors, dims[2]]));
            let weights = random(4.0, &dims).as_detached_tensor();
            let run = |f: fn(&Tensor, &Tensor, &Tensor, f64) -> Result<Tensor>| {
                let y = f(&x, &gain, &shift, 1e-3).unwrap();
                let loss = (&y * &weights).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let of = |var: &Var| values(gradients.get(var).unwrap());
                [values(&y), of(&x), of(&gain), of(&shift)]
            };
            for (ours, theirs) in run(rms_norm).iter().zip(&run(composed)) {
                let scale = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
                for (a, b) in ours.iter().zip(theirs) {
                    assert!((a - b).abs() < 3e-6 * scale, "{a} {b}");
                }
            }
        }
        let x = random(1.0, &[2, 3, 4]);
        assert!(rms_norm(&x, &random(0., &[3, 4]), &random(0., &[3, 4]), 0.).is_err());
        assert!(rms_norm(&x, &random(0., &[2, 4]), &random(0., &[1, 4]), 0.).is_err());
    }
}

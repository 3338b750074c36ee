//! The gated activation in one pass each way on the CPU.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::math::{sigmoid, tanh, vectorized};
use crate::storage::{f32_elements, f32_slice};

/// tanh(a) ⊙ σ(b) of (a, b) = the two halves of `x` + `per_image` along the channels: the gated
/// activation with a conditioning vector (van den Oord et al. 2016b, eq. 2 and 4).
///
/// `x` `[B, …, 2C]`, `per_image` `[B, 2C]`, or `[1, 2C]` for all → `[B, …, C]`. Differentiable in both.
pub fn gate(x: &Tensor, per_image: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::new(x.dims(), per_image.dims())?;
    if on_cpu(x.device()) {
        x.contiguous()?.apply_op2(&per_image.contiguous()?, Gate(sizes))
    } else {
        composed_gate(x, per_image)
    }
}

/// [`gate`] of `x` + `y`, which have the same shape, without a pass for their sum. Differentiable in all
/// three.
pub fn gate_sum(x: &Tensor, y: &Tensor, per_image: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::new(x.dims(), per_image.dims())?;
    if x.dims() != y.dims() {
        bail!("gate_sum takes two tensors of one shape, got {:?} and {:?}", x.dims(), y.dims());
    }
    if on_cpu(x.device()) {
        x.contiguous()?.apply_op3(&y.contiguous()?, &per_image.contiguous()?, GateSum(sizes))
    } else {
        composed_gate(&(x + y)?, per_image)
    }
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
struct GateSum(Sizes);

impl Sizes {
    /// The gate of `x`, or of `x` + `y`.
    fn forward(&self, x: &[f32], y: Option<&[f32]>, vectors: &[f32]) -> Vec<f32> {
        let half = self.half;
        let mut out = vec![0f32; x.len() / 2];
        let size = (self.rows * half).max(1);
        let images = out.par_chunks_mut(size).zip(x.par_chunks(2 * size)).enumerate();
        images.for_each(|(image, (out, x))| {
            let (s_a, s_b) = self.vector(vectors, image);
            let y = y.map(|y| &y[image * 2 * size..][..x.len()]);
            let mut sum = vec![0f32; 2 * half];
            vectorized(
                #[inline(always)]
                || {
                    for (row, out) in out.chunks_exact_mut(half).enumerate() {
                        gate_row(self.row(x, y, row, &mut sum), s_a, s_b, out);
                    }
                },
            );
        });
        out
    }

    /// The gradients of `x` (and `y`) and, per image, of the vector that was added.
    fn backward(
        &self,
        x: &[f32],
        y: Option<&[f32]>,
        vectors: &[f32],
        grad: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let half = self.half;
        let mut dx = vec![0f32; x.len()];
        let mut sums = vec![0f32; self.batch * 2 * half];
        let size = (self.rows * half).max(1);
        let images = dx
            .par_chunks_mut(2 * size)
            .zip(sums.par_chunks_mut(2 * half))
            .zip(x.par_chunks(2 * size))
            .zip(grad.par_chunks(size))
            .enumerate();
        images.for_each(|(image, (((dx, sums), x), grad))| {
            let s = self.vector(vectors, image);
            let y = y.map(|y| &y[image * 2 * size..][..x.len()]);
            let mut sum = vec![0f32; 2 * half];
            vectorized(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(2 * half).zip(grad.chunks_exact(half));
                    for (row, (dx, grad)) in rows.enumerate() {
                        gate_row_gradient(self.row(x, y, row, &mut sum), s, grad, dx);
                        for (sum, dx) in sums.iter_mut().zip(dx) {
                            *sum += *dx;
                        }
                    }
                },
            );
        });
        (dx, sums)
    }

    /// A row of `x`, or of `x` + `y` in `sum`.
    #[inline(always)]
    fn row<'a>(
        &self,
        x: &'a [f32],
        y: Option<&[f32]>,
        row: usize,
        sum: &'a mut [f32],
    ) -> &'a [f32] {
        let width = 2 * self.half;
        let x = &x[row * width..(row + 1) * width];
        let Some(y) = y else { return x };
        for ((sum, x), y) in sum.iter_mut().zip(x).zip(&y[row * width..(row + 1) * width]) {
            *sum = x + y;
        }
        sum
    }

    /// What came out of [`Sizes::backward`], as tensors.
    fn gradients(
        &self,
        (dx, sums): (Vec<f32>, Vec<f32>),
        x: &Tensor,
        per_image: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let of_vectors = if per_image.track_op() {
            let sums = Tensor::from_vec(sums, (self.batch, 2 * self.half), x.device())?;
            // Added up in order where all images share a vector.
            Some(if self.own { sums } else { sums.sum_keepdim(0)? })
        } else {
            None
        };
        Ok((Tensor::from_vec(dx, x.shape(), x.device())?, of_vectors))
    }

    fn output_shape(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.half;
        }
        dims.into()
    }
}

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
        let vectors = f32_elements(per_image, per_image_layout)?;
        let out = self.0.forward(f32_elements(x, x_layout)?, None, vectors);
        Ok((CpuStorage::F32(out), self.0.output_shape(x_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        per_image: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let gradients = f32_slice(x, |x| {
            f32_slice(per_image, |vectors| {
                f32_slice(&grad, |grad| self.0.backward(x, None, vectors, grad))
            })
        })???;
        let (of_x, of_vectors) = self.0.gradients(gradients, x, per_image)?;
        Ok((x.track_op().then_some(of_x), of_vectors))
    }
}

impl CustomOp3 for GateSum {
    fn name(&self) -> &'static str {
        "vq-gate-sum"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
        per_image: &CpuStorage,
        per_image_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (f32_elements(x, x_layout)?, f32_elements(y, y_layout)?);
        let out = self.0.forward(x, Some(y), f32_elements(per_image, per_image_layout)?);
        Ok((CpuStorage::F32(out), self.0.output_shape(x_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        per_image: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let gradients = f32_slice(x, |x| {
            f32_slice(y, |y| {
                f32_slice(per_image, |vectors| {
                    f32_slice(&grad, |grad| self.0.backward(x, Some(y), vectors, grad))
                })
            })
        })????;
        let (of_sum, of_vectors) = self.0.gradients(gradients, x, per_image)?;
        let of_x = x.track_op().then(|| of_sum.clone());
        Ok((of_x, y.track_op().then_some(of_sum), of_vectors))
    }
}

/// The gate of a row `x` `[2C]` and the vector that is added to it.
#[inline(always)]
pub(crate) fn gate_row(x: &[f32], s_a: &[f32], s_b: &[f32], y: &mut [f32]) {
    let (a, b) = x.split_at(y.len());
    for ((((y, a), b), s_a), s_b) in y.iter_mut().zip(a).zip(b).zip(s_a).zip(s_b) {
        *y = tanh(a + s_a) * sigmoid(b + s_b);
    }
}

/// The gradient of [`gate_row`] by `x`.
#[inline(always)]
pub(crate) fn gate_row_gradient(
    x: &[f32],
    (s_a, s_b): (&[f32], &[f32]),
    grad: &[f32],
    dx: &mut [f32],
) {
    let (a, b) = x.split_at(grad.len());
    let (da, db) = dx.split_at_mut(grad.len());
    let inputs = a.iter().zip(b).zip(s_a).zip(s_b).zip(grad);
    for (((((a, b), s_a), s_b), grad), (da, db)) in inputs.zip(da.iter_mut().zip(db)) {
        let (t, s) = (tanh(a + s_a), sigmoid(b + s_b));
        *da = grad * s * (1.0 - t * t);
        *db = grad * t * s * (1.0 - s);
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
            let y = random(5.0, &dims);
            let composed = composed_gate(&(x.as_tensor() + y.as_tensor()).unwrap(), &s).unwrap();
            check(&gate_sum(&x, &y, &s).unwrap(), &composed, &[&x, &y, &s]);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = random(0.0, &[2, 3, 3]);
        assert!(gate(&x, &random(0.0, &[2, 3])).is_err());
        let x = random(0.0, &[2, 3, 4]);
        assert!(gate(&x, &random(0.0, &[3, 4])).is_err());
        assert!(gate(&x, &random(0.0, &[2, 2])).is_err());
        assert!(gate_sum(&x, &random(0.0, &[2, 4]), &random(0.0, &[2, 4])).is_err());
    }
}

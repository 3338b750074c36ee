//! The product with a transposed matrix, whose gradients come out contiguous.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

use crate::dispatch::on_cpu;

/// a bᵀ of every pair of matrices: `a` `[B, n, T, D]`, `b` `[B, n, S, D]` → `[B, n, T, S]`. Differentiable.
///
/// candle's gradient of a transposed operand is itself transposed, and adding it up is slow.
pub fn matmul_transposed(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if on_cpu(a.device()) {
        a.contiguous()?.apply_op2(&b.contiguous()?, MatmulTransposed)
    } else {
        a.matmul(&b.t()?)
    }
}

struct MatmulTransposed;

impl CustomOp2 for MatmulTransposed {
    fn name(&self) -> &'static str {
        "vq-matmul-transposed"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, heads, rows, depth) = a_layout.shape().dims4()?;
        let (other_batch, other_heads, columns, other_depth) = b_layout.shape().dims4()?;
        if (batch, heads, depth) != (other_batch, other_heads, other_depth) {
            bail!("{:?} and {:?} do not fit", a_layout.shape(), b_layout.shape());
        }
        let sizes = (batch * heads, rows, columns, depth);
        let product = a.matmul(b, sizes, a_layout, &b_layout.transpose(2, 3)?)?;
        Ok((product, (batch, heads, rows, columns).into()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_a = if a.track_op() { Some(grad.matmul(b)?) } else { None };
        let of_b = if b.track_op() {
            Some(grad.transpose(D::Minus2, D::Minus1)?.matmul(a)?)
        } else {
            None
        };
        Ok((of_a, of_b))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn values_and_gradients_agree_with_candles() {
        let random = |start: f32, dims: [usize; 4]| {
            let n = dims.iter().product();
            let values = (0..n).map(|i| (i as f32 * 12.9898 + start).sin()).collect();
            Var::from_vec(values, dims.as_slice(), &crate::test_device()).unwrap()
        };
        let (a, b) = (random(1.0, [2, 3, 4, 5]), random(2.0, [2, 3, 6, 5]));
        let weights = random(3.0, [2, 3, 4, 6]).as_detached_tensor();
        let run = |y: Tensor| {
            let loss = (&y * &weights).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let of = |var: &Var| values(gradients.get(var).unwrap());
            [values(&y), of(&a), of(&b)]
        };
        let ours = run(matmul_transposed(&a, &b).unwrap());
        let theirs = run(a.matmul(&b.t().unwrap()).unwrap());
        for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            assert!((ours - theirs).abs() < 1e-5);
        }
        assert!(matmul_transposed(&a, &random(0.0, [2, 3, 6, 4])).is_err());
    }
}

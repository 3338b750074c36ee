//! Between `[B, T, heads · D]` and `[B, heads, T, D]`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::storage::f32_elements;

/// `x` `[B, T, heads · D]` → `[B, heads, T, D]`, contiguous, in one pass each way. Differentiable.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, length, channels) = x.dims3()?;
    if heads == 0 || !channels.is_multiple_of(heads) {
        bail!("{channels} channels do not divide into {heads} heads");
    }
    if on_cpu(x.device()) {
        x.contiguous()?.apply_op1(Split { heads })
    } else {
        x.reshape((batch, length, heads, channels / heads))?.transpose(1, 2)?.contiguous()
    }
}

/// `x` `[B, heads, T, D]` → `[B, T, heads · D]`, contiguous, in one pass each way. Differentiable.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, length, size) = x.dims4()?;
    if on_cpu(x.device()) {
        x.contiguous()?.apply_op1(Merge)
    } else {
        x.transpose(1, 2)?.contiguous()?.reshape((batch, length, heads * size))
    }
}

struct Split {
    heads: usize,
}
struct Merge;

impl CustomOp1 for Split {
    fn name(&self) -> &'static str {
        "vq-split-heads"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, length, channels) = layout.shape().dims3()?;
        let (heads, size) = (self.heads, channels / self.heads);
        let shape = (batch, heads, length, size).into();
        Ok((CpuStorage::F32(swap(f32_elements(x, layout)?, length, heads, size)), shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        merge_heads(grad).map(Some)
    }
}

impl CustomOp1 for Merge {
    fn name(&self) -> &'static str {
        "vq-merge-heads"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, heads, length, size) = layout.shape().dims4()?;
        let shape = (batch, length, heads * size).into();
        Ok((CpuStorage::F32(swap(f32_elements(x, layout)?, heads, length, size)), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        split_heads(grad, x.dim(1)?).map(Some)
    }
}

/// `[…, a, b, size]` → `[…, b, a, size]`.
fn swap(from: &[f32], a: usize, b: usize, size: usize) -> Vec<f32> {
    let mut to = vec![0f32; from.len()];
    let image = (a * b * size).max(1);
    to.par_chunks_mut(image).zip(from.par_chunks(image)).for_each(|(to, from)| {
        for (j, to) in to.chunks_mut(a * size).enumerate() {
            for (i, to) in to.chunks_mut(size).enumerate() {
                let first = (i * b + j) * size;
                to.copy_from_slice(&from[first..first + size]);
            }
        }
    });
    to
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn splitting_agrees_with_candles_transposition_and_merging_undoes_it() {
        let (b, t, heads, size) = (2, 5, 3, 4);
        let n = (b * t * heads * size) as f32;
        let x =
            Tensor::arange(0f32, n, &crate::test_device()).unwrap().reshape((b, t, heads * size));
        let x = Var::from_tensor(&x.unwrap()).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let split = split_heads(&x, heads).unwrap();
        let theirs = x.reshape((b, t, heads, size)).unwrap().transpose(1, 2).unwrap();
        assert_eq!(split.dims(), theirs.dims());
        assert_eq!(values(&split), values(&theirs));
        let merged = merge_heads(&split).unwrap();
        assert_eq!(values(&merged), values(&x));
        let weighted = (merged * x.as_detached_tensor()).unwrap();
        let gradients = weighted.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(gradients.get(&x).unwrap()), values(&x));
        assert!(split_heads(&x, 5).is_err());
    }
}

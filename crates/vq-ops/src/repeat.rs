//! Nearest-neighbour upsampling, channels-last.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

use crate::dispatch::{on_cpu, on_cuda};
use crate::storage::f32_elements;

/// `[B, h, w, C]` f32 to `[B, h·n, w·n, C]`: each pixel n × n times. Differentiable.
///
/// Not candle's `upsample_nearest2d`, which is channels-first and whose gradient overwrites what other uses of the
/// input have sent (candle 0.11.1, `backprop.rs`).
pub fn repeat_pixels(x: &Tensor, n: usize) -> Result<Tensor> {
    if x.dtype() == DType::F32 && (on_cpu(x.device()) || on_cuda(x.device())) {
        return x.contiguous()?.apply_op1(Repeat { times: n, back: false });
    }
    let (b, h, w, c) = x.dims4()?;
    let blocks = x.reshape((b, h, 1, w, 1, c))?.broadcast_as((b, h, n, w, n, c))?;
    blocks.contiguous()?.reshape((b, h * n, w * n, c))
}

/// The other way, without a gradient: `[B, h·n, w·n, C]` f32 to `[B, h, w, C]`, each pixel the sum of n × n.
pub(crate) fn add_pixels(x: &Tensor, n: usize) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Repeat { times: n, back: true })
}

/// Repeats pixels, or, the other way, adds them up.
struct Repeat {
    times: usize,
    back: bool,
}

impl CustomOp1 for Repeat {
    fn name(&self) -> &'static str {
        "vq-repeat-pixels"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let (values, n) = (f32_elements(x, layout)?, self.times);
        if self.back {
            let (h, w) = (h / n, w / n);
            let mut sums = vec![0f32; b * h * w * c];
            for (row, line) in values.chunks_exact((w * n * c).max(1)).enumerate() {
                let to = row / n * w * c;
                for (column, pixel) in line.chunks_exact(c).enumerate() {
                    let to = to + column / n * c;
                    sums[to..to + c].iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
                }
            }
            return Ok((CpuStorage::F32(sums), (b, h, w, c).into()));
        }
        let mut repeated = Vec::with_capacity(values.len() * n * n);
        for line in values.chunks_exact((w * c).max(1)) {
            for _ in 0..n {
                for pixel in line.chunks_exact(c) {
                    (0..n).for_each(|_| repeated.extend_from_slice(pixel));
                }
            }
        }
        Ok((CpuStorage::F32(repeated), (b, h * n, w * n, c).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (b, h, w, c) = layout.shape().dims4()?;
        let n = self.times;
        // The small size.
        let (h, w) = if self.back { (h / n, w / n) } else { (h, w) };
        let to = crate::cuda::joined::repeat_pixels(x, layout, [b, h, w, c], n, self.back)?;
        let shape = if self.back { (b, h, w, c) } else { (b, h * n, w * n, c) };
        Ok((to, shape.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1(Self { back: !self.back, ..*self }).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn pixels_are_repeated_and_their_gradients_added_up() -> Result<()> {
        let values: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Var::from_slice(&values, (2, 2, 3, 2), &crate::test_device())?;
        for n in [1, 2, 3] {
            let run = || -> Result<(Vec<f32>, Vec<f32>)> {
                let y = repeat_pixels(&x, n)?;
                let gradients = (&y * y.sqr()?)?.sum_all()?.backward()?;
                let gradient = gradients.get(&x).map(|g| g.flatten_all()?.to_vec1::<f32>());
                Ok((y.flatten_all()?.to_vec1()?, gradient.transpose()?.unwrap_or_default()))
            };
            let (ours, theirs) = (run()?, crate::composed::only(run)?);
            assert_eq!(ours.0, theirs.0);
            for (a, b) in ours.1.iter().zip(&theirs.1) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
        Ok(())
    }
}

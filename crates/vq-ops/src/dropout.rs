//! Dropout from a counter: the mask depends on a seed and each element's place alone.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dispatch::{on_cpu, on_cuda};
use crate::math::vectorized;
use crate::storage::f32_elements;

/// Sets each element to 0 with probability `p` in [0, 1) and divides the others by 1 − p (Srivastava et
/// al. 2014). Any shape. Which ones depends on `seed` and the element's place in the tensor; the gradient
/// goes the same way.
pub fn dropout(x: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout needs a probability of at least 0 and below 1, got {p}");
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    let mask = Mask::new(p, seed);
    if on_cpu(x.device()) || on_cuda(x.device()) {
        x.contiguous()?.apply_op1(mask)
    } else {
        let factors: Vec<f32> = (0..x.elem_count()).map(|i| mask.factor(i)).collect();
        x * Tensor::from_vec(factors, x.shape(), x.device())?
    }
}

/// Which elements of a tensor are dropped, and what the others are multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    /// Hashes below it are dropped.
    threshold: u32,
    scale: f32,
    seed: [u32; 2],
}

impl Mask {
    pub(crate) fn new(p: f64, seed: u64) -> Self {
        // Seeds that differ in one bit must differ in many.
        let mixed = (seed ^ (seed >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let seed = [mixed as u32, (mixed >> 32) as u32];
        let threshold = (p * f64::from(u32::MAX)) as u32;
        Self { threshold, scale: (1.0 / (1.0 - p)) as f32, seed }
    }

    #[inline(always)]
    fn factor(&self, index: usize) -> f32 {
        // MurmurHash3's finalizer, keyed before and in the middle.
        let mut hash = index as u32 ^ self.seed[0];
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ (hash >> 13) ^ self.seed[1]).wrapping_mul(0xc2b2_ae35);
        hash ^= hash >> 16;
        if hash < self.threshold { 0.0 } else { self.scale }
    }
}

impl Mask {
    /// Drops some of the elements from number `first` on.
    #[inline(always)]
    pub(crate) fn apply(&self, values: &mut [f32], first: usize) {
        for (i, value) in values.iter_mut().enumerate() {
            *value *= self.factor(first + i);
        }
    }
}

impl CustomOp1 for Mask {
    fn name(&self) -> &'static str {
        "vq-dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        const CHUNK: usize = 1 << 14;
        let x = f32_elements(x, layout)?;
        let mut y = vec![0f32; x.len()];
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(chunk, (y, x))| {
            vectorized(
                #[inline(always)]
                || {
                    for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                        *y = x * self.factor(chunk * CHUNK + i);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let numbers = (self.threshold, self.scale, self.seed);
        Ok((crate::cuda::training::dropout(x, layout, numbers)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn it_drops_the_given_share_keeps_the_mean_and_sends_the_gradient_the_same_way() {
        let n = 200_000;
        let x = Var::from_tensor(
            &Tensor::ones(n, candle_core::DType::F32, &crate::test_device()).unwrap(),
        );
        let x = x.unwrap();
        for p in [0.1, 0.5, 0.9] {
            let y = dropout(&x, p, 7).unwrap();
            let values = y.to_vec1::<f32>().unwrap();
            let dropped = values.iter().filter(|&&v| v.abs() < f32::EPSILON).count() as f64;
            // Five standard deviations of a binomial count.
            assert!((dropped - p * n as f64).abs() < 5.0 * (n as f64 * p * (1.0 - p)).sqrt());
            let gradients = y.sum_all().unwrap().backward().unwrap();
            assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap(), values);
            assert_eq!(dropout(&x, p, 7).unwrap().to_vec1::<f32>().unwrap(), values);
            let other = dropout(&x, p, 8).unwrap().to_vec1::<f32>().unwrap();
            let alike =
                values.iter().zip(&other).filter(|(a, b)| a.to_bits() == b.to_bits()).count()
                    as f64;
            let alike = alike / n as f64;
            assert!((alike - (p * p + (1.0 - p).powi(2))).abs() < 0.01, "{alike}");
        }
        assert!(dropout(&x, 1.0, 0).is_err());
    }
}

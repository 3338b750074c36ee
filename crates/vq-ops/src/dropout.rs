//! Dropout from a counter: the mask depends on a seed and each element's place alone.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::math::vectorized;
use crate::storage::f32_elements;

/// What decides which elements are dropped.
#[derive(Clone, Copy, Debug)]
pub enum DropSeed<'a> {
    /// This number.
    Known(u64),
    /// The sum, modulo 2⁶⁴, of a number that lies on the device, as [`DropSeed::to_device`] puts it there, and
    /// of a known one: so that a [recorded](crate::Recording) step can be repeated as another.
    OnDevice(&'a Tensor, u64),
}

impl DropSeed<'_> {
    /// A number as [`OnDevice`](Self::OnDevice) takes it: u32 `[2]`, its lower half first.
    pub fn to_device(number: u64, device: &Device) -> Result<Tensor> {
        Tensor::new(&[number as u32, (number >> 32) as u32], device)
    }

    /// The sum of this seed and a number, modulo 2⁶⁴: that of another place in the same step.
    #[must_use]
    pub fn plus(self, number: u64) -> Self {
        match self {
            Self::Known(seed) => Self::Known(seed.wrapping_add(number)),
            Self::OnDevice(there, known) => Self::OnDevice(there, known.wrapping_add(number)),
        }
    }

    /// The seed; waits for the device where it lies there.
    pub fn read(&self) -> Result<u64> {
        match self {
            Self::Known(seed) => Ok(*seed),
            Self::OnDevice(number, known) => match number.to_vec1::<u32>()?[..] {
                [low, high] => Ok((u64::from(low) | (u64::from(high) << 32)).wrapping_add(*known)),
                _ => bail!("a seed on a device is u32 [2], not {:?}", number.shape()),
            },
        }
    }
}

/// Sets each element to 0 with probability `p` in [0, 1) and divides the others by 1 − p (Srivastava et
/// al. 2014). Any shape. Which ones depends on `seed` and the element's place in the tensor; the gradient
/// goes the same way.
pub fn dropout(x: &Tensor, p: f64, seed: DropSeed<'_>) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout needs a probability of at least 0 and below 1, got {p}");
    }
    if p == 0.0 {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(x.device()) {
        return x.contiguous()?.apply_op1(crate::cuda::training::Dropout::new(p, seed)?);
    }
    let mask = Mask::new(p, seed.read()?);
    if on_cpu(x.device()) {
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

/// What hashes of dropped elements are below, and what the others are multiplied by.
pub(crate) fn threshold_and_scale(p: f64) -> (u32, f32) {
    ((p * f64::from(u32::MAX)) as u32, (1.0 / (1.0 - p)) as f32)
}

impl Mask {
    pub(crate) fn new(p: f64, seed: u64) -> Self {
        // As `training.cu` does it. Seeds that differ in one bit must differ in many.
        let mixed = (seed ^ (seed >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let seed = [mixed as u32, (mixed >> 32) as u32];
        let (threshold, scale) = threshold_and_scale(p);
        Self { threshold, scale, seed }
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
            let y = dropout(&x, p, DropSeed::Known(7)).unwrap();
            let values = y.to_vec1::<f32>().unwrap();
            let dropped = values.iter().filter(|&&v| v.abs() < f32::EPSILON).count() as f64;
            // Five standard deviations of a binomial count.
            assert!((dropped - p * n as f64).abs() < 5.0 * (n as f64 * p * (1.0 - p)).sqrt());
            let gradients = y.sum_all().unwrap().backward().unwrap();
            assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap(), values);
            assert_eq!(
                dropout(&x, p, DropSeed::Known(7)).unwrap().to_vec1::<f32>().unwrap(),
                values
            );
            let other = dropout(&x, p, DropSeed::Known(8)).unwrap().to_vec1::<f32>().unwrap();
            let alike =
                values.iter().zip(&other).filter(|(a, b)| a.to_bits() == b.to_bits()).count()
                    as f64;
            let alike = alike / n as f64;
            assert!((alike - (p * p + (1.0 - p).powi(2))).abs() < 0.01, "{alike}");
        }
        assert!(dropout(&x, 1.0, DropSeed::Known(0)).is_err());
    }

    #[test]
    fn a_seed_on_the_device_drops_what_the_same_number_does() {
        let device = crate::test_device();
        let x = Tensor::ones(3000, candle_core::DType::F32, &device).unwrap();
        let values = |seed: DropSeed<'_>| dropout(&x, 0.4, seed).unwrap().to_vec1::<f32>().unwrap();
        for (number, plus) in [(7u64, 0), (u64::MAX - 3, 9), (1 << 40, 0x9e37_79b9_7f4a_7c15)] {
            let there = DropSeed::to_device(number, &device).unwrap();
            let seed = DropSeed::OnDevice(&there, 0).plus(plus);
            assert_eq!(seed.read().unwrap(), number.wrapping_add(plus));
            assert_eq!(values(seed), values(DropSeed::Known(number).plus(plus)));
        }
        let there = DropSeed::to_device(7, &device).unwrap();
        let one = there.narrow(0, 0, 1).unwrap();
        assert!(dropout(&x, 0.4, DropSeed::OnDevice(&one, 0)).is_err());
    }
}

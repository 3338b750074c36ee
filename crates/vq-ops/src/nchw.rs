//! candle's convolutions, with gradients composed here.
//!
//! candle's own backward pass gives a transposed view as the kernel of a convolution, and on Metal a kernel that is
//! not contiguous is read as if it were (candle 0.11.1, `metal_backend/mod.rs`): every weight's gradient of a batch of
//! several images would silently be wrong. It also computes gradients that nobody asks for.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Result, Shape, Storage, Tensor, bail,
};

use crate::feature_map::cpu_storage;

/// How far the taps are apart, and which way it goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convolution {
    pub(crate) stride: usize,
    pub(crate) padding: usize,
    pub(crate) dilation: usize,
    /// None for a convolution; of a transposed one the rows and columns beside the least.
    pub(crate) transposed: Option<usize>,
}

/// `x` `[B,Cin,H,W]` by a weight `[Cout,Cin,KH,KW]`, or `[Cin,Cout,KH,KW]` of a transposed convolution, to
/// `[B,Cout,H',W']`. Differentiable in both.
pub(crate) fn convolve(x: &Tensor, weight: &Tensor, how: Convolution) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let y = how.forward(&x.detach(), &weight.detach())?;
    if x.track_op() || weight.track_op() { x.apply_op2(&weight, Done { y, how }) } else { Ok(y) }
}

impl Convolution {
    fn forward(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Self { stride, padding, dilation, transposed } = *self;
        match transposed {
            None => x.conv2d(weight, padding, stride, dilation, 1),
            Some(more) => x.conv_transpose2d(weight, padding, more, stride, dilation),
        }
    }

    fn gradient_of_x(&self, grad: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Self { stride, padding, dilation, transposed } = *self;
        let as_x = |all: Tensor| all.narrow(2, 0, x.dim(2)?)?.narrow(3, 0, x.dim(3)?)?.contiguous();
        if transposed.is_some() {
            return as_x(grad.conv2d(weight, padding, stride, dilation, 1)?);
        }
        // Rows and columns that no window reached.
        let beyond = |axis: usize| -> Result<usize> {
            let reached = (grad.dim(axis)? - 1) * stride + dilation * (weight.dim(axis)? - 1) + 1;
            Ok((x.dim(axis)? + 2 * padding).saturating_sub(reached))
        };
        let more = beyond(2)?.max(beyond(3)?);
        as_x(grad.conv_transpose2d(weight, padding, more, stride, dilation)?)
    }

    fn gradient_of_weight(&self, grad: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Self { stride, padding, dilation, transposed } = *self;
        let (large, small) = if transposed.is_some() { (grad, x) } else { (x, grad) };
        // The images are what is summed over: they take the channels' place.
        let swapped = |t: &Tensor| t.transpose(0, 1)?.contiguous();
        let sums = swapped(large)?.conv2d(&swapped(small)?, padding, dilation, stride, 1)?;
        let sums = sums.narrow(2, 0, weight.dim(2)?)?.narrow(3, 0, weight.dim(3)?)?;
        sums.transpose(0, 1)?.contiguous()
    }
}

/// The operation that the graph knows: its forward pass has run already.
struct Done {
    y: Tensor,
    how: Convolution,
}

impl CustomOp2 for Done {
    fn name(&self) -> &'static str {
        "vq-nchw-convolution"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&self.y)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a convolution on two devices") };
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.y.storage_and_layout();
        let Storage::Metal(storage) = &*storage else { bail!("a convolution on two devices") };
        // The same buffer, which nobody else writes to.
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad, how) = (grad.detach().contiguous()?, self.how);
        let [detached_x, detached_weight] = [x.detach(), weight.detach()];
        let of_x = x.track_op().then(|| how.gradient_of_x(&grad, &detached_x, &detached_weight));
        let of_weight =
            weight.track_op().then(|| how.gradient_of_weight(&grad, &detached_x, &detached_weight));
        Ok((of_x.transpose()?, of_weight.transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::testing::{self, values};

    /// Where these convolutions are for. On CUDA none of them runs but in tests: and candle opens a handle of cuDNN's
    /// for each thread there, and closes it when the thread ends, when what cuDNN keeps for the thread may be gone.
    fn noise(dims: &[usize], seed: u64) -> Var {
        if crate::test_device().is_cuda() {
            return testing::exactly(|| testing::noise(dims, seed));
        }
        testing::noise(dims, seed)
    }

    /// On the CPU, by candle's graph.
    fn by_candle(x: &Tensor, weight: &Tensor, how: Convolution) -> [Vec<f32>; 3] {
        let of = |t: &Tensor| Var::from_tensor(&t.to_device(&Device::Cpu).unwrap()).unwrap();
        let (x, weight) = (of(x), of(weight));
        run(&how.forward(&x, &weight).unwrap(), &x, &weight)
    }

    fn run(y: &Tensor, x: &Var, weight: &Var) -> [Vec<f32>; 3] {
        let weights = noise(y.dims(), 3).to_device(y.device()).unwrap();
        let store = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        [values(y), values(store.get(x).unwrap()), values(store.get(weight).unwrap())]
    }

    #[test]
    fn gradients_are_those_of_candles_graph() {
        let plain = Convolution { stride: 1, padding: 1, dilation: 1, transposed: None };
        for (how, size) in [
            (plain, [6, 5]),
            // The same number of rows and columns is out of reach, or candle's graph would not do.
            (Convolution { stride: 2, ..plain }, [8, 6]),
            (Convolution { stride: 3, padding: 0, ..plain }, [8, 8]),
            (Convolution { dilation: 2, padding: 2, ..plain }, [7, 6]),
            (Convolution { stride: 2, transposed: Some(0), ..plain }, [4, 3]),
            (Convolution { stride: 2, transposed: Some(1), ..plain }, [4, 3]),
            (Convolution { dilation: 2, transposed: Some(0), ..plain }, [5, 6]),
        ] {
            let dims = if how.transposed.is_some() { [4, 5, 3, 3] } else { [5, 4, 3, 3] };
            let (x, weight) = (noise(&[3, 4, size[0], size[1]], 1), noise(&dims, 2));
            let ours = run(&convolve(&x, &weight, how).unwrap(), &x, &weight);
            for (ours, theirs) in ours.iter().zip(by_candle(&x, &weight, how)) {
                assert_eq!(ours.len(), theirs.len());
                for (a, b) in ours.iter().zip(&theirs) {
                    assert!((a - b).abs() < 1e-4, "{how:?}: {a} {b}");
                }
            }
        }
    }

    /// Where candle's graph fails: it takes the columns out of reach to be as many as the rows.
    #[test]
    fn rows_and_columns_out_of_reach_may_differ_in_number() {
        let how = Convolution { stride: 2, padding: 0, dilation: 1, transposed: None };
        let (x, weight) = (noise(&[2, 3, 6, 7], 1), noise(&[4, 3, 3, 3], 2));
        let [_, of_x, of_weight] = run(&convolve(&x, &weight, how).unwrap(), &x, &weight);
        // The last row is seen by no window; without it, it is the same.
        let seen = Var::from_tensor(&x.narrow(2, 0, 5).unwrap().contiguous().unwrap()).unwrap();
        let [_, of_seen, of_weight_seen] = by_candle(&seen, &weight, how);
        assert_eq!(of_x.len(), 2 * 3 * 6 * 7);
        for (plane, seen) in of_x.chunks(42).zip(of_seen.chunks(35)) {
            let close = plane.iter().zip(seen).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close && plane[35..].iter().all(|&v| v == 0.));
        }
        let close = of_weight.iter().zip(&of_weight_seen).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(close);
    }

    /// Where candle's graph fails too: the gradient has a row more than the input.
    #[test]
    fn a_dilated_transposed_convolution_may_have_rows_beside_the_least() {
        let how = Convolution { stride: 1, padding: 1, dilation: 2, transposed: Some(1) };
        let least = Convolution { transposed: Some(0), ..how };
        let (x, weight) = (noise(&[2, 4, 5, 6], 1), noise(&[4, 5, 3, 3], 2));
        let y = convolve(&x, &weight, how).unwrap();
        let least = convolve(&x, &weight, least).unwrap();
        let (h, w) = (least.dim(2).unwrap(), least.dim(3).unwrap());
        let of = |y: Tensor| {
            let y = y.narrow(2, 0, h).unwrap().narrow(3, 0, w).unwrap().contiguous().unwrap();
            run(&y, &x, &weight)
        };
        assert_eq!(of(y), of(least));
    }

    #[test]
    fn gradients_that_nobody_asks_for_are_not_computed() {
        let how = Convolution { stride: 1, padding: 1, dilation: 1, transposed: None };
        let (x, weight) = (noise(&[2, 3, 4, 4], 1), noise(&[4, 3, 3, 3], 2));
        let still = convolve(&x.as_detached_tensor(), &weight.as_detached_tensor(), how).unwrap();
        assert!(!still.track_op());
        let y = convolve(&x.as_detached_tensor(), &weight, how).unwrap();
        let store = y.sum_all().unwrap().backward().unwrap();
        assert!(store.get(&weight).is_some() && store.get(&x).is_none());
    }
}

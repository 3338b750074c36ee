//! Moving a feature map within a frame of zeros: what causal convolutions pad and shift with.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::storage::f32_elements;

/// `x` `[B, H, W, C]` → `[B, H', W', C]`, `size` = `[H', W']`, whose pixel (i, j) is that of `x` at
/// `(i − offset[0], j − offset[1])`, or zeros where that lies outside of `x`.
///
/// An offset of one with the same size is a shift (down, right); a larger size is padding on chosen
/// sides. One pass each way on the CPU; differentiable.
pub fn shift(x: &Tensor, size: [usize; 2], offset: [isize; 2]) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if [h, w] == size && offset == [0, 0] {
        return Ok(x.clone());
    }
    if on_cpu(x.device()) {
        x.contiguous()?.apply_op1(Shift { size, offset })
    } else {
        let x = along(x, 1, size[0], offset[0])?;
        along(&x, 2, size[1], offset[1])?.contiguous()
    }
}

/// The same along one axis, of candle's operations.
fn along(x: &Tensor, axis: usize, size: usize, offset: isize) -> Result<Tensor> {
    let (from, to, count) = overlap(x.dim(axis)?, size, offset);
    if count == 0 {
        let mut dims = x.dims().to_vec();
        if let Some(dim) = dims.get_mut(axis) {
            *dim = size;
        }
        return Tensor::zeros(dims, x.dtype(), x.device());
    }
    x.narrow(axis, from, count)?.pad_with_zeros(axis, to, size - to - count)
}

/// (first of the input, first of the output, how many) of what is kept along an axis.
fn overlap(input: usize, output: usize, offset: isize) -> (usize, usize, usize) {
    let from = (-offset).max(0) as usize;
    let to = offset.max(0) as usize;
    (from, to, input.saturating_sub(from).min(output.saturating_sub(to)))
}

struct Shift {
    size: [usize; 2],
    offset: [isize; 2],
}

impl CustomOp1 for Shift {
    fn name(&self) -> &'static str {
        "vq-shift"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = layout.shape().dims4()?;
        let values = f32_elements(x, layout)?;
        let [to_height, to_width] = self.size;
        let (first_row, to_row, rows) = overlap(height, to_height, self.offset[0]);
        let (first, to, columns) = overlap(width, to_width, self.offset[1]);
        let mut out = vec![0f32; batch * to_height * to_width * channels];
        let (from_size, to_size) = (height * width * channels, to_height * to_width * channels);
        if rows > 0 && columns > 0 && channels > 0 {
            let images = out.par_chunks_mut(to_size).zip(values.par_chunks(from_size));
            images.for_each(|(out, image)| {
                let out = out.chunks_mut(to_width * channels).skip(to_row).take(rows);
                for (out, row) in out.zip(image.chunks(width * channels).skip(first_row)) {
                    out[to * channels..(to + columns) * channels]
                        .copy_from_slice(&row[first * channels..(first + columns) * channels]);
                }
            });
        }
        Ok((CpuStorage::F32(out), (batch, to_height, to_width, channels).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, h, w, _) = x.dims4()?;
        shift(grad, [h, w], [-self.offset[0], -self.offset[1]]).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn it_agrees_with_candles_operations_and_its_gradient_is_the_way_back() {
        let (b, h, w, c) = (2, 3, 4, 2);
        let x = Tensor::arange(1f32, 1. + (b * h * w * c) as f32, &crate::test_device()).unwrap();
        let x = Var::from_tensor(&x.reshape((b, h, w, c)).unwrap()).unwrap();
        for size in [[3, 4], [1, 1], [5, 7], [2, 6]] {
            for offset in [[0, 0], [1, 0], [0, 1], [-1, -2], [2, 3], [-3, 0], [0, 9]] {
                let ours = shift(&x, size, offset).unwrap();
                let composed = along(&x, 1, size[0], offset[0]).unwrap();
                let composed = along(&composed, 2, size[1], offset[1]).unwrap();
                assert_eq!(ours.dims(), [b, size[0], size[1], c]);
                assert_eq!(values(&ours), values(&composed), "{size:?} {offset:?}");
                let gradient = |y: &Tensor| {
                    let n = y.elem_count() as f32;
                    let weights = Tensor::arange(0f32, n, &crate::test_device()).unwrap();
                    let y = y.flatten_all().unwrap();
                    let loss = (y * weights).unwrap().sum_all().unwrap();
                    let gradients = loss.backward().unwrap();
                    gradients.get(&x).map_or(vec![0.; b * h * w * c], values)
                };
                assert_eq!(gradient(&ours), gradient(&composed), "{size:?} {offset:?}");
            }
        }
    }
}

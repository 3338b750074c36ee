//! Images to the windows that convolutions multiply, and back.

use candle_core::cuda::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{CudaStorage, DType, Result, Shape, Tensor, bail};

use super::{Element, address, address_or_null, cuda_device, launch, per_element, tensor};
use crate::cpu::conv::Geometry;

#[repr(C)]
#[derive(Clone, Copy)]
struct Windows {
    height: u32,
    width: u32,
    channels: u32,
    rows: u32,
    columns: u32,
    kernel_height: u32,
    kernel_width: u32,
    stride: u32,
    padding: u32,
}

// SAFETY: plain numbers, laid out as `layers.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Windows {}

impl Windows {
    fn new(geometry: &Geometry) -> Self {
        let Geometry { large, small, kernel, stride, padding, .. } = *geometry;
        Self {
            height: large.height as u32,
            width: large.width as u32,
            channels: large.channels as u32,
            rows: small.height as u32,
            columns: small.width as u32,
            kernel_height: kernel.0 as u32,
            kernel_width: kernel.1 as u32,
            stride: stride as u32,
            padding: padding as u32,
        }
    }
}

/// See [`crate::primitives::unfold`].
pub(crate) fn unfold(x: &Tensor, geometry: &Geometry, dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::BF16 => unfold_as::<half::bf16>(x, geometry),
        _ => unfold_as::<f32>(x, geometry),
    }
}

fn unfold_as<T: Element>(x: &Tensor, geometry: &Geometry) -> Result<Tensor> {
    let device = cuda_device(x)?;
    let Geometry { large, small, kernel: (kh, kw), .. } = *geometry;
    let size = kh * kw * large.channels;
    if x.elem_count() != large.len() || !size.is_multiple_of(T::GROUP) {
        bail!("windows of {:?} by {geometry:?}", x.shape());
    }
    let count = small.pixels() * size;
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count) }?;
    let (from, groups) = (address::<f32>(x)?, count / T::GROUP);
    let (n, windows, name) = (groups as u64, Windows::new(geometry), format!("unfold_{}", T::NAME));
    launch!(&device, &name, per_element(groups), &from, &to, &n, &windows);
    let shape = (small.batch, small.height, small.width, size);
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), shape))
}

/// See [`crate::primitives::fold`].
pub(crate) fn fold(y: &Tensor, geometry: &Geometry, bias: Option<&Tensor>) -> Result<Tensor> {
    let (storage, shape) = folded(y, geometry, bias)?;
    Ok(tensor(storage, shape))
}

/// What [`fold`] gives, as a storage of its own.
pub(crate) fn folded(
    y: &Tensor,
    geometry: &Geometry,
    bias: Option<&Tensor>,
) -> Result<(CudaStorage, Shape)> {
    match y.dtype() {
        DType::BF16 => folded_as::<half::bf16>(y, geometry, bias),
        _ => folded_as::<f32>(y, geometry, bias),
    }
}

fn folded_as<T: Element>(
    y: &Tensor,
    geometry: &Geometry,
    bias: Option<&Tensor>,
) -> Result<(CudaStorage, Shape)> {
    let device = cuda_device(y)?;
    let Geometry { large, small, kernel: (kh, kw), .. } = *geometry;
    let is_fit = y.elem_count() == small.pixels() * kh * kw * large.channels
        && bias.is_none_or(|bias| bias.elem_count() == large.channels);
    if !is_fit {
        bail!("{:?} are no windows of {geometry:?}", y.shape());
    }
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(large.len()) }?;
    let (from, bias) = (address::<T>(y)?, address_or_null::<f32>(bias)?);
    let (n, windows) = (large.pixels() as u64, Windows::new(geometry));
    let (name, config) = (format!("fold_{}", T::NAME), per_element(large.pixels()));
    launch!(&device, &name, config, &from, &bias, &to, &n, &windows);
    let shape = (large.batch, large.height, large.width, large.channels);
    Ok((CudaStorage::wrap_cuda_slice(to, device), shape.into()))
}

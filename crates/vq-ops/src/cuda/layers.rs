//! What surrounds a convolution: its weight's layout, bias, ReLU and residual, and their gradients.

use candle_core::cuda::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Tensor, bail};

use super::{Element, address_or_null, grid, launch, per_element, view, with_element};
use crate::primitives::Outputs;

/// Rows of a block of `column_sums`, at least.
const ROWS: usize = 256;
/// Most blocks of rows.
const PARTS: usize = 256;

/// `[outer, inner, taps]` f32 to `[outer, taps, inner]` of `T`.
pub(crate) fn pack_weight<T: Element>(
    weight: &CudaStorage,
    layout: &Layout,
    (outer, inner, taps): (usize, usize, usize),
) -> Result<CudaStorage> {
    let device = &weight.device;
    let from = view::<f32>(weight, layout)?;
    let count = outer * inner * taps;
    if from.len() != count {
        bail!("a weight of {} elements is not {outer}×{inner}×{taps}", from.len());
    }
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count) }?;
    let (outer, inner, taps) = (outer as u32, inner as u32, taps as u32);
    let name = format!("pack_weight_{}", T::NAME);
    launch!(device, &name, per_element(count), &from, &to, &outer, &inner, &taps);
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// `[outer, taps, inner]` to `[outer, inner, taps]` f32.
pub(crate) fn unpack_weight(
    weight: &CudaStorage,
    layout: &Layout,
    (outer, inner, taps): (usize, usize, usize),
) -> Result<CudaStorage> {
    let device = &weight.device;
    let count = outer * inner * taps;
    if layout.shape().elem_count() != count {
        bail!("a weight of {:?} is not {outer}×{inner}×{taps}", layout.shape());
    }
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(count) }?;
    let (outer, inner, taps) = (outer as u32, inner as u32, taps as u32);
    with_element!(weight, T, {
        let from = view::<T>(weight, layout)?;
        let name = format!("unpack_weight_{}", <T as Element>::NAME);
        launch!(device, &name, per_element(count), &from, &to, &outer, &inner, &taps);
    });
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// `y` + bias + residual, and its ReLU; both one after the other where both are asked for.
pub(crate) fn finish(
    y: &CudaStorage,
    layout: &Layout,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    outputs: Outputs,
) -> Result<CudaStorage> {
    with_element!(y, T, finish_as::<T>(y, layout, bias, residual, outputs))
}

fn finish_as<T: Element>(
    y: &CudaStorage,
    layout: &Layout,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    outputs: Outputs,
) -> Result<CudaStorage> {
    let device = &y.device;
    let channels = layout.dims().last().copied().unwrap_or(1);
    let count = layout.shape().elem_count();
    let from = view::<T>(y, layout)?;
    let fits = bias.is_none_or(|bias| bias.elem_count() == channels)
        && residual.is_none_or(|residual| residual.elem_count() == count);
    if !fits {
        bail!("{:?} with bias {bias:?} and residual {residual:?}", layout.shape());
    }
    // SAFETY: the kernel writes every element of what is asked for.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count * outputs.count()) }?;
    let (plain, rectified) = to.split_at(if outputs.plain { count } else { 0 });
    let null = 0u64;
    let bias_address = address_or_null::<f32>(bias)?;
    let residual_address = address_or_null::<T>(residual)?;
    let offsets = [Some(layout.start_offset()), residual.map(|r| r.layout().start_offset())];
    let by_four = channels.is_multiple_of(4)
        && offsets.into_iter().flatten().all(|offset| offset.is_multiple_of(4));
    let config = per_element(if by_four { count / 4 } else { count });
    let (by_four, length, channels) = (u32::from(by_four), count as u64, channels as u32);
    let function = super::function(device, &format!("finish_{}", T::NAME))?;
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(&from).arg(&bias_address).arg(&residual_address);
    if outputs.plain {
        builder.arg(&plain);
    } else {
        builder.arg(&null);
    }
    if outputs.rectified {
        builder.arg(&rectified);
    } else {
        builder.arg(&null);
    }
    builder.arg(&length).arg(&channels).arg(&by_four);
    // SAFETY: the arguments are those of `finish_…`, in its order and its types; the lengths were compared
    // above.
    #[allow(unsafe_code)]
    let launched = unsafe { builder.launch(config) };
    candle_core::cuda::WrapErr::w(launched)?;
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// `grad` where `gate` is above 0, else 0; plus `more`. All of the same length.
pub(crate) fn mask(
    (grad, grad_layout): (&CudaStorage, &Layout),
    (gate, gate_layout): (&CudaStorage, &Layout),
    more: Option<&Tensor>,
) -> Result<CudaStorage> {
    let device = &grad.device;
    let count = grad_layout.shape().elem_count();
    if gate_layout.shape().elem_count() != count
        || more.is_some_and(|more| more.elem_count() != count)
    {
        bail!("a mask of {:?} for {:?}", gate_layout.shape(), grad_layout.shape());
    }
    with_element!(grad, T, {
        let (grad, gate) = (view::<T>(grad, grad_layout)?, view::<T>(gate, gate_layout)?);
        let more = address_or_null::<T>(more)?;
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<T>(count) }?;
        let (name, length) = (format!("mask_{}", <T as Element>::NAME), count as u64);
        launch!(device, &name, per_element(count), &grad, &gate, &more, &to, &length);
        Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
    })
}

/// `[…, columns]` to `[columns]` f32; in a fixed order.
pub(crate) fn column_sums(from: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = &from.device;
    let columns = layout.dims().last().copied().unwrap_or(1).max(1);
    let rows = layout.shape().elem_count() / columns;
    let parts = rows.div_ceil(ROWS).clamp(1, PARTS);
    // SAFETY: the kernels write every element.
    #[allow(unsafe_code)]
    let (partial, to) =
        unsafe { (device.alloc::<f32>(parts * columns)?, device.alloc::<f32>(columns)?) };
    let (rows, width, parts) = (rows as u64, columns as u32, parts as u32);
    with_element!(from, T, {
        let from = view::<T>(from, layout)?;
        let name = format!("column_sums_{}", <T as Element>::NAME);
        launch!(device, &name, grid(width.div_ceil(32), parts), &from, &partial, &rows, &width);
    });
    launch!(device, "add_rows_f32", per_element(columns), &partial, &to, &parts, &width);
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

//! What surrounds a convolution: bias, ReLU and residual, and their gradients.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::thread::ThreadId;

use candle_core::cuda::DeviceId;
use candle_core::cuda::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor, bail};

use super::{
    Element, address, address_or_null, cuda_device, grid, launch, per_element, tensor, view,
    with_element,
};
use crate::primitives::Outputs;

/// Blocks along the rows of a sum, at most: the order of a sum must not depend on the device.
const ROW_BLOCKS: usize = 264;
/// Threads of a block that sums, as in `layers.cu`.
const SUM_THREADS: usize = 512;
/// Groups of columns of a block, at most.
const WIDTH: usize = 256;
/// Blocks along the columns of a sum, at most.
const COUNTERS: usize = 4096;

/// See [`crate::primitives::enter`].
pub(crate) fn enter(x: &Tensor, dtype: DType, channels: usize) -> Result<Tensor> {
    match dtype {
        DType::BF16 => enter_as::<half::bf16>(x, channels),
        _ => enter_as::<f32>(x, channels),
    }
}

fn enter_as<T: Element>(x: &Tensor, channels: usize) -> Result<Tensor> {
    let device = cuda_device(x)?;
    let (from, mut shape) = (address::<f32>(x)?, x.dims().to_vec());
    let Some(last) = shape.last_mut() else { bail!("no channels") };
    let own = std::mem::replace(last, channels).max(1);
    let count = x.elem_count() / own * channels;
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count) }?;
    let (name, config) = (format!("enter_{}", T::NAME), per_element(count));
    let (n, own, channels) = (count as u64, own as u32, channels as u32);
    launch!(&device, &name, config, &from, &to, &n, &own, &channels);
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), shape))
}

/// See [`crate::primitives::leave`].
pub(crate) fn leave(y: &Tensor, channels: usize) -> Result<Tensor> {
    let (storage, shape) = left(y, channels)?;
    Ok(tensor(storage, shape))
}

/// What [`leave`] gives, as a storage of its own.
pub(crate) fn left(y: &Tensor, channels: usize) -> Result<(CudaStorage, Shape)> {
    match y.dtype() {
        DType::BF16 => left_as::<half::bf16>(y, channels),
        _ => left_as::<f32>(y, channels),
    }
}

fn left_as<T: Element>(y: &Tensor, channels: usize) -> Result<(CudaStorage, Shape)> {
    let device = cuda_device(y)?;
    let (from, mut shape) = (address::<T>(y)?, y.dims().to_vec());
    let Some(last) = shape.last_mut() else { bail!("no channels") };
    let packed = std::mem::replace(last, channels).max(1);
    if channels > packed {
        bail!("{:?} has no {channels} channels", y.shape());
    }
    let count = y.elem_count() / packed * channels;
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(count) }?;
    let (name, config) = (format!("leave_{}", T::NAME), per_element(count));
    let (n, channels, packed) = (count as u64, channels as u32, packed as u32);
    launch!(&device, &name, config, &from, &to, &n, &channels, &packed);
    Ok((CudaStorage::wrap_cuda_slice(to, device), shape.into()))
}

fn kernel_name<T: Element>(name: &str, is_grouped: bool) -> String {
    format!("{name}_{}{}", T::NAME, if is_grouped { "_grouped" } else { "" })
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
    let biases = bias.map_or(0, Tensor::elem_count) as u32;
    let fits = biases as usize <= channels
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
    let is_grouped = count.is_multiple_of(T::GROUP)
        && channels.is_multiple_of(T::GROUP)
        && offsets.into_iter().flatten().all(|offset| offset.is_multiple_of(T::GROUP));
    let config = per_element(if is_grouped { count / T::GROUP } else { count });
    let (length, channels) = (count as u64, channels as u32);
    let function = super::function(device, &kernel_name::<T>("finish", is_grouped))?;
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
    builder.arg(&length).arg(&channels).arg(&biases);
    // SAFETY: the arguments are those of `finish_…`, in its order and its types; the lengths were compared
    // above.
    #[allow(unsafe_code)]
    let launched = unsafe { builder.launch(config) };
    candle_core::cuda::WrapErr::w(launched)?;
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// The sums `[C]` f32 of the columns of `grad` `[…, C]`, in a fixed order. With a gate (and more), of `grad`
/// where the gate is above 0, else 0, plus `more`, which is given too. All of the same shape and type.
pub(crate) fn sum_columns(
    grad: &Tensor,
    gate: Option<(&Tensor, Option<&Tensor>)>,
) -> Result<(Option<Tensor>, Tensor)> {
    match grad.dtype() {
        DType::BF16 => sum_columns_as::<half::bf16>(grad, gate),
        _ => sum_columns_as::<f32>(grad, gate),
    }
}

fn sum_columns_as<T: Element>(
    grad: &Tensor,
    gate: Option<(&Tensor, Option<&Tensor>)>,
) -> Result<(Option<Tensor>, Tensor)> {
    let device = cuda_device(grad)?;
    let (count, columns) = (grad.elem_count(), grad.dims().last().copied().unwrap_or(1).max(1));
    let others = gate.map(|(gate, more)| [Some(gate), more]).unwrap_or_default();
    let tensors = [Some(grad)].into_iter().chain(others).flatten();
    let (mut is_grouped, rows) = (columns.is_multiple_of(T::GROUP), count / columns);
    for tensor in tensors {
        if tensor.elem_count() != count || tensor.dtype() != grad.dtype() {
            bail!("a mask of {:?} for {:?}", tensor.shape(), grad.shape());
        }
        is_grouped &= tensor.layout().start_offset().is_multiple_of(T::GROUP);
    }
    let groups = columns / if is_grouped { T::GROUP } else { 1 };
    let across = groups.div_ceil(WIDTH);
    if across > COUNTERS {
        bail!("sums of {columns} columns are too many");
    }
    let down = rows.div_ceil((SUM_THREADS / groups.min(WIDTH)) * 4).clamp(1, ROW_BLOCKS);
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let (masked, partial, sums) = unsafe {
        (
            gate.is_some().then(|| device.alloc::<T>(count)).transpose()?,
            device.alloc::<f32>(down * columns)?,
            device.alloc::<f32>(columns)?,
        )
    };
    let masked = masked
        .map(|slice| tensor(CudaStorage::wrap_cuda_slice(slice, device.clone()), grad.shape()));
    let from = address::<T>(grad)?;
    let [gate, more] = others;
    let (gate, more) = (address_or_null::<T>(gate)?, address_or_null::<T>(more)?);
    let to = address_or_null::<T>(masked.as_ref())?;
    let counters = counters(&device)?;
    let (rows, width) = (rows as u64, columns as u32);
    let name = kernel_name::<T>("sum_columns", is_grouped);
    let config =
        LaunchConfig { block_dim: (SUM_THREADS as u32, 1, 1), ..grid(down as u32, across as u32) };
    launch!(
        &device, &name, config, &from, &gate, &more, &to, &partial, &sums, &counters, &rows, &width
    );
    Ok((masked, tensor(CudaStorage::wrap_cuda_slice(sums, device), columns)))
}

/// Where blocks are counted, all 0 between launches: the address of [`COUNTERS`] numbers. Each thread has its own,
/// since its launches run beside those of others; they stay when it ends.
pub(super) fn counters(device: &CudaDevice) -> Result<u64> {
    static KNOWN: RwLock<Option<HashMap<(DeviceId, ThreadId), Tensor>>> = RwLock::new(None);
    let own = (device.id(), std::thread::current().id());
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(counters) = known.as_ref().and_then(|known| known.get(&own)) {
        return address::<u32>(counters);
    }
    drop(known);
    let zeros = device.alloc_zeros::<u32>(COUNTERS)?;
    let counters = tensor(CudaStorage::wrap_cuda_slice(zeros, device.clone()), COUNTERS);
    let address = address::<u32>(&counters)?;
    let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(own, counters);
    Ok(address)
}

/// f32 `[B, R, C]` to `[B, C, R]`.
pub(crate) fn swap_axes(
    x: &CudaStorage,
    layout: &Layout,
    (rows, columns): (usize, usize),
) -> Result<CudaStorage> {
    let from = view::<f32>(x, layout)?;
    let count = from.len();
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { x.device.alloc::<f32>(count) }?;
    let (n, rows, columns) = (count as u64, rows as u32, columns as u32);
    launch!(&x.device, "swap_axes", per_element(count), &from, &to, &n, &rows, &columns);
    Ok(CudaStorage::wrap_cuda_slice(to, x.device.clone()))
}

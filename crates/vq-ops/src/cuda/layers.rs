//! What surrounds a convolution: its weight's layout, bias, ReLU and residual, and their gradients.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use candle_core::cuda::DeviceId;
use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};

use super::{
    Element, address, address_or_null, grid, launch, per_element, tensor, view, with_element,
};
use crate::primitives::{Gradient, Outputs};

/// Tensors of a launch, as in `layers.cu`.
const PARTS: usize = 64;
/// Elements that a packed weight's start is a multiple of: cuDNN wants 16 bytes.
const ALIGNMENT: usize = 64;
/// Blocks along the rows of a sum, at most: the order of a sum must not depend on the device.
const ROW_BLOCKS: usize = 264;
/// Groups of columns of a block.
const WIDTH: usize = 256;
/// Blocks along the columns of a sum, at most.
const COUNTERS: usize = 4096;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    from: u64,
    to: u64,
    outer: u32,
    inner: u32,
    taps: u32,
    is_plain: u32,
}

/// One launch's tensors.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table([Part; PARTS]);

// SAFETY: plain numbers, laid out as `layers.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Table {}

/// Each `[outer, inner, KH, KW]` f32 to `[outer, KH, KW, inner]` of `dtype`.
pub(crate) fn pack_weights(weights: &[Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    match dtype {
        DType::BF16 => pack_as::<half::bf16>(weights),
        _ => pack_as::<f32>(weights),
    }
}

fn pack_as<T: Element>(weights: &[Tensor]) -> Result<Vec<Tensor>> {
    let Some(first) = weights.first() else { return Ok(Vec::new()) };
    let weights: Vec<Tensor> = weights.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
    let device = super::cuda_device(first)?;
    let (mut parts, mut shapes, mut total) = (Vec::new(), Vec::new(), 0);
    for weight in &weights {
        let (outer, inner, kh, kw) = weight.dims4()?;
        let mut part = Part::new(address::<f32>(weight)?, (outer, inner, kh * kw))?;
        part.to = total as u64;
        parts.push(part);
        shapes.push((total, outer * inner * kh * kw, (outer, kh, kw, inner)));
        total += weight.elem_count().next_multiple_of(ALIGNMENT);
    }
    // SAFETY: the kernel writes every element that is looked at.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(total) }?;
    launch_parts(&device, &format!("pack_weights_{}", T::NAME), &parts, &to)?;
    let packed = tensor(CudaStorage::wrap_cuda_slice(to, device), total);
    shapes
        .into_iter()
        .map(|(first, count, shape)| packed.narrow(0, first, count)?.reshape(shape))
        .collect()
}

/// All gradients as those of the parameters, f32, side by side.
pub(crate) fn unpack_gradients(gradients: &[Gradient]) -> Result<Tensor> {
    let (mut parts, mut total, mut name) = (Vec::new(), 0, f32::NAME);
    let mut device = None;
    for gradient in gradients {
        let (mut part, of) = match gradient {
            Gradient::Packed(weight) => {
                let (outer, kh, kw, inner) = weight.dims4()?;
                let from = match weight.dtype() {
                    DType::BF16 => {
                        name = half::bf16::NAME;
                        address::<half::bf16>(weight)?
                    }
                    _ => address::<f32>(weight)?,
                };
                (Part::new(from, (outer, inner, kh * kw))?, weight)
            }
            Gradient::Plain(plain) => {
                let part = Part::new(address::<f32>(plain)?, (plain.elem_count(), 1, 1))?;
                (Part { is_plain: 1, ..part }, plain)
            }
        };
        part.to = total as u64;
        total += of.elem_count();
        device = Some(super::cuda_device(of)?);
        parts.push(part);
    }
    let Some(device) = device else { bail!("no gradients") };
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(total) }?;
    launch_parts(&device, &format!("unpack_gradients_{name}"), &parts, &to)?;
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), total))
}

impl Part {
    fn new(from: u64, (outer, inner, taps): (usize, usize, usize)) -> Result<Self> {
        let small = |size: usize| u32::try_from(size).map_err(candle_core::Error::wrap);
        small(outer * inner * taps)?;
        let (outer, inner, taps) = (small(outer)?, small(inner)?, small(taps)?);
        Ok(Self { from, outer, inner, taps, ..Self::default() })
    }
}

fn launch_parts<T: DeviceRepr>(
    device: &CudaDevice,
    name: &str,
    parts: &[Part],
    to: &CudaSlice<T>,
) -> Result<()> {
    for parts in parts.chunks(PARTS) {
        let mut table = Table([Part::default(); PARTS]);
        let mut longest = 0;
        for (place, part) in table.0.iter_mut().zip(parts) {
            *place = *part;
            longest = longest.max((part.outer * part.inner * part.taps) as usize);
        }
        let blocks = longest.div_ceil(1024).clamp(1, 64) as u32;
        launch!(device, name, grid(blocks, parts.len() as u32), &table, to);
    }
    Ok(())
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
    builder.arg(&length).arg(&channels);
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
    let device = super::cuda_device(grad)?;
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
    let down = rows.div_ceil((WIDTH / groups).max(1) * 4).clamp(1, ROW_BLOCKS);
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
    let (name, config) =
        (kernel_name::<T>("sum_columns", is_grouped), grid(down as u32, across as u32));
    launch!(
        &device, &name, config, &from, &gate, &more, &to, &partial, &sums, &counters, &rows, &width
    );
    Ok((masked, tensor(CudaStorage::wrap_cuda_slice(sums, device), columns)))
}

/// Where blocks are counted, all 0 between launches: the address of [`COUNTERS`] numbers.
pub(super) fn counters(device: &CudaDevice) -> Result<u64> {
    static KNOWN: RwLock<Option<HashMap<DeviceId, Tensor>>> = RwLock::new(None);
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(counters) = known.as_ref().and_then(|known| known.get(&device.id())) {
        return address::<u32>(counters);
    }
    drop(known);
    let zeros = device.alloc_zeros::<u32>(COUNTERS)?;
    let counters = tensor(CudaStorage::wrap_cuda_slice(zeros, device.clone()), COUNTERS);
    let address = address::<u32>(&counters)?;
    let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(device.id(), counters);
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

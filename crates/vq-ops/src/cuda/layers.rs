//! What surrounds a convolution: its weight's layout, bias, ReLU and residual, and their gradients.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use candle_core::cuda::DeviceId;
use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor, bail};

use super::{
    Element, address, address_or_null, cuda_device, grid, launch, per_element, tensor, view,
    with_element,
};
use crate::cpu::conv::Geometry;
use crate::primitives::{Gradient, Outputs};

/// Tensors of a launch, as in `layers.cu`.
const PARTS: usize = 48;
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
    outer_packed: u32,
    inner_packed: u32,
    is_plain: u32,
}

/// One launch's tensors.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table([Part; PARTS]);

// SAFETY: plain numbers, laid out as `layers.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Table {}

/// See [`crate::primitives::pack_weights`].
pub(crate) fn pack_weights(
    weights: &[(Tensor, (usize, usize))],
    dtype: DType,
) -> Result<Vec<Tensor>> {
    match dtype {
        DType::BF16 => pack_as::<half::bf16>(weights),
        _ => pack_as::<f32>(weights),
    }
}

fn pack_as<T: Element>(weights: &[(Tensor, (usize, usize))]) -> Result<Vec<Tensor>> {
    let Some((first, _)) = weights.first() else { return Ok(Vec::new()) };
    let device = cuda_device(first)?;
    let (mut parts, mut shapes, mut total) = (Vec::new(), Vec::new(), 0);
    // Until they are packed.
    let mut contiguous = Vec::new();
    for (weight, (outer_packed, inner_packed)) in weights {
        let (outer, inner, kh, kw) = weight.dims4()?;
        let weight = weight.contiguous()?;
        let packed = (*outer_packed, *inner_packed);
        let mut part = Part::new(address::<f32>(&weight)?, (outer, inner, kh * kw), packed)?;
        contiguous.push(weight);
        part.to = total as u64;
        parts.push(part);
        let shape = (*outer_packed, kh, kw, *inner_packed);
        let count = outer_packed * inner_packed * kh * kw;
        shapes.push((total, count, shape));
        total += count.next_multiple_of(ALIGNMENT);
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

/// See [`crate::primitives::unpack_gradients`].
pub(crate) fn unpack_gradients(gradients: &[Gradient]) -> Result<Tensor> {
    let (mut parts, mut total, mut name) = (Vec::new(), 0, f32::NAME);
    let mut device = None;
    for gradient in gradients {
        let (mut part, of) = match gradient {
            Gradient::Packed(weight, [outer, inner, kh, kw]) => {
                let (outer_packed, packed_kh, packed_kw, inner_packed) = weight.dims4()?;
                let is_alike = (*kh, *kw) == (packed_kh, packed_kw)
                    && *outer <= outer_packed
                    && *inner <= inner_packed;
                if !is_alike {
                    bail!("{:?} is no gradient of [{outer}, {inner}, {kh}, {kw}]", weight.shape());
                }
                let from = match weight.dtype() {
                    DType::BF16 => {
                        name = half::bf16::NAME;
                        address::<half::bf16>(weight)?
                    }
                    _ => address::<f32>(weight)?,
                };
                let shape = (*outer, *inner, kh * kw);
                (Part::new(from, shape, (outer_packed, inner_packed))?, weight)
            }
            Gradient::Plain(plain, count) => {
                if *count > plain.elem_count() {
                    bail!("{:?} is no gradient of {count} numbers", plain.shape());
                }
                let from = address::<f32>(plain)?;
                let part = Part::new(from, (*count, 1, 1), (plain.elem_count(), 1))?;
                (Part { is_plain: 1, ..part }, plain)
            }
        };
        part.to = total as u64;
        total += (part.outer * part.inner * part.taps) as usize;
        device = Some(cuda_device(of)?);
        parts.push(part);
    }
    let Some(device) = device else { bail!("no gradients") };
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(total) }?;
    launch_parts(&device, &format!("unpack_gradients_{name}"), &parts, &to)?;
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), total))
}

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

impl Part {
    fn new(
        from: u64,
        (outer, inner, taps): (usize, usize, usize),
        (outer_packed, inner_packed): (usize, usize),
    ) -> Result<Self> {
        let small = |size: usize| u32::try_from(size).map_err(candle_core::Error::wrap);
        small(outer_packed * inner_packed * taps)?;
        Ok(Self {
            from,
            outer: small(outer)?,
            inner: small(inner)?,
            taps: small(taps)?,
            outer_packed: small(outer_packed)?,
            inner_packed: small(inner_packed)?,
            ..Self::default()
        })
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
            longest = longest.max((part.outer_packed * part.inner_packed * part.taps) as usize);
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

/// f32 `[B, h, w, C]` to `[B, h·n, w·n, C]` by repetition, or back by sums; the sizes are the small ones.
pub(crate) fn repeat_pixels(
    x: &CudaStorage,
    layout: &Layout,
    [batch, height, width, channels]: [usize; 4],
    times: usize,
    back: bool,
) -> Result<CudaStorage> {
    let from = view::<f32>(x, layout)?;
    let small = batch * height * width * channels;
    let (count, expected) =
        if back { (small, small * times * times) } else { (small * times * times, small) };
    if from.len() != expected {
        bail!("{} elements are not {expected}", from.len());
    }
    // SAFETY: the kernels write every element.
    #[allow(unsafe_code)]
    let to = unsafe { x.device.alloc::<f32>(count) }?;
    let name = if back { "add_pixels" } else { "repeat_pixels" };
    let (n, h, w) = (count as u64, height as u32, width as u32);
    let (c, times) = (channels as u32, times as u32);
    launch!(&x.device, name, per_element(count), &from, &to, &n, &h, &w, &c, &times);
    Ok(CudaStorage::wrap_cuda_slice(to, x.device.clone()))
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

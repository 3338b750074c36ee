//! Weights as the products take them, and their gradients as the parameters'.

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor, bail};

use super::{Element, address, cuda_device, grid, launch, tensor};
use crate::primitives::Gradient;

/// Tensors of a launch, as in `layers.cu`.
const PARTS: usize = 48;
/// Elements that a packed weight's start is a multiple of: cuDNN wants 16 bytes.
const ALIGNMENT: usize = 64;

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

//! Maps side by side, and their parts of a gradient.

use candle_core::cuda::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, D, DType, Layout, Result, Tensor, bail};

use super::{Element, address, cuda_device, launch, per_element, tensor, view};
use crate::joined::Source;

/// Elements that are read and written at once, where all lie on their multiples.
const GROUP: usize = 8;

/// Where one of several maps side by side lies, as `layers.cu` has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Place {
    height: u32,
    width: u32,
    times: u32,
    channels: u32,
    own: u32,
    first: u32,
    all: u32,
}

// SAFETY: plain numbers, laid out as `layers.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Place {}

impl Place {
    fn new(source: &Source, first: usize, all: usize) -> Result<Self> {
        let (_, height, width, own) = source.values.dims4()?;
        let (channels, times) = (source.channels, source.times);
        if channels > own || first + channels > all {
            bail!("{channels} channels from {first} on among {all}, of a map of {own}");
        }
        Ok(Self {
            height: height as u32,
            width: width as u32,
            times: times as u32,
            channels: channels as u32,
            own: own as u32,
            first: first as u32,
            all: all as u32,
        })
    }

    /// Whether groups lie on their multiples, where the tensors start there.
    fn is_grouped(&self, starts: [usize; 2]) -> bool {
        let sizes = [self.channels, self.own, self.first, self.all].map(|size| size as usize);
        sizes.into_iter().chain(starts).all(|size| size.is_multiple_of(GROUP))
    }
}

/// See [`Joined::join`](crate::joined::Joined::join); `dims` are `[B, H, W, C]` of the maps together.
pub(crate) fn join(
    sources: &[Source],
    dims: [usize; 4],
    dtype: DType,
    channels: usize,
) -> Result<Tensor> {
    match dtype {
        DType::BF16 => join_as::<half::bf16>(sources, dims, channels),
        _ => join_as::<f32>(sources, dims, channels),
    }
}

fn join_as<T: Element>(sources: &[Source], dims: [usize; 4], channels: usize) -> Result<Tensor> {
    let [batch, height, width, own] = dims;
    let Some(source) = sources.first() else { bail!("no maps") };
    let device = cuda_device(&source.values)?;
    let count = batch * height * width * channels;
    let to = if own == channels {
        // SAFETY: the kernels write every element.
        #[allow(unsafe_code)]
        unsafe { device.alloc::<T>(count) }?
    } else {
        device.alloc_zeros::<T>(count)?
    };
    let shape = (batch, height, width, channels);
    let to = tensor(CudaStorage::wrap_cuda_slice(to, device.clone()), shape);
    let mut first = 0;
    for source in sources {
        match source.values.dtype() {
            DType::BF16 => place::<half::bf16, T>(&device, source, first, &to)?,
            _ => place::<f32, T>(&device, source, first, &to)?,
        }
        first += source.channels;
    }
    Ok(to)
}

fn place<F: Element, T: Element>(
    device: &CudaDevice,
    source: &Source,
    first: usize,
    to: &Tensor,
) -> Result<()> {
    let all = to.dim(D::Minus1)?;
    let place = Place::new(source, first, all)?;
    let is_grouped = place.is_grouped([start(&source.values), start(to)]);
    let count = to.elem_count() / all.max(1) * source.channels;
    let count = if is_grouped { count / GROUP } else { count };
    let (from, to, n) = (address::<F>(&source.values)?, address::<T>(to)?, count as u64);
    let name = name::<F, T>("join_map", is_grouped);
    launch!(device, &name, per_element(count), &from, &to, &n, &place);
    Ok(())
}

/// The gradient of a source, in the format of its values, from `grad`, in which its channels start at `first`.
pub(crate) fn part(source: &Source, grad: &Tensor, first: usize) -> Result<Tensor> {
    match (grad.dtype(), source.values.dtype()) {
        (DType::BF16, DType::BF16) => part_as::<half::bf16, half::bf16>(source, grad, first),
        (DType::BF16, _) => part_as::<half::bf16, f32>(source, grad, first),
        (_, DType::BF16) => part_as::<f32, half::bf16>(source, grad, first),
        _ => part_as::<f32, f32>(source, grad, first),
    }
}

fn part_as<F: Element, T: Element>(source: &Source, grad: &Tensor, first: usize) -> Result<Tensor> {
    let device = cuda_device(grad)?;
    let place = Place::new(source, first, grad.dim(D::Minus1)?)?;
    let count = source.values.elem_count();
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count) }?;
    let to = tensor(CudaStorage::wrap_cuda_slice(to, device.clone()), source.values.shape());
    let is_grouped = place.is_grouped([start(grad), start(&to)]);
    let count = if is_grouped { count / GROUP } else { count };
    let (from, address, n) = (address::<F>(grad)?, address::<T>(&to)?, count as u64);
    let name = name::<F, T>("map_part", is_grouped);
    launch!(&device, &name, per_element(count), &from, &address, &n, &place);
    Ok(to)
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
    let large = small * times * times;
    let (count, expected) = if back { (small, large) } else { (large, small) };
    if from.len() != expected {
        bail!("{} elements are not {expected}", from.len());
    }
    // SAFETY: the kernels write every element.
    #[allow(unsafe_code)]
    let to = unsafe { x.device.alloc::<f32>(count) }?;
    let c = channels as u32;
    let place = Place {
        height: height as u32,
        width: width as u32,
        times: times as u32,
        channels: c,
        own: c,
        first: 0,
        all: c,
    };
    let is_grouped = place.is_grouped([layout.start_offset(), 0]);
    let name = name::<f32, f32>(if back { "map_part" } else { "join_map" }, is_grouped);
    let count = if is_grouped { count / GROUP } else { count };
    let n = count as u64;
    launch!(&x.device, &name, per_element(count), &from, &to, &n, &place);
    Ok(CudaStorage::wrap_cuda_slice(to, x.device.clone()))
}

fn start(tensor: &Tensor) -> usize {
    tensor.layout().start_offset()
}

fn name<F: Element, T: Element>(name: &str, is_grouped: bool) -> String {
    format!("{name}_{}_{}{}", F::NAME, T::NAME, if is_grouped { "_grouped" } else { "" })
}

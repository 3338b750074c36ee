//! The optimizer's step, the gradient's norm, batches of images and dropout.

use candle_core::cuda::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{
    CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::layers::counters;
use super::{
    Element, address, address_or_null, cuda_device, grid, launch, per_element, tensor, view,
};
use crate::dispatch::not_on_the_cpu;
use crate::dropout::{DropSeed, threshold_and_scale};
use crate::optimizer::{AdamWSlot, AdamWStep};

/// Tensors of a launch, as in `training.cu`.
const SLOTS: usize = 32;
/// Blocks along a tensor, at most.
const BLOCKS: usize = 256;
/// Blocks along a tensor whose squares are added up.
const SUM_BLOCKS: usize = 48;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct AdamSlot {
    param: u64,
    grad: u64,
    first: u64,
    second: u64,
    average: u64,
    count: u64,
    decays: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SumSlot {
    from: u64,
    count: u64,
}

/// Elements that a thread takes at once.
const GROUP: usize = 8;

/// One launch's tensors.
#[repr(C)]
#[derive(Clone, Copy)]
struct Table<T>([T; SLOTS]);

// SAFETY: plain numbers, laid out as `training.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Table<AdamSlot> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Table<SumSlot> {}

/// One AdamW step on all slots, in place. `numbers` is what [`AdamWStep::numbers`] gives, on the device, and
/// `scale` one number there.
pub(crate) fn adamw(
    slots: &[AdamWSlot<'_>],
    numbers: &Tensor,
    scale: Option<&Tensor>,
) -> Result<()> {
    let Some(first) = slots.first() else { return Ok(()) };
    let device = cuda_device(first.param)?;
    let scale = address_or_null::<f32>(scale)?;
    if numbers.elem_count() != AdamWStep::NUMBERS {
        bail!("an AdamW step has {} numbers, not {}", AdamWStep::NUMBERS, numbers.elem_count());
    }
    let numbers = address::<f32>(numbers)?;
    for slots in slots.chunks(SLOTS) {
        let mut table = Table([AdamSlot::default(); SLOTS]);
        let mut longest = 0;
        for (to, slot) in table.0.iter_mut().zip(slots) {
            *to = AdamSlot {
                param: address::<f32>(slot.param)?,
                grad: address::<f32>(slot.grad)?,
                first: address::<f32>(slot.first_moment)?,
                second: address::<f32>(slot.second_moment)?,
                average: address_or_null::<f32>(slot.ema)?,
                count: slot.param.elem_count() as u64,
                decays: u64::from(slot.decays),
            };
            longest = longest.max(slot.param.elem_count());
        }
        let config = over(longest, slots.len());
        launch!(&device, "adamw", config, &table, &numbers, &scale);
    }
    Ok(())
}

/// `[2]`: the norm of all tensors together, and the factor that brings it down to `limit`.
pub(crate) struct NormAndScale<'a> {
    pub(crate) tensors: &'a [Tensor],
    pub(crate) limit: f64,
}

impl CustomOp1 for NormAndScale<'_> {
    fn name(&self) -> &'static str {
        "vq-norm-and-scale"
    }

    not_on_the_cpu!(_);

    fn cuda_fwd(&self, any: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = &any.device;
        let count = self.tensors.len() * SUM_BLOCKS;
        // Blocks beyond a tensor's end write their zero, so that every element is written.
        // SAFETY: the kernels write every element.
        #[allow(unsafe_code)]
        let (partial, to) = unsafe { (device.alloc::<f64>(count)?, device.alloc::<f32>(2)?) };
        for (index, tensors) in self.tensors.chunks(SLOTS).enumerate() {
            let mut table = Table([SumSlot::default(); SLOTS]);
            for (to, tensor) in table.0.iter_mut().zip(tensors) {
                *to = SumSlot { from: address::<f32>(tensor)?, count: tensor.elem_count() as u64 };
            }
            let first = index * SLOTS * SUM_BLOCKS;
            let Some(partial) = partial.try_slice(first..first + tensors.len() * SUM_BLOCKS) else {
                bail!("too few partial sums");
            };
            let config = grid(SUM_BLOCKS as u32, tensors.len() as u32);
            launch!(device, "squares", config, &table, &partial);
        }
        let (count, limit) = (count as u32, self.limit as f32);
        launch!(device, "norm_and_scale", grid(1, 1), &partial, &to, &count, &limit);
        Ok((CudaStorage::wrap_cuda_slice(to, device.clone()), 2.into()))
    }
}

/// See [`crate::gather_images`].
pub(crate) struct Images;

impl CustomOp3 for Images {
    fn name(&self) -> &'static str {
        "vq-images"
    }

    not_on_the_cpu!(_, _, _);

    fn cuda_fwd(
        &self,
        pixels: &CudaStorage,
        pixels_layout: &Layout,
        picks: &CudaStorage,
        picks_layout: &Layout,
        tables: &CudaStorage,
        tables_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (_, channels, height, width) = pixels_layout.shape().dims4()?;
        let count = picks_layout.shape().dims1()?;
        let device = &pixels.device;
        let pixels = view::<u8>(pixels, pixels_layout)?;
        let picks = view::<u32>(picks, picks_layout)?;
        let tables = view::<f32>(tables, tables_layout)?;
        let elements = count * channels * height * width;
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<f32>(elements) }?;
        let (b, c, h, w) = (count as u32, channels as u32, height as u32, width as u32);
        // A row starts where four bytes can be read at once.
        let is_grouped = width.is_multiple_of(4) && pixels_layout.start_offset().is_multiple_of(4);
        let (name, group) = if is_grouped { ("images_by_four", 4) } else { ("images", 1) };
        let config = per_element(elements / group);
        launch!(device, name, config, &pixels, &picks, &tables, &to, &b, &c, &h, &w);
        let shape = (count, channels, height, width).into();
        Ok((CudaStorage::wrap_cuda_slice(to, device.clone()), shape))
    }
}

/// See [`crate::dropout()`].
pub(crate) struct Dropout {
    /// Hashes below it are dropped.
    threshold: u32,
    scale: f32,
    /// u32 `[2]`, added to the other part.
    number: Option<Tensor>,
    known: u64,
}

impl Dropout {
    pub(crate) fn new(p: f64, seed: DropSeed<'_>) -> Result<Self> {
        let (number, known) = match seed {
            DropSeed::Known(seed) => (None, seed),
            DropSeed::OnDevice(number, known) if number.elem_count() == 2 => {
                (Some(number.clone()), known)
            }
            DropSeed::OnDevice(number, _) => {
                bail!("a seed on a device is u32 [2], not {:?}", number.shape())
            }
        };
        let (threshold, scale) = threshold_and_scale(p);
        Ok(Self { threshold, scale, number, known })
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "vq-dropout"
    }

    not_on_the_cpu!(_);

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = &x.device;
        let from = view::<f32>(x, layout)?;
        let count = layout.shape().elem_count();
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let to = unsafe { device.alloc::<f32>(count) }?;
        let (length, number) = (count as u64, address_or_null::<u32>(self.number.as_ref())?);
        let Self { threshold, scale, known, .. } = self;
        let config = per_element(count);
        launch!(device, "dropout", config, &from, &to, &length, &number, known, threshold, scale);
        Ok((CudaStorage::wrap_cuda_slice(to, device.clone()), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

/// Blocks for tensors of up to `longest` elements.
fn over(longest: usize, tensors: usize) -> candle_core::cuda::cudarc::driver::LaunchConfig {
    grid(longest.div_ceil(1024).clamp(1, BLOCKS) as u32, tensors as u32)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Numbers([u64; SLOTS]);

// SAFETY: plain numbers, laid out as `training.cu` declares them.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Numbers {}

/// See [`crate::collect_scalars`].
pub(crate) fn collect(scalars: &[Tensor]) -> Result<Tensor> {
    let Some(first) = scalars.first() else { bail!("no scalars") };
    let device = cuda_device(first)?;
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let mut to = unsafe { device.alloc::<f32>(scalars.len()) }?;
    for (index, some) in scalars.chunks(SLOTS).enumerate() {
        let mut table = Numbers([0; SLOTS]);
        for (place, scalar) in table.0.iter_mut().zip(some) {
            if scalar.elem_count() != 1 {
                bail!("{:?} is no scalar", scalar.shape());
            }
            *place = address::<f32>(scalar)?;
        }
        let first = index * SLOTS;
        let (n, mut to) = (some.len() as u32, to.slice_mut(first..first + some.len()));
        launch!(&device, "collect", grid(1, 1), &table, &mut to, &n);
    }
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), scalars.len()))
}

/// See [`crate::weighted_sum`].
pub(crate) fn weighted_sum(
    numbers: [(&CudaStorage, &Layout); 3],
    weights: [f64; 3],
) -> Result<CudaStorage> {
    let [(x, x_layout), (y, y_layout), (z, z_layout)] = numbers;
    let device = &x.device;
    let (x, y) = (view::<f32>(x, x_layout)?, view::<f32>(y, y_layout)?);
    let z = view::<f32>(z, z_layout)?;
    // SAFETY: the kernel writes it.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(1) }?;
    let [wx, wy, wz] = weights.map(|weight| weight as f32);
    launch!(device, "weighted_sum", grid(1, 1), &x, &y, &z, &to, &wx, &wy, &wz);
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// factor·Σ(a − b)² of contiguous f32 tensors of one shape: a scalar.
pub(crate) fn squared_error(
    (a, a_layout): (&CudaStorage, &Layout),
    (b, b_layout): (&CudaStorage, &Layout),
    factor: f64,
) -> Result<CudaStorage> {
    let device = &a.device;
    let (a, b) = (view::<f32>(a, a_layout)?, view::<f32>(b, b_layout)?);
    if a.len() != b.len() {
        bail!("{} numbers beside {}", a.len(), b.len());
    }
    let blocks = a.len().div_ceil(2048).clamp(1, 4 * BLOCKS);
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let (partial, to) = unsafe { (device.alloc::<f64>(blocks)?, device.alloc::<f32>(1)?) };
    let (n, counter) = (a.len() as u64, counters(device)?);
    let config = grid(blocks as u32, 1);
    launch!(device, "squared_error", config, &a, &b, &partial, &to, &counter, &n, &factor);
    Ok(CudaStorage::wrap_cuda_slice(to, device.clone()))
}

/// `factor` times the mean of (x − image)² of `x` `[B, H, W, C]` and images `[B, C, H, W]`, contiguous f32.
pub(crate) fn image_error(
    x: &Tensor,
    images: &Tensor,
    factor: f64,
) -> Result<(CudaStorage, Shape)> {
    let device = cuda_device(x)?;
    let (_, h, w, c) = x.dims4()?;
    let count = x.elem_count();
    if images.elem_count() != count {
        bail!("{:?} beside {:?}", images.shape(), x.shape());
    }
    let blocks = count.div_ceil(2048).clamp(1, 4 * BLOCKS);
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let (partial, to) = unsafe { (device.alloc::<f64>(blocks)?, device.alloc::<f32>(1)?) };
    let (x, images) = (address::<f32>(x)?, address::<f32>(images)?);
    let (n, counter, factor) = (count as u64, counters(&device)?, factor / count as f64);
    let (pixels, channels) = ((h * w) as u32, c as u32);
    let config = grid(blocks as u32, 1);
    launch!(
        &device,
        "image_error",
        config,
        &x,
        &images,
        &partial,
        &to,
        &counter,
        &n,
        &factor,
        &pixels,
        &channels
    );
    Ok((CudaStorage::wrap_cuda_slice(to, device), Shape::from(())))
}

/// The gradient of [`image_error`] in x where the scalar's is `grad`.
pub(crate) fn image_error_gradient(
    x: &Tensor,
    images: &Tensor,
    grad: &Tensor,
    factor: f64,
) -> Result<Tensor> {
    let device = cuda_device(x)?;
    let (_, h, w, c) = x.dims4()?;
    let count = x.elem_count();
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<f32>(count) }?;
    let (x_at, images_at) = (address::<f32>(x)?, address::<f32>(images)?);
    let grad_at = address::<f32>(grad)?;
    let (n, factor) = (count as u64, (2. * factor / count as f64) as f32);
    let (pixels, channels) = ((h * w) as u32, c as u32);
    let name = "image_error_gradient";
    let config = per_element(count);
    launch!(
        &device, name, config, &x_at, &images_at, &grad_at, &to, &n, &factor, &pixels, &channels
    );
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), x.shape()))
}

/// The mean of (a − b)² of contiguous f32 tensors of one shape.
pub(crate) fn mean_squared_error(a: &Tensor, b: &Tensor) -> Result<(CudaStorage, Shape)> {
    let ((a_storage, a_layout), (b_storage, b_layout)) =
        (a.storage_and_layout(), b.storage_and_layout());
    let (Storage::Cuda(x), Storage::Cuda(y)) = (&*a_storage, &*b_storage) else {
        bail!("needs tensors on the CUDA device")
    };
    let factor = 1. / a.elem_count() as f64;
    Ok((squared_error((x, a_layout), (y, b_layout), factor)?, Shape::from(())))
}

/// The gradient of the mean of (a − b)², times `grad`, in a: of that type and of the shape of a.
pub(crate) fn error_gradient(
    a: &Tensor,
    b: &Tensor,
    grad: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    match dtype {
        DType::BF16 => error_gradient_as::<half::bf16>(a, b, grad),
        _ => error_gradient_as::<f32>(a, b, grad),
    }
}

fn error_gradient_as<T: Element>(a: &Tensor, b: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let device = cuda_device(a)?;
    let count = a.elem_count();
    if b.elem_count() != count {
        bail!("{:?} beside {:?}", a.shape(), b.shape());
    }
    // SAFETY: the kernel writes every element.
    #[allow(unsafe_code)]
    let to = unsafe { device.alloc::<T>(count) }?;
    let (a_at, b_at, grad_at) = (address::<f32>(a)?, address::<f32>(b)?, address::<f32>(grad)?);
    let is_grouped = count.is_multiple_of(GROUP)
        && [a, b].iter().all(|x| x.layout().start_offset().is_multiple_of(GROUP));
    let (group, ending) = if is_grouped { (GROUP, "_grouped") } else { (1, "") };
    let name = format!("error_gradient_{}{ending}", T::NAME);
    let (n, factor) = ((count / group) as u64, (2. / count as f64) as f32);
    let config = per_element(count / group);
    launch!(&device, &name, config, &a_at, &b_at, &grad_at, &to, &n, &factor);
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device), a.shape()))
}

/// The gradients of [`squared_error`] where the scalar's is `grad`.
pub(crate) fn squared_error_gradients(
    a: &Tensor,
    b: &Tensor,
    grad: &Tensor,
    factor: f64,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let device = cuda_device(a)?;
    let make = |of: &Tensor| -> Result<Option<Tensor>> {
        if !of.track_op() {
            return Ok(None);
        }
        // SAFETY: the kernel writes every element.
        #[allow(unsafe_code)]
        let slice = unsafe { device.alloc::<f32>(of.elem_count()) }?;
        Ok(Some(tensor(CudaStorage::wrap_cuda_slice(slice, device.clone()), of.shape())))
    };
    let (of_a, of_b) = (make(a)?, make(b)?);
    let (a_at, b_at, grad_at) = (address::<f32>(a)?, address::<f32>(b)?, address::<f32>(grad)?);
    let to_a = address_or_null::<f32>(of_a.as_ref())?;
    let to_b = address_or_null::<f32>(of_b.as_ref())?;
    let (n, factor, config) =
        (a.elem_count() as u64, (2. * factor) as f32, per_element(a.elem_count()));
    let name = "squared_error_gradient";
    launch!(&device, name, config, &a_at, &b_at, &grad_at, &to_a, &to_b, &n, &factor);
    Ok((of_a, of_b))
}

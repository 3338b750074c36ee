//! The operations on CUDA: kernels of our own, compiled for the device at hand when they are first
//! needed, and cuDNN's convolutions. All of it runs on the stream of the tensors' device, in order.

pub(crate) mod codebook;
pub(crate) mod convolution;
pub(crate) mod joined;
pub(crate) mod layers;
pub(crate) mod pixels;
pub(crate) mod recording;
pub(crate) mod training;
pub(crate) mod weights;
pub(crate) mod windows;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::cuda::cudarc::cudnn::CudnnDataType;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaStream, CudaView, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice,
    ValidAsZeroBits, result, sys,
};
use candle_core::cuda::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda::{CudaDType, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};

const SOURCE: &str = concat!(
    include_str!("kernels/common.cu"),
    include_str!("kernels/layers.cu"),
    include_str!("kernels/codebook.cu"),
    include_str!("kernels/training.cu"),
    include_str!("kernels/pixels.cu"),
);
const MODULE: &str = "vq-ops";
/// Threads of a block, where the kernel does not say otherwise.
const THREADS: u32 = 256;
/// Blocks from which on each thread takes several elements.
const MOST_BLOCKS: u32 = 8192;

static STRICT_F32: AtomicBool = AtomicBool::new(false);

/// Whether f32 products are taken in full, and not with factors rounded to TF32 (10 bits of mantissa).
pub(crate) fn is_strict() -> bool {
    STRICT_F32.load(Ordering::Relaxed)
}

pub(crate) fn set_strict(strict: bool) {
    STRICT_F32.store(strict, Ordering::Relaxed);
}

/// Compiles the kernels and opens cuDNN, so that what is missing is missed now; and lets the device keep the
/// memory that was freed, and make no events for each allocation.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    // SAFETY: everything runs in the order of one queue per thread, and whoever hands a tensor to another
    // thread waits for its queue first, as the loader does: events would order nothing more.
    #[allow(unsafe_code)]
    unsafe {
        device.disable_event_tracking();
    }
    keep_memory(device)?;
    function(device, "adamw")?;
    convolution::prepare(device)
}

/// Without this the pool gives all free memory back to the driver whenever somebody waits for the device.
fn keep_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's, the pool is the device's, and this attribute is an u64.
    #[allow(unsafe_code)]
    let set = unsafe {
        result::device::get_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut threshold).cast(),
            )
        })
    };
    set.w()
}

/// Waits for a queue; also where something went wrong before, which the bindings say instead of waiting.
pub(crate) fn wait(stream: &CudaStream) -> Result<()> {
    let waited = stream.synchronize().inspect_err(|_| {
        let _ = stream.synchronize();
    });
    waited.w()
}

/// Page-locked memory of the host, all 0.
pub(crate) fn lock_memory(device: &CudaDevice, len: usize) -> Result<PinnedHostSlice<u8>> {
    let stream = device.cuda_stream();
    // SAFETY: any bytes are u8s, and all of them are set below.
    #[allow(unsafe_code)]
    let locked = unsafe { stream.context().alloc_pinned_with_flags::<u8>(len, 0) };
    let mut locked = locked.w()?;
    locked.as_mut_slice().w()?.fill(0);
    Ok(locked)
}

/// A copy on the device; comes back when it is there, for whichever thread uses it.
pub(crate) fn upload(bytes: &PinnedHostSlice<u8>, shape: Shape, device: &Device) -> Result<Tensor> {
    let Device::Cuda(device) = device else { bail!("needs the CUDA device") };
    // SAFETY: the copy writes every element.
    #[allow(unsafe_code)]
    let mut to = unsafe { device.alloc::<u8>(bytes.len()) }?;
    let sent = device.memcpy_htod(bytes, &mut to);
    // In any case: the memory must stay as long as it is read.
    wait(&device.cuda_stream())?;
    sent?;
    Ok(tensor(CudaStorage::wrap_cuda_slice(to, device.clone()), shape))
}

/// Types of a feature map's elements.
pub(crate) trait Element:
    CudaDType + CudnnDataType + DeviceRepr + ValidAsZeroBits + 'static
{
    /// As the kernels' names end.
    const NAME: &'static str;
    const ZERO: Self;
    const ONE: Self;
    /// Elements of 16 bytes, which kernels read at once.
    const GROUP: usize = 16 / size_of::<Self>();
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const ZERO: Self = 0.;
    const ONE: Self = 1.;
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    const ZERO: Self = Self::ZERO;
    const ONE: Self = Self::ONE;
}

/// Runs `$body` with `$T` as the type of the elements of `$storage`.
macro_rules! with_element {
    ($storage:expr, $T:ident, $body:expr) => {
        match $storage.slice {
            candle_core::cuda::CudaStorageSlice::F32(_) => {
                type $T = f32;
                $body
            }
            candle_core::cuda::CudaStorageSlice::BF16(_) => {
                type $T = half::bf16;
                $body
            }
            _ => candle_core::bail!("needs elements of f32 or bf16"),
        }
    };
}
pub(crate) use with_element;

/// Launches a kernel of `kernels/`; the arguments are references to views, slices and numbers.
macro_rules! launch {
    ($device:expr, $name:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        let function = $crate::cuda::function($device, $name)?;
        let stream = $device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        $(builder.arg($argument);)+
        // SAFETY: the arguments are those of the kernel's declaration, in its order and its types; the
        // kernels stay within the lengths that they are given, which are those of the tensors.
        #[allow(unsafe_code)]
        let launched = unsafe { builder.launch($config) };
        candle_core::cuda::WrapErr::w(launched)?;
    }};
}
pub(crate) use launch;

/// The kernel of that name.
pub(crate) fn function(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
    type Functions = HashMap<DeviceId, HashMap<String, CudaFunction>>;
    static FOUND: RwLock<Option<Functions>> = RwLock::new(None);
    let found = FOUND.read().unwrap_or_else(PoisonError::into_inner);
    let known = found.as_ref().and_then(|found| found.get(&device.id())?.get(name));
    if let Some(function) = known {
        return Ok(function.clone());
    }
    drop(found);
    let function = device.get_or_load_custom_func(name, MODULE, &ptx(device)?)?;
    let function = function.into_cuda_function();
    let mut found = FOUND.write().unwrap_or_else(PoisonError::into_inner);
    let of_device = found.get_or_insert_default().entry(device.id()).or_default();
    of_device.insert(name.to_owned(), function.clone());
    Ok(function)
}

/// The kernels, compiled once per device.
fn ptx(device: &CudaDevice) -> Result<Arc<str>> {
    static COMPILED: RwLock<Option<HashMap<DeviceId, Arc<str>>>> = RwLock::new(None);
    let known = COMPILED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(ptx) = known.as_ref().and_then(|known| known.get(&device.id())) {
        return Ok(ptx.clone());
    }
    drop(known);
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    let options = CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{major}{minor}")],
        ..CompileOptions::default()
    };
    let ptx: Arc<str> = match compile_ptx_with_opts(SOURCE, options) {
        Ok(ptx) => ptx.to_src().into(),
        Err(error) => bail!("the CUDA kernels do not compile: {error:?}"),
    };
    let mut known = COMPILED.write().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(device.id(), ptx.clone());
    Ok(ptx)
}

/// One thread per element, up to a limit; the kernels go on from there in strides.
pub(crate) fn per_element(count: usize) -> LaunchConfig {
    let blocks = u32::try_from(count.div_ceil(THREADS as usize)).unwrap_or(MOST_BLOCKS);
    grid(blocks.clamp(1, MOST_BLOCKS), 1)
}

/// Blocks of [`THREADS`] threads.
pub(crate) fn grid(x: u32, y: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// The elements of a contiguous tensor.
pub(crate) fn view<'a, T: CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    let elements = storage.as_cuda_slice::<T>()?;
    let view = layout.contiguous_offsets().and_then(|(first, end)| elements.try_slice(first..end));
    match view {
        Some(view) => Ok(view),
        None => bail!("needs a contiguous tensor"),
    }
}

/// Where the elements of a contiguous tensor lie. Good as long as the tensor is.
pub(crate) fn address<T: CudaDType>(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("needs a tensor on the CUDA device") };
    let stream = storage.device.cuda_stream();
    let view = view::<T>(storage, layout)?;
    // Everything runs on one stream, so there is nothing to wait for.
    let (address, _record) = view.device_ptr(&stream);
    Ok(address)
}

/// [`address`], or the null pointer.
pub(crate) fn address_or_null<T: CudaDType>(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), address::<T>)
}

/// A tensor of its own.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// The device that a tensor lies on.
pub(crate) fn cuda_device(tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => bail!("needs tensors on the CUDA device"),
    }
}

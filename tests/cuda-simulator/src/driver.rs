//! The driver's interface ("libcuda"): those of its calls that cudarc makes.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use crate::memory::MEMORY;
use crate::ptx;
use crate::queue::{Code, Failure, Step, Work, World, new_handle, queue_of, say, world};

/// Does it, and says what went wrong.
pub(crate) fn call(name: &str, work: impl FnOnce(&mut World) -> Result<(), Failure>) -> u32 {
    match work(&mut world()) {
        Ok(()) => Code::SUCCESS.0,
        Err(failure) => {
            say(&format!("{name}: {}", failure.text));
            failure.code.0
        }
    }
}

/// Writes to where a caller wants a result.
///
/// # Safety
///
/// It is null, or memory of a T.
unsafe fn put<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: as the caller says.
        unsafe { to.write(value) };
    }
}

/// Makes something and gives its address as a handle.
///
/// # Safety
///
/// There is room for the handle.
pub(crate) unsafe fn create<T>(handle: *mut *mut T, new: T) -> u32 {
    unsafe { handle.write(Box::into_raw(Box::new(new))) };
    0
}

/// Ends what [`create`] has made.
///
/// # Safety
///
/// It has made it, and nobody uses it any more.
pub(crate) unsafe fn destroy<T>(handle: *mut T) -> u32 {
    drop(unsafe { Box::from_raw(handle) });
    0
}

/// Has a queue do something later.
pub(crate) fn later(
    world: &mut World,
    stream: u64,
    work: impl Fn() -> Result<(), Failure> + Send + Sync + 'static,
) -> Result<(), Failure> {
    let work: Work = Arc::new(work);
    world.push(queue_of(stream), Step::Work(work))
}

/// Whether every kernel is named, with the time that it has taken here.
static IS_TRACED: LazyLock<bool> =
    LazyLock::new(|| std::env::var_os("CUDA_SIMULATOR_TRACE").is_some());

const DEVICE: c_int = 0;
const CONTEXT: u64 = 0x100;
const POOL: u64 = 0x200;
const NAME: &CStr = c"CUDA simulator";
const MEMORY_SIZE: usize = 80 << 30;

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> u32 {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> u32 {
    unsafe { put(version, 13_000) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> u32 {
    unsafe { put(count, 1) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> u32 {
    if ordinal != DEVICE {
        return 101;
    }
    unsafe { put(device, DEVICE) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> u32 {
    let bytes = NAME.to_bytes_with_nul();
    if (len as usize) < bytes.len() {
        return Code::INVALID_VALUE.0;
    }
    unsafe { name.copy_from_nonoverlapping(bytes.as_ptr().cast(), bytes.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> u32 {
    unsafe { put(bytes, MEMORY_SIZE) };
    0
}

/// As an H100 says.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(
    to: *mut c_int,
    attribute: c_uint,
    _device: c_int,
) -> u32 {
    let value = match attribute {
        // Threads of a block.
        1..=3 => 1024,
        4 => 64,
        // Blocks.
        5 => i32::MAX,
        6 | 7 => 65_535,
        // Shared memory and registers of a block.
        8 => 48 << 10,
        10 => 32,
        12 => 65_536,
        // Multiprocessors.
        16 => 132,
        39 => 2048,
        // Compute capability.
        75 => 9,
        76 => 0,
        81 => 228 << 10,
        97 => 227 << 10,
        // Memory pools.
        115 => 1,
        other => {
            say(&format!("cuDeviceGetAttribute: nothing is known of attribute {other}"));
            return Code::INVALID_VALUE.0;
        }
    };
    unsafe { put(to, value) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut u64, _device: c_int) -> u32 {
    unsafe { put(context, CONTEXT) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> u32 {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut u64) -> u32 {
    unsafe { put(context, CONTEXT) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(_context: u64) -> u32 {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    call("cuCtxSynchronize", World::wait_for_all)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetMemPool(pool: *mut u64, _device: c_int) -> u32 {
    unsafe { put(pool, POOL) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut u64, device: c_int) -> u32 {
    unsafe { cuDeviceGetMemPool(pool, device) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolSetAttribute(pool: u64, _attribute: c_uint, _value: *mut c_void) -> u32 {
    if pool == POOL { 0 } else { Code::INVALID_HANDLE.0 }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32 {
    unsafe {
        put(free, MEMORY_SIZE.saturating_sub(MEMORY.used()));
        put(total, MEMORY_SIZE);
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: u64) -> u32 {
    call("cuMemAllocAsync", |world| {
        if bytes == 0 {
            return Err(Failure::new(Code::INVALID_VALUE, "no bytes"));
        }
        let allocated = world.allocate(queue_of(stream), bytes)?;
        unsafe { put(address, allocated) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(address: u64, stream: u64) -> u32 {
    call("cuMemFreeAsync", |world| world.free(queue_of(stream), address))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(to: *mut *mut c_void, bytes: usize, _flags: c_uint) -> u32 {
    call("cuMemHostAlloc", |world| {
        let host = vec![0u8; bytes].into_boxed_slice();
        let address = Box::into_raw(host).cast::<u8>();
        world.lock_host(address as u64, bytes);
        unsafe { put(to, address.cast()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> u32 {
    call("cuMemFreeHost", |world| {
        // As the driver does.
        world.wait_for_all()?;
        let Some(len) = world.unlock_host(address as u64) else {
            return Err(Failure::new(Code::INVALID_VALUE, "this memory is not the driver's"));
        };
        // SAFETY: it was made from a box of that length.
        drop(unsafe {
            Box::from_raw(std::ptr::slice_from_raw_parts_mut(address.cast::<u8>(), len))
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    len: usize,
    stream: u64,
) -> u32 {
    call("cuMemcpyHtoDAsync", |world| {
        let from = from as u64;
        if world.is_locked(from) {
            return later(world, stream, move || {
                // SAFETY: who gives page-locked memory keeps it until the copy is made.
                let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
                MEMORY.slice_mut::<u8>(to, len, "a copy to the device")?.copy_from_slice(bytes);
                Ok(())
            });
        }
        world
            .not_while_recording(queue_of(stream), "a copy from memory that is not page-locked")?;
        // The driver takes such memory's content with it before it returns.
        // SAFETY: the caller's memory, of that length.
        let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) }.to_vec();
        later(world, stream, move || {
            MEMORY.slice_mut::<u8>(to, len, "a copy to the device")?.copy_from_slice(&bytes);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    len: usize,
    stream: u64,
) -> u32 {
    call("cuMemcpyDtoHAsync", |world| {
        let to = to as u64;
        let is_locked = world.is_locked(to);
        if !is_locked {
            world.not_while_recording(
                queue_of(stream),
                "a copy to memory that is not page-locked",
            )?;
        }
        later(world, stream, move || {
            let bytes = MEMORY.slice::<u8>(from, len, "a copy to the host")?;
            // SAFETY: who gives the memory keeps it until the copy is made.
            unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) }.copy_from_slice(bytes);
            Ok(())
        })?;
        // The driver returns only when such memory is written.
        if is_locked { Ok(()) } else { world.wait(queue_of(stream)) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: u64) -> u32 {
    call("cuMemcpyDtoDAsync", |world| {
        later(world, stream, move || {
            let bytes = MEMORY.slice::<u8>(from, len, "a copy's source")?.to_vec();
            MEMORY.slice_mut::<u8>(to, len, "a copy's target")?.copy_from_slice(&bytes);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, value: u8, len: usize, stream: u64) -> u32 {
    call("cuMemsetD8Async", |world| {
        later(world, stream, move || {
            MEMORY.slice_mut::<u8>(to, len, "a fill")?.fill(value);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut u64, _flags: c_uint) -> u32 {
    unsafe { put(stream, new_handle()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: u64) -> u32 {
    call("cuStreamDestroy", |world| world.drop_queue(queue_of(stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: u64) -> u32 {
    call("cuStreamSynchronize", |world| world.wait(queue_of(stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: u64) -> u32 {
    if world().is_idle(queue_of(stream)) { 0 } else { Code::NOT_READY.0 }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, _flags: c_uint) -> u32 {
    call("cuStreamWaitEvent", |world| world.wait_in_queue(queue_of(stream), event))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: u64, _mode: c_uint) -> u32 {
    call("cuStreamBeginCapture", |world| world.begin_capture(queue_of(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> u32 {
    call("cuStreamEndCapture", |world| {
        unsafe { put(graph, 0) };
        let handle = world.end_capture(queue_of(stream))?;
        unsafe { put(graph, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: u64, status: *mut c_uint) -> u32 {
    let is_good = world().recording(queue_of(stream));
    unsafe { put(status, is_good.map_or(0, |is_good| if is_good { 1 } else { 2 })) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut u64, _flags: c_uint) -> u32 {
    let handle = world().new_event();
    unsafe { put(event, handle) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: u64) -> u32 {
    call("cuEventDestroy", |world| world.drop_event(event))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: u64, stream: u64) -> u32 {
    call("cuEventRecord", |world| world.record(event, queue_of(stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: u64) -> u32 {
    call("cuEventSynchronize", |world| world.wait_for_event(event))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: u64) -> u32 {
    match world().event_is_done(event) {
        Ok(true) => 0,
        Ok(false) => Code::NOT_READY.0,
        Err(failure) => failure.code.0,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, _first: u64, _last: u64) -> u32 {
    // A simulation's times mean nothing.
    unsafe { put(milliseconds, 1.) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(to: *mut u64, graph: u64, _flags: u64) -> u32 {
    call("cuGraphInstantiateWithFlags", |world| {
        let graph = world.graph(graph)?;
        let handle = world.add_graph(graph);
        unsafe { put(to, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(graph: u64, stream: u64) -> u32 {
    call("cuGraphLaunch", |world| {
        let graph = world.graph(graph)?;
        world.push(queue_of(stream), Step::Graph(graph))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: u64) -> u32 {
    call("cuGraphDestroy", |world| world.drop_graph(graph))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(graph: u64) -> u32 {
    call("cuGraphExecDestroy", |world| world.drop_graph(graph))
}

/// A module's handle is its address.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *mut ptx::Module, image: *const c_char) -> u32 {
    call("cuModuleLoadData", |_| {
        // SAFETY: cudarc gives PTX, as text that ends.
        let text = unsafe { CStr::from_ptr(image) };
        let text = text.to_str().map_err(|_| Failure::new(Code::INVALID_PTX, "this is no text"))?;
        let parsed =
            ptx::Module::parse(text).map_err(|why| Failure::new(Code::INVALID_PTX, why))?;
        unsafe { create(module, parsed) };
        Ok(())
    })
}

/// Kernels may be under way, so that nothing is given back.
#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(_module: *mut ptx::Module) -> u32 {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *const ptx::Kernel,
    module: *const ptx::Module,
    name: *const c_char,
) -> u32 {
    call("cuModuleGetFunction", |_| {
        // SAFETY: a handle that cuModuleLoadData gave, and a name that ends.
        let (module, name) = unsafe { (&*module, CStr::from_ptr(name)) };
        let name = name.to_string_lossy();
        match module.kernel(&name) {
            Some(Ok(kernel)) => {
                // It stays, as its module does.
                unsafe { put(function, Arc::into_raw(kernel)) };
                Ok(())
            }
            Some(Err(why)) => Err(Failure::new(Code::INVALID_PTX, format!("{name}: {why}"))),
            None => Err(Failure::new(Code::NOT_FOUND, format!("there is no kernel {name}"))),
        }
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cuLaunchKernel(
    function: *const ptx::Kernel,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: u64,
    parameters: *const *const u8,
    _extra: *mut *mut c_void,
) -> u32 {
    call("cuLaunchKernel", |world| {
        // SAFETY: a handle that cuModuleGetFunction gave; it is never given back.
        let kernel: &'static ptx::Kernel = unsafe { &*function };
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads = block.iter().map(|&n| u64::from(n)).product::<u64>();
        if grid.contains(&0) || threads == 0 || threads > 1024 || grid_y > 65_535 || grid_z > 65_535
        {
            let text = format!("{}: {grid:?} blocks of {block:?} threads", kernel.name());
            return Err(Failure::new(Code::INVALID_VALUE, text));
        }
        let shared = kernel.static_shared_bytes() + shared_bytes as usize;
        if shared > 48 << 10 {
            let text = format!("{}: {shared} bytes of shared memory", kernel.name());
            return Err(Failure::new(Code::INVALID_VALUE, text));
        }
        let len = kernel.parameters().last().map_or(0, |&(offset, size)| offset + size);
        let mut bytes = vec![0u8; len];
        for (i, &(offset, size)) in kernel.parameters().iter().enumerate() {
            // SAFETY: there is a pointer for each parameter, to as many bytes as it has.
            unsafe {
                let from = *parameters.add(i);
                bytes.as_mut_ptr().add(offset).copy_from_nonoverlapping(from, size);
            }
        }
        later(world, stream, move || {
            let start = Instant::now();
            let done = kernel.run(grid, block, shared_bytes as usize, &bytes, &MEMORY);
            if *IS_TRACED {
                let name = kernel.name();
                say(&format!(
                    "{:.1} ms: {name}, {grid:?} × {block:?}",
                    start.elapsed().as_secs_f64() * 1e3
                ));
            }
            done.map_err(|fault| Failure::new(Code::LAUNCH_FAILED, fault.to_string()))
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(_error: u32, text: *mut *const c_char) -> u32 {
    unsafe { put(text, c"an error of the CUDA simulator".as_ptr()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(_error: u32, text: *mut *const c_char) -> u32 {
    unsafe { put(text, c"see what the CUDA simulator printed".as_ptr()) };
    0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A copy on the device, in its default queue.
    pub(crate) fn upload<T: Copy>(values: &[T]) -> u64 {
        let (mut address, bytes) = (0, size_of_val(values));
        unsafe {
            assert_eq!(cuMemAllocAsync(&raw mut address, bytes, 2), 0);
            assert_eq!(cuMemcpyHtoDAsync_v2(address, values.as_ptr().cast(), bytes, 2), 0);
        }
        address
    }

    /// What lies there, once all before is done.
    pub(crate) fn download<T: Copy + Default>(address: u64, len: usize) -> Vec<T> {
        let mut to = vec![T::default(); len];
        let bytes = size_of_val(&to[..]);
        assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), address, bytes, 2) }, 0);
        to
    }

    #[test]
    fn copies_take_what_was_there_when_they_were_asked_for() {
        let mut values = vec![1u32, 2, 3];
        let address = upload(&values);
        values.fill(9);
        let mut other = 0;
        assert_eq!(unsafe { cuMemAllocAsync(&raw mut other, 12, 2) }, 0);
        assert_eq!(cuMemcpyDtoDAsync_v2(other, address, 12, 2), 0);
        assert_eq!(cuMemsetD8Async(address, 1, 4, 2), 0);
        assert_eq!(download::<u32>(other, 3), [1, 2, 3]);
        assert_eq!(download::<u32>(address, 3), [0x0101_0101, 2, 3]);
        assert_eq!(cuMemFreeAsync(other, 2), 0);
        let mut nothing = [0u32];
        let code = unsafe { cuMemcpyDtoHAsync_v2(nothing.as_mut_ptr().cast(), other, 4, 2) };
        assert_eq!(code, Code::ILLEGAL_ADDRESS.0);
    }

    #[test]
    fn page_locked_memory_is_read_when_the_device_comes_to_it() {
        let (mut host, mut address) = (std::ptr::null_mut::<c_void>(), 0);
        unsafe {
            assert_eq!(cuMemHostAlloc(&raw mut host, 4, 0), 0);
            assert_eq!(cuMemAllocAsync(&raw mut address, 4, 2), 0);
            host.cast::<u32>().write(1);
            assert_eq!(cuMemcpyHtoDAsync_v2(address, host, 4, 2), 0);
            host.cast::<u32>().write(2);
        }
        assert_eq!(download::<u32>(address, 1), [2]);
        assert_eq!(unsafe { cuMemFreeHost(host) }, 0);
        assert_eq!(unsafe { cuMemFreeHost(host) }, Code::INVALID_VALUE.0);
    }

    #[test]
    fn each_thread_has_a_default_queue() {
        let own = queue_of(2);
        assert_eq!(queue_of(2), own);
        assert_ne!(std::thread::spawn(|| queue_of(2)).join().unwrap(), own);
        assert_eq!((queue_of(0), queue_of(0x1230)), (1, 0x1230));
    }
}

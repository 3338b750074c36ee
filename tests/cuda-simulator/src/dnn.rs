//! Convolutions ("libcudnn").

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::driver::{call, create, destroy, later};
use crate::memory::MEMORY;
use crate::numbers::{Format, load, multiply, store, to_tf32};
use crate::queue::{Code, Failure};

const BAD_PARAM: Code = Code(2000);
const NOT_SUPPORTED: Code = Code(3000);

/// What a tensor is made of, its sizes (images, channels, height, width) and how far apart neighbours are.
#[derive(Clone, Copy, Default)]
struct Tensor {
    format: Option<Format>,
    sizes: [usize; 4],
    steps: [usize; 4],
}

#[derive(Clone, Copy, Default)]
struct Convolution {
    padding: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    math: c_uint,
    groups: c_int,
}

impl Tensor {
    fn format(&self) -> Result<Format, Failure> {
        self.format.ok_or_else(|| Failure::new(BAD_PARAM, "a tensor that is not described"))
    }

    /// Elements from the first to the last.
    fn span(&self) -> usize {
        if self.sizes.contains(&0) {
            return 0;
        }
        self.sizes.iter().zip(self.steps).map(|(size, step)| (size - 1) * step).sum::<usize>() + 1
    }

    /// Where each element lies, in the order [channels][images][height][width].
    fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let [n, c, h, w] = self.sizes;
        let [of_n, of_c, of_h, of_w] = self.steps;
        let planes = (0..c).flat_map(move |c| (0..n).map(move |n| n * of_n + c * of_c));
        let lines = planes.flat_map(move |plane| (0..h).map(move |y| plane + y * of_h));
        lines.flat_map(move |line| (0..w).map(move |x| line + x * of_w))
    }
}

fn format(of: c_uint) -> Result<Format, Failure> {
    let none = || Failure::new(NOT_SUPPORTED, format!("there are no tensors of type {of}"));
    Format::of(of, 9).ok_or_else(none)
}

fn size(n: c_int) -> Result<usize, Failure> {
    usize::try_from(n).map_err(|_| Failure::new(BAD_PARAM, format!("a size of {n}")))
}

#[unsafe(no_mangle)]
extern "C" fn cudnnGetVersion() -> usize {
    91_000
}

/// A handle is the address of its queue.
#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnCreate(handle: *mut *mut u64) -> u32 {
    unsafe { create(handle, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnDestroy(handle: *mut u64) -> u32 {
    unsafe { destroy(handle) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnSetStream(handle: *mut u64, stream: u64) -> u32 {
    unsafe { handle.write(stream) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cudnnGetErrorString(_status: u32) -> *const c_char {
    c"see what the CUDA simulator printed".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnCreateTensorDescriptor(to: *mut *mut Tensor) -> u32 {
    unsafe { create(to, Tensor::default()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnDestroyTensorDescriptor(tensor: *mut Tensor) -> u32 {
    unsafe { destroy(tensor) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnCreateFilterDescriptor(to: *mut *mut Tensor) -> u32 {
    unsafe { cudnnCreateTensorDescriptor(to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnDestroyFilterDescriptor(tensor: *mut Tensor) -> u32 {
    unsafe { cudnnDestroyTensorDescriptor(tensor) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnSetTensor4dDescriptor(
    tensor: *mut Tensor,
    order: c_uint,
    of: c_uint,
    n: c_int,
    c: c_int,
    h: c_int,
    w: c_int,
) -> u32 {
    call("cudnnSetTensor4dDescriptor", |_| {
        let [_, c, h, w] = [size(n)?, size(c)?, size(h)?, size(w)?];
        let steps = match order {
            0 => [c * h * w, h * w, w, 1],
            1 => [c * h * w, 1, w * c, c],
            _ => return Err(Failure::new(NOT_SUPPORTED, format!("there is no order {order}"))),
        };
        unsafe {
            *tensor = Tensor { format: Some(format(of)?), sizes: [size(n)?, c, h, w], steps }
        };
        Ok(())
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cudnnSetTensor4dDescriptorEx(
    tensor: *mut Tensor,
    of: c_uint,
    n: c_int,
    c: c_int,
    h: c_int,
    w: c_int,
    n_step: c_int,
    c_step: c_int,
    h_step: c_int,
    w_step: c_int,
) -> u32 {
    call("cudnnSetTensor4dDescriptorEx", |_| {
        let sizes = [size(n)?, size(c)?, size(h)?, size(w)?];
        let steps = [size(n_step)?, size(c_step)?, size(h_step)?, size(w_step)?];
        unsafe { *tensor = Tensor { format: Some(format(of)?), sizes, steps } };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnSetFilter4dDescriptor(
    filter: *mut Tensor,
    of: c_uint,
    order: c_uint,
    k: c_int,
    c: c_int,
    h: c_int,
    w: c_int,
) -> u32 {
    unsafe { cudnnSetTensor4dDescriptor(filter, order, of, k, c, h, w) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnCreateConvolutionDescriptor(to: *mut *mut Convolution) -> u32 {
    unsafe { create(to, Convolution::default()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnDestroyConvolutionDescriptor(convolution: *mut Convolution) -> u32 {
    unsafe { destroy(convolution) }
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cudnnSetConvolution2dDescriptor(
    convolution: *mut Convolution,
    padding_h: c_int,
    padding_w: c_int,
    stride_h: c_int,
    stride_w: c_int,
    dilation_h: c_int,
    dilation_w: c_int,
    mode: c_uint,
    compute: c_uint,
) -> u32 {
    call("cudnnSetConvolution2dDescriptor", |_| {
        if (mode, compute) != (1, 0) {
            let text = format!("convolutions of mode {mode} in type {compute}");
            return Err(Failure::new(NOT_SUPPORTED, text));
        }
        unsafe {
            *convolution = Convolution {
                padding: [size(padding_h)?, size(padding_w)?],
                stride: [size(stride_h)?, size(stride_w)?],
                dilation: [size(dilation_h)?, size(dilation_w)?],
                math: 0,
                groups: 1,
            };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnSetConvolutionMathType(
    convolution: *mut Convolution,
    math: c_uint,
) -> u32 {
    unsafe { (*convolution).math = math };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnSetConvolutionGroupCount(
    convolution: *mut Convolution,
    groups: c_int,
) -> u32 {
    unsafe { (*convolution).groups = groups };
    0
}

/// One convolution: the larger map, the smaller one and the weight, [of the smaller][of the larger].
#[derive(Clone, Copy)]
struct Plan {
    large: Tensor,
    small: Tensor,
    weight: Tensor,
    convolution: Convolution,
}

impl Plan {
    /// # Safety
    ///
    /// They are descriptions that were made above.
    unsafe fn new(
        large: *const Tensor,
        small: *const Tensor,
        weight: *const Tensor,
        convolution: *const Convolution,
    ) -> Result<Self, Failure> {
        let plan = unsafe {
            Self { large: *large, small: *small, weight: *weight, convolution: *convolution }
        };
        let formats = [plan.large.format()?, plan.small.format()?, plan.weight.format()?];
        if formats.iter().any(|&format| format != formats[0]) || plan.convolution.groups != 1 {
            let text = format!("{formats:?} in {} groups", plan.convolution.groups);
            return Err(Failure::new(NOT_SUPPORTED, text));
        }
        let Convolution { padding, stride, dilation, .. } = plan.convolution;
        let (large, small, weight) = (plan.large.sizes, plan.small.sizes, plan.weight.sizes);
        let fits = large[0] == small[0]
            && weight[0] == small[1]
            && weight[1] == large[1]
            && (0..2).all(|axis| {
                let own = large[2 + axis] + 2 * padding[axis];
                let reach = dilation[axis] * weight[2 + axis].saturating_sub(1) + 1;
                stride[axis] > 0
                    && own >= reach
                    && (own - reach) / stride[axis] + 1 == small[2 + axis]
            });
        if !fits {
            let text = format!(
                "{large:?}, {small:?} and {weight:?} with {padding:?}, {stride:?} and {dilation:?}"
            );
            return Err(Failure::new(BAD_PARAM, text));
        }
        Ok(plan)
    }

    /// Made up: enough that it differs between sizes, and is not always there.
    fn workspace(&self) -> usize {
        let elements: usize = self.small.sizes.iter().product();
        if self.weight.sizes[2..] == [1, 1] { 0 } else { elements.div_ceil(64) * 256 }
    }

    /// The elements of a tensor in the order [channels][images][height][width]; rounded where the mathematics is
    /// so.
    fn load(&self, tensor: &Tensor, address: u64, what: &str) -> Result<Vec<f32>, Failure> {
        let format = tensor.format()?;
        let all = load::<f32>(format, address, tensor.span(), what)?;
        let rounds = format == Format::F32 && self.convolution.math != 3;
        let own = |at: usize| if rounds { to_tf32(all[at]) } else { all[at] };
        Ok(tensor.places().map(own).collect())
    }

    /// Writes elements in that order: alpha of them and beta of what is there.
    fn store(
        tensor: &Tensor,
        address: u64,
        values: &[f32],
        factors: [f32; 2],
        what: &str,
    ) -> Result<(), Failure> {
        let values = tensor.places().zip(values.iter().copied());
        store(tensor.format()?, address, tensor.span(), factors.map(f64::from), values, what)
    }

    /// Calls `work` with each tap's number and, for each pixel of the smaller map in the order of
    /// [`load`](Self::load), the pixel of the larger one that it meets there.
    fn each_tap(&self, mut work: impl FnMut(usize, &[Option<usize>])) {
        let Convolution { padding, stride, dilation, .. } = self.convolution;
        let [_, _, height, width] = self.large.sizes;
        let [images, _, rows, columns] = self.small.sizes;
        let [_, _, kernel_height, kernel_width] = self.weight.sizes;
        for ky in 0..kernel_height {
            for kx in 0..kernel_width {
                let place = |at: usize, axis: usize, tap: usize, size: usize| {
                    let at =
                        (at * stride[axis] + tap * dilation[axis]).checked_sub(padding[axis])?;
                    (at < size).then_some(at)
                };
                let mut met = Vec::with_capacity(images * rows * columns);
                for image in 0..images {
                    for row in 0..rows {
                        for column in 0..columns {
                            let y = place(row, 0, ky, height);
                            let x = place(column, 1, kx, width);
                            met.push(y.zip(x).map(|(y, x)| (image * height + y) * width + x));
                        }
                    }
                }
                work(ky * kernel_width + kx, &met);
            }
        }
    }

    fn taps(&self) -> usize {
        self.weight.sizes[2] * self.weight.sizes[3]
    }

    /// A tap's part of the weight, [of the smaller][of the larger]; the weight is in the order of
    /// [`load`](Self::load), [of the larger][of the smaller][taps].
    fn tap_of<'a>(
        &self,
        weight: &'a [f32],
        tap: usize,
    ) -> impl Fn(usize, usize) -> &'a f32 + use<'a> {
        let (small, taps) = (self.small.sizes[1], self.taps());
        move |of_small, of_large| &weight[(of_large * small + of_small) * taps + tap]
    }

    fn forward(&self, large: &[f32], weight: &[f32]) -> Vec<f32> {
        let (from, to) = (self.large.sizes[1], self.small.sizes[1]);
        let large_pixels = large.len() / from.max(1);
        let mut sums = Vec::new();
        self.each_tap(|tap, met| {
            sums.resize(met.len() * to, 0.);
            let of = self.tap_of(weight, tap);
            let mut a = Vec::with_capacity(from * met.len());
            let mut b = Vec::with_capacity(from * to);
            for c in 0..from {
                let plane = &large[c * large_pixels..(c + 1) * large_pixels];
                a.extend(met.iter().map(|at| at.map_or(0., |at| plane[at])));
                b.extend((0..to).map(|k| *of(k, c)));
            }
            multiply(&a, &b, &mut sums, met.len(), to);
        });
        sums
    }

    fn backward_data(&self, small: &[f32], weight: &[f32]) -> Vec<f32> {
        let (from, to) = (self.small.sizes[1], self.large.sizes[1]);
        let [n, _, h, w] = self.large.sizes;
        let large_pixels = n * h * w;
        let mut sums = vec![0.; large_pixels * to];
        self.each_tap(|tap, met| {
            let of = self.tap_of(weight, tap);
            let mut b = Vec::with_capacity(from * to);
            for k in 0..from {
                b.extend((0..to).map(|c| *of(k, c)));
            }
            let mut parts = vec![0.; met.len() * to];
            multiply(small, &b, &mut parts, met.len(), to);
            for (sums, parts) in
                sums.chunks_exact_mut(large_pixels).zip(parts.chunks_exact(met.len()))
            {
                for (at, part) in met.iter().zip(parts) {
                    if let Some(at) = at {
                        sums[*at] += part;
                    }
                }
            }
        });
        sums
    }

    fn backward_filter(&self, large: &[f32], small: &[f32]) -> Vec<f32> {
        let (inner, outer) = (self.large.sizes[1], self.small.sizes[1]);
        let large_pixels = large.len() / inner.max(1);
        let taps = self.taps();
        let mut to = vec![0.; inner * outer * taps];
        self.each_tap(|tap, met| {
            // Pixels first.
            let mut a = Vec::with_capacity(met.len() * inner);
            let mut b = Vec::with_capacity(met.len() * outer);
            for (pixel, at) in met.iter().enumerate() {
                a.extend((0..inner).map(|c| at.map_or(0., |at| large[c * large_pixels + at])));
                b.extend((0..outer).map(|k| small[k * met.len() + pixel]));
            }
            let mut sums = vec![0.; inner * outer];
            multiply(&a, &b, &mut sums, inner, outer);
            for k in 0..outer {
                for c in 0..inner {
                    to[(c * outer + k) * taps + tap] = sums[k * inner + c];
                }
            }
        });
        to
    }
}

/// What every algorithm may do with its workspace.
fn spoil(workspace: u64, bytes: usize) -> Result<(), Failure> {
    MEMORY.slice_mut::<u8>(workspace, bytes, "a convolution's workspace")?.fill(0xff);
    Ok(())
}

/// Answers how much memory an algorithm needs.
///
/// # Safety
///
/// As [`Plan::new`]; `size` is memory for a number.
unsafe fn answer_size(
    plan: impl FnOnce() -> Result<Plan, Failure>,
    is_supported: bool,
    size: *mut usize,
) -> u32 {
    if !is_supported {
        return NOT_SUPPORTED.0;
    }
    call("cudnnGetConvolutionWorkspaceSize", |_| {
        unsafe { size.write(plan()?.workspace()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnGetConvolutionForwardWorkspaceSize(
    _handle: *const u64,
    x: *const Tensor,
    w: *const Tensor,
    convolution: *const Convolution,
    y: *const Tensor,
    algorithm: c_uint,
    size: *mut usize,
) -> u32 {
    unsafe { answer_size(|| Plan::new(x, y, w, convolution), matches!(algorithm, 0 | 1), size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnGetConvolutionBackwardDataWorkspaceSize(
    _handle: *const u64,
    w: *const Tensor,
    dy: *const Tensor,
    convolution: *const Convolution,
    dx: *const Tensor,
    algorithm: c_uint,
    size: *mut usize,
) -> u32 {
    unsafe { answer_size(|| Plan::new(dx, dy, w, convolution), matches!(algorithm, 0 | 1), size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudnnGetConvolutionBackwardFilterWorkspaceSize(
    _handle: *const u64,
    x: *const Tensor,
    dy: *const Tensor,
    convolution: *const Convolution,
    dw: *const Tensor,
    algorithm: c_uint,
    size: *mut usize,
) -> u32 {
    unsafe { answer_size(|| Plan::new(x, dy, dw, convolution), matches!(algorithm, 0 | 1), size) }
}

/// What the three products have in common: checks, and their place in the queue.
///
/// # Safety
///
/// A handle made above, and f32 factors.
unsafe fn queue(
    name: &str,
    handle: *const u64,
    plan: Result<Plan, Failure>,
    workspace: (u64, usize),
    factors: [*const c_void; 2],
    run: impl Fn(&Plan, [f32; 2]) -> Result<(), Failure> + Send + Sync + 'static,
) -> u32 {
    call(name, |world| {
        let plan = plan?;
        let factors = factors.map(|factor| unsafe { *factor.cast::<f32>() });
        let (address, bytes) = workspace;
        if bytes < plan.workspace() {
            let text = format!("{bytes} bytes of workspace, for {}", plan.workspace());
            return Err(Failure::new(BAD_PARAM, text));
        }
        later(world, unsafe { *handle }, move || {
            spoil(address, bytes)?;
            run(&plan, factors)
        })
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cudnnConvolutionForward(
    handle: *const u64,
    alpha: *const c_void,
    x_of: *const Tensor,
    x: u64,
    w_of: *const Tensor,
    w: u64,
    convolution: *const Convolution,
    _algorithm: c_uint,
    workspace: u64,
    bytes: usize,
    beta: *const c_void,
    y_of: *const Tensor,
    y: u64,
) -> u32 {
    unsafe {
        let plan = Plan::new(x_of, y_of, w_of, convolution);
        let run = move |plan: &Plan, factors| {
            let large = plan.load(&plan.large, x, "a convolution's input")?;
            let weight = plan.load(&plan.weight, w, "a convolution's weight")?;
            let sums = plan.forward(&large, &weight);
            Plan::store(&plan.small, y, &sums, factors, "a convolution's output")
        };
        queue("cudnnConvolutionForward", handle, plan, (workspace, bytes), [alpha, beta], run)
    }
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cudnnConvolutionBackwardData(
    handle: *const u64,
    alpha: *const c_void,
    w_of: *const Tensor,
    w: u64,
    dy_of: *const Tensor,
    dy: u64,
    convolution: *const Convolution,
    _algorithm: c_uint,
    workspace: u64,
    bytes: usize,
    beta: *const c_void,
    dx_of: *const Tensor,
    dx: u64,
) -> u32 {
    unsafe {
        let plan = Plan::new(dx_of, dy_of, w_of, convolution);
        let run = move |plan: &Plan, factors| {
            let small = plan.load(&plan.small, dy, "a convolution's gradient")?;
            let weight = plan.load(&plan.weight, w, "a convolution's weight")?;
            let sums = plan.backward_data(&small, &weight);
            Plan::store(&plan.large, dx, &sums, factors, "a gradient of a convolution's input")
        };
        queue("cudnnConvolutionBackwardData", handle, plan, (workspace, bytes), [alpha, beta], run)
    }
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cudnnConvolutionBackwardFilter(
    handle: *const u64,
    alpha: *const c_void,
    x_of: *const Tensor,
    x: u64,
    dy_of: *const Tensor,
    dy: u64,
    convolution: *const Convolution,
    _algorithm: c_uint,
    workspace: u64,
    bytes: usize,
    beta: *const c_void,
    dw_of: *const Tensor,
    dw: u64,
) -> u32 {
    unsafe {
        let plan = Plan::new(x_of, dy_of, dw_of, convolution);
        let run = move |plan: &Plan, factors| {
            let large = plan.load(&plan.large, x, "a convolution's input")?;
            let small = plan.load(&plan.small, dy, "a convolution's gradient")?;
            let sums = plan.backward_filter(&large, &small);
            Plan::store(&plan.weight, dw, &sums, factors, "a gradient of a convolution's weight")
        };
        queue(
            "cudnnConvolutionBackwardFilter",
            handle,
            plan,
            (workspace, bytes),
            [alpha, beta],
            run,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::{download, upload};

    const LARGE: [c_int; 4] = [2, 3, 5, 6];
    const SMALL: [c_int; 4] = [2, 4, 3, 3];
    const KERNEL: [c_int; 4] = [4, 3, 3, 3];

    fn len(sizes: [c_int; 4]) -> usize {
        sizes.iter().product::<c_int>() as usize
    }

    fn numbers(sizes: [c_int; 4], seed: usize) -> Vec<f32> {
        (0..len(sizes)).map(|i| ((i + seed) * 37 % 11) as f32 - 5.).collect()
    }

    fn tensor(order: c_uint, [n, c, h, w]: [c_int; 4]) -> *mut Tensor {
        let mut tensor = std::ptr::null_mut();
        unsafe {
            assert_eq!(cudnnCreateTensorDescriptor(&raw mut tensor), 0);
            assert_eq!(cudnnSetTensor4dDescriptor(tensor, order, 0, n, c, h, w), 0);
        }
        tensor
    }

    /// y, dx and dw of these x, w and dy: 3 × 3, stride 2, padding 1.
    fn products(order: c_uint, x: &[f32], w: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let (mut handle, mut convolution) = (std::ptr::null_mut(), std::ptr::null_mut());
        let [large, small, weight] = [LARGE, SMALL, KERNEL].map(|sizes| tensor(order, sizes));
        let (x, w, dy) = (upload(x), upload(w), upload(dy));
        let [y, dx, dw] = [SMALL, LARGE, KERNEL].map(|sizes| upload(&vec![0f32; len(sizes)]));
        let (one, zero) = ((&raw const ONE).cast(), (&raw const ZERO).cast());
        let mut bytes = 0;
        unsafe {
            assert_eq!(cudnnCreate(&raw mut handle), 0);
            assert_eq!(cudnnSetStream(handle, 2), 0);
            assert_eq!(cudnnCreateConvolutionDescriptor(&raw mut convolution), 0);
            assert_eq!(cudnnSetConvolution2dDescriptor(convolution, 1, 1, 2, 2, 1, 1, 1, 0), 0);
            let size = &raw mut bytes;
            let code = cudnnGetConvolutionForwardWorkspaceSize(
                handle,
                large,
                weight,
                convolution,
                small,
                1,
                size,
            );
            assert_eq!(code, 0);
            let room = upload(&vec![0u8; bytes]);
            // One byte too few.
            let code = cudnnConvolutionForward(
                handle,
                one,
                large,
                x,
                weight,
                w,
                convolution,
                1,
                room,
                bytes - 1,
                zero,
                small,
                y,
            );
            assert_eq!(code, BAD_PARAM.0);
            let code = cudnnConvolutionForward(
                handle,
                one,
                large,
                x,
                weight,
                w,
                convolution,
                1,
                room,
                bytes,
                zero,
                small,
                y,
            );
            assert_eq!(code, 0);
            let code = cudnnConvolutionBackwardData(
                handle,
                one,
                weight,
                w,
                small,
                dy,
                convolution,
                1,
                room,
                bytes,
                zero,
                large,
                dx,
            );
            assert_eq!(code, 0);
            let code = cudnnConvolutionBackwardFilter(
                handle,
                one,
                large,
                x,
                small,
                dy,
                convolution,
                1,
                room,
                bytes,
                zero,
                weight,
                dw,
            );
            assert_eq!(code, 0);
            let made =
                [download(y, len(SMALL)), download(dx, len(LARGE)), download(dw, len(KERNEL))];
            cudnnDestroy(handle);
            cudnnDestroyConvolutionDescriptor(convolution);
            for tensor in [large, small, weight] {
                cudnnDestroyTensorDescriptor(tensor);
            }
            made
        }
    }

    static ONE: f32 = 1.;
    static ZERO: f32 = 0.;

    #[test]
    fn products_of_convolutions_are_those_of_their_definition_in_both_orders() {
        let (x, w, dy) = (numbers(LARGE, 1), numbers(KERNEL, 2), numbers(SMALL, 3));
        for order in [0, 1] {
            let at = |[_, c, h, w]: [c_int; 4], [i, j, k, l]: [c_int; 4]| {
                let at = if order == 0 {
                    ((i * c + j) * h + k) * w + l
                } else {
                    ((i * h + k) * w + l) * c + j
                };
                at as usize
            };
            let mut expected = [vec![0.; len(SMALL)], vec![0.; len(LARGE)], vec![0.; len(KERNEL)]];
            for n in 0..2 {
                for (k, c) in (0..4).flat_map(|k| (0..3).map(move |c| (k, c))) {
                    for (p, q) in (0..3).flat_map(|p| (0..3).map(move |q| (p, q))) {
                        for (r, s) in (0..3).flat_map(|r| (0..3).map(move |s| (r, s))) {
                            let (i, j) = (2 * p + r - 1, 2 * q + s - 1);
                            if !(0..5).contains(&i) || !(0..6).contains(&j) {
                                continue;
                            }
                            let of_x = at(LARGE, [n, c, i, j]);
                            let of_w = at(KERNEL, [k, c, r, s]);
                            let of_y = at(SMALL, [n, k, p, q]);
                            expected[0][of_y] += x[of_x] * w[of_w];
                            expected[1][of_x] += dy[of_y] * w[of_w];
                            expected[2][of_w] += dy[of_y] * x[of_x];
                        }
                    }
                }
            }
            assert_eq!(products(order, &x, &w, &dy), expected);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let mut convolution = std::ptr::null_mut();
        let [large, small, weight] = [LARGE, [2, 4, 3, 4], KERNEL].map(|sizes| tensor(1, sizes));
        let mut bytes = 0;
        unsafe {
            cudnnCreateConvolutionDescriptor(&raw mut convolution);
            cudnnSetConvolution2dDescriptor(convolution, 1, 1, 2, 2, 1, 1, 1, 0);
            let none = std::ptr::null();
            for (algorithm, expected) in [(1, BAD_PARAM), (6, NOT_SUPPORTED)] {
                let code = cudnnGetConvolutionForwardWorkspaceSize(
                    none,
                    large,
                    weight,
                    convolution,
                    small,
                    algorithm,
                    &raw mut bytes,
                );
                assert_eq!(code, expected.0);
            }
        }
    }
}

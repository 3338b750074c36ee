//! Convolutions and their gradients by cuDNN, channels-last.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, CudnnError,
    FilterDescriptor, TensorDescriptor, sys,
};
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, CudaView};
use candle_core::cuda::{DeviceId, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Storage, Tensor, bail};

use super::{Element, cuda_device, tensor, view, with_element};
use crate::cpu::conv::Geometry;
use crate::cpu::pack::Images;
use crate::primitives::Product;

thread_local! {
    static STATES: RefCell<States> = const { RefCell::new(States(Vec::new())) };
}

/// What threads that have ended leave to those that come.
static LEFT: Mutex<Vec<(Place, Left)>> = Mutex::new(Vec::new());

type Place = (DeviceId, Queue);

/// What a thread has: a handle of cuDNN's is used by one at a time.
struct States(Vec<(Place, State)>);

impl Drop for States {
    fn drop(&mut self) {
        // The workspaces may be in use. Nothing is closed here: when a thread ends, what cuDNN keeps for it may be
        // gone already.
        for (_, state) in &self.0 {
            // Whatever is wrong with the device, whoever uses it learns.
            let _ = super::wait(&state.stream);
        }
        let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
        left.extend(self.0.drain(..).map(|(place, state)| (place, Left(state))));
    }
}

struct Left(State);

// SAFETY: cuDNN binds its handles and descriptions to no thread; they may only not be used by two at once. All that
// counts references to them is in the state.
#[allow(unsafe_code)]
unsafe impl Send for Left {}

/// Where a product runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    /// With all else.
    Main,
    /// Beside it.
    Aside,
}

struct State {
    stream: Arc<CudaStream>,
    cudnn: Arc<Cudnn>,
    f32: Plans<f32>,
    bf16: Plans<half::bf16>,
    /// As large as any plan has needed; the stream's order keeps its uses apart.
    workspace: Option<CudaSlice<u8>>,
    /// Whether a recording has it.
    is_recorded: bool,
    /// Those that recordings have and that became too small: they are repeated who knows when.
    outgrown: Vec<CudaSlice<u8>>,
}

type Plans<T> = HashMap<Key, Rc<Plan<T>>>;

/// What a plan is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    large: [i32; 4],
    small: [i32; 4],
    kernel: [i32; 2],
    /// Stride, padding, dilation.
    steps: [i32; 3],
    product: Product,
    strict: bool,
}

/// cuDNN's descriptions of the three tensors, and the algorithm.
struct Plan<T> {
    conv: ConvDescriptor<f32>,
    large: TensorDescriptor<T>,
    small: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    algorithm: Algorithm,
    /// Bytes.
    workspace: usize,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Data(sys::cudnnConvolutionBwdDataAlgo_t),
    Filter(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// Opens cuDNN.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    with_state(device, Queue::Main, |_| Ok(()))
}

/// One of the products of a convolution; see [`Product`] for the operands. Weights are
/// `[outer, KH, KW, inner]`.
pub(crate) fn multiply(
    geometry: &Geometry,
    product: Product,
    (a, a_layout): (&CudaStorage, &Layout),
    (b, b_layout): (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let device = &a.device;
    with_element!(a, T, {
        let (a, b) = (view::<T>(a, a_layout)?, view::<T>(b, b_layout)?);
        let result = run::<T>(device, Queue::Main, geometry, product, &a, &b)?;
        Ok(CudaStorage::wrap_cuda_slice(result, device.clone()))
    })
}

/// [`Product::Weight`], in a queue of its own that starts from what the main one has been given so far. All three
/// tensors must be kept until [`wait_for_aside`].
pub(crate) fn weight_gradient_aside(
    geometry: &Geometry,
    large: &Tensor,
    small: &Tensor,
) -> Result<Tensor> {
    let device = cuda_device(large)?;
    let (large, large_layout) = large.storage_and_layout();
    let (small, small_layout) = small.storage_and_layout();
    let (Storage::Cuda(large), Storage::Cuda(small)) = (&*large, &*small) else {
        bail!("needs tensors on the CUDA device");
    };
    let gradient = with_element!(large, T, {
        let (a, b) = (view::<T>(large, large_layout)?, view::<T>(small, small_layout)?);
        let result = run::<T>(&device, Queue::Aside, geometry, Product::Weight, &a, &b)?;
        CudaStorage::wrap_cuda_slice(result, device)
    });
    let (outer, inner, _) = geometry.weight_shape();
    Ok(tensor(gradient, (outer, geometry.kernel.0, geometry.kernel.1, inner)))
}

/// Has the main queue wait for the other one.
pub(crate) fn wait_for_aside(any: &Tensor) -> Result<()> {
    let device = cuda_device(any)?;
    with_state(&device, Queue::Aside, |state| device.cuda_stream().join(&state.stream).w())
}

/// Has the workspaces of this thread stay where they are: a recording has their addresses.
pub(super) fn keep_workspaces() {
    STATES.with_borrow_mut(|states| {
        for (_, state) in &mut states.0 {
            state.is_recorded = true;
        }
    });
}

trait Planned: Element {
    fn plans(state: &mut State) -> &mut Plans<Self>;
}

impl Planned for f32 {
    fn plans(state: &mut State) -> &mut Plans<Self> {
        &mut state.f32
    }
}

impl Planned for half::bf16 {
    fn plans(state: &mut State) -> &mut Plans<Self> {
        &mut state.bf16
    }
}

fn run<T: Planned>(
    device: &CudaDevice,
    queue: Queue,
    geometry: &Geometry,
    product: Product,
    a: &CudaView<'_, T>,
    b: &CudaView<'_, T>,
) -> Result<CudaSlice<T>> {
    let (outer, inner, taps) = geometry.weight_shape();
    let (a_len, b_len, out_len) = match product {
        Product::LargeToSmall => (geometry.large.len(), outer * inner * taps, geometry.small.len()),
        Product::SmallToLarge => (geometry.small.len(), outer * inner * taps, geometry.large.len()),
        Product::Weight => (geometry.large.len(), geometry.small.len(), outer * inner * taps),
    };
    if (a.len(), b.len()) != (a_len, b_len) {
        bail!("{product:?} of {geometry:?} got {} and {} elements", a.len(), b.len());
    }
    // SAFETY: cuDNN writes every element, since what was there before counts for nothing (β = 0).
    #[allow(unsafe_code)]
    let mut out = unsafe { device.alloc::<T>(out_len) }?;
    with_state(device, queue, |state| {
        let plan = plan::<T>(state, geometry, product)?;
        if plan.workspace > state.workspace.as_ref().map_or(0, CudaSlice::len) {
            if queue == Queue::Aside {
                // The memory goes back in the main queue's order.
                device.cuda_stream().join(&state.stream).w()?;
            }
            if std::mem::take(&mut state.is_recorded) {
                state.outgrown.extend(state.workspace.take());
            }
            state.workspace = None;
            // SAFETY: cuDNN asks for memory of any content.
            #[allow(unsafe_code)]
            let memory = unsafe { device.alloc::<u8>(plan.workspace) }?;
            state.workspace = Some(memory);
        }
        if queue == Queue::Aside {
            state.stream.join(&device.cuda_stream()).w()?;
        }
        let workspace = if plan.workspace == 0 { None } else { state.workspace.as_mut() };
        let Plan { conv, large, small, weight, .. } = &*plan;
        let scales = (T::ONE, T::ZERO);
        // SAFETY: the slices have the lengths that the plan's descriptions say, checked above; all are
        // contiguous, channels-last.
        #[allow(unsafe_code)]
        let done = unsafe {
            match plan.algorithm {
                Algorithm::Forward(algorithm) => {
                    ConvForward { conv, x: large, w: weight, y: small }
                        .launch(algorithm, workspace, scales, a, b, &mut out)
                }
                Algorithm::Data(algorithm) => {
                    ConvBackwardData { conv, dx: large, w: weight, dy: small }
                        .launch(algorithm, workspace, scales, &mut out, b, a)
                }
                Algorithm::Filter(algorithm) => {
                    ConvBackwardFilter { conv, x: large, dw: weight, dy: small }
                        .launch(algorithm, workspace, scales, a, &mut out, b)
                }
            }
        };
        done.map_err(|error| failed(geometry, product, error))
    })?;
    Ok(out)
}

fn with_state<R>(
    device: &CudaDevice,
    queue: Queue,
    work: impl FnOnce(&mut State) -> Result<R>,
) -> Result<R> {
    let place = (device.id(), queue);
    STATES.with_borrow_mut(|States(states)| {
        if let Some((_, state)) = states.iter_mut().find(|(of, _)| *of == place) {
            return work(state);
        }
        let mut state = left(place).map_or_else(|| State::new(device, queue), Ok)?;
        let done = work(&mut state);
        states.push((place, state));
        done
    })
}

/// What a thread that has ended left.
fn left(place: Place) -> Option<State> {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    let found = left.iter().position(|(of, _)| *of == place)?;
    let (_, Left(state)) = left.swap_remove(found);
    Some(state)
}

impl State {
    fn new(device: &CudaDevice, queue: Queue) -> Result<Self> {
        let main = device.cuda_stream();
        let stream = match queue {
            Queue::Main => main,
            Queue::Aside => main.context().new_stream().w()?,
        };
        let cudnn = Cudnn::new(stream.clone())
            .map_err(|error| Error::Msg(format!("cuDNN does not open: {error}")))?;
        Ok(Self {
            stream,
            cudnn,
            f32: HashMap::new(),
            bf16: HashMap::new(),
            workspace: None,
            is_recorded: false,
            outgrown: Vec::new(),
        })
    }
}

fn plan<T: Planned>(
    state: &mut State,
    geometry: &Geometry,
    product: Product,
) -> Result<Rc<Plan<T>>> {
    let int = |value: usize| {
        i32::try_from(value).map_err(|_| Error::Msg(format!("cuDNN takes no size of {value}")))
    };
    let images = |images: Images| -> Result<[i32; 4]> {
        let Images { batch, height, width, channels } = images;
        Ok([int(batch)?, int(channels)?, int(height)?, int(width)?])
    };
    let key = Key {
        large: images(geometry.large)?,
        small: images(geometry.small)?,
        kernel: [int(geometry.kernel.0)?, int(geometry.kernel.1)?],
        steps: [int(geometry.stride)?, int(geometry.padding)?, int(geometry.dilation)?],
        product,
        strict: super::is_strict(),
    };
    if let Some(plan) = T::plans(state).get(&key) {
        return Ok(plan.clone());
    }
    let plan = make::<T>(&state.cudnn, key).map_err(|error| failed(geometry, product, error))?;
    let plan = Rc::new(plan);
    T::plans(state).insert(key, plan.clone());
    Ok(plan)
}

/// The algorithms are those that take channels-last tensors and give the same bits every time, in the
/// order of their speed; the first that cuDNN takes for these sizes. The last ones are better than nothing:
/// they add up in any order.
fn make<T: Planned>(cudnn: &Arc<Cudnn>, key: Key) -> std::result::Result<Plan<T>, CudnnError> {
    use sys::cudnnConvolutionBwdDataAlgo_t as Data;
    use sys::cudnnConvolutionBwdFilterAlgo_t as Filter;
    use sys::cudnnConvolutionFwdAlgo_t as Forward;
    const FORWARD: [Forward; 2] = [
        Forward::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
        Forward::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
    ];
    const DATA: [Data; 2] =
        [Data::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, Data::CUDNN_CONVOLUTION_BWD_DATA_ALGO_0];
    const FILTER: [Filter; 2] =
        [Filter::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1, Filter::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0];
    let nhwc = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
    let [stride, padding, dilation] = key.steps;
    let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
    let mut conv = cudnn.create_conv2d::<f32>([padding; 2], [stride; 2], [dilation; 2], mode)?;
    conv.set_math_type(if T::NAME == "bf16" {
        sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH
    } else if key.strict {
        sys::cudnnMathType_t::CUDNN_FMA_MATH
    } else {
        sys::cudnnMathType_t::CUDNN_DEFAULT_MATH
    })?;
    let large = cudnn.create_4d_tensor::<T>(nhwc, key.large)?;
    let small = cudnn.create_4d_tensor::<T>(nhwc, key.small)?;
    let filter = [key.small[1], key.large[1], key.kernel[0], key.kernel[1]];
    let weight = cudnn.create_4d_filter::<T>(nhwc, filter)?;
    let (algorithm, workspace) = match key.product {
        Product::LargeToSmall => {
            let op = ConvForward { conv: &conv, x: &large, w: &weight, y: &small };
            let (found, size) = first(&FORWARD, |algorithm| op.get_workspace_size(algorithm))?;
            (Algorithm::Forward(found), size)
        }
        Product::SmallToLarge => {
            let op = ConvBackwardData { conv: &conv, dx: &large, w: &weight, dy: &small };
            let (found, size) = first(&DATA, |algorithm| op.get_workspace_size(algorithm))?;
            (Algorithm::Data(found), size)
        }
        Product::Weight => {
            let op = ConvBackwardFilter { conv: &conv, x: &large, dw: &weight, dy: &small };
            let (found, size) = first(&FILTER, |algorithm| op.get_workspace_size(algorithm))?;
            (Algorithm::Filter(found), size)
        }
    };
    Ok(Plan { conv, large, small, weight, algorithm, workspace })
}

/// The first algorithm that has a workspace's size, with it.
fn first<A: Copy, const N: usize>(
    algorithms: &[A; N],
    size: impl Fn(A) -> std::result::Result<usize, CudnnError>,
) -> std::result::Result<(A, usize), CudnnError> {
    let mut refused = None;
    for &algorithm in algorithms {
        match size(algorithm) {
            Ok(size) => return Ok((algorithm, size)),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or(CudnnError(sys::cudnnStatus_t::CUDNN_STATUS_NOT_SUPPORTED)))
}

fn failed(geometry: &Geometry, product: Product, error: CudnnError) -> Error {
    Error::Msg(format!("cuDNN: {error} ({product:?} of {geometry:?})"))
}

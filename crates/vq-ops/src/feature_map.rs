//! Feature maps on their way between stacks.

use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Storage, Tensor, bail};

use crate::dispatch::on_cuda;
use crate::pointwise::{
    channels_first, channels_last, replace_value, scaled_squared_error, squared_error,
};
use crate::primitives::{Outputs, enter, finish, leave};

/// A feature map `[B, H, W, C]` that [stacks](crate::Stack) give and take.
///
/// On CUDA, [`Stack::forward_map`](crate::Stack::forward_map) leaves it as the products gave it, in their format, and
/// candle's graph knows a tensor of one element in its place; its gradient is passed on in the same format. As a
/// tensor of the graph it would be widened to f32 and back on the way, and for each of its uses the graph would
/// fill another such tensor with zeros and add to it. On other devices it is a tensor.
#[derive(Clone, Debug)]
pub struct FeatureMap(Form);

#[derive(Clone, Debug)]
enum Form {
    InGraph(Tensor),
    Beside(Beside),
}

impl From<Tensor> for FeatureMap {
    /// Of a tensor `[B, H, W, C]`; what takes a map refuses others.
    fn from(map: Tensor) -> Self {
        Self(Form::InGraph(map))
    }
}

impl FeatureMap {
    pub(crate) fn beside(map: Beside) -> Self {
        Self(Form::Beside(map))
    }

    /// The map as a tensor `[B, H, W, C]` f32. Differentiable.
    pub fn tensor(&self) -> Result<Tensor> {
        match &self.0 {
            Form::InGraph(map) => Ok(map.clone()),
            Form::Beside(map) => map.tensor(),
        }
    }

    /// What [`tensor`](Self::tensor) gives, without a way back to the map.
    pub fn values(&self) -> Result<Tensor> {
        match &self.0 {
            Form::InGraph(map) => Ok(map.detach()),
            Form::Beside(map) => leave(&map.values, map.channels),
        }
    }

    /// `factor` times the mean of (value − image)² of a map that a decoder gave and `images` `[B, C, H, W]`, which get no
    /// gradient; a scalar, differentiable in the map.
    pub fn image_error(&self, images: &Tensor, factor: f64) -> Result<Tensor> {
        let (b, h, w, c) = self.dims4()?;
        if images.dims() != [b, c, h, w] {
            bail!("images {:?} beside a map {:?}", images.shape(), [b, h, w, c]);
        }
        let images = images.detach().contiguous()?;
        match &self.0 {
            Form::InGraph(map) if !on_cuda(map.device()) => {
                scaled_squared_error(&channels_first(map)?, &images, factor)
            }
            _ => {
                let map = self.to_beside()?;
                let values = leave(&map.values, map.channels)?;
                map.error(values, Other::Images(images, factor))
            }
        }
    }

    /// The same map, of which no gradient is asked.
    #[must_use]
    pub fn detach(&self) -> Self {
        match &self.0 {
            Form::InGraph(map) => map.detach().into(),
            Form::Beside(map) => Self::beside(Beside::new(map.values.clone(), map.channels)),
        }
    }

    /// Puts others in the place of its values: `values` is what [`values`](Self::values) gave, `others` are of the
    /// same shape.
    pub fn replace(&self, values: &Tensor, others: &Tensor) -> Result<Replaced> {
        let others = others.detach();
        match &self.0 {
            Form::InGraph(map) => Ok(Replaced {
                map: replace_value(map, &others)?.into(),
                error: squared_error(map, &others)?,
            }),
            Form::Beside(map) => map.replace(values.contiguous()?, others.contiguous()?),
        }
    }

    /// The tensor that it is, if it is one.
    pub(crate) fn in_graph(&self) -> Option<&Tensor> {
        match &self.0 {
            Form::InGraph(map) => Some(map),
            Form::Beside(_) => None,
        }
    }

    pub(crate) fn to_beside(&self) -> Result<Beside> {
        match &self.0 {
            Form::InGraph(map) => Beside::of(map),
            Form::Beside(map) => Ok(map.clone()),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        match &self.0 {
            Form::InGraph(map) => map.device(),
            Form::Beside(map) => map.values.device(),
        }
    }

    /// `[B, H, W, C]`.
    pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
        match &self.0 {
            Form::InGraph(map) => map.dims4(),
            Form::Beside(map) => {
                let (b, h, w, _) = map.values.dims4()?;
                Ok((b, h, w, map.channels))
            }
        }
    }
}

/// What a map becomes where others take the place of its values, each near the one that it replaces.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// The others, whose gradient is that of the map: the straight-through estimator (van den Oord et al. 2017,
    /// section 3.2).
    pub map: FeatureMap,
    /// The mean of (value − other)², a scalar; differentiable in the map.
    pub error: Tensor,
}

/// A map beside the graph.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    /// Stands for it in the graph: one zero. None where no gradient is asked for.
    pub(crate) place: Option<Tensor>,
    /// `[B, H, W, ≥ C]`, in any format, with zeros beyond the channels; detached.
    pub(crate) values: Tensor,
    /// C.
    pub(crate) channels: usize,
    pub(crate) gradient: Collected,
}

/// The sum of the gradients that the uses of a map have left for it, in its format. A backward pass that fails midway
/// leaves some of it: the same graph is of no use after that.
#[derive(Clone, Debug, Default)]
pub(crate) struct Collected(Arc<Mutex<Option<Tensor>>>);

impl Collected {
    pub(crate) fn add(&self, gradient: Tensor) -> Result<()> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(match place.take() {
            Some(before) => finish(&before, None, Some(&gradient), Outputs::PLAIN)?,
            None => gradient,
        });
        Ok(())
    }

    /// All of it: the graph comes back to a map after all of its uses.
    pub(crate) fn take(&self) -> Result<Tensor> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(gradient) => Ok(gradient),
            None => bail!("a feature map's gradient was never given"),
        }
    }
}

impl Beside {
    /// A map of which no gradient is asked.
    pub(crate) fn new(values: Tensor, channels: usize) -> Self {
        Self { place: None, values, channels, gradient: Collected::default() }
    }

    /// A tensor of the graph `[B, H, W, C]` f32, beside it.
    fn of(x: &Tensor) -> Result<Self> {
        let (_, _, _, channels) = x.dims4()?;
        let x = x.contiguous()?;
        let map = Self::new(x.detach(), channels);
        let step_out = || x.apply_op1(StepOut(map.gradient.clone()));
        let place = x.track_op().then(step_out).transpose()?;
        Ok(Self { place, ..map })
    }

    fn tensor(&self) -> Result<Tensor> {
        match &self.place {
            Some(place) => place.apply_op1(StepIn(self.clone())),
            None => leave(&self.values, self.channels),
        }
    }

    fn replace(&self, values: Tensor, others: Tensor) -> Result<Replaced> {
        let mut map = Self::new(self.enter(&others)?, self.channels);
        if let Some(place) = &self.place {
            let (from, to) = (map.gradient.clone(), self.gradient.clone());
            map.place = Some(place.apply_op1(PassOn { from, to })?);
        }
        let error = self.error(values, Other::Map(others))?;
        Ok(Replaced { map: FeatureMap::beside(map), error })
    }

    /// How far the map, whose values are given as the graph would have them, is from something else.
    fn error(&self, values: Tensor, other: Other) -> Result<Tensor> {
        let op = ErrorOf { map: self.clone(), values, other };
        match &self.place {
            Some(place) => place.apply_op1(op),
            None => op.values.apply_op1_no_bwd(&op),
        }
    }

    /// A tensor `[B, H, W, C]` f32 in the map's format.
    fn enter(&self, x: &Tensor) -> Result<Tensor> {
        enter(x, self.values.dtype(), self.values.dim(D::Minus1)?)
    }
}

/// What stands for a map.
pub(crate) fn place_on_cpu() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.]), 1.into())
}

/// What stands for a map.
#[cfg(feature = "cuda")]
pub(crate) fn place_on_cuda(
    device: &candle_core::CudaDevice,
) -> Result<(candle_core::CudaStorage, Shape)> {
    let zero = device.alloc_zeros::<f32>(1)?;
    Ok((candle_core::CudaStorage::wrap_cuda_slice(zero, device.clone()), 1.into()))
}

/// A copy of a tensor's elements.
pub(crate) fn cpu_storage(x: &Tensor) -> Result<(CpuStorage, Shape)> {
    use candle_core::backend::BackendStorage;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        // `try_clone` would copy more than a view.
        Storage::Cpu(storage) => {
            Ok((storage.to_dtype(layout, storage.dtype())?, layout.shape().clone()))
        }
        _ => bail!("a tensor is on another device"),
    }
}

/// The gradient of a map to one of the same format, whose values it replaced.
struct PassOn {
    from: Collected,
    to: Collected,
}

impl CustomOp1 for PassOn {
    fn name(&self) -> &'static str {
        "vq-replaced"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(place_on_cpu())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        place_on_cuda(&x.device)
    }

    fn bwd(&self, place: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.to.add(self.from.take()?)?;
        Ok(Some(place.detach()))
    }
}

/// What a map's values are compared with.
enum Other {
    /// `[B, H, W, C]`
    Map(Tensor),
    /// `[B, C, H, W]`, and a factor.
    Images(Tensor, f64),
}

/// The mean squared error of a map.
struct ErrorOf {
    map: Beside,
    /// Of the map, `[B, H, W, C]` f32.
    values: Tensor,
    other: Other,
}

impl ErrorOf {
    /// The gradient in the map, where the error's is `grad`.
    fn gradient(&self, grad: &Tensor) -> Result<Tensor> {
        let Self { map, values, other } = self;
        #[cfg(feature = "cuda")]
        if on_cuda(values.device()) {
            use crate::cuda::training::{error_gradient, image_error_gradient};
            return match other {
                Other::Map(other) if map.values.dim(D::Minus1)? == map.channels => {
                    error_gradient(values, other, grad, map.values.dtype())
                }
                Other::Map(other) => map.enter(&error_gradient(values, other, grad, DType::F32)?),
                Other::Images(images, factor) => {
                    map.enter(&image_error_gradient(values, images, grad, *factor)?)
                }
            };
        }
        let (difference, factor) = match other {
            Other::Map(other) => (values.sub(other)?, 1.),
            Other::Images(images, factor) => (values.sub(&channels_last(images)?)?, *factor),
        };
        let difference = (difference * (2. * factor / values.elem_count() as f64))?;
        map.enter(&difference.broadcast_mul(grad)?)
    }
}

impl CustomOp1 for ErrorOf {
    fn name(&self) -> &'static str {
        "vq-error-of-map"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = &self.values;
        cpu_storage(&match &self.other {
            Other::Map(other) => squared_error(values, other)?,
            Other::Images(images, factor) => {
                scaled_squared_error(&channels_first(values)?, images, *factor)?
            }
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::training::{image_error, mean_squared_error};
        match &self.other {
            Other::Map(other) => mean_squared_error(&self.values, other),
            Other::Images(images, factor) => image_error(&self.values, images, *factor),
        }
    }

    fn bwd(&self, place: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.map.gradient.add(self.gradient(&grad.detach())?)?;
        Ok(Some(place.detach()))
    }
}

/// From the graph to beside it.
struct StepOut(Collected);

impl CustomOp1 for StepOut {
    fn name(&self) -> &'static str {
        "vq-beside-graph"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(place_on_cpu())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        place_on_cuda(&x.device)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.0.take().map(Some)
    }
}

/// The other way.
struct StepIn(Beside);

impl CustomOp1 for StepIn {
    fn name(&self) -> &'static str {
        "vq-into-graph"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&leave(&self.0.values, self.0.channels)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::layers::left(&self.0.values, self.0.channels)
    }

    fn bwd(&self, place: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.gradient.add(self.0.enter(&grad.detach().contiguous()?)?)?;
        Ok(Some(place.detach()))
    }
}

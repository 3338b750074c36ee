//! Feature maps on their way between stacks.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::pointwise::{channels_last, image_error, replace_value, squared_error};
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

    /// [`image_error`](crate::image_error()) of the map.
    pub fn image_error(&self, images: &Tensor, factor: f64) -> Result<Tensor> {
        let Form::Beside(map) = &self.0 else {
            return image_error(&self.tensor()?, images, factor);
        };
        let values = self.values()?;
        let Some(place) = &map.place else { return image_error(&values, images, factor) };
        if images.dims4()? != dims_of_images(&values)? {
            bail!("images {:?} beside {:?}", images.shape(), values.shape());
        }
        let (map, images) = (map.clone(), images.detach().contiguous()?);
        place.apply_op1(ImageErrorOf { map, values, images, factor })
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
        let rounded = enter(&others, self.values.dtype(), self.values.dim(D::Minus1)?)?;
        let replaced = Self::new(rounded, self.channels);
        let Some(place) = &self.place else {
            let (map, error) = (FeatureMap::beside(replaced), squared_error(&values, &others)?);
            return Ok(Replaced { map, error });
        };
        let (from, to) = (replaced.gradient.clone(), self.gradient.clone());
        let map = Self { place: Some(place.apply_op1(PassOn { from, to })?), ..replaced };
        let error = place.apply_op1(ErrorOf { map: self.clone(), values, others })?;
        Ok(Replaced { map: FeatureMap::beside(map), error })
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

/// The mean squared error of a map, whose values are given as they are in the graph.
struct ErrorOf {
    map: Beside,
    values: Tensor,
    others: Tensor,
}

impl CustomOp1 for ErrorOf {
    fn name(&self) -> &'static str {
        "vq-error-of-map"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&squared_error(&self.values, &self.others)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::training::error_between(&self.values, &self.others)
    }

    fn bwd(&self, place: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Self { map: Beside { values, gradient, .. }, values: exact, others } = self;
        let (dtype, channels) = (values.dtype(), values.dim(D::Minus1)?);
        gradient.add(error_gradient(exact, others, &grad.detach(), (dtype, channels))?)?;
        Ok(Some(place.detach()))
    }
}

/// `factor` times the mean squared error of a map, whose values are given as they are in the graph, from images.
struct ImageErrorOf {
    map: Beside,
    values: Tensor,
    /// `[B, C, H, W]`
    images: Tensor,
    factor: f64,
}

impl CustomOp1 for ImageErrorOf {
    fn name(&self) -> &'static str {
        "vq-image-error-of-map"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_storage(&image_error(&self.values, &self.images, self.factor)?)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::training::error_from_images(&self.values, &self.images, self.factor)
    }

    fn bwd(&self, place: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Self { map: Beside { values, gradient, .. }, values: exact, images, factor } = self;
        let of_values = image_error_gradient(exact, images, &grad.detach(), *factor)?;
        gradient.add(enter(&of_values, values.dtype(), values.dim(D::Minus1)?)?)?;
        Ok(Some(place.detach()))
    }
}

/// The gradient of `factor` times the mean of (x − image)², times `grad`, in x `[B, H, W, C]`.
fn image_error_gradient(x: &Tensor, images: &Tensor, grad: &Tensor, factor: f64) -> Result<Tensor> {
    let factor = factor / x.elem_count() as f64;
    #[cfg(feature = "cuda")]
    if on_cuda(x.device()) {
        return crate::cuda::training::image_error_gradient(x, images, grad, factor);
    }
    (x.sub(&channels_last(images)?)? * (2. * factor))?.broadcast_mul(grad)
}

/// `[B, C, H, W]` of images beside a map.
fn dims_of_images(map: &Tensor) -> Result<(usize, usize, usize, usize)> {
    let (b, h, w, c) = map.dims4()?;
    Ok((b, c, h, w))
}

/// The gradient of the mean of (a − b)², times `grad`, in a as a map of that format.
fn error_gradient(
    a: &Tensor,
    b: &Tensor,
    grad: &Tensor,
    (dtype, channels): (DType, usize),
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_cuda(a.device()) && a.dim(D::Minus1)? == channels {
        return crate::cuda::training::error_gradient(a, b, grad, dtype);
    }
    let difference = (a.sub(b)? * (2. / a.elem_count() as f64))?;
    enter(&difference.broadcast_mul(grad)?, dtype, channels)
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
        let Beside { values, gradient, .. } = &self.0;
        let grad = grad.detach().contiguous()?;
        gradient.add(enter(&grad, values.dtype(), values.dim(D::Minus1)?)?)?;
        Ok(Some(place.detach()))
    }
}

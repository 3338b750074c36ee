//! The parts that a convolution's forward and backward pass are made of, as operations on tensors of f32 or
//! bf16, without gradients of their own: what a [stack](crate::Stack) runs on CUDA.
//!
//! Their CPU form is the plain one, so that what is built of them is tested without a GPU.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor};

use crate::cpu::buffers::Buffers;
use crate::cpu::conv::{Finish as CpuFinish, Geometry, large_to_small, small_to_large};
use crate::cpu::elements::{Elements, Output};
use crate::cpu::weight_gradient::{column_sums as cpu_column_sums, weight_gradient};
#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::storage::f32_elements;

/// The three products of a convolution `large → small`. Weights are `[outer, KH, KW, inner]`, `outer` the
/// channels of `small`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Product {
    /// (large, weight) → small.
    LargeToSmall,
    /// (small, weight) → large.
    SmallToLarge,
    /// (large, small) → weight.
    Weight,
}

/// What [`finish`] gives: one tensor, or both, plain first, along a new first axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outputs {
    pub(crate) plain: bool,
    pub(crate) rectified: bool,
}

impl Outputs {
    pub(crate) const PLAIN: Self = Self { plain: true, rectified: false };
    pub(crate) const RECTIFIED: Self = Self { plain: false, rectified: true };

    pub(crate) fn count(self) -> usize {
        usize::from(self.plain) + usize::from(self.rectified)
    }
}

/// The gradient of a parameter.
pub(crate) enum Gradient {
    /// Of a weight `[outer, inner, KH, KW]`, packed.
    Packed(Tensor, [usize; 4]),
    /// Of anything else: that many f32, the first of these.
    Plain(Tensor, usize),
}

/// Each `[outer, inner, KH, KW]` f32 to `[outer', KH, KW, inner']` of `dtype`, with zeros where there is
/// nothing; (outer', inner') are no smaller.
pub(crate) fn pack_weights(
    weights: &[(Tensor, (usize, usize))],
    dtype: DType,
) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if weights.first().is_some_and(|(first, _)| on_cuda(first.device())) {
        return crate::cuda::weights::pack_weights(weights, dtype);
    }
    let pack = |(weight, (outer, inner)): &(Tensor, (usize, usize))| {
        let weight = weight.pad_with_zeros(0, 0, outer - weight.dim(0)?)?;
        let weight = weight.pad_with_zeros(1, 0, inner - weight.dim(1)?)?;
        weight.contiguous()?.apply_op1_no_bwd(&PackWeight(dtype))
    };
    weights.iter().map(pack).collect()
}

/// The gradients as those of the parameters, f32, side by side.
pub(crate) fn unpack_gradients(gradients: &[Gradient]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(Gradient::Packed(first, _) | Gradient::Plain(first, _)) = gradients.first()
        && on_cuda(first.device())
    {
        return crate::cuda::weights::unpack_gradients(gradients);
    }
    let flat = gradients.iter().map(|gradient| match gradient {
        Gradient::Packed(weight, [outer, inner, ..]) => {
            let weight = weight.apply_op1_no_bwd(&UnpackWeight)?;
            weight.narrow(0, 0, *outer)?.narrow(1, 0, *inner)?.contiguous()?.flatten_all()
        }
        Gradient::Plain(plain, count) => plain.narrow(0, 0, *count),
    });
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)
}

/// `x` `[B, H, W, C]` f32 as a stack takes it: of `dtype`, with zeros up to `channels`.
pub(crate) fn enter(x: &Tensor, dtype: DType, channels: usize) -> Result<Tensor> {
    let own = x.dim(D::Minus1)?;
    if own == channels && dtype == x.dtype() {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(x.device()) {
        return crate::cuda::layers::enter(x, dtype, channels);
    }
    x.pad_with_zeros(D::Minus1, 0, channels - own)?.to_dtype(dtype)
}

/// The other way: the first `channels` of `y`, in f32.
pub(crate) fn leave(y: &Tensor, channels: usize) -> Result<Tensor> {
    if y.dim(D::Minus1)? == channels && y.dtype() == DType::F32 {
        return Ok(y.clone());
    }
    #[cfg(feature = "cuda")]
    if on_cuda(y.device()) {
        return crate::cuda::layers::leave(y, channels);
    }
    y.narrow(D::Minus1, 0, channels)?.to_dtype(DType::F32)?.contiguous()
}

/// Images `[B, H, W, C]` f32 to the windows `[B, h, w, KH·KW·C]` of `dtype` that a convolution of that geometry
/// multiplies.
pub(crate) fn unfold(x: &Tensor, geometry: &Geometry, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_cuda(x.device()) {
        return crate::cuda::windows::unfold(x, geometry, dtype);
    }
    let Geometry { small, large, .. } = *geometry;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let windows: Vec<f32> =
        window_elements(geometry).map(|at| at.map_or(0., |at| values[at])).collect();
    let size = geometry.kernel.0 * geometry.kernel.1 * large.channels;
    let shape = (small.batch, small.height, small.width, size);
    Tensor::from_vec(windows, shape, x.device())?.to_dtype(dtype)
}

/// The other way: the sum of what the windows say of each pixel, in f32, and `bias` `[C]`.
pub(crate) fn fold(y: &Tensor, geometry: &Geometry, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_cuda(y.device()) {
        return crate::cuda::windows::fold(y, geometry, bias);
    }
    let large = geometry.large;
    let windows = y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let bias = bias.map_or(Ok(vec![0.; large.channels]), Tensor::to_vec1::<f32>)?;
    let mut to: Vec<f32> = bias.iter().copied().cycle().take(large.len()).collect();
    for (at, value) in window_elements(geometry).zip(windows) {
        if let Some(at) = at {
            to[at] += value;
        }
    }
    let shape = (large.batch, large.height, large.width, large.channels);
    Tensor::from_vec(to, shape, y.device())
}

/// Where in the image each element of each window is; none outside.
fn window_elements(geometry: &Geometry) -> impl Iterator<Item = Option<usize>> {
    let Geometry { large, small, kernel: (kh, kw), stride, padding, .. } = *geometry;
    let windows = (0..small.batch)
        .flat_map(move |b| (0..small.height).map(move |row| (b, row)))
        .flat_map(move |(b, row)| (0..small.width).map(move |column| (b, row, column)));
    let taps = move || (0..kh).flat_map(move |ky| (0..kw).map(move |kx| (ky, kx)));
    windows.flat_map(move |(b, row, column)| {
        taps().flat_map(move |(ky, kx)| {
            let place = (row * stride + ky).checked_sub(padding);
            let place = place.zip((column * stride + kx).checked_sub(padding));
            let place = place.filter(|&(y, x)| y < large.height && x < large.width);
            (0..large.channels).map(move |c| {
                place.map(|(y, x)| ((b * large.height + y) * large.width + x) * large.channels + c)
            })
        })
    })
}

/// Products that run beside the others: those whose results nobody waits for. On CUDA they have a queue of their own,
/// since one product of a small batch does not fill the device.
#[derive(Default)]
pub(crate) struct Aside {
    /// What they read and write, until they are done.
    held: Vec<Tensor>,
    bytes: usize,
}

impl Aside {
    /// More is not held, lest the device's memory be spent on it.
    const MOST_BYTES: usize = 1 << 30;

    /// [`multiply`] with [`Product::Weight`]. The result is there after [`wait`](Self::wait).
    pub(crate) fn weight_gradient(
        &mut self,
        geometry: &Geometry,
        large: &Tensor,
        small: &Tensor,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if on_cuda(large.device()) {
            let gradient = crate::cuda::convolution::weight_gradient_aside(geometry, large, small)?;
            self.hold([large, small, &gradient])?;
            return Ok(gradient);
        }
        let gradient = multiply(geometry, Product::Weight, large, small)?;
        self.hold([large, small, &gradient])?;
        Ok(gradient)
    }

    fn hold(&mut self, tensors: [&Tensor; 3]) -> Result<()> {
        for tensor in tensors {
            self.bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
            self.held.push(tensor.clone());
        }
        if self.bytes > Self::MOST_BYTES { self.wait() } else { Ok(()) }
    }

    /// Has what comes after wait for all of them.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
    pub(crate) fn wait(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(first) = self.held.first().filter(|first| on_cuda(first.device())) {
            crate::cuda::convolution::wait_for_aside(first)?;
        }
        self.held.clear();
        self.bytes = 0;
        Ok(())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Without it, memory could be given to others that is still written to. There is nobody to tell.
        let _ = self.wait();
    }
}

/// One of the products of a convolution.
pub(crate) fn multiply(
    geometry: &Geometry,
    product: Product,
    a: &Tensor,
    b: &Tensor,
) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Multiply { geometry: *geometry, product })
}

/// `y` `[…, C]` + `bias` (of the first channels) + `residual`, and its ReLU.
pub(crate) fn finish(
    y: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    outputs: Outputs,
) -> Result<Tensor> {
    let (bias, residual) = (bias.cloned(), residual.cloned());
    y.apply_op1_no_bwd(&Finish { bias, residual, outputs })
}

/// `grad` where `gate` is above 0 (or NaN), 0 elsewhere; plus `more`. And its [`column_sums`].
pub(crate) fn mask(
    grad: &Tensor,
    gate: &Tensor,
    more: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if on_cuda(grad.device()) {
        let (masked, sums) = crate::cuda::layers::sum_columns(grad, Some((gate, more)))?;
        return Ok((masked.unwrap_or_else(|| grad.clone()), sums));
    }
    let masked = grad.apply_op2_no_bwd(gate, &Mask { more: more.cloned() })?;
    let sums = column_sums(&masked)?;
    Ok((masked, sums))
}

/// `[…, C]` to its sums `[C]`, f32.
pub(crate) fn column_sums(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_cuda(x.device()) {
        return Ok(crate::cuda::layers::sum_columns(x, None)?.1);
    }
    x.apply_op1_no_bwd(&ColumnSums)
}

struct PackWeight(DType);
struct UnpackWeight;
struct Multiply {
    geometry: Geometry,
    product: Product,
}
struct Finish {
    bias: Option<Tensor>,
    residual: Option<Tensor>,
    outputs: Outputs,
}
struct Mask {
    more: Option<Tensor>,
}
struct ColumnSums;

impl CustomOp1 for PackWeight {
    fn name(&self) -> &'static str {
        "vq-pack-weight"
    }

    fn cpu_fwd(&self, weight: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outer, inner, kh, kw) = layout.shape().dims4()?;
        let packed = swap(f32_elements(weight, layout)?, inner, kh * kw);
        let shape = Shape::from((outer, kh, kw, inner));
        Ok((in_dtype(packed, self.0)?, shape))
    }
}

impl CustomOp1 for UnpackWeight {
    fn name(&self) -> &'static str {
        "vq-unpack-weight"
    }

    fn cpu_fwd(&self, weight: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outer, kh, kw, inner) = layout.shape().dims4()?;
        let unpacked = swap(&in_f32(weight, layout)?, kh * kw, inner);
        Ok((CpuStorage::F32(unpacked), (outer, inner, kh, kw).into()))
    }
}

impl Multiply {
    fn output_shape(&self) -> Shape {
        let Geometry { large, small, kernel: (kh, kw), .. } = self.geometry;
        match self.product {
            Product::LargeToSmall => (small.batch, small.height, small.width, small.channels),
            Product::SmallToLarge => (large.batch, large.height, large.width, large.channels),
            Product::Weight => (small.channels, kh, kw, large.channels),
        }
        .into()
    }
}

impl CustomOp2 for Multiply {
    fn name(&self) -> &'static str {
        "vq-convolution-product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dtype = a.dtype();
        let (a, b) = (in_f32(a, a_layout)?, in_f32(b, b_layout)?);
        // The factors are rounded already.
        let geometry = Geometry { precision: crate::Precision::F32, ..self.geometry };
        let (_, inner, taps) = geometry.weight_shape();
        let (shape, buffers) = (self.output_shape(), Buffers::default());
        let mut out = vec![0.; shape.elem_count()];
        let a = Elements::F32(&a);
        match self.product {
            Product::LargeToSmall => {
                let weight = swap(&b, taps, inner);
                let (finish, to) = (CpuFinish::default(), Output::F32(&mut out));
                large_to_small(&geometry, a, false, &weight, finish, &buffers, to);
            }
            Product::SmallToLarge => {
                let weight = swap(&b, taps, inner);
                let (finish, to) = (CpuFinish::default(), Output::F32(&mut out));
                small_to_large(&geometry, a, false, &weight, finish, &buffers, to);
            }
            Product::Weight => {
                let small = Elements::F32(&b);
                weight_gradient(&geometry, (a, false), (small, false), &buffers, &mut out);
                out = swap(&out, inner, taps);
            }
        }
        Ok((in_dtype(out, dtype)?, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &candle_core::CudaStorage,
        a_layout: &Layout,
        b: &candle_core::CudaStorage,
        b_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (a, b) = ((a, a_layout), (b, b_layout));
        let out = crate::cuda::convolution::multiply(&self.geometry, self.product, a, b)?;
        Ok((out, self.output_shape()))
    }
}

impl Finish {
    fn output_shape(&self, layout: &Layout) -> Shape {
        let mut dims = layout.dims().to_vec();
        if self.outputs.count() == 2 {
            dims.insert(0, 2);
        }
        dims.into()
    }
}

impl CustomOp1 for Finish {
    fn name(&self) -> &'static str {
        "vq-finish-layer"
    }

    fn cpu_fwd(&self, y: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let channels = layout.dims().last().copied().unwrap_or(1).max(1);
        let dtype = y.dtype();
        let mut plain = in_f32(y, layout)?;
        if let Some(bias) = &self.bias {
            let bias = bias.to_vec1::<f32>()?;
            for row in plain.chunks_mut(channels) {
                row.iter_mut().zip(&bias).for_each(|(y, bias)| *y += bias);
            }
        }
        if let Some(residual) = &self.residual {
            let residual = residual.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            plain.iter_mut().zip(&residual).for_each(|(y, residual)| *y += residual);
        }
        let rectified = plain.iter().map(|&y| if y <= 0. { 0. } else { y });
        let out = match self.outputs {
            Outputs { plain: true, rectified: true } => {
                plain.iter().copied().chain(rectified).collect()
            }
            Outputs { rectified: true, .. } => rectified.collect(),
            _ => plain,
        };
        Ok((in_dtype(out, dtype)?, self.output_shape(layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (bias, residual) = (self.bias.as_ref(), self.residual.as_ref());
        let out = crate::cuda::layers::finish(y, layout, bias, residual, self.outputs)?;
        Ok((out, self.output_shape(layout)))
    }
}

impl CustomOp2 for Mask {
    fn name(&self) -> &'static str {
        "vq-mask-gradient"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dtype = grad.dtype();
        let (mut grad, gate) = (in_f32(grad, grad_layout)?, in_f32(gate, gate_layout)?);
        for (grad, gate) in grad.iter_mut().zip(&gate) {
            if *gate <= 0. {
                *grad = 0.;
            }
        }
        if let Some(more) = &self.more {
            let more = more.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            grad.iter_mut().zip(&more).for_each(|(grad, more)| *grad += more);
        }
        Ok((in_dtype(grad, dtype)?, grad_layout.shape().clone()))
    }
}

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "vq-column-sums"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let columns = layout.dims().last().copied().unwrap_or(1);
        let mut sums = vec![0.; columns];
        cpu_column_sums(Elements::F32(&in_f32(x, layout)?), columns, &mut sums);
        Ok((CpuStorage::F32(sums), columns.into()))
    }
}

/// `[…, a, b]` to `[…, b, a]`.
fn swap(from: &[f32], a: usize, b: usize) -> Vec<f32> {
    let mut to = Vec::with_capacity(from.len());
    for matrix in from.chunks_exact((a * b).max(1)) {
        for column in 0..b {
            to.extend(matrix.iter().skip(column).step_by(b));
        }
    }
    to
}

fn in_f32(storage: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
    match storage.to_dtype(layout, DType::F32)? {
        CpuStorage::F32(values) => Ok(values),
        _ => candle_core::bail!("not f32"),
    }
}

fn in_dtype(values: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
    let layout = Layout::contiguous(values.len());
    let values = CpuStorage::F32(values);
    if dtype == DType::F32 { Ok(values) } else { values.to_dtype(&layout, dtype) }
}

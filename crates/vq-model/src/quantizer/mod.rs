//! From continuous vectors to discrete codes and back.

mod binary;
mod entropy;
mod estimator;
mod finite_scalar;
mod index_backprop;
mod kmeans;
mod product;
mod residual;
mod sim;
mod update;
mod vector;

use candle_core::Tensor;
use vq_ops::{FeatureMap, StepNumber};

pub use estimator::{rotation, straight_through};
pub(crate) use kmeans::KMeans;
pub use update::{CodebookReport, CodebookUpdate};
pub use vector::VectorQuantizer;

use crate::part::Builder;
use crate::{Error, QuantizerConfig, QuantizerKind, Result};

/// A map between vectors and codes. Everything but [`initialize`](Self::initialize) and
/// [`update`](Self::update) is pure: evaluation cannot change a quantizer.
///
/// A quantizer has G codebooks and gives G codes to each position. Its codes are `[B,h,w]` u32 where
/// G = 1 and `[B,h,w,G]` where G > 1.
pub trait Quantizer: std::fmt::Debug + Send + Sync {
    /// K: the codes of each codebook are in 0..K.
    fn codebook_size(&self) -> usize;

    /// G: codes at each position, one for each codebook.
    fn codes_per_position(&self) -> usize {
        1
    }

    /// D, the length of the vectors.
    fn dim(&self) -> usize;

    /// `z_e` `[B,h,w,D]` f32 to its codes, their vectors, and the losses. Differentiable.
    fn quantize(&self, z_e: &Tensor) -> Result<Quantized>;

    /// [`quantize`](Self::quantize) as a training step does it: with the choices that are random in
    /// training only, which depend on `step` alone. The codes are the same.
    fn quantize_training(&self, z_e: &Tensor, step: TrainingStep) -> Result<Quantized> {
        let _ = step;
        self.quantize(z_e)
    }

    /// The same of a map as a stack gives it, and back to what stacks take; as a training step does it where there is
    /// one. Where maps lie beside candle's graph, a kind can leave them there.
    fn quantize_map(&self, z_e: &FeatureMap, step: Option<TrainingStep>) -> Result<QuantizedMap> {
        through_graph(self, z_e, step)
    }

    /// `z_e` `[B,h,w,D]` f32 to codes `[B,h,w]` or `[B,h,w,G]` u32.
    fn encode(&self, z_e: &Tensor) -> Result<Tensor>;

    /// Codes `[…]`, where G > 1 `[…,G]`, u32 to their vectors `[…,D]`: exactly the values of
    /// [`quantize`](Self::quantize)'s `z_q`. No gradient. The kind `residual` also takes the codes of the
    /// first g stages, `[…,g]`.
    fn decode(&self, codes: &Tensor) -> Result<Tensor>;

    /// The code vectors of each codebook, detached: `[K,D]`, with the kind `product` `[K,D/G]`. Empty
    /// where the codes follow from their numbers, however few they are.
    fn codebooks(&self) -> Result<Vec<Tensor>>;

    /// Multiply-adds that finding the codes of `positions` vectors takes.
    fn multiply_adds(&self, positions: usize) -> u64;

    /// Places the code vectors among a pool of encoder outputs `[…,D]`, by k-means. Does nothing where a kind
    /// has no such start.
    fn initialize(&self, z_e: &Tensor, how: KMeans<'_>) -> Result<()> {
        let _ = (z_e, how);
        Ok(())
    }

    /// Whether [`initialize`](Self::initialize) was ever called, in this run or one before it, or has
    /// nothing to do.
    fn is_initialized(&self) -> Result<bool> {
        Ok(true)
    }

    /// Moves code vectors after an optimizer's step: `z_e` `[…,D]` and `codes` (`[…]` or `[…,G]`) are
    /// what was quantized in that step. One report per codebook that is looked after here; none with
    /// the kinds whose codebooks are implicit or take care of themselves.
    fn update(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<CodebookReport>> {
        let _ = (z_e, codes, options, step);
        Ok(Vec::new())
    }

    /// Whether a training step gives the device the same work every time, whatever the step, so that it can be
    /// [recorded](vq_ops::Recording). [`update`](Self::update) is then [`follow`](Self::follow), which is part
    /// of that work, and [`revive`](Self::revive), which is not.
    fn repeats(&self) -> bool {
        true
    }

    /// The part of [`update`](Self::update) that moves code vectors by what was assigned to them, without
    /// waiting for the device. Does nothing with the kinds that have none.
    fn follow(&self, z_e: &Tensor, codes: &Tensor, step: StepNumber<'_>) -> Result<()> {
        let _ = (z_e, codes, step);
        Ok(())
    }

    /// The other part: revives dead codes. Per codebook that is looked after, the name of its parameter, where
    /// it is one, and the codes that were moved.
    fn revive(
        &self,
        z_e: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<(Option<String>, Vec<usize>)>> {
        let _ = (z_e, options, step);
        Ok(Vec::new())
    }
}

/// What a [`Quantizer`] makes of `z_e` `[B,h,w,D]`.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The code vectors `[B,h,w,D]`, exact; its gradient reaches `z_e` as the
    /// [`GradientEstimator`](crate::GradientEstimator) says.
    pub z_q: Tensor,
    /// `[B,h,w]` u32, where G > 1 `[B,h,w,G]`.
    pub codes: Tensor,
    /// ‖sg\[`z_e`\] − e‖², a mean over B·h·w·D (van den Oord et al. 2017, eq. 3, second term). Exactly 0
    /// where the codebook is not trained by gradients: with the rule `ema` and implicit codes. A sum
    /// over the stages with the kind `residual`; with `index-backprop` it also holds the term through
    /// the probabilities of all codes.
    pub codebook_loss: Tensor,
    /// ‖`z_e` − sg\[e\]‖², a mean over B·h·w·D, without β (van den Oord et al. 2017, eq. 3, third term). A sum
    /// over the stages with the kind `residual`.
    pub commitment_loss: Tensor,
    /// The entropy loss, times its weight; none where the kind has no such term or it is off.
    pub entropy_loss: Option<Tensor>,
}

/// What a [`Quantizer`] makes of a map: as [`Quantized`].
#[derive(Clone, Debug)]
pub struct QuantizedMap {
    /// What was quantized, `[B,h,w,D]` f32, detached.
    pub z_e: Tensor,
    /// Its code vectors.
    pub z_q: FeatureMap,
    /// `[B,h,w]` u32, where G > 1 `[B,h,w,G]`.
    pub codes: Tensor,
    /// See [`Quantized::codebook_loss`].
    pub codebook_loss: Tensor,
    /// See [`Quantized::commitment_loss`].
    pub commitment_loss: Tensor,
    /// See [`Quantized::entropy_loss`].
    pub entropy_loss: Option<Tensor>,
}

/// Which step of which run it is: what random choices in training depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainingStep {
    /// The run's seed.
    pub seed: u64,
    /// The step.
    pub step: u64,
    /// Which image of the step's batch the first one given is: 0, unless the batch is run through the
    /// model in parts. Each image's random choices are those that it has in the whole batch.
    pub first_image: usize,
}

/// [`Quantizer::quantize_map`] by what the kind makes of tensors of the graph.
fn through_graph<Q: Quantizer + ?Sized>(
    quantizer: &Q,
    z_e: &FeatureMap,
    step: Option<TrainingStep>,
) -> Result<QuantizedMap> {
    let z_e = z_e.tensor()?;
    let quantized = match step {
        Some(step) => quantizer.quantize_training(&z_e, step)?,
        None => quantizer.quantize(&z_e)?,
    };
    Ok(QuantizedMap {
        z_e: z_e.detach(),
        z_q: quantized.z_q.into(),
        codes: quantized.codes,
        codebook_loss: quantized.codebook_loss,
        commitment_loss: quantized.commitment_loss,
        entropy_loss: quantized.entropy_loss,
    })
}

/// The quantizer that `config` describes, with fresh parameters; `name` goes before their names.
pub(crate) fn build(
    name: &str,
    config: &QuantizerConfig,
    builder: &mut Builder,
) -> Result<Box<dyn Quantizer>> {
    Ok(match config.kind {
        QuantizerKind::Vector => Box::new(VectorQuantizer::new(name, config, builder)?),
        QuantizerKind::Product => Box::new(product::ProductQuantizer::new(name, config, builder)?),
        QuantizerKind::Residual => {
            Box::new(residual::ResidualQuantizer::new(name, config, builder)?)
        }
        QuantizerKind::FiniteScalar => {
            Box::new(finite_scalar::FiniteScalarQuantizer::new(name, config, builder.device())?)
        }
        QuantizerKind::LookupFree | QuantizerKind::BinarySpherical => {
            Box::new(binary::BinaryQuantizer::new(name, config))
        }
        QuantizerKind::Sim => Box::new(sim::SimQuantizer::new(name, config, builder)?),
        QuantizerKind::IndexBackprop => {
            Box::new(index_backprop::IndexBackpropQuantizer::new(name, config, builder)?)
        }
    })
}

/// `[…,D]` to `[N,D]`, or an error that says what was expected. Differentiable.
fn rows(name: &str, z_e: &Tensor, dim: usize) -> Result<Tensor> {
    match z_e.dims().last() {
        Some(&last) if last == dim => Ok(z_e.reshape(((), dim))?),
        _ => Err(Error::Input(format!("{name} takes [.., {dim}], got {:?}", z_e.dims()))),
    }
}

/// `e` `[N,D]` back in the shape of the codes `[…]`, as `[…,D]`.
fn unflatten(e: &Tensor, codes: &Tensor) -> Result<Tensor> {
    let mut shape = codes.dims().to_vec();
    shape.push(e.dim(1)?);
    Ok(e.reshape(shape)?)
}

/// The scalar 0, for a term that a kind does not have.
fn zero_like(x: &Tensor) -> Result<Tensor> {
    Ok(Tensor::zeros((), x.dtype(), x.device())?)
}

/// An error where a vector of `z` is not finite: rounding and signs would give it a code all the same.
fn require_finite(name: &str, z: &Tensor) -> Result<()> {
    // On another device the check would have to wait for it. The losses show it there.
    if !z.device().is_cpu() {
        return Ok(());
    }
    // 0·x is 0 for finite x and NaN otherwise.
    let sum = z.detach().affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>()?;
    if sum == 0.0 {
        return Ok(());
    }
    Err(Error::Input(format!("{name}: a vector holds a value that is not finite")))
}

/// The codes as numbers on the CPU; an error where one is not below `size`.
fn checked_codes(name: &str, codes: &Tensor, size: usize) -> Result<Vec<u32>> {
    let values = codes.flatten_all()?.to_vec1::<u32>()?;
    match values.iter().find(|&&code| code as usize >= size) {
        None => Ok(values),
        Some(code) => Err(Error::Input(format!("{name}: code {code} is not below {size}"))),
    }
}

//! The vector quantizer of van den Oord et al. 2017.

use candle_core::{D, Tensor, Var};
use vq_ops::{FeatureMap, Replaced, StepNumber, lookup, nearest_codes, squared_error};

use super::{
    CodebookReport, CodebookUpdate, Quantized, QuantizedMap, Quantizer, TrainingStep, through_graph,
};
use super::{KMeans, kmeans, rows, update, zero_like};
use crate::part::Builder;
use crate::{CodebookRule, GradientEstimator, QuantizerConfig, Result};

/// Replaces each vector by the nearest of K code vectors e (van den Oord et al. 2017, eq. 1 and 2).
#[derive(Debug)]
pub struct VectorQuantizer {
    pub(super) config: QuantizerConfig,
    pub(super) name: String,
    /// e `[K,D]`; a parameter with the rule `gradient`, a buffer with `ema`.
    pub(super) codebook: Var,
    /// N `[K]`: the moving average of how often each code is chosen per step.
    pub(super) usage: Var,
    /// m `[K,D]`: the moving average of the sum of the vectors that choose each code. Rule `ema` only.
    pub(super) sums: Option<Var>,
    /// `[1]`: 1 once k-means has placed the codebook.
    pub(super) initialized: Var,
}

impl VectorQuantizer {
    /// Code vectors start uniform in ±1/K, as in the paper's code; N = 1 and m = e, so that e = m/N from
    /// the start and a code that is never chosen stays where it is.
    pub(crate) fn new(name: &str, config: &QuantizerConfig, builder: &mut Builder) -> Result<Self> {
        let (k, d) = (config.codebook_size, config.dim);
        let codebook_name = format!("{name}.codebook");
        let bound = 1.0 / k as f64;
        let (codebook, sums) = match config.rule {
            CodebookRule::Gradient => (builder.parameter(&codebook_name, &[k, d], bound)?, None),
            CodebookRule::Ema => {
                let values = builder.uniform(&codebook_name, &[k, d], bound);
                let codebook = builder.buffer(&codebook_name, &[k, d], values.clone())?;
                (codebook, Some(builder.buffer(&format!("{name}.sums"), &[k, d], values)?))
            }
        };
        Ok(Self {
            config: config.clone(),
            name: name.to_owned(),
            codebook,
            usage: builder.buffer(&format!("{name}.usage"), &[k], vec![1.0; k])?,
            sums,
            initialized: builder.buffer(&format!("{name}.initialized"), &[1], vec![0.0])?,
        })
    }

    /// `[…,D]` to `[N,D]`, of length 1 if `cosine`. Differentiable.
    fn flatten(&self, z_e: &Tensor) -> Result<Tensor> {
        self.scaled(&rows(&self.name, z_e, self.config.dim)?)
    }

    /// [`flatten`](Self::flatten) without a gradient: what codes are chosen by and averages are of.
    pub(super) fn vectors(&self, z_e: &Tensor) -> Result<Tensor> {
        self.flatten(&z_e.detach())
    }

    /// Rows `[N,D]` as the codebook's metric sees them: of length 1 if `cosine`, else as they are.
    pub(super) fn scaled(&self, rows: &Tensor) -> Result<Tensor> {
        if !self.config.cosine {
            return Ok(rows.clone());
        }
        // The addend keeps the gradient finite for a row of zeros.
        let norm = (rows.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        Ok(rows.broadcast_div(&norm)?)
    }

    /// Whether vectors are replaced as they are, their gradient straight through.
    fn is_plain(&self) -> bool {
        !self.config.cosine && self.config.gradient_estimator == GradientEstimator::StraightThrough
    }

    /// The codes `[N]` of `z_e` `[…,D]`.
    pub(super) fn nearest(&self, z_e: &Tensor) -> Result<Tensor> {
        Ok(nearest_codes(&self.vectors(z_e)?, &self.codebook()?)?)
    }

    /// The vectors `[N,D]` of `codes` `[N]`: as what the codebook is trained by (rule `gradient` only), and
    /// detached.
    pub(super) fn lookup(&self, codes: &Tensor) -> Result<(Option<Tensor>, Tensor)> {
        match self.config.rule {
            CodebookRule::Gradient => {
                let e = self.scaled(&lookup(&self.codebook, codes)?)?;
                let detached = e.detach();
                Ok((Some(e), detached))
            }
            CodebookRule::Ema => Ok((None, lookup(&self.codebook()?, codes)?)),
        }
    }

    /// The name of the codebook, where the optimizer trains it.
    pub(super) fn parameter(&self) -> Option<String> {
        match self.config.rule {
            CodebookRule::Gradient => Some(format!("{}.codebook", self.name)),
            CodebookRule::Ema => None,
        }
    }

    /// All code vectors `[K,D]`, detached; of length 1 if `cosine`.
    pub(super) fn codebook(&self) -> Result<Tensor> {
        self.scaled(&self.codebook.as_detached_tensor())
    }
}

/// ‖sg\[z\] − e‖² of what is trained by it, if anything is.
fn codebook_loss(z: &Tensor, trained: Option<&Tensor>) -> Result<Tensor> {
    match trained {
        Some(trained) => Ok(squared_error(&z.detach().reshape(trained.dims())?, trained)?),
        None => zero_like(z),
    }
}

impl Quantizer for VectorQuantizer {
    fn codebook_size(&self) -> usize {
        self.config.codebook_size
    }

    fn dim(&self) -> usize {
        self.config.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        if self.is_plain() {
            // Where a vector is one with its neighbours as it came, no step of the graph has to take them apart.
            let quantized = self.quantize_map(&z_e.clone().into(), None)?;
            return Ok(Quantized {
                z_q: quantized.z_q.tensor()?,
                codes: quantized.codes,
                codebook_loss: quantized.codebook_loss,
                commitment_loss: quantized.commitment_loss,
                entropy_loss: quantized.entropy_loss,
            });
        }
        let codes = self.nearest(z_e)?;
        let (trained, e) = self.lookup(&codes)?;
        let (b, h, w, _) = z_e.dims4()?;
        let z = self.flatten(z_e)?;
        Ok(Quantized {
            z_q: self.config.gradient_estimator.apply(&z, &e)?.reshape(z_e.dims())?,
            codes: codes.reshape((b, h, w))?,
            codebook_loss: codebook_loss(&z, trained.as_ref())?,
            commitment_loss: squared_error(&z, &e)?,
            entropy_loss: None,
        })
    }

    fn quantize_map(&self, z_e: &FeatureMap, step: Option<TrainingStep>) -> Result<QuantizedMap> {
        if !self.is_plain() {
            return through_graph(self, z_e, step);
        }
        let z = z_e.values()?;
        let codes = self.nearest(&z)?;
        let (trained, e) = self.lookup(&codes)?;
        let (b, h, w, _) = z.dims4()?;
        let Replaced { map, error } = z_e.replace(&z, &e.reshape(z.dims())?)?;
        Ok(QuantizedMap {
            codes: codes.reshape((b, h, w))?,
            codebook_loss: codebook_loss(&z, trained.as_ref())?,
            commitment_loss: error,
            entropy_loss: None,
            z_e: z,
            z_q: map,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        Ok(self.nearest(z_e)?.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        Ok(lookup(&self.codebook()?, codes)?)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        Ok(vec![self.codebook()?])
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        (positions * self.config.codebook_size * self.config.dim) as u64
    }

    fn initialize(&self, z_e: &Tensor, how: KMeans<'_>) -> Result<()> {
        kmeans::initialize(self, z_e, how)
    }

    fn is_initialized(&self) -> Result<bool> {
        Ok(self.initialized.to_vec1::<f32>()?.first().is_some_and(|&flag| flag > 0.0))
    }

    fn update(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<CodebookReport>> {
        Ok(vec![update::update(self, z_e, codes, options, step)?])
    }

    fn follow(&self, z_e: &Tensor, codes: &Tensor, step: StepNumber<'_>) -> Result<()> {
        update::follow(self, z_e, codes, step).map(|_counts| ())
    }

    fn revive(
        &self,
        z_e: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<(Option<String>, Vec<usize>)>> {
        Ok(vec![(self.parameter(), update::revive_if_due(self, z_e, options, step)?)])
    }
}

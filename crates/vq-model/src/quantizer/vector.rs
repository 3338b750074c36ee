//! The vector quantizer of van den Oord et al. 2017.

use candle_core::{Tensor, Var};
use vq_ops::nearest_codes;

use super::{CodebookReport, CodebookUpdate, Quantized, Quantizer};
use super::{kmeans, rotation, straight_through, update};
use crate::part::Builder;
use crate::pointwise::squared_error;
use crate::{CodebookRule, Error, GradientEstimator, QuantizerConfig, Result};

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

    /// `[…,D]` to `[N,D]`, detached.
    pub(super) fn flatten(&self, z_e: &Tensor) -> Result<Tensor> {
        let dim = self.config.dim;
        match z_e.dims().last() {
            Some(&last) if last == dim => Ok(z_e.detach().reshape(((), dim))?),
            _ => {
                Err(Error::Input(format!("{} takes [.., {dim}], got {:?}", self.name, z_e.dims())))
            }
        }
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
        let flat = z_e.reshape(((), self.config.dim))?;
        let codes = nearest_codes(&self.flatten(z_e)?, &self.codebook.as_detached_tensor())?;
        let (codebook_loss, e) = match self.config.rule {
            CodebookRule::Gradient => {
                let e = self.codebook.index_select(&codes, 0)?;
                (squared_error(&flat.detach(), &e)?, e.detach())
            }
            CodebookRule::Ema => {
                let e = self.codebook.as_detached_tensor().index_select(&codes, 0)?;
                (Tensor::zeros((), e.dtype(), e.device())?, e)
            }
        };
        let z_q = match self.config.gradient_estimator {
            GradientEstimator::StraightThrough => straight_through(&flat, &e)?,
            GradientEstimator::Rotation => rotation(&flat, &e)?,
        };
        let (b, h, w, _) = z_e.dims4()?;
        Ok(Quantized {
            z_q: z_q.reshape(z_e.dims())?,
            codes: codes.reshape((b, h, w))?,
            codebook_loss,
            commitment_loss: squared_error(&flat, &e)?,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let codes = nearest_codes(&self.flatten(z_e)?, &self.codebook.as_detached_tensor())?;
        let (b, h, w, _) = z_e.dims4()?;
        Ok(codes.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let e = self.codebook.as_detached_tensor().index_select(&codes.flatten_all()?, 0)?;
        let mut shape = codes.dims().to_vec();
        shape.push(self.config.dim);
        Ok(e.reshape(shape)?)
    }

    fn codebook(&self) -> Result<Tensor> {
        Ok(self.codebook.as_detached_tensor())
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        (positions * self.config.codebook_size * self.config.dim) as u64
    }

    fn initialize(&self, z_e: &Tensor, rounds: usize, seed: u64) -> Result<()> {
        kmeans::initialize(self, z_e, rounds, seed)
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
    ) -> Result<CodebookReport> {
        update::update(self, z_e, codes, options, step)
    }
}

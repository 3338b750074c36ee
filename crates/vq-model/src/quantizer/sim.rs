//! `SimVQ` (Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear
//! Layer").

use candle_core::{Tensor, Var};
use vq_ops::{lookup, nearest_codes, squared_error};

use super::{Quantized, Quantizer, rows};
use crate::part::Builder;
use crate::{QuantizerConfig, Result};

/// The nearest of the K vectors C·Wᵀ, of which C `[K,D]` stays as it was drawn and W `[D,D]` is trained
/// (Zhu et al. 2024): every step moves all codes, so that none is left behind.
///
/// C is normal with variance 1/D, and not placed by k-means: a fresh encoder's outputs hardly differ, and a
/// matrix can spread their centres far less well than C. [`decode`](Quantizer::decode) gives rows of C·Wᵀ, the vectors that the
/// decoder was trained on, never those of C.
#[derive(Debug)]
pub(super) struct SimQuantizer {
    name: String,
    config: QuantizerConfig,
    /// C; a buffer.
    fixed: Var,
    /// W, `[out,in]` as in `PyTorch`; a parameter.
    transform: Var,
}

impl SimQuantizer {
    pub(super) fn new(name: &str, config: &QuantizerConfig, builder: &mut Builder) -> Result<Self> {
        let (k, d) = (config.codebook_size, config.dim);
        let deviation = 1.0 / (d as f64).sqrt();
        let fixed = format!("{name}.fixed");
        let values = builder.normal(&fixed, &[k, d], deviation);
        Ok(Self {
            name: name.to_owned(),
            config: config.clone(),
            fixed: builder.buffer(&fixed, &[k, d], values)?,
            // PyTorch's default for a linear layer.
            transform: builder.parameter(&format!("{name}.transform"), &[d, d], deviation)?,
        })
    }

    /// C·Wᵀ `[K,D]`. Always all of it: a product's rounding may depend on its shape, and a code must have
    /// one vector.
    fn codebook(&self, transform: &Tensor) -> Result<Tensor> {
        Ok(self.fixed.as_detached_tensor().matmul(&transform.t()?)?)
    }
}

impl Quantizer for SimQuantizer {
    fn codebook_size(&self) -> usize {
        self.config.codebook_size
    }

    fn dim(&self) -> usize {
        self.config.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        let (b, h, w, _) = z_e.dims4()?;
        let flat = rows(&self.name, z_e, self.config.dim)?;
        let codebook = self.codebook(self.transform.as_tensor())?;
        let codes = nearest_codes(&flat.detach(), &codebook.detach())?;
        let e = lookup(&codebook, &codes)?;
        let z_q = self.config.gradient_estimator.apply(&flat, &e.detach())?;
        Ok(Quantized {
            z_q: z_q.reshape(z_e.dims())?,
            codes: codes.reshape((b, h, w))?,
            codebook_loss: squared_error(&flat.detach(), &e)?,
            commitment_loss: squared_error(&flat, &e.detach())?,
            entropy_loss: None,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        let flat = rows(&self.name, &z_e.detach(), self.config.dim)?;
        let codebook = self.codebook(&self.transform.as_detached_tensor())?;
        Ok(nearest_codes(&flat, &codebook)?.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let codebook = self.codebook(&self.transform.as_detached_tensor())?;
        Ok(lookup(&codebook, codes)?)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        Ok(vec![self.codebook(&self.transform.as_detached_tensor())?])
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        let QuantizerConfig { codebook_size, dim, .. } = self.config;
        ((positions + dim) * codebook_size * dim) as u64
    }
}

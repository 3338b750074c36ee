//! Index backpropagation quantization (Shi et al. 2024, "Scalable Image Tokenization with Index
//! Backpropagation Quantization").

use candle_core::{D, Tensor, Var};
use vq_ops::{lookup, nearest_codes, replace_value, squared_error};

use super::entropy::entropy_loss;
use super::{Quantized, Quantizer, rows};
use crate::part::Builder;
use crate::{QuantizerConfig, Result};

/// The code of the largest inner product with `z_e`, with a gradient to all codes at once.
///
/// With C `[K,D]` the codebook and p = softmax(C·`z_e`), the one-hot code is hard(p) − sg\[p\] + p, so that
/// `z_q` = onehotᵀC has the value of the code e and its gradient reaches `z_e` and every row of C through p
/// (Shi et al. 2024, section 3). [`Quantized::codebook_loss`] holds ‖`z_e` − `z_q`‖² with that gradient and
/// ‖sg\[`z_e`\] − e‖²; [`Quantized::commitment_loss`] ‖`z_e` − sg\[e\]‖², the term that β is the factor of (the
/// authors' code has β on the codebook's term instead). The entropy loss is E\[H(q)\] − γ·H(E\[q\]) of
/// q = softmax(C·`z_e`/τ).
///
/// A step holds an N × K matrix of probabilities.
#[derive(Debug)]
pub(super) struct IndexBackpropQuantizer {
    name: String,
    config: QuantizerConfig,
    /// C; a parameter.
    codebook: Var,
}

impl IndexBackpropQuantizer {
    /// Code vectors start uniform in ±1/K, as in the authors' code.
    pub(super) fn new(name: &str, config: &QuantizerConfig, builder: &mut Builder) -> Result<Self> {
        let (k, d) = (config.codebook_size, config.dim);
        let codebook = builder.parameter(&format!("{name}.codebook"), &[k, d], 1.0 / k as f64)?;
        Ok(Self { name: name.to_owned(), config: config.clone(), codebook })
    }

    /// The codes `[N]` of the largest inner products of `z` `[N,D]`.
    ///
    /// ‖z‖² − 2z·e + ‖e‖² is smallest where z·e is largest once all ‖e‖² are the same: each code gets a
    /// further number √(max‖e‖² − ‖e‖²), each vector a 0. The search is then that of the other quantizers,
    /// whose answer does not depend on the rest of the batch, as that of a matrix product can. z is
    /// scaled to the codes' length first, which changes no argmax and keeps the rounding of the further
    /// number as small beside z·e as that of a product would be.
    fn assign(&self, z: &Tensor) -> Result<Tensor> {
        let codebook = self.codebook.as_detached_tensor();
        let squares = codebook.sqr()?.sum_keepdim(D::Minus1)?;
        let largest = squares.max_all()?.reshape((1, 1))?;
        let further = largest.broadcast_sub(&squares)?.sqrt()?;
        let codes = Tensor::cat(&[&codebook, &further], D::Minus1)?;
        let norm =
            z.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(f64::from(f32::MIN_POSITIVE))?;
        let scaled = z.broadcast_div(&norm)?.broadcast_mul(&largest.sqrt()?)?;
        let zeros = norm.zeros_like()?;
        Ok(nearest_codes(&Tensor::cat(&[&scaled, &zeros], D::Minus1)?, &codes)?)
    }
}

impl Quantizer for IndexBackpropQuantizer {
    fn codebook_size(&self) -> usize {
        self.config.codebook_size
    }

    fn dim(&self) -> usize {
        self.config.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        let (b, h, w, _) = z_e.dims4()?;
        let flat = rows(&self.name, z_e, self.config.dim)?;
        let codes = self.assign(&flat.detach())?;
        let e = lookup(&self.codebook, &codes)?;
        let logits = flat.matmul(&self.codebook.t()?)?;
        // hardᵀC moves the codes that were chosen, pᵀ·sg[C] moves p: together the gradient of onehotᵀC.
        let soft = softmax(&logits)?.matmul(&self.codebook.as_detached_tensor())?;
        let z_q = replace_value(&(&e + soft)?, &e)?;
        let QuantizerConfig { entropy_weight, diversity, entropy_temperature, .. } = self.config;
        let entropy_loss = if entropy_weight > 0.0 {
            let scaled = (logits / entropy_temperature)?;
            Some((entropy_loss(&scaled, diversity)? * entropy_weight)?)
        } else {
            None
        };
        let codebook_loss = (squared_error(&flat, &z_q)? + squared_error(&flat.detach(), &e)?)?;
        Ok(Quantized {
            z_q: z_q.reshape(z_e.dims())?,
            codes: codes.reshape((b, h, w))?,
            codebook_loss,
            commitment_loss: squared_error(&flat, &e.detach())?,
            entropy_loss,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        let flat = rows(&self.name, &z_e.detach(), self.config.dim)?;
        Ok(self.assign(&flat)?.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let codebook = self.codebook.as_detached_tensor();
        Ok(lookup(&codebook, codes)?)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        Ok(vec![self.codebook.as_detached_tensor()])
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        (positions * self.config.codebook_size * self.config.dim) as u64
    }
}

/// Over the last dimension. Differentiable.
fn softmax(logits: &Tensor) -> Result<Tensor> {
    let exp = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

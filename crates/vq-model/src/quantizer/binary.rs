//! Codes of signs: lookup-free quantization (Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer
//! is Key to Visual Generation") and binary spherical quantization (Zhao et al. 2024, "Image and Video
//! Tokenization with Binary Spherical Quantization").

use candle_core::{D, DType, Tensor};
use vq_ops::squared_error;

use super::entropy::bitwise_entropy_loss;
use super::{Quantized, Quantizer, checked_codes, require_finite, rows, straight_through};
use super::{unflatten, zero_like};
use crate::{QuantizerConfig, QuantizerKind, Result};

/// One bit for each of the D numbers: K = 2^D codes without a codebook.
///
/// - `lookup-free`: eᵢ = sign(zᵢ), that is 1 where zᵢ > 0 and −1 elsewhere (Yu et al. 2023, eq. 3).
/// - `binary-spherical`: the same for u = `z_e`/‖`z_e`‖, with eᵢ = sign(uᵢ)/√D, of length 1 as well (Zhao et
///   al. 2024, section 4). The losses are those of u.
///
/// The code is Σ 2^{D−1−i}·\[zᵢ > 0\], the first number's bit being the highest (Yu et al. 2023 eq. 4 has
/// it the lowest; this is the order of the package that the golden values are of). The gradient is
/// straight-through from e to z (u), and the loss ‖z − sg\[e\]‖² (‖u − sg\[e\]‖²).
///
/// The entropy loss is E\[H(code|z)\] − γ·H(E\[code|z\]) with code|z the softmax of 2·z·e/τ over all e (Yu et al.
/// 2023, eq. 5). That is a product over the bits with the log-odds 4·s·zᵢ/τ (s the size of eᵢ), which gives
/// the first term exactly; for the second see [`bitwise_entropy_loss`]. (Zhao et al. 2024 write τ for 2/τ.)
#[derive(Debug)]
pub(super) struct BinaryQuantizer {
    name: String,
    config: QuantizerConfig,
}

impl BinaryQuantizer {
    pub(super) fn new(name: &str, config: &QuantizerConfig) -> Self {
        Self { name: name.to_owned(), config: config.clone() }
    }

    fn is_spherical(&self) -> bool {
        self.config.kind == QuantizerKind::BinarySpherical
    }

    /// The size of each number of a code vector.
    fn scale(&self) -> f64 {
        if self.is_spherical() { 1.0 / (self.config.bits as f64).sqrt() } else { 1.0 }
    }

    /// `[…,D]` to `[N,D]`, or an error where there is a value that is not finite.
    fn flatten(&self, z_e: &Tensor) -> Result<Tensor> {
        let flat = rows(&self.name, z_e, self.config.bits)?;
        require_finite(&self.name, &flat)?;
        Ok(flat)
    }

    /// Bits `[N,D]` (0 or 1) to vectors `[N,D]`.
    fn vectors(&self, bits: &Tensor) -> Result<Tensor> {
        // ±1 first, so that both signs are of the same size to the bit.
        Ok((bits.affine(2.0, -1.0)? * self.scale())?)
    }

    /// Bits `[N,D]` to codes `[N]`: exact in f32, as K is at most 2²⁴.
    fn codes(&self, bits: &Tensor) -> Result<Tensor> {
        let places: Vec<f32> =
            (0..self.config.bits).rev().map(|bit| (1u32 << bit) as f32).collect();
        let places = Tensor::from_vec(places, self.config.bits, bits.device())?;
        Ok(bits.broadcast_mul(&places)?.sum(D::Minus1)?.to_dtype(DType::U32)?)
    }
}

/// 1 where z > 0, else 0.
fn bits(z: &Tensor) -> Result<Tensor> {
    Ok(z.detach().gt(0.0)?.to_dtype(DType::F32)?)
}

impl Quantizer for BinaryQuantizer {
    fn codebook_size(&self) -> usize {
        self.config.codebook_size
    }

    fn dim(&self) -> usize {
        self.config.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        let (b, h, w, _) = z_e.dims4()?;
        let flat = self.flatten(z_e)?;
        let bits = bits(&flat)?;
        let z = if self.is_spherical() {
            // The addend keeps the gradient finite for a row of zeros.
            flat.broadcast_div(&(flat.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?)?
        } else {
            flat
        };
        let e = self.vectors(&bits)?;
        let QuantizerConfig { entropy_weight, diversity, entropy_group, .. } = self.config;
        let entropy_loss = if entropy_weight > 0.0 {
            let log_odds = (&z * (4.0 * self.scale() / self.config.entropy_temperature))?;
            Some((bitwise_entropy_loss(&log_odds, entropy_group, diversity)? * entropy_weight)?)
        } else {
            None
        };
        Ok(Quantized {
            z_q: straight_through(&z, &e)?.reshape(z_e.dims())?,
            codes: self.codes(&bits)?.reshape((b, h, w))?,
            codebook_loss: zero_like(z_e)?,
            commitment_loss: squared_error(&z, &e)?,
            entropy_loss,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        Ok(self.codes(&bits(&self.flatten(z_e)?)?)?.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let width = self.config.bits;
        let values = checked_codes(&self.name, codes, self.config.codebook_size)?;
        let bit = |code: u32, place: usize| ((code >> place) & 1) as f32;
        let bits: Vec<f32> = values
            .into_iter()
            .flat_map(|code| (0..width).rev().map(move |place| bit(code, place)))
            .collect();
        let bits = Tensor::from_vec(bits, (codes.elem_count(), width), codes.device())?;
        unflatten(&self.vectors(&bits)?, codes)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        (positions * self.config.bits) as u64
    }
}

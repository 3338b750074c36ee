//! Finite scalar quantization (Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple").

use candle_core::{D, DType, Device, Tensor};

use super::{Quantized, Quantizer, checked_codes, require_finite, rows, straight_through};
use super::{unflatten, zero_like};
use crate::{QuantizerConfig, Result};

/// Bounds each of the D numbers and rounds it to one of L values (Mentzer et al. 2023, section 3 and
/// appendix A.1). There is no codebook and nothing to learn: K = Π L, and no auxiliary loss.
///
/// With h = (L − 1)(1 − ε)/2, o = ½ for even L and 0 for odd ones, and s = tan(o/h), the paper's bound is
/// f(z) = tanh(z + s)·h − o. The value is round(f(z)) / ⌊L/2⌋, from −1 to 1 (even L: to 1 − 2/L); the
/// gradient is that of f. With L = 2, which the paper leaves out, s is 0, so that either value has half of
/// the line: the paper's s puts the border at −1.56, and a fresh encoder's outputs all on one side. The digit dᵢ = round(f(z)) + ⌊L/2⌋ is in 0..L, and the code Σ dᵢ·Π_{j<i} Lⱼ.
#[derive(Debug)]
pub(super) struct FiniteScalarQuantizer {
    name: String,
    levels: Vec<usize>,
    /// Of each of the D numbers, `[D]`.
    constants: Constants,
}

#[derive(Debug)]
struct Constants {
    half: Tensor,
    offset: Tensor,
    shift: Tensor,
    /// ⌊L/2⌋
    width: Tensor,
    /// L − 1
    largest: Tensor,
    /// `Π_{j<i}` Lⱼ
    basis: Tensor,
}

/// ε of the bound.
const EPSILON: f64 = 1e-3;

impl FiniteScalarQuantizer {
    pub(super) fn new(name: &str, config: &QuantizerConfig, device: &Device) -> Result<Self> {
        let levels = config.levels.clone();
        let tensor = |value: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = levels.iter().map(|&count| value(count) as f32).collect();
            Ok(Tensor::from_vec(values, levels.len(), device)?)
        };
        let half = |count: usize| (count as f64 - 1.0) * (1.0 - EPSILON) / 2.0;
        let offset = |count: usize| if count.is_multiple_of(2) { 0.5 } else { 0.0 };
        let shift = |count: usize| {
            if count == 2 { 0.0 } else { (offset(count) / half(count)).tan() }
        };
        let basis: Vec<f32> = levels
            .iter()
            .scan(1usize, |product, &count| {
                let place = *product;
                *product *= count;
                Some(place as f32)
            })
            .collect();
        let constants = Constants {
            half: tensor(&half)?,
            offset: tensor(&offset)?,
            shift: tensor(&shift)?,
            width: tensor(&|count| (count / 2) as f64)?,
            largest: tensor(&|count| count as f64 - 1.0)?,
            basis: Tensor::from_vec(basis, levels.len(), device)?,
        };
        Ok(Self { name: name.to_owned(), levels, constants })
    }

    /// f(z) `[N,D]`. Differentiable.
    fn bound(&self, z: &Tensor) -> Result<Tensor> {
        let Constants { half, offset, shift, .. } = &self.constants;
        Ok(z.broadcast_add(shift)?.tanh()?.broadcast_mul(half)?.broadcast_sub(offset)?)
    }

    /// The digits `[N,D]`, whole numbers in 0..L, of f(z).
    fn digits(&self, bounded: &Tensor) -> Result<Tensor> {
        let Constants { width, largest, .. } = &self.constants;
        let digits = bounded.detach().round()?.broadcast_add(width)?;
        // The bound keeps them in range but for what f32 may round up.
        Ok(digits.maximum(0.0)?.broadcast_minimum(largest)?)
    }

    /// Digits `[N,D]` to values `[N,D]`.
    fn vectors(&self, digits: &Tensor) -> Result<Tensor> {
        let width = &self.constants.width;
        Ok(digits.broadcast_sub(width)?.broadcast_div(width)?)
    }

    /// Digits `[N,D]` to codes `[N]`: exact in f32, as K is at most 2²⁴.
    fn codes(&self, digits: &Tensor) -> Result<Tensor> {
        let codes = digits.broadcast_mul(&self.constants.basis)?.sum(D::Minus1)?;
        Ok(codes.to_dtype(DType::U32)?)
    }

    /// `[N,D]`, or an error where there is a value that is not finite.
    fn flatten(&self, z_e: &Tensor) -> Result<Tensor> {
        let flat = rows(&self.name, z_e, self.levels.len())?;
        require_finite(&self.name, &flat)?;
        Ok(flat)
    }
}

impl Quantizer for FiniteScalarQuantizer {
    fn codebook_size(&self) -> usize {
        self.levels.iter().product()
    }

    fn dim(&self) -> usize {
        self.levels.len()
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        let (b, h, w, _) = z_e.dims4()?;
        let bounded = self.bound(&self.flatten(z_e)?)?;
        let digits = self.digits(&bounded)?;
        let path = bounded.broadcast_div(&self.constants.width)?;
        Ok(Quantized {
            z_q: straight_through(&path, &self.vectors(&digits)?)?.reshape(z_e.dims())?,
            codes: self.codes(&digits)?.reshape((b, h, w))?,
            codebook_loss: zero_like(z_e)?,
            commitment_loss: zero_like(z_e)?,
            entropy_loss: None,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        let bounded = self.bound(&self.flatten(&z_e.detach())?)?;
        Ok(self.codes(&self.digits(&bounded)?)?.reshape((b, h, w))?)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let values = checked_codes(&self.name, codes, self.codebook_size())?;
        let mut digits = Vec::with_capacity(values.len() * self.levels.len());
        for code in values {
            let mut rest = code as usize;
            for &count in &self.levels {
                digits.push((rest % count) as f32);
                rest /= count;
            }
        }
        let digits =
            Tensor::from_vec(digits, (codes.elem_count(), self.levels.len()), codes.device())?;
        unflatten(&self.vectors(&digits)?, codes)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        (positions * self.levels.len()) as u64
    }
}

//! Product quantization (Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search").

use candle_core::{D, Tensor};
use vq_ops::StepNumber;

use super::{CodebookReport, CodebookUpdate, KMeans, Quantized, Quantizer, VectorQuantizer, rows};
use crate::part::Builder;
use crate::{Error, QuantizerConfig, QuantizerKind, Result};

/// Cuts each vector into G parts of D/G numbers and replaces each by the nearest of K code vectors of
/// its own codebook (Jégou et al. 2011, section II-B): `K^G` vectors from G·K of length D/G.
///
/// Each part is a [`VectorQuantizer`] with all of its settings. The losses are means over all D numbers.
#[derive(Debug)]
pub(super) struct ProductQuantizer {
    name: String,
    dim: usize,
    parts: Vec<VectorQuantizer>,
}

impl ProductQuantizer {
    pub(super) fn new(name: &str, config: &QuantizerConfig, builder: &mut Builder) -> Result<Self> {
        let part = QuantizerConfig {
            kind: QuantizerKind::Vector,
            dim: config.dim / config.groups,
            ..config.clone()
        };
        let parts = (0..config.groups)
            .map(|group| VectorQuantizer::new(&format!("{name}.groups.{group}"), &part, builder))
            .collect::<Result<_>>()?;
        Ok(Self { name: name.to_owned(), dim: config.dim, parts })
    }

    /// The G parts `[…,D/G]` of `z` `[…,D]`. Differentiable.
    fn split(&self, z: &Tensor) -> Result<Vec<Tensor>> {
        let width = self.dim / self.parts.len();
        if z.dims().last() != Some(&self.dim) {
            let dims = z.dims();
            return Err(Error::Input(format!(
                "{} takes [.., {}], got {dims:?}",
                self.name, self.dim
            )));
        }
        let part = |group: usize| Ok(z.narrow(D::Minus1, group * width, width)?);
        (0..self.parts.len()).map(part).collect()
    }

    /// What each part was given in a step, `[N,D/G]`, and the codes `[…]` that it chose.
    fn assigned(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
    ) -> Result<Vec<(&VectorQuantizer, Tensor, Tensor)>> {
        let z_e = self.split(&rows(&self.name, z_e, self.dim)?)?;
        let codes = split_codes(&self.name, codes, self.parts.len(), self.parts.len())?;
        let parts = self.parts.iter().zip(z_e).zip(codes);
        Ok(parts.map(|((part, z_e), codes)| (part, z_e, codes)).collect())
    }
}

impl Quantizer for ProductQuantizer {
    fn codebook_size(&self) -> usize {
        self.parts.first().map_or(0, Quantizer::codebook_size)
    }

    fn codes_per_position(&self) -> usize {
        self.parts.len()
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        let pairs = self.parts.iter().zip(self.split(z_e)?);
        let parts: Vec<Quantized> =
            pairs.map(|(part, z_e)| part.quantize(&z_e)).collect::<Result<_>>()?;
        let z_q: Vec<&Tensor> = parts.iter().map(|part| &part.z_q).collect();
        let codes: Vec<Tensor> = parts.iter().map(|part| part.codes.clone()).collect();
        // All parts are equally long, so the mean of their means is the mean over D.
        let mean = |loss: fn(&Quantized) -> &Tensor| -> Result<Tensor> {
            let losses: Vec<&Tensor> = parts.iter().map(loss).collect();
            Ok(Tensor::stack(&losses, 0)?.mean(0)?)
        };
        Ok(Quantized {
            z_q: Tensor::cat(&z_q, D::Minus1)?,
            codes: join_codes(&codes)?,
            codebook_loss: mean(|part| &part.codebook_loss)?,
            commitment_loss: mean(|part| &part.commitment_loss)?,
            entropy_loss: None,
        })
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let pairs = self.parts.iter().zip(self.split(z_e)?);
        let codes: Vec<Tensor> =
            pairs.map(|(part, z_e)| part.encode(&z_e)).collect::<Result<_>>()?;
        join_codes(&codes)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let columns = split_codes(&self.name, codes, self.parts.len(), self.parts.len())?;
        let pairs = self.parts.iter().zip(&columns);
        let vectors: Vec<Tensor> =
            pairs.map(|(part, codes)| part.decode(codes)).collect::<Result<_>>()?;
        Ok(Tensor::cat(&vectors, D::Minus1)?)
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        self.parts.iter().map(VectorQuantizer::codebook).collect()
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        self.parts.iter().map(|part| part.multiply_adds(positions)).sum()
    }

    fn initialize(&self, z_e: &Tensor, how: KMeans<'_>) -> Result<()> {
        let mut pairs = self.parts.iter().zip(self.split(z_e)?);
        pairs.try_for_each(|(part, z_e)| part.initialize(&z_e, how))
    }

    fn is_initialized(&self) -> Result<bool> {
        all_initialized(&self.parts)
    }

    fn update(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<CodebookReport>> {
        let mut reports = Vec::new();
        for (part, z_e, codes) in self.assigned(z_e, codes)? {
            reports.extend(part.update(&z_e, &codes, options, step)?);
        }
        Ok(reports)
    }

    fn follow(&self, z_e: &Tensor, codes: &Tensor, step: StepNumber<'_>) -> Result<()> {
        let mut parts = self.assigned(z_e, codes)?.into_iter();
        parts.try_for_each(|(part, z_e, codes)| part.follow(&z_e, &codes, step))
    }

    fn revive(
        &self,
        z_e: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<(Option<String>, Vec<usize>)>> {
        let z_e = rows(&self.name, z_e, self.dim)?;
        let mut revived = Vec::new();
        for (part, z_e) in self.parts.iter().zip(self.split(&z_e)?) {
            revived.extend(part.revive(&z_e, options, step)?);
        }
        Ok(revived)
    }
}

/// G tensors `[…]` to `[…,G]`; a single one stays as it is.
pub(super) fn join_codes(codes: &[Tensor]) -> Result<Tensor> {
    match codes {
        [one] => Ok(one.clone()),
        _ => Ok(Tensor::stack(codes, D::Minus1)?),
    }
}

/// `[…,g]` to g tensors `[…]`, g from `least` to `count`; where `count` is 1, `[…]` as it is.
pub(super) fn split_codes(
    name: &str,
    codes: &Tensor,
    least: usize,
    count: usize,
) -> Result<Vec<Tensor>> {
    if count == 1 {
        return Ok(vec![codes.clone()]);
    }
    match codes.dims().last() {
        Some(&given) if (least..=count).contains(&given) => (0..given)
            .map(|index| Ok(codes.narrow(D::Minus1, index, 1)?.squeeze(D::Minus1)?.contiguous()?))
            .collect(),
        _ => Err(Error::Input(format!(
            "{name} has {count} codes at each position, [.., {count}], got {:?}",
            codes.dims()
        ))),
    }
}

pub(super) fn all_initialized(parts: &[VectorQuantizer]) -> Result<bool> {
    for part in parts {
        if !part.is_initialized()? {
            return Ok(false);
        }
    }
    Ok(true)
}

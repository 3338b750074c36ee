//! Residual quantization (Zeghidour et al. 2021; Lee et al. 2022, "Autoregressive Image
//! Generation using Residual Quantization").

use candle_core::Tensor;
use vq_ops::squared_error;

use super::product::{all_initialized, join_codes, split_codes};
use super::{CodebookReport, CodebookUpdate, Quantized, Quantizer, TrainingStep, VectorQuantizer};
use super::{KMeans, rows};
use crate::part::Builder;
use crate::random::Stream;
use crate::{Error, QuantizerConfig, QuantizerKind, Result};

/// G [`VectorQuantizer`]s one after the other, each for what those before it left: r₁ = `z_e`,
/// `r_{i+1}` = rᵢ − eᵢ, `z_q` = Σ eᵢ (Zeghidour et al. 2021, algorithm 1; Lee et al. 2022, eq. 2 and 3).
///
/// ∂L/∂`z_e` is ∂L/∂`z_q` once, however many stages there are; each stage's codebook is trained on, or
/// follows the averages of, its own residuals. The losses are sums over the stages, Σ ‖sg\[rᵢ\] − eᵢ‖² and
/// Σ ‖rᵢ − sg\[eᵢ\]‖² (Défossez et al. 2022, "High Fidelity Neural Audio Compression").
///
/// Quantizer dropout (Zeghidour et al. 2021, section III-C): in training, for some of the images only the
/// first n stages add to `z_q` and to the losses. The codes are those of all stages all the same, and all
/// of them go into the codebooks' averages (as in Kumar et al. 2023, "High-Fidelity Audio Compression
/// with Improved RVQGAN").
#[derive(Debug)]
pub(super) struct ResidualQuantizer {
    name: String,
    config: QuantizerConfig,
    stages: Vec<VectorQuantizer>,
}

impl ResidualQuantizer {
    pub(super) fn new(name: &str, config: &QuantizerConfig, builder: &mut Builder) -> Result<Self> {
        let stage = QuantizerConfig { kind: QuantizerKind::Vector, ..config.clone() };
        let stages = (0..config.stages)
            .map(|index| VectorQuantizer::new(&format!("{name}.stages.{index}"), &stage, builder))
            .collect::<Result<_>>()?;
        Ok(Self { name: name.to_owned(), config: config.clone(), stages })
    }

    /// `active[b]` is how many stages image b has; all of them where there is none.
    fn run(&self, z_e: &Tensor, active: Option<&[usize]>) -> Result<Quantized> {
        let (b, h, w, dim) = z_e.dims4()?;
        let mut residual = rows(&self.name, z_e, self.config.dim)?;
        let flat = residual.clone();
        let mut codes = Vec::new();
        let mut sums: Option<(Tensor, Tensor, Tensor)> = None;
        for (index, stage) in self.stages.iter().enumerate() {
            let assigned = stage.nearest(&residual)?;
            let (trained, e) = stage.lookup(&assigned)?;
            let kept = match active {
                None => None,
                Some(active) => Some(mask(active, index, h * w, &e)?),
            };
            let masked = |x: &Tensor| -> Result<Tensor> {
                match &kept {
                    None => Ok(x.clone()),
                    Some(kept) => Ok(x.broadcast_mul(kept)?),
                }
            };
            let (r, e_kept) = (masked(&residual)?, masked(&e)?);
            let commitment = squared_error(&r, &e_kept)?;
            let codebook = match &trained {
                Some(trained) => squared_error(&r.detach(), &masked(trained)?)?,
                None => super::zero_like(&e)?,
            };
            sums = Some(match sums {
                None => (e_kept, codebook, commitment),
                Some((e_sum, codebook_sum, commitment_sum)) => {
                    ((e_sum + e_kept)?, (codebook_sum + codebook)?, (commitment_sum + commitment)?)
                }
            });
            residual = (residual - e)?;
            codes.push(assigned.reshape((b, h, w))?);
        }
        let no_stage = || Error::Input(format!("{} has no stages", self.name));
        let (e, codebook_loss, commitment_loss) = sums.ok_or_else(no_stage)?;
        Ok(Quantized {
            z_q: self.config.gradient_estimator.apply(&flat, &e)?.reshape((b, h, w, dim))?,
            codes: join_codes(&codes)?,
            codebook_loss,
            commitment_loss,
            entropy_loss: None,
        })
    }
}

impl Quantizer for ResidualQuantizer {
    fn codebook_size(&self) -> usize {
        self.config.codebook_size
    }

    fn codes_per_position(&self) -> usize {
        self.stages.len()
    }

    fn dim(&self) -> usize {
        self.config.dim
    }

    fn quantize(&self, z_e: &Tensor) -> Result<Quantized> {
        self.run(z_e, None)
    }

    fn quantize_training(&self, z_e: &Tensor, step: TrainingStep) -> Result<Quantized> {
        let share = self.config.quantizer_dropout;
        if share == 0.0 {
            return self.run(z_e, None);
        }
        let mut stream = Stream::new(step.seed, &format!("{}.dropout", self.name), step.step);
        let count = self.stages.len();
        let mut draw = || {
            // Always two draws, so that an image's do not depend on those of the others.
            let (is_cut, stages) = (stream.unit() < share, 1 + stream.below(count));
            if is_cut { stages } else { count }
        };
        let images = step.first_image + z_e.dim(0)?;
        let active: Vec<usize> = (0..images).map(|_| draw()).skip(step.first_image).collect();
        self.run(z_e, Some(&active))
    }

    fn encode(&self, z_e: &Tensor) -> Result<Tensor> {
        let (b, h, w, _) = z_e.dims4()?;
        let mut residual = rows(&self.name, &z_e.detach(), self.config.dim)?;
        let mut codes = Vec::new();
        for stage in &self.stages {
            let assigned = stage.nearest(&residual)?;
            residual = (residual - stage.decode(&assigned)?)?;
            codes.push(assigned.reshape((b, h, w))?);
        }
        join_codes(&codes)
    }

    fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let columns = split_codes(&self.name, codes, /* least */ 1, self.stages.len())?;
        let mut sum: Option<Tensor> = None;
        for (stage, codes) in self.stages.iter().zip(&columns) {
            let e = stage.decode(codes)?;
            // In the order of `run`, for the same rounding.
            sum = Some(match sum {
                None => e,
                Some(sum) => (sum + e)?,
            });
        }
        sum.ok_or_else(|| Error::Input(format!("{} has no stages", self.name)))
    }

    fn codebooks(&self) -> Result<Vec<Tensor>> {
        self.stages.iter().map(VectorQuantizer::codebook).collect()
    }

    fn multiply_adds(&self, positions: usize) -> u64 {
        self.stages.iter().map(|stage| stage.multiply_adds(positions)).sum()
    }

    fn initialize(&self, z_e: &Tensor, how: KMeans<'_>) -> Result<()> {
        let mut residual = rows(&self.name, &z_e.detach(), self.config.dim)?;
        for stage in &self.stages {
            stage.initialize(&residual, how)?;
            residual = (&residual - stage.decode(&stage.nearest(&residual)?)?)?;
        }
        Ok(())
    }

    fn is_initialized(&self) -> Result<bool> {
        all_initialized(&self.stages)
    }

    /// What a part is given depends on where others were, so that the two halves of an update go together.
    fn repeats(&self) -> bool {
        false
    }

    fn update(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<CodebookReport>> {
        let mut residual = rows(&self.name, &z_e.detach(), self.config.dim)?;
        let columns = split_codes(&self.name, codes, self.stages.len(), self.stages.len())?;
        let mut reports = Vec::new();
        for (stage, codes) in self.stages.iter().zip(columns) {
            let codes = codes.flatten_all()?;
            // What the next stage was given, before this one's codebook moves.
            let next = (&residual - stage.decode(&codes)?)?;
            reports.extend(stage.update(&residual, &codes, options, step)?);
            residual = next;
        }
        Ok(reports)
    }
}

/// `[N,1]`: 1 for the vectors of images that have stage `index`, 0 for the others.
fn mask(active: &[usize], index: usize, positions: usize, like: &Tensor) -> Result<Tensor> {
    let value = |&stages: &usize| if index < stages { 1f32 } else { 0f32 };
    let values: Vec<f32> =
        active.iter().flat_map(|stages| std::iter::repeat_n(value(stages), positions)).collect();
    let count = values.len();
    Ok(Tensor::from_vec(values, (count, 1), like.device())?)
}

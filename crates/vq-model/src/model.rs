//! The model: encoders, quantizers and decoders of all levels.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use vq_ops::{FeatureMap, Precision, StepNumber, channels_first, channels_last};

use crate::level::Level;
use crate::likelihood::{judge, means};
use crate::part::Builder;
use crate::quantizer::{CodebookReport, CodebookUpdate, KMeans, Quantizer, TrainingStep};
use crate::{Codes, Config, Error, Result};

/// A VQ-VAE (van den Oord et al. 2017) with one level of codes, or a VQ-VAE-2 (Razavi et al. 2019) with
/// several.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use vq_model::{Config, VqVae};
///
/// let model = VqVae::new(&Config::default(), /* seed */ 0, &Device::Cpu)?;
/// let images = Tensor::zeros((2, 3, 32, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let codes = model.encode(&images)?;
/// assert_eq!(codes.levels[0].dims(), [2, 8, 8]);
/// assert_eq!(model.decode(&codes)?.dims(), [2, 3, 32, 32]);
/// # Ok::<(), vq_model::Error>(())
/// ```
#[derive(Debug)]
pub struct VqVae {
    config: Config,
    device: Device,
    /// Bottom first.
    levels: Vec<Level>,
    parameters: BTreeMap<String, Var>,
    buffers: BTreeMap<String, Var>,
}

/// A reconstruction, in the model's range, not clamped.
#[derive(Clone, Debug)]
pub enum Decoded {
    /// x̂ as the decoder gives it, `[B,H,W,C]`.
    Map(FeatureMap),
    /// Of a model with a likelihood: the mean of p(x|z), `[B,C,H,W]`, which has no gradient.
    Mean(Tensor),
}

/// What [`VqVae::forward`] gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// What the decoder gives: see [`reconstruction`](Self::reconstruction).
    pub decoded: Decoded,
    /// −ln p(x|z) in nats, of a position's channels together: `[B,H,W]`; none for a model without a
    /// [`Likelihood`](crate::Likelihood). x is the nearest of the 256 values of each pixel.
    pub nats: Option<Tensor>,
    /// The codes that it was decoded from.
    pub codes: Codes,
    /// ‖sg\[`z_e`\] − e‖², summed over the levels; each a mean over B·h·w·D
    /// (van den Oord et al. 2017, eq. 3, second term). 0 for levels with the rule `ema` and with implicit
    /// codes; see [`Quantized::codebook_loss`](crate::Quantized::codebook_loss).
    pub codebook_loss: Tensor,
    /// ‖`z_e` − sg\[e\]‖², summed over the levels; each a mean over B·h·w·D, without β
    /// (van den Oord et al. 2017, eq. 3, third term).
    pub commitment_loss: Tensor,
    /// [`commitment_loss`](Self::commitment_loss) of each level, bottom first, detached.
    pub commitment_losses: Vec<Tensor>,
    /// The entropy losses times their weights, summed over the levels; none where no level has one.
    pub entropy_loss: Option<Tensor>,
    /// The encoders' outputs `[B,h,w,D]`, bottom first, detached: what
    /// [`VqVae::initialize_codebooks`] and [`VqVae::update_codebooks`] take.
    pub z_e: Vec<Tensor>,
}

impl Output {
    /// x̂ `[B,C,H,W]` in the model's range, not clamped. Of a model with a likelihood it is the mean of
    /// p(x|z), and has no gradient.
    pub fn reconstruction(&self) -> Result<Tensor> {
        match &self.decoded {
            Decoded::Map(map) => Ok(channels_first(&map.tensor()?)?),
            Decoded::Mean(mean) => Ok(mean.clone()),
        }
    }
}

impl VqVae {
    /// A model with fresh parameters. They depend on `seed` and on each parameter's name alone.
    pub fn new(config: &Config, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        let mut builder = Builder::new(seed, device);
        let levels = (0..config.levels.len())
            .map(|index| Level::new(config, index, &mut builder))
            .collect::<Result<_>>()?;
        let Builder { parameters, buffers, .. } = builder;
        Ok(Self { config: config.clone(), device: device.clone(), levels, parameters, buffers })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// In which numbers convolutions multiply from now on: f32 at first. Parameters, gradients and what
    /// the quantizers compute stay f32. Not part of a saved model.
    pub fn set_precision(&mut self, precision: Precision) {
        for level in &mut self.levels {
            let parts = [&mut level.encoder, &mut level.decoder];
            for part in parts.into_iter().chain(&mut level.projection) {
                part.set_precision(precision);
            }
        }
    }

    /// What the optimizer trains, by name; the codebook is among it with the rule `gradient`.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// What is saved with the parameters but not trained by gradients: N, m and e of the rule `ema`,
    /// the codes' usage, and whether k-means has run.
    pub fn buffers(&self) -> &BTreeMap<String, Var> {
        &self.buffers
    }

    /// Images `[B,C,H,W]` in the model's range (see [`Normalization`](crate::Normalization)) to their
    /// codes. H and W must be multiples of [`Config::downsampling`]. An image's codes do not depend on
    /// what else is in the batch.
    pub fn encode(&self, images: &Tensor) -> Result<Codes> {
        let (_, levels) = self.descend(images, false, |quantizer, z_e| {
            let codes = quantizer.encode(&z_e.tensor()?)?;
            Ok((quantizer.decode(&codes)?.into(), codes))
        })?;
        Ok(Codes { levels })
    }

    /// Codes to images `[B,C,H,W]` in the model's range, not clamped: with a likelihood the means of
    /// p(x|z). The grids may be of any size, as long as those of the levels belong together.
    pub fn decode(&self, codes: &Codes) -> Result<Tensor> {
        self.decode_levels(codes, &vec![true; self.levels.len()])
    }

    /// [`decode`](Self::decode) from some of the levels only, which shows what each of them carries (as
    /// Razavi et al. 2019, figure 3): `shown` has a value for every level, bottom first.
    ///
    /// The maps of the other levels are zero. To the decoder's first convolution that is nothing at all,
    /// while any code in their place, the most frequent or a mean, would add a content of its own. No map
    /// was zero in training, so colours may be off; what can be made out is what counts.
    pub fn decode_levels(&self, codes: &Codes, shown: &[bool]) -> Result<Tensor> {
        let decoded = self.decode_shown(codes, shown)?;
        match self.config.pixel_distribution() {
            None => Ok(channels_first(&decoded)?),
            Some(distribution) => means(&self.config, distribution, &decoded),
        }
    }

    /// Codes to the numbers `[B,H,W,P]` that describe p(x|z), which
    /// [`Config::pixel_distribution`](crate::Config::pixel_distribution) reads; an error where the model has
    /// none.
    pub fn decode_parameters(&self, codes: &Codes) -> Result<Tensor> {
        self.config.require_distribution()?;
        self.decode_shown(codes, &vec![true; self.levels.len()])
    }

    /// What the decoder gives, `[B,H,W,…]`.
    fn decode_shown(&self, codes: &Codes, shown: &[bool]) -> Result<Tensor> {
        codes.validate(&self.config)?;
        self.one_per_level(shown.len(), "a choice")?;
        let levels = self.levels.iter().zip(&codes.levels).zip(shown);
        let maps: Vec<FeatureMap> = levels
            .map(|((level, codes), &is_shown)| {
                let map = level.quantizer.decode(&codes.to_device(&self.device)?)?;
                Ok(if is_shown { map } else { map.zeros_like()? }.into())
            })
            .collect::<Result<_>>()?;
        Ok(self.decode_maps(&maps, false)?.tensor()?)
    }

    /// [`encode`](Self::encode) and [`decode`](Self::decode): `[B,C,H,W]` to `[B,C,H,W]`.
    pub fn reconstruct(&self, images: &Tensor) -> Result<Tensor> {
        self.decode(&self.encode(images)?)
    }

    /// Images `[B,C,H,W]` to reconstruction, codes and losses; differentiable. Changes nothing in the
    /// model.
    pub fn forward(&self, images: &Tensor) -> Result<Output> {
        self.run(images, true, None)
    }

    /// [`forward`](Self::forward) as a training step does it: with what is random in training only
    /// (quantizer dropout), which depends on `step` alone.
    pub fn forward_training(&self, images: &Tensor, step: TrainingStep) -> Result<Output> {
        self.run(images, true, Some(step))
    }

    /// [`forward`](Self::forward) without a graph for gradients: the same values in less memory.
    pub fn evaluate(&self, images: &Tensor) -> Result<Output> {
        self.run(images, false, None)
    }

    /// The quantizer of a level (0 = bottom).
    pub fn quantizer(&self, level: usize) -> Result<&dyn Quantizer> {
        match self.levels.get(level) {
            Some(level) => Ok(level.quantizer.as_ref()),
            None => Err(Error::Input(format!(
                "there is no level {level}; the model has {}",
                self.levels.len()
            ))),
        }
    }

    /// The code vectors `[K,D]` of a level (0 = bottom), detached; an error where its quantizer does not
    /// have exactly one codebook: see [`Quantizer::codebooks`].
    pub fn codebook(&self, level: usize) -> Result<Tensor> {
        let codebooks = self.quantizer(level)?.codebooks()?;
        match &codebooks[..] {
            [one] => Ok(one.clone()),
            _ => Err(Error::Input(format!(
                "level {level} has {} codebooks, not one; ask its quantizer for all of them",
                codebooks.len()
            ))),
        }
    }

    /// Multiply-adds of the forward pass for one image of [`Config::image_size`], the search for the
    /// nearest codes included.
    pub fn multiply_adds(&self) -> Result<u64> {
        let [height, width] = self.config.image_size;
        let grids = self.config.grids(height, width)?;
        let mut input = (height, width);
        let mut total = 0;
        for (level, &[h, w]) in self.levels.iter().zip(&grids) {
            total += level.encoder.multiply_adds(input)?.0;
            if let Some(projection) = &level.projection {
                total += projection.multiply_adds((h, w))?.0;
            }
            total += level.quantizer.multiply_adds(h * w);
            total += level.decoder.multiply_adds((h, w))?.0;
            input = (h, w);
        }
        Ok(total)
    }

    /// About how many f32 values a training step holds for one image of [`Config::image_size`]: reckoned
    /// from the layers' shapes, for an estimate of the memory that a batch takes.
    pub fn activations(&self) -> Result<u64> {
        let [height, width] = self.config.image_size;
        let grids = self.config.grids(height, width)?;
        let mut input = (height, width);
        let (area, channels) = (height * width, self.config.channels);
        let mut total = match self.config.pixel_distribution() {
            // Images, reconstruction, and their difference with its gradient.
            None => (4 * area * channels) as u64,
            // Images, pixels, means, −ln p, and the gradient of what the decoder gives.
            Some(_) => (area * (5 * channels + 2 + self.config.decoder_outputs())) as u64,
        };
        for (index, (level, &[h, w])) in self.levels.iter().zip(&grids).enumerate() {
            total += level.encoder.activations(input)?.0;
            if let Some(projection) = &level.projection {
                // Features beside what the level above decoded to, and the gradient of both.
                let above = self.config.levels.get(index + 1).map_or(0, |above| above.hidden);
                let own = self.config.levels.get(index).map_or(0, |level| level.hidden);
                total += (2 * h * w * (own + above)) as u64 + projection.activations((h, w))?.0;
            }
            // z_e, z_q and what the losses make of them.
            let dims: usize = self.config.levels.iter().skip(index).map(|l| l.quantizer.dim).sum();
            total += (6 * h * w * dims) as u64;
            total += level.decoder.activations((h, w))?.0;
            input = (h, w);
        }
        Ok(total)
    }

    /// Places every level's code vectors by `rounds` of k-means on a pool of
    /// [`Output::z_e`], one tensor `[…,D]` per level. N starts as the sizes of the clusters: a pool of
    /// one step's vectors weighs as much as one step in equilibrium.
    pub fn initialize_codebooks(&self, z_e: &[Tensor], rounds: usize, seed: u64) -> Result<()> {
        self.initialize_codebooks_unless(z_e, rounds, seed, &|| false)
    }

    /// The same, unless `stop`, which is asked before every round, says so: then it ends with [`Error::Stopped`],
    /// and some of the levels may have been placed.
    pub fn initialize_codebooks_unless(
        &self,
        z_e: &[Tensor],
        rounds: usize,
        seed: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.one_per_level(z_e.len(), "pools of vectors")?;
        let how = KMeans { rounds, seed, stop };
        let mut pairs = self.levels.iter().zip(z_e);
        pairs.try_for_each(|(level, z_e)| level.quantizer.initialize(z_e, how))
    }

    /// Whether [`initialize_codebooks`](Self::initialize_codebooks) has run, in this run or one that
    /// this model was loaded from.
    pub fn codebooks_initialized(&self) -> Result<bool> {
        for level in &self.levels {
            if !level.quantizer.is_initialized()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moving averages and revival of dead codes, for the trainer to call after the optimizer's step.
    ///
    /// `z_e` (one `[…,D]` per level) and `codes` (`[…]`) are [`Output::z_e`] and [`Output::codes`] of all
    /// that was quantized in the step; several batches or workers are concatenated first, so that each
    /// step counts once and there is one set of revivals. The random choices depend on
    /// [`CodebookUpdate::seed`] and `step` alone. One report per codebook that is looked after so, those of
    /// the bottom level first.
    pub fn update_codebooks(
        &self,
        z_e: &[Tensor],
        codes: &Codes,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<CodebookReport>> {
        self.one_per_level(z_e.len(), "vectors")?;
        self.one_per_level(codes.levels.len(), "codes")?;
        let levels = self.levels.iter().zip(z_e).zip(&codes.levels);
        let mut reports = Vec::new();
        for ((level, z_e), codes) in levels {
            reports.extend(level.quantizer.update(z_e, codes, options, step)?);
        }
        Ok(reports)
    }

    /// Whether a training step gives the device the same work every time, so that it can be
    /// [recorded](vq_ops::Recording): not where a level's quantizer is `residual`.
    /// [`update_codebooks`](Self::update_codebooks) is then [`follow_codes`](Self::follow_codes), which is part of that
    /// work, and [`revive_codes`](Self::revive_codes), which is not.
    pub fn repeats(&self) -> bool {
        self.levels.iter().all(|level| level.quantizer.repeats())
    }

    /// The part of [`update_codebooks`](Self::update_codebooks) that moves code vectors by what was assigned to
    /// them in that step (from 1). On CUDA it does not wait for the device.
    pub fn follow_codes(&self, z_e: &[Tensor], codes: &Codes, step: StepNumber<'_>) -> Result<()> {
        self.one_per_level(z_e.len(), "vectors")?;
        self.one_per_level(codes.levels.len(), "codes")?;
        let mut levels = self.levels.iter().zip(z_e).zip(&codes.levels);
        levels.try_for_each(|((level, z_e), codes)| level.quantizer.follow(z_e, codes, step))
    }

    /// The other part, after it: revives dead codes. Per codebook that is looked after, the name of its
    /// parameter, where it is trained by gradients, and the codes that were moved.
    pub fn revive_codes(
        &self,
        z_e: &[Tensor],
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<Vec<(Option<String>, Vec<usize>)>> {
        self.one_per_level(z_e.len(), "vectors")?;
        let mut revived = Vec::new();
        for (level, z_e) in self.levels.iter().zip(z_e) {
            revived.extend(level.quantizer.revive(z_e, options, step)?);
        }
        Ok(revived)
    }

    fn run(&self, images: &Tensor, tracked: bool, step: Option<TrainingStep>) -> Result<Output> {
        let (maps, levels) = self.descend(images, tracked, |quantizer, z_e| {
            let quantized = quantizer.quantize_map(z_e, step)?;
            // A codebook's parameters are tracked even where the encoder's are not.
            let z_q = &quantized.z_q;
            let z_q = if tracked { z_q.clone() } else { z_q.detach() };
            Ok((z_q, quantized))
        })?;
        let (mut codes, mut z_es, mut commitment_losses) = (Vec::new(), Vec::new(), Vec::new());
        let mut losses: Option<(Tensor, Tensor)> = None;
        let mut entropy_loss: Option<Tensor> = None;
        for quantized in levels {
            codes.push(quantized.codes);
            z_es.push(quantized.z_e);
            commitment_losses.push(quantized.commitment_loss.detach());
            entropy_loss = match (entropy_loss, quantized.entropy_loss) {
                (Some(sum), Some(loss)) => Some((sum + loss)?),
                (sum, loss) => sum.or(loss),
            };
            losses = Some(match losses {
                None => (quantized.codebook_loss, quantized.commitment_loss),
                Some((codebook, commitment)) => (
                    (codebook + quantized.codebook_loss)?,
                    (commitment + quantized.commitment_loss)?,
                ),
            });
        }
        let no_level = || Error::config("levels", "must hold at least one level");
        let (codebook_loss, commitment_loss) = losses.ok_or_else(no_level)?;
        let decoded = self.decode_maps(&maps, tracked)?;
        let (decoded, nats) = match self.config.pixel_distribution() {
            None => (Decoded::Map(decoded), None),
            Some(distribution) => {
                let images = images.to_device(&self.device)?;
                let judged = judge(&self.config, distribution, &decoded.tensor()?, &images)?;
                (Decoded::Mean(judged.means), Some(judged.nats))
            }
        };
        Ok(Output {
            decoded,
            nats,
            codes: Codes { levels: codes },
            codebook_loss,
            commitment_loss,
            commitment_losses,
            entropy_loss,
            z_e: z_es,
        })
    }

    /// Encodes up to the top, then quantizes from the top down (Razavi et al. 2019, algorithm 1):
    /// images `[B,C,H,W]` to what `quantize` makes of every level's `z_e`, bottom first: the levels' `z_q`
    /// `[B,h,w,D]`, and what comes with them.
    fn descend<T>(
        &self,
        images: &Tensor,
        tracked: bool,
        quantize: impl Fn(&dyn Quantizer, &FeatureMap) -> Result<(FeatureMap, T)>,
    ) -> Result<(Vec<FeatureMap>, Vec<T>)> {
        let mut features: Vec<FeatureMap> = Vec::new();
        let images = FeatureMap::from(channels_last(&self.check_images(images)?)?);
        for level in &self.levels {
            let input = [(features.last().unwrap_or(&images), 1)];
            features.push(level.encoder.forward(&input, tracked)?);
        }
        drop(images);
        // Top first until the end.
        let mut results: Vec<T> = Vec::new();
        // From this level up, those that are known.
        let mut maps: Vec<FeatureMap> = Vec::new();
        for (index, level) in self.levels.iter().enumerate().rev() {
            let Some(own) = features.pop() else { break };
            let z_e = match (&level.projection, self.levels.get(index + 1)) {
                (Some(projection), Some(above)) => {
                    let decoded =
                        above.decoder.forward(&self.repeated(index + 1, &maps), tracked)?;
                    projection.forward(&[(&own, 1), (&decoded, 1)], tracked)?
                }
                _ => own,
            };
            let (z_q, result) = quantize(level.quantizer.as_ref(), &z_e).map_err(|error| {
                if z_e.values().is_ok_and(|z_e| is_finite(&z_e)) {
                    error
                } else {
                    Error::Diverged { level: index }
                }
            })?;
            maps.insert(0, z_q);
            results.push(result);
        }
        results.reverse();
        Ok((maps, results))
    }

    /// The levels' `z_q` `[B,h,w,D]`, bottom first, to what the decoder gives `[B,H,W,…]`.
    fn decode_maps(&self, maps: &[FeatureMap], tracked: bool) -> Result<FeatureMap> {
        match self.levels.first() {
            Some(bottom) => bottom.decoder.forward(&self.repeated(0, maps), tracked),
            None => Err(Error::config("levels", "must hold at least one level")),
        }
    }

    /// The maps of the levels from `first` up, and how often each pixel of theirs is repeated to come to the size
    /// of the first.
    fn repeated<'a>(&self, first: usize, maps: &'a [FeatureMap]) -> Vec<(&'a FeatureMap, usize)> {
        let mut times = 1;
        let mut repeated = Vec::new();
        for (index, map) in (first..).zip(maps) {
            if index > first {
                times *= self.config.levels.get(index).map_or(1, |level| level.downsample);
            }
            repeated.push((map, times));
        }
        repeated
    }

    fn check_images(&self, images: &Tensor) -> Result<Tensor> {
        let channels = self.config.channels;
        let (b, height, width) = match (images.dtype(), images.dims()) {
            (DType::F32, &[b, c, h, w]) if c == channels && b > 0 => (b, h, w),
            (dtype, dims) => {
                return Err(Error::Input(format!(
                    "images must be f32 [B, {channels}, H, W], got {dtype:?} {dims:?}"
                )));
            }
        };
        self.config.grids(height, width)?;
        // On another device the check would have to wait for it.
        if images.device().is_cpu() && !is_finite(images) {
            return Err(Error::Input(format!(
                "images hold NaN or infinity (batch of {b}, {height}×{width}); check how they were read and \
                 normalised"
            )));
        }
        Ok(images.to_device(&self.device)?)
    }

    fn one_per_level(&self, count: usize, what: &str) -> Result<()> {
        match self.levels.len() {
            levels if levels == count => Ok(()),
            levels => Err(Error::Input(format!(
                "the model has {levels} level(s), got {what} for {count}"
            ))),
        }
    }
}

/// False where there is a NaN or an infinity, or where that cannot be found out.
fn is_finite(x: &Tensor) -> bool {
    // 0·x is 0 for finite x and NaN otherwise.
    let sum = x.detach().affine(0.0, 0.0).and_then(|zeros| zeros.sum_all()?.to_scalar::<f32>());
    sum.is_ok_and(|sum| sum == 0.0)
}

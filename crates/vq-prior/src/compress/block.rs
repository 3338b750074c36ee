//! A batch of images to bytes and back.

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use vq_model::{Codes, VqVae};

use super::CompressError;
use super::coder::Coder;
use super::distribution::{Distribution, Softmax, Uniform};
use super::pixels::code_position;
use crate::{Conditions, Prior};

/// Turns batches of images to bytes and back.
#[derive(Clone, Copy, Debug)]
pub struct Codec<'a> {
    model: &'a VqVae,
    priors: &'a [Prior],
    lossless: bool,
    most_parameters: usize,
}

/// Numbers of the pixels' distributions that the decoder gives in one call, at most: 256 MiB of f32. Images run
/// through it in parts of so many. Part of the format: another number of images at a time may round otherwise.
const MOST_PARAMETERS: usize = 1 << 26;

/// A batch of images.
#[derive(Clone, Debug)]
pub struct Block {
    /// Each image's class, or the prior's number of classes for none. Nothing where the priors have no
    /// classes; only then.
    pub labels: Vec<u32>,
    /// The codes of all levels.
    pub codes: Codes,
    /// The pixels `[B,C,H,W]` u8, in lossless files; only there.
    pub pixels: Option<Tensor>,
}

/// Bits that were computed for a block: −log₂ of the probabilities, before these are rounded to integers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockBits {
    /// Of the labels.
    pub labels: f64,
    /// Of the codes of each level, bottom first.
    pub levels: Vec<f64>,
    /// Of the pixels.
    pub pixels: f64,
}

impl BlockBits {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.labels + self.levels.iter().sum::<f64>() + self.pixels
    }

    /// Adds those of another block of the same levels.
    pub fn add(&mut self, other: &Self) {
        self.labels += other.labels;
        self.pixels += other.pixels;
        self.levels.resize(self.levels.len().max(other.levels.len()), 0.0);
        for (own, other) in self.levels.iter_mut().zip(&other.levels) {
            *own += other;
        }
    }
}

impl<'a> Codec<'a> {
    /// `priors` holds one prior for every level, the top one first, or none: then all codes are equally
    /// probable. `lossless` asks for pixels too; the model must have a likelihood.
    pub fn new(
        model: &'a VqVae,
        priors: &'a [Prior],
        lossless: bool,
    ) -> Result<Self, CompressError> {
        if lossless && model.config().pixel_distribution().is_none() {
            return Err(vq_model::Error::NoLikelihood.into());
        }
        let levels = model.config().levels.len();
        if !priors.is_empty() && priors.len() != levels {
            let problem =
                format!("{levels} prior(s), one for each level, or none: got {}", priors.len());
            return Err(CompressError::Input(problem));
        }
        Ok(Self { model, priors, lossless, most_parameters: MOST_PARAMETERS })
    }

    /// With another bound on what the decoder gives in one call.
    #[cfg(test)]
    pub(super) fn with_most_parameters(self, most_parameters: usize) -> Self {
        Self { most_parameters, ..self }
    }

    /// Whether the pixels are in it too.
    pub fn is_lossless(&self) -> bool {
        self.lossless
    }

    /// The number of classes that the priors know; 0 = images have no labels.
    pub fn classes(&self) -> usize {
        self.priors.first().map_or(0, |prior| prior.config().class_count)
    }

    /// An error where images of that size cannot be coded: the priors are for one size.
    pub fn check_size(&self, height: usize, width: usize) -> Result<(), CompressError> {
        let grids = self.model.config().grids(height, width)?;
        for (prior, grid) in self.priors.iter().zip(grids.iter().rev()) {
            if prior.config().grid != *grid {
                let [h, w] = self.model.config().image_size;
                let advice = if self.lossless { "" } else { "scale them (--size), or " };
                return Err(CompressError::Input(format!(
                    "the priors are for images of {w}×{h} pixels, got {width}×{height}: {advice}leave out the \
                     priors (--prior)"
                )));
            }
        }
        Ok(())
    }

    /// The bytes of a block, and the bits that were computed for it.
    pub fn encode(&self, block: &Block) -> Result<(Vec<u8>, BlockBits), CompressError> {
        let (b, height, width) = self.check(block)?;
        let mut coder = Coder::encoder();
        let (_, bits) = self.run(&mut coder, (b, height, width), Some(block))?;
        Ok((coder.finish(), bits))
    }

    /// The block of so many images of that height and width, from its bytes. Whether it is the one that was
    /// written, a [`hash`](Block::hash) tells.
    pub fn decode(
        &self,
        bytes: &[u8],
        images: usize,
        [height, width]: [usize; 2],
    ) -> Result<Block, CompressError> {
        self.check_size(height, width)?;
        let mut coder = Coder::decoder(bytes)?;
        Ok(self.run(&mut coder, (images, height, width), None)?.0)
    }

    /// The one way through a block, in both directions: what a `given` block is written from, and what is
    /// read is put together from.
    fn run(
        &self,
        coder: &mut Coder,
        (b, height, width): (usize, usize, usize),
        given: Option<&Block>,
    ) -> Result<(Block, BlockBits), CompressError> {
        let mut bits = BlockBits::default();
        let mut labels = match given {
            Some(block) => block.labels.clone(),
            None if self.classes() > 0 => vec![0; b],
            None => Vec::new(),
        };
        if !labels.is_empty() {
            let uniform = Uniform::new(self.classes() + 1)?;
            for label in &mut labels {
                *label = coder.code(&uniform, *label)?;
                bits.labels += f64::from(uniform.symbols()).log2();
            }
        }
        let grids = self.model.config().grids(height, width)?;
        // The nearest level first, as priors want what they are conditioned on.
        let mut levels: Vec<Tensor> = Vec::new();
        for (index, grid) in grids.into_iter().enumerate().rev() {
            let mut codes = match given.and_then(|block| block.codes.levels.get(index)) {
                Some(codes) => codes.flatten_all()?.to_vec1::<u32>()?,
                None => vec![0; b * self.codes_per_image(index, grid)],
            };
            let prior = self.priors.len().checked_sub(1 + index).and_then(|i| self.priors.get(i));
            let level_bits = match prior {
                Some(prior) => code_level(coder, prior, (&labels, &levels), b, &mut codes)?,
                None => code_uniform(coder, self.codebook_size(index), &mut codes)?,
            };
            bits.levels.insert(0, level_bits);
            levels.insert(0, self.tensor(index, (b, grid), codes)?);
        }
        let codes = Codes { levels };
        let pixels = if self.lossless {
            let mut pixels = match given.and_then(|block| block.pixels.as_ref()) {
                Some(pixels) => pixels.flatten_all()?.to_vec1::<u8>()?,
                None => vec![0; b * self.model.config().channels * height * width],
            };
            bits.pixels = self.code_pixels(coder, &codes, &mut pixels)?;
            let shape = (b, self.model.config().channels, height, width);
            Some(Tensor::from_vec(pixels, shape, &Device::Cpu)?)
        } else {
            None
        };
        Ok((Block { labels, codes, pixels }, bits))
    }

    /// `pixels` are `[B,C,H,W]`.
    fn code_pixels(
        &self,
        coder: &mut Coder,
        codes: &Codes,
        pixels: &mut [u8],
    ) -> Result<f64, CompressError> {
        let config = self.model.config();
        let Some(distribution) = config.pixel_distribution() else {
            return Err(vq_model::Error::NoLikelihood.into());
        };
        let images = codes.batch_size()?;
        let (area, channels) = (pixels.len() / images.max(1) / config.channels, config.channels);
        // Writing and reading take the same number at a time.
        let at_once = (self.most_parameters / (area * distribution.parameters(channels))).max(1);
        let mut bits = 0.0;
        let batches = (0..images).step_by(at_once);
        for (first, pixels) in batches.zip(pixels.chunks_mut(at_once * area * channels)) {
            let count = at_once.min(images - first);
            let params = self.model.decode_parameters(&codes.narrow(first, count)?)?;
            let size = params.dim(3)?;
            for (image, pixels) in (0..count).zip(pixels.chunks_mut(area * channels)) {
                let params = params.get(image)?.flatten_all()?.to_vec1::<f32>()?;
                for (position, params) in params.chunks(size).enumerate() {
                    let mut here: Vec<u8> =
                        pixels.iter().skip(position).step_by(area).copied().collect();
                    bits += code_position(coder, distribution, params, &mut here)?;
                    for (to, from) in pixels.iter_mut().skip(position).step_by(area).zip(here) {
                        *to = from;
                    }
                }
            }
        }
        Ok(bits)
    }

    /// Images, height and width of a block that fits.
    fn check(&self, block: &Block) -> Result<(usize, usize, usize), CompressError> {
        let config = self.model.config();
        block.codes.validate(config)?;
        let refuse = |problem: String| Err(CompressError::Input(problem));
        let Some(&[b, h, w, ..]) = block.codes.levels.first().map(Tensor::dims) else {
            return refuse("codes have no level".to_owned());
        };
        let factor = config.levels.first().map_or(1, |level| level.downsample);
        let (height, width) = (h * factor, w * factor);
        self.check_size(height, width)?;
        for (index, (codes, level)) in block.codes.levels.iter().zip(&config.levels).enumerate() {
            let want = level.quantizer.codes_per_position();
            if codes.elem_count() % want != 0 || (want > 1 && codes.dims().last() != Some(&want)) {
                return refuse(format!("level {index} must have {want} codes at each position"));
            }
        }
        let labels = if self.classes() > 0 { b } else { 0 };
        if block.labels.len() != labels {
            return refuse(format!("{labels} labels are wanted, got {}", block.labels.len()));
        }
        let shape = [b, config.channels, height, width];
        match &block.pixels {
            None if self.lossless => return refuse("a lossless file takes the pixels".to_owned()),
            Some(_) if !self.lossless => {
                return refuse("only a lossless file takes pixels".to_owned());
            }
            Some(pixels) if pixels.dims() != shape || pixels.dtype() != DType::U8 => {
                return refuse(format!(
                    "pixels must be u8 {shape:?}, got {:?} {:?}",
                    pixels.dtype(),
                    pixels.dims()
                ));
            }
            _ => {}
        }
        Ok((b, height, width))
    }

    fn codebook_size(&self, level: usize) -> usize {
        self.model.config().levels.get(level).map_or(0, |level| level.quantizer.codebook_size)
    }

    fn codes_per_image(&self, level: usize, [h, w]: [usize; 2]) -> usize {
        h * w * self.codes_per_position(level)
    }

    fn codes_per_position(&self, level: usize) -> usize {
        let level = self.model.config().levels.get(level);
        level.map_or(1, |level| level.quantizer.codes_per_position())
    }

    fn tensor(
        &self,
        level: usize,
        (b, [h, w]): (usize, [usize; 2]),
        codes: Vec<u32>,
    ) -> Result<Tensor, CompressError> {
        Ok(match self.codes_per_position(level) {
            1 => Tensor::from_vec(codes, (b, h, w), &Device::Cpu)?,
            several => Tensor::from_vec(codes, (b, h, w, several), &Device::Cpu)?,
        })
    }
}

impl Block {
    /// The number of images.
    pub fn images(&self) -> Result<usize, CompressError> {
        Ok(self.codes.batch_size()?)
    }

    /// The first bytes of the SHA-256 of all that is in it.
    pub fn hash(&self) -> Result<[u8; 8], CompressError> {
        let mut hasher = Sha256::new();
        let mut numbers = |values: &[u32]| {
            for value in values {
                hasher.update(value.to_le_bytes());
            }
        };
        numbers(&self.labels);
        for level in &self.codes.levels {
            numbers(&level.flatten_all()?.to_vec1::<u32>()?);
        }
        if let Some(pixels) = &self.pixels {
            hasher.update(pixels.flatten_all()?.to_vec1::<u8>()?);
        }
        let mut first = [0; 8];
        for (to, from) in first.iter_mut().zip(hasher.finalize()) {
            *to = from;
        }
        Ok(first)
    }
}

/// The codes `[B,h,w,G]` of a level under its prior; their bits.
fn code_level(
    coder: &mut Coder,
    prior: &Prior,
    (labels, above): (&[u32], &[Tensor]),
    batch: usize,
    codes: &mut [u32],
) -> Result<f64, CompressError> {
    let labels = if labels.is_empty() {
        None
    } else {
        Some(Tensor::from_slice(labels, batch, &Device::Cpu)?)
    };
    let conditions = Conditions { labels: labels.as_ref(), conditioning: above };
    let mut stepper = prior.stepper(&conditions, batch)?;
    let per_image = codes.len() / batch.max(1);
    let mut bits = 0.0;
    for index in 0..per_image {
        let logits = stepper.logits()?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        let mut pushed = Vec::with_capacity(batch);
        for (logits, image) in logits.iter().zip(codes.chunks_mut(per_image)) {
            let softmax = Softmax::new(logits, "prior")?;
            if let Some(code) = image.get_mut(index) {
                *code = coder.code(&softmax, *code)?;
                bits += softmax.bits(*code);
                pushed.push(*code);
            }
        }
        stepper.push(&pushed)?;
    }
    Ok(bits)
}

/// The same where all codes are equally probable.
fn code_uniform(
    coder: &mut Coder,
    codebook_size: usize,
    codes: &mut [u32],
) -> Result<f64, CompressError> {
    let uniform = Uniform::new(codebook_size)?;
    for code in codes.iter_mut() {
        *code = coder.code(&uniform, *code)?;
    }
    Ok(codes.len() as f64 * (codebook_size as f64).log2())
}

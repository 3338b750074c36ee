//! One code after the other.

use candle_core::Tensor;

use crate::head::HeadSteps;
use crate::inputs::check_code;
use crate::layers::{Context, Mode};
use crate::pixelcnn_steps::PixelCnnSteps;
use crate::prior::Trunk;
use crate::transformer::TransformerSteps;
use crate::{Conditions, Error, Prior, Result};

/// Where a code stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Row of the position.
    pub row: usize,
    /// Column of the position.
    pub column: usize,
    /// Which of the position's codes, 0 to G − 1.
    pub code: usize,
}

/// Gives the distribution of each code of a batch of images, given those before it, and computes only
/// what the last ones added: activations of a PixelCNN's layers, keys and values of a Transformer.
///
/// Ask for [`logits`](Self::logits), choose (or, when decoding a file, read) the codes, [`push`](Self::push)
/// them, and so on until [`next_place`](Self::next_place) is `None`. The parameters must not change
/// meanwhile: some are copied at the start.
///
/// On one machine, the same codes and conditions give the same logits to the bit; an entropy coder can
/// rely on it. They equal those of [`Prior::logits`] to rounding.
#[derive(Debug)]
pub struct Stepper<'a> {
    prior: &'a Prior,
    engine: Engine<'a>,
    batch: usize,
    /// Codes pushed so far, per image.
    count: usize,
    /// Those of the position that is not full yet, `[G][B]`.
    position: Vec<Vec<u32>>,
}

#[derive(Debug)]
enum Engine<'a> {
    Cached {
        trunk: TrunkSteps<'a>,
        head: HeadSteps<'a>,
        /// Features of the position that is not full yet.
        features: Option<Tensor>,
    },
    /// Everything anew for every code.
    Recomputed { context: Context, codes: Vec<u32> },
}

#[derive(Debug)]
enum TrunkSteps<'a> {
    PixelCnn(Box<PixelCnnSteps<'a>>),
    Transformer(Box<TransformerSteps<'a>>),
}

impl Prior {
    /// A stepper for `batch` images, at their first code.
    pub fn stepper(&self, conditions: &Conditions, batch: usize) -> Result<Stepper<'_>> {
        let context = self.context_of(conditions, check_batch(batch)?, Mode::EVALUATE)?;
        let grid = self.config().grid;
        let trunk = match &self.trunk {
            Trunk::PixelCnn(network) => TrunkSteps::PixelCnn(Box::new(network.steps(
                &context,
                batch,
                grid,
                self.device(),
            )?)),
            Trunk::Transformer(network) => {
                TrunkSteps::Transformer(Box::new(network.steps(&context, batch, grid)?))
            }
        };
        let engine = Engine::Cached { trunk, head: self.head.steps()?, features: None };
        Ok(Stepper { prior: self, engine, batch, count: 0, position: Vec::new() })
    }

    /// A stepper that computes everything anew for every code: the slow, obvious one, to check the other
    /// against.
    pub fn recomputing_stepper(
        &self,
        conditions: &Conditions,
        batch: usize,
    ) -> Result<Stepper<'_>> {
        let context = self.context_of(conditions, check_batch(batch)?, Mode::EVALUATE)?;
        let codes = vec![0; batch * self.config().codes_per_image()];
        let engine = Engine::Recomputed { context, codes };
        Ok(Stepper { prior: self, engine, batch, count: 0, position: Vec::new() })
    }
}

impl Stepper<'_> {
    /// Number of images.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// The place of the next code; `None` when the grid is full.
    pub fn next_place(&self) -> Option<Place> {
        let config = self.prior.config();
        let position = self.count / config.codes_per_position();
        let width = config.grid[1];
        (self.count < config.codes_per_image()).then(|| Place {
            row: position / width,
            column: position % width,
            code: self.count % config.codes_per_position(),
        })
    }

    /// Unnormalised log-probabilities `[B,K]` of the next code, with K as in that code's codebook.
    pub fn logits(&mut self) -> Result<Tensor> {
        let place = self.next_place().ok_or_else(full)?;
        match &mut self.engine {
            Engine::Cached { trunk, head, features } => {
                head.logits(place.code, trunk.features(features)?)
            }
            Engine::Recomputed { context, codes } => {
                let config = self.prior.config();
                let [h, w] = config.grid;
                let shape = (self.batch, h, w, config.codes_per_position());
                let codes = Tensor::from_slice(codes, shape, self.prior.device())?;
                let logits = self.prior.forward(&codes, context, Mode::EVALUATE)?;
                let logits = logits.get(place.code).ok_or_else(full)?;
                let row = logits.narrow(1, place.row, 1)?.narrow(2, place.column, 1)?;
                Ok(row.contiguous()?.flatten(1, 3)?)
            }
        }
    }

    /// Takes the next code of every image.
    pub fn push(&mut self, codes: &[u32]) -> Result<()> {
        let place = self.next_place().ok_or_else(full)?;
        let config = self.prior.config();
        if codes.len() != self.batch {
            return Err(Error::Input(format!(
                "the stepper holds {} image(s), got codes for {}",
                self.batch,
                codes.len()
            )));
        }
        let size = config.codebook_sizes.get(place.code).copied().unwrap_or(0);
        let what = || "the codes".to_owned();
        codes.iter().try_for_each(|&code| check_code(what, code, size, place.code))?;
        self.position.push(codes.to_vec());
        let is_last = place.code + 1 == config.codes_per_position();
        match &mut self.engine {
            Engine::Cached { trunk, head, features } => {
                let device = self.prior.device();
                // Caches grow with the features, whether or not anybody asked for these.
                trunk.features(features)?;
                head.push(place.code, &Tensor::from_slice(codes, self.batch, device)?)?;
                if is_last {
                    let values: Vec<u32> = (0..self.batch)
                        .flat_map(|image| self.position.iter().filter_map(move |c| c.get(image)))
                        .copied()
                        .collect();
                    let shape = (self.batch, config.codes_per_position());
                    trunk.push(&Tensor::from_vec(values, shape, device)?)?;
                    *features = None;
                }
            }
            Engine::Recomputed { codes: all, .. } => {
                for (image, code) in all.chunks_mut(config.codes_per_image()).zip(codes) {
                    if let Some(place) = image.get_mut(self.count) {
                        *place = *code;
                    }
                }
            }
        }
        if is_last {
            self.position.clear();
        }
        self.count += 1;
        Ok(())
    }
}

impl TrunkSteps<'_> {
    /// The features of the position, computed once.
    fn features<'f>(&mut self, features: &'f mut Option<Tensor>) -> Result<&'f Tensor> {
        let value = match features.take() {
            Some(value) => value,
            None => match self {
                Self::PixelCnn(steps) => steps.features()?,
                Self::Transformer(steps) => steps.features()?,
            },
        };
        Ok(features.insert(value))
    }

    fn push(&mut self, codes: &Tensor) -> Result<()> {
        match self {
            Self::PixelCnn(steps) => steps.push(codes),
            Self::Transformer(steps) => steps.push(codes),
        }
    }
}

fn check_batch(batch: usize) -> Result<usize> {
    if batch == 0 {
        return Err(Error::Input("a stepper needs at least one image".to_owned()));
    }
    Ok(batch)
}

fn full() -> Error {
    Error::Input("the grid is full: every code has been pushed".to_owned())
}

//! From a position's features to the distributions of its codes.

use candle_core::{D, Tensor};
use vq_ops::{Conv2d, PackedLinear, Precision};

use crate::layers::{Builder, CodeTable, Conv, Mode};
use crate::{Config, Error, Result};

/// Predicts the codes of a position in order.
///
/// Code g gets the features f of its position, and the sum s of learned vectors of the codes before it at
/// the same position: logits = V relu(W relu(f) + M s), with matrices of its own for every g. So the
/// network over positions stays h·w long whatever G is; a sequence flattened to h·w·G would cost a
/// Transformer G times the work and its attention G² times, and would fit no PixelCNN (compare the depth
/// transformer of Lee et al. 2022, section 3.2.2).
#[derive(Debug)]
pub(crate) struct Head {
    /// Vectors of the codes but the last.
    codes: CodeTable,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    features: Conv,
    /// Of the codes before; none for the first.
    before: Option<Conv>,
    logits: Conv,
}

const RELU_FIRST: Conv2d =
    Conv2d { stride: 1, padding: 0, dilation: 1, relu_input: true, precision: Precision::F32 };

impl Head {
    /// A head on features of `inputs` channels.
    pub(crate) fn new(config: &Config, inputs: usize, builder: &mut Builder) -> Result<Self> {
        let hidden = config.head_hidden;
        let sizes = &config.codebook_sizes;
        let with_vectors = sizes.get(..sizes.len().saturating_sub(1)).unwrap_or_default();
        let codes = CodeTable::new(builder, "head.codes", with_vectors, hidden)?;
        let mut parts = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let name = |part: &str| format!("head.{index}.{part}");
            let before = if index > 0 {
                Some(Conv::linear(builder, &name("before"), hidden, hidden)?)
            } else {
                None
            };
            parts.push(Part {
                features: Conv::linear(builder, &name("features"), inputs, hidden)?,
                before,
                logits: Conv::linear(builder, &name("logits"), hidden, size)?,
            });
        }
        Ok(Self { codes, parts })
    }

    /// `features` `[B,h,w,F]` and all codes `[B,h,w,G]` → logits `[B,h,w,K]` of every code of a position.
    pub(crate) fn forward(
        &self,
        features: &Tensor,
        codes: &Tensor,
        mode: Mode,
    ) -> Result<Vec<Tensor>> {
        let mut sum: Option<Tensor> = None;
        let mut logits = Vec::new();
        for (index, part) in self.parts.iter().enumerate() {
            if index > 0 {
                let codes = codes.narrow(D::Minus1, index - 1, 1)?.squeeze(D::Minus1)?;
                let vectors = self.codes.vectors(index - 1, &codes, mode)?;
                sum = Some(match sum {
                    None => vectors,
                    Some(sum) => (sum + vectors)?,
                });
            }
            let mut hidden = part.features.forward(features, RELU_FIRST, mode)?;
            if let (Some(before), Some(sum)) = (&part.before, &sum) {
                hidden = (hidden + before.apply(sum, mode)?)?;
            }
            logits.push(part.logits.forward(&hidden, RELU_FIRST, mode)?);
        }
        Ok(logits)
    }

    /// The same for one position at a time.
    pub(crate) fn steps(&self) -> Result<HeadSteps<'_>> {
        let pack = |part: &Part| -> Result<PackedPart> {
            Ok(PackedPart {
                features: part.features.packed()?,
                before: part.before.as_ref().map(Conv::packed).transpose()?,
                logits: part.logits.packed()?,
            })
        };
        let parts = self.parts.iter().map(pack).collect::<Result<_>>()?;
        Ok(HeadSteps { codes: &self.codes, parts, sum: None })
    }
}

/// The head with its weights laid out for few rows, and the codes of the position so far.
#[derive(Debug)]
pub(crate) struct HeadSteps<'a> {
    codes: &'a CodeTable,
    parts: Vec<PackedPart>,
    /// Sum of the vectors of the position's codes so far, `[B,H]`.
    sum: Option<Tensor>,
}

#[derive(Debug)]
struct PackedPart {
    features: PackedLinear,
    before: Option<PackedLinear>,
    logits: PackedLinear,
}

impl HeadSteps<'_> {
    /// Logits `[B,K]` of the code number `index` of the position whose features `[B,F]` are given.
    pub(crate) fn logits(&self, index: usize, features: &Tensor) -> Result<Tensor> {
        let Some(part) = self.parts.get(index) else {
            return Err(Error::Input(format!("a position has no code {index}")));
        };
        let mut hidden = part.features.forward(features, true)?;
        if let (Some(before), Some(sum)) = (&part.before, &self.sum) {
            hidden = (hidden + before.forward(sum, false)?)?;
        }
        Ok(part.logits.forward(&hidden, true)?)
    }

    /// Takes the code number `index`, `[B]` u32.
    pub(crate) fn push(&mut self, index: usize, codes: &Tensor) -> Result<()> {
        if index + 1 == self.parts.len() {
            self.sum = None;
            return Ok(());
        }
        let vectors = self.codes.vectors(index, codes, Mode::EVALUATE)?;
        self.sum = Some(match self.sum.take() {
            None => vectors,
            Some(sum) => (sum + vectors)?,
        });
        Ok(())
    }
}

//! One symbol after the other, into bytes or out of them.

use std::num::NonZeroU32;

use constriction::stream::model::{DecoderModel, EncoderModel, EntropyModel};
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode, Encode};

use super::CompressError;
use super::distribution::{Distribution, ONE, PRECISION};

/// A range encoder or a range decoder, to be used alike: what decides on the distributions need not know
/// which it is.
pub(super) enum Coder {
    Encoder(DefaultRangeEncoder),
    Decoder(Box<DefaultRangeDecoder>),
}

/// A symbol's interval of quantiles, in units of 2⁻²⁴.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interval {
    pub(super) first: u32,
    pub(super) width: u32,
}

impl Coder {
    pub(super) fn encoder() -> Self {
        Self::Encoder(DefaultRangeEncoder::new())
    }

    /// For the bytes that [`finish`](Self::finish) gave.
    pub(super) fn decoder(bytes: &[u8]) -> Result<Self, CompressError> {
        let (words, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(CompressError::damaged("a block does not end with a word"));
        }
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        match DefaultRangeDecoder::from_compressed(words) {
            Ok(decoder) => Ok(Self::Decoder(Box::new(decoder))),
            Err(never) => match never {},
        }
    }

    /// Writes `symbol`, or reads one and does not look at `symbol`. The symbol that it is.
    pub(super) fn code<D: Distribution>(
        &mut self,
        distribution: &D,
        symbol: u32,
    ) -> Result<u32, CompressError> {
        match self {
            Self::Encoder(encoder) => {
                if symbol >= distribution.symbols() {
                    let symbols = distribution.symbols();
                    return Err(CompressError::Input(format!("{symbol} is not below {symbols}")));
                }
                let interval = distribution.interval(symbol);
                match encoder.encode_symbol((), interval) {
                    Ok(()) => Ok(symbol),
                    Err(_) => Err(CompressError::Input(format!("{symbol} has no probability"))),
                }
            }
            Self::Decoder(decoder) => {
                let symbol = decoder.decode_symbol(Search(distribution));
                symbol.map_err(|_| CompressError::damaged("a block does not decode"))
            }
        }
    }

    /// What was written; nothing of a decoder.
    pub(super) fn finish(self) -> Vec<u8> {
        match self {
            Self::Encoder(encoder) => match encoder.into_compressed() {
                Ok(words) => words.into_iter().flat_map(u32::to_le_bytes).collect(),
                Err(never) => match never {},
            },
            Self::Decoder(_) => Vec::new(),
        }
    }
}

impl EntropyModel<PRECISION> for Interval {
    type Symbol = ();
    type Probability = u32;
}

impl EncoderModel<PRECISION> for Interval {
    fn left_cumulative_and_probability(
        &self,
        _: impl std::borrow::Borrow<()>,
    ) -> Option<(u32, NonZeroU32)> {
        Some((self.first, NonZeroU32::new(self.width)?))
    }
}

/// A distribution as constriction reads one.
struct Search<'a, D>(&'a D);

impl<D> EntropyModel<PRECISION> for Search<'_, D> {
    type Symbol = u32;
    type Probability = u32;
}

impl<D: Distribution> DecoderModel<PRECISION> for Search<'_, D> {
    fn quantile_function(&self, quantile: u32) -> (u32, u32, NonZeroU32) {
        let symbol = self.0.find(quantile.min(ONE - 1));
        let interval = self.0.interval(symbol);
        // No interval is empty.
        (symbol, interval.first, NonZeroU32::new(interval.width).unwrap_or(NonZeroU32::MIN))
    }
}

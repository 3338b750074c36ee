//! Distributions in integers.

use super::exp::exp;
use super::{CompressError, coder};

/// Bits of a probability.
pub(super) const PRECISION: usize = 24;
/// 1 as a probability.
pub(super) const ONE: u32 = 1 << PRECISION;

/// A distribution over the symbols 0 to `symbols` − 1, in units of 2⁻²⁴.
pub(super) trait Distribution {
    /// The number of symbols, at most [`MOST_SYMBOLS`].
    fn symbols(&self) -> u32;

    /// The probability of all symbols below `symbol`, as a real number in [0, 1]: 0 for 0, 1 for
    /// `symbols`, and never falling in between.
    fn below(&self, symbol: u32) -> f64;

    /// The same in integers. Every symbol gets one unit and its share of the rest, so that none is
    /// impossible; rounding down what never falls never falls.
    fn cumulative(&self, symbol: u32) -> u32 {
        let symbols = self.symbols();
        match symbol {
            0 => 0,
            _ if symbol >= symbols => ONE,
            _ => (self.below(symbol).min(1.0) * f64::from(ONE - symbols)) as u32 + symbol,
        }
    }

    /// −log₂ of the real probability of a symbol.
    fn bits(&self, symbol: u32) -> f64;

    /// The symbol whose interval holds a quantile below [`ONE`].
    fn find(&self, quantile: u32) -> u32 {
        let (mut low, mut high) = (0, self.symbols());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cumulative(middle) <= quantile {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// A symbol's interval of quantiles, for the coder.
    fn interval(&self, symbol: u32) -> coder::Interval {
        let first = self.cumulative(symbol);
        coder::Interval { first, width: self.cumulative(symbol + 1) - first }
    }
}

/// More symbols would leave too little of the 2²⁴ units to tell them apart.
pub(super) const MOST_SYMBOLS: usize = 1 << 18;

/// All symbols alike.
pub(super) struct Uniform(u32);

impl Uniform {
    pub(super) fn new(symbols: usize) -> Result<Self, CompressError> {
        check(symbols).map(Self)
    }
}

impl Distribution for Uniform {
    fn symbols(&self) -> u32 {
        self.0
    }

    fn below(&self, symbol: u32) -> f64 {
        f64::from(symbol) / f64::from(self.0)
    }

    fn bits(&self, _: u32) -> f64 {
        f64::from(self.0).log2()
    }
}

/// A softmax.
pub(super) struct Softmax {
    /// Sums of the powers of all symbols before, and of all at the end.
    sums: Vec<f64>,
    total: f64,
}

impl Softmax {
    /// `what` is the network that gave the logits.
    pub(super) fn new(logits: &[f32], what: &'static str) -> Result<Self, CompressError> {
        check(logits.len())?;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = Vec::with_capacity(logits.len() + 1);
        let mut total = 0.0;
        sums.push(total);
        for &logit in logits {
            total += exp(f64::from(logit) - f64::from(max));
            sums.push(total);
        }
        if total.is_finite() && total >= 1.0 {
            Ok(Self { sums, total })
        } else {
            Err(CompressError::NotFinite(what))
        }
    }

    fn sum(&self, symbol: u32) -> f64 {
        self.sums.get(symbol as usize).copied().unwrap_or(self.total)
    }
}

impl Distribution for Softmax {
    fn symbols(&self) -> u32 {
        self.sums.len() as u32 - 1
    }

    fn below(&self, symbol: u32) -> f64 {
        self.sum(symbol) / self.total
    }

    fn bits(&self, symbol: u32) -> f64 {
        // A share that vanishes beside the sums takes what its one unit does.
        let share = (self.sum(symbol + 1) - self.sum(symbol)) / self.total;
        -share.max(1.0 / f64::from(ONE)).log2()
    }
}

fn check(symbols: usize) -> Result<u32, CompressError> {
    if (1..=MOST_SYMBOLS).contains(&symbols) {
        return Ok(symbols as u32);
    }
    Err(CompressError::Input(format!(
        "codebooks of 1 to {MOST_SYMBOLS} codes can be compressed, not of {symbols}"
    )))
}

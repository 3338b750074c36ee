//! What a step says about itself.

use candle_core::Tensor;
use vq_ops::collect_scalars;

use crate::{Metrics, Result, Usage};

/// The terms of a step's loss and the codes that it used, left on the device until they are read: reading
/// waits for all that the device was given to do.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    terms: Vec<Term>,
    codes: Vec<Used>,
}

/// The codes of a level.
#[derive(Clone, Debug)]
struct Used {
    usage: Usage,
    codes: Tensor,
    /// Whether `codes` are a histogram already.
    are_counted: bool,
}

/// Bins of a histogram that is made on the device: more would be more to read than the codes.
const MOST_BINS: usize = 1 << 14;

#[derive(Clone, Debug)]
struct Term {
    name: String,
    value: Tensor,
    reading: Reading,
}

/// What is reported of a value.
#[derive(Clone, Copy, Debug)]
enum Reading {
    Divided(f64),
    /// The root of the value times this.
    Root(f64),
}

impl Reading {
    fn of(self, value: f32) -> f64 {
        match self {
            Self::Divided(divisor) => f64::from(value) / divisor,
            Self::Root(factor) => (f64::from(value) * factor).sqrt(),
        }
    }
}

impl Figures {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more term, a scalar f32.
    #[must_use]
    pub fn with(self, name: impl Into<String>, value: &Tensor) -> Self {
        self.with_divided(name, value, 1.0)
    }

    /// With one more term, which is reported divided by `divisor`.
    #[must_use]
    pub fn with_divided(self, name: impl Into<String>, value: &Tensor, divisor: f64) -> Self {
        self.push(name.into(), value, Reading::Divided(divisor))
    }

    /// With one more term, of which the root of `factor` times it is reported.
    #[must_use]
    pub fn with_root(self, name: impl Into<String>, value: &Tensor, factor: f64) -> Self {
        self.push(name.into(), value, Reading::Root(factor))
    }

    fn push(mut self, name: String, value: &Tensor, reading: Reading) -> Self {
        self.terms.push(Term { name, value: value.detach(), reading });
        self
    }

    /// With the codes (u32, any shape) of one more level, to be counted into `usage`.
    #[must_use]
    pub fn with_codes(mut self, usage: Usage, codes: &Tensor) -> Self {
        self.codes.push(Used { usage, codes: codes.clone(), are_counted: false });
        self
    }

    /// The terms in their order, and one histogram per level.
    pub fn read(&self) -> Result<(Metrics, Vec<Usage>)> {
        // One copy from the device.
        let values =
            if self.terms.is_empty() { Vec::new() } else { self.values()?.to_vec1::<f32>()? };
        let codes = self.codes().map(|codes| codes.flatten_all()?.to_vec1::<u32>());
        let codes: Vec<Vec<u32>> = codes.collect::<candle_core::Result<_>>()?;
        Ok(self.with_values(&values, codes.iter().map(Vec::as_slice)))
    }

    /// The terms side by side, not divided yet: `[n]`.
    pub(crate) fn values(&self) -> Result<Tensor> {
        let terms: Vec<Tensor> = self.terms.iter().map(|term| term.value.clone()).collect();
        Ok(collect_scalars(&terms)?)
    }

    /// [`values`](Self::values) and then another scalar: `[n + 1]`.
    pub(crate) fn values_and(&self, more: Tensor) -> Result<Tensor> {
        let terms = self.terms.iter().map(|term| term.value.clone());
        Ok(collect_scalars(&terms.chain([more]).collect::<Vec<_>>())?)
    }

    /// The codes of each level, or their histogram.
    pub(crate) fn codes(&self) -> impl Iterator<Item = &Tensor> {
        self.codes.iter().map(|used| &used.codes)
    }

    /// Counts the codes where they are, where that makes less to read of them.
    pub(crate) fn count_codes(&mut self) -> Result<()> {
        for Used { usage, codes, are_counted } in &mut self.codes {
            let (codebooks, bins) = (usage.codebooks.max(1), usage.counts.len());
            if !*are_counted && bins <= MOST_BINS {
                *codes = vq_ops::count_codes(codes, codebooks, bins / codebooks)?;
                *are_counted = true;
            }
        }
        Ok(())
    }

    /// Copies the codes to a storage of their own.
    pub(crate) fn own_codes(&mut self) -> Result<()> {
        for Used { codes, .. } in &mut self.codes {
            *codes = codes.contiguous()?.copy()?;
        }
        Ok(())
    }

    /// What [`read`](Self::read) gives where these are the terms and the codes.
    pub(crate) fn with_values<'a>(
        &self,
        values: &[f32],
        codes: impl Iterator<Item = &'a [u32]>,
    ) -> (Metrics, Vec<Usage>) {
        let mut metrics = Metrics::new();
        for (term, &value) in self.terms.iter().zip(values) {
            metrics.set(&term.name, term.reading.of(value));
        }
        let count = |(used, codes): (&Used, &[u32])| {
            let mut usage = used.usage.clone();
            if used.are_counted {
                usage.counts.iter_mut().zip(codes).for_each(|(n, &more)| *n += u64::from(more));
            } else {
                usage.count(codes);
            }
            usage
        };
        (metrics, self.codes.iter().zip(codes).map(count).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_keep_their_order_and_codes_are_counted() -> Result<()> {
        let scalar = |value: f32| Tensor::new(value, &vq_ops::test_device()).unwrap();
        let codes = Tensor::new(&[[0u32, 2], [2, 2]], &vq_ops::test_device())?;
        let figures = Figures::new()
            .with("z", &scalar(0.5))
            .with_divided("a", &scalar(3.0), 2.0)
            .with_root("r", &scalar(8.0), 2.0)
            .with_codes(Usage::new(3), &codes);
        let mut counted = figures.clone();
        counted.count_codes()?;
        assert_eq!(counted.read()?.1, figures.read()?.1);
        let (metrics, usage) = figures.read()?;
        assert_eq!(metrics, Metrics::new().with("z", 0.5).with("a", 1.5).with("r", 4.0));
        assert_eq!(usage[0].counts, [1, 0, 3]);
        Ok(())
    }
}

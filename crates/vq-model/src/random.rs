//! Counter-based random streams: what is drawn depends on the key alone, never on what was drawn before.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of random numbers that depends on `seed`, `name` and `counter` only.
#[derive(Debug)]
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of that key, at its beginning.
    pub fn new(seed: u64, name: &str, counter: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&fnv1a(name.as_bytes()).to_le_bytes());
        key[16..24].copy_from_slice(&counter.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// `count` values, uniform in [−bound, bound).
    pub fn uniform(&mut self, count: usize, bound: f64) -> Vec<f32> {
        let mut draw = || f64::from(self.0.next_u32()) / f64::from(1u32 << 31) - 1.0;
        (0..count).map(|_| (draw() * bound) as f32).collect()
    }

    /// Uniform in [0, 1), to 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A seed for what draws by itself.
    pub fn next_seed(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// `count` values of the normal distribution of mean 0.
    pub(crate) fn normal(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        // Box and Muller; 1 − u is never 0.
        let mut draw = || {
            let (radius, angle) = (1.0 - self.unit(), std::f64::consts::TAU * self.unit());
            (deviation * (-2.0 * radius.ln()).sqrt() * angle.cos()) as f32
        };
        (0..count).map(|_| draw()).collect()
    }

    /// Uniform in 0..n (n > 0).
    pub fn below(&mut self, n: usize) -> usize {
        // Lemire's multiply-shift; the bias is below n / 2⁶⁴.
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// min(count, n) distinct numbers of 0..n in random order.
    pub fn distinct(&mut self, count: usize, n: usize) -> Vec<usize> {
        // The first steps of Fisher–Yates.
        let mut numbers: Vec<usize> = (0..n).collect();
        let count = count.min(n);
        for i in 0..count {
            let j = i + self.below(n - i);
            numbers.swap(i, j);
        }
        numbers.truncate(count);
        numbers
    }
}

/// FNV-1a, 64 bits: a hash that stays the same from one version of Rust to the next.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_depend_on_every_part_of_the_key() {
        let draw = |seed, name, counter| Stream::new(seed, name, counter).uniform(4, 1.0);
        assert_eq!(draw(1, "a", 2), draw(1, "a", 2));
        assert_ne!(draw(1, "a", 2), draw(2, "a", 2));
        assert_ne!(draw(1, "a", 2), draw(1, "b", 2));
        assert_ne!(draw(1, "a", 2), draw(1, "a", 3));
    }

    #[test]
    fn uniform_stays_within_its_bound_and_fills_it() {
        let values = Stream::new(0, "uniform", 0).uniform(100_000, 0.25);
        assert!(values.iter().all(|v| v.abs() <= 0.25));
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 2e-3, "{mean}");
        assert!((square - 0.25f64.powi(2) / 3.0).abs() < 3e-4, "{square}");
    }

    #[test]
    fn normal_values_have_their_moments() {
        let values = Stream::new(0, "normal", 0).normal(100_000, 0.5);
        let moment = |power: i32| {
            values.iter().map(|&v| (f64::from(v) / 0.5).powi(power)).sum::<f64>() / 1e5
        };
        // Five standard errors: √(1, 2, 15, 96) / √100,000.
        for (power, expected, error) in
            [(1, 0.0, 1f64), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
        {
            let found = moment(power);
            assert!((found - expected).abs() < 5.0 * (error / 1e5).sqrt(), "{power}: {found}");
        }
    }

    #[test]
    fn unit_values_fill_the_unit_interval() {
        let mut stream = Stream::new(0, "unit", 0);
        let values: Vec<f64> = (0..10_000).map(|_| stream.unit()).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 5.0 / (12f64 * 1e4).sqrt(), "{mean}");
    }

    #[test]
    fn distinct_numbers_are_distinct_and_in_range() {
        for (count, n) in [(5, 10), (10, 10), (20, 10), (0, 10), (3, 0)] {
            let mut drawn = Stream::new(7, "distinct", 1).distinct(count, n);
            assert_eq!(drawn.len(), count.min(n));
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), count.min(n));
            assert!(drawn.iter().all(|&i| i < n));
        }
    }
}

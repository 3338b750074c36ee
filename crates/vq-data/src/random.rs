//! Counter-based random streams: each is a `ChaCha8` keystream whose key spells out what it is for,
//! so any draw can be made again without making those before it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What a stream is for; part of its key, so that streams never overlap.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    Shuffle = 1,
    Flip = 2,
    Shape = 3,
    HoldOut = 4,
}

pub(crate) struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of (`seed`, `purpose`, `counter`), from its start.
    pub(crate) fn new(seed: u64, purpose: Purpose, counter: u64) -> Self {
        let mut key = [0; 32];
        let words = [seed, purpose as u64, counter];
        for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    pub(crate) fn u32(&mut self) -> u32 {
        self.0.next_u32()
    }

    pub(crate) fn u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in 0..n, without bias (Lemire's multiplication with rejection); 0 for n = 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let n = n.max(1);
        let rejected = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.u64()) * u128::from(n);
            if product as u64 >= rejected {
                return (product >> 64) as u64;
            }
        }
    }

    /// Uniform in low..high, 24 bits of it.
    pub(crate) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.u32() >> 8) as f32 / (1 << 24) as f32)
    }

    pub(crate) fn chance(&mut self, probability: f32) -> bool {
        self.range(0.0, 1.0) < probability
    }
}

/// The numbers 0..n in the order of (`seed`, `counter`): Fisher–Yates.
pub(crate) fn permutation(n: usize, seed: u64, counter: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut stream = Stream::new(seed, Purpose::Shuffle, counter);
    for i in (1..n).rev() {
        order.swap(i, stream.below(i as u64 + 1) as usize);
    }
    order
}

/// One fair bit for each number 0..n, 32 of them to a word of the keystream.
pub(crate) fn coin_flips(n: usize, seed: u64, counter: u64) -> Vec<u32> {
    let mut stream = Stream::new(seed, Purpose::Flip, counter);
    (0..n.div_ceil(32)).map(|_| stream.u32()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_in_every_part_of_their_key() {
        let draw = |seed, purpose, counter| Stream::new(seed, purpose, counter).u64();
        let first = draw(1, Purpose::Shuffle, 0);
        assert_eq!(first, draw(1, Purpose::Shuffle, 0));
        assert_ne!(first, draw(2, Purpose::Shuffle, 0));
        assert_ne!(first, draw(1, Purpose::Flip, 0));
        assert_ne!(first, draw(1, Purpose::Shuffle, 1));
    }

    #[test]
    fn below_is_uniform() {
        let mut stream = Stream::new(0, Purpose::HoldOut, 0);
        let mut counts = [0_u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        // Five standard deviations: √(70000 · 1/7 · 6/7) = 92.6.
        assert!(counts.iter().all(|&c| c.abs_diff(10_000) < 463), "{counts:?}");
        assert_eq!(stream.below(1), 0);
        assert_eq!(stream.below(0), 0);
    }

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for counter in 0..6000 {
            *counts.entry(permutation(3, 9, counter)).or_insert(0_u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|c| c.abs_diff(1000) < 150), "{counts:?}");
    }

    /// These values are part of the format of a run: a resumed one must draw the same.
    #[test]
    fn the_orders_do_not_change_between_versions() {
        assert_eq!(permutation(8, 42, 3), GOLDEN_ORDER);
        assert_eq!(coin_flips(32, 42, 3), GOLDEN_FLIPS);
    }
    const GOLDEN_ORDER: [usize; 8] = [7, 3, 1, 5, 2, 0, 6, 4];
    const GOLDEN_FLIPS: [u32; 1] = [3_172_719_996];
}

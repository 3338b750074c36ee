//! k-means initialisation of a codebook.

use std::collections::BTreeSet;

use candle_core::Tensor;
use vq_ops::{code_statistics, nearest_codes};

use super::VectorQuantizer;
use crate::random::Stream;
use crate::{Error, Result};

/// How long k-means runs.
#[derive(Clone, Copy)]
pub struct KMeans<'a> {
    /// Rounds, at most: it ends where nothing moves any more.
    pub rounds: usize,
    /// Of what is drawn.
    pub seed: u64,
    /// Asked before every round; it ends with [`Error::Stopped`] and leaves the codebook as it was.
    pub stop: &'a dyn Fn() -> bool,
}

/// Lloyd's k-means on the pool `z_e` `[…,D]`: starts from distinct vectors of the pool, and seeds a
/// cluster that falls empty anew. Sets e, N to the sizes of the clusters, m = N·e, and the flag.
pub(super) fn initialize(
    quantizer: &VectorQuantizer,
    z_e: &Tensor,
    KMeans { rounds, seed, stop }: KMeans<'_>,
) -> Result<()> {
    let pool = quantizer.vectors(z_e)?;
    let (k, dim) = (quantizer.config.codebook_size, quantizer.config.dim);
    let vectors = pool.flatten_all()?.to_vec1::<f32>()?;
    if vectors.is_empty() || vectors.iter().any(|value| !value.is_finite()) {
        let name = &quantizer.name;
        return Err(Error::Input(format!(
            "k-means of {name} needs a pool of finite vectors, got {:?}",
            z_e.dims()
        )));
    }
    let mut stream = Stream::new(seed, &format!("{}.kmeans", quantizer.name), 0);
    let mut centres = seed_rows(&vectors, dim, k, &mut stream);
    let mut tensor = quantizer.scaled(&Tensor::from_slice(&centres, (k, dim), pool.device())?)?;
    for _ in 0..rounds {
        if stop() {
            return Err(Error::Stopped);
        }
        let (counts, sums) = code_statistics(&pool, &nearest_codes(&pool, &tensor)?, k)?;
        let (counts, sums) = (counts.to_vec1::<f32>()?, sums.flatten_all()?.to_vec1::<f32>()?);
        let empty = counts.iter().filter(|&&count| count == 0.0).count();
        let mut fresh = seed_rows(&vectors, dim, empty, &mut stream);
        let before = centres.clone();
        for ((centre, sum), &count) in
            centres.chunks_exact_mut(dim).zip(sums.chunks_exact(dim)).zip(&counts)
        {
            if count > 0.0 {
                centre.iter_mut().zip(sum).for_each(|(c, s)| *c = s / count);
            } else {
                let rest = fresh.split_off(dim);
                centre.copy_from_slice(&fresh);
                fresh = rest;
            }
        }
        if centres == before {
            // Nothing moves any more.
            break;
        }
        tensor = quantizer.scaled(&Tensor::from_slice(&centres, (k, dim), pool.device())?)?;
    }
    let (counts, _) = code_statistics(&pool, &nearest_codes(&pool, &tensor)?, k)?;
    let usage = counts.maximum(1.0)?;
    if let Some(sums) = &quantizer.sums {
        sums.set(&tensor.broadcast_mul(&usage.unsqueeze(1)?)?)?;
    }
    quantizer.usage.set(&usage)?;
    quantizer.codebook.set(&tensor)?;
    quantizer.initialized.set(&quantizer.initialized.ones_like()?)?;
    Ok(())
}

/// `count` rows drawn from `vectors` `[N,dim]` (N > 0) as one flat vector: first rows with different
/// values in random order; if there are too few, copies of them moved a little.
pub(super) fn seed_rows(
    vectors: &[f32],
    dim: usize,
    count: usize,
    stream: &mut Stream,
) -> Vec<f32> {
    let rows = vectors.len() / dim;
    let row = |index: usize| vectors.get(index * dim..(index + 1) * dim).unwrap_or_default();
    let mut chosen = Vec::with_capacity(count * dim);
    let mut seen = BTreeSet::new();
    if count > 0 {
        for index in stream.distinct(rows, rows) {
            let key: Vec<u32> = row(index).iter().map(|value| value.to_bits()).collect();
            if seen.insert(key) {
                chosen.extend_from_slice(row(index));
            }
            if chosen.len() == count * dim {
                break;
            }
        }
    }
    let square = vectors.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    let jitter = 1e-3 * (square / vectors.len() as f64).sqrt() + 1e-6;
    while chosen.len() < count * dim {
        let noise = stream.uniform(dim, jitter);
        let base = row(stream.below(rows));
        chosen.extend(base.iter().zip(noise).map(|(value, noise)| value + noise));
    }
    chosen
}

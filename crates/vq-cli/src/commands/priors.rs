//! The priors of a model, as several commands are given them.

use std::path::PathBuf;

use candle_core::Device;
use vq_model::VqVae;
use vq_prior::Prior;
use vq_train::{load_prior, model_hash, require_prior, resolve_model};

use crate::error::{Error, Result};

/// Loads a prior for each level of the model whose hash is given, the top one first.
pub(super) fn load(
    paths: &[PathBuf],
    model: &VqVae,
    hash: &str,
    device: &Device,
) -> Result<Vec<Prior>> {
    let load = |path: &PathBuf| load_prior(path, hash, device);
    let priors: Vec<Prior> = paths.iter().map(load).collect::<std::result::Result<_, _>>()?;
    check(model, &priors, paths)?;
    Ok(priors)
}

/// The same, where none at all will do too.
pub(super) fn load_any(
    paths: &[PathBuf],
    model: &VqVae,
    hash: &str,
    device: &Device,
) -> Result<Vec<Prior>> {
    if paths.is_empty() { Ok(Vec::new()) } else { load(paths, model, hash, device) }
}

/// The hash of each. A model among them is refused.
pub(super) fn hashes(paths: &[PathBuf]) -> Result<Vec<String>> {
    let hash = |path: &PathBuf| {
        let folder = resolve_model(path)?;
        require_prior(&folder)?;
        Ok(model_hash(folder)?)
    };
    paths.iter().map(hash).collect()
}

/// Whether these are priors for all levels of the model, from the top.
fn check(model: &VqVae, priors: &[Prior], paths: &[PathBuf]) -> Result<()> {
    let levels = model.config().levels.len();
    if priors.len() != levels {
        return Err(Error::other(format!(
            "the model has {levels} level(s) of codes and {} prior(s) are given: give one for each level, the top \
             one first (--prior TOP … BOTTOM)",
            priors.len()
        )));
    }
    for (index, (prior, path)) in priors.iter().zip(paths).enumerate() {
        let (own, level) = (prior.config().conditioning.len(), levels - 1 - index);
        if own != index {
            return Err(Error::other(format!(
                "{} is a prior for level {}, and one for level {level} is wanted there: give the top one first",
                path.display(),
                levels.saturating_sub(1 + own)
            )));
        }
        if priors.first().map(|first| &first.config().class_names)
            != Some(&prior.config().class_names)
        {
            let path = path.display();
            return Err(Error::other(format!(
                "{path} was trained on other classes than the top prior"
            )));
        }
    }
    Ok(())
}

//! Comparing quantizers: the same network trained with each of several, over several seeds.

mod budget;
mod csv;
mod run;
mod statistics;
mod summary;
mod table;
mod variants;

use std::path::Path;

pub use run::{PlannedRun, RunFigures, RunState};
pub use statistics::Spread;
pub use summary::{Row, Summary};
pub use variants::{Variant, Variants};

use crate::recipe_toml::differing;
use crate::{Error, Recipe, Result};

/// A comparison: which recipes are trained, with which seeds, and where.
///
/// All recipes have the data, the encoder and decoder, the epochs and the batches of one base recipe, and
/// equal bits per image, exactly or as near as the quantizer's kind allows; see [`Variant::recipe`]. Every
/// run is an ordinary [`RunFolder`](crate::RunFolder), `OUT/NAME-SEED`, trained by the ordinary
/// [`Trainer`](crate::Trainer); what is done is found out from these folders alone.
#[derive(Clone, Debug)]
pub struct Comparison {
    base: Recipe,
    baseline: String,
    variants: Vec<Compared>,
    runs: Vec<PlannedRun>,
}

/// A variant and what came of it on the base recipe.
#[derive(Clone, Debug)]
struct Compared {
    name: String,
    recipe: Recipe,
    /// What differs from the base recipe, as `key = value`.
    changes: Vec<String>,
}

impl Comparison {
    /// Plans `seeds` runs of each of these variants on `base`, in folders below `out`, and checks every
    /// recipe. The seeds are those of `base` and the numbers that follow it.
    pub fn new(
        base: Recipe,
        baseline: &str,
        variants: &[&Variant],
        seeds: u64,
        out: &Path,
    ) -> Result<Self> {
        base.validate()?;
        let last = base.train.seed.checked_add(seeds.saturating_sub(1));
        if seeds == 0 || last.is_none_or(|last| last > i64::MAX as u64) {
            let problem = format!("must be at least 1 and end below 2^63, got {seeds}");
            return Err(Error::config("the number of seeds", problem));
        }
        let variants: Vec<Compared> =
            variants.iter().map(|variant| Compared::new(variant, &base)).collect::<Result<_>>()?;
        let mut runs = Vec::new();
        // By seed first, so that every variant has a figure as soon as can be.
        for seed in (0..seeds).map(|more| base.train.seed + more) {
            for (variant, compared) in variants.iter().enumerate() {
                let mut recipe = compared.recipe.clone();
                recipe.train.seed = seed;
                let folder = out.join(format!("{}-{seed}", compared.name));
                runs.push(PlannedRun {
                    variant,
                    name: compared.name.clone(),
                    seed,
                    folder,
                    recipe,
                });
            }
        }
        Ok(Self { base, baseline: baseline.to_owned(), variants, runs })
    }

    /// The recipe that all variants are laid over.
    pub fn base(&self) -> &Recipe {
        &self.base
    }

    /// All runs, in the order in which they are best trained.
    pub fn runs(&self) -> &[PlannedRun] {
        &self.runs
    }

    /// Where each of the [`runs`](Self::runs) is. An error where a folder holds a run of another recipe.
    pub fn states(&self) -> Result<Vec<RunState>> {
        self.runs.iter().map(PlannedRun::state).collect()
    }
}

impl Compared {
    fn new(variant: &Variant, base: &Recipe) -> Result<Self> {
        let recipe = variant.recipe(base)?;
        let single = base.model.levels.len() == 1;
        let short = |key: &str| match key.strip_prefix("model.levels.") {
            Some(rest) if single => rest.strip_prefix("0.").unwrap_or(rest).to_owned(),
            Some(rest) => format!("levels.{rest}"),
            None => key.to_owned(),
        };
        let changes = differing(base, &recipe)?.into_iter().filter_map(|(key, was, now)| {
            let (key, now) = (short(&key), now?);
            Some(match was {
                Some(was) => format!("{key} = {now} (not {was})"),
                None => format!("{key} = {now}"),
            })
        });
        Ok(Self { name: variant.name.clone(), changes: changes.collect(), recipe })
    }
}

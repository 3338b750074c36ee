//! The flags of a training run: its recipe, what is laid over it, and its folder.

use std::path::PathBuf;

use clap::Args;
use vq_train::RunFolder;

use crate::error::Result;

/// A recipe and what is laid over it. A command that has more to say of a default says it by `mut_arg`.
#[derive(Clone, Debug, Args)]
pub(crate) struct RecipeArgs {
    /// A recipe: a TOML file or the name of an embedded one (see `vq configs`).
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) config: Option<String>,

    /// Set any key of the recipe; may be given several times, and comes before the flags below.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,

    /// Passes over the training images [default: the recipe's].
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,

    /// Images per step [default: the recipe's].
    #[arg(long, alias = "batch_size", value_name = "N")]
    batch_size: Option<usize>,

    /// The highest learning rate [default: the recipe's].
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
}

/// One run and its folder.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Decides everything that is drawn at random, from the initial weights to the order of the images
    /// [default: the recipe's].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// The run folder.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    pub(crate) out: PathBuf,

    /// Go on with the run in --out from its newest checkpoint, with its own recipe.
    #[arg(long, conflicts_with = "overwrite")]
    pub(crate) resume: bool,

    /// Replace the run in --out, if there is one.
    #[arg(long)]
    pub(crate) overwrite: bool,
}

impl RecipeArgs {
    /// Lays every `--set` over a recipe, by its `with_override`.
    pub(crate) fn set<R>(
        &self,
        recipe: R,
        with_override: impl Fn(&R, &str) -> vq_train::Result<R>,
    ) -> Result<R> {
        let mut recipe = recipe;
        for assignment in &self.overrides {
            recipe = with_override(&recipe, assignment)?;
        }
        Ok(recipe)
    }

    /// Lays the flags of the loop over a recipe's values; they go over every `--set`.
    pub(crate) fn apply(&self, epochs: &mut usize, batch_size: &mut usize, lr: &mut f64) {
        *epochs = self.epochs.unwrap_or(*epochs);
        *batch_size = self.batch_size.unwrap_or(*batch_size);
        *lr = self.lr.unwrap_or(*lr);
    }
}

impl RunArgs {
    /// The run that is to go on, if one is. A folder that holds a run, where a new one is asked for, is
    /// refused.
    pub(crate) fn resumed(&self) -> Result<Option<RunFolder>> {
        if self.resume {
            return Ok(Some(RunFolder::resume(&self.out)?));
        }
        if !self.overwrite {
            RunFolder::require_free(&self.out)?;
        }
        Ok(None)
    }

    /// Lays the flag over a recipe's seed.
    pub(crate) fn apply(&self, seed: &mut u64) {
        *seed = self.seed.unwrap_or(*seed);
    }
}

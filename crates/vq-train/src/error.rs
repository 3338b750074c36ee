//! What can go wrong, and what to do about it.

use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong; every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the recipe is out of its range.
    #[error("{key} {problem}")]
    Config {
        /// Dotted key, e.g. `train.batch_size`.
        key: String,
        /// What it must be and what it is.
        problem: String,
    },

    /// A recipe is not TOML, or holds a key or a type that it must not.
    #[error("{origin}: {problem}")]
    Recipe {
        /// The file, or "recipe".
        origin: String,
        /// Where in it and what.
        problem: String,
    },

    /// A `key=value` override that does not fit the recipe.
    #[error("cannot set `{key}`: {problem}")]
    Override {
        /// The dotted key as given.
        key: String,
        /// What is wrong with it.
        problem: String,
    },

    /// A run cannot go on under another recipe than the one that it was started with.
    #[error(
        "cannot resume with another {key} (it was {was}, it is now {now}): train with the old value, or \
         start a new run with --out"
    )]
    ResumeMismatch {
        /// Dotted key.
        key: String,
        /// Its value in the run folder.
        was: String,
        /// Its value in the new recipe.
        now: String,
    },

    /// The data set is not the one that the run was started with.
    #[error(
        "cannot resume: the training set gives {now} batches an epoch, at the checkpoint it gave {was}; \
         use the same data, or start a new run with --out"
    )]
    ResumeData {
        /// Batches per epoch at the checkpoint.
        was: usize,
        /// Batches per epoch now.
        now: usize,
    },

    /// The data set has another size than the one that the run was started with.
    #[error(
        "cannot resume: there are {now} images to learn from, at the checkpoint there were {was}; use the same data, \
         or start a new run with --out"
    )]
    ResumeImages {
        /// Images at the checkpoint.
        was: usize,
        /// Images now.
        now: usize,
    },

    /// The run folder already holds a run.
    #[error(
        "{} already holds a run: go on with it (--resume), write elsewhere (--out DIR), or replace it \
         (--overwrite)", path.display()
    )]
    Occupied {
        /// The run folder.
        path: PathBuf,
    },

    /// Another process writes the run folder.
    #[error(
        "{} is being written by another run: wait until it ends, or stop it, or write elsewhere (--out DIR)",
        path.display()
    )]
    Busy {
        /// The run folder.
        path: PathBuf,
    },

    /// A folder of a comparison holds a run of another recipe.
    #[error(
        "{} holds a run with another {key} (it was {was}, it is now {now}): compare with the old value, start a \
         new comparison (--out DIR), or make its runs anew (--overwrite)", path.display()
    )]
    OtherRecipe {
        /// The run folder.
        path: PathBuf,
        /// Dotted key.
        key: String,
        /// Its value in the run folder.
        was: String,
        /// Its value in the comparison.
        now: String,
    },

    /// There is no run to resume or to load.
    #[error("{}: {problem}", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// What is missing and what to do.
        problem: String,
    },

    /// Codes, or a prior over codes, that another model made.
    #[error(
        "{} belongs to another model ({}) than this one ({}): give the model that it was made with (--model), or \
         make it anew with this one", what.display(), short(made_by), short(hash)
    )]
    OtherModel {
        /// The codes or the prior.
        what: PathBuf,
        /// The hash of the model that made it.
        made_by: String,
        /// The hash of the model at hand.
        hash: String,
    },

    /// A checkpoint cannot be read: it was cut short or altered.
    #[error("{} is damaged: {cause}; {advice}", path.display())]
    DamagedCheckpoint {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        cause: String,
        /// What to do.
        advice: String,
    },

    /// The loss, the gradient or the weights are no longer finite.
    #[error(
        "step {step}: {what}; training stopped. Last good checkpoint: {}. Try a lower train.lr, a longer \
         train.warmup_steps, or train.grad_clip = 1", checkpoint_text(checkpoint.as_deref())
    )]
    NotFinite {
        /// The step (from 1) at which it was seen.
        step: u64,
        /// What is not finite.
        what: String,
        /// The newest checkpoint.
        checkpoint: Option<PathBuf>,
    },

    /// A file or folder cannot be written. What stood there before is untouched.
    #[error("cannot write {}: {source}; check permissions and free space, or choose another --out", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },

    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },

    /// An observer failed.
    #[error(transparent)]
    Observer(Box<dyn std::error::Error + Send + Sync>),

    /// From the model.
    #[error(transparent)]
    Model(#[from] vq_model::Error),

    /// From the data.
    #[error(transparent)]
    Data(#[from] vq_data::Error),

    /// From candle, e.g. out of memory on a device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Write { path, source }
    }

    pub(crate) fn damaged(path: &Path, cause: impl std::fmt::Display) -> Self {
        Self::DamagedCheckpoint {
            path: path.to_path_buf(),
            cause: format!("{cause}"),
            advice: "copy it again, or delete its folder and resume from an earlier checkpoint"
                .into(),
        }
    }
}

/// Enough of a hash to tell models apart.
fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(if hash.is_empty() { "unknown" } else { hash })
}

fn checkpoint_text(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(|| "none yet".into(), |path| path.display().to_string())
}

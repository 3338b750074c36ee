//! What can go wrong, and what to do about it.

use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong; every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of the config is out of its range.
    #[error("{key} {problem}")]
    Config {
        /// Dotted key, e.g. `levels.0.quantizer.codebook_size`.
        key: String,
        /// What it must be and what it is.
        problem: String,
    },

    /// Placing the codebooks was stopped, as was asked for.
    #[error("stopped before the codebooks were placed")]
    Stopped,

    /// `config.json` is not JSON, or holds a key or a type that it must not.
    #[error("{}: {source}; correct it, or take the file that was saved with the model", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Where in it and what.
        source: serde_json::Error,
    },

    /// `config.json` holds values that are out of their range.
    #[error("{}: {source}", path.display())]
    ConfigValue {
        /// The file.
        path: PathBuf,
        /// Which key and why.
        source: Box<Error>,
    },

    /// The model was saved by a newer version of this crate.
    #[error(
        "{}: format version {found} is newer than this program's {supported}; update the program",
        path.display()
    )]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// The version that it states.
        found: u64,
        /// The newest that this crate reads.
        supported: u32,
    },

    /// A file of a saved model cannot be read.
    #[error(
        "cannot read {}: {source}; a saved model is a folder with config.json and model.safetensors",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },

    /// A file cannot be written. What stood there before is untouched.
    #[error("cannot write {}: {source}; check permissions and free space", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },

    /// A `.safetensors` file is damaged.
    #[error(
        "{}: not a whole safetensors file ({source}); it was cut short or altered: copy it again, or take \
         an earlier checkpoint",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: safetensors::SafeTensorError,
    },

    /// The tensors are not those of the model that the config describes.
    #[error(
        "{origin}: checkpoint of another architecture: {problem}; use the config.json that was saved with it"
    )]
    Architecture {
        /// The file or the map of tensors.
        origin: String,
        /// The first tensor that differs, with both shapes.
        problem: String,
    },

    /// A tensor of a saved model holds NaN or infinity.
    #[error(
        "{origin}: tensor `{name}` holds values that are not finite; take an earlier checkpoint"
    )]
    NotFinite {
        /// The file or the map of tensors.
        origin: String,
        /// The tensor.
        name: String,
    },

    /// Something that takes p(x|z) was asked of a model whose decoder gives none.
    #[error(
        "the model's decoder gives pixels and no distribution of them, so there is no p(x|z): train one with \
         model.likelihood = \"categorical\" or \"logistic-mixture\", as in the recipe cifar10-likelihood"
    )]
    NoLikelihood,

    /// Images or codes that the model cannot take.
    #[error("{0}")]
    Input(String),

    /// The encoder's output is NaN or infinite.
    #[error(
        "the encoder's output of level {level} is not finite: its weights have diverged; take an earlier \
         checkpoint and train on with a lower learning rate or gradient clipping"
    )]
    Diverged {
        /// The level, 0 = bottom.
        level: usize,
    },

    /// An error of candle's, e.g. out of memory on a device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// [`Error::Config`] of a dotted key and what is wrong with its value.
    pub fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
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
}

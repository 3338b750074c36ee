//! What can go wrong with a compressed file.

/// What can go wrong; every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompressError {
    /// It is another kind of file.
    #[error("it is not a file that `vq compress` wrote")]
    OtherFormat,

    /// The file is of a newer version.
    #[error(
        "its format version {found} is newer than this program's {supported}: update the program"
    )]
    Version {
        /// The version that it states.
        found: u32,
        /// The newest that this program reads.
        supported: u32,
    },

    /// The file is cut short or altered.
    #[error("it is damaged ({what}): copy it again, or compress the images again")]
    Damaged {
        /// Where, and what is wrong there.
        what: String,
    },

    /// The model or a prior is not the one that the file was made with.
    #[error(
        "it was compressed with another {what} ({made_by}) than this one ({hash}): give that one ({flag})"
    )]
    Other {
        /// The model, or which prior.
        what: &'static str,
        /// Beginning of the hash of the one that made it.
        made_by: String,
        /// Beginning of the hash of the one at hand.
        hash: String,
        /// The flag that names it.
        flag: &'static str,
    },

    /// The bytes are those that were written, and this machine reads something else into them.
    #[error(
        "block {block} decodes to other images than were compressed, so this machine computes otherwise than \
         the one that did ({theirs}; here {ours}): decompress it with the same kernels (VQ_CPU, --device, \
         --precision)"
    )]
    OtherMachine {
        /// The block, from 0.
        block: usize,
        /// What the file was made with.
        theirs: String,
        /// What is computed with here.
        ours: String,
    },

    /// Images, codes or labels that do not fit the model and its priors.
    #[error("{0}")]
    Input(String),

    /// A network's output holds NaN.
    #[error("the {0} gives numbers that are not finite: take an earlier checkpoint")]
    NotFinite(&'static str),

    /// From the model or a prior.
    #[error(transparent)]
    Model(#[from] vq_model::Error),

    /// From candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// From what is written to or read from.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl CompressError {
    pub(super) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}

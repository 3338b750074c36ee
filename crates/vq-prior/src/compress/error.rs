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
         the one that did ({}): decompress it with the same program, device and kernels (--device, --strict-f32, \
         --precision, VQ_CPU)",
        difference(theirs, ours)
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

/// The parts that differ between two descriptions of what is computed with.
fn difference(theirs: &str, ours: &str) -> String {
    let parts = |text: &str, other: &str| {
        let others: Vec<&str> = other.split("; ").collect();
        let differ: Vec<&str> = text.split("; ").filter(|part| !others.contains(part)).collect();
        if differ.is_empty() { "nothing more".to_owned() } else { differ.join(", ") }
    };
    if theirs == ours {
        return format!("both are {ours}, as far as they tell");
    }
    format!("there {}, here {}", parts(theirs, ours), parts(ours, theirs))
}

impl CompressError {
    pub(super) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_named() {
        for (theirs, ours, expected) in [
            ("vq 1; cpu avx512", "vq 1; cpu portable", "there cpu avx512, here cpu portable"),
            ("vq 1; cpu avx512", "vq 2; cpu avx512", "there vq 1, here vq 2"),
            ("vq 1; cuda A; TF32", "vq 1; cuda A; strict f32", "there TF32, here strict f32"),
            ("cpu avx512", "vq 2; cpu avx512", "there nothing more, here vq 2"),
            ("vq 1; metal", "vq 1; metal", "both are vq 1; metal, as far as they tell"),
        ] {
            let (theirs, ours) = (theirs.to_owned(), ours.to_owned());
            let error = CompressError::OtherMachine { block: 0, theirs, ours }.to_string();
            assert!(error.contains(&format!("({expected})")), "{error}");
        }
    }
}

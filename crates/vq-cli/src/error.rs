//! What can go wrong, as one line that says what to do.

use std::io;
use std::path::{Path, PathBuf};

use vq_prior::compress::CompressError;

pub(crate) type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Train(#[from] vq_train::Error),

    #[error(transparent)]
    Model(#[from] vq_model::Error),

    #[error(transparent)]
    Compress(#[from] CompressError),

    #[error(transparent)]
    Data(#[from] vq_data::Error),

    #[error("{0}; check permissions and free space, or choose another --out")]
    Picture(#[from] vq_viz::Error),

    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    #[error("cannot write {}: {cause}; check permissions and free space, or choose another --out", path.display())]
    Write { path: PathBuf, cause: io::Error },

    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: io::Error },

    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),

    /// Anything else; the text is the whole message.
    #[error("{0}")]
    Other(String),
}

impl Error {
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::Other(message.into())
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |cause| Self::Write { path, cause }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |cause| Self::Read { path, cause }
    }

    /// The message as one line. candle appends a backtrace where `RUST_BACKTRACE` asks for one; what
    /// went wrong stands before it.
    pub(crate) fn one_line(&self) -> String {
        let text = self.to_string();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let message: Vec<&str> = lines.take_while(|line| !line.starts_with("0: ")).collect();
        message.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_without_a_backtrace() {
        let error = Error::other("first\n  second\n\n   0: std::backtrace\n   1: main\n");
        assert_eq!(error.one_line(), "first; second");
    }
}

use std::io;
use std::path::{Path, PathBuf};

use super::FOLDER;

/// Why the data could not be brought here. Each message is one line and carries its cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder here could not be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// `--sha256` is not a digest.
    #[error("--sha256 takes 64 hexadecimal digits, and not `{0}`")]
    Digest(String),
    /// `--url` is not an address.
    #[error("--url takes an https://, http:// or file:/// address, and not `{0}`")]
    Url(String),
    /// Another process has the partial download open.
    #[error("another download into {} is running: wait for it or stop it", .0.display())]
    Busy(PathBuf),
    /// The server refused.
    #[error("{url}: the server answered {status}; give a mirror with --url")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// No answer, and no use in asking again.
    #[error(
        "{url}: {reason}; check the connection, or give a mirror or a local archive with --url"
    )]
    Unreachable {
        /// The address.
        url: String,
        /// Why.
        reason: String,
    },
    /// The connection failed again and again.
    #[error(
        "{url}: gave up after {attempts} attempts ({reason}); the same command goes on from here, \
         or give a mirror with --url"
    )]
    GaveUp {
        /// The address.
        url: String,
        /// How often it was tried in a row without getting anywhere.
        attempts: u32,
        /// What happened last.
        reason: String,
    },
    /// The archive is not the one that was expected.
    #[error(
        "{url} has the SHA-256 {found} instead of {expected}: it is damaged or another file, and \
         was not unpacked; try again, or give a mirror with --url"
    )]
    WrongDigest {
        /// The address.
        url: String,
        /// The digest that it must have.
        expected: String,
        /// The digest that it has.
        found: String,
    },
    /// The archive cannot be read to its end.
    #[error("{} is not a whole .tar.gz archive: {source}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The archive holds something that could write elsewhere.
    #[error("{} was refused: its entry `{entry}` is {what}", path.display())]
    Unsafe {
        /// The archive.
        path: PathBuf,
        /// The entry's name.
        entry: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The archive was read, and is not CIFAR-10.
    #[error(
        "{} does not hold CIFAR-10's binary version: {FOLDER}/{file} is missing or has another size",
        path.display()
    )]
    Incomplete {
        /// The archive.
        path: PathBuf,
        /// The first file that is missing.
        file: &'static str,
    },
}

impl Error {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

//! `cargo xtask download-cifar`: the official archive of CIFAR-10's binary version, downloaded,
//! checked and unpacked, so that nothing half-done ever lies where the data belongs.

mod archive;
mod error;
mod fetch;
mod part;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::Error;

/// Where the archive is.
pub const URL: &str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
/// The SHA-256 of the archive.
pub const SHA256: &str = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd";
/// The folder in the archive, and where the data is looked for.
pub const FOLDER: &str = "cifar-10-batches-bin";
/// The files that make it whole.
pub const FILES: [&str; 6] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
];
/// The size of each file: 10,000 records of a label and 32·32·3 bytes.
pub const FILE_BYTES: u64 = 30_730_000;

/// The arguments of the task.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The folder that the data goes into, as DIR/cifar-10-batches-bin
    #[arg(long, default_value = "data", value_name = "DIR")]
    pub dir: PathBuf,
    /// The archive: the address of a mirror, or `file://` and the path of one that is already here
    #[arg(long, default_value = URL, value_name = "URL")]
    pub url: String,
    /// The SHA-256 that the archive must have
    #[arg(long, default_value = SHA256, value_name = "HEX")]
    pub sha256: String,
    /// Download again even if the data is there
    #[arg(long)]
    pub force: bool,
    /// The size that each data file must have; tests use small ones.
    #[arg(skip = FILE_BYTES)]
    pub file_bytes: u64,
    /// How long to wait before the second attempt; doubled for each further one.
    #[arg(skip = Duration::from_secs(1))]
    pub retry_pause: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("data"),
            url: URL.to_owned(),
            sha256: SHA256.to_owned(),
            force: false,
            file_bytes: FILE_BYTES,
            retry_pause: Duration::from_secs(1),
        }
    }
}

/// What the task did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing: the data was in this folder.
    AlreadyThere(PathBuf),
    /// The data is now in this folder.
    Installed(PathBuf),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyThere(path) => {
                write!(f, "CIFAR-10 is already in {}: nothing to do", path.display())
            }
            Self::Installed(path) => write!(f, "CIFAR-10 is in {}", path.display()),
        }
    }
}

/// Runs the task.
pub fn run(options: &Options) -> Result<Outcome, Error> {
    let target = options.dir.join(FOLDER);
    let is_there = || !options.force && missing(&target, options.file_bytes).is_none();
    if is_there() {
        return Ok(Outcome::AlreadyThere(target));
    }
    let expected = options.sha256.to_ascii_lowercase();
    if expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::Digest(options.sha256.clone()));
    }
    let local = fetch::local_path(&options.url)?;
    fs::create_dir_all(&options.dir).map_err(Error::io("create", &options.dir))?;
    // Holding it also keeps a second run out of this folder.
    let mut part = part::Part::open(&options.dir)?;
    if is_there() {
        return Ok(Outcome::AlreadyThere(target));
    }
    archive::remove_leftovers(&options.dir)?;

    if let Some(path) = local {
        let mut file = fs::File::open(&path).map_err(Error::io("read", &path))?;
        let found = archive::sha256(&mut file, &path)?;
        if found != expected {
            return Err(Error::WrongDigest { url: options.url.clone(), expected, found });
        }
        archive::install(&mut file, &path, options)?;
        part.remove_if_empty()?;
    } else {
        fetch::fetch(&mut part, options, &expected)?;
        let path = part.path().to_path_buf();
        if let Err(error) = archive::install(part.file(), &path, options) {
            // The digest was right, so this archive would never unpack.
            if matches!(
                error,
                Error::Archive { .. } | Error::Unsafe { .. } | Error::Incomplete { .. }
            ) {
                part.remove()?;
            }
            return Err(error);
        }
        part.remove()?;
    }
    Ok(Outcome::Installed(target))
}

/// The first of the data files that is not in a folder, or not whole.
fn missing(folder: &Path, file_bytes: u64) -> Option<&'static str> {
    let whole = |file: &&str| {
        fs::metadata(folder.join(file)).is_ok_and(|m| m.is_file() && m.len() == file_bytes)
    };
    FILES.into_iter().find(|file| !whole(file))
}

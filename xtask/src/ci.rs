//! `cargo xtask ci`: what CI runs.

use std::process::Command;

/// Why CI did not pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The script could not be started.
    #[error("cannot run .ci/run with bash: {0}")]
    Start(#[from] std::io::Error),
    /// A step failed.
    #[error(".ci/run failed; the failing step is above")]
    Failed,
}

/// Runs `.ci/run` of this repository.
pub fn run() -> Result<String, Error> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let status = Command::new("bash").arg(".ci/run").current_dir(root).status()?;
    if status.success() { Ok("CI passed".to_owned()) } else { Err(Error::Failed) }
}

//! A virtual environment with PyTorch.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, SCRIPT, succeed};

/// The Python of a virtual environment with PyTorch, made where it is missing. One that was left half made, as
/// by a download that failed, is completed.
pub(super) fn prepare(venv: &Path) -> Result<PathBuf, Error> {
    let python = venv.join("bin").join("python");
    if version(&python).is_err() {
        succeed("python3 -m venv", Command::new("python3").args(["-m", "venv"]).arg(venv))?;
        let mut install = Command::new(&python);
        install.args(["-m", "pip", "install", "--quiet", "torch", "numpy"]);
        succeed("pip install torch", &mut install)?;
    }
    Ok(python)
}

/// Which PyTorch it has.
pub(super) fn version(python: &Path) -> Result<String, Error> {
    let problem =
        |problem: String| Error::Command { command: python.display().to_string(), problem };
    let output = Command::new(python).args([SCRIPT, "version"]).output();
    let output = output.map_err(|error| problem(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || text.is_empty() {
        return Err(problem(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Python that is there is not enough.
    #[test]
    #[cfg(unix)]
    fn an_environment_without_pytorch_is_not_ready() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let python = folder.path().join("python");
        let make = |script: &str| {
            std::fs::write(&python, script).unwrap();
            std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        assert!(version(&python).is_err());
        make("#!/bin/sh\necho no module >&2\nexit 1\n");
        let error = version(&python).unwrap_err().to_string();
        assert!(error.contains("no module"), "{error}");
        make("#!/bin/sh\necho 2.9.1\n");
        assert_eq!(version(&python).unwrap(), "2.9.1");
    }
}

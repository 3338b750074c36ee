//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes beside `path`, syncs, renames. On an error nothing is left.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        Error::write(path)(error)
    })
}

/// Makes a folder that results go to.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::write(path))
}

/// Makes the folder that a file goes into.
pub(crate) fn make_folder_of(file: &Path) -> Result<()> {
    file.parent().map_or(Ok(()), make_folder)
}

/// A file that is written bit by bit, and appears under its name only when it is whole.
#[derive(Debug)]
pub(crate) struct Atomic {
    file: Option<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Atomic {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let temporary = temporary(path);
        let file = File::create(&temporary).map_err(Error::write(path))?;
        Ok(Self { file: Some(BufWriter::new(file)), temporary, path: path.to_owned() })
    }

    /// Syncs and renames.
    pub(crate) fn finish(mut self) -> Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        let finish = || {
            file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(&self.temporary, &self.path)
        };
        finish().map_err(|error| {
            let _ = fs::remove_file(&self.temporary);
            Error::write(&self.path)(error)
        })
    }
}

impl Write for Atomic {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.as_mut().map_or(Ok(bytes.len()), |file| file.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Atomic {
    /// What was not finished is not left behind.
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

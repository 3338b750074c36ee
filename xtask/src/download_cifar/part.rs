//! The partial download and what is known about it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::Error;

/// `.cifar-10-binary.tar.gz.part` in the data folder, locked while it is open, and beside it the
/// address that it comes from and the version that the server gave it.
pub(super) struct Part {
    file: File,
    path: PathBuf,
    origin: PathBuf,
}

impl Part {
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(".cifar-10-binary.tar.gz.part");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy(dir.into())),
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
        }
        let origin = dir.join(".cifar-10-binary.tar.gz.origin");
        Ok(Self { file, path, origin })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// The bytes so far; leaves the file positioned at its end.
    pub(super) fn len(&mut self) -> Result<u64, Error> {
        self.file.seek(SeekFrom::End(0)).map_err(Error::io("read", &self.path))
    }

    /// Starts over.
    pub(super) fn clear(&mut self) -> Result<(), Error> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))?;
        self.file.rewind().map_err(Error::io("write", &self.path))
    }

    /// The server's name for the version of which these bytes are a part; `None` where the bytes
    /// come from another address, or from who knows where.
    pub(super) fn version(&self, url: &str) -> Option<String> {
        let text = fs::read_to_string(&self.origin).ok()?;
        let (from, version) = text.split_once('\n')?;
        (from == url).then(|| version.trim_end().to_owned())
    }

    /// Notes where the bytes to come are from. `version` may be empty.
    pub(super) fn set_version(&self, url: &str, version: &str) -> Result<(), Error> {
        fs::write(&self.origin, format!("{url}\n{version}\n"))
            .map_err(Error::io("write", &self.origin))
    }

    pub(super) fn remove(&mut self) -> Result<(), Error> {
        remove(&self.path)?;
        remove(&self.origin)
    }

    /// Leaves a partial download for another time.
    pub(super) fn remove_if_empty(&mut self) -> Result<(), Error> {
        if self.len()? == 0 { self.remove() } else { Ok(()) }
    }
}

impl Drop for Part {
    /// A run that failed before the first byte leaves nothing behind.
    fn drop(&mut self) {
        let _ = self.remove_if_empty();
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

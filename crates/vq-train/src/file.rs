//! Files that are there whole or not at all, whenever the program dies.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes a file under a temporary name, syncs it and renames it. On an error nothing is left.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_name(path);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        Error::write(path)(source)
    })?;
    sync_parent(path);
    Ok(())
}

/// Makes `link` point at `target` (relative to the link's folder), replacing what it pointed at.
pub(crate) fn replace_link(link: &Path, target: &Path) -> Result<()> {
    let temporary = temporary_name(link);
    let _ = fs::remove_file(&temporary);
    let replace = || {
        #[cfg(unix)]
        std::os::unix::fs::symlink(target, &temporary)?;
        // Links need privileges elsewhere: a file that holds the path does as well.
        #[cfg(not(unix))]
        fs::write(&temporary, target.to_string_lossy().as_bytes())?;
        fs::rename(&temporary, link)
    };
    replace().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        Error::write(link)(source)
    })?;
    sync_parent(link);
    Ok(())
}

/// Where a link made by [`replace_link`] points, whether that is there or not.
pub(crate) fn read_link(link: &Path) -> Option<PathBuf> {
    let target = match fs::read_link(link) {
        Ok(target) => target,
        Err(_) if link.is_file() => PathBuf::from(fs::read_to_string(link).ok()?.trim()),
        Err(_) => return None,
    };
    Some(link.parent().unwrap_or(Path::new("")).join(target))
}

/// Syncs every file of a folder and the folder itself.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
        let path = entry.map_err(Error::read(folder))?.path();
        if path.is_file() {
            File::open(&path).and_then(|file| file.sync_all()).map_err(Error::write(&path))?;
        }
    }
    sync(folder);
    Ok(())
}

/// Makes a rename in the parent folder last. Not every file system can: the data are safe either
/// way, at worst the older name survives a power cut.
pub(crate) fn sync_parent(path: &Path) {
    match path.parent() {
        Some(parent) if parent != Path::new("") => sync(parent),
        _ => sync(Path::new(".")),
    }
}

fn sync(folder: &Path) {
    if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
        tracing::debug!("cannot sync {}: {error}", folder.display());
    }
}

fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".tmp-{name}"))
}

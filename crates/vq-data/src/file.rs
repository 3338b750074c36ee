//! Files that are there whole or not at all, whenever the program dies.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::Error;

/// Writes beside `path`, syncs and renames. On an error nothing is left.
pub(crate) fn write_atomic(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".tmp-{name}"));
    let write = || {
        let mut file = BufWriter::new(File::create(&temporary)?);
        content(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(&temporary, path)?;
        // The new name is on disk only once its folder is. Not every system can sync a folder.
        if let Some(folder) = path.parent().filter(|_| cfg!(unix)) {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        Error::Write { path: path.to_path_buf(), source }
    })
}

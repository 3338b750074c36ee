//! One file of codes: a head, the records, a checksum.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use crate::Error;

/// Marks the file and the version of its layout.
const MAGIC: &[u8; 8] = b"VQCODES1";
/// The marks, the number of images and the bytes of a record, as u32.
pub(super) const HEAD: usize = 8 + 4 + 4;
/// Head and checksum (CRC-32 of all before it).
pub(super) const OVERHEAD: usize = HEAD + 4;

/// Writes a shard, atomically.
pub(super) fn write(
    path: &Path,
    images: usize,
    record: usize,
    records: &[u8],
) -> Result<(), Error> {
    let mut bytes = Vec::with_capacity(records.len() + OVERHEAD);
    bytes.extend_from_slice(&head(images, record));
    bytes.extend_from_slice(records);
    let checksum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    write_atomic(path, &bytes)
}

/// Opens a shard that must hold so many images, and reads it once to check it.
pub(super) fn open(path: &Path, images: usize, record: usize) -> Result<File, Error> {
    let advice = "run the same `vq encode --dataset` again, which makes what is missing or damaged";
    let damaged = |problem: &str| Error::codes(path, format!("{problem}: {advice}"));
    let mut file = File::open(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => damaged("is missing"),
        _ => Error::io(path)(source),
    })?;
    let expected = (images * record + OVERHEAD) as u64;
    let found = file.metadata().map_err(Error::io(path))?.len();
    if found != expected {
        let what = if found < expected { "it is truncated" } else { "it is another file" };
        return Err(damaged(&format!("has {found} bytes and must have {expected}, so {what}")));
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut start = [0; HEAD];
    file.read_exact(&mut start).map_err(Error::io(path))?;
    if start != head(images, record) {
        return Err(damaged("does not begin like a shard of these codes"));
    }
    hasher.update(&start);
    let mut left = images * record;
    let mut buffer = vec![0; (1 << 16).min(left.max(1))];
    while left > 0 {
        let part = buffer.get_mut(..left.min(1 << 16)).unwrap_or_default();
        file.read_exact(part).map_err(Error::io(path))?;
        hasher.update(part);
        left -= part.len();
    }
    let mut checksum = [0; 4];
    file.read_exact(&mut checksum).map_err(Error::io(path))?;
    if u32::from_le_bytes(checksum) != hasher.finalize() {
        return Err(damaged("does not match its checksum, so it is damaged"));
    }
    Ok(file)
}

fn head(images: usize, record: usize) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&(images as u32).to_le_bytes());
    head[12..].copy_from_slice(&(record as u32).to_le_bytes());
    head
}

/// Writes beside `path`, syncs and renames. On an error nothing is left.
pub(super) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".tmp-{name}"));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
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

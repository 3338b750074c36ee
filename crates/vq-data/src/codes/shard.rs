//! One file of codes: a head, the records, a checksum.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::Error;
use crate::file::write_atomic;

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
    let head = head(images, record);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(records);
    write_atomic(path, |file| {
        file.write_all(&head)?;
        file.write_all(records)?;
        file.write_all(&hasher.finalize().to_le_bytes())
    })
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

/// Fills `out` from byte `first` of a file on, wherever other threads read it.
#[cfg(unix)]
pub(super) fn read_at(file: &File, out: &mut [u8], first: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, first)
}

/// Fills `out` from byte `first` of a file on, wherever other threads read it.
#[cfg(windows)]
pub(super) fn read_at(file: &File, mut out: &mut [u8], mut first: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, first) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                out = out.split_at_mut(count.min(out.len())).1;
                first += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Other systems have no positioned reads in the standard library.
#[cfg(not(any(unix, windows)))]
pub(super) fn read_at(_: &File, _: &mut [u8], _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

fn head(images: usize, record: usize) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&(images as u32).to_le_bytes());
    head[12..].copy_from_slice(&(record as u32).to_le_bytes());
    head
}

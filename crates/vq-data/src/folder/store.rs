//! The index on disk: what was found out about a folder, so that it is found out once.
//!
//! `folder-HASH.index` holds the verdicts of the header pass: a mark with the format's version, the
//! folder's real path, every file in order with its version and its verdict, and a CRC-32 of it all.
//! `folder-HASH.broken` holds what only decoding told, one JSON object per line. HASH is that of the path.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::fnv1a;
use super::index::{Entry, Verdict, Version};
use super::names::{Names, order, to_bytes};
use crate::Error;
use crate::file::write_atomic;

/// Marks the file and the version of its layout. Another version is made anew.
const MAGIC: &[u8; 8] = b"VQINDEX1";

/// Where the index of one folder is kept.
#[derive(Clone, Debug)]
pub(super) struct Store {
    cache: PathBuf,
    /// The folder's real path.
    folder: Vec<u8>,
}

/// A file that turned out to be broken when it was decoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Late {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) modified: i64,
    pub(super) reason: String,
}

impl Store {
    pub(super) fn new(cache: &Path, folder: &Path) -> Result<Self, Error> {
        let folder = fs::canonicalize(folder).map_err(Error::io(folder))?;
        Ok(Self { cache: cache.into(), folder: to_bytes(folder.as_os_str()).into_owned() })
    }

    /// The stored index; none if there is none that is whole and of this folder.
    pub(super) fn open(&self) -> Option<Stored> {
        let path = self.path("index");
        check(&path).ok()?;
        Stored::open(&path, &self.folder).ok()?
    }

    /// Replaces the stored index. What has no version is left out, to be looked at again.
    pub(super) fn save(&self, names: &Names, entries: &[Entry]) -> Result<(), Error> {
        fs::create_dir_all(&self.cache).map_err(Error::write(&self.cache))?;
        write_atomic(&self.path("index"), |file| {
            let mut out = Checked { file, hasher: crc32fast::Hasher::new() };
            out.write_all(MAGIC)?;
            out.text(&self.folder)?;
            let kept = entries.iter().filter(|entry| entry.version.is_some()).count() as u64;
            out.write_all(&kept.to_le_bytes())?;
            for (index, entry) in entries.iter().enumerate() {
                let Some(version) = entry.version else { continue };
                out.text(names.get(index))?;
                out.write_all(&version.size.to_le_bytes())?;
                out.write_all(&version.modified.to_le_bytes())?;
                match &entry.verdict {
                    Verdict::Image => out.write_all(&[1])?,
                    Verdict::Other => out.write_all(&[2])?,
                    Verdict::Broken(reason) => {
                        out.write_all(&[3])?;
                        out.text(reason.as_bytes())?;
                    }
                }
            }
            let Checked { file, hasher } = out;
            file.write_all(&hasher.finalize().to_le_bytes())
        })
    }

    /// What decoding told in this run and those before it; damaged lines are left out.
    pub(super) fn late(&self) -> Vec<Late> {
        let text = fs::read(self.path("broken")).unwrap_or_default();
        let lines = text.split(|&byte| byte == b'\n');
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    /// Adds a line, in one write.
    pub(super) fn add_late(&self, late: &Late) -> io::Result<()> {
        fs::create_dir_all(&self.cache)?;
        let mut line = serde_json::to_vec(late)?;
        line.push(b'\n');
        let mut options = OpenOptions::new();
        options.create(true).append(true).open(self.path("broken"))?.write_all(&line)
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.cache.join(format!("folder-{:016x}.{extension}", fnv1a(&self.folder)))
    }
}

/// The whole file against its checksum, before anything of it is believed.
fn check(path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut left = file.metadata()?.len().checked_sub(4).ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let part = buffer.get_mut(..left.min(1 << 16) as usize).unwrap_or_default();
        file.read_exact(part)?;
        hasher.update(part);
        left -= part.len() as u64;
    }
    let mut checksum = [0; 4];
    file.read_exact(&mut checksum)?;
    if u32::from_le_bytes(checksum) == hasher.finalize() {
        return Ok(());
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// A stored index, read file by file.
pub(super) struct Stored {
    file: BufReader<File>,
    left: u64,
}

impl Stored {
    fn open(path: &Path, folder: &[u8]) -> io::Result<Option<Self>> {
        let mut stored = Self { file: BufReader::new(File::open(path)?), left: 0 };
        if stored.bytes::<8>()? != *MAGIC || stored.text()? != folder {
            return Ok(None);
        }
        stored.left = u64::from_le_bytes(stored.bytes()?);
        Ok(Some(stored))
    }

    /// Fills in what is known of the files `names`; whether something is known of one that is not among
    /// them.
    pub(super) fn recall(mut self, names: &Names, entries: &mut [Entry]) -> bool {
        let (mut index, mut has_vanished) = (0, false);
        while self.left > 0 {
            self.left -= 1;
            // It was whole a moment ago; what is missing now is looked at again.
            let Ok((name, entry)) = self.next() else { return true };
            while index < names.len() && order(names.get(index), &name).is_lt() {
                index += 1;
            }
            match entries.get_mut(index) {
                Some(place) if names.get(index) == name => *place = entry,
                _ => has_vanished = true,
            }
        }
        has_vanished
    }

    fn next(&mut self) -> io::Result<(Vec<u8>, Entry)> {
        let name = self.text()?;
        let size = u64::from_le_bytes(self.bytes()?);
        let modified = i64::from_le_bytes(self.bytes()?);
        let verdict = match self.bytes::<1>()? {
            [1] => Verdict::Image,
            [2] => Verdict::Other,
            [3] => Verdict::Broken(String::from_utf8_lossy(&self.text()?).into()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok((name, Entry { version: Some(Version { size, modified }), verdict }))
    }

    fn text(&mut self) -> io::Result<Vec<u8>> {
        let length = u64::from(u32::from_le_bytes(self.bytes()?));
        let mut text = Vec::new();
        self.file.by_ref().take(length).read_to_end(&mut text)?;
        Ok(text)
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Passes on what is written, and sums it up.
struct Checked<W> {
    file: W,
    hasher: crc32fast::Hasher,
}

impl<W: Write> Checked<W> {
    /// Its length and then itself.
    fn text(&mut self, text: &[u8]) -> io::Result<()> {
        self.write_all(&(text.len() as u32).to_le_bytes())?;
        self.write_all(text)
    }
}

impl<W: Write> Write for Checked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

//! The archive: its digest, and unpacking it so that it cannot write anywhere else.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};

use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};
use tar::EntryType;

use super::{Error, FOLDER, Options, missing};

/// The SHA-256 of a file in hexadecimal.
pub(super) fn sha256(file: &mut File, path: &Path) -> Result<String, Error> {
    file.rewind().map_err(Error::io("read", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(Error::io("read", path))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hexadecimal(&hasher.finalize()))
}

/// Two digits a byte, in lower case.
fn hexadecimal(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(u32::from(digit), 16)).collect()
}

/// Unpacks into a temporary folder beside the target, checks what came out, and moves it into place
/// as a whole.
pub(super) fn install(file: &mut File, path: &Path, options: &Options) -> Result<(), Error> {
    file.rewind().map_err(Error::io("read", path))?;
    let dir = &options.dir;
    let staging = tempfile::Builder::new()
        .prefix(STAGING)
        .tempdir_in(dir)
        .map_err(Error::io("write into", dir))?;
    unpack(file, path, staging.path())?;
    let unpacked = staging.path().join(FOLDER);
    if let Some(file) = missing(&unpacked, options.file_bytes) {
        return Err(Error::Incomplete { path: path.into(), file });
    }
    let target = dir.join(FOLDER);
    let old = staging.path().join("old");
    let had_old = match fs::rename(&target, &old) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io("replace", &target)(error)),
    };
    if let Err(error) = fs::rename(&unpacked, &target) {
        if had_old {
            let _ = fs::rename(&old, &target);
        }
        return Err(Error::io("create", &target)(error));
    }
    // Makes the rename last through a power cut, where the system can.
    let _ = File::open(dir).and_then(|dir| dir.sync_all());
    Ok(())
}

/// Removes what a run that was killed while unpacking has left.
pub(super) fn remove_leftovers(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(STAGING) {
            fs::remove_dir_all(entry.path()).map_err(Error::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

const STAGING: &str = ".cifar-10-unpacking-";

/// More than ten times what CIFAR-10 takes: an archive that unpacks to more is something else.
const MOST_BYTES: u64 = 2 << 30;

fn unpack(file: &mut File, path: &Path, into: &Path) -> Result<(), Error> {
    let broken = |source| Error::Archive { path: path.into(), source };
    let mut archive = tar::Archive::new(BufReader::new(GzDecoder::new(BufReader::new(file))));
    let mut budget = MOST_BYTES;
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let refuse = |what| Error::Unsafe { path: path.into(), entry: name.clone(), what };
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            continue;
        }
        let relative = entry.path().map_err(broken)?.into_owned();
        let destination = inside(into, &relative)
            .ok_or_else(|| refuse("a path that leads out of the folder it is unpacked into"))?;
        match kind {
            EntryType::Directory => {
                fs::create_dir_all(&destination).map_err(Error::io("create", &destination))?;
            }
            EntryType::Regular => {
                if entry.size() > budget {
                    return Err(refuse("larger than all of CIFAR-10"));
                }
                budget -= entry.size();
                write_file(&mut entry, &destination, broken)?;
            }
            EntryType::Symlink | EntryType::Link => return Err(refuse("a link")),
            _ => return Err(refuse("neither a file nor a folder")),
        }
    }
    Ok(())
}

/// `folder/relative`, if that is below the folder by its name alone.
fn inside(folder: &Path, relative: &Path) -> Option<PathBuf> {
    let mut path = folder.to_path_buf();
    for component in relative.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// Tells a damaged archive from a disk that takes no more.
fn write_file(
    from: &mut impl Read,
    path: &Path,
    broken: impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    let mut to = File::create_new(path).map_err(Error::io("create", path))?;
    let mut buffer = vec![0; 1 << 17];
    loop {
        match from.read(&mut buffer).map_err(&broken)? {
            0 => break,
            n => to.write_all(&buffer[..n]).map_err(Error::io("write", path))?,
        }
    }
    to.sync_all().map_err(Error::io("write", path))
}

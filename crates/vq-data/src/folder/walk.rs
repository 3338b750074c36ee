//! Which files lie below a folder, and which of its sub-folders are splits.

use std::fs;
use std::path::{Path, PathBuf};

use super::names::{Names, to_bytes, to_path};
use crate::Error;

/// What lies below a folder.
pub(super) struct Found {
    /// All files, whatever they hold, in [their order](super::names::order).
    pub(super) names: Names,
    /// The name of the sub-folder that holds the test split, where two hold the splits; the other one is
    /// `train`, in some spelling, and there are no files but theirs.
    pub(super) test: Option<String>,
}

/// Every file below `root`, links followed. Hidden files and folders are left out, and so are other folders
/// than `train` and `test` (or `val`, `valid`, `validation`) where both are there.
pub(super) fn walk(root: &Path, notes: &mut Vec<String>) -> Result<Found, Error> {
    match fs::metadata(root) {
        Ok(metadata) if metadata.is_dir() => {}
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io(root)(error));
        }
        _ => return Err(Error::NotAFolder(root.into())),
    }
    let listing = Listing::of(root)?;
    let splits = splits(root, &listing, notes);
    let mut walk = Walk { names: Names::default(), above: vec![real(root)?] };
    for (name, is_folder) in listing.iter() {
        let text = String::from_utf8_lossy(name);
        if splits.as_ref().is_none_or(|splits| is_folder && splits.iter().any(|s| *s == text)) {
            walk.visit(&root.join(to_path(name)), &mut name.to_vec(), is_folder)?;
        }
    }
    walk.names.shrink();
    Ok(Found { names: walk.names, test: splits.map(|[_, test]| test) })
}

const TEST_NAMES: [&str; 4] = ["test", "val", "valid", "validation"];

/// The names of the sub-folders that hold the splits train and test, if there are two.
fn splits(root: &Path, listing: &Listing, notes: &mut Vec<String>) -> Option<[String; 2]> {
    let folders: Vec<String> = listing
        .iter()
        .filter(|(_, is_folder)| *is_folder)
        .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
        .collect();
    let named = |wanted: &str| folders.iter().find(|f| f.eq_ignore_ascii_case(wanted)).cloned();
    let (train, test) = (named("train")?, TEST_NAMES.into_iter().find_map(named)?);
    let ignored: Vec<&str> =
        folders.iter().filter(|f| **f != train && **f != test).map(String::as_str).collect();
    if !ignored.is_empty() {
        notes.push(format!(
            "{}: the splits are {train} and {test}; left out: {}.",
            root.display(),
            ignored.join(", ")
        ));
    }
    Some([train, test])
}

struct Walk {
    names: Names,
    /// The real paths of the folders around the current one, so that a link to one of them is not
    /// followed round and round.
    above: Vec<PathBuf>,
}

impl Walk {
    /// Collects what is at `path`; `name` is the part of it below the root.
    fn visit(&mut self, path: &Path, name: &mut Vec<u8>, is_folder: bool) -> Result<(), Error> {
        if !is_folder {
            self.names.push(name);
            return Ok(());
        }
        let real = real(path)?;
        if self.above.contains(&real) {
            return Ok(());
        }
        self.above.push(real);
        let length = name.len();
        for (part, is_folder) in Listing::of(path)?.iter() {
            name.push(b'/');
            name.extend_from_slice(part);
            self.visit(&path.join(to_path(part)), name, is_folder)?;
            name.truncate(length);
        }
        self.above.pop();
        Ok(())
    }
}

fn real(folder: &Path) -> Result<PathBuf, Error> {
    fs::canonicalize(folder).map_err(Error::io(folder))
}

/// The names in one folder, sorted, without hidden ones and the Mac's archive leftovers.
struct Listing {
    names: Names,
    /// Which name, and whether it is a folder.
    entries: Vec<(u32, bool)>,
}

impl Listing {
    fn of(folder: &Path) -> Result<Self, Error> {
        let (mut names, mut entries) = (Names::default(), Vec::new());
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            let name = entry.file_name();
            let name = to_bytes(&name);
            if name.starts_with(b".") || *name == *b"__MACOSX" {
                continue;
            }
            // Most systems say it with the name; what a link leads to must be asked for.
            let is_folder = match entry.file_type() {
                Ok(kind) if kind.is_dir() => true,
                Ok(kind) if kind.is_file() => false,
                _ => entry.path().is_dir(),
            };
            entries.push((names.len() as u32, is_folder));
            names.push(&name);
        }
        entries.sort_unstable_by_key(|(index, _)| names.get(*index as usize));
        Ok(Self { names, entries })
    }

    fn iter(&self) -> impl Iterator<Item = (&[u8], bool)> {
        self.entries.iter().map(|&(index, is_folder)| (self.names.get(index as usize), is_folder))
    }
}

//! Which files of a folder are images, and of which class and split.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, picture};

/// A file that is, or by its name should be, an image.
pub(super) struct Image {
    pub(super) path: PathBuf,
    /// Below the root, its parts joined with `/`.
    pub(super) relative: String,
    pub(super) label: u32,
    pub(super) in_test: bool,
}

pub(super) struct Found {
    /// In the order of their paths.
    pub(super) images: Vec<Image>,
    /// Whether the folder itself has a test split.
    pub(super) has_test: bool,
    pub(super) class_names: Vec<String>,
}

/// Every image below `root`, links followed. Hidden files and folders are left out.
///
/// Two sub-folders `train` and `test` (or `val`, `valid`, `validation`) are the splits. Below a
/// split, or below the root where there are none, the first sub-folder is the class; where an image
/// lies in no sub-folder there are no classes.
pub(super) fn scan(root: &Path, notes: &mut Vec<String>) -> Result<Found, Error> {
    match fs::metadata(root) {
        Ok(metadata) if metadata.is_dir() => {}
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io(root)(error));
        }
        _ => return Err(Error::NotAFolder(root.into())),
    }
    let mut files = Vec::new();
    if let Some((train, test)) = split_folders(root, notes)? {
        walk(&root.join(&train), &mut vec![train], &mut Vec::new(), &mut files)?;
        let first_of_test = files.len();
        walk(&root.join(&test), &mut vec![test], &mut Vec::new(), &mut files)?;
        Ok(classify(files, Some(first_of_test)))
    } else {
        walk(root, &mut Vec::new(), &mut Vec::new(), &mut files)?;
        Ok(classify(files, None))
    }
}

const TEST_NAMES: [&str; 4] = ["test", "val", "valid", "validation"];

/// Formats whose files are images even where their content is not (a broken download, say).
const EXTENSIONS: [&str; 17] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "heic", "heif", "jxl", "tga", "ppm",
];

/// A file and the names of the folders it lies in, below the root.
type Entry = (PathBuf, Vec<String>);

/// The names of the sub-folders that hold the splits, if there are two.
fn split_folders(root: &Path, notes: &mut Vec<String>) -> Result<Option<(String, String)>, Error> {
    let mut folders = Vec::new();
    for (name, path) in list(root)? {
        if path.is_dir() {
            folders.push(name);
        }
    }
    let named = |wanted: &str| folders.iter().find(|f| f.eq_ignore_ascii_case(wanted)).cloned();
    let tests: Vec<String> = TEST_NAMES.into_iter().filter_map(named).collect();
    let (Some(train), Some(test)) = (named("train"), tests.first().cloned()) else {
        return Ok(None);
    };
    let ignored: Vec<&str> =
        folders.iter().filter(|f| **f != train && **f != test).map(String::as_str).collect();
    if !ignored.is_empty() {
        notes.push(format!(
            "{}: the splits are {train} and {test}; left out: {}.",
            root.display(),
            ignored.join(", ")
        ));
    }
    Ok(Some((train, test)))
}

/// The names and paths in a folder, sorted, without hidden ones and the Mac's archive leftovers.
fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && name != "__MACOSX" {
            entries.push((name, entry.path()));
        }
    }
    entries.sort();
    Ok(entries)
}

/// Collects the images of `folder`. `above` holds the real paths of the folders around it, so that
/// a link to one of them is not followed round and round.
fn walk(
    folder: &Path,
    names: &mut Vec<String>,
    above: &mut Vec<PathBuf>,
    files: &mut Vec<Entry>,
) -> Result<(), Error> {
    let real = fs::canonicalize(folder).map_err(Error::io(folder))?;
    if above.contains(&real) {
        return Ok(());
    }
    above.push(real);
    for (name, path) in list(folder)? {
        if path.is_dir() {
            names.push(name);
            walk(&path, names, above, files)?;
            names.pop();
        } else if is_meant_as_image(&path) {
            files.push((path, names.clone()));
        }
    }
    above.pop();
    Ok(())
}

/// By its name, or else by its content. A link to nowhere counts by its name.
fn is_meant_as_image(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
        || (path.is_file() && picture::is_image(path).unwrap_or(false))
}

/// `first_of_test`: from which file on they are in the test split, if the folder has one; then the
/// first name of each is that of its split.
fn classify(files: Vec<Entry>, first_of_test: Option<usize>) -> Found {
    let has_test = first_of_test.is_some();
    let skip = usize::from(has_test);
    let class_of = |(_, names): &Entry| names.get(skip).cloned();
    let classes: Option<BTreeSet<String>> = files.iter().map(class_of).collect();
    let class_names: Vec<String> = classes.unwrap_or_default().into_iter().collect();
    let images = files.into_iter().enumerate().map(|(i, file)| {
        let class = class_of(&file).and_then(|class| class_names.binary_search(&class).ok());
        let (path, mut names) = file;
        names.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
        Image {
            path,
            relative: names.join("/"),
            label: class.unwrap_or(0) as u32,
            in_test: first_of_test.is_some_and(|first| i >= first),
        }
    });
    Found { images: images.collect(), has_test, class_names }
}

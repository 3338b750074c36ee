//! What is known of every file of a folder.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;

use super::names::Names;
use super::store::Stored;
use crate::{Error, Indexing, picture};

/// What is known of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// None if it has to be looked at (again).
    pub(super) version: Option<Version>,
    pub(super) verdict: Verdict,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// In bytes.
    pub(super) size: u64,
    /// When it was last written, in nanoseconds since 1970.
    pub(super) modified: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not meant as an image.
    #[default]
    Other,
    /// An image, as far as its header and its end tell.
    Image,
    /// Meant as an image and none, and why.
    Broken(Box<str>),
}

/// What [`look`] found.
pub(super) struct Looked {
    pub(super) entries: Vec<Entry>,
    /// Whether there is anything to remember, or to forget, that `stored` does not say already.
    pub(super) is_news: bool,
}

/// Looks at every file that is not `stored` as it is now, on all of rayon's threads.
pub(super) fn look(
    root: &Path,
    names: &Names,
    stored: Option<Stored>,
    watch: &(dyn Fn(Indexing) + Sync),
) -> Looked {
    let mut entries = vec![Entry::default(); names.len()];
    let has_vanished = stored.is_some_and(|stored| stored.recall(names, &mut entries));
    let (done, looked_at, news) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let total = names.len();
    entries.par_iter_mut().enumerate().for_each(|(index, entry)| {
        let path = names.path(root, index);
        let version = Version::of(&path);
        let is_known = version.is_some() && entry.version == version;
        if !is_known {
            *entry = examine(&path, version);
            looked_at.fetch_add(1, Ordering::Relaxed);
            news.fetch_add(usize::from(entry.version.is_some()), Ordering::Relaxed);
        }
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        watch(Indexing { done, total, looked_at: looked_at.load(Ordering::Relaxed) });
    });
    Looked { entries, is_news: has_vanished || news.into_inner() > 0 }
}

impl Version {
    /// None where there is no such file, or it does not say.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        let modified = metadata.modified().ok()?;
        let nanoseconds = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).ok()?,
            Err(before) => -i64::try_from(before.duration().as_nanos()).ok()?,
        };
        Some(Self { size: metadata.len(), modified: nanoseconds })
    }
}

/// Formats whose files are images even where their content is not (a broken download, say).
const EXTENSIONS: [&str; 17] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "heic", "heif", "jxl", "tga", "ppm",
];

/// A file is meant as an image by its name, or else by its content. A link to nowhere counts by its name.
fn examine(path: &Path, version: Option<Version>) -> Entry {
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    let is_named = extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()));
    // Opening a pipe would wait for someone to write to it.
    let is_other_kind = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    if is_other_kind || (!is_named && !picture::is_image(path).unwrap_or(false)) {
        return Entry { version, verdict: Verdict::Other };
    }
    match picture::check(path) {
        Ok(()) => Entry { version, verdict: Verdict::Image },
        Err(error @ Error::Image { .. }) => {
            Entry { version, verdict: Verdict::Broken(reason(error).into()) }
        }
        // It may be readable the next time without having changed.
        Err(error) => Entry { version: None, verdict: Verdict::Broken(reason(error).into()) },
    }
}

/// What is wrong with a file, without its name.
pub(super) fn reason(error: Error) -> String {
    match error {
        Error::Image { reason, .. } => reason,
        Error::Io { source, .. } => source.to_string(),
        error => error.to_string(),
    }
}

//! A folder of images as a data set.
//!
//! Opening walks the folder and reads the header and the end of every file that the index of an earlier
//! time does not know as it is now; pixels are decoded when they are asked for. What is kept for each file
//! is its path and a few numbers, so memory does not grow with the images.

mod images;
mod index;
mod names;
mod store;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use self::images::{Files, Images};
use self::index::{Entry, Looked, Verdict, Version};
use self::names::Names;
use self::store::Store;
use crate::random::{Purpose, Stream};
use crate::{BrokenFile, Dataset, Error, ImageShape, OnBroken, OpenOptions, Splits};

/// How far the indexing of a folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexing {
    /// Files that are done.
    pub done: usize,
    /// Files in all.
    pub total: usize,
    /// Files, of those done, that were opened and read; of the others the index knew everything.
    pub looked_at: usize,
}

/// Finds every image below `root` and splits them.
pub(crate) fn open(
    root: &Path,
    options: &OpenOptions,
    watch: &(dyn Fn(Indexing) + Sync),
) -> Result<Splits, Error> {
    let mut notes = Vec::new();
    let walk::Found { names, test } = walk::walk(root, &mut notes)?;
    let store = match &options.cache_dir {
        Some(cache) => Some(Store::new(cache, root)?),
        None => None,
    };
    let stored = store.as_ref().and_then(Store::open);
    let Looked { entries, is_news } = index::look(root, &names, stored, watch);
    if let Some(store) = store.as_ref().filter(|_| is_news)
        && let Err(error) = store.save(&names, &entries)
    {
        notes.push(format!(
            "the index of {} is not kept, so it will be made again the next time ({error}); \
             VQ_CACHE_DIR=FOLDER chooses where",
            root.display()
        ));
    }

    let is_image = |entry: &&Entry| entry.verdict != Verdict::Other;
    let total = entries.iter().filter(is_image).count();
    if total == 0 {
        return Err(Error::EmptyFolder(root.into()));
    }
    let mut broken = Vec::new();
    let mut readable = Vec::new();
    for (file, entry) in entries.iter().enumerate() {
        match &entry.verdict {
            Verdict::Other => {}
            Verdict::Image => readable.push(file as u32),
            Verdict::Broken(reason) => {
                let path = names.path(root, file);
                broken.push(BrokenFile { path, reason: reason.to_string() });
            }
        }
    }
    note_broken("skipped ", &broken, &mut notes);
    let (unreadable, late) = known_late(root, store.as_ref(), &names, &entries);
    note_broken("taking another image of the same class for ", &late, &mut notes);
    broken.extend(late);
    check_broken(root, &broken, total, readable.is_empty(), options.on_broken)?;

    let (class_names, labels) = classify(&names, &entries, usize::from(test.is_some()));
    drop(entries);
    let in_test: Vec<bool> = match &test {
        Some(test) => {
            let prefix = format!("{test}/");
            let is_below = |name: &[u8]| String::from_utf8_lossy(name).starts_with(&prefix);
            readable.iter().map(|&file| is_below(names.get(file as usize))).collect()
        }
        None => hold_out(&names, &readable, options.seed),
    };
    for (wanted, split) in [(false, "train"), (true, "test")] {
        if test.is_some() && !in_test.contains(&wanted) {
            return Err(Error::EmptyFolder(root.join(split)));
        }
    }

    let [height, width] = options.size;
    let shape = ImageShape { channels: 3, height, width };
    let is_held = readable.len().saturating_mul(shape.pixels()) <= options.memory_limit;
    // A single image can only be in both.
    let lone = readable.len() == 1;
    if lone {
        notes.push(format!("{} holds one image: it is in both splits.", root.display()));
    }
    let files = Arc::new(Files {
        root: root.to_path_buf(),
        names,
        labels,
        class_names,
        shape,
        on_broken: options.on_broken,
        unreadable: Mutex::new(unreadable),
        store,
    });
    let split = |wanted: bool| -> Arc<dyn Dataset> {
        let name = format!("{} {}", root.display(), if wanted { "test" } else { "train" });
        let members =
            readable.iter().zip(&in_test).filter(|(_, in_test)| lone || **in_test == wanted);
        let members = members.map(|(&file, _)| file).collect();
        Arc::new(Images::new(name, files.clone(), members, is_held))
    };
    Ok(Splits { train: split(false), test: split(true), notes, broken })
}

/// The files that an earlier decoding of them as they are now found to be broken.
fn known_late(
    root: &Path,
    store: Option<&Store>,
    names: &Names,
    entries: &[Entry],
) -> (BTreeSet<u32>, Vec<BrokenFile>) {
    let mut late = BTreeMap::new();
    for line in store.map(Store::late).unwrap_or_default() {
        let version = Some(Version { size: line.size, modified: line.modified });
        let known = Entry { version, verdict: Verdict::Image };
        let file = names.find(line.name.as_bytes());
        if let Some(file) = file.filter(|&file| entries.get(file) == Some(&known)) {
            let path = names.path(root, file);
            late.insert(file as u32, BrokenFile { path, reason: line.reason });
        }
    }
    (late.keys().copied().collect(), late.into_values().collect())
}

fn check_broken(
    root: &Path,
    broken: &[BrokenFile],
    total: usize,
    all: bool,
    on_broken: OnBroken,
) -> Result<(), Error> {
    let Some(BrokenFile { path, reason }) = broken.first().cloned() else { return Ok(()) };
    let folder = root.to_path_buf();
    if all {
        return Err(Error::AllBroken { folder, total, first: path, reason });
    }
    match on_broken {
        OnBroken::Skip => Ok(()),
        OnBroken::Refuse => {
            let count = broken.len();
            Err(Error::BrokenFiles { folder, count, total, first: path, reason })
        }
    }
}

/// A note for each of the first broken files, and one that counts the rest.
fn note_broken(what: &str, broken: &[BrokenFile], notes: &mut Vec<String>) {
    const NAMED: usize = 20;
    for broken in broken.iter().take(NAMED) {
        notes.push(format!("{what}{broken}"));
    }
    if broken.len() > NAMED {
        notes.push(format!("{what}{} more broken files.", broken.len() - NAMED));
    }
}

/// The names of the classes and the label of every file. Below a split (where `skip` is 1), or below the
/// root where there are none, the first sub-folder is the class; where an image lies in no sub-folder
/// there are no classes.
fn classify(names: &Names, entries: &[Entry], skip: usize) -> (Vec<String>, Vec<u32>) {
    let class = |file: usize| {
        let mut parts = names.get(file).split(|&byte| byte == b'/').skip(skip);
        // What no other part follows is the file itself.
        parts.next().filter(|_| parts.next().is_some())
    };
    let images = || (0..names.len()).zip(entries).filter(|(_, e)| e.verdict != Verdict::Other);
    let classes: Option<BTreeSet<&[u8]>> = images().map(|(file, _)| class(file)).collect();
    let text = |class: &[u8]| String::from_utf8_lossy(class).into_owned();
    let class_names: BTreeSet<String> = classes.unwrap_or_default().into_iter().map(text).collect();
    let class_names: Vec<String> = class_names.into_iter().collect();
    let mut labels = vec![0; names.len()];
    // Neighbours mostly share their class.
    let mut last = None;
    for (file, label) in labels.iter_mut().enumerate() {
        let Some(class) = class(file) else { continue };
        let found = match last {
            Some((known, found)) if known == class => found,
            _ => class_names.binary_search(&text(class)).unwrap_or(0) as u32,
        };
        last = Some((class, found));
        *label = found;
    }
    (class_names, labels)
}

/// A tenth of the images, each chosen by its own path, so that a new file moves no other from one
/// split to the other; at least one where there are two.
fn hold_out(names: &Names, images: &[u32], seed: u64) -> Vec<bool> {
    let draws: Vec<u64> = images
        .iter()
        .map(|&file| {
            let name = String::from_utf8_lossy(names.get(file as usize));
            Stream::new(seed, Purpose::HoldOut, fnv1a(name.as_bytes())).u64()
        })
        .collect();
    let mut held: Vec<bool> = draws.iter().map(|draw| draw % 10 == 0).collect();
    let all_alike = |held: &[bool]| held.iter().all(|&h| h == held[0]);
    if images.len() > 1 && all_alike(&held) {
        let least = (0..draws.len()).min_by_key(|&i| draws[i]).unwrap_or(0);
        held[least] = !held[least];
    }
    held
}

/// The 64-bit FNV-1a hash: stable, unlike the standard library's.
fn fnv1a(text: &[u8]) -> u64 {
    text.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;

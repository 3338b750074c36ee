//! The images of one split, decoded when they are read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::index::{Version, reason};
use super::names::Names;
use super::store::{Late, Store};
use crate::dataset::check_read;
use crate::{BrokenFile, Dataset, Error, ImageShape, OnBroken, picture};

/// The files of a folder, for both of its splits.
pub(super) struct Files {
    pub(super) root: PathBuf,
    pub(super) names: Names,
    /// The label of every file.
    pub(super) labels: Vec<u32>,
    pub(super) class_names: Vec<String>,
    pub(super) shape: ImageShape,
    pub(super) on_broken: OnBroken,
    /// Files that cannot be decoded, as far as anyone tried.
    pub(super) unreadable: Mutex<BTreeSet<u32>>,
    /// Where that is kept for the next time.
    pub(super) store: Option<Store>,
}

/// The images of one split.
///
/// Each keeps its place when its file turns out to be broken: the next image of its class that can be
/// decoded stands in for it (where there is none, the next of any). Which one that is depends on the files
/// alone, so it is the same in every thread, epoch and run.
pub(super) struct Images {
    name: String,
    files: Arc<Files>,
    /// Which files, in their order.
    members: Vec<u32>,
    /// The pixels of those that were read, u8 `[3,H,W]` each, where all have room.
    held: Option<Box<[Place]>>,
    /// Which image stands in for which.
    stand_ins: Mutex<BTreeMap<usize, usize>>,
    news: Mutex<Vec<BrokenFile>>,
}

/// Of one image, filled when it is first read.
type Place = OnceLock<Box<[u8]>>;

impl Images {
    pub(super) fn new(name: String, files: Arc<Files>, members: Vec<u32>, is_held: bool) -> Self {
        let held = is_held.then(|| members.iter().map(|_| OnceLock::new()).collect());
        Self { name, files, members, held, stand_ins: Mutex::default(), news: Mutex::default() }
    }

    /// u8 `[3,H,W]` of image `index` or its stand-in.
    fn pixels(&self, index: usize) -> Result<Vec<u8>, Error> {
        let mut first = None;
        for candidate in std::iter::once(index).chain(self.others(index)) {
            let Some(&file) = self.members.get(candidate) else { continue };
            if lock(&self.files.unreadable).contains(&file) {
                continue;
            }
            let path = self.files.names.path(&self.files.root, file as usize);
            let shape = self.files.shape;
            match decode(&path, [shape.height, shape.width]) {
                Ok(pixels) => {
                    if candidate != index {
                        lock(&self.stand_ins).insert(index, candidate);
                    }
                    return Ok(pixels);
                }
                Err(error) if self.files.on_broken == OnBroken::Refuse => {
                    return Err(Error::Image { path, reason: reason(error) });
                }
                Err(error) => {
                    let broken = self.note(file, path, error);
                    first.get_or_insert(broken);
                }
            }
        }
        let BrokenFile { path, reason } = first.unwrap_or_else(|| BrokenFile {
            path: self.files.root.clone(),
            reason: "all of them turned out to be broken".to_owned(),
        });
        let (folder, total) = (self.files.root.clone(), self.members.len());
        Err(Error::AllBroken { folder, total, first: path, reason })
    }

    /// Who may stand in for an image, in order: from it on round the split, its own class first.
    fn others(&self, index: usize) -> impl Iterator<Item = usize> {
        let label = self.own_label(index);
        let round = move || (index + 1..self.members.len()).chain(0..index);
        let is_alike = move |other: &usize| self.own_label(*other) == label;
        round().filter(is_alike).chain(round().filter(move |other| !is_alike(other)))
    }

    fn own_label(&self, index: usize) -> u32 {
        let file = self.members.get(index).map(|&file| file as usize);
        file.and_then(|file| self.files.labels.get(file)).copied().unwrap_or(0)
    }

    /// Keeps in mind that a file is broken, here and on disk.
    fn note(&self, file: u32, path: PathBuf, error: Error) -> BrokenFile {
        // A file that could not be read at all may be all right the next time.
        let is_lasting = matches!(error, Error::Image { .. });
        let broken = BrokenFile { path, reason: reason(error) };
        // Two threads may find it at once.
        if lock(&self.files.unreadable).insert(file) {
            lock(&self.news).push(broken.clone());
            if let (true, Some(store), Some(Version { size, modified })) =
                (is_lasting, &self.files.store, Version::of(&broken.path))
            {
                let name = self.files.names.get(file as usize);
                let name = String::from_utf8_lossy(name).into_owned();
                let late = Late { name, size, modified, reason: broken.reason.clone() };
                // At worst it is found again the next time.
                let _ = store.add_late(&late);
            }
        }
        broken
    }
}

impl Dataset for Images {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.members.len()
    }

    fn shape(&self) -> ImageShape {
        self.files.shape
    }

    fn class_names(&self) -> &[String] {
        &self.files.class_names
    }

    /// Of a stand-in, once it was read, its own.
    fn label(&self, index: usize) -> u32 {
        let stand_in = lock(&self.stand_ins).get(&index).copied();
        self.own_label(stand_in.unwrap_or(index))
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
        check_read(self, index, out)?;
        let place = self.held.as_ref().and_then(|held| held.get(index));
        if let Some(pixels) = place.and_then(OnceLock::get) {
            out.copy_from_slice(pixels);
            return Ok(());
        }
        let pixels = self.pixels(index)?;
        out.copy_from_slice(&pixels);
        if let Some(place) = place {
            // Another thread may have been faster, with the same.
            let _ = place.set(pixels.into());
        }
        Ok(())
    }

    fn is_costly(&self) -> bool {
        true
    }

    fn held_bytes(&self) -> usize {
        if self.held.is_some() { self.len() * self.shape().pixels() } else { 0 }
    }

    fn take_broken(&self) -> Vec<BrokenFile> {
        std::mem::take(&mut lock(&self.news))
    }
}

/// A file → u8 `[3,H,W]`.
fn decode(path: &Path, size: [usize; 2]) -> Result<Vec<u8>, Error> {
    Ok(picture::to_chw(&picture::fit(&picture::load(path)?, size)))
}

/// What a panic elsewhere left is whole: every change is one insertion.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

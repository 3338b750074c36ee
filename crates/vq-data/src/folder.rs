//! A folder of images as a data set.

mod scan;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::dataset::check_read;
use crate::random::{Purpose, Stream};
use crate::{
    BrokenFile, Dataset, Error, ImageShape, InMemory, OnBroken, OpenOptions, Splits, picture,
};

/// Finds every image below `root`, decodes each once (so that a broken one is found now and not in
/// the third hour), and splits them.
pub(crate) fn open(root: &Path, options: &OpenOptions) -> Result<Splits, Error> {
    let mut notes = Vec::new();
    let scan::Found { mut images, has_test, class_names } = scan::scan(root, &mut notes)?;
    if images.is_empty() {
        return Err(Error::EmptyFolder(root.into()));
    }
    let [height, width] = options.size;
    let shape = ImageShape { channels: 3, height, width };
    let in_memory = images.len().saturating_mul(shape.pixels()) <= options.memory_limit;

    let mut broken = Vec::new();
    let decoded: Vec<_> = images
        .par_iter()
        .map(|image| decode(&image.path, options.size).map(|pixels| in_memory.then_some(pixels)))
        .collect();
    let mut pixels = Vec::with_capacity(images.len());
    let mut readable = Vec::with_capacity(images.len());
    let total = images.len();
    for (image, decoded) in images.drain(..).zip(decoded) {
        match decoded {
            Ok(decoded) => {
                pixels.push(decoded);
                readable.push(image);
            }
            Err(reason) => broken.push(BrokenFile { path: image.path, reason }),
        }
    }
    check_broken(root, &broken, total, readable.is_empty(), options.on_broken)?;
    note_broken(&broken, &mut notes);

    let in_test: Vec<bool> = if has_test {
        readable.iter().map(|image| image.in_test).collect()
    } else {
        hold_out(&readable, options.seed)
    };
    for (wanted, split) in [(false, "train"), (true, "test")] {
        if has_test && !in_test.contains(&wanted) {
            return Err(Error::EmptyFolder(root.join(split)));
        }
    }
    let make = |test: bool, lone: bool, pixels: &mut Vec<Option<Vec<u8>>>| {
        let name = format!("{} {}", root.display(), if test { "test" } else { "train" });
        let mut files = Vec::new();
        let mut held = Vec::new();
        for ((image, &in_test), pixels) in readable.iter().zip(&in_test).zip(pixels) {
            if in_test == test || lone {
                files.push((image.path.clone(), image.label));
                let pixels = if lone { pixels.clone() } else { pixels.take() };
                held.extend(pixels.unwrap_or_default());
            }
        }
        let class_names = class_names.clone();
        let dataset: Arc<dyn Dataset> = if in_memory {
            let labels = files.iter().map(|(_, label)| *label).collect();
            Arc::new(InMemory::new(name, shape, held, labels, class_names)?)
        } else {
            Arc::new(OnDisk { name, shape, files, class_names })
        };
        Ok::<_, Error>(dataset)
    };
    // A single image can only be in both.
    let lone = readable.len() == 1;
    if lone {
        notes.push(format!("{} holds one image: it is in both splits.", root.display()));
    }
    let train = make(false, lone, &mut pixels)?;
    let test = make(true, lone, &mut pixels)?;
    Ok(Splits { train, test, notes, broken })
}

/// Images that are decoded each time that they are read.
struct OnDisk {
    name: String,
    shape: ImageShape,
    files: Vec<(PathBuf, u32)>,
    class_names: Vec<String>,
}

impl Dataset for OnDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn shape(&self) -> ImageShape {
        self.shape
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> u32 {
        self.files.get(index).map_or(0, |(_, label)| *label)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
        check_read(self, index, out)?;
        let path = &self.files[index].0;
        let size = [self.shape.height, self.shape.width];
        let pixels =
            decode(path, size).map_err(|reason| Error::Image { path: path.clone(), reason })?;
        out.copy_from_slice(&pixels);
        Ok(())
    }

    fn is_costly(&self) -> bool {
        true
    }
}

/// A file → u8 `[3,H,W]`, or what is wrong with it.
fn decode(path: &Path, size: [usize; 2]) -> Result<Vec<u8>, String> {
    let image = picture::load(path).map_err(|error| match error {
        Error::Image { reason, .. } => reason,
        Error::Io { source, .. } => source.to_string(),
        error => error.to_string(),
    })?;
    Ok(picture::to_chw(&picture::fit(&image, size)))
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
fn note_broken(broken: &[BrokenFile], notes: &mut Vec<String>) {
    const NAMED: usize = 20;
    for BrokenFile { path, reason } in broken.iter().take(NAMED) {
        notes.push(format!("skipped {}: {reason}", path.display()));
    }
    if broken.len() > NAMED {
        notes.push(format!("skipped {} more broken files.", broken.len() - NAMED));
    }
}

/// A tenth of the images, each chosen by its own path, so that a new file moves no other from one
/// split to the other; at least one where there are two.
fn hold_out(images: &[scan::Image], seed: u64) -> Vec<bool> {
    let draws: Vec<u64> = images
        .iter()
        .map(|image| Stream::new(seed, Purpose::HoldOut, fnv1a(&image.relative)).u64())
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
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;

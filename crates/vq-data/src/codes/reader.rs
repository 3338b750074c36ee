//! Reading the codes of any image.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::pack::Layout;
use super::{CodesManifest, shard, shard_path};
use crate::Error;

/// A whole folder of codes, open for reading.
#[derive(Debug)]
pub struct CodesFolder {
    path: PathBuf,
    manifest: CodesManifest,
    layout: Layout,
    /// The first shards; the others are opened to be read.
    open: Vec<File>,
}

/// Shards that are held open: of the usual thousands of images each, far more than a data set has.
pub(super) const MOST_OPEN: usize = 64;

/// The codes of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageCodes {
    /// The image's label; 0 where there are no classes.
    pub label: u32,
    /// h·w·G codes of every level, bottom (finest) first; the G codes of a position stand together.
    pub levels: Vec<Vec<u32>>,
}

impl CodesFolder {
    /// Opens a folder and checks every shard against its checksum, which reads each of them once. The
    /// error names the first that is missing, truncated or damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref().to_path_buf();
        let manifest = CodesManifest::load(&path)?;
        let layout = Layout::new(&manifest);
        let mut open = Vec::new();
        for index in 0..manifest.shards() {
            let images = manifest.images_in(index);
            let file = shard::open(&shard_path(&path, index), images, layout.record_bytes())?;
            if index < MOST_OPEN {
                open.push(file);
            }
        }
        Ok(Self { path, manifest, layout, open })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds.
    pub fn manifest(&self) -> &CodesManifest {
        &self.manifest
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.manifest.images
    }

    /// Whether there is no image, which no folder is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The codes of image `index`, from any thread; threads do not wait for each other.
    pub fn read(&self, index: usize) -> Result<ImageCodes, Error> {
        if index >= self.len() {
            let problem = format!("has {} images: there is none of index {index}", self.len());
            return Err(Error::codes(&self.path, problem));
        }
        let shard = index / self.manifest.images_per_shard;
        let size = self.layout.record_bytes();
        let first = shard::HEAD + index % self.manifest.images_per_shard * size;
        let mut record = vec![0; size];
        let path = shard_path(&self.path, shard);
        let read = |file: &File, record: &mut [u8]| shard::read_at(file, record, first as u64);
        match self.open.get(shard) {
            Some(file) => read(file, &mut record),
            None => File::open(&path).and_then(|file| read(&file, &mut record)),
        }
        .map_err(Error::io(&path))?;
        let (label, levels) = self.layout.unpack(&record).ok_or_else(|| {
            Error::codes(&path, "was changed while it was in use: open the codes again")
        })?;
        Ok(ImageCodes { label, levels })
    }

    /// The number of files that are held open.
    #[cfg(test)]
    pub(super) fn open_files(&self) -> usize {
        self.open.len()
    }
}

//! Writing the codes of a data set, one image after the other.

use std::fs;
use std::path::{Path, PathBuf};

use super::pack::Layout;
use super::{CodesManifest, MANIFEST_FILE, shard, shard_path};
use crate::Error;

/// Writes a folder of codes, shard by shard. Whatever ends it, whole shards stay, and the next writer of
/// the same codes goes on after them.
#[derive(Debug)]
pub struct CodesWriter {
    folder: PathBuf,
    manifest: CodesManifest,
    layout: Layout,
    /// The shard that is being filled.
    shard: usize,
    /// Its records so far.
    records: Vec<u8>,
}

impl CodesWriter {
    /// For a folder that is made if it is missing, is empty, or holds a part of the same codes. A folder
    /// with other codes or other files is refused.
    pub fn open(folder: impl AsRef<Path>, manifest: CodesManifest) -> Result<Self, Error> {
        let folder = folder.as_ref().to_path_buf();
        manifest.validate(&folder)?;
        let layout = Layout::new(&manifest);
        let write = |source| Error::Write { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(write)?;
        let mut shard = 0;
        if folder.join(MANIFEST_FILE).exists() {
            let there = CodesManifest::load(&folder)?;
            if let Some(difference) = there.difference(&manifest) {
                let problem = format!(
                    "holds other codes ({difference}): remove it, or write elsewhere (--out)"
                );
                return Err(Error::codes(&folder, problem));
            }
            let is_whole = |shard: &usize| {
                let images = manifest.images_in(*shard);
                shard::open(&shard_path(&folder, *shard), images, layout.record_bytes()).is_ok()
            };
            shard = (0..manifest.shards()).take_while(is_whole).count();
        } else {
            let mut entries = fs::read_dir(&folder).map_err(Error::io(&folder))?;
            // What a crash left of the manifest is in nobody's way.
            let is_other = |name: &std::ffi::OsStr| !name.to_string_lossy().starts_with(".tmp-");
            if entries.any(|entry| entry.is_ok_and(|entry| is_other(&entry.file_name()))) {
                let problem =
                    "holds other files: write the codes into a folder of their own (--out)";
                return Err(Error::codes(&folder, problem));
            }
            manifest.save(&folder)?;
        }
        Ok(Self { folder, manifest, layout, shard, records: Vec::new() })
    }

    /// The number of the image whose codes come next: the first of which there are none on disk.
    pub fn next_image(&self) -> usize {
        let done = (self.shard * self.manifest.images_per_shard).min(self.manifest.images);
        done + self.pending()
    }

    /// Takes the codes of the next image: its label, and h·w·G codes of every level, bottom first.
    pub fn push(&mut self, label: u32, levels: &[&[u32]]) -> Result<(), Error> {
        let refuse = |problem: String| Err(Error::codes(&self.folder, problem));
        let next = self.next_image();
        if next >= self.manifest.images {
            return refuse(format!("is for {next} images, and there are more"));
        }
        let classes = self.manifest.class_names.len().max(1);
        if label as usize >= classes {
            return refuse(format!("is for {classes} classes, and image {next} has label {label}"));
        }
        if let Err(problem) = self.layout.pack(label, levels, &mut self.records) {
            return refuse(format!("takes {problem} (image {next})"));
        }
        let images = self.manifest.images_in(self.shard);
        if self.pending() == images {
            let path = shard_path(&self.folder, self.shard);
            shard::write(&path, images, self.layout.record_bytes(), &self.records)?;
            self.records.clear();
            self.shard += 1;
        }
        Ok(())
    }

    /// An error where images are missing.
    pub fn finish(self) -> Result<(), Error> {
        let (done, images) = (self.next_image(), self.manifest.images);
        if done < images {
            let problem = format!("got the codes of {done} of {images} images");
            return Err(Error::codes(&self.folder, problem));
        }
        Ok(())
    }

    /// Images that are not on disk yet.
    fn pending(&self) -> usize {
        self.records.len() / self.layout.record_bytes()
    }
}

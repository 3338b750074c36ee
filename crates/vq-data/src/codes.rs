//! The codes of a whole data set on disk: what an autoregressive prior learns from.
//!
//! A folder holds `manifest.json` and `shard-00000.bin`, `shard-00001.bin`, … of equally many images each
//! (the last may hold fewer), in the order of the data set. A shard is written whole or not at all, ends
//! with its checksum, and has a record of the same length for every image: its label and then its codes,
//! level by level, each in ⌈log₂ K⌉ bits. So 512 codes take 9 bits and not 16, and image i is found
//! without an index. Unpacking costs a shift and a mask per code.
//!
//! An image is read with one positioned read of its record, so that threads share an open shard without a
//! lock: memory mapping would save the call, and would need `unsafe` code, which only vq-ops may have. At most
//! 64 shards of a folder are held open; those of higher numbers are opened for each read, so
//! that a folder of very many shards does not exhaust the process's file descriptors.

mod pack;
mod reader;
mod shard;
#[cfg(test)]
mod tests;
mod writer;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use reader::{CodesFolder, ImageCodes};
pub use writer::CodesWriter;

use crate::file::write_atomic;
use crate::{Error, Normalization};

/// The version of the format that this crate writes, and the newest that it reads.
pub const CODES_FORMAT_VERSION: u32 = 1;
/// The name of the description of a folder of codes.
pub const MANIFEST_FILE: &str = "manifest.json";
/// What [`CodesManifest::order`] says: there is no other order yet.
pub const CODES_ORDER: &str = "image i is image i of the split";

/// What a folder of codes holds, and where that came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodesManifest {
    /// See [`CODES_FORMAT_VERSION`].
    pub format_version: u32,
    /// A hash of the model that made the codes: another model would read other things into them.
    pub model: String,
    /// The format of the factors that the encoder multiplied with: another one rounds otherwise, and gives
    /// some images other codes. Not written where it is `f32`.
    #[serde(default = "f32_precision", skip_serializing_if = "is_f32")]
    pub precision: String,
    /// What was done to the pixels before they were encoded.
    pub normalization: Normalization,
    /// The data set's name.
    pub dataset: String,
    /// `train` or `test`.
    pub split: String,
    /// [`CODES_ORDER`].
    pub order: String,
    /// Images in all.
    pub images: usize,
    /// Images in every shard but the last.
    pub images_per_shard: usize,
    /// Names of the labels 0, 1, …; empty where there are no classes.
    pub class_names: Vec<String>,
    /// The levels of codes, bottom (finest) first.
    pub levels: Vec<CodesLevel>,
}

fn f32_precision() -> String {
    "f32".to_owned()
}

fn is_f32(precision: &str) -> bool {
    precision == "f32"
}

/// One level of codes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodesLevel {
    /// Height and width of the grid, in positions.
    pub grid: [usize; 2],
    /// K of each of the G codes of a position.
    pub codebook_sizes: Vec<usize>,
}

impl CodesLevel {
    /// Codes of an image: h·w·G.
    pub fn codes_per_image(&self) -> usize {
        self.grid[0] * self.grid[1] * self.codebook_sizes.len()
    }
}

impl CodesManifest {
    /// Reads and checks that of a folder of codes.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let path = folder.as_ref().join(MANIFEST_FILE);
        let text = fs::read(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::codes(
                folder.as_ref(),
                format!("holds no {MANIFEST_FILE}: give a folder that `vq encode --dataset` wrote"),
            ),
            _ => Error::Io { path: path.clone(), source },
        })?;
        let damaged = |error: serde_json::Error| {
            Error::codes(
                &path,
                format!("is not a manifest ({error}): encode into another folder (--out)"),
            )
        };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        let version = value.get("format_version").and_then(serde_json::Value::as_u64);
        if let Some(version) = version.filter(|&v| v > u64::from(CODES_FORMAT_VERSION)) {
            return Err(Error::codes(
                &path,
                format!(
                    "format version {version} is newer than this program's {CODES_FORMAT_VERSION}: update \
                     the program"
                ),
            ));
        }
        let manifest: Self = serde_json::from_value(value).map_err(damaged)?;
        manifest.validate(&path)?;
        Ok(manifest)
    }

    /// The number of shards.
    pub fn shards(&self) -> usize {
        self.images.div_ceil(self.images_per_shard.max(1))
    }

    /// Bytes that the codes take on disk, without the manifest.
    pub fn bytes(&self) -> u64 {
        let record = pack::Layout::new(self).record_bytes() as u64;
        self.images as u64 * record + self.shards() as u64 * shard::OVERHEAD as u64
    }

    /// Images in a shard.
    fn images_in(&self, shard: usize) -> usize {
        let before = shard.saturating_mul(self.images_per_shard);
        self.images.saturating_sub(before).min(self.images_per_shard)
    }

    fn validate(&self, path: &Path) -> Result<(), Error> {
        let refuse = |problem: String| Err(Error::codes(path, problem));
        let sizes = self.levels.iter().flat_map(|level| &level.codebook_sizes);
        let has_codes = self.levels.iter().all(|level| {
            let [h, w] = level.grid;
            let sides = (1..=MOST_POSITIONS).contains(&h) && (1..=MOST_POSITIONS).contains(&w);
            sides && (1..=MOST_CODEBOOKS).contains(&level.codebook_sizes.len())
        });
        if self.images == 0 || self.images_per_shard == 0 {
            return refuse("says that there is no image, or none in a shard".to_owned());
        }
        if self.levels.is_empty() || !has_codes {
            return refuse("holds a level without positions or codes, or too many".to_owned());
        }
        if let Some(size) = sizes.into_iter().find(|&&size| size == 0 || size > 1 << 32) {
            return refuse(format!("holds a codebook of {size} codes: 1 to 2^32 are possible"));
        }
        Ok(())
    }

    /// Writes the manifest into a folder, atomically.
    fn save(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(MANIFEST_FILE);
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::codes(&path, error.to_string()))?;
        text.push(b'\n');
        write_atomic(&path, |file| file.write_all(&text))
    }

    /// The first key that differs, with both values.
    fn difference(&self, other: &Self) -> Option<String> {
        let value = |manifest: &Self| serde_json::to_value(manifest).unwrap_or_default();
        let (was, now) = (value(self), value(other));
        let keys = was.as_object()?.iter();
        keys.map(|(key, was)| (key, was, now.get(key)))
            .find(|(_, was, now)| Some(*was) != *now)
            .map(|(key, was, now)| {
                let now = now.cloned().unwrap_or_default();
                format!("{key} was {was} and would be {now}")
            })
    }
}

/// More than that on a side cannot be meant, and would overflow.
const MOST_POSITIONS: usize = 1 << 16;
const MOST_CODEBOOKS: usize = 1 << 12;

fn shard_path(folder: &Path, shard: usize) -> PathBuf {
    folder.join(format!("shard-{shard:05}.bin"))
}

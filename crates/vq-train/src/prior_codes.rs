//! The codes that a prior learns: which, in what batches, and how well their frequencies alone do.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use vq_data::{CodesFolder, CodesLevel, CodesManifest, ImageCodes};
use vq_model::Stream;
use vq_prior::{Conditions, GridConfig};

use crate::{Error, PriorDataConfig, Result};

/// Some images of a folder of codes, as a prior for one level sees them.
#[derive(Clone, Debug)]
pub(crate) struct PriorCodes {
    folder: Arc<CodesFolder>,
    /// Which images of the folder, in its order.
    images: Arc<[usize]>,
    level: usize,
}

/// The codes of a few images, on the CPU.
#[derive(Clone, Debug)]
pub(crate) struct CodesBatch {
    /// Of the prior's level: u32 `[B,h,w]`, or `[B,h,w,G]` where a position has G > 1.
    pub(crate) codes: Tensor,
    /// u32 `[B]`; nothing where there are no classes.
    pub(crate) labels: Option<Tensor>,
    /// Those of each level above, in the same layout, the nearest first.
    pub(crate) conditioning: Vec<Tensor>,
}

impl CodesBatch {
    /// What the prior is told.
    pub(crate) fn conditions(&self) -> Conditions<'_> {
        Conditions { labels: self.labels.as_ref(), conditioning: &self.conditioning }
    }
}

impl PriorCodes {
    /// What to learn from and what to judge by. The model of that hash must have made both.
    ///
    /// Without a folder to judge by, ⌈`held_out_share`·N⌉ of the N images are held out (at least one, and not
    /// all). They are drawn without replacement, by a stream that only N decides: a folder of images is in
    /// the order of its classes, so that its last images would be those of the last classes alone. Training,
    /// resuming and evaluation draw the same ones.
    pub(crate) fn open(data: &PriorDataConfig, hash: &str) -> Result<(Self, Self)> {
        let folder = open(&data.codes, hash)?;
        let level = data.level.of(folder.manifest().levels.len())?;
        let train = Self::whole(folder, level);
        if let Some(path) = &data.held_out {
            let held_out = open(path, hash)?;
            let (ours, theirs) = (train.manifest(), held_out.manifest());
            if ours.levels != theirs.levels || ours.class_names != theirs.class_names {
                let problem = format!(
                    "holds codes of other grids or classes than {}: encode both splits of one data set",
                    data.codes.display()
                );
                return Err(Error::Data(vq_data::Error::Codes { path: path.clone(), problem }));
            }
            return Ok((train, Self::whole(held_out, level)));
        }
        let all = train.len();
        let count = (all as f64 * data.held_out_share).ceil() as usize;
        let count = count.clamp(1, all.max(2) - 1);
        if count >= all {
            let problem = "holds one image: there is none to hold out".to_owned();
            let path = data.codes.clone();
            return Err(Error::Data(vq_data::Error::Codes { path, problem }));
        }
        let (kept, held_out) = split(all, count);
        let part = |images: Vec<usize>| Self { images: images.into(), ..train.clone() };
        Ok((part(kept), part(held_out)))
    }

    /// All codes of a folder, for a prior that is told so many levels above its own. The model of that hash
    /// must have made them.
    pub(crate) fn open_whole(path: &std::path::Path, hash: &str, above: usize) -> Result<Self> {
        let folder = open(path, hash)?;
        let level = folder.manifest().levels.len().saturating_sub(1 + above);
        Ok(Self::whole(folder, level))
    }

    /// All images of a folder.
    fn whole(folder: Arc<CodesFolder>, level: usize) -> Self {
        let images = (0..folder.len()).collect();
        Self { folder, images, level }
    }

    /// The architecture with what the codes decide filled in.
    pub(crate) fn resolve(&self, config: &vq_prior::Config) -> vq_prior::Config {
        let manifest = self.manifest();
        let grid = |level: &CodesLevel| GridConfig {
            grid: level.grid,
            codebook_sizes: level.codebook_sizes.clone(),
        };
        let own = self.levels().next().map(grid);
        let own = own.unwrap_or(GridConfig { grid: [0, 0], codebook_sizes: Vec::new() });
        vq_prior::Config {
            tokenizer: manifest.model.clone(),
            grid: own.grid,
            codebook_sizes: own.codebook_sizes,
            class_count: manifest.class_names.len(),
            class_names: manifest.class_names.clone(),
            conditioning: self.levels().skip(1).map(grid).collect(),
            ..config.clone()
        }
    }

    /// The folder of all codes.
    pub(crate) fn path(&self) -> &std::path::Path {
        self.folder.path()
    }

    pub(crate) fn manifest(&self) -> &CodesManifest {
        self.folder.manifest()
    }

    /// The number of images.
    pub(crate) fn len(&self) -> usize {
        self.images.len()
    }

    /// The prior's level.
    pub(crate) fn level(&self) -> usize {
        self.level
    }

    /// The codes of those images, numbered from 0.
    pub(crate) fn batch(&self, indices: &[usize]) -> Result<CodesBatch> {
        let images = self.read(indices)?;
        let has_classes = !self.manifest().class_names.is_empty();
        let labels: Vec<u32> = images.iter().map(|image| image.label).collect();
        let labels = if has_classes {
            Some(Tensor::from_vec(labels, images.len(), &Device::Cpu)?)
        } else {
            None
        };
        let mut levels = Vec::new();
        for (index, level) in self.levels().enumerate() {
            let codes = images.iter().filter_map(|image| image.levels.get(self.level + index));
            let codes: Vec<u32> = codes.flatten().copied().collect();
            let ([h, w], count) = (level.grid, level.codebook_sizes.len());
            levels.push(match count {
                1 => Tensor::from_vec(codes, (images.len(), h, w), &Device::Cpu)?,
                _ => Tensor::from_vec(codes, (images.len(), h, w, count), &Device::Cpu)?,
            });
        }
        let conditioning = levels.split_off(1.min(levels.len()));
        let codes = levels.pop().ok_or_else(|| Error::config("data.level", "is not there"))?;
        Ok(CodesBatch { codes, labels, conditioning })
    }

    /// How often each code was chosen: `[level][code of the position][K]`, of all levels.
    pub(crate) fn histograms(&self) -> Result<Vec<Vec<Vec<u64>>>> {
        let zeros = |level: &CodesLevel| -> Vec<Vec<u64>> {
            level.codebook_sizes.iter().map(|&size| vec![0; size]).collect()
        };
        let mut all: Vec<_> = self.manifest().levels.iter().map(zeros).collect();
        for index in 0..self.len() {
            for (counts, codes) in all.iter_mut().zip(&self.image(index)?.levels) {
                let places = counts.len().max(1);
                for (place, &code) in codes.iter().enumerate() {
                    let count = counts.get_mut(place % places);
                    if let Some(count) = count.and_then(|counts| counts.get_mut(code as usize)) {
                        *count += 1;
                    }
                }
            }
        }
        Ok(all)
    }

    /// The prior's level and those above.
    fn levels(&self) -> impl Iterator<Item = &CodesLevel> {
        self.manifest().levels.iter().skip(self.level)
    }

    fn read(&self, indices: &[usize]) -> Result<Vec<ImageCodes>> {
        indices.iter().map(|&index| self.image(index)).collect()
    }

    fn image(&self, index: usize) -> Result<ImageCodes> {
        // The folder refuses an image that it does not have.
        let image = self.images.get(index).copied().unwrap_or(self.folder.len());
        Ok(self.folder.read(image)?)
    }
}

/// `count` of the numbers below `all` to hold out, and the others first; both rising.
fn split(all: usize, count: usize) -> (Vec<usize>, Vec<usize>) {
    let mut held_out = Stream::new(0, "prior.held_out", all as u64).distinct(count, all);
    held_out.sort_unstable();
    let is_kept = |image: &usize| held_out.binary_search(image).is_err();
    ((0..all).filter(is_kept).collect(), held_out)
}

fn open(path: &std::path::Path, hash: &str) -> Result<Arc<CodesFolder>> {
    let folder = CodesFolder::open(path)?;
    let made_by = &folder.manifest().model;
    if made_by != hash {
        return Err(Error::OtherModel {
            what: path.to_path_buf(),
            made_by: made_by.clone(),
            hash: hash.to_owned(),
        });
    }
    Ok(Arc::new(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_held_out_from_everywhere_and_always_the_same() {
        let (kept, held_out) = split(1000, 100);
        assert_eq!((kept.len(), held_out.len()), (900, 100));
        let mut all = [kept.clone(), held_out.clone()].concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1000));
        // Ten classes of a hundred images each, one after the other.
        for class in 0..10 {
            let of_class = held_out.iter().filter(|&&image| image / 100 == class).count();
            assert!((2..25).contains(&of_class), "{of_class} of class {class}");
        }
        assert_eq!(split(1000, 100), (kept, held_out));
    }
}

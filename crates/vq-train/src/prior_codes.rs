//! The codes that a prior learns: which, in what batches, and how well their frequencies alone do.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use vq_data::{CodesFolder, CodesLevel, CodesManifest, ImageCodes};
use vq_prior::{Conditions, GridConfig};

use crate::{Error, PriorDataConfig, Result};

/// Some images of a folder of codes, as a prior for one level sees them.
#[derive(Clone, Debug)]
pub(crate) struct PriorCodes {
    folder: Arc<CodesFolder>,
    first: usize,
    count: usize,
    level: usize,
}

/// The codes of a few images, on the CPU.
#[derive(Clone, Debug)]
pub struct CodesBatch {
    /// Of the prior's level: u32 `[B,h,w]`, or `[B,h,w,G]` where a position has G > 1.
    pub codes: Tensor,
    /// u32 `[B]`; nothing where there are no classes.
    pub labels: Option<Tensor>,
    /// Those of each level above, in the same layout, the nearest first.
    pub conditioning: Vec<Tensor>,
}

impl CodesBatch {
    /// What the prior is told.
    pub fn conditions(&self) -> Conditions<'_> {
        Conditions { labels: self.labels.as_ref(), conditioning: &self.conditioning }
    }
}

impl PriorCodes {
    /// What to learn from and what to judge by. The model of that hash must have made both.
    pub(crate) fn open(data: &PriorDataConfig, hash: &str) -> Result<(Self, Self)> {
        let folder = open(&data.codes, hash)?;
        let level = data.level.of(folder.manifest().levels.len())?;
        let all = |folder: Arc<CodesFolder>| {
            let count = folder.len();
            Self { folder, first: 0, count, level }
        };
        let train = all(folder.clone());
        if let Some(path) = &data.held_out {
            let held_out = open(path, hash)?;
            let (ours, theirs) = (folder.manifest(), held_out.manifest());
            if ours.levels != theirs.levels || ours.class_names != theirs.class_names {
                let problem = format!(
                    "holds codes of other grids or classes than {}: encode both splits of one data set",
                    folder.path().display()
                );
                return Err(Error::Data(vq_data::Error::Codes { path: path.clone(), problem }));
            }
            return Ok((train, all(held_out)));
        }
        let count = (train.count as f64 * data.held_out_share).ceil() as usize;
        let count = count.clamp(1, train.count.max(2) - 1);
        let kept = train.count - count.min(train.count);
        if kept == 0 {
            let problem = "holds one image: there is none to hold out".to_owned();
            let path = data.codes.clone();
            return Err(Error::Data(vq_data::Error::Codes { path, problem }));
        }
        let held_out = Self { first: kept, count, ..train.clone() };
        Ok((Self { count: kept, ..train }, held_out))
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

    pub(crate) fn manifest(&self) -> &CodesManifest {
        self.folder.manifest()
    }

    /// The number of images.
    pub(crate) fn len(&self) -> usize {
        self.count
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
        for index in 0..self.count {
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

    /// Bits per code of these codes under the frequencies `of` other codes of the level, whatever the
    /// position, each count with one added: what a prior must beat.
    pub(crate) fn unigram_bits(&self, of: &[Vec<u64>]) -> Result<f64> {
        let own = self.histograms()?;
        let (mut bits, mut codes) = (0.0, 0);
        for (own, of) in own.get(self.level).into_iter().flatten().zip(of) {
            let total = (of.iter().sum::<u64>() + of.len() as u64) as f64;
            for (&count, &known) in own.iter().zip(of) {
                bits -= count as f64 * ((known + 1) as f64 / total).log2();
                codes += count;
            }
        }
        Ok(bits / codes.max(1) as f64)
    }

    /// The prior's level and those above.
    fn levels(&self) -> impl Iterator<Item = &CodesLevel> {
        self.manifest().levels.iter().skip(self.level)
    }

    fn read(&self, indices: &[usize]) -> Result<Vec<ImageCodes>> {
        indices.iter().map(|&index| self.image(index)).collect()
    }

    fn image(&self, index: usize) -> Result<ImageCodes> {
        Ok(self.folder.read(self.first + index)?)
    }
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

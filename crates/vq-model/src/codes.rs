//! The discrete representation of images.

use candle_core::{DType, Tensor};

use crate::{Config, Error, QuantizerConfig, QuantizerKind, Result};

/// The codes of a batch of images.
#[derive(Clone, Debug)]
pub struct Codes {
    /// One tensor of u32 in 0..K per level, bottom (finest) first: `[B,h,w]` where the level's quantizer
    /// gives one code to each position, `[B,h,w,G]` where it gives G > 1, one of each of its codebooks. Of
    /// the kind `residual` the first g of them, `[B,h,w,g]`, can be decoded too.
    pub levels: Vec<Tensor>,
}

impl Codes {
    /// Number of images.
    pub fn batch_size(&self) -> Result<usize> {
        match self.levels.first() {
            Some(level) => Ok(level.dim(0)?),
            None => Err(Error::Input("codes have no level".to_owned())),
        }
    }

    /// `count` images from `first` on.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        let narrow = |level: &Tensor| Ok(level.narrow(0, first, count)?.contiguous()?);
        Ok(Self { levels: self.levels.iter().map(narrow).collect::<Result<_>>()? })
    }

    /// Several batches one after the other. All must have the same levels and grids.
    pub fn concat(batches: &[Self]) -> Result<Self> {
        let levels = batches.first().map_or(0, |batch| batch.levels.len());
        if levels == 0 || batches.iter().any(|batch| batch.levels.len() != levels) {
            let problem = "only codes with the same, non-zero number of levels can be joined";
            return Err(Error::Input(problem.to_owned()));
        }
        let level = |index: usize| {
            let parts: Vec<&Tensor> =
                batches.iter().filter_map(|batch| batch.levels.get(index)).collect();
            Ok(Tensor::cat(&parts, 0)?)
        };
        Ok(Self { levels: (0..levels).map(level).collect::<Result<_>>()? })
    }

    /// Checks that a model of that config can decode them: levels, types, grids that belong together,
    /// values below each level's K.
    pub fn validate(&self, config: &Config) -> Result<()> {
        if self.levels.len() != config.levels.len() {
            return Err(Error::Input(format!(
                "codes have {} level(s), the model has {}",
                self.levels.len(),
                config.levels.len()
            )));
        }
        // The bottom grid that each level's grid stands for.
        let mut bottom = None;
        let mut factor = 1;
        for (index, (codes, level)) in self.levels.iter().zip(&config.levels).enumerate() {
            let [b, h, w] = grid_of(index, codes, &level.quantizer)?;
            if b == 0 || h == 0 || w == 0 {
                return Err(Error::Input(format!(
                    "codes of level {index} are empty: [{b}, {h}, {w}]"
                )));
            }
            if index > 0 {
                factor *= level.downsample;
            }
            let grid = (b, h * factor, w * factor);
            if *bottom.get_or_insert(grid) != grid {
                let (b0, h0, w0) = bottom.unwrap_or(grid);
                return Err(Error::Input(format!(
                    "codes of level {index} are [{b}, {h}, {w}], which does not belong to [{b0}, {h0}, {w0}] \
                     of level 0: the grid must be {factor} times smaller"
                )));
            }
            let size = level.quantizer.codebook_size;
            let values = codes.flatten_all()?.to_vec1::<u32>()?;
            if let Some(value) = values.iter().find(|&&value| value as usize >= size) {
                return Err(Error::Input(format!(
                    "code {value} of level {index} is out of range: the codebook has {size} (0 to {})",
                    size - 1
                )));
            }
        }
        Ok(())
    }
}

/// `[B, h, w]` of the codes of level `index`, or an error where they are not laid out as its quantizer's.
fn grid_of(index: usize, codes: &Tensor, quantizer: &QuantizerConfig) -> Result<[usize; 3]> {
    let count = quantizer.codes_per_position();
    // Only what a residual quantizer's first stages say stands for itself.
    let least = if quantizer.kind == QuantizerKind::Residual { 1 } else { count };
    match (codes.dtype(), codes.dims()) {
        (DType::U32, &[b, h, w]) if count == 1 => Ok([b, h, w]),
        (DType::U32, &[b, h, w, g]) if count > 1 && (least..=count).contains(&g) => Ok([b, h, w]),
        (dtype, dims) => {
            let layout = match count {
                1 => "[B, h, w]".to_owned(),
                _ => format!("[B, h, w, {count}]"),
            };
            Err(Error::Input(format!(
                "codes of level {index} must be u32 {layout}, got {dtype:?} {dims:?}"
            )))
        }
    }
}

//! What `vq sample --complete` keeps of the image that it is given.

use std::path::Path;

use candle_core::{Device, Tensor};
use clap::ValueEnum;
use vq_data::picture;
use vq_model::{Codes, VqVae};
use vq_prior::Prior;

use super::encode::encode;
use crate::error::{Error, Result};
use crate::images::{self, Picture};

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Keep {
    TopHalf,
    TopQuarter,
    LeftHalf,
    LeftQuarter,
    BottomHalf,
    RightHalf,
}

impl Keep {
    /// u8 `[h,w]`, 1 where codes are kept. An error where that is nowhere or everywhere.
    pub(super) fn mask(self, [h, w]: [usize; 2]) -> Result<Tensor> {
        let kept = |row: usize, column: usize| match self {
            Self::TopHalf => row < h / 2,
            Self::TopQuarter => row < h / 4,
            Self::LeftHalf => column < w / 2,
            Self::LeftQuarter => column < w / 4,
            Self::BottomHalf => row >= h / 2,
            Self::RightHalf => column >= w / 2,
        };
        let mask: Vec<u8> = (0..h * w).map(|place| u8::from(kept(place / w, place % w))).collect();
        let refuse = |what: &str| {
            let name = self.to_possible_value().map(|value| value.get_name().to_owned());
            Err(Error::other(format!(
                "--keep {} of a grid of {h}×{w} codes is {what}",
                name.unwrap_or_default()
            )))
        };
        match (mask.contains(&1), mask.contains(&0)) {
            (false, _) => refuse("none of them: keep a larger part"),
            (_, false) => refuse("all of them: keep a smaller part"),
            _ => Ok(Tensor::from_vec(mask, (h, w), &Device::Cpu)?),
        }
    }

    /// Whether there is something to keep and something to draw at every level.
    pub(super) fn check(self, priors: &[Prior]) -> Result<()> {
        priors.iter().try_for_each(|prior| self.mask(prior.config().grid).map(drop))
    }
}

/// The codes of the image to complete, in the size that the priors are for. The encoder sees all of it.
pub(super) fn given(path: &Path, model: &VqVae, device: &Device) -> Result<Codes> {
    let image = picture::fit(&picture::load(path)?, model.config().image_size);
    let dataset = images::dataset(&[Picture { path: path.to_owned(), image }])?;
    let codes = encode(model, dataset, device)?;
    let levels = codes.levels.iter().map(|level| level.to_device(&Device::Cpu));
    Ok(Codes { levels: levels.collect::<candle_core::Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_where_its_name_says() {
        let mask = |keep: Keep| keep.mask([2, 4]).unwrap().to_vec2::<u8>().unwrap();
        assert_eq!(mask(Keep::TopHalf), [[1, 1, 1, 1], [0, 0, 0, 0]]);
        assert_eq!(mask(Keep::BottomHalf), [[0, 0, 0, 0], [1, 1, 1, 1]]);
        assert_eq!(mask(Keep::LeftHalf), [[1, 1, 0, 0], [1, 1, 0, 0]]);
        assert_eq!(mask(Keep::RightHalf), [[0, 0, 1, 1], [0, 0, 1, 1]]);
        assert_eq!(mask(Keep::LeftQuarter), [[1, 0, 0, 0], [1, 0, 0, 0]]);
    }

    #[test]
    fn nothing_and_everything_are_refused() {
        let refused = |keep: Keep, grid| keep.mask(grid).unwrap_err().to_string();
        let error = refused(Keep::TopQuarter, [2, 4]);
        assert!(error.contains("--keep top-quarter of a grid of 2×4"), "{error}");
        assert!(error.contains("larger"), "{error}");
        assert!(refused(Keep::LeftHalf, [4, 1]).contains("larger"));
        assert!(refused(Keep::RightHalf, [4, 1]).contains("smaller"));
        Keep::TopQuarter.mask([4, 1]).unwrap();
    }
}

//! Codes on disk: `.safetensors` (all levels, with the images' names) or `.npy` (one level).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use vq_model::{Codes, Precision};

use crate::error::{Error, Result};
use crate::{file, npy};

/// What a codes file holds.
pub(crate) struct CodesFile {
    pub(crate) codes: Codes,
    /// Where the images came from, one per image; empty where that is not known.
    pub(crate) images: Vec<PathBuf>,
    /// The format of the factors that the encoder multiplied with, as far as the file has room for it.
    pub(crate) precision: Precision,
    /// The hash of the model that they are codes of, where that is known.
    pub(crate) model: Option<String>,
}

/// The metadata. Files that hold only the images' names, or no model, are older.
#[derive(Default, Serialize, Deserialize)]
struct About {
    images: Vec<PathBuf>,
    precision: Precision,
    #[serde(default)]
    model: Option<String>,
}

/// The format that a file's name asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    SafeTensors,
    Npy,
}

impl Format {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Ok(Self::SafeTensors),
            Some("npy") => Ok(Self::Npy),
            _ => Err(Error::other(format!(
                "{}: codes are kept in .safetensors or .npy files; give the file such a name",
                path.display()
            ))),
        }
    }
}

/// The metadata's only key, called after what it held at first: several would be stored in an order that changes from run to run.
const KEY: &str = "images";

impl CodesFile {
    /// Writes `levels.0`, … as U32 `[N,h,w]`, or `[N,h,w,G]` where a position has G > 1 codes; or the one level that an `.npy` file has room for.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut levels = Vec::new();
        for level in &self.codes.levels {
            let values = level.flatten_all()?.to_vec1::<u32>()?;
            levels.push((level.dims().to_vec(), values));
        }
        let bytes = match (Format::of(path)?, &levels[..]) {
            (Format::Npy, [(shape, values)]) => npy::write(shape, values),
            (Format::Npy, _) => {
                return Err(Error::other(format!(
                    "{}: an .npy file holds one level of codes, the model has {}; write .safetensors",
                    path.display(),
                    levels.len()
                )));
            }
            (Format::SafeTensors, _) => self.safetensors(&levels)?,
        };
        file::write_atomic(path, &bytes)
    }

    fn safetensors(&self, levels: &[(Vec<usize>, Vec<u32>)]) -> Result<Vec<u8>> {
        let images: Vec<String> =
            self.images.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        let about = serde_json::json!({
            "images": images, "precision": self.precision, "model": self.model,
        });
        let metadata = HashMap::from([(KEY.to_owned(), about.to_string())]);
        let data: Vec<Vec<u8>> = levels
            .iter()
            .map(|(_, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views = levels.iter().zip(&data).enumerate().map(|(index, ((shape, _), bytes))| {
            Ok((format!("levels.{index}"), TensorView::new(Dtype::U32, shape.clone(), bytes)?))
        });
        views
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|error| Error::Candle(candle_core::Error::SafeTensor(error)))
    }

    /// Reads what [`write`](Self::write) wrote, or an array of integers `[N,h,w]`, `[N,h,w,G]` or `[h,w]`
    /// that another program did.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let format = Format::of(path)?;
        let bytes = fs::read(path).map_err(Error::read(path))?;
        let damaged = |problem: String| {
            Error::other(format!(
                "{} holds no codes: {problem}; make it again with `vq encode`",
                path.display()
            ))
        };
        match format {
            Format::Npy => {
                let (mut shape, values) = npy::read(&bytes).map_err(damaged)?;
                if shape.len() == 2 {
                    shape.insert(0, 1);
                }
                let codes = Tensor::from_vec(values, shape, &Device::Cpu)?;
                let precision = Precision::default();
                let codes = Codes { levels: vec![codes] };
                Ok(Self { codes, images: Vec::new(), precision, model: None })
            }
            Format::SafeTensors => Self::from_safetensors(&bytes).map_err(damaged),
        }
    }

    fn from_safetensors(bytes: &[u8]) -> std::result::Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let file = SafeTensors::deserialize(bytes).map_err(|error| text(&error))?;
        let mut levels = Vec::new();
        while let Ok(view) = file.tensor(&format!("levels.{}", levels.len())) {
            if view.dtype() != Dtype::U32 {
                return Err(format!("levels.{} is not U32", levels.len()));
            }
            let (chunks, _) = view.data().as_chunks::<4>();
            let values: Vec<u32> = chunks.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
            let level = Tensor::from_vec(values, view.shape(), &Device::Cpu);
            levels.push(level.map_err(|error| text(&error))?);
        }
        if levels.is_empty() {
            return Err("it has no tensor `levels.0`".to_owned());
        }
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| text(&error))?;
        let about = metadata.metadata().as_ref().and_then(|entries| entries.get(KEY));
        let about = about.and_then(|json| {
            let names =
                || serde_json::from_str(json).map(|images| About { images, ..About::default() });
            serde_json::from_str::<About>(json).or_else(|_| names()).ok()
        });
        let About { images, precision, model } = about.unwrap_or_default();
        Ok(Self { codes: Codes { levels }, images, precision, model })
    }
}

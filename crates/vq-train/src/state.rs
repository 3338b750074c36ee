//! What a checkpoint holds beside the model: `training.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::{Best, EpochRecord, Error, Metrics, Result, Usage};

/// The name of the training state's file in a checkpoint.
pub const TRAINING_FILE: &str = "training.safetensors";

/// The newest version of the training state that this crate reads, and the one that it writes.
const VERSION: u32 = 2;

/// Where a run is. Positions decide everything: orders, flips, revivals and learning rates are
/// functions of the seed and the position, so there is no other generator state to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Version of this format.
    pub version: u32,
    /// The run's seed.
    pub seed: u64,
    /// Steps done; the schedule goes by it.
    pub step: u64,
    /// Epochs done.
    pub epoch: usize,
    /// Batches of the current epoch that are done.
    pub batch: usize,
    /// Batches in an epoch.
    pub batches_per_epoch: usize,
    /// See [`Trainable::image_counts`](crate::Trainable::image_counts).
    #[serde(default)]
    pub images: Option<[usize; 2]>,
    /// Whether the model was prepared (k-means).
    pub prepared: bool,
    /// Whether a collapse has been reported.
    pub collapse_reported: bool,
    /// What advice on the codebooks was given, so that none is given twice.
    #[serde(default)]
    pub advised: Vec<String>,
    /// Sums over the current epoch.
    pub running: Running,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The epochs that are done.
    pub history: Vec<EpochRecord>,
}

/// Sums over the epoch so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Running {
    /// Images seen.
    pub examples: u64,
    /// Of each term, weighted by the images.
    pub sums: Metrics,
    /// Codes, one histogram per level.
    pub usage: Vec<Usage>,
    /// Codes that were revived, over all levels.
    #[serde(default)]
    pub revived: u64,
}

impl Progress {
    pub(crate) fn new(seed: u64, batches_per_epoch: usize, images: Option<[usize; 2]>) -> Self {
        Self {
            version: VERSION,
            seed,
            step: 0,
            epoch: 0,
            batch: 0,
            batches_per_epoch,
            images,
            prepared: false,
            collapse_reported: false,
            advised: Vec::new(),
            running: Running::default(),
            best: None,
            history: Vec::new(),
        }
    }
}

impl Running {
    pub(crate) fn add(&mut self, examples: usize, terms: &Metrics, usage: &[Usage]) {
        self.examples += examples as u64;
        self.sums.add_scaled(terms, examples as f64);
        if self.usage.is_empty() {
            self.usage = usage.to_vec();
        } else {
            for (sum, usage) in self.usage.iter_mut().zip(usage) {
                sum.add(usage);
            }
        }
    }

    /// Means of the terms over the images seen.
    pub(crate) fn means(&self) -> Metrics {
        self.sums.divided(self.examples.max(1) as f64)
    }
}

/// The key of the one metadata entry: several would be stored in an order that changes from run to
/// run.
const KEY: &str = "state";

/// Writes f32 tensors and the progress to a file that is not there yet. The same state gives the same
/// bytes.
pub(crate) fn write(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    progress: &Progress,
) -> Result<()> {
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        data.push((name.as_str(), tensor.dims().to_vec(), bytes));
    }
    let invalid = |error: &dyn std::fmt::Display| {
        Error::write(path)(std::io::Error::other(error.to_string()))
    };
    let json = serde_json::to_string(progress).map_err(|error| invalid(&error))?;
    let metadata = HashMap::from([(KEY.to_owned(), json)]);
    let views: std::result::Result<Vec<_>, _> = data
        .iter()
        .map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error: safetensors::SafeTensorError| invalid(&error))?;
    fs::write(path, bytes).map_err(Error::write(path))
}

/// Reads what [`write`] wrote.
pub(crate) fn read(path: &Path, device: &Device) -> Result<(BTreeMap<String, Tensor>, Progress)> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    let progress = progress(path, &bytes)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| Error::damaged(path, error))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(Error::damaged(path, format!("tensor `{name}` is not f32")));
        }
        let values: Vec<f32> =
            view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::damaged(path, format!("tensor `{name}` is not finite")));
        }
        tensors.insert(name, Tensor::from_vec(values, view.shape(), device)?);
    }
    Ok((tensors, progress))
}

/// The progress that a checkpoint folder holds, without its tensors: for looking into it.
pub fn read_progress(checkpoint: &Path) -> Result<Progress> {
    let path = checkpoint.join(TRAINING_FILE);
    let bytes = fs::read(&path).map_err(Error::read(&path))?;
    progress(&path, &bytes)
}

fn progress(path: &Path, bytes: &[u8]) -> Result<Progress> {
    // Also checks that the file is as long as its header says.
    SafeTensors::deserialize(bytes).map_err(|error| Error::damaged(path, error))?;
    let (_, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| Error::damaged(path, error))?;
    let json = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(KEY))
        .ok_or_else(|| Error::damaged(path, "it holds no training state"))?;
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|error| Error::damaged(path, error))?;
    if let Some(version) = value.get("version").and_then(serde_json::Value::as_u64)
        && version > u64::from(VERSION)
    {
        let cause = format!("its format {version} is newer than this program's {VERSION}");
        return Err(Error::damaged(path, cause));
    }
    let progress: Progress =
        serde_json::from_str(json).map_err(|error| Error::damaged(path, error))?;
    // What an earlier version lacks has been filled in.
    Ok(Progress { version: VERSION, ..progress })
}

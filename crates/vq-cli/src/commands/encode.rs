//! `vq encode`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use clap::Args;
use serde_json::json;
use vq_data::{Dataset, Loader, LoaderOptions, Normalization};
use vq_model::{Codes, VqVae};
use vq_train::{model_hash, resolve_model};

use crate::cli::LogFormat;
use crate::codes_file::{CodesFile, Format};
use crate::compute::ComputeArgs;
use crate::data_args::{DATA_ARGS, DataArgs, Split};
use crate::error::Result;
use crate::images::{self, ImageArgs};
use crate::{file, output};

/// Turn images into codes: image files into one file, or (--dataset) a whole data set into a folder.
///
/// The folder is what `vq train-prior` learns from: shards of codes and labels, and a manifest. Encoding
/// that was interrupted goes on after the last whole shard when it is started again.
#[derive(Debug, Args)]
#[command(mut_arg("files", |files| files.required(false).required_unless_present("dataset")
    .conflicts_with_all(DATA_ARGS)))]
#[command(after_help = "Examples:
  vq encode a.png b.jpg --out codes.safetensors
  vq encode --dataset train --out codes
  vq encode --dataset train --train-count 50000   more of the built-in shapes than the model learned from
  vq encode --dataset test --out codes-test --data cifar10")]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    images: ImageArgs,

    /// Encode this split of a data set and not image files; without --data, of that which the model's run
    /// was trained on.
    #[arg(long, value_enum, value_name = "SPLIT", conflicts_with_all = ["files", "size"])]
    dataset: Option<Split>,

    /// Images in a shard of --dataset: so many at most are encoded again after an interruption.
    #[arg(long, default_value_t = 8192, value_name = "N", requires = "dataset",
        value_parser = parse_count)]
    pub(super) shard_images: usize,

    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    pub(super) model: PathBuf,

    /// Where the codes go. Of image files into a file: `.safetensors` holds all levels and the images'
    /// names, `.npy` one level [default: codes.safetensors]. Of --dataset into a folder [default: codes].
    #[arg(long, value_name = "FILE|FOLDER")]
    pub(super) out: Option<PathBuf>,

    #[command(flatten)]
    pub(super) data: DataArgs,

    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

/// Images that are encoded at a time; memory, not the result, depends on it.
pub(super) const BATCH: usize = 64;

pub(crate) fn run(args: &EncodeArgs, format: LogFormat) -> Result<()> {
    if let Some(split) = args.dataset {
        return super::encode_dataset::run(args, split, format);
    }
    let out = args.out.as_deref().unwrap_or(Path::new("codes.safetensors"));
    Format::of(out)?;
    let device = args.compute.start()?;
    let folder = resolve_model(&args.model)?;
    let model = args.compute.load(&folder, &device)?;
    let pictures = args.images.load(model.config(), format)?;
    let codes = encode(&model, images::dataset(&pictures)?, &device)?;
    let grids: Vec<&[usize]> = codes.levels.iter().map(candle_core::Tensor::dims).collect();
    let text = format!("{}  codes {grids:?}", out.display());
    let record = json!({ "event": "encoded", "path": output::path(out), "images": pictures.len(), "codes": grids });
    let images = pictures.iter().map(|picture| picture.path.clone()).collect();
    let precision = args.compute.precision.unwrap_or_default();
    let hash = model_hash(&folder)?;
    file::make_folder_of(out)?;
    CodesFile { codes: codes.clone(), images, precision, model: Some(hash) }.write(out)?;
    output::result(format, text, &record)
}

/// The codes of all images of a data set, which is held in memory.
pub(super) fn encode(model: &VqVae, dataset: Arc<dyn Dataset>, device: &Device) -> Result<Codes> {
    let mut batches = Vec::new();
    for batch in loader(model, dataset, BATCH)?.epoch(0, 0) {
        batches.push(model.encode(&batch?.images.to_device(device)?)?);
    }
    Ok(Codes::concat(&batches)?)
}

/// The images of a data set in their order, as they are.
pub(super) fn loader(
    model: &VqVae,
    dataset: Arc<dyn Dataset>,
    batch_size: usize,
) -> Result<Loader> {
    let normalization = &model.config().normalization;
    let normalization =
        Normalization { mean: normalization.mean.clone(), std: normalization.std.clone() };
    Ok(Loader::new(dataset, normalization, LoaderOptions::in_order(batch_size))?)
}

fn parse_count(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&count| count > 0).ok_or_else(|| "at least 1".to_owned())
}

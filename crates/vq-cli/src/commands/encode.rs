//! `vq encode`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use vq_data::{Loader, LoaderOptions, Normalization};
use vq_model::Codes;

use crate::cli::LogFormat;
use crate::codes_file::{CodesFile, Format};
use crate::compute::ComputeArgs;
use crate::error::Result;
use crate::images::{self, ImageArgs};
use crate::output;

/// Turn images into codes.
#[derive(Debug, Args)]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    images: ImageArgs,

    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// Where the codes go; `.safetensors` holds all levels and the images' names, `.npy` one level.
    #[arg(long, default_value = "codes.safetensors", value_name = "FILE")]
    out: PathBuf,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Images that are encoded at a time; memory, not the result, depends on it.
const BATCH: usize = 64;

pub(crate) fn run(args: &EncodeArgs, format: LogFormat) -> Result<()> {
    Format::of(&args.out)?;
    let device = args.compute.start()?;
    let model = args.compute.load(&args.model, &device)?;
    let pictures = args.images.load(model.config(), format)?;
    let dataset = images::dataset(&pictures)?;

    let normalization = &model.config().normalization;
    let normalization =
        Normalization { mean: normalization.mean.clone(), std: normalization.std.clone() };
    let options = LoaderOptions {
        batch_size: BATCH,
        shuffle: false,
        flip: false,
        drop_last: false,
        ..LoaderOptions::default()
    };
    let mut batches = Vec::new();
    for batch in Loader::new(dataset, normalization, options)?.epoch(0, 0) {
        batches.push(model.encode(&batch?.images.to_device(&device)?)?);
    }
    let codes = Codes::concat(&batches)?;
    let grids: Vec<&[usize]> = codes.levels.iter().map(candle_core::Tensor::dims).collect();
    let text = format!("{}  codes {grids:?}", args.out.display());
    let record =
        json!({ "event": "encoded", "path": args.out, "images": pictures.len(), "codes": grids });
    let images = pictures.iter().map(|picture| picture.path.clone()).collect();
    CodesFile { codes: codes.clone(), images }.write(&args.out)?;
    output::result(format, text, &record)
}

//! `vq decode`

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use vq_viz::{save_png, tensor_to_image};

use crate::cli::LogFormat;
use crate::codes_file::CodesFile;
use crate::compute::ComputeArgs;
use crate::error::{Error, Result};
use crate::{file, images, output};

/// Turn codes back into images.
#[derive(Debug, Args)]
pub(crate) struct DecodeArgs {
    /// A file that `vq encode` wrote, or an .npy array of integers [N, h, w] ([N, h, w, G] for G
    /// codes at each position; the first stages of a residual quantizer's will do).
    codes: PathBuf,

    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// Where the PNGs go, as `NAME_decoded.png`.
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    out: PathBuf,

    #[command(flatten)]
    compute: ComputeArgs,
}

pub(crate) fn run(args: &DecodeArgs, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let CodesFile { codes, images } = CodesFile::read(&args.codes)?;
    let model = args.compute.load(&args.model, &device)?;
    codes.validate(model.config()).map_err(|error| {
        Error::other(format!("{}: {error}; was it made with another model?", args.codes.display()))
    })?;
    let count = codes.batch_size()?;
    let names: Vec<PathBuf> = if images.len() == count {
        images
    } else {
        (0..count).map(|index| format!("{index:05}").into()).collect()
    };
    let paths = images::outputs(&args.out, names.iter().map(PathBuf::as_path), "decoded");
    file::make_folder(&args.out)?;
    for (index, path) in paths.iter().enumerate() {
        let decoded = model.decode(&codes.narrow(index, 1)?)?;
        let pixels = model.config().normalization.denormalize(&decoded)?;
        save_png(&tensor_to_image(&pixels.get(0)?)?, path)?;
        let path: &Path = path;
        output::result(format, path.display(), &json!({ "event": "decoded", "path": path }))?;
    }
    Ok(())
}

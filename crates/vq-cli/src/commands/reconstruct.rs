//! `vq reconstruct`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use vq_train::{EvaluateOptions, evaluate};
use vq_viz::{save_png, side_by_side, tensor_to_image};

use crate::cli::LogFormat;
use crate::compute::ComputeArgs;
use crate::error::{Error, Result};
use crate::images::{self, ImageArgs};
use crate::{file, output};

/// Encode and decode images: writes PNGs, the original on the left, its reconstruction on the right.
#[derive(Debug, Args)]
pub(crate) struct ReconstructArgs {
    #[command(flatten)]
    images: ImageArgs,

    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// Where the PNGs go, as `NAME_recon.png`.
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    out: PathBuf,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Pixels between the two.
const GAP: u32 = 2;

pub(crate) fn run(args: &ReconstructArgs, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let model = args.compute.load(&args.model, &device)?;
    let pictures = args.images.load(model.config(), format)?;
    let outputs =
        images::outputs(&args.out, pictures.iter().map(|picture| picture.path.as_path()), "recon");
    file::make_folder(&args.out)?;
    for (picture, path) in pictures.into_iter().zip(outputs) {
        let (width, height) = picture.image.dimensions();
        let dataset = images::dataset(&[picture])?;
        let options = EvaluateOptions { batch_size: 1, variance: 1.0, samples: 1, stop: None };
        let evaluation = evaluate(&model, &dataset, options)?;
        let (samples, metrics) = evaluation
            .and_then(|evaluation| Some((evaluation.samples?, evaluation.metrics)))
            .ok_or_else(|| Error::other("the model gave no reconstruction"))?;
        let original = tensor_to_image(&samples.originals.get(0)?)?;
        let reconstruction = tensor_to_image(&samples.reconstructions.get(0)?)?;
        save_png(&side_by_side(&original, &reconstruction, GAP)?, &path)?;

        let figure = |name| metrics.get(name).unwrap_or(f64::NAN);
        let (psnr, ssim) = (figure("psnr"), figure("ssim"));
        let text =
            format!("{}  {width}×{height}  PSNR {psnr:.2} dB  SSIM {ssim:.3}", path.display());
        let record = json!({ "event": "reconstructed", "path": output::path(&path), "width": width, "height": height,
            "psnr": psnr, "ssim": ssim });
        output::result(format, text, &record)?;
    }
    Ok(())
}

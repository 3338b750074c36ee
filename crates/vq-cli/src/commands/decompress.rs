//! `vq decompress`

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use clap::Args;
use serde_json::json;
use vq_model::{Codes, VqVae};
use vq_prior::compress::{Block, Codec, CompressError, CompressedReader};
use vq_train::{decode, model_hash, require_model, resolve_model};
use vq_viz::{save_png, tensor_to_image};

use super::compress::{images_at_once, progress};
use super::priors;
use crate::cli::LogFormat;
use crate::codes_file::CodesFile;
use crate::compute::{self, ComputeArgs};
use crate::error::{Error, Result};
use crate::{file, images, output};

/// Turn a file of `vq compress` back into images.
///
/// Writes every image as a PNG: `NAME_restored.png`, equal to the original in every pixel, from a lossless
/// file, and `NAME_decoded.png`, what the model makes of the codes, from others; and all codes as
/// `codes.safetensors`. What is damaged or decodes otherwise on this machine is an error, never a picture.
#[derive(Debug, Args)]
#[command(mut_arg("precision", |precision| precision.help(PRECISION)))]
pub(crate) struct DecompressArgs {
    /// A file that `vq compress` wrote.
    #[arg(value_name = "FILE")]
    from: PathBuf,

    /// The model that it was compressed with: a run's folder (its best checkpoint), a checkpoint's or a
    /// model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// The priors that it was compressed with, the top one first.
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    prior: Vec<PathBuf>,

    /// Where the PNGs and the codes go.
    #[arg(long, default_value = "decompressed", value_name = "FOLDER")]
    out: PathBuf,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// The help of `--precision`: the file's is the default.
const PRECISION: &str = "f32 or bf16: the format of the factors of the model's convolutions, which must be the one \
    that the file was compressed with; priors compute in f32 in any case [default: the file's]";

/// Seconds between lines of progress.
const PAUSE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &DecompressArgs, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let named = |error: CompressError| Error::other(format!("{}: {error}", args.from.display()));
    let open = || -> Result<_> {
        let file = File::open(&args.from).map_err(Error::read(&args.from))?;
        CompressedReader::new(BufReader::new(file)).map_err(named)
    };
    let mut reader = open()?;
    let head = reader.head().clone();
    let folder = resolve_model(&args.model)?;
    require_model(&folder)?;
    let hash = model_hash(&folder)?;
    head.require(&hash, &priors::hashes(&args.prior)?).map_err(named)?;
    // Before anything is written, and before hours of decoding.
    open()?.check().map_err(named)?;
    let precision = args.compute.precision.unwrap_or(head.precision);
    let mut compute = args.compute.clone();
    compute.precision = Some(precision);
    let model = compute.load(&folder, &device)?;
    let priors = priors::load_any(&args.prior, &model, &hash, &device)?;
    let codec = Codec::new(&model, &priors, head.lossless)?;
    let machine = compute::machine(&device, precision);

    let names: Vec<PathBuf> = if head.names.is_empty() {
        (0..head.images).map(|index| format!("{index:05}").into()).collect()
    } else {
        head.names.iter().map(PathBuf::from).collect()
    };
    let suffix = if head.lossless { "restored" } else { "decoded" };
    let paths = images::outputs(&args.out, names.iter().map(PathBuf::as_path), suffix);
    let (mut all, mut done) = (Vec::new(), 0);
    let (start, mut said) = (Instant::now(), Instant::now());
    while let Some(block) = reader.read(&codec, &machine).map_err(named)? {
        file::make_folder(&args.out)?;
        done += write(&model, &block, head.size, paths.get(done..).unwrap_or_default())?;
        all.push(block.codes);
        if said.elapsed() > PAUSE {
            said = Instant::now();
            progress("decompress", (done, head.images), start, format)?;
        }
    }
    let codes = args.out.join("codes.safetensors");
    let images = head.names.iter().map(PathBuf::from).collect();
    CodesFile { codes: Codes::concat(&all)?, images, precision, model: Some(hash) }
        .write(&codes)?;
    let text = format!("{}  {done} images, and {}", args.out.display(), codes.display());
    let record = json!({ "event": "decompressed", "path": output::path(&args.out), "images": done,
        "lossless": head.lossless, "codes": output::path(&codes) });
    output::result(format, text, &record)
}

/// Writes a block's images; how many.
fn write(model: &VqVae, block: &Block, size: [usize; 2], paths: &[PathBuf]) -> Result<usize> {
    let count = block.images()?;
    let at_once = images_at_once(model.config(), size);
    for (first, paths) in (0..count).step_by(at_once).zip(paths.chunks(at_once)) {
        let part = at_once.min(count - first);
        let images: Tensor = match &block.pixels {
            Some(pixels) => (pixels.narrow(0, first, part)?.to_dtype(DType::F32)? / 255.0)?,
            None => decode(model, &block.codes.narrow(first, part)?)?,
        };
        for (index, path) in (0..part).zip(paths) {
            save_png(&tensor_to_image(&images.get(index)?)?, path)?;
        }
    }
    Ok(count)
}

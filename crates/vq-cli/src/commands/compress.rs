//! `vq compress`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use clap::Args;
use serde_json::json;
use vq_data::Dataset;
use vq_model::{Codes, Config, VqVae};
use vq_prior::Prior;
use vq_prior::compress::{
    Block, BlockBits, Codec, CompressError, CompressedHead, CompressedWriter, IMAGES_PER_BLOCK,
};
use vq_train::{model_hash, resolve_model};

use super::encode::loader;
use super::priors;
use crate::cli::LogFormat;
use crate::compute::{self, ComputeArgs, MODEL_PRECISION};
use crate::data_args::{DATA_ARGS, DataArgs, Split, name_broken, open_for};
use crate::error::{Error, Result};
use crate::file::{Atomic, make_folder_of};
use crate::images::{self, ImageArgs};
use crate::output;

/// Turn images into one small file: their codes, entropy-coded, and with --lossless their pixels too.
///
/// `vq decompress` needs the same model and priors, and a machine that computes the same (it notices if not).
#[derive(Debug, Args)]
#[command(mut_arg("files", |files| files.required(false).required_unless_present("dataset")
    .conflicts_with_all(DATA_ARGS)))]
#[command(mut_arg("precision", |precision| precision.help(MODEL_PRECISION)))]
#[command(after_help = "Examples:
  vq compress a.png b.jpg --model results --prior results-prior --out images.vq
  vq compress --lossless a.png --model results --out images.vq
  vq compress --dataset test --lossless --model results --prior results-prior --out test.vq")]
pub(crate) struct CompressArgs {
    #[command(flatten)]
    images: ImageArgs,

    /// Compress this split of a data set and not image files; without --data, of that which the model's run
    /// was trained on.
    #[arg(long, value_enum, value_name = "SPLIT", conflicts_with_all = ["files", "size"])]
    dataset: Option<Split>,

    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// The priors that `vq train-prior` trained on the model's codes, one for each level, the top one first;
    /// without them every code takes log₂ K bits.
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    prior: Vec<PathBuf>,

    /// Keep every pixel: they are coded under the model's p(x|z), which needs a likelihood, as those of the
    /// recipe cifar10-likelihood. An image file that would have to be cut to the model's multiples, or that has
    /// transparency, more than 8 bits a channel or several pictures, is refused. Of --dataset the images are
    /// kept as the model gets them, which of a folder are scaled to its size.
    #[arg(long)]
    lossless: bool,

    /// The file to write.
    #[arg(long, default_value = "images.vq", value_name = "FILE")]
    out: PathBuf,

    #[command(flatten)]
    data: DataArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Seconds between lines of progress.
const PAUSE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &CompressArgs, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let folder = resolve_model(&args.model)?;
    let model = args.compute.load(&folder, &device)?;
    let hash = model_hash(&folder)?;
    let priors = priors::load_any(&args.prior, &model, &hash, &device)?;
    let codec = Codec::new(&model, &priors, args.lossless)?;
    let (dataset, names) = args.images(&folder, &model, format)?;
    let shape = dataset.shape();
    codec.check_size(shape.height, shape.width)?;
    let precision = args.compute.precision.unwrap_or_default();
    let head = CompressedHead {
        model: hash,
        priors: priors::hashes(&args.prior)?,
        machine: compute::machine(&device, precision),
        precision,
        lossless: args.lossless,
        size: [shape.height, shape.width],
        images: dataset.len(),
        names,
    };

    make_folder_of(&args.out)?;
    let file = Atomic::create(&args.out)?;
    let mut writer = CompressedWriter::new(file, head).map_err(|error| named(error, &args.out))?;
    let loader = loader(&model, dataset.clone(), IMAGES_PER_BLOCK)?;
    let (mut bits, mut done) = (BlockBits::default(), 0);
    let (start, mut said) = (Instant::now(), Instant::now());
    for batch in loader.epoch(0, 0) {
        let batch = batch.map_err(|error| args.name_lost(error.into()))?;
        let codes = encode(&model, &batch.images.to_device(&device)?)?;
        let labels = batch.labels.to_vec1::<u32>()?;
        let labels = priors
            .first()
            .map(Prior::config)
            .map(|config| config.labels_of(dataset.class_names(), &labels));
        let pixels = if args.lossless {
            Some(model.config().normalization.pixels(&batch.images)?)
        } else {
            None
        };
        let block = Block { labels: labels.unwrap_or_default(), codes, pixels };
        bits.add(&writer.write(&codec, &block).map_err(|error| named(error, &args.out))?);
        done += batch.indices.len();
        if said.elapsed() > PAUSE {
            said = Instant::now();
            progress("compress", (done, dataset.len()), start, format)?;
        }
    }
    name_broken(dataset.as_ref(), format)?;
    let (file, payload, overhead) = writer.finish().map_err(|error| named(error, &args.out))?;
    file.finish()?;
    report(&args.out, dataset.as_ref(), &bits, (payload, overhead), format)
}

/// With the name of the file that could not be written.
fn named(error: CompressError, path: &Path) -> Error {
    match error {
        CompressError::Io(cause) => Error::write(path)(cause),
        other => other.into(),
    }
}

/// The codes of a block, in parts that [`images_at_once`] bounds.
fn encode(model: &VqVae, images: &Tensor) -> Result<Codes> {
    let (count, _, height, width) = images.dims4()?;
    let at_once = images_at_once(model.config(), [height, width]);
    let mut parts = Vec::new();
    for first in (0..count).step_by(at_once) {
        let part = images.narrow(0, first, at_once.min(count - first))?.contiguous()?;
        parts.push(model.encode(&part)?);
    }
    Ok(Codes::concat(&parts)?)
}

/// How many of a block's images of that height and width run through the model at a time: as many as keep its
/// widest maps, which have `hidden` channels at half the size, within 2^26 values (256 MiB).
pub(super) fn images_at_once(config: &Config, [height, width]: [usize; 2]) -> usize {
    let hidden = config.levels.first().map_or(1, |level| level.hidden);
    ((1 << 26) / (height * width * hidden / 4).max(1)).clamp(1, IMAGES_PER_BLOCK)
}

impl CompressArgs {
    /// The images, and their names where they have any.
    fn images(
        &self,
        folder: &Path,
        model: &VqVae,
        format: LogFormat,
    ) -> Result<(Arc<dyn Dataset>, Vec<String>)> {
        let Some(split) = self.dataset else {
            let pictures = if self.lossless {
                self.images.load_exact(model.config())?
            } else {
                self.images.load(model.config(), format)?
            };
            let name = |path: &PathBuf| path.to_string_lossy().into_owned();
            let names = pictures.iter().map(|picture| name(&picture.path)).collect();
            return Ok((images::dataset(&pictures)?, names));
        };
        let data = if self.lossless { self.data.refusing_broken()? } else { self.data.clone() };
        let splits =
            open_for(model, folder, &data, format).map_err(|error| self.name_lost(error))?;
        Ok((split.of(&splits).clone(), Vec::new()))
    }

    /// What to do about a file of a data set that cannot be decoded, where no other image may take its place.
    fn name_lost(&self, error: Error) -> Error {
        use vq_data::Error::{BrokenFiles, Image};
        let data = match &error {
            Error::Data(data) | Error::Train(vq_train::Error::Data(data)) if self.lossless => data,
            _ => return error,
        };
        let (path, reason, others) = match data {
            Image { path, reason } => (path, reason, 0),
            BrokenFiles { first, reason, count, .. } => (first, reason, count.saturating_sub(1)),
            _ => return error,
        };
        let others = if others > 0 { format!(" and {others} other files") } else { String::new() };
        Error::other(format!(
            "cannot decode {} ({reason}){others}, and --lossless keeps every image: mend or remove such files, or \
             leave out --lossless, without which other images take their places",
            path.display()
        ))
    }
}

/// How far a command is, and how fast.
pub(super) fn progress(
    command: &str,
    (done, images): (usize, usize),
    start: Instant,
    format: LogFormat,
) -> Result<()> {
    let speed = done as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let left = output::duration((images - done) as f64 / speed.max(1e-9));
    let digits = usize::from(speed < 10.0);
    let text = format!("{command}  {done}/{images}  {speed:.digits$} images/s  {left} left");
    let record = json!({ "event": "progress", "command": command, "images": done, "of": images,
        "images_per_second": speed });
    output::result(format, text, &record)
}

fn report(
    out: &Path,
    dataset: &dyn Dataset,
    bits: &BlockBits,
    (payload, overhead): (u64, u64),
    format: LogFormat,
) -> Result<()> {
    let images = dataset.len();
    let dimensions = (images * dataset.shape().pixels()) as f64;
    let total = payload + overhead;
    let mut terms = Vec::new();
    for (level, bits) in bits.levels.iter().enumerate() {
        terms.push(format!("{bits:.0} for the codes of level {level}"));
    }
    if bits.labels > 0.0 {
        terms.push(format!("{:.0} for labels", bits.labels));
    }
    if bits.pixels > 0.0 {
        terms.push(format!("{:.0} for pixels", bits.pixels));
    }
    let text = format!(
        "{}  {images} images of {}, {total} bytes, {:.4} bits per dimension\n  computed  {:.0} bits: {}\n  written   \
         {} bits ({:+.3}%), and {overhead} bytes of head and checksums",
        out.display(),
        dataset.name(),
        total as f64 * 8.0 / dimensions,
        bits.total(),
        terms.join(", "),
        payload * 8,
        ((payload * 8) as f64 / bits.total().max(f64::MIN_POSITIVE) - 1.0) * 100.0
    );
    let record = json!({ "event": "compressed", "path": output::path(out), "images": images, "data": dataset.name(),
        "bytes": total, "payload_bytes": payload, "overhead_bytes": overhead,
        "computed_bits": bits.total(), "computed_bits_labels": bits.labels,
        "computed_bits_levels": bits.levels, "computed_bits_pixels": bits.pixels,
        "bits_per_dim": total as f64 * 8.0 / dimensions });
    output::result(format, text, &record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_images_go_one_by_one() {
        let mut config = Config::default();
        let mut at_once = |hidden: usize, side: usize| {
            config.levels[0].hidden = hidden;
            images_at_once(&config, [side, side])
        };
        assert_eq!([32, 256, 1024, 8192].map(|side| at_once(128, side)), [64, 32, 2, 1]);
        assert_eq!(at_once(4, 1024), 64);
    }
}

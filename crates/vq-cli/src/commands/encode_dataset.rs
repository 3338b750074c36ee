//! `vq encode --dataset`: the codes of a whole split, for training priors.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vq_data::{CODES_FORMAT_VERSION, CODES_ORDER, CodesLevel, CodesManifest, CodesWriter, Dataset};
use vq_model::{Config, Precision, VqVae};
use vq_train::{model_hash, resolve_model};

use super::encode::{BATCH, EncodeArgs, loader};
use crate::cli::LogFormat;
use crate::data_args::{Split, name_broken, open_for};
use crate::error::Result;
use crate::output;

/// Seconds between lines of progress.
const PAUSE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &EncodeArgs, split: Split, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let folder = resolve_model(&args.model)?;
    let model = args.compute.load(&folder, &device)?;
    let splits = open_for(&model, &folder, &args.data, format)?;
    let dataset = split.of(&splits);
    let out = args.out.as_deref().unwrap_or(Path::new("codes"));
    let mut manifest =
        manifest(model_hash(&folder)?, model.config(), dataset.as_ref(), split, args.shard_images)?;
    manifest.precision = args.compute.precision.unwrap_or_default().to_string();
    let bytes = manifest.bytes();
    let mut writer = CodesWriter::open(out, manifest)?;
    let first = writer.next_image();
    if first > 0 {
        let text = format!("{first} images are encoded already: going on after them");
        output::note(format, &text)?;
    }

    let loader = loader(&model, dataset.clone(), BATCH)?;
    let (start, mut said) = (Instant::now(), Instant::now());
    let batches = if first < dataset.len() { Some(loader.epoch(0, first / BATCH)) } else { None };
    for batch in batches.into_iter().flatten() {
        let batch = batch?;
        let codes = model.encode(&batch.images.to_device(&device)?)?;
        let labels = batch.labels.to_vec1::<u32>()?;
        let mut levels = Vec::new();
        for level in &codes.levels {
            levels.push(level.flatten_from(1)?.to_vec2::<u32>()?);
        }
        for (row, (index, label)) in batch.indices.iter().zip(labels).enumerate() {
            // The first batch may begin before what is missing.
            if *index >= first {
                let codes: Vec<&[u32]> =
                    levels.iter().filter_map(|level| level.get(row)).map(Vec::as_slice).collect();
                writer.push(label, &codes)?;
            }
        }
        if said.elapsed() > PAUSE {
            said = Instant::now();
            progress(&writer, dataset.len(), (first, start), format)?;
        }
    }
    writer.finish()?;
    name_broken(dataset.as_ref(), format)?;
    report(&model, out, dataset.as_ref(), bytes, format)
}

fn manifest(
    model: String,
    config: &Config,
    dataset: &dyn Dataset,
    split: Split,
    images_per_shard: usize,
) -> Result<CodesManifest> {
    let [height, width] = config.image_size;
    let grids = config.grids(height, width)?.into_iter().zip(&config.levels);
    let levels = grids.map(|(grid, level)| CodesLevel {
        grid,
        codebook_sizes: vec![level.quantizer.codebook_size; level.quantizer.codes_per_position()],
    });
    Ok(CodesManifest {
        format_version: CODES_FORMAT_VERSION,
        model,
        precision: Precision::default().to_string(),
        normalization: vq_data::Normalization {
            mean: config.normalization.mean.clone(),
            std: config.normalization.std.clone(),
        },
        dataset: dataset.name().to_owned(),
        split: split.name().to_owned(),
        order: CODES_ORDER.to_owned(),
        images: dataset.len(),
        images_per_shard,
        class_names: dataset.class_names().to_vec(),
        levels: levels.collect(),
    })
}

fn progress(
    writer: &CodesWriter,
    images: usize,
    (first, start): (usize, Instant),
    format: LogFormat,
) -> Result<()> {
    let done = writer.next_image();
    let speed = (done - first) as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let left = output::duration((images - done) as f64 / speed.max(1e-9));
    let text = format!("encode  {done}/{images}  {speed:.0} images/s  {left} left");
    let record =
        json!({ "event": "encoding", "images": done, "of": images, "images_per_second": speed });
    output::result(format, text, &record)
}

fn report(
    model: &VqVae,
    out: &Path,
    dataset: &dyn Dataset,
    bytes: u64,
    format: LogFormat,
) -> Result<()> {
    let images = dataset.len();
    let text = format!(
        "{}  codes of {images} images of {}, {} bits each, {}B",
        out.display(),
        dataset.name(),
        output::bits(model.config().bits_per_image()),
        output::count(bytes)
    );
    let record = json!({ "event": "encoded", "path": output::path(out), "images": images, "data": dataset.name(),
        "bytes": bytes });
    output::result(format, text, &record)
}

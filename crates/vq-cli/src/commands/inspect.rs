//! `vq inspect`

use std::path::PathBuf;

use candle_core::Device;
use clap::Args;
use serde_json::{Value, json};
use vq_model::{CodebookGeometry, QuantizerConfig, QuantizerKind, VqVae};
use vq_train::{
    Advice, EpochRecord, Metrics, Progress, TRAINING_FILE, TrainConfig, doctor, is_prior,
    read_progress, resolve_model,
};

use super::inspect_prior;
use crate::cli::LogFormat;
use crate::data_args::trained_with;
use crate::error::Result;
use crate::output;

/// Show what is in a checkpoint: architecture, size, normalisation, codebooks and their use, training
/// state, and what could be better about the codebooks.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A run's folder (its best checkpoint), a checkpoint's (RUN/last) or a model's; of a model or a prior.
    #[arg(default_value = "results", value_name = "FOLDER")]
    model: PathBuf,
}

pub(crate) fn run(args: &InspectArgs, format: LogFormat) -> Result<()> {
    let folder = resolve_model(&args.model)?;
    let progress =
        if folder.join(TRAINING_FILE).is_file() { Some(read_progress(&folder)?) } else { None };
    if is_prior(&folder) {
        return inspect_prior::run(&folder, progress.as_ref(), format);
    }
    let model = VqVae::from_pretrained(&folder, &Device::Cpu)?;
    let codebooks = codebooks(&model)?;
    let train = trained_with(&folder).ok().flatten().map(|recipe| recipe.train).unwrap_or_default();
    let advice = advice(&model, &train, progress.as_ref())?;
    if format == LogFormat::Json {
        let lists = codebooks.iter().map(|level| level.iter().map(geometry).collect());
        return output::line(json!({
            "event": "inspected",
            "path": output::path(&folder),
            "config": model.config(),
            "parameters": count(model.parameters()),
            "buffers": count(model.buffers()),
            "multiply_adds": model.multiply_adds()?,
            "bits_per_image": model.config().bits_per_image(),
            "codebooks": lists.collect::<Vec<Vec<Value>>>(),
            "advice": advice.iter().map(|advice| &advice.message).collect::<Vec<_>>(),
            "training": progress.as_ref().map(state),
        }));
    }
    output::line(format!("{}\n", folder.display()))?;
    describe(&model)?;
    describe_codebooks(&codebooks)?;
    match &progress {
        Some(progress) => training(progress)?,
        None => output::line("training      no training state: a model to use, not to resume")?,
    }
    advice.iter().try_for_each(|advice| output::line(format!("advice        {}", advice.message)))
}

/// Of every level, of every codebook.
fn codebooks(model: &VqVae) -> Result<Vec<Vec<CodebookGeometry>>> {
    let level = |level: usize| -> Result<Vec<CodebookGeometry>> {
        let codebooks = model.quantizer(level)?.codebooks()?;
        Ok(codebooks.iter().map(CodebookGeometry::of).collect::<vq_model::Result<_>>()?)
    };
    (0..model.config().levels.len()).map(level).collect()
}

fn describe_codebooks(levels: &[Vec<CodebookGeometry>]) -> Result<()> {
    for (level, codebooks) in levels.iter().enumerate() {
        for (index, codebook) in codebooks.iter().enumerate() {
            let name =
                if codebooks.len() > 1 { format!("{level}.{index}") } else { level.to_string() };
            let CodebookGeometry { norms, nearest, spread, duplicates, compared, codes } = codebook;
            let part =
                if compared < codes { format!(" ({compared} compared)") } else { String::new() };
            output::line(format!(
                "codebook {name:<4} lengths {:.3} to {:.3}, spread {spread:.3}; nearest other code at \
                 {:.3} to {:.3}, mean {:.3}; {duplicates} duplicates{part}",
                norms.least, norms.greatest, nearest.least, nearest.greatest, nearest.mean
            ))?;
        }
    }
    Ok(())
}

fn geometry(codebook: &CodebookGeometry) -> Value {
    let range = |range: vq_model::Range| json!([range.least, range.mean, range.greatest]);
    json!({
        "codes": codebook.codes,
        "norms": range(codebook.norms),
        "spread": codebook.spread,
        "nearest": range(codebook.nearest),
        "duplicates": codebook.duplicates,
        "compared": codebook.compared,
    })
}

/// By the last epoch's figures, and the codebooks as they are now.
fn advice(model: &VqVae, train: &TrainConfig, progress: Option<&Progress>) -> Result<Vec<Advice>> {
    let last = progress.and_then(|progress| progress.history.last());
    let mut record = last.cloned().unwrap_or(EpochRecord {
        epoch: 0,
        step: 0,
        train: Metrics::new(),
        test: None,
    });
    for level in 0..model.config().levels.len() {
        let codebooks = model.quantizer(level)?.codebooks()?;
        doctor::codebook_metrics(&mut record.train, level, &codebooks, None)?;
    }
    let is_late = doctor::is_late(record.epoch, train.epochs);
    Ok(doctor::advise(model.config(), train, &record, is_late))
}

pub(super) fn count(vars: &std::collections::BTreeMap<String, candle_core::Var>) -> usize {
    vars.values().map(|var| var.elem_count()).sum()
}

fn describe(model: &VqVae) -> Result<()> {
    let config = model.config();
    let [height, width] = config.image_size;
    output::line(format!(
        "images        {width}×{height} of {} channels, or any multiple of {}",
        config.channels,
        config.downsampling()
    ))?;
    let normalization = &config.normalization;
    output::line(format!(
        "normalised    (pixel − mean) / std, mean {:?}, std {:?}",
        normalization.mean, normalization.std
    ))?;
    for (index, (level, [h, w])) in
        config.levels.iter().zip(config.grids(height, width)?).enumerate()
    {
        let quantizer = &level.quantizer;
        output::line(format!("level {index}       {h}×{w} {}", codes(quantizer)))?;
        output::line(format!(
            "              downsampling {}, {} hidden channels, {} residual blocks of {}",
            level.downsample, level.hidden, level.residual_blocks, level.residual_hidden
        ))?;
    }
    output::line(format!("code          {} bits an image", output::bits(config.bits_per_image())))?;
    output::line(format!(
        "parameters    {} trained, {} kept beside them",
        count(model.parameters()),
        count(model.buffers())
    ))?;
    output::line(format!(
        "work          {} multiply-adds an image, forward",
        output::count(model.multiply_adds()?)
    ))?;
    match &config.class_names[..] {
        [] => Ok(()),
        names => output::line(format!("classes       {}", names.join(", "))),
    }
}

/// What a level's codes are, e.g. `codes out of K = 512, D = 64, rule ema, straight-through`.
fn codes(quantizer: &QuantizerConfig) -> String {
    let kind = quantizer.kind;
    let each = match quantizer.codes_per_position() {
        1 => "codes".to_owned(),
        count => format!("times {count} codes"),
    };
    let mut parts =
        vec![format!("{each} out of K = {}, D = {}", quantizer.codebook_size, quantizer.dim)];
    if kind.has_key("rule") {
        parts.push(format!("rule {}", text(&json!(quantizer.rule))));
    }
    if kind.has_key("gradient_estimator") {
        parts.push(text(&json!(quantizer.gradient_estimator)));
    }
    if kind.has_key("levels") {
        parts.push(format!("levels {:?}", quantizer.levels));
    }
    if kind != QuantizerKind::Vector {
        parts.push(format!("kind {}", kind.name()));
    }
    parts.join(", ")
}

pub(super) fn training(progress: &Progress) -> Result<()> {
    output::line(format!(
        "training      step {}: {} epochs and {} of {} batches done, seed {}",
        progress.step, progress.epoch, progress.batch, progress.batches_per_epoch, progress.seed
    ))?;
    if let Some(best) = &progress.best {
        // Judged by a likelihood, or by PSNR.
        let score = match best.score {
            score if score < 0.0 => format!("{:.3} bits", -score),
            score => format!("{score:.3} dB"),
        };
        output::line(format!("best          {score} after epoch {}", best.epoch))?;
    }
    let Some(record) = progress.history.last() else { return Ok(()) };
    for (name, metrics) in [("train", Some(&record.train)), ("test", record.test.as_ref())] {
        let Some(metrics) = metrics else { continue };
        let figures: Vec<String> =
            metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        output::line(format!("epoch {:<7} {name}: {}", record.epoch, figures.join(", ")))?;
    }
    Ok(())
}

pub(super) fn state(progress: &Progress) -> Value {
    json!({
        "step": progress.step,
        "epoch": progress.epoch,
        "batch": progress.batch,
        "batches_per_epoch": progress.batches_per_epoch,
        "seed": progress.seed,
        "best": progress.best,
        "last_epoch": progress.history.last(),
    })
}

/// A JSON string without its quotes.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

//! `vq eval`

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value};
use vq_data::pixel_variance;
use vq_train::{
    EvaluateOptions, Evaluation, bits_per_dim, evaluate, is_prior, model_hash, resolve_model,
};

use super::{eval_prior, priors};
use crate::cli::LogFormat;
use crate::compute::{ComputeArgs, MODEL_PRECISION};
use crate::data_args::{DataArgs, Split, name_broken, open_for};
use crate::error::{Error, Result};
use crate::observers::{save_samples, save_usage};
use crate::{file, output};

/// Judge a model on a data set: MSE, PSNR, SSIM, perplexity, codes in use. Or a prior on codes: nats and bits
/// per code.
///
/// Without --data, on the data that the model's run was trained on. A prior is judged on codes, so that of the
/// flags --codes, --batch-size, --device and --threads go with it. It is compared with the frequencies of the codes
/// that it learned, which are stored with it.
#[derive(Debug, Args)]
#[command(mut_arg("precision", |precision| precision.help(MODEL_PRECISION)))]
pub(crate) struct EvalArgs {
    /// The model, or a prior: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// Which split to judge a model on [default: test].
    #[arg(long, value_enum)]
    split: Option<Split>,

    /// Images at a time; does not change the figures.
    #[arg(long, alias = "batch_size", default_value_t = 128, value_name = "N")]
    batch_size: usize,

    /// Also write `eval_orig.png`, `eval_recon.png` and `eval_codebook.svg` there; with several levels of
    /// codes also `eval_recon_level0.png`, … (from each level alone, 0 = bottom) and `eval_codebook.1.svg`, ….
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,

    /// Of a prior: the codes to judge it on, a folder that `vq encode --dataset` wrote [default: those that
    /// its run held out]. With it neither the run's folder nor the codes that the prior learned are needed.
    #[arg(long, value_name = "FOLDER")]
    codes: Option<PathBuf>,

    /// Count the bits: −log₂ p(x|z) of the pixels and −log₂ p(z) of all codes, over the dimensions of an
    /// image. The model needs a likelihood, as those of the recipe cifar10-likelihood.
    #[arg(long)]
    bits_per_dim: bool,

    /// The priors to count the codes under, one for each level of the model, the top one first; without
    /// them log₂ K a code.
    #[arg(long, num_args = 1.., value_name = "FOLDER", requires = "bits_per_dim")]
    prior: Vec<PathBuf>,

    #[command(flatten)]
    data: DataArgs,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// Images in the pictures.
const SAMPLES: usize = 64;

pub(crate) fn run(args: &EvalArgs, format: LogFormat) -> Result<()> {
    let folder = resolve_model(&args.model)?;
    let is_prior = is_prior(&folder);
    if is_prior {
        args.check_for_prior(&folder)?;
    }
    let device = args.compute.start()?;
    if is_prior {
        let (codes, batch_size) = (args.codes.as_deref(), args.batch_size);
        return eval_prior::run(&folder, codes, batch_size, &device, format);
    }
    if args.codes.is_some() {
        return Err(Error::other("--codes is for judging a prior, and --model is none"));
    }
    let model = args.compute.load(&folder, &device)?;
    let splits = open_for(&model, &folder, &args.data, format)?;
    let dataset = args.split.unwrap_or(Split::Test).of(&splits);
    let priors = priors::load_any(&args.prior, &model, &model_hash(&folder)?, &device)?;
    if args.bits_per_dim && model.config().pixel_distribution().is_none() {
        return Err(vq_model::Error::NoLikelihood.into());
    }
    let options = EvaluateOptions {
        batch_size: args.batch_size,
        variance: pixel_variance(splits.train.as_ref())?,
        samples: SAMPLES,
        stop: None,
    };
    let evaluation = evaluate(&model, dataset, options)?
        .ok_or_else(|| Error::other("the evaluation was stopped"))?;
    name_broken(dataset.as_ref(), format)?;
    if let Some(out) = &args.out {
        pictures(out, &evaluation)?;
    }
    let mut record = Map::new();
    record.insert("event".into(), "evaluated".into());
    record.insert("model".into(), output::path(&folder).into());
    record.insert("data".into(), dataset.name().into());
    record.insert("images".into(), dataset.len().into());
    let mut text = format!("{} on {} ({} images)", folder.display(), dataset.name(), dataset.len());
    for (name, value) in evaluation.metrics.iter() {
        record.insert(name.into(), value.into());
        let _ = write!(text, "\n  {name:14} {value:.6}");
    }
    if args.bits_per_dim {
        let bits = bits_per_dim(&model, &priors, dataset, args.batch_size, None)?
            .ok_or_else(|| Error::other("the evaluation was stopped"))?;
        for (name, value) in bits.metrics().iter() {
            record.insert(name.into(), value.into());
            let _ = write!(text, "\n  {name:20} {value:.6}");
        }
        record.insert("bits_per_image".into(), bits.total().into());
        record.insert("has_priors".into(), bits.has_priors.into());
        let codes = if bits.has_priors {
            "codes under the prior"
        } else {
            "all codes as equally probable, log2 K each (--prior counts them under a prior)"
        };
        let _ = write!(
            text,
            "\n  {:.1} bits an image of {} dimensions; {codes}",
            bits.total(),
            bits.dimensions
        );
    }
    output::result(format, text, &Value::Object(record))
}

impl EvalArgs {
    /// Refuses what has no meaning for the prior in `folder`, which is judged on codes.
    fn check_for_prior(&self, folder: &Path) -> Result<()> {
        let folder = folder.display();
        if self.bits_per_dim {
            return Err(Error::other(format!(
                "{folder} is a prior: give the model (--model) and the prior beside it (--prior)"
            )));
        }
        let flags = [
            ("--split", self.split.is_some()),
            ("--out", self.out.is_some()),
            ("--precision", self.compute.precision.is_some()),
        ];
        let flag = flags.iter().find(|(_, is_given)| *is_given).map(|(flag, _)| *flag);
        match flag.or(self.data.given()) {
            None => Ok(()),
            Some(flag) => Err(Error::other(format!(
                "{folder} is a prior, which is judged on codes (--codes, or those that its run held out): \
                 {flag} is for judging a model, leave it out"
            ))),
        }
    }
}

fn pictures(out: &Path, evaluation: &Evaluation) -> Result<()> {
    file::make_folder(out)?;
    if let Some(samples) = &evaluation.samples {
        save_samples(out, "eval", samples)?;
    }
    for (level, usage) in evaluation.usage.iter().enumerate() {
        let (file, title) = match level {
            0 => ("eval_codebook".to_owned(), "Codebook usage".to_owned()),
            _ => (format!("eval_codebook.{level}"), format!("Codebook usage, level {level}")),
        };
        save_usage(&out.join(file), &title, usage)?;
    }
    Ok(())
}

//! `vq sample`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use clap::Args;
use serde_json::json;
use vq_model::{Codes, Stream};
use vq_prior::{Completion, Conditions, Prior, SampleOptions};
use vq_train::{decode, model_hash, resolve_model};
use vq_viz::{image_grid, save_png, tensor_to_image};

use super::compress::progress;
use super::priors;
use super::sample_folder::SampleFolder;
use super::sample_keep::{Keep, given};
use crate::cli::LogFormat;
use crate::compute::ComputeArgs;
use crate::error::{Error, Result};
use crate::observers::{GRID_COLUMNS, GRID_PADDING, class_columns};
use crate::output;

/// Draw new images: codes from a prior, decoded by the model.
///
/// Writes every image by itself, `00000.png` and so on, as it is finished, and `grid.png`, in which the classes of a
/// prior with up to 16 of them stand in a column each. The same seed draws the same images.
///
/// Of an earlier run in the same folder, which its `grid.png` tells, all images are removed first. Images of such
/// names without a `grid.png` are refused, unless --overwrite is given.
#[derive(Debug, Args)]
#[command(mut_arg("precision", |precision| precision.help(PRECISION)))]
#[command(after_help = "Examples:
  vq sample --model results --prior results-prior --count 40 --out samples
  vq sample --model results --prior results-prior --class heart --guidance 2
  vq sample --model results --prior top middle bottom     a model of three levels
  vq sample --model results --prior results-prior --complete image.png --keep top-half")]
pub(crate) struct SampleArgs {
    /// The model: a run's folder (its best checkpoint), a checkpoint's or a model's.
    #[arg(long, default_value = "results", value_name = "FOLDER")]
    model: PathBuf,

    /// The prior that `vq train-prior` trained on the model's codes; of a model with several levels one for
    /// each, the top one first.
    #[arg(long, default_value = "results-prior", num_args = 1.., value_name = "FOLDER")]
    prior: Vec<PathBuf>,

    /// Images to draw.
    #[arg(long, default_value_t = 40, value_name = "N")]
    count: usize,

    /// Draw images of this class: its name or number, or `none` for no class in particular [default: all
    /// classes in turn, or with --complete none].
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,

    /// Below 1 the more probable codes are preferred; 0 takes the most probable one each time.
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    temperature: f64,

    /// Draw from the K most probable codes only; 0 = from all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,

    /// Draw from the fewest codes whose probabilities add up to P only; 1 = from all.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,

    /// Above 1, stress what tells the class from the others (classifier-free guidance); twice the work. The
    /// prior must have been trained with some of its labels dropped (`prior.label_dropout`).
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    guidance: f64,

    /// Decides what is drawn.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,

    /// Complete this image instead of drawing whole ones. Of the kept part the codes are kept: what is
    /// written is what the model makes of them. The encoder sees the whole image, so that kept codes next to
    /// the other part may tell a little of what stood there.
    #[arg(long, value_name = "IMAGE", requires = "keep")]
    complete: Option<PathBuf>,

    /// What of the image to keep, in whole codes: a part that is none or all of them at any level is refused.
    /// Codes are drawn row by row, and each given those before it: what is kept below or to the right does not
    /// tell of itself.
    #[arg(long, value_enum, value_name = "PART", requires = "complete")]
    keep: Option<Keep>,

    /// Where the PNGs go.
    #[arg(long, default_value = "samples", value_name = "FOLDER")]
    out: PathBuf,

    /// Replace images of such names in --out, whoever made them.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// What `--precision` reaches.
const PRECISION: &str = "f32 or bf16: the format of the factors of the convolutions of the tokenizer that decodes \
    pictures (and encodes that of --complete); priors compute in f32 in any case [default: f32]";

/// Images that are drawn at a time; memory, not the result, depends on it.
const BATCH: usize = 64;
/// Seconds between lines of progress.
const PAUSE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &SampleArgs, format: LogFormat) -> Result<()> {
    args.options(0, 0).validate()?;
    if args.count == 0 {
        return Err(Error::other("there is nothing to draw: --count must be at least 1"));
    }
    let out = SampleFolder::new(&args.out, args.overwrite)?;
    let device = args.compute.start()?;
    let folder = resolve_model(&args.model)?;
    let model = args.compute.load(&folder, &device)?;
    let hash = model_hash(&folder)?;
    let priors = priors::load(&args.prior, &model, &hash, &device)?;
    let labels = args.labels(&priors)?;
    args.check_guidance(&priors)?;
    let given = match (&args.complete, args.keep) {
        (Some(path), Some(keep)) => {
            keep.check(&priors)?;
            Some((given(path, &model, &device)?, keep))
        }
        _ => None,
    };
    let columns = match priors.first() {
        Some(prior) if args.class.is_none() && given.is_none() => {
            class_columns(prior.config().class_count)
        }
        _ => GRID_COLUMNS,
    };
    let grid = |images: &Tensor| -> Result<()> {
        Ok(save_png(&image_grid(images, columns, GRID_PADDING)?, &out.grid())?)
    };
    out.start()?;
    let mut all = Vec::new();
    let (start, mut said) = (Instant::now(), Instant::now());
    for first in (0..args.count).step_by(BATCH) {
        let count = BATCH.min(args.count - first);
        let labels = labels.as_ref().and_then(|labels| labels.get(first..first + count));
        let codes = args.draw(&priors, first, count, labels, given.as_ref())?;
        let images = decode(&model, &codes)?;
        for index in 0..count {
            save_png(&tensor_to_image(&images.get(index)?)?, &out.image(first + index))?;
        }
        if first == 0 && count < args.count {
            // Something to look at, and what tells the next run whose images these are.
            grid(&images)?;
        }
        all.push(images);
        if said.elapsed() > PAUSE {
            said = Instant::now();
            progress("sample", (first + count, args.count), start, format)?;
        }
    }
    grid(&Tensor::cat(&all, 0)?)?;
    let text = format!("{}  {} images", out.grid().display(), args.count);
    let record = json!({ "event": "sampled", "path": output::path(out.grid()), "images": args.count, "labels": labels,
        "seed": args.seed });
    output::result(format, text, &record)
}

impl SampleArgs {
    /// The label of every image; nothing for priors without classes.
    fn labels(&self, priors: &[Prior]) -> Result<Option<Vec<u32>>> {
        let Some(config) = priors.first().map(Prior::config) else { return Ok(None) };
        let classes = config.class_count;
        if classes == 0 {
            return match &self.class {
                None => Ok(None),
                Some(_) => Err(Error::other(
                    "the prior was trained without classes: leave out --class, or train one on codes of a data \
                     set with classes",
                )),
            };
        }
        let label = match self.class.as_deref() {
            None if self.complete.is_none() => {
                return Ok(Some((0..self.count).map(|image| (image % classes) as u32).collect()));
            }
            // Nothing says of which class the given image is.
            None => classes,
            Some(name) => {
                let named = config.class_names.iter().position(|class| class == name);
                let numbered = || name.parse().ok().filter(|&number: &usize| number < classes);
                let none = || (name == "none").then_some(classes);
                named.or_else(numbered).or_else(none).ok_or_else(|| {
                    Error::other(format!(
                        "there is no class `{name}`: use none, 0 to {}, or one of {}",
                        classes - 1,
                        config.class_names.join(", ")
                    ))
                })?
            }
        };
        if label == classes && !drops_labels(priors) {
            return Err(Error::other(
                "the prior was trained with prior.label_dropout = 0 and has not learned to draw without a class: \
                 say which (--class)",
            ));
        }
        Ok(Some(vec![label as u32; self.count]))
    }

    /// Guidance needs what the prior gives without a class.
    fn check_guidance(&self, priors: &[Prior]) -> Result<()> {
        if (self.guidance - 1.0).abs() <= 0.0 {
            return Ok(());
        }
        let problem = if priors.iter().any(|prior| prior.config().class_count == 0) {
            "the prior was trained without classes: leave out --guidance"
        } else if !drops_labels(priors) {
            "the prior was trained with prior.label_dropout = 0 and has not learned to draw without a class, which \
             guidance compares with: leave out --guidance, or train a prior with label_dropout = 0.1"
        } else {
            return Ok(());
        };
        Err(Error::other(problem))
    }

    /// For images from number `first` on, at the level `index` from the top.
    fn options(&self, index: usize, first: usize) -> SampleOptions {
        SampleOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            guidance: self.guidance,
            // What is drawn at one level must not echo what was drawn at another.
            seed: match index {
                0 => self.seed,
                index => Stream::new(self.seed, "sample.level", index as u64).next_seed(),
            },
            first_image: first as u64,
            recompute: false,
        }
    }

    /// The codes of `count` images from number `first` on: level by level, from the top.
    fn draw(
        &self,
        priors: &[Prior],
        first: usize,
        count: usize,
        labels: Option<&[u32]>,
        given: Option<&(Codes, Keep)>,
    ) -> Result<Codes> {
        let labels = match labels {
            Some(labels) => Some(Tensor::from_slice(labels, count, &Device::Cpu)?),
            None => None,
        };
        let mut levels: Vec<Tensor> = Vec::new();
        for (index, prior) in priors.iter().enumerate() {
            let conditions = Conditions { labels: labels.as_ref(), conditioning: &levels };
            let options = self.options(index, first);
            let mut parts = None;
            if let Some((codes, keep)) = given
                && let Some(codes) = codes.levels.get(priors.len() - 1 - index)
            {
                let mut shape = codes.dims().to_vec();
                if let Some(images) = shape.first_mut() {
                    *images = count;
                }
                let codes = codes.broadcast_as(shape)?.contiguous()?;
                parts = Some((codes, keep.mask(prior.config().grid)?));
            }
            let completion = parts.as_ref().map(|(codes, mask)| Completion { codes, mask });
            let drawn = prior.sample(count, &conditions, &options, completion.as_ref())?;
            levels.insert(0, drawn.to_device(&Device::Cpu)?);
        }
        Ok(Codes { levels })
    }
}

/// Whether all priors were trained without a class now and then.
fn drops_labels(priors: &[Prior]) -> bool {
    priors.iter().all(|prior| prior.config().label_dropout > 0.0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use vq_prior::Config;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(more: &[&str]) -> SampleArgs {
        let args = ["vq", "sample"].iter().chain(more);
        match Cli::try_parse_from(args).unwrap().command {
            Command::Sample(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn prior(class_count: usize) -> Prior {
        let mut config =
            Config { grid: [4, 2], codebook_sizes: vec![50], class_count, ..Config::default() };
        if class_count > 0 {
            config.class_names = (0..class_count).map(|class| format!("class {class}")).collect();
        }
        Prior::new(&config, 0, &Device::Cpu).unwrap()
    }

    #[test]
    fn what_is_given_is_kept_in_every_image() {
        let codes = Tensor::arange(0u32, 8, &Device::Cpu).unwrap().reshape((1, 4, 2)).unwrap();
        let given = (Codes { levels: vec![codes] }, Keep::TopHalf);
        let drawn = args(&[]).draw(&[prior(0)], 0, 3, None, Some(&given)).unwrap();
        let images = drawn.levels[0].flatten_from(1).unwrap().to_vec2::<u32>().unwrap();
        for image in &images {
            assert_eq!(image[..4], [0, 1, 2, 3]);
        }
        assert!(images[0] != images[1] && images[1] != images[2], "{images:?}");
    }

    #[test]
    fn classes_go_by_name_by_number_and_in_turn() {
        let labels = |prior: &Prior, more: &[&str]| {
            let mut all = vec!["--count=5"];
            all.extend(more);
            args(&all).labels(std::slice::from_ref(prior))
        };
        let three = prior(3);
        assert_eq!(labels(&three, &[]).unwrap().unwrap(), [0, 1, 2, 0, 1]);
        assert_eq!(labels(&three, &["--class=class 2"]).unwrap().unwrap(), [2; 5]);
        assert_eq!(labels(&three, &["--class=1"]).unwrap().unwrap(), [1; 5]);
        assert_eq!(labels(&three, &["--class=none"]).unwrap().unwrap(), [3; 5]);
        assert!(labels(&three, &["--class=3"]).unwrap_err().to_string().contains("class 0"));
        assert_eq!(labels(&prior(0), &[]).unwrap(), None);
        assert!(
            labels(&prior(0), &["--class=1"]).unwrap_err().to_string().contains("without classes")
        );
    }

    #[test]
    fn completion_tells_no_class() {
        let three = [prior(3)];
        let complete = ["--complete=a.png", "--keep=top-half", "--count=2"];
        assert_eq!(args(&complete).labels(&three).unwrap().unwrap(), [3; 2]);
        let of_one = [&complete[..], &["--class=1"]].concat();
        assert_eq!(args(&of_one).labels(&three).unwrap().unwrap(), [1; 2]);
        assert_eq!(args(&complete).labels(&[prior(0)]).unwrap(), None);
    }

    #[test]
    fn priors_that_never_missed_a_class_cannot_do_without() {
        let config = Config { label_dropout: 0.0, ..prior(3).config().clone() };
        let always = [Prior::new(&config, 0, &Device::Cpu).unwrap()];
        let complete = ["--complete=a.png", "--keep=top-half"];
        for more in [&["--class=none"][..], &complete] {
            let error = args(more).labels(&always).unwrap_err().to_string();
            assert!(error.contains("label_dropout") && error.contains("--class"), "{error}");
        }
        args(&["--class=1"]).labels(&always).unwrap();
        args(&[]).check_guidance(&always).unwrap();
        let guided = args(&["--guidance=2"]);
        let error = guided.check_guidance(&always).unwrap_err().to_string();
        assert!(error.contains("label_dropout") && error.contains("--guidance"), "{error}");
        guided.check_guidance(&[prior(3)]).unwrap();
        let error = guided.check_guidance(&[prior(0)]).unwrap_err().to_string();
        assert!(error.contains("without classes"), "{error}");
    }
}

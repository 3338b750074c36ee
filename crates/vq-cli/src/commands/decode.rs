//! `vq decode`

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde_json::json;
use vq_train::{model_hash, resolve_model};
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

    /// Decode from these levels of codes only: all, top, bottom, or numbers separated by commas (0 =
    /// bottom). The others are left out as zeros, which shows what each level carries.
    #[arg(long, default_value = "all", value_name = "LEVELS")]
    levels: Levels,

    #[command(flatten)]
    compute: ComputeArgs,
}

/// A choice of levels.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Levels {
    All,
    Top,
    Bottom,
    These(Vec<usize>),
}

impl FromStr for Levels {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "top" => Ok(Self::Top),
            "bottom" => Ok(Self::Bottom),
            _ => {
                let numbers = text.split(',').map(|part| part.trim().parse());
                numbers.collect::<std::result::Result<_, _>>().map(Self::These).map_err(|_| {
                    "use all, top, bottom, or numbers like 0,1 (0 = bottom)".to_owned()
                })
            }
        }
    }
}

impl Levels {
    /// Whether to decode each of `count` levels, bottom first.
    fn of(&self, count: usize) -> Result<Vec<bool>> {
        let chosen = match self {
            Self::All => (0..count).collect(),
            Self::Top => vec![count.saturating_sub(1)],
            Self::Bottom => vec![0],
            Self::These(numbers) => numbers.clone(),
        };
        if let Some(number) = chosen.iter().find(|&&number| number >= count) {
            return Err(Error::other(format!(
                "--levels {number}: the model has {count} level(s) of codes, numbered from 0 (bottom)"
            )));
        }
        Ok((0..count).map(|level| chosen.contains(&level)).collect())
    }
}

pub(crate) fn run(args: &DecodeArgs, format: LogFormat) -> Result<()> {
    let device = args.compute.start()?;
    let CodesFile { codes, images, model: made_with, .. } = CodesFile::read(&args.codes)?;
    let folder = resolve_model(&args.model)?;
    let model = args.compute.load(&folder, &device)?;
    if let Some(hash) = made_with
        && hash != model_hash(&folder)?
    {
        return Err(Error::other(format!(
            "{} holds codes of another model than {}, to which they mean something else; give the one that encoded \
             them (--model)",
            args.codes.display(),
            folder.display()
        )));
    }
    codes.validate(model.config()).map_err(|error| {
        Error::other(format!("{}: {error}; was it made with another model?", args.codes.display()))
    })?;
    let shown = args.levels.of(model.config().levels.len())?;
    let count = codes.batch_size()?;
    let names: Vec<PathBuf> = if images.len() == count {
        images
    } else {
        (0..count).map(|index| format!("{index:05}").into()).collect()
    };
    let paths = images::outputs(&args.out, names.iter().map(PathBuf::as_path), "decoded");
    file::make_folder(&args.out)?;
    for (index, path) in paths.iter().enumerate() {
        let decoded = model.decode_levels(&codes.narrow(index, 1)?, &shown)?;
        let pixels = model.config().normalization.denormalize(&decoded)?;
        save_png(&tensor_to_image(&pixels.get(0)?)?, path)?;
        let path: &Path = path;
        output::result(
            format,
            path.display(),
            &json!({ "event": "decoded", "path": output::path(path) }),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_chosen_by_name_or_number() {
        let of = |text: &str, count| text.parse::<Levels>().unwrap().of(count);
        assert_eq!(of("all", 3).unwrap(), [true; 3]);
        assert_eq!(of("top", 3).unwrap(), [false, false, true]);
        assert_eq!(of("bottom", 3).unwrap(), [true, false, false]);
        assert_eq!(of("0, 2", 3).unwrap(), [true, false, true]);
        assert_eq!(of("top", 1).unwrap(), [true]);
        assert!(of("2", 2).unwrap_err().to_string().contains("2 level(s)"));
        for text in ["", "middle", "0,", "-1"] {
            assert!(text.parse::<Levels>().is_err(), "{text}");
        }
    }
}

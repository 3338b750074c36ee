//! `vq data`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use vq_data::shapes::{CLASSES, FileFormat, MakeOptions, make_images};

use crate::cli::LogFormat;
use crate::error::Result;
use crate::images::Size;
use crate::output;
use crate::progress::Progress;

/// Make data to train on.
#[derive(Debug, Args)]
pub(crate) struct DataCommands {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    MakeImages(MakeImagesArgs),
}

/// Draw coloured shapes into image files, in one sub-folder per class: a stand-in of any size and
/// resolution where a large data set is not at hand.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  vq data make-images made --size 256 --count 2000
  vq train --config imagenet256 --data folder:made")]
struct MakeImagesArgs {
    /// The folder to make; one that is there must be empty.
    folder: PathBuf,

    /// Size of the images: N for N×N, or `WIDTHxHEIGHT`.
    #[arg(long, default_value = "256", value_name = "SIZE")]
    size: Size,

    /// How many images, spread evenly over the classes.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    count: usize,

    /// Which shapes, colours and places; the same images in any size.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,

    /// Only these classes, separated by commas [default: all ten].
    #[arg(long, value_delimiter = ',', value_parser = class, value_name = "NAME,…")]
    classes: Vec<u32>,

    /// The format of the files; JPEGs are several times smaller.
    #[arg(long, value_enum, default_value_t = FormatArg::Png, value_name = "FORMAT")]
    format: FormatArg,

    /// Replace the images that were made there before; other files are kept.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Png,
    Jpeg,
}

pub(crate) fn run(commands: &DataCommands, format: LogFormat) -> Result<()> {
    match &commands.command {
        DataCommand::MakeImages(args) => make(args, format),
    }
}

fn make(args: &MakeImagesArgs, format: LogFormat) -> Result<()> {
    let options = MakeOptions {
        size: [args.size.height, args.size.width],
        count: args.count,
        seed: args.seed,
        classes: args.classes.clone(),
        format: match args.format {
            FormatArg::Png => FileFormat::Png,
            FormatArg::Jpeg => FileFormat::Jpeg,
        },
        overwrite: args.overwrite,
    };
    let progress = Progress::start(format, "drawing");
    make_images(&args.folder, &options, &|done| progress.tell(done, Some(args.count)))?;
    drop(progress);
    let (width, height) = (args.size.width, args.size.height);
    let text = format!(
        "{} images of {width}×{height} in {folder}; train on them with --data folder:{folder}",
        args.count,
        folder = args.folder.display()
    );
    let record =
        json!({ "event": "images-made", "path": output::path(&args.folder), "count": args.count });
    output::result(format, text, &record)
}

/// The label of a class.
fn class(name: &str) -> std::result::Result<u32, String> {
    CLASSES
        .iter()
        .position(|class| *class == name)
        .map(|label| label as u32)
        .ok_or_else(|| format!("use some of {}", CLASSES.join(", ")))
}

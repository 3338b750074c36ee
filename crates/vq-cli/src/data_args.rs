//! Where the images come from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use vq_data::{Dataset, Indexing, OnBroken, Source, Splits};
use vq_model::VqVae;
use vq_train::{DataConfig, RECIPE_FILE, Recipe};

use crate::cli::LogFormat;
use crate::error::{Error, Result};
use crate::output;
use crate::progress::Progress;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataArgs {
    /// auto (CIFAR-10 if it is on disk, else the built-in shapes), cifar10, cifar10:PATH, shapes,
    /// plain-shapes, or folder:PATH (any images, with class sub-folders if there are any; its `train` and `test`
    /// are the splits where it has both, else a tenth is held out).
    #[arg(long, value_name = "SOURCE")]
    data: Option<Source>,

    /// Where auto and cifar10 look for CIFAR-10 [default: data].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Images to draw for the train split of the built-in shapes [default: the recipe's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    train_count: Option<u32>,

    /// What to do about broken files in a folder of images [default: skip, and name them].
    #[arg(long, value_enum, value_name = "WHAT")]
    on_broken: Option<OnBrokenArg>,
}

/// The ids of these flags, for commands where other arguments rule them out.
pub(crate) const DATA_ARGS: [&str; 4] = ["data", "data_dir", "train_count", "on_broken"];

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Split {
    Train,
    Test,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnBrokenArg {
    Skip,
    Refuse,
}

impl DataArgs {
    /// The first flag that was given, where any was.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--data", self.data.is_some()),
            ("--data-dir", self.data_dir.is_some()),
            ("--train-count", self.train_count.is_some()),
            ("--on-broken", self.on_broken.is_some()),
        ];
        flags.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }

    /// The same, with broken files refused; an error where they were to be skipped.
    pub(crate) fn refusing_broken(&self) -> Result<Self> {
        match self.on_broken {
            Some(OnBrokenArg::Skip) => Err(Error::other(
                "--on-broken skip leaves out images, and --lossless keeps every one: leave out one of them",
            )),
            _ => Ok(Self { on_broken: Some(OnBrokenArg::Refuse), ..self.clone() }),
        }
    }

    /// Lays the flags that were given over `data`; an error where one has no meaning there.
    pub(crate) fn apply(&self, data: &mut DataConfig) -> Result<()> {
        if let Some(source) = &self.data {
            data.source = source.clone();
        }
        if let Some(dir) = &self.data_dir {
            data.dir.clone_from(dir);
        }
        if let Some(count) = self.train_count {
            if let Source::Cifar10(_) | Source::Folder(_) = data.source {
                return Err(Error::other(format!(
                    "--train-count is for the built-in shapes, and the data are {}: leave it out",
                    data.source
                )));
            }
            data.train_count = count as usize;
        }
        if let Some(on_broken) = self.on_broken {
            data.on_broken = match on_broken {
                OnBrokenArg::Skip => OnBroken::Skip,
                OnBrokenArg::Refuse => OnBroken::Refuse,
            };
        }
        Ok(())
    }
}

impl Split {
    pub(crate) fn of(self, splits: &Splits) -> &Arc<dyn Dataset> {
        match self {
            Self::Train => &splits.train,
            Self::Test => &splits.test,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "test",
        }
    }
}

/// Opens the data, with a progress bar while a folder is indexed, and says what there is to say of them.
pub(crate) fn open(data: &DataConfig, image_size: [usize; 2], format: LogFormat) -> Result<Splits> {
    let progress = Progress::start(format, "indexing");
    let tell = |indexing: Indexing| progress.tell(indexing.done, Some(indexing.total));
    // CIFAR-10 is read as f32, which takes six times the memory of the bytes that are kept.
    let splits = vq_ops::process::give_memory_back(|| data.open_watched(image_size, &tell))?;
    drop(progress);
    for note in &splits.notes {
        output::note(format, note)?;
    }
    Ok(splits)
}

/// The data to use a model on: that which its run was trained on, with the flags laid over it. Says what
/// there is to say of it.
pub(crate) fn open_for(
    model: &VqVae,
    folder: &Path,
    args: &DataArgs,
    format: LogFormat,
) -> Result<Splits> {
    let mut data = trained_on(folder)?.unwrap_or_default();
    args.apply(&mut data)?;
    open(&data, model.config().image_size, format)
}

/// Names the files that turned out to be broken while the data were read.
pub(crate) fn name_broken(dataset: &dyn Dataset, format: LogFormat) -> Result<()> {
    dataset.take_broken().iter().try_for_each(|file| {
        output::note(format, &format!("cannot decode {file}; another image took its place"))
    })
}

/// The data that the run which a checkpoint belongs to was started with.
fn trained_on(folder: &Path) -> Result<Option<DataConfig>> {
    Ok(trained_with(folder)?.map(|recipe| recipe.data))
}

/// The recipe of the run which a checkpoint belongs to.
pub(crate) fn trained_with(folder: &Path) -> Result<Option<Recipe>> {
    let folder = fs::canonicalize(folder).map_err(Error::read(folder))?;
    let recipe = folder.ancestors().take(3).map(|folder| folder.join(RECIPE_FILE));
    match recipe.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(Some(Recipe::from_file(&path)?)),
        None => Ok(None),
    }
}

//! Where the images come from.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vq_data::{OnBroken, Source};
use vq_train::DataConfig;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataArgs {
    /// auto (CIFAR-10 if it is on disk, else the built-in shapes), cifar10, cifar10:PATH, shapes, or
    /// folder:PATH (any images; class sub-folders if there are any).
    #[arg(long, value_name = "SOURCE")]
    data: Option<Source>,

    /// Where auto and cifar10 look for CIFAR-10 [default: data].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// What to do about broken files in a folder of images [default: skip, and name them].
    #[arg(long, value_enum, value_name = "WHAT")]
    on_broken: Option<OnBrokenArg>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnBrokenArg {
    Skip,
    Refuse,
}

impl DataArgs {
    /// Lays the flags that were given over `data`.
    pub(crate) fn apply(&self, data: &mut DataConfig) {
        if let Some(source) = &self.data {
            data.source = source.clone();
        }
        if let Some(dir) = &self.data_dir {
            data.dir.clone_from(dir);
        }
        if let Some(on_broken) = self.on_broken {
            data.on_broken = match on_broken {
                OnBrokenArg::Skip => OnBroken::Skip,
                OnBrokenArg::Refuse => OnBroken::Refuse,
            };
        }
    }
}

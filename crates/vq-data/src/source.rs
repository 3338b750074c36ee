use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::shapes::Style;
use crate::{Error, Indexing, Splits, cifar, folder, shapes};

/// Where the images come from; written as `auto`, `cifar10`, `cifar10:PATH`, `shapes`,
/// `plain-shapes` or `folder:PATH`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    /// CIFAR-10 where it is on disk, else the built-in shapes and a note that says so.
    #[default]
    Auto,
    /// CIFAR-10's official binary files, in `PATH/cifar-10-batches-bin` or in `PATH` itself; by
    /// default in the data folder of the [`OpenOptions`].
    Cifar10(Option<PathBuf>),
    /// The built-in set: coloured shapes on textured backgrounds.
    Shapes,
    /// The same shapes, large, in one colour on another.
    PlainShapes,
    /// A folder of images, with class sub-folders or without.
    Folder(PathBuf),
}

/// What to do about files that were meant to be images and cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBroken {
    /// Leave them out and name them in the notes. A file that only decoding shows to be broken keeps its
    /// place, where the next image of its class stands in for it; it is named by
    /// [`Dataset::take_broken`](crate::Dataset::take_broken), and in the notes of the next time.
    #[default]
    Skip,
    /// Refuse the folder; what only decoding shows is an error when it is read.
    Refuse,
}

/// How to open a [`Source`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Height and width of the images, in pixels.
    pub size: [usize; 2],
    /// The folder in which `cargo xtask download-cifar` leaves its data.
    pub data_dir: PathBuf,
    /// What to do about broken files in a folder of images.
    pub on_broken: OnBroken,
    /// Chooses the shapes that are drawn, and the images of a folder that are held out. Not the
    /// seed of the training run: runs of several seeds should see the same data.
    pub seed: u64,
    /// Images in the train split of the built-in set.
    pub train_count: usize,
    /// Images in the test split of the built-in set.
    pub test_count: usize,
    /// Up to this many bytes of pixels (both splits together) are held in memory, those of a folder from
    /// the first time on that they are read. Beyond it a folder is decoded, and a shape drawn, each time.
    pub memory_limit: usize,
    /// Where what was found out about a folder of images is kept, so that opening it again looks only at
    /// the files that changed: [`cache_dir`](crate::cache_dir), say. None = nowhere.
    pub cache_dir: Option<PathBuf>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            size: [32, 32],
            data_dir: PathBuf::from("data"),
            on_broken: OnBroken::default(),
            seed: 0,
            train_count: 10_000,
            test_count: 1_000,
            memory_limit: 1 << 30,
            cache_dir: None,
        }
    }
}

/// Opens a source, and checks it: CIFAR-10 whole, of a folder's files the headers and ends.
pub fn open(source: &Source, options: &OpenOptions) -> Result<Splits, Error> {
    open_watched(source, options, &|_| ())
}

/// The same; tells `watch`, from several threads, how far the indexing of a folder is.
pub fn open_watched(
    source: &Source,
    options: &OpenOptions,
    watch: &(dyn Fn(Indexing) + Sync),
) -> Result<Splits, Error> {
    check_size(options.size)?;
    match source {
        Source::Auto => open_auto(options),
        Source::Cifar10(None) => cifar::open(&options.data_dir, options.size),
        Source::Cifar10(Some(dir)) => cifar::open(dir, options.size),
        Source::Shapes => shapes::open(Style::Textured, options),
        Source::PlainShapes => shapes::open(Style::Plain, options),
        Source::Folder(path) => folder::open(path, options, watch),
    }
}

impl Source {
    /// The source that `auto` stands for at the moment, with that data folder; any other is itself.
    #[must_use]
    pub fn resolve(&self, data_dir: &Path) -> Self {
        match self {
            Self::Auto if cifar::SUPPORTED && cifar::is_there(data_dir) => Self::Cifar10(None),
            Self::Auto => Self::Shapes,
            other => other.clone(),
        }
    }
}

/// The largest height and width of images; larger ones would overflow memory long before this.
pub const LARGEST_SIDE: usize = 16_384;

/// Refuses a height or width that cannot be meant.
pub(crate) fn check_size([height, width]: [usize; 2]) -> Result<(), Error> {
    if height == 0 || width == 0 || height > LARGEST_SIDE || width > LARGEST_SIDE {
        return Err(Error::ImageSize { height, width, most: LARGEST_SIDE });
    }
    Ok(())
}

fn open_auto(options: &OpenOptions) -> Result<Splits, Error> {
    let here = cifar::is_there(&options.data_dir);
    if here && cifar::SUPPORTED {
        return cifar::open(&options.data_dir, options.size);
    }
    let mut splits = shapes::open(Style::Textured, options)?;
    splits.notes.push(if here {
        format!(
            "CIFAR-10 is in {}, but this build cannot read it: taking the built-in shapes. Build \
             with the feature `cifar` to use it.",
            options.data_dir.display()
        )
    } else {
        format!(
            "CIFAR-10 is not in {}: taking the built-in shapes instead. To get CIFAR-10 run `{}`.",
            options.data_dir.display(),
            cifar::command(&options.data_dir)
        )
    });
    Ok(splits)
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::UnknownSource(text.to_owned());
        match text.split_once(':') {
            None => match text {
                "auto" => Ok(Self::Auto),
                "cifar10" => Ok(Self::Cifar10(None)),
                "shapes" => Ok(Self::Shapes),
                "plain-shapes" => Ok(Self::PlainShapes),
                _ => Err(unknown()),
            },
            Some((_, "")) => Err(unknown()),
            Some(("cifar10", path)) => Ok(Self::Cifar10(Some(PathBuf::from(path)))),
            Some(("folder", path)) => Ok(Self::Folder(PathBuf::from(path))),
            Some(_) => Err(unknown()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cifar10(None) => f.write_str("cifar10"),
            Self::Cifar10(Some(path)) => write!(f, "cifar10:{}", path.display()),
            Self::Shapes => f.write_str("shapes"),
            Self::PlainShapes => f.write_str("plain-shapes"),
            Self::Folder(path) => write!(f, "folder:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_back_as_they_are_written() {
        let known = ["auto", "cifar10", "cifar10:/d", "shapes", "plain-shapes", "folder:C:\\a b"];
        for text in known {
            let source: Source = text.parse().expect("a source");
            assert_eq!(source.to_string(), text);
        }
        for text in ["", "cifar", "folder", "folder:", "cifar10:", "shapes:x", "imagenet:x"] {
            let error = text.parse::<Source>().expect_err("not a source").to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("folder:PATH"));
        }
    }

    #[test]
    fn auto_without_cifar_takes_the_shapes_and_says_so() {
        let dir = tempfile::tempdir().expect("a folder");
        let options = OpenOptions {
            data_dir: dir.path().join("my data"),
            train_count: 20,
            test_count: 10,
            ..OpenOptions::default()
        };
        let splits = open(&Source::Auto, &options).expect("built in");
        assert_eq!((splits.train.len(), splits.test.len()), (20, 10));
        assert_eq!(Source::Auto.resolve(&options.data_dir), Source::Shapes);
        assert_eq!(splits.notes.len(), 1);
        assert!(splits.notes[0].contains("cargo xtask download-cifar --dir '"), "{splits:?}");
        let splits = open(&Source::Shapes, &options).expect("built in");
        assert_eq!(splits.notes, [""; 0]);
    }

    #[test]
    fn auto_with_a_part_of_cifar_is_an_error() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("data_batch_2.bin"), b"x").expect("writable");
        let options = OpenOptions { data_dir: dir.path().into(), ..OpenOptions::default() };
        let result = open(&Source::Auto, &options);
        if cifar::SUPPORTED {
            assert_eq!(Source::Auto.resolve(dir.path()), Source::Cifar10(None));
            let error = result.expect_err("incomplete").to_string();
            assert!(error.contains("data_batch_1.bin is missing"), "{error}");
        } else {
            assert!(result.expect("shapes").notes[0].contains("feature `cifar`"));
        }
    }

    #[test]
    fn sizes_that_cannot_be_meant_are_refused() {
        for size in [[0, 32], [32, 0], [32, 1 << 40]] {
            let options = OpenOptions { size, ..OpenOptions::default() };
            assert!(matches!(open(&Source::Shapes, &options), Err(Error::ImageSize { .. })));
        }
        let options = OpenOptions { train_count: 0, ..OpenOptions::default() };
        assert!(open(&Source::Shapes, &options).is_err());
    }
}

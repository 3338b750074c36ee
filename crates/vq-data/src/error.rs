use std::path::PathBuf;

/// What can go wrong with data. Each message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file or folder could not be written. What stood there before is untouched.
    #[error(
        "cannot write {}: {source}; check permissions and free space, or choose another folder",
        path.display()
    )]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Codes on disk that are missing, damaged, or others than was asked for.
    #[error("{} {problem}", path.display())]
    Codes {
        /// The folder or file.
        path: PathBuf,
        /// What is the matter with it and what to do.
        problem: String,
    },
    /// Images were to be made in a folder that holds something.
    #[error(
        "{} is not empty: choose another folder, or replace the images made there before with \
         --overwrite (other files are kept)",
        .0.display()
    )]
    FolderInUse(PathBuf),
    /// The name of a data source was not understood.
    #[error(
        "unknown data source `{0}`: use auto, cifar10, cifar10:PATH, shapes, plain-shapes \
         or folder:PATH (a folder of images)"
    )]
    UnknownSource(String),
    /// A height or width of zero, or so large that it cannot be meant.
    #[error("cannot make images of {height}×{width} pixels: use a size from 1 to {most}")]
    ImageSize {
        /// The height asked for.
        height: usize,
        /// The width asked for.
        width: usize,
        /// The largest side that is accepted.
        most: usize,
    },
    /// A split without a single image was asked for.
    #[error("the {split} split would hold no image: ask for at least one")]
    EmptySplit {
        /// `train` or `test`.
        split: &'static str,
    },

    /// A file of CIFAR-10 is not there.
    #[error("CIFAR-10 is incomplete: {} is missing; run `{command}`", path.display())]
    CifarMissing {
        /// The first of the six files that is missing.
        path: PathBuf,
        /// The command that gets the data.
        command: String,
    },
    /// A file of CIFAR-10 has another size than the official one.
    #[error(
        "{} has {found} bytes and CIFAR-10's has {expected}: it is truncated or another file; run \
         `{command}`",
        path.display()
    )]
    CifarSize {
        /// The file.
        path: PathBuf,
        /// Bytes it must have.
        expected: u64,
        /// Bytes it has.
        found: u64,
        /// The command that gets the data.
        command: String,
    },
    /// A label outside 0 to 9.
    #[error(
        "{}: record {record} has label {label}, and CIFAR-10's go from 0 to 9: the file is damaged; \
         run `{command}`",
        path.display()
    )]
    CifarLabel {
        /// The file.
        path: PathBuf,
        /// Which record, from 0.
        record: usize,
        /// The label found.
        label: u8,
        /// The command that gets the data.
        command: String,
    },
    /// CIFAR-10 was asked for in a size that it does not have.
    #[error(
        "CIFAR-10's images are 32×32 and the configuration wants {height}×{width}: set \
         image_size = [32, 32], or take --data shapes or --data folder:PATH"
    )]
    CifarImageSize {
        /// The height asked for.
        height: usize,
        /// The width asked for.
        width: usize,
    },
    /// This build has no CIFAR-10 reader.
    #[error(
        "this build cannot read CIFAR-10: build again with the feature `cifar` (it is on by \
         default), or take --data shapes"
    )]
    CifarFeature,

    /// The folder of images is not there, or is a file.
    #[error(
        "{} is not a folder{}: --data folder:PATH takes the path of a folder of images", .0.display(),
        if .0.is_relative() { " here (a run keeps the path that it was given)" } else { "" }
    )]
    NotAFolder(PathBuf),
    /// There is no image in the folder.
    #[error(
        "{} holds no image: put PNG, JPEG, WebP, GIF, BMP or TIFF files there, or in one sub-folder \
         per class",
        .0.display()
    )]
    EmptyFolder(PathBuf),
    /// One file is not a readable image.
    #[error("{} is not a readable image: {reason}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why, in the decoder's words.
        reason: String,
    },
    /// An image file of which reading would lose something that was to be kept.
    #[error(
        "{} {what}: convert it to one picture of 8 bits a channel without transparency first",
        path.display()
    )]
    NotExact {
        /// The file.
        path: PathBuf,
        /// What would be lost.
        what: String,
    },
    /// Some files of a folder are not readable images, and broken files are refused.
    #[error(
        "{count} of {total} images in {} cannot be read, the first is {} ({reason}): repair or \
         remove them, or choose to skip broken files",
        folder.display(),
        first.display()
    )]
    BrokenFiles {
        /// The folder.
        folder: PathBuf,
        /// How many are broken.
        count: usize,
        /// Of how many.
        total: usize,
        /// The first, in the order of the paths.
        first: PathBuf,
        /// What is wrong with the first.
        reason: String,
    },
    /// No file of a folder can be read.
    #[error(
        "none of the {total} image files in {} can be read, the first is {} ({reason}): is this the \
         right folder?",
        folder.display(),
        first.display()
    )]
    AllBroken {
        /// The folder.
        folder: PathBuf,
        /// How many files.
        total: usize,
        /// The first, in the order of the paths.
        first: PathBuf,
        /// What is wrong with the first.
        reason: String,
    },

    /// Pixels, labels and names that do not fit together, or an index beyond the end.
    #[error("{0}")]
    Dataset(String),
    /// A mean or a standard deviation that cannot be used.
    #[error("normalization.{0}")]
    Normalization(String),
    /// A batch size of zero.
    #[error("batch_size = 0: a batch holds at least one image")]
    BatchSizeZero,
    /// Not one whole batch in the data.
    #[error(
        "batch_size = {batch_size} is larger than the data, which has {len} images: use a batch \
         size of at most {len}"
    )]
    BatchTooLarge {
        /// Images in a batch.
        batch_size: usize,
        /// Images in the data.
        len: usize,
    },
    /// A dataset without images.
    #[error("the dataset {0} holds no image")]
    EmptyDataset(String),
    /// The thread that prepares batches failed.
    #[error("the thread that prepares batches failed: {0}")]
    Worker(String),
    /// A tensor could not be made.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn codes(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Codes { path: path.into(), problem: problem.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }
}

//! CIFAR-10's official binary batches: six files of 10,000 records, each a label and 3,072 bytes
//! `[3,32,32]`. <https://www.cs.toronto.edu/~kriz/cifar.html>

use std::path::{Path, PathBuf};

use crate::{Error, Splits};

/// Whether this build can read CIFAR-10.
pub(crate) const SUPPORTED: bool = cfg!(feature = "cifar");

/// Opens the files in `dir/cifar-10-batches-bin`, or in `dir` itself where they lie there.
pub(crate) fn open(dir: &Path, size: [usize; 2]) -> Result<Splits, Error> {
    let [height, width] = size;
    if !SUPPORTED {
        return Err(Error::CifarFeature);
    }
    if size != [32, 32] {
        return Err(Error::CifarImageSize { height, width });
    }
    let batches = batch_dir(dir);
    reader::read(&batches, &command(dir))
}

/// Whether any of the six files is there: then CIFAR-10 is meant, whole or not.
pub(crate) fn is_there(dir: &Path) -> bool {
    let batches = batch_dir(dir);
    FILES.iter().any(|file| batches.join(file).exists())
}

/// The command that brings CIFAR-10 into `dir`.
pub(crate) fn command(dir: &Path) -> String {
    let base = "cargo xtask download-cifar";
    let dir = dir.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@,".contains(c);
    if dir == "data" {
        base.to_owned()
    } else if dir.chars().all(plain) {
        format!("{base} --dir {dir}")
    } else {
        format!("{base} --dir '{}'", dir.replace('\'', r"'\''"))
    }
}

const FOLDER: &str = "cifar-10-batches-bin";
const FILES: [&str; 6] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
];

fn batch_dir(dir: &Path) -> PathBuf {
    let inner = dir.join(FOLDER);
    let here = |dir: &Path| FILES.iter().any(|file| dir.join(file).exists());
    if !here(&inner) && here(dir) { dir.to_path_buf() } else { inner }
}

#[cfg(not(feature = "cifar"))]
mod reader {
    use super::{Error, Path, Splits};

    pub(super) fn read(_: &Path, _: &str) -> Result<Splits, Error> {
        Err(Error::CifarFeature)
    }
}

#[cfg(feature = "cifar")]
mod reader {
    use std::fs::{self, File};
    use std::io::{BufReader, Read};
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::{DType, Storage, Tensor};
    use rayon::prelude::*;

    use super::FILES;
    use crate::{Error, ImageShape, InMemory, Splits};

    pub(super) fn read(dir: &Path, command: &str) -> Result<Splits, Error> {
        for file in FILES {
            check_size(&dir.join(file), command)?;
        }
        FILES.par_iter().try_for_each(|file| check_labels(&dir.join(file), command))?;

        let candle_datasets::vision::Dataset {
            train_images,
            train_labels,
            test_images,
            test_labels,
            ..
        } = candle_datasets::vision::cifar::load_dir(dir)?;
        let names = class_names(dir);
        // One after the other: as f32 the train split alone takes 614 MB.
        let train = hold("CIFAR-10 train", train_images, &train_labels, names.clone())?;
        let test = hold("CIFAR-10 test", test_images, &test_labels, names)?;
        Ok(Splits {
            train: Arc::new(train),
            test: Arc::new(test),
            notes: Vec::new(),
            broken: Vec::new(),
        })
    }

    const SHAPE: ImageShape = ImageShape { channels: 3, height: 32, width: 32 };
    const RECORDS: usize = 10_000;
    const RECORD_BYTES: usize = 1 + 3 * 32 * 32;
    const FILE_BYTES: u64 = (RECORDS * RECORD_BYTES) as u64;
    const CLASSES: [&str; 10] =
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

    fn check_size(path: &Path, command: &str) -> Result<(), Error> {
        let found = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(path)(error));
            }
            _ => {
                return Err(Error::CifarMissing { path: path.into(), command: command.into() });
            }
        };
        if found != FILE_BYTES {
            let (path, command) = (path.into(), command.into());
            return Err(Error::CifarSize { path, expected: FILE_BYTES, found, command });
        }
        Ok(())
    }

    fn check_labels(path: &Path, command: &str) -> Result<(), Error> {
        let mut file =
            BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::io(path))?);
        let mut bytes = [0; RECORD_BYTES];
        for record in 0..RECORDS {
            file.read_exact(&mut bytes).map_err(Error::io(path))?;
            let label = bytes[0];
            if label > 9 {
                // The size was right, so a plain second download would leave the file alone.
                let command = format!("{command} --force");
                return Err(Error::CifarLabel { path: path.into(), record, label, command });
            }
        }
        Ok(())
    }

    /// f32 `[N,3,32,32]` in [0, 1] → u8, exactly: the f32 are n / 255.
    fn hold(
        name: &str,
        images: Tensor,
        labels: &Tensor,
        class_names: Vec<String>,
    ) -> Result<InMemory, Error> {
        let flat = images.flatten_all()?;
        drop(images);
        let pixels = {
            let (storage, layout) = flat.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else {
                return Err(Error::Dataset(format!("{name} was read to another device")));
            };
            let (start, end) = layout.contiguous_offsets().unwrap_or((0, 0));
            let values = storage.as_slice::<f32>()?.get(start..end).unwrap_or_default();
            // Adding a half and cutting rounds as `round` does here, several times as fast.
            values.par_iter().with_min_len(1 << 16).map(|v| (v * 255.0 + 0.5) as u8).collect()
        };
        drop(flat);
        let labels = labels.to_dtype(DType::U32)?.to_vec1()?;
        InMemory::new(name, SHAPE, pixels, labels, class_names)
    }

    /// The names in `batches.meta.txt`, one per line, or the ones that are known anyway.
    fn class_names(dir: &Path) -> Vec<String> {
        let text = fs::read_to_string(dir.join("batches.meta.txt")).unwrap_or_default();
        let names: Vec<String> =
            text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
        if names.len() == CLASSES.len() { names } else { CLASSES.map(str::to_owned).to_vec() }
    }

    #[cfg(test)]
    mod tests;
}

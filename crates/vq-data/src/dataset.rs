use std::path::PathBuf;
use std::sync::Arc;

use rayon::prelude::*;

use crate::Error;

/// The shape of every image of a dataset, `[C,H,W]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// C: 3 for RGB.
    pub channels: usize,
    /// H, in pixels.
    pub height: usize,
    /// W, in pixels.
    pub width: usize,
}

impl ImageShape {
    /// C·H·W: the bytes of one image.
    pub fn pixels(&self) -> usize {
        self.channels * self.height * self.width
    }
}

/// Images of one shape in a fixed order, each with a label.
pub trait Dataset: Send + Sync {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// The number of images.
    fn len(&self) -> usize;

    /// Whether there is no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of each image.
    fn shape(&self) -> ImageShape;

    /// The names of the labels 0, 1, …; empty where there are no classes.
    fn class_names(&self) -> &[String];

    /// The label of image `index`; 0 where there are no classes.
    fn label(&self, index: usize) -> u32;

    /// Writes image `index` into `out`, u8 `[C,H,W]`.
    fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error>;

    /// Whether `read` does real work (decodes a file, say), so that it pays to read with several
    /// threads.
    fn is_costly(&self) -> bool {
        false
    }

    /// Bytes of pixels that are in memory, or will be once every image was read.
    fn held_bytes(&self) -> usize {
        if self.is_costly() { 0 } else { self.len() * self.shape().pixels() }
    }

    /// Files that reading found to be broken, and replaced by others, since this was last asked.
    fn take_broken(&self) -> Vec<BrokenFile> {
        Vec::new()
    }
}

/// A dataset held as bytes in memory.
#[derive(Clone, Debug)]
pub struct InMemory {
    name: String,
    shape: ImageShape,
    pixels: Vec<u8>,
    labels: Vec<u32>,
    class_names: Vec<String>,
}

impl InMemory {
    /// `pixels` holds the images one after another, u8 `[N,C,H,W]`; `labels` holds `[N]`, each
    /// below the number of class names (or 0 where there are none).
    pub fn new(
        name: impl Into<String>,
        shape: ImageShape,
        pixels: Vec<u8>,
        labels: Vec<u32>,
        class_names: Vec<String>,
    ) -> Result<Self, Error> {
        let name = name.into();
        if shape.pixels() == 0 || pixels.len() != labels.len() * shape.pixels() {
            return Err(Error::Dataset(format!(
                "the dataset {name} has {} bytes for {} labels and images of {} bytes",
                pixels.len(),
                labels.len(),
                shape.pixels()
            )));
        }
        let classes = class_names.len().max(1);
        if let Some(label) = labels.iter().find(|&&label| label as usize >= classes) {
            return Err(Error::Dataset(format!(
                "the dataset {name} has a label {label} and {} class names",
                class_names.len()
            )));
        }
        Ok(Self { name, shape, pixels, labels, class_names })
    }

    /// Reads all of another dataset into memory, on all of rayon's threads.
    pub fn from_dataset(dataset: &dyn Dataset) -> Result<Self, Error> {
        let shape = dataset.shape();
        let mut pixels = vec![0; dataset.len() * shape.pixels()];
        pixels
            .par_chunks_exact_mut(shape.pixels().max(1))
            .enumerate()
            .try_for_each(|(index, out)| dataset.read(index, out))?;
        let labels = (0..dataset.len()).map(|index| dataset.label(index)).collect();
        Self::new(dataset.name(), shape, pixels, labels, dataset.class_names().to_vec())
    }
}

impl Dataset for InMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn shape(&self) -> ImageShape {
        self.shape
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> u32 {
        self.labels.get(index).copied().unwrap_or(0)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
        check_read(self, index, out)?;
        let size = self.shape.pixels();
        out.copy_from_slice(&self.pixels[index * size..(index + 1) * size]);
        Ok(())
    }
}

/// A file that was meant to be an image and is not one. Written as its path and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenFile {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl std::fmt::Display for BrokenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// What [`open`](crate::open) gives: the two splits of a source and what there is to say about it.
#[derive(Clone)]
pub struct Splits {
    /// To learn from.
    pub train: Arc<dyn Dataset>,
    /// To judge by.
    pub test: Arc<dyn Dataset>,
    /// What the user must be told, loudly: another data set was taken, files were skipped.
    pub notes: Vec<String>,
    /// Every file that was skipped or replaced; the notes name the first ones.
    pub broken: Vec<BrokenFile>,
}

impl std::fmt::Debug for Splits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splits")
            .field("train", &(self.train.name(), self.train.len()))
            .field("test", &(self.test.name(), self.test.len()))
            .field("notes", &self.notes)
            .field("broken", &self.broken)
            .finish()
    }
}

/// Images of a costly dataset that [`pixel_variance`] reads.
const MOST_COSTLY: usize = 4096;

/// The population variance of all pixels of all channels, in units of [0, 1] (about 0.06 for
/// CIFAR-10): what a mean squared error is divided by to compare it between data sets.
///
/// The sums are whole numbers, so the result is exact to the last rounding and does not depend on
/// the number of threads. Reads every image once; of a [costly](Dataset::is_costly) dataset of more than
/// 4096 images only 4096, evenly spaced from the first one on, and so always the same.
pub fn pixel_variance(dataset: &dyn Dataset) -> Result<f64, Error> {
    let size = dataset.shape().pixels();
    let all = dataset.len();
    let images = if dataset.is_costly() { all.min(MOST_COSTLY) } else { all };
    let count = images as u128 * size as u128;
    if count == 0 {
        return Err(Error::EmptyDataset(dataset.name().to_owned()));
    }
    let (sum, squares) = (0..images)
        .into_par_iter()
        .map(|number| (number as u128 * all as u128 / images as u128) as usize)
        .map_init(
            || vec![0; size],
            |image, index| {
                dataset.read(index, image)?;
                let sum: u64 = image.iter().map(|&p| u64::from(p)).sum();
                let squares: u64 = image.iter().map(|&p| u64::from(p) * u64::from(p)).sum();
                Ok::<_, Error>((u128::from(sum), u128::from(squares)))
            },
        )
        .try_reduce(|| (0, 0), |a, b| Ok((a.0 + b.0, a.1 + b.1)))?;
    // Var = (n·Σp² − (Σp)²) / n², and p = 255·x.
    let numerator = count * squares - sum * sum;
    Ok(numerator as f64 / (count as f64 * count as f64 * 255.0 * 255.0))
}

/// Shared checks of the arguments of [`Dataset::read`].
pub(crate) fn check_read(dataset: &dyn Dataset, index: usize, out: &[u8]) -> Result<(), Error> {
    if index >= dataset.len() {
        return Err(Error::Dataset(format!(
            "the dataset {} has {} images: there is none of index {index}",
            dataset.name(),
            dataset.len()
        )));
    }
    if out.len() != dataset.shape().pixels() {
        return Err(Error::Dataset(format!(
            "an image of {} has {} bytes and the buffer {}",
            dataset.name(),
            dataset.shape().pixels(),
            out.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: ImageShape = ImageShape { channels: 1, height: 1, width: 2 };

    fn dataset(pixels: Vec<u8>) -> InMemory {
        let labels = vec![0; pixels.len() / 2];
        InMemory::new("toy", SHAPE, pixels, labels, Vec::new()).expect("sizes fit")
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let names = vec!["a".to_owned(), "b".to_owned()];
        assert!(InMemory::new("toy", SHAPE, vec![0; 3], vec![0], Vec::new()).is_err());
        assert!(InMemory::new("toy", SHAPE, vec![0; 2], vec![1], Vec::new()).is_err());
        assert!(InMemory::new("toy", SHAPE, vec![0; 2], vec![2], names.clone()).is_err());
        assert!(InMemory::new("toy", SHAPE, vec![0; 2], vec![1], names).is_ok());
        let toy = dataset(vec![1, 2, 3, 4]);
        assert!(toy.read(2, &mut [0; 2]).is_err());
        assert!(toy.read(0, &mut [0; 3]).is_err());
        let mut out = [0; 2];
        toy.read(1, &mut out).expect("is there");
        assert_eq!(out, [3, 4]);
    }

    #[test]
    fn variance_of_known_sets() {
        let variance = |pixels| pixel_variance(&dataset(pixels)).expect("not empty");
        assert!(variance(vec![7; 6]).abs() < f64::EPSILON);
        assert!((variance(vec![0, 255]) - 0.25).abs() < f64::EPSILON);
        assert!(pixel_variance(&dataset(Vec::new())).is_err());
    }

    /// Image `i` is black before the middle and white after it; counts what is read.
    struct Costly(std::sync::atomic::AtomicUsize);

    impl Dataset for Costly {
        fn name(&self) -> &'static str {
            "costly"
        }

        fn len(&self) -> usize {
            100_000
        }

        fn shape(&self) -> ImageShape {
            SHAPE
        }

        fn class_names(&self) -> &[String] {
            &[]
        }

        fn label(&self, _: usize) -> u32 {
            0
        }

        fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
            check_read(self, index, out)?;
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            out.fill(if index < 50_000 { 0 } else { 255 });
            Ok(())
        }

        fn is_costly(&self) -> bool {
            true
        }
    }

    #[test]
    fn of_a_large_costly_set_a_part_is_read() {
        let costly = Costly(std::sync::atomic::AtomicUsize::new(0));
        let variance = pixel_variance(&costly).expect("not empty");
        assert_eq!(costly.0.into_inner(), 4096);
        assert!((variance - 0.25).abs() < 1e-9, "{variance}");
    }

    proptest! {
        #[test]
        fn variance_is_that_of_the_two_pass_formula(
            mut pixels in proptest::collection::vec(any::<u8>(), 2..400)
        ) {
            pixels.truncate(pixels.len() / 2 * 2);
            let values: Vec<f64> = pixels.iter().map(|&p| f64::from(p) / 255.0).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let expected =
                values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
            let found = pixel_variance(&dataset(pixels)).expect("not empty");
            prop_assert!((found - expected).abs() < 1e-12);
        }
    }
}

use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::{ImageShape, InMemory};

const SHAPE: ImageShape = ImageShape { channels: 2, height: 1, width: 2 };

/// Image `i` is `[i, i + 1 | 7, 8]` and has label `i % 3`.
fn toy(len: usize) -> Arc<dyn Dataset> {
    let pixels = (0..len).flat_map(|i| [i as u8, (i as u8).wrapping_add(1), 7, 8]).collect();
    let labels = (0..len).map(|i| i as u32 % 3).collect();
    let names = ["a", "b", "c"].map(str::to_owned).to_vec();
    Arc::new(InMemory::new("toy", SHAPE, pixels, labels, names).expect("sizes fit"))
}

fn options(batch_size: usize) -> LoaderOptions {
    LoaderOptions { batch_size, prefetch: 2, drop_last: false, ..LoaderOptions::default() }
}

fn loader(len: usize, options: LoaderOptions) -> Loader {
    Loader::new(toy(len), Normalization::identity(2), options).expect("valid options")
}

/// A batch as plain numbers, exactly.
type Plain = (Vec<u32>, Vec<u32>, Vec<usize>);

fn plain(batch: &Batch) -> Plain {
    let images = batch.images.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
    let labels = batch.labels.to_vec1::<u32>().expect("u32");
    (images.into_iter().map(f32::to_bits).collect(), labels, batch.indices.clone())
}

fn collect(batches: Batches) -> Vec<Plain> {
    batches.map(|batch| plain(&batch.expect("a batch"))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_epoch_resumes_anywhere_and_prefetching_changes_nothing(
        len in 1_usize..90, batch_size in 1_usize..20, seed: u64, epoch: u64,
        prefetch in 0_usize..5, drop_last: bool, shuffle: bool, flip: bool, from in 0_usize..100,
    ) {
        prop_assume!(!drop_last || batch_size <= len);
        let options =
            LoaderOptions { batch_size, shuffle, flip, drop_last, seed, prefetch: 0 };
        let inline = loader(len, options.clone());
        let whole = collect(inline.epoch(epoch, 0));
        prop_assert_eq!(whole.len(), inline.batches_per_epoch());
        let ahead = loader(len, LoaderOptions { prefetch, ..options });
        prop_assert_eq!(&collect(ahead.epoch(epoch, 0)), &whole);
        let from = from % (whole.len() + 2);
        prop_assert_eq!(collect(ahead.epoch(epoch, from)), whole.get(from..).unwrap_or_default());
    }

    #[test]
    fn an_epoch_holds_every_image_once(
        len in 1_usize..200, batch_size in 1_usize..40, seed: u64, epoch: u64, shuffle: bool,
    ) {
        let loader = loader(len, LoaderOptions { shuffle, seed, ..options(batch_size) });
        let mut seen = Vec::new();
        for (images, labels, indices) in collect(loader.epoch(epoch, 0)) {
            for (i, &index) in indices.iter().enumerate() {
                prop_assert_eq!(labels[i], index as u32 % 3);
                // The second channel tells a flip; the first, the image.
                let value = |j: usize| (f32::from_bits(images[4 * i + j]) * 255.0).round() as u8;
                let flipped = value(2) == 8;
                prop_assert_eq!(value(usize::from(flipped)), index as u8);
                prop_assert_eq!(value(usize::from(!flipped)), (index as u8).wrapping_add(1));
            }
            seen.extend(indices);
        }
        if !shuffle {
            prop_assert!(seen.is_sorted());
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
    }
}

/// Which images of an epoch are flipped, by index.
fn flips(loader: &Loader, epoch: u64) -> Vec<bool> {
    let mut flips = vec![false; loader.dataset().len()];
    for (images, _, indices) in collect(loader.epoch(epoch, 0)) {
        for (i, index) in indices.into_iter().enumerate() {
            flips[index] = f32::from_bits(images[4 * i + 2]) > 7.5 / 255.0;
        }
    }
    flips
}

#[test]
fn half_of_the_images_are_flipped_others_in_each_epoch() {
    let loader = loader(10_000, options(100));
    let (first, second) = (flips(&loader, 0), flips(&loader, 1));
    let count = |flips: &[bool]| flips.iter().filter(|&&f| f).count();
    // Five standard deviations: √(10000)/2 = 50.
    assert!(count(&first).abs_diff(5000) < 250);
    let both = first.iter().zip(&second).filter(|(a, b)| a == b).count();
    assert!(both.abs_diff(5000) < 250);
    // A flip belongs to the image, not to its place in a batch.
    let other = self::loader(10_000, options(7));
    assert_eq!(flips(&other, 0), first);
    let never = self::loader(1000, LoaderOptions { flip: false, ..options(100) });
    assert_eq!(count(&flips(&never, 0)), 0);
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let order = |seed, epoch| -> Vec<usize> {
        let loader = loader(50, LoaderOptions { seed, ..options(50) });
        collect(loader.epoch(epoch, 0)).remove(0).2
    };
    assert_eq!(order(0, 0), order(0, 0));
    assert_ne!(order(0, 0), order(0, 1));
    assert_ne!(order(0, 0), order(1, 0));
}

#[test]
fn options_that_make_no_batch_are_refused() {
    let refused = |len, options, normalization| {
        Loader::new(toy(len), normalization, options).err().expect("refused").to_string()
    };
    let identity = || Normalization::identity(2);
    let whole = |batch_size| LoaderOptions { drop_last: true, ..options(batch_size) };
    assert!(refused(3, options(0), identity()).contains("batch_size = 0"));
    let message = refused(3, whole(4), identity());
    assert!(message.contains("batch_size = 4") && message.contains("3 images"), "{message}");
    assert!(refused(0, options(1), identity()).contains("toy holds no image"));
    assert!(refused(3, options(1), Normalization::identity(3)).contains("2 channels"));
    assert_eq!(loader(3, whole(3)).batches_per_epoch(), 1);
    assert_eq!(loader(3, whole(2)).batches_per_epoch(), 1);
    assert_eq!(loader(3, options(4)).batches_per_epoch(), 1);
}

/// Ten images of which one is bad in some way; counts the reads.
struct Bad {
    reads: AtomicUsize,
    costly: bool,
    read: fn(usize) -> Result<(), Error>,
}

impl Dataset for Bad {
    fn name(&self) -> &'static str {
        "bad"
    }
    fn len(&self) -> usize {
        10
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
    fn read(&self, index: usize, _: &mut [u8]) -> Result<(), Error> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        (self.read)(index)
    }
    fn is_costly(&self) -> bool {
        self.costly
    }
}

fn bad(costly: bool, prefetch: usize, read: fn(usize) -> Result<(), Error>) -> (Loader, Arc<Bad>) {
    let dataset = Arc::new(Bad { reads: AtomicUsize::new(0), costly, read });
    let options = LoaderOptions { shuffle: false, prefetch, ..options(2) };
    let loader = Loader::new(dataset.clone(), Normalization::identity(2), options);
    (loader.expect("valid options"), dataset)
}

#[test]
fn an_error_or_a_panic_arrives_as_an_item_and_ends_the_epoch() {
    for (costly, prefetch) in [(false, 0), (false, 3), (true, 0), (true, 1)] {
        let (failing, _) = bad(costly, prefetch, |index| match index {
            5 => Err(Error::Dataset("the disk is gone".to_owned())),
            _ => Ok(()),
        });
        let (panicking, _) = bad(costly, prefetch, |index| {
            assert!(index != 5, "a bug in the decoder");
            Ok(())
        });
        for (loader, words) in [(failing, "the disk is gone"), (panicking, "a bug in the decoder")]
        {
            let items: Vec<_> = loader.epoch(0, 0).collect();
            assert_eq!(items.len(), 3);
            assert!(items[..2].iter().all(Result::is_ok));
            let message = items[2].as_ref().expect_err("the third batch").to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}

#[test]
fn dropping_an_epoch_early_stops_its_thread() {
    for costly in [false, true] {
        for taken in 0..3 {
            let (loader, dataset) = bad(costly, 2, |_| {
                std::thread::sleep(Duration::from_millis(2));
                Ok(())
            });
            let mut batches = loader.epoch(0, 0);
            assert_eq!(batches.by_ref().take(taken).flatten().count(), taken);
            drop(batches);
            let reads = dataset.reads.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(dataset.reads.load(Ordering::SeqCst), reads, "still reading");
            // The thread is gone, and with it its handle on the dataset.
            drop(loader);
            assert_eq!(Arc::strong_count(&dataset), 1);
        }
    }
}

/// A trainer may itself run on the only thread of rayon's pool.
#[test]
fn a_loader_used_from_inside_a_pool_of_one_thread_does_not_wait_for_it() {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
        let count = pool.install(|| {
            let (loader, _) = bad(true, 2, |_| Ok(()));
            let mut batches = loader.epoch(0, 0);
            batches.next();
            drop(batches);
            loader.epoch(0, 0).count()
        });
        sender.send(count).expect("the test waits");
    });
    assert_eq!(receiver.recv_timeout(Duration::from_secs(30)), Ok(5));
}

#[test]
fn loads_far_faster_than_a_model_learns() {
    let shape = ImageShape { channels: 3, height: 32, width: 32 };
    let count = 10_000;
    let pixels = vec![7; count * shape.pixels()];
    let dataset = InMemory::new("grey", shape, pixels, vec![0; count], Vec::new()).expect("fits");
    let normalization = Normalization { mean: vec![0.5; 3], std: vec![0.25; 3] };
    let loader = Loader::new(Arc::new(dataset), normalization, LoaderOptions::default());
    let loader = loader.expect("valid options");
    let start = Instant::now();
    let batches = loader.epoch(0, 0).flatten().count();
    let rate = (batches * 128) as f64 / start.elapsed().as_secs_f64();
    // Well over 100,000 in a release build; the bound leaves room for a busy machine.
    assert!(rate > 10_000.0, "{rate:.0} images/s");
}

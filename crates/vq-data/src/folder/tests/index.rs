//! What is kept of a folder from one time to the next, and files that only decoding shows to be broken.

use std::fs::File;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::*;
use crate::{Loader, LoaderOptions, Normalization};

/// A folder of images and one for its index.
struct Place {
    root: tempfile::TempDir,
    cache: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { root: folder(), cache: folder() }
    }

    fn options(&self) -> OpenOptions {
        OpenOptions { cache_dir: Some(self.cache.path().join("new/vq")), ..options() }
    }

    /// The splits, and how many files were looked at.
    fn open(&self) -> (Splits, usize) {
        let seen = Mutex::new(Vec::new());
        let watch = |indexing: Indexing| seen.lock().expect("whole").push(indexing);
        let splits = open(self.root.path(), &self.options(), &watch).expect("images");
        let seen = seen.into_inner().expect("whole");
        let last = seen.iter().map(|indexing| indexing.done).max();
        assert_eq!(last, seen.first().map(|indexing| indexing.total), "not all are done");
        (splits, seen.iter().map(|indexing| indexing.looked_at).max().unwrap_or(0))
    }

    /// Of the index, the file with that extension.
    fn file(&self, extension: &str) -> std::path::PathBuf {
        let files = fs::read_dir(self.cache.path().join("new/vq")).expect("a folder");
        let mut paths = files.map(|file| file.expect("readable").path());
        paths.find(|path| path.extension().is_some_and(|e| e == extension)).expect("is there")
    }

    fn path(&self, relative: &str) -> std::path::PathBuf {
        self.root.path().join(relative)
    }
}

/// All of both splits, in order.
fn all(splits: &Splits) -> Vec<([u8; 3], u32)> {
    [content(splits.train.as_ref()), content(splits.test.as_ref())].concat()
}

/// A PNG whose header and end are right and whose pixels are not.
fn spoil(path: &Path) {
    let mut bytes = fs::read(path).expect("is there");
    let start = bytes.windows(4).position(|w| w == b"IDAT").expect("has pixels") + 4;
    bytes[start..start + 8].fill(0xa5);
    fs::write(path, bytes).expect("writable");
}

#[test]
fn a_second_opening_reads_no_file_and_a_third_what_changed() {
    let place = Place::new();
    for i in 0..30 {
        png(place.root.path(), &format!("{}/{i}.png", i % 3), Rgb([i, 0, 0]));
    }
    text(place.root.path(), "0/text.png");
    text(place.root.path(), "0/notes.txt");
    let (first, looked) = place.open();
    assert_eq!((looked, first.notes.len(), first.broken.len()), (32, 1, 1));
    let (second, looked) = place.open();
    assert_eq!((looked, &second.notes, &second.broken), (0, &first.notes, &first.broken));
    assert_eq!(all(&first), all(&second));

    // Another content, a new file, one that is gone; and one that only has another date.
    png(place.root.path(), "1/1.png", Rgb([200, 0, 0]));
    fs::write(
        place.path("1/1.png"),
        [&fs::read(place.path("1/1.png")).expect("is there")[..], b"-"].concat(),
    )
    .expect("writable");
    png(place.root.path(), "2/new.png", Rgb([201, 0, 0]));
    fs::remove_file(place.path("0/3.png")).expect("was there");
    let touched = File::options().append(true).open(place.path("0/6.png")).expect("is there");
    touched.set_modified(SystemTime::now() - Duration::from_secs(1000)).expect("settable");
    let (third, looked) = place.open();
    assert_eq!(looked, 3);
    let mut reds: Vec<u8> = all(&third).iter().map(|(rgb, _)| rgb[0]).collect();
    reds.sort_unstable();
    let expected: Vec<u8> = (0..30).filter(|i| ![1, 3].contains(i)).chain([200, 201]).collect();
    assert_eq!(reds, expected);
    assert_eq!(place.open().1, 0);

    // What is gone is forgotten: if it comes back it is looked at.
    png(place.root.path(), "0/3.png", Rgb([3, 0, 0]));
    assert_eq!(place.open().1, 1);
    // A file that came to be whole is taken in again.
    png(place.root.path(), "0/text.png", Rgb([99, 0, 0]));
    let (whole, looked) = place.open();
    assert_eq!((looked, whole.broken.len()), (1, 0));
    assert_eq!(all(&whole).len(), 32);
}

#[test]
fn the_index_changes_nothing_but_the_time() {
    let place = Place::new();
    for i in 0..40 {
        png(place.root.path(), &format!("{}/{i}.png", i % 2), Rgb([i, 0, 0]));
    }
    let without = open(place.root.path(), &options(), &|_| ()).expect("images");
    for _ in 0..2 {
        assert_eq!(all(&place.open().0), all(&without));
    }
}

#[test]
fn a_damaged_index_is_made_anew() {
    let place = Place::new();
    for i in 0..9 {
        png(place.root.path(), &format!("{i}.png"), RED);
    }
    place.open();
    let index = place.file("index");
    let whole = fs::read(&index).expect("is there");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    // Of another version, with a checksum that is right.
    let mut other = whole[..whole.len() - 4].to_vec();
    other[7] += 1;
    other.extend(crc32fast::hash(&other).to_le_bytes());
    for bad in [flipped, other, whole[..whole.len() / 3].to_vec(), Vec::new()] {
        fs::write(&index, bad).expect("writable");
        let (splits, looked) = place.open();
        assert_eq!((looked, splits.notes.len()), (9, 0));
        assert_eq!(fs::read(&index).expect("is there"), whole);
        assert_eq!(place.open().1, 0);
    }
    // The index of another folder under this one's name.
    let moved = Place { root: folder(), cache: place.cache };
    png(moved.root.path(), "0.png", RED);
    moved.open();
    let of_moved = crate::folder::Store::new(&moved.cache.path().join("new/vq"), moved.root.path())
        .expect("a folder");
    for file in fs::read_dir(moved.cache.path().join("new/vq")).expect("a folder") {
        fs::write(file.expect("readable").path(), &whole).expect("writable");
    }
    assert!(of_moved.open().is_none());
    assert_eq!(moved.open().1, 1);
}

#[test]
fn where_the_index_cannot_be_written_there_is_none_and_a_note() {
    let place = Place::new();
    png(place.root.path(), "1.png", RED);
    png(place.root.path(), "2.png", RED);
    fs::write(place.cache.path().join("file"), "x").expect("writable");
    let cache_dir = Some(place.cache.path().join("file/vq"));
    for _ in 0..2 {
        let options = OpenOptions { cache_dir: cache_dir.clone(), ..options() };
        let splits = open(place.root.path(), &options, &|_| ()).expect("images");
        assert_eq!(splits.notes.len(), 1);
        assert!(splits.notes[0].contains("VQ_CACHE_DIR"), "{splits:?}");
        assert_eq!(all(&splits).len(), 2);
    }
}

/// The indices, labels and pixels of two epochs.
fn epochs(
    splits: &Splits,
    threads: usize,
    prefetch: usize,
) -> Vec<(Vec<usize>, Vec<u32>, Vec<f32>)> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let options =
        LoaderOptions { batch_size: 7, drop_last: false, prefetch, ..LoaderOptions::default() };
    let loader = pool.install(|| {
        Loader::new(splits.train.clone(), Normalization::identity(3), options).expect("valid")
    });
    let batches = (0..2).flat_map(|epoch| loader.epoch(epoch, 0).collect::<Vec<_>>());
    batches
        .map(|batch| {
            let batch = batch.expect("no error");
            let labels = batch.labels.to_vec1().expect("numbers");
            let pixels = batch.images.flatten_all().and_then(|all| all.to_vec1());
            (batch.indices, labels, pixels.expect("numbers"))
        })
        .collect()
}

/// Files that only decoding shows to be broken neither end an epoch nor change the other images, and what
/// takes their place is the same for any number of threads, any order of reading and the next time.
#[test]
fn broken_pixels_are_replaced_alike_everywhere() {
    let place = Place::new();
    for i in 0..60 {
        png(place.root.path(), &format!("{}/{i:02}.png", i / 20), Rgb([i * 4, 0, 0]));
    }
    let whole = epochs(&place.open().0, 1, 0);
    // Two neighbours, the last of a class, and one more.
    let spoilt = ["0/05.png", "0/06.png", "0/19.png", "2/50.png"];
    for name in spoilt {
        spoil(&place.path(name));
    }

    let (splits, looked) = place.open();
    assert_eq!((looked, splits.broken.len()), (4, 0), "their headers are right");
    let first = epochs(&splits, 1, 0);
    let mut named = [splits.train.take_broken(), Vec::new()].concat();
    assert_eq!(splits.train.take_broken(), []);
    content(splits.test.as_ref());
    named.extend(splits.test.take_broken());
    named.sort_by_key(|broken| broken.path.clone());
    let named: Vec<_> = named.iter().map(|broken| broken.path.clone()).collect();
    assert_eq!(named, spoilt.map(|name| place.path(name)));
    assert_ne!(first, whole, "some are in the train split");
    let mut changed = 0;
    for ((order, labels, pixels), (old_order, old_labels, old_pixels)) in first.iter().zip(&whole) {
        assert_eq!((order, labels), (old_order, old_labels), "a stand-in is of the same class");
        for (pixels, old) in pixels.chunks(192).zip(old_pixels.chunks(192)) {
            changed += usize::from(pixels != old);
        }
    }
    assert!(changed <= 2 * spoilt.len(), "{changed} images of two epochs changed");

    for (threads, prefetch) in [(1, 2), (4, 0), (3, 4)] {
        // Known by now, and named at once.
        let (again, looked) = place.open();
        assert_eq!((looked, again.broken.len(), again.notes.len()), (0, 4, 4), "{:?}", again.notes);
        assert!(again.notes[0].contains("05.png"), "{:?}", again.notes);
        assert_eq!(epochs(&again, threads, prefetch), first);
        // With nothing known.
        let unknown = open(place.root.path(), &options(), &|_| ()).expect("images");
        assert_eq!(epochs(&unknown, threads, prefetch), first);
        let tight = OpenOptions { memory_limit: 0, ..options() };
        let tight = open(place.root.path(), &tight, &|_| ()).expect("images");
        assert_eq!(epochs(&tight, threads, prefetch), first);
    }
    let refuse = OpenOptions { on_broken: OnBroken::Refuse, ..place.options() };
    let message = error(place.root.path(), &refuse);
    assert!(message.contains("4 of 60") && message.contains("05.png"), "{message}");
}

/// A file that is cut off while training runs.
#[test]
fn a_file_that_breaks_later_is_replaced_and_named() {
    let place = Place::new();
    for i in 0..20 {
        png(place.root.path(), &format!("{}/{i:02}.png", i / 18), Rgb([i, 0, 0]));
    }
    let options = OpenOptions { memory_limit: 0, ..place.options() };
    let splits = open(place.root.path(), &options, &|_| ()).expect("images");
    let before = content(splits.train.as_ref());
    let cut = before.iter().position(|(rgb, _)| rgb[0] == 3).expect("is in the train split");
    let path = place.path("0/03.png");
    let bytes = fs::read(&path).expect("is there");
    fs::write(&path, &bytes[..bytes.len() / 2]).expect("writable");
    let mut expected = before.clone();
    expected[cut] = before[cut + 1];
    assert_eq!(content(splits.train.as_ref()), expected);
    assert_eq!(content(splits.train.as_ref()), expected);
    let broken = splits.train.take_broken();
    assert_eq!(broken.iter().map(|broken| &broken.path).collect::<Vec<_>>(), [&path]);
    assert!(broken[0].to_string().starts_with(&path.display().to_string()));
    // The next time it is left out.
    let later = open(place.root.path(), &options, &|_| ()).expect("images");
    assert_eq!(later.broken.len(), 1);
    assert_eq!(later.train.len(), before.len() - 1);
}

#[test]
fn where_a_class_has_no_other_image_one_of_the_next_stands_in_with_its_label() {
    let place = Place::new();
    for (split, count) in [("train", 4), ("test", 1)] {
        for i in 0..count {
            png(place.root.path(), &format!("{split}/{i}/x.png"), Rgb([i, 0, 0]));
        }
    }
    spoil(&place.path("train/3/x.png"));
    let (splits, _) = place.open();
    assert_eq!(
        content(splits.train.as_ref()),
        [([0, 0, 0], 0), ([1, 0, 0], 1), ([2, 0, 0], 2), ([0, 0, 0], 0)]
    );
}

use std::fs;

use image::{GrayImage, ImageBuffer, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};

use super::*;
use crate::picture;

mod index;

const RED: Rgb<u8> = Rgb([250, 10, 20]);

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn options() -> OpenOptions {
    OpenOptions { size: [8, 8], ..OpenOptions::default() }
}

/// A PNG of one colour at `root/relative`.
fn png(root: &Path, relative: &str, color: Rgb<u8>) {
    let path = root.join(relative);
    fs::create_dir_all(path.parent().expect("below the root")).expect("writable");
    RgbImage::from_pixel(10, 12, color).save_with_format(path, ImageFormat::Png).expect("writable");
}

fn text(root: &Path, relative: &str) {
    let path = root.join(relative);
    fs::create_dir_all(path.parent().expect("below the root")).expect("writable");
    fs::write(path, "not an image").expect("writable");
}

/// The first pixels (RGB) and labels of a split, in order.
fn content(dataset: &dyn Dataset) -> Vec<([u8; 3], u32)> {
    let mut image = vec![0; dataset.shape().pixels()];
    (0..dataset.len())
        .map(|index| {
            dataset.read(index, &mut image).expect("readable");
            ([image[0], image[64], image[128]], dataset.label(index))
        })
        .collect()
}

fn error(root: &Path, options: &OpenOptions) -> String {
    let message = open(root, options, &|_| ()).expect_err("must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn classes_are_the_sorted_names_of_the_first_folders() {
    let root = folder();
    for i in 0..20 {
        png(root.path(), &format!("dogs/{i}.png"), Rgb([1, i, 0]));
        png(root.path(), &format!("cats/deep/er/{i}.png"), Rgb([0, i, 0]));
    }
    text(root.path(), "README.txt");
    text(root.path(), ".hidden/a.png");
    text(root.path(), "dogs/.DS_Store.png");
    let splits = open(root.path(), &options(), &|_| ()).expect("images");
    assert_eq!(splits.train.class_names(), ["cats", "dogs"]);
    assert_eq!(splits.notes, [""; 0]);
    let mut all = content(splits.train.as_ref());
    assert!(!all.is_empty() && all.len() < 40);
    all.extend(content(splits.test.as_ref()));
    assert_eq!(all.len(), 40);
    assert!(all.iter().all(|(rgb, label)| u32::from(rgb[0]) == *label));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 40, "an image is in both splits, or in none");
}

#[test]
fn a_tenth_is_held_out_by_name_and_seed() {
    let root = folder();
    for i in 0..200_u8 {
        png(root.path(), &format!("{i}.png"), Rgb([i, 0, 0]));
    }
    let test = |options: &OpenOptions| {
        let splits = open(root.path(), options, &|_| ()).expect("images");
        assert_eq!(splits.train.class_names(), [""; 0]);
        content(splits.test.as_ref())
    };
    let first = test(&options());
    assert!((8..36).contains(&first.len()), "{}", first.len());
    assert_eq!(first, test(&options()));
    assert_ne!(first, test(&OpenOptions { seed: 1, ..options() }));
    // Decoded at each read: the same.
    assert_eq!(first, test(&OpenOptions { memory_limit: 0, ..options() }));
    // A new image moves no other.
    png(root.path(), "another.png", Rgb([255, 0, 0]));
    let mut later = test(&options());
    later.retain(|(rgb, _)| rgb[0] != 255);
    assert_eq!(first, later);
}

#[test]
fn each_split_of_a_few_images_holds_one() {
    for count in 1..6 {
        let root = folder();
        for i in 0..count {
            png(root.path(), &format!("{i}.png"), RED);
        }
        for seed in 0..20 {
            let splits =
                open(root.path(), &OpenOptions { seed, ..options() }, &|_| ()).expect("images");
            assert!(!splits.train.is_empty() && !splits.test.is_empty());
            let total = splits.train.len() + splits.test.len();
            assert_eq!(total, count.max(2));
            assert_eq!(splits.notes.len(), usize::from(count == 1));
        }
    }
}

#[test]
fn folders_named_after_splits_are_the_splits() {
    for name in ["test", "val", "Validation"] {
        let root = folder();
        png(root.path(), "train/b/1.png", Rgb([1, 0, 0]));
        png(root.path(), "train/c/1.png", Rgb([2, 0, 0]));
        png(root.path(), &format!("{name}/a/1.png"), Rgb([0, 0, 0]));
        png(root.path(), &format!("{name}/c/1.png"), Rgb([2, 0, 0]));
        png(root.path(), "extra/1.png", RED);
        let splits = open(root.path(), &options(), &|_| ()).expect("images");
        assert_eq!(splits.train.class_names(), ["a", "b", "c"]);
        assert_eq!(splits.test.class_names(), ["a", "b", "c"]);
        assert_eq!(content(splits.train.as_ref()), [([1, 0, 0], 1), ([2, 0, 0], 2)]);
        assert_eq!(content(splits.test.as_ref()), [([0, 0, 0], 0), ([2, 0, 0], 2)]);
        assert!(splits.notes[0].contains("left out: extra"), "{splits:?}");
    }
    let root = folder();
    png(root.path(), "train/1.png", RED);
    fs::create_dir(root.path().join("test")).expect("writable");
    let message = error(root.path(), &options());
    assert!(message.contains("test holds no image"), "{message}");
}

#[test]
fn broken_files_are_named_and_skipped_or_refused() {
    let root = folder();
    for i in 0..5 {
        png(root.path(), &format!("{i}.png"), RED);
    }
    text(root.path(), "text.png");
    fs::write(root.path().join("empty.jpg"), b"").expect("writable");
    let whole = fs::read(root.path().join("0.png")).expect("is there");
    fs::write(root.path().join("half.png"), &whole[..whole.len() / 2]).expect("writable");
    text(root.path(), "photo.heic");

    let splits = open(root.path(), &options(), &|_| ()).expect("five images");
    assert_eq!(splits.train.len() + splits.test.len(), 5);
    let names: Vec<_> = splits.broken.iter().filter_map(|b| b.path.file_name()).collect();
    assert_eq!(names, ["empty.jpg", "half.png", "photo.heic", "text.png"]);
    assert!(splits.notes[3].contains("text.png: its content is not PNG"), "{splits:?}");

    let message = error(root.path(), &OpenOptions { on_broken: OnBroken::Refuse, ..options() });
    assert!(message.contains("4 of 9") && message.contains("empty.jpg"), "{message}");

    for i in 0..5 {
        fs::remove_file(root.path().join(format!("{i}.png"))).expect("was there");
    }
    let message = error(root.path(), &options());
    assert!(message.contains("none of the 4"), "{message}");

    let mut notes = Vec::new();
    note_broken("skipped ", &vec![splits.broken[0].clone(); 30], &mut notes);
    assert_eq!(notes.len(), 21);
    assert!(notes[20].contains("10 more"));
}

#[test]
fn folders_without_images_are_refused() {
    let root = folder();
    assert!(error(root.path(), &options()).contains("holds no image"));
    text(root.path(), "notes.txt");
    assert!(error(root.path(), &options()).contains("holds no image"));
    assert!(error(&root.path().join("notes.txt"), &options()).contains("is not a folder"));
    assert!(error(&root.path().join("nowhere"), &options()).contains("is not a folder"));
}

#[cfg(unix)]
#[test]
fn a_link_to_a_folder_above_is_not_followed_forever() {
    let root = folder();
    png(root.path(), "a/1.png", RED);
    png(root.path(), "a/2.png", RED);
    std::os::unix::fs::symlink(root.path(), root.path().join("a/up")).expect("writable");
    std::os::unix::fs::symlink("nowhere", root.path().join("a/gone.png")).expect("writable");
    let splits = open(root.path(), &options(), &|_| ()).expect("images");
    assert_eq!(splits.train.len() + splits.test.len(), 2);
    assert_eq!(splits.broken.len(), 1);
}

#[test]
fn where_all_files_break_later_the_error_names_one() {
    for (on_broken, words) in
        [(OnBroken::Skip, "none of the 1"), (OnBroken::Refuse, ".png is not a readable image")]
    {
        let root = folder();
        png(root.path(), "1.png", RED);
        png(root.path(), "2.png", RED);
        let options = OpenOptions { on_broken, ..options() };
        let splits = open(root.path(), &options, &|_| ()).expect("images");
        text(root.path(), "1.png");
        text(root.path(), "2.png");
        let error = splits.train.read(0, &mut [0; 192]).expect_err("broken by now").to_string();
        assert!(error.contains(words) && error.contains(".png"), "{error}");
    }
}

/// Every format and kind of pixel, under names that say nothing, or something wrong.
#[test]
fn formats_are_told_by_content() {
    let root = folder();
    let rgb = RgbImage::from_pixel(9, 9, RED);
    let formats = [
        (ImageFormat::Png, "png.jpg"),
        (ImageFormat::Jpeg, "jpeg"),
        (ImageFormat::WebP, "webp.bin"),
        (ImageFormat::Gif, "gif.png"),
        (ImageFormat::Bmp, "bmp"),
        (ImageFormat::Tiff, "tiff.dat"),
    ];
    for (format, name) in formats {
        rgb.save_with_format(root.path().join(name), format).expect("writable");
    }
    let png = |name: &str| root.path().join(name);
    let deep = Rgb([250_u16 * 257, 10 * 257, 20 * 257]);
    let deep: ImageBuffer<Rgb<u16>, Vec<u16>> = ImageBuffer::from_pixel(9, 9, deep);
    deep.save_with_format(png("deep"), ImageFormat::Png).expect("writable");
    let splits = open(root.path(), &options(), &|_| ()).expect("images");
    assert_eq!(splits.broken, []);
    let mut all = content(splits.train.as_ref());
    all.extend(content(splits.test.as_ref()));
    assert_eq!(all.len(), 7);
    for (rgb, _) in all {
        assert!(rgb.iter().zip(RED.0).all(|(a, b)| a.abs_diff(b) < 6), "{rgb:?}");
    }
}

#[test]
fn grey_and_transparent_images_become_rgb() {
    let root = folder();
    let check = |expected: [u8; 3]| {
        let image = picture::load(root.path().join("x.png")).expect("an image");
        assert_eq!(image.get_pixel(3, 3).0, expected);
    };
    GrayImage::from_pixel(9, 9, Luma([77])).save(root.path().join("x.png")).expect("writable");
    check([77; 3]);
    let grey: ImageBuffer<Luma<u16>, Vec<u16>> = ImageBuffer::from_pixel(9, 9, Luma([77 * 257]));
    grey.save(root.path().join("x.png")).expect("writable");
    check([77; 3]);
    let clear = RgbaImage::from_pixel(9, 9, Rgba([10, 20, 30, 0]));
    clear.save(root.path().join("x.png")).expect("writable");
    check([255; 3]);
    let half = RgbaImage::from_pixel(9, 9, Rgba([0, 255, 100, 51]));
    half.save(root.path().join("x.png")).expect("writable");
    check([204, 255, 224]);
}

#[test]
fn cmyk_jpegs_have_their_colours() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/cmyk.jpg");
    let image = picture::load(path).expect("an image");
    let near = |x, expected: [u8; 3]| {
        let found = image.get_pixel(x, 8).0;
        assert!(found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) < 40), "{found:?}");
    };
    near(3, [255, 0, 0]);
    near(12, [0, 0, 255]);
}

/// A bitmap's header and nothing after it.
#[test]
fn an_image_that_claims_to_be_huge_is_refused() {
    let mut bitmap = vec![0; 54];
    bitmap[..2].copy_from_slice(b"BM");
    let fields = [(10, 54), (14, 40), (18, 60_000), (22, 60_000), (26, 1 | 24 << 16)];
    for (at, value) in fields {
        bitmap[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    let root = folder();
    let path = root.path().join("bomb.bmp");
    fs::write(&path, bitmap).expect("writable");
    let error = picture::load(&path).expect_err("too large").to_string();
    assert!(error.contains("60000×60000"), "{error}");
}

#[test]
fn photos_are_turned_upright() {
    // The left half is black and the right half white.
    let image = RgbImage::from_fn(16, 8, |x, _| Rgb([if x < 8 { 0 } else { 255 }; 3]));
    let root = folder();
    let path = root.path().join("photo.jpg");
    image.save(&path).expect("writable");
    let jpeg = fs::read(&path).expect("is there");
    // "Rotate by 90° clockwise", after the start-of-image marker.
    let exif =
        b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    fs::write(&path, [&jpeg[..2], exif, &jpeg[2..]].concat()).expect("writable");
    let upright = picture::load(&path).expect("an image");
    assert_eq!(upright.dimensions(), (8, 16));
    assert!(upright.get_pixel(4, 2).0[0] < 40 && upright.get_pixel(4, 13).0[0] > 215);
}

#[test]
fn the_shorter_side_is_scaled_and_the_middle_is_kept() {
    // Three squares side by side: red, green, blue.
    let colors = [[255, 0, 0], [0, 255, 0], [0, 0, 255]];
    let wide = RgbImage::from_fn(60, 20, |x, _| Rgb(colors[x as usize / 20]));
    let square = picture::fit(&wide, [10, 10]);
    assert_eq!(square.dimensions(), (10, 10));
    assert!(square.pixels().all(|p| p.0 == colors[1]));
    let tall = image::imageops::rotate90(&wide);
    assert!(picture::fit(&tall, [40, 40]).pixels().all(|p| p.0 == colors[1]));
    // All of it where the proportions are the same, and nothing at all where the size is.
    let small = picture::fit(&wide, [10, 30]);
    assert_eq!([4, 14, 24].map(|x| small.get_pixel(x, 5).0), colors);
    assert_eq!(picture::fit(&wide, [20, 60]), wide);
    assert_eq!(picture::fit(&wide, [20, 20]).get_pixel(0, 0).0, colors[1]);
    assert_eq!(picture::fit(&RgbImage::new(1, 900), [4, 7]).dimensions(), (7, 4));
    assert_eq!(
        picture::to_chw(&RgbImage::from_raw(2, 1, vec![1, 2, 3, 4, 5, 6]).expect("fits")),
        [1, 4, 2, 5, 3, 6]
    );
}

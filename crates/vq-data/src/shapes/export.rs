//! The built-in set as a folder of image files: a stand-in where a large data set is not at hand.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, RgbImage};
use rayon::prelude::*;

use super::{CLASSES, Style, render};
use crate::Error;
use crate::source::check_size;

/// How to [`make_images`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MakeOptions {
    /// Height and width of the images, in pixels.
    pub size: [usize; 2],
    /// Images in all, spread evenly over the classes.
    pub count: usize,
    /// Which set to draw from; see [`render`].
    pub seed: u64,
    /// The classes to draw, indices into [`CLASSES`]; empty = all of them.
    pub classes: Vec<u32>,
    /// The format of the files.
    pub format: FileFormat,
    /// Whether the images that an earlier call left in the folder give way to the new ones. Without it
    /// a folder that is not empty is refused.
    pub overwrite: bool,
}

/// The format of the files that [`make_images`] writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileFormat {
    /// Without loss.
    #[default]
    Png,
    /// At quality 95: several times smaller, and what photographs come in.
    Jpeg,
}

impl Default for MakeOptions {
    fn default() -> Self {
        Self {
            size: [256, 256],
            count: 1000,
            seed: 0,
            classes: Vec::new(),
            format: FileFormat::default(),
            overwrite: false,
        }
    }
}

/// Draws images of the built-in set into files `FOLDER/CLASS/INDEX.png`, on all of rayon's threads.
///
/// INDEX is that of [`render`]: a file's content depends on seed, index, size and format alone, so a
/// larger `count` only adds files. `progress` is told how many are done, from any thread.
///
/// An error ends it; it leaves whole files, and none of half of an image.
pub fn make_images(
    folder: &Path,
    options: &MakeOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(), Error> {
    check_size(options.size)?;
    let mut classes = options.classes.clone();
    classes.sort_unstable();
    classes.dedup();
    if classes.is_empty() {
        classes = (0..CLASSES.len() as u32).collect();
    }
    if let Some(class) = classes.iter().find(|&&class| class as usize >= CLASSES.len()) {
        let most = CLASSES.len() - 1;
        return Err(Error::Dataset(format!("there is no class {class}: they go from 0 to {most}")));
    }
    prepare(folder, options.overwrite)?;
    let folders: Vec<PathBuf> = classes
        .iter()
        .map(|&class| folder.join(CLASSES.get(class as usize).copied().unwrap_or_default()))
        .collect();
    for folder in &folders {
        fs::create_dir_all(folder).map_err(Error::write(folder))?;
    }
    let done = AtomicUsize::new(0);
    (0..options.count).into_par_iter().try_for_each(|number| {
        let (round, position) = (number / classes.len(), number % classes.len());
        // Both are there: the folders are made from the classes.
        let (Some(&class), Some(folder)) = (classes.get(position), folders.get(position)) else {
            return Ok(());
        };
        let index = (round * CLASSES.len()) as u64 + u64::from(class);
        let (bytes, extension) = encode(options, index)?;
        write(&folder.join(format!("{index:0DIGITS$}.{extension}")), &bytes)?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        Ok(())
    })
}

/// Digits of the number that a file is named by.
const DIGITS: usize = 8;

/// Makes the folder; refuses one that holds anything, or clears it of what a call before has made.
fn prepare(folder: &Path, overwrite: bool) -> Result<(), Error> {
    if folder.exists() && !folder.is_dir() {
        return Err(Error::NotAFolder(folder.into()));
    }
    fs::create_dir_all(folder).map_err(Error::write(folder))?;
    if !overwrite {
        let mut entries = fs::read_dir(folder).map_err(Error::io(folder))?;
        return match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::FolderInUse(folder.into())),
        };
    }
    for class in CLASSES.map(|class| folder.join(class)) {
        if !class.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&class).map_err(Error::io(&class))? {
            let path = entry.map_err(Error::io(&class))?.path();
            if is_ours(&path) {
                fs::remove_file(&path).map_err(Error::write(&path))?;
            }
        }
    }
    Ok(())
}

/// Whether the file is called as those that are written here.
fn is_ours(path: &Path) -> bool {
    let part =
        |part: Option<&std::ffi::OsStr>| part.map(|text| text.to_string_lossy().into_owned());
    let stem = part(path.file_stem()).unwrap_or_default();
    let extension = part(path.extension()).unwrap_or_default();
    stem.len() == DIGITS
        && stem.bytes().all(|byte| byte.is_ascii_digit())
        && ["png", "jpg"].contains(&extension.as_str())
}

/// Image `index` as a file's bytes, and the file's extension.
fn encode(options: &MakeOptions, index: u64) -> Result<(Vec<u8>, &'static str), Error> {
    let [height, width] = options.size;
    let (planes, _) = render(Style::Textured, options.seed, index, [height, width]);
    let plane = height * width;
    let image = RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = y as usize * width + x as usize;
        image::Rgb([planes[at], planes[plane + at], planes[2 * plane + at]])
    });
    let mut bytes = Cursor::new(Vec::new());
    let (written, extension) = match options.format {
        FileFormat::Png => (image.write_to(&mut bytes, ImageFormat::Png), "png"),
        FileFormat::Jpeg => {
            (image.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, 95)), "jpg")
        }
    };
    written.map_err(|error| Error::Dataset(format!("image {index} cannot be encoded: {error}")))?;
    Ok((bytes.into_inner(), extension))
}

/// On an error, a full disk say, the part that was written is removed.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(|error| {
        let _ = fs::remove_file(path);
        Error::write(path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture;

    fn options(count: usize) -> MakeOptions {
        MakeOptions { size: [20, 24], count, seed: 3, ..MakeOptions::default() }
    }

    /// All files below a folder and their bytes.
    fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                files.extend(self::files(&path));
            } else {
                files.push((path.clone(), fs::read(&path).expect("readable")));
            }
        }
        files.sort();
        files
    }

    #[test]
    fn the_files_are_the_images_of_the_set() {
        let folder = tempfile::tempdir().expect("a folder");
        let most = AtomicUsize::new(0);
        let progress = |done| {
            most.fetch_max(done, Ordering::Relaxed);
        };
        make_images(folder.path(), &options(23), &progress).expect("made");
        assert_eq!((files(folder.path()).len(), most.into_inner()), (23, 23));
        for (index, class) in [(0, "circle"), (13, "hexagon"), (22, "triangle")] {
            let path = folder.path().join(class).join(format!("{index:08}.png"));
            let image = picture::load(path).expect("an image");
            assert_eq!(image.dimensions(), (24, 20));
            assert_eq!(picture::to_chw(&image), render(Style::Textured, 3, index, [20, 24]).0);
        }
    }

    #[test]
    fn only_some_classes_and_another_format() {
        let folder = tempfile::tempdir().expect("a folder");
        let some = MakeOptions { classes: vec![4, 0, 4], format: FileFormat::Jpeg, ..options(5) };
        make_images(folder.path(), &some, &|_| ()).expect("made");
        let names: Vec<PathBuf> = files(folder.path())
            .into_iter()
            .filter_map(|(path, _)| path.strip_prefix(folder.path()).ok().map(Path::to_path_buf))
            .collect();
        let expected = [
            "circle/00000000",
            "circle/00000010",
            "circle/00000020",
            "star/00000004",
            "star/00000014",
        ];
        let expected: Vec<_> =
            expected.iter().map(|name| PathBuf::from(format!("{name}.jpg"))).collect();
        assert_eq!(names, expected);
        let unknown = MakeOptions { classes: vec![10], overwrite: true, ..options(5) };
        assert!(make_images(folder.path(), &unknown, &|_| ()).is_err());
    }

    #[test]
    fn a_folder_in_use_is_refused_and_foreign_files_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        make_images(folder.path(), &options(30), &|_| ()).expect("made");
        let before = files(folder.path());
        let error = make_images(folder.path(), &options(10), &|_| ()).expect_err("in use");
        assert!(error.to_string().contains("--overwrite"), "{error}");
        assert_eq!(files(folder.path()), before);

        fs::write(folder.path().join("star/mine.png"), "mine").expect("writable");
        let again = MakeOptions { overwrite: true, ..options(10) };
        make_images(folder.path(), &again, &|_| ()).expect("made");
        let after = files(folder.path());
        assert_eq!(after.len(), 11);
        assert!(after.iter().any(|(path, bytes)| path.ends_with("mine.png") && bytes == b"mine"));
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "x").expect("writable");
        let error = make_images(&file, &options(1), &|_| ()).expect_err("a file");
        assert!(error.to_string().contains("is not a folder"), "{error}");
        fs::create_dir_all(folder.path().join("new/circle/00000000.png")).expect("writable");
        let over = MakeOptions { overwrite: true, ..options(1) };
        let error = make_images(&folder.path().join("new"), &over, &|_| ()).expect_err("a folder");
        let text = error.to_string();
        assert!(text.contains("cannot write") && text.contains("00000000.png"), "{text}");
        let none = MakeOptions { size: [0, 8], ..options(1) };
        assert!(matches!(
            make_images(&folder.path().join("x"), &none, &|_| ()),
            Err(Error::ImageSize { .. })
        ));
    }
}

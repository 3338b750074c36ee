//! Files that appear whole or not at all.

use std::{
    io::{self, Cursor, Write as _},
    path::Path,
};

use image::{ImageFormat, RgbImage};

use crate::{Error, Result};

/// Writes `image` to `path` as PNG, atomically. The folder must exist.
///
/// # Errors
/// [`Error::Encode`] for an image without pixels, [`Error::Write`] where the file system refuses. A file that was
/// there before is then untouched, and no temporary file stays behind.
pub fn save_png(image: &RgbImage, path: &Path) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|cause| Error::Encode { path: path.to_owned(), cause })?;
    write_atomically(path, bytes.get_ref())
}

/// Writes `bytes` to a temporary file beside `path`, syncs it and renames it to `path`.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_and_rename(path, bytes).map_err(|cause| Error::Write { path: path.to_owned(), cause })
}

fn write_and_rename(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if path.file_name().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.exists() {
        let message = format!("the folder {} does not exist", folder.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".vq-viz-").suffix(".tmp");
    // Temporary files are private by default; a picture is an ordinary file, whose mode the umask decides.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(|e| without_temporary_name(&e))?;
    // Through the file itself: the wrapper's errors hold the temporary name too.
    file.as_file_mut().write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// tempfile ends its errors with the name of its own file; the user asked for another one.
fn without_temporary_name(error: &io::Error) -> io::Error {
    let message = error.to_string();
    let cause = message.split_once(" at path ").map_or(message.as_str(), |(cause, _)| cause);
    io::Error::new(error.kind(), cause)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_png_reads_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let image = RgbImage::from_fn(5, 3, |x, y| image::Rgb([x as u8, y as u8, 200]));
        save_png(&image, &path).unwrap();
        assert_eq!(image::open(&path).unwrap().into_rgb8(), image);
        assert_eq!(names(folder.path()), ["a.png"]);
    }

    #[test]
    fn an_old_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::write(&path, "old").unwrap();
        save_png(&RgbImage::new(2, 2), &path).unwrap();
        assert_eq!(image::open(&path).unwrap().width(), 2);
        assert_eq!(names(folder.path()), ["a.png"]);
    }

    #[cfg(unix)]
    #[test]
    fn the_mode_is_that_of_an_ordinary_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777
        };
        fs::write(folder.path().join("ordinary"), "").unwrap();
        save_png(&RgbImage::new(1, 1), &folder.path().join("a.png")).unwrap();
        assert_eq!(mode("a.png"), mode("ordinary"));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("a.png");
        let message = save_png(&RgbImage::new(1, 1), &path).unwrap_err().to_string();
        assert!(message.contains(&path.display().to_string()), "{message}");
        assert!(message.contains("does not exist"), "{message}");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_failed_rename_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "kept").unwrap();
        let message = save_png(&RgbImage::new(1, 1), &path).unwrap_err().to_string();
        assert!(message.contains(&path.display().to_string()), "{message}");
        assert!(!message.contains(".vq-viz-"), "{message}");
        assert_eq!(names(folder.path()), ["a.png"]);
        assert_eq!(fs::read_to_string(path.join("inside")).unwrap(), "kept");
    }

    #[test]
    fn a_file_in_the_folders_place_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "kept").unwrap();
        let path = folder.path().join("file").join("a.png");
        let message = save_png(&RgbImage::new(1, 1), &path).unwrap_err().to_string();
        assert!(message.starts_with("cannot write"), "{message}");
        assert!(!message.contains(".vq-viz-"), "{message}");
        assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "kept");
    }

    #[cfg(unix)]
    #[test]
    fn an_unwritable_folder_is_an_error_and_keeps_the_old_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
        // The superuser writes everywhere: nothing to see then.
        if fs::write(folder.path().join("probe"), "").is_err() {
            let message = save_png(&RgbImage::new(1, 1), &path).unwrap_err().to_string();
            assert!(message.contains("ermission denied"), "{message}");
            assert!(!message.contains(".vq-viz-"), "{message}");
            assert_eq!(names(folder.path()), ["a.png"]);
            assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_path_without_a_file_name_and_an_empty_image_are_errors() {
        for path in ["", "/", ".."] {
            let error = save_png(&RgbImage::new(1, 1), Path::new(path)).unwrap_err();
            assert!(error.to_string().contains("not the name of a file"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(save_png(&RgbImage::new(0, 0), &folder.path().join("a.png")).is_err());
        assert!(names(folder.path()).is_empty());
    }
}

//! The folder that `vq sample` writes to.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::error::{Error, Result};
use crate::file;

/// `grid.png` and the images by themselves, `00000.png` and so on.
#[derive(Debug)]
pub(super) struct SampleFolder {
    path: PathBuf,
}

impl SampleFolder {
    /// A folder that may be there already. Images of such names are taken for those of an earlier run where
    /// its `grid.png` lies beside them; elsewhere they are refused, unless they are to be overwritten.
    /// Nothing is changed yet.
    pub(super) fn new(path: &Path, overwrite: bool) -> Result<Self> {
        let folder = Self { path: path.to_owned() };
        if !overwrite
            && !folder.grid().exists()
            && let Some(image) = folder.images()?.first()
        {
            return Err(Error::other(format!(
                "{} is there, and no grid.png beside it, so that another program may have made it: write elsewhere \
                 (--out), or replace all such images in the folder (--overwrite)",
                image.display()
            )));
        }
        Ok(folder)
    }

    /// Makes the folder and clears it of an earlier run's grid and images, however many these are.
    pub(super) fn start(&self) -> Result<()> {
        file::make_folder(&self.path)?;
        for path in self.images()?.into_iter().chain([self.grid()]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::write(&path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the picture of all images goes.
    pub(super) fn grid(&self) -> PathBuf {
        self.path.join("grid.png")
    }

    /// Where an image goes.
    pub(super) fn image(&self, index: usize) -> PathBuf {
        self.path.join(format!("{index:05}.png"))
    }

    /// The files that have names of [`image`](Self::image), in their order.
    fn images(&self) -> Result<Vec<PathBuf>> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let entries = match fs::read_dir(&self.path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
            let names = names.collect::<io::Result<Vec<_>>>()?;
            let mut numbers: Vec<usize> =
                names.iter().filter_map(|name| number(name.to_str()?)).collect();
            numbers.sort_unstable();
            Ok(numbers.into_iter().map(|number| self.image(number)).collect())
        };
        list().map_err(Error::read(&self.path))
    }
}

/// Of which image a file has the name.
fn number(name: &str) -> Option<usize> {
    let digits = name.strip_suffix(".png")?;
    let number = digits.parse().ok()?;
    (digits == format!("{number:05}")).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_run_is_cleared_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples");
        SampleFolder::new(&path, false).unwrap().start().unwrap();
        let names = |path: &Path| {
            let mut names: Vec<String> = fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert!(names(&path).is_empty());
        let others = ["+0001.png", "000001.png", "00001.jpg", "0001.png", "notes.txt"];
        for name in others.into_iter().chain(["00000.png", "00007.png", "123456.png"]) {
            fs::write(path.join(name), "x").unwrap();
        }
        let error = SampleFolder::new(&path, false).unwrap_err().to_string();
        for part in ["00000.png", "grid.png", "--out", "--overwrite"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(names(&path).len(), 8);
        fs::write(path.join("grid.png"), "x").unwrap();
        let open = SampleFolder::new(&path, false).unwrap();
        assert_eq!(names(&path).len(), 9);
        open.start().unwrap();
        assert_eq!(names(&path), others);
        fs::write(path.join("00000.png"), "x").unwrap();
        SampleFolder::new(&path, true).unwrap().start().unwrap();
        assert_eq!(names(&path), others);
    }
}

//! The folder that a run writes.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::{BEST, CHECKPOINTS, LAST};
use crate::{Checkpoints, Error, PriorRecipe, Recipe, Result};

/// The resolved recipe of a run.
pub const RECIPE_FILE: &str = "config.toml";
/// The metrics of a run, one JSON object per line.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// What a process that writes a run has locked.
const LOCK_FILE: &str = ".lock";

/// Why a run of a comparison failed, where it did.
pub(crate) const FAILURE_FILE: &str = "failed.txt";

/// The folder that a run writes: recipe, metrics, checkpoints, pictures.
///
/// Whoever [creates](Self::create) or [resumes](Self::resume) a run has its folder alone until this and all of its
/// clones are dropped.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// None of a run that is only read, and on file systems without locks.
    _lock: Option<Arc<File>>,
}

impl RunFolder {
    /// For a new run: makes the folder and writes the recipe into it. A folder that holds a run is
    /// refused, or, to `overwrite`, cleared of what runs write (and of nothing else).
    pub fn create(path: impl Into<PathBuf>, recipe: &Recipe, overwrite: bool) -> Result<Self> {
        Self::create_with(path.into(), overwrite, |file| recipe.save(file))
    }

    /// The same for the run of a prior.
    pub fn create_prior(
        path: impl Into<PathBuf>,
        recipe: &PriorRecipe,
        overwrite: bool,
    ) -> Result<Self> {
        Self::create_with(path.into(), overwrite, |file| recipe.save(file))
    }

    fn create_with(
        path: PathBuf,
        overwrite: bool,
        save: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        if !overwrite {
            Self::require_free(&path)?;
        }
        fs::create_dir_all(&path).map_err(Error::write(&path))?;
        let run = Self::locked(path)?;
        run.clear()?;
        save(&run.recipe_file())?;
        Ok(run)
    }

    /// Refuses a folder that holds a run. [`create`](Self::create) does so too; this is for finding out
    /// before the data are read.
    pub fn require_free(path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let is_there = |name: &&str| fs::symlink_metadata(path.join(name)).is_ok();
        if [RECIPE_FILE, METRICS_FILE, CHECKPOINTS, LAST, BEST].iter().any(is_there) {
            return Err(Error::Occupied { path: path.to_path_buf() });
        }
        Ok(())
    }

    /// Of a run that is to go on. One that another process writes is refused.
    pub fn resume(path: impl Into<PathBuf>) -> Result<Self> {
        Self::locked(Self::open(path)?.path)
    }

    fn locked(path: PathBuf) -> Result<Self> {
        let name = path.join(LOCK_FILE);
        let file = File::options().append(true).create(true).open(&name);
        let file = file.map_err(Error::write(&name))?;
        let lock = match file.try_lock() {
            Ok(()) => Some(Arc::new(file)),
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path }),
            // There are file systems that have none.
            Err(TryLockError::Error(_)) => None,
        };
        Ok(Self { path, _lock: lock })
    }

    /// Of a run that is to be read.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let run = Self { path: path.into(), _lock: None };
        if run.recipe_file().is_file() {
            return Ok(run);
        }
        let problem = format!(
            "holds no {RECIPE_FILE}, so there is no run to resume; start one without --resume"
        );
        Err(Error::NoRun { path: run.path, problem })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of the recipe.
    pub fn recipe_file(&self) -> PathBuf {
        self.path.join(RECIPE_FILE)
    }

    /// The file of the metrics.
    pub fn metrics_file(&self) -> PathBuf {
        self.path.join(METRICS_FILE)
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::new(&self.path)
    }

    /// The recipe that the run was started with.
    pub fn recipe(&self) -> Result<Recipe> {
        let file = self.recipe_file();
        Recipe::from_file(&file).map_err(|error| match PriorRecipe::from_file(&file) {
            Ok(_) => self.is_of("prior", "train-prior"),
            Err(_) => error,
        })
    }

    /// The recipe that the run of a prior was started with.
    pub fn prior_recipe(&self) -> Result<PriorRecipe> {
        let file = self.recipe_file();
        PriorRecipe::from_file(&file).map_err(|error| match Recipe::from_file(&file) {
            Ok(_) => self.is_of("model", "train"),
            Err(_) => error,
        })
    }

    fn is_of(&self, what: &str, command: &str) -> Error {
        let problem = format!("holds the run of a {what}, which belongs to `vq {command}`");
        Error::NoRun { path: self.path.clone(), problem }
    }

    fn clear(&self) -> Result<()> {
        if Self::require_free(&self.path).is_ok() {
            return Ok(());
        }
        for entry in fs::read_dir(&self.path).map_err(Error::read(&self.path))? {
            let path = entry.map_err(Error::read(&self.path))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let removed = match name.as_str() {
                CHECKPOINTS => {
                    self.checkpoints().clear()?;
                    continue;
                }
                RECIPE_FILE | METRICS_FILE | FAILURE_FILE | LAST | BEST | "curves.svg"
                | "codebook.svg" => fs::remove_file(&path),
                name if is_picture(name) => fs::remove_file(&path),
                _ => Ok(()),
            };
            removed.map_err(Error::write(&path))?;
        }
        Ok(())
    }
}

/// `epoch_N_orig.png`, `epoch_N_recon.png`, `epoch_N_recon_levelL.png`, `epoch_N_samples.png`, and `codebook.N.svg` of the levels
/// above the bottom.
fn is_picture(name: &str) -> bool {
    let is_number = |text: &str| text.parse::<u64>().is_ok();
    let grid = name.strip_prefix("epoch_").and_then(|rest| rest.strip_suffix(".png"));
    if let Some((epoch, what)) = grid.and_then(|rest| rest.split_once('_')) {
        let level = what.strip_prefix("recon_level");
        return is_number(epoch)
            && (["orig", "recon", "samples"].contains(&what) || level.is_some_and(is_number));
    }
    let usage = name.strip_prefix("codebook.").and_then(|rest| rest.strip_suffix(".svg"));
    usage.is_some_and(is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_refused_unless_it_is_to_be_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let recipe = Recipe::default();
        let run = RunFolder::create(&path, &recipe, false).unwrap();
        assert_eq!(run.recipe().unwrap(), recipe);
        assert_eq!(RunFolder::open(&path).unwrap().recipe().unwrap(), recipe);
        drop(run);

        let error = RunFolder::create(&path, &recipe, false).unwrap_err().to_string();
        for way in ["--resume", "--out", "--overwrite"] {
            assert!(error.contains(way), "{error}");
        }
        for name in [
            "epoch_1_orig.png",
            "epoch_12_recon_level0.png",
            "metrics.jsonl",
            "curves.svg",
            "epoch_x_orig.png",
            "notes.txt",
        ] {
            fs::write(path.join(name), "x").unwrap();
        }
        for name in ["step-000000003", ".tmp-step-000000004", "mine"] {
            fs::create_dir_all(path.join(CHECKPOINTS).join(name)).unwrap();
        }
        RunFolder::create(&path, &recipe, true).unwrap();
        let mut kept = fs::read_dir(path.join(CHECKPOINTS)).unwrap();
        assert_eq!(kept.next().unwrap().unwrap().file_name(), "mine");
        assert!(kept.next().is_none());
        let mut left: Vec<String> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        left.sort();
        let expected = [".lock", "checkpoints", "config.toml", "epoch_x_orig.png", "notes.txt"];
        assert_eq!(left, expected);
    }

    #[test]
    fn a_run_that_is_being_written_is_let_alone() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), &Recipe::default(), false).unwrap();
        let refused = [
            RunFolder::create(folder.path(), &Recipe::default(), true),
            RunFolder::resume(folder.path()),
        ];
        for error in refused.map(|run| run.unwrap_err().to_string()) {
            assert!(error.contains("is being written") && error.contains("--out"), "{error}");
        }
        assert!(run.recipe().is_ok());
        drop(run);
        assert!(RunFolder::resume(folder.path()).is_ok());
    }

    #[test]
    fn folders_that_cannot_be_used_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = RunFolder::create(file.join("run"), &Recipe::default(), false).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
        let error = RunFolder::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("--resume"), "{error}");
    }
}

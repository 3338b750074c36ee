//! Checkpoints on disk: written whole or not at all, found again after any crash.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use vq_model::VqVae;

use crate::{Error, Result, file};

/// The checkpoints of a run folder:
///
/// ```text
/// RUN/checkpoints/step-000000390/{config.json, model.safetensors, training.safetensors}
/// RUN/last -> checkpoints/step-000000390
/// RUN/best -> checkpoints/step-000000390
/// ```
///
/// Those of a prior hold [`UNIGRAM_FILE`](crate::UNIGRAM_FILE) too.
///
/// A checkpoint is written under a temporary name, synced and renamed; then the links are replaced,
/// each in one step; then old checkpoints are removed.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    run: PathBuf,
}

/// The folder of the checkpoints in a run folder.
pub const CHECKPOINTS: &str = "checkpoints";
/// The link to the newest checkpoint.
pub const LAST: &str = "last";
/// The link to the best checkpoint.
pub const BEST: &str = "best";

/// A checkpoint that is being written.
const PARTIAL: &str = ".tmp-";
/// A checkpoint that is being replaced by one of the same step.
const REPLACED: &str = ".old-";
/// A checkpoint that is being removed.
const REMOVED: &str = ".del-";

impl Checkpoints {
    /// Those of a run folder, which need not be there yet.
    pub fn new(run: impl Into<PathBuf>) -> Self {
        Self { run: run.into() }
    }

    /// All whole checkpoints with their steps, oldest first.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let folder = self.folder();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::read(&folder)(error)),
        };
        let mut list = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::read(&folder))?.path();
            if let Some(step) = step_of(&path) {
                list.push((step, path));
            }
        }
        list.sort();
        Ok(list)
    }

    /// Where `last` points; without that link, the newest checkpoint.
    pub fn last(&self) -> Result<Option<PathBuf>> {
        match self.linked(LAST) {
            Some(path) => Ok(Some(path)),
            None => Ok(self.list()?.pop().map(|(_, path)| path)),
        }
    }

    /// Where `best` points.
    pub fn best(&self) -> Option<PathBuf> {
        self.linked(BEST)
    }

    /// Removes all of them, and nothing else that lies there.
    pub(crate) fn clear(&self) -> Result<()> {
        let folder = self.folder();
        for entry in fs::read_dir(&folder).map_err(Error::read(&folder))? {
            let path = entry.map_err(Error::read(&folder))?.path();
            if step_of(&path).is_some() || is_left_over(&path) {
                fs::remove_dir_all(&path).map_err(Error::write(&path))?;
            }
        }
        // It stays where something else lies in it.
        let _ = fs::remove_dir(&folder);
        Ok(())
    }

    /// Removes what a crash left half-written or half-removed, and puts back what it was about to
    /// replace.
    pub fn recover(&self) -> Result<()> {
        let folder = self.folder();
        let Ok(entries) = fs::read_dir(&folder) else { return Ok(()) };
        for entry in entries {
            let path = entry.map_err(Error::read(&folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(original) = name.strip_prefix(REPLACED) {
                let original = folder.join(original);
                if !original.exists() {
                    fs::rename(&path, &original).map_err(Error::write(&original))?;
                    continue;
                }
            }
            if is_left_over(&path) {
                fs::remove_dir_all(&path).map_err(Error::write(&path))?;
            }
        }
        Ok(())
    }

    /// Writes the checkpoint of a step: `fill` puts the files into the folder that it is given. Then
    /// `last`, and `best` if it `is_best`, point to it. On an error nothing half-written is left.
    pub fn save(
        &self,
        step: u64,
        is_best: bool,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let folder = self.folder();
        let name = format!("step-{step:09}");
        let (path, partial) = (folder.join(&name), folder.join(format!("{PARTIAL}{name}")));
        let write = || {
            fs::create_dir_all(&partial).map_err(Error::write(&partial))?;
            fill(&partial)?;
            file::sync_folder(&partial)?;
            self.put(&partial, &path, &name)
        };
        if let Err(error) = write() {
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        let target = Path::new(CHECKPOINTS).join(&name);
        if is_best {
            file::replace_link(&self.run.join(BEST), &target)?;
        }
        file::replace_link(&self.run.join(LAST), &target)?;
        Ok(path)
    }

    /// Removes all but the newest `keep` checkpoints and those that `last` and `best` point to.
    pub fn prune(&self, keep: usize) -> Result<()> {
        let list = self.list()?;
        let linked = [self.linked(LAST), self.linked(BEST)];
        let old = list.len().saturating_sub(keep);
        for (_, path) in list.iter().take(old) {
            let is_linked = |link: &Option<PathBuf>| {
                link.as_deref().and_then(Path::file_name) == path.file_name()
            };
            if linked.iter().any(is_linked) {
                continue;
            }
            // Renamed first: a checkpoint that is half removed must not look whole.
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let removed = path.with_file_name(format!("{REMOVED}{name}"));
            fs::rename(path, &removed).map_err(Error::write(path))?;
            fs::remove_dir_all(&removed).map_err(Error::write(&removed))?;
        }
        Ok(())
    }

    /// Renames `partial` to `path`. A checkpoint of the same step makes room first and goes last;
    /// [`recover`](Self::recover) puts it back after a crash in between.
    fn put(&self, partial: &Path, path: &Path, name: &str) -> Result<()> {
        let replaced = self.folder().join(format!("{REPLACED}{name}"));
        let exists = path.exists();
        if exists {
            fs::rename(path, &replaced).map_err(Error::write(path))?;
        }
        if let Err(error) = fs::rename(partial, path) {
            if exists {
                let _ = fs::rename(&replaced, path);
            }
            return Err(Error::write(path)(error));
        }
        file::sync_parent(path);
        if exists {
            fs::remove_dir_all(&replaced).map_err(Error::write(&replaced))?;
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.run.join(CHECKPOINTS)
    }

    /// The checkpoint that a link names, if it is there.
    fn linked(&self, link: &str) -> Option<PathBuf> {
        file::read_link(&self.run.join(link)).filter(|path| path.is_dir())
    }
}

/// Whether a crash left it half-written or half-removed.
fn is_left_over(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [PARTIAL, REPLACED, REMOVED].iter().any(|prefix| name.starts_with(prefix))
}

/// The step that a checkpoint's name states.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// The folder that holds a model: `path` itself if it is a model's or a checkpoint's folder; the best
/// checkpoint (or the last, if none was evaluated) if it is a run's.
pub fn resolve_model(path: impl AsRef<Path>) -> Result<PathBuf> {
    let path = path.as_ref();
    if path.join(vq_model::MODEL_FILE).is_file() {
        return Ok(path.to_path_buf());
    }
    let checkpoints = Checkpoints::new(path);
    if let Some(best) = checkpoints.best() {
        return Ok(best);
    }
    if let Some(last) = checkpoints.last()? {
        return Ok(last);
    }
    let problem = if path.is_dir() {
        "holds neither a model nor a run's checkpoints; give the folder that training wrote (--out)"
    } else if path.exists() {
        "is not a folder; give the folder that training wrote (--out)"
    } else {
        "there is no such folder; train first, or give the folder that training wrote (--out)"
    };
    Err(Error::NoRun { path: path.to_path_buf(), problem: problem.to_owned() })
}

/// The model in a run's, a checkpoint's or a model's folder; see [`resolve_model`]. A prior is refused.
pub fn load_model(path: impl AsRef<Path>, device: &Device) -> Result<VqVae> {
    let folder = resolve_model(path)?;
    require_model(&folder)?;
    Ok(VqVae::from_pretrained(folder, device)?)
}

/// The prior in a run's, a checkpoint's or a model's folder, for the model whose
/// [`model_hash`](crate::model_hash) is `hash`; a prior over another's codes is refused, and so is a model.
pub fn load_prior(path: impl AsRef<Path>, hash: &str, device: &Device) -> Result<vq_prior::Prior> {
    let path = path.as_ref();
    let folder = resolve_model(path)?;
    require_prior(&folder)?;
    let prior = vq_prior::Prior::from_pretrained(folder, device)?;
    let made_by = &prior.config().tokenizer;
    if made_by != hash {
        let (what, made_by) = (path.to_path_buf(), made_by.clone());
        return Err(Error::OtherModel { what, made_by, hash: hash.to_owned() });
    }
    Ok(prior)
}

/// Refuses a model's folder (see [`resolve_model`]) that holds a prior.
pub fn require_model(folder: impl AsRef<Path>) -> Result<()> {
    let path = folder.as_ref().to_path_buf();
    match Kind::of(&path) {
        Some(Kind::Prior) => Err(Error::NoRun {
            path,
            problem:
                "this is a prior; give the model whose codes it learned (what `vq train` wrote)"
                    .to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Refuses a model's folder (see [`resolve_model`]) that holds a tokenizer.
pub fn require_prior(folder: impl AsRef<Path>) -> Result<()> {
    let path = folder.as_ref().to_path_buf();
    match Kind::of(&path) {
        Some(Kind::Model) => Err(Error::NoRun {
            path,
            problem: "this is a model; give a prior over its codes (what `vq train-prior` wrote)"
                .to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Whether a model's folder (see [`resolve_model`]) holds a prior, and not a tokenizer.
pub fn is_prior(folder: impl AsRef<Path>) -> bool {
    Kind::of(folder.as_ref()) == Some(Kind::Prior)
}

/// What a model's folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Prior,
}

impl Kind {
    /// By the keys of its config; nothing where these are of neither or there is none, which is for the
    /// loader to complain about.
    fn of(folder: &Path) -> Option<Self> {
        let bytes = fs::read(folder.join(vq_model::CONFIG_FILE)).ok()?;
        let config: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
        let has = |keys: [&str; 2]| keys.iter().all(|key| config.get(key).is_some());
        if has(["network", "codebook_sizes"]) {
            return Some(Self::Prior);
        }
        has(["levels", "normalization"]).then_some(Self::Model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(checkpoints: &Checkpoints, step: u64, is_best: bool, text: &str) -> PathBuf {
        let fill = |folder: &Path| {
            fs::write(folder.join(vq_model::MODEL_FILE), text).map_err(Error::write(folder))
        };
        checkpoints.save(step, is_best, fill).unwrap()
    }

    fn steps(checkpoints: &Checkpoints) -> Vec<u64> {
        checkpoints.list().unwrap().into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn keeps_the_newest_and_the_best() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(run.path());
        assert!(checkpoints.last().unwrap().is_none());
        for (step, is_best) in [(1, false), (2, true), (3, false), (4, false), (5, false)] {
            let path = write(&checkpoints, step, is_best, &step.to_string());
            checkpoints.prune(2).unwrap();
            let last = checkpoints.last().unwrap().unwrap();
            assert_eq!(fs::canonicalize(last).unwrap(), fs::canonicalize(path).unwrap());
        }
        assert_eq!(steps(&checkpoints), [2, 4, 5]);
        assert!(checkpoints.best().unwrap().ends_with("step-000000002"));
        assert!(resolve_model(run.path()).unwrap().ends_with("step-000000002"));
        assert!(resolve_model(run.path().join("last")).unwrap().ends_with("last"));
        assert!(resolve_model(run.path().join("nowhere")).is_err());
        assert_eq!(
            fs::read_link(run.path().join("last")).unwrap(),
            Path::new("checkpoints/step-000000005")
        );
    }

    #[test]
    fn the_same_step_again_replaces() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(run.path());
        write(&checkpoints, 7, false, "old");
        let path = write(&checkpoints, 7, true, "new");
        assert_eq!(fs::read_to_string(path.join(vq_model::MODEL_FILE)).unwrap(), "new");
        assert_eq!(fs::read_dir(run.path().join(CHECKPOINTS)).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_names_the_path() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(run.path());
        write(&checkpoints, 1, false, "good");
        let full = |folder: &Path| {
            fs::write(folder.join("half"), "x").unwrap();
            Err(Error::write(&folder.join("half"))(std::io::ErrorKind::StorageFull.into()))
        };
        let error = checkpoints.save(2, false, full).unwrap_err().to_string();
        assert!(error.contains("half") && error.contains("no storage space"), "{error}");
        assert_eq!(fs::read_dir(run.path().join(CHECKPOINTS)).unwrap().count(), 1);
        assert!(checkpoints.last().unwrap().unwrap().ends_with("step-000000001"));

        let blocked = run.path().join("blocked");
        fs::create_dir(&blocked).unwrap();
        fs::write(blocked.join(CHECKPOINTS), "a file").unwrap();
        let error = Checkpoints::new(&blocked).save(1, false, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("blocked") && error.contains("--out"), "{error}");
    }

    #[test]
    fn recovers_from_a_crash_at_any_point() {
        let run = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(run.path());
        write(&checkpoints, 1, false, "one");
        write(&checkpoints, 2, false, "two");
        let folder = run.path().join(CHECKPOINTS);
        // Died while writing step 3, while removing step 0, and between the two renames of step 2.
        for name in [".tmp-step-000000003", ".del-step-000000000"] {
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("model.safetensors"), "half").unwrap();
        }
        fs::rename(folder.join("step-000000002"), folder.join(".old-step-000000002")).unwrap();
        // Without recovery the link dangles, and the next best is taken.
        assert!(checkpoints.last().unwrap().unwrap().ends_with("step-000000001"));
        checkpoints.recover().unwrap();
        assert_eq!(steps(&checkpoints), [1, 2]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        // Died after the second rename of step 2.
        fs::create_dir(folder.join(".old-step-000000002")).unwrap();
        checkpoints.recover().unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        assert!(checkpoints.last().unwrap().unwrap().ends_with("step-000000002"));
    }
}

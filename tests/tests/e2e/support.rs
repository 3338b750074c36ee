//! Finding and running the binary.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// A run that takes a second in a debug build: 12 steps an epoch.
pub(crate) const TINY: [&str; 18] = [
    "--data=shapes",
    "--batch-size=8",
    "--epochs=2",
    "--set=data.train_count=96",
    "--set=data.test_count=16",
    "--set=model.image_size=[16,16]",
    "--set=model.levels.0.hidden=8",
    "--set=model.levels.0.residual_blocks=1",
    "--set=model.levels.0.residual_hidden=4",
    "--set=model.levels.0.quantizer.codebook_size=16",
    "--set=model.levels.0.quantizer.dim=4",
    "--set=train.samples=8",
    "--set=train.log_every=1",
    "--set=train.warmup_steps=5",
    "--set=train.revival.threshold=0.1",
    "--set=train.kmeans.rounds=3",
    "--set=train.weight_ema=0.9",
    "--set=data.flip=true",
];

/// The binary of this build: `target/PROFILE/vq`, built if it is missing or older than its sources.
/// (`cargo test --workspace` builds it; `cargo test -p vq-tests` alone does not.)
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let folder = test.ancestors().find(|path| path.ends_with("deps")).unwrap();
        let folder = folder.parent().unwrap();
        let binary = folder.join("vq").with_extension(std::env::consts::EXE_EXTENSION);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let built = fs::metadata(&binary).and_then(|metadata| metadata.modified());
        let sources = newest(&root.join("crates")).max(newest(&root.join("configs")));
        if built.is_ok_and(|built| built >= sources) {
            return binary;
        }
        let profile = match folder.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            name => name,
        };
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "-p", "vq-cli", "--bin", "vq", "--profile", profile])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .current_dir(root)
            .status()
            .unwrap();
        assert!(status.success() && binary.is_file(), "cannot build {}", binary.display());
        binary
    })
}

/// When something that a build reads was last changed.
fn newest(folder: &Path) -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // A link leads to what is looked at anyway; tests are not part of the binary.
        if path.is_symlink()
            || ["tests", "examples", "benches"].iter().any(|name| path.ends_with(name))
        {
            continue;
        }
        if path.is_dir() {
            newest = newest.max(self::newest(&path));
        } else if path.extension().is_some_and(|name| name == "rs" || name == "toml") {
            newest = newest.max(fs::metadata(&path).unwrap().modified().unwrap());
        }
    }
    newest
}

/// The binary, in a folder. Asks for backtraces, which must not be seen.
pub(crate) fn vq(folder: &Path) -> Command {
    let mut command = Command::new(binary());
    command.current_dir(folder).env("RUST_BACKTRACE", "1").env_remove("RUST_LOG");
    // Not into the user's own.
    command.env("VQ_CACHE_DIR", folder.join(".cache"));
    command.stdin(Stdio::null());
    command
}

/// What a run of the binary said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let said = Self {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        };
        for text in [&said.out, &said.err] {
            assert!(!text.contains("panicked") && !text.contains("backtrace"), "{said:?}");
        }
        said
    }
}

/// Runs `vq ARGS…`, whatever comes of it.
pub(crate) fn run(folder: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Said {
    vq(folder).args(args).output().unwrap().into()
}

/// Runs `vq ARGS…`, which must go well.
pub(crate) fn succeed(folder: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Said {
    let said = run(folder, args);
    assert_eq!(said.code, Some(0), "{said:?}");
    said
}

/// Runs `vq ARGS…`, which must end with exit code 1 and one line of error that holds all of `parts`.
pub(crate) fn fail<'a>(
    folder: &Path,
    args: impl IntoIterator<Item = &'a str>,
    parts: &[&str],
) -> Said {
    let said = run(folder, args);
    refused(&said, parts);
    said
}

pub(crate) fn refused(said: &Said, parts: &[&str]) {
    assert_eq!(said.code, Some(1), "{said:?}");
    let errors: Vec<&str> = said.err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{said:?}");
    assert_eq!(said.err.lines().last(), errors.first().copied(), "{said:?}");
    let others = said.err.lines().filter(|line| !line.starts_with("error: "));
    for other in others {
        assert!(other.starts_with("note: ") || other.starts_with("warning: "), "{said:?}");
    }
    for part in parts {
        assert!(errors[0].contains(part), "`{part}` is missing: {said:?}");
    }
}

/// Starts `vq ARGS…` and leaves it running.
pub(crate) fn start(folder: &Path, args: &[&str]) -> Child {
    vq(folder).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Steps that the metrics file holds.
pub(crate) fn steps(run: &Path) -> usize {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"event\":\"step\"")).count()
}

/// Sends a signal, such as `-INT`.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// `vq train` on [`TINY`].
pub(crate) fn train<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "--out", out];
    args.extend(TINY);
    args.extend(more);
    args
}

/// A run folder `run` in a temporary folder, trained once for all tests that only look at it.
pub(crate) fn trained() -> &'static Path {
    static TRAINED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = TRAINED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        succeed(folder.path(), train("run", &[]));
        folder
    });
    folder.path()
}

/// Copies a folder; links stay links.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = {
            let entry = entry.unwrap();
            (entry.path(), to.join(entry.file_name()))
        };
        if from.is_symlink() {
            #[cfg(unix)]
            std::os::unix::fs::symlink(fs::read_link(&from).unwrap(), to).unwrap();
        } else if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A picture with something to see in it.
pub(crate) fn picture(path: &Path, width: u32, height: u32) {
    let pixel = |x: u32, y: u32| {
        image::Rgb([(x * 9) as u8, (y * 13) as u8, ((x / 4 + y / 4) % 2 * 200) as u8])
    };
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

/// Waits until `ready`, for at most a minute.
pub(crate) fn wait_until(mut ready: impl FnMut() -> bool) {
    for _ in 0..12_000 {
        if ready() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("waited in vain");
}

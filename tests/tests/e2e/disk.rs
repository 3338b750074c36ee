//! Disks that do not take what is written.

use std::fs;
use std::path::Path;

use crate::support::{fail, names, picture, succeed, train, trained};

#[test]
fn a_folder_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "mine").unwrap();
    picture(&folder.path().join("a.png"), 16, 16);
    let model = format!("--model={}", trained().join("run").display());
    let says = ["cannot write", "file", "--out"];
    fail(folder.path(), train("file/run", &[]), &says);
    fail(folder.path(), train("file", &[]), &says);
    fail(folder.path(), ["reconstruct", &model, "a.png", "--out=file/x"], &says);
    fail(folder.path(), ["encode", &model, "a.png", "--out=file/x.npy"], &says);
    succeed(folder.path(), ["encode", &model, "a.png", "--out=codes.npy"]);
    fail(folder.path(), ["decode", &model, "codes.npy", "--out=file/x"], &says);
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "mine");
    assert_eq!(names(folder.path()), ["a.png", "codes.npy", "file"]);
}

#[cfg(unix)]
#[test]
fn a_folder_without_permission() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let locked = folder.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("probe"), "").is_ok() {
        println!("skipped: the superuser writes everywhere");
        return;
    }
    fail(folder.path(), train("locked", &[]), &["cannot write", "locked", "ermission", "--out"]);
    fail(folder.path(), train("locked/run", &[]), &["cannot write", "locked", "ermission"]);
    assert!(names(&locked).is_empty());
}

/// Everything that is in a run folder after a write failed must be whole.
#[cfg(unix)]
fn all_is_whole(run: &Path) {
    let mut folders = vec![run.to_owned()];
    let checkpoints = run.join("checkpoints");
    if checkpoints.exists() {
        for name in names(&checkpoints) {
            assert!(name.starts_with("step-"), "half a checkpoint: {name}");
            succeed(run, ["inspect", &format!("checkpoints/{name}")]);
            folders.push(checkpoints.join(name));
        }
    }
    for folder in folders {
        for name in names(&folder) {
            assert!(!name.contains(".tmp"), "left behind: {name}");
            if name.contains(".png") {
                image::open(folder.join(&name)).unwrap();
            }
        }
    }
}

/// A limit on the size of a file stops a write in the middle as a full disk does, and can be had by
/// anyone.
#[cfg(unix)]
#[test]
fn a_write_that_stops_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| limited(folder.path(), args);
    // 8 blocks of 512 bytes: room for the recipe, not for a checkpoint.
    let said = run(&train("run", &[]));
    crate::support::refused(&said, &["cannot write", "large"]);
    all_is_whole(&folder.path().join("run"));

    let model = format!("--model={}", trained().join("run").display());
    let noise = image::RgbImage::from_fn(64, 64, |x, y| {
        image::Rgb([1, 2, 3].map(|c| {
            (x * 7919 * c + y * y * 104_729 + x * x * c).wrapping_mul(2_654_435_761).to_le_bytes()
                [3]
        }))
    });
    noise.save(folder.path().join("a.png")).unwrap();
    let said = run(&["reconstruct", &model, "a.png", "--out=recon"]);
    crate::support::refused(&said, &["cannot write", "a_recon.png", "free space"]);
    assert!(names(&folder.path().join("recon")).is_empty());
    let said = run(&["encode", &model, "a.png", "--size=256"]);
    crate::support::refused(&said, &["cannot write", "codes.safetensors", "free space"]);
    assert_eq!(names(folder.path()), ["a.png", "recon", "run"]);
}

/// `vq ARGS…` with files of at most 4 KiB.
#[cfg(unix)]
fn limited(folder: &Path, args: &[&str]) -> crate::support::Said {
    let vq = crate::support::vq(folder);
    let mut command = std::process::Command::new("sh");
    // Some shells count in blocks of 512 bytes, others in 1024: at most 8 KiB then.
    command.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""]).arg(vq.get_program());
    command.args(args).current_dir(folder).env("RUST_BACKTRACE", "1");
    command.output().unwrap().into()
}

/// Runs `vq ARGS…` with a file system of its own at FOLDER/disk, which is seen by that process alone
/// and vanishes with it; what is on it is copied to FOLDER/copy afterwards. `None` where this user may
/// not mount.
#[cfg(target_os = "linux")]
fn mounted(folder: &Path, options: &str, args: &[&str]) -> Option<crate::support::Said> {
    let script = format!(
        "mount -t tmpfs -o {options} none disk || exit 77
        \"$0\" \"$@\"; code=$?
        cp -RP disk copy; exit $code"
    );
    fs::create_dir(folder.join("disk")).unwrap();
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    command.arg(crate::support::vq(folder).get_program()).args(args).current_dir(folder);
    let output = command.env("RUST_BACKTRACE", "1").output().ok()?;
    if output.status.code() == Some(77) || !folder.join("copy").exists() {
        println!("skipped: this system does not let this user mount a file system");
        return None;
    }
    Some(output.into())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let args = train("disk/run", &["--epochs=1000"]);
    let Some(said) = mounted(folder.path(), "size=300k", &args) else { return };
    let says = ["cannot write", "disk/run", "No space left", "free space"];
    crate::support::refused(&said, &says);
    all_is_whole(&folder.path().join("copy/run"));
}

/// Read-only even for the superuser.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_disk() {
    let folder = tempfile::tempdir().unwrap();
    let Some(said) = mounted(folder.path(), "ro", &train("disk/run", &[])) else { return };
    crate::support::refused(&said, &["cannot write", "disk/run", "Read-only", "--out"]);
    assert!(names(&folder.path().join("copy")).is_empty());
}

/// Standard output on a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = crate::support::vq(folder.path()).arg("configs").stdout(full).output().unwrap();
    crate::support::refused(&output.into(), &["standard output", "No space left"]);
}

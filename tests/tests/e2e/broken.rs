//! Checkpoints and codes that are not what they should be.

use std::fs;
use std::path::Path;

use crate::support::{copy, fail, picture, run, succeed, trained};

/// A copy of the trained run that may be spoiled.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&trained().join("run"), &folder.path().join("run"));
    picture(&folder.path().join("a.png"), 16, 16);
    folder
}

fn cut_in_half(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

const LAST: &str = "run/checkpoints/step-000000024";
const FIRST: &str = "run/checkpoints/step-000000012";

#[test]
fn a_checkpoint_cut_in_half() {
    let folder = copied();
    cut_in_half(&folder.path().join(LAST).join("model.safetensors"));
    for args in [
        &["reconstruct", "a.png", "--model", LAST][..],
        &["encode", "a.png", "--model", LAST],
        &["inspect", LAST],
        &["eval", "--model", LAST],
    ] {
        fail(
            folder.path(),
            args.iter().copied(),
            &["model.safetensors", "cut short", "earlier checkpoint"],
        );
    }
    assert!(!folder.path().join("a_recon.png").exists());

    // Resuming takes the one before it, and says so.
    let said = succeed(folder.path(), ["train", "--resume", "--out=run"]);
    for part in ["warning", "step-000000024", "resuming from", "step-000000012"] {
        assert!(said.err.contains(part), "`{part}` is missing: {said:?}");
    }
    let model = |folder: &Path| fs::read(folder.join("run/last/model.safetensors")).unwrap();
    assert_eq!(model(folder.path()), model(trained()));
}

#[test]
fn no_checkpoint_is_whole() {
    let folder = copied();
    for checkpoint in [FIRST, LAST] {
        cut_in_half(&folder.path().join(checkpoint).join("training.safetensors"));
    }
    let args = ["train", "--resume", "--out=run"];
    fail(folder.path(), args, &["damaged", "--overwrite"]);
    fail(folder.path(), ["inspect", LAST], &["training.safetensors", "damaged"]);
}

#[test]
fn a_checkpoint_of_another_architecture() {
    let folder = copied();
    let path = folder.path().join(LAST).join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("\"hidden\": 8", "\"hidden\": 16")).unwrap();
    let args = ["reconstruct", "a.png", "--model", LAST];
    fail(folder.path(), args, &["model.safetensors", "another architecture", "config.json"]);
    fs::write(&path, config.replace("\"hidden\"", "\"hiden\"")).unwrap();
    fail(folder.path(), args, &["config.json", "hiden"]);
    fs::write(&path, &config).unwrap();

    let other = "--set=model.levels.0.hidden=16";
    let args = ["train", "--resume", "--out=run", other];
    fail(folder.path(), args, &["model.levels.0.hidden", "it was 8", "now 16", "--out"]);
    let args = ["train", "--resume", "--out=run", "--seed=5"];
    fail(folder.path(), args, &["train.seed", "--out"]);
    // The recipe is still that of the run.
    let was = fs::read(trained().join("run/config.toml")).unwrap();
    assert_eq!(fs::read(folder.path().join("run/config.toml")).unwrap(), was);
}

#[test]
fn codes_of_another_model_or_none() {
    let folder = copied();
    let fail = |args: &[&str], parts: &[&str]| {
        let mut all = vec!["decode", "--model=run", "--out=decoded"];
        all.extend(args);
        fail(folder.path(), all, parts);
        assert!(!folder.path().join("decoded").exists());
    };
    succeed(folder.path(), ["encode", "a.png", "--model=run"]);
    succeed(folder.path(), ["encode", "a.png", "--model=run", "--out=codes.npy"]);
    fail(&["nothing.npy"], &["nothing.npy"]);
    fail(&["a.png"], &["a.png", ".safetensors or .npy"]);
    fail(&["run/last/model.safetensors"], &["levels.0", "vq encode"]);

    let mut npy = fs::read(folder.path().join("codes.npy")).unwrap();
    let end = npy.len();
    npy[end - 4] = 200;
    fs::write(folder.path().join("other.npy"), &npy).unwrap();
    fail(&["other.npy"], &["code 200", "0 to 15", "another model"]);
    for name in ["codes.npy", "codes.safetensors"] {
        cut_in_half(&folder.path().join(name));
        fail(&[name], &[name, "vq encode"]);
    }
    let said = run(folder.path(), ["encode", "a.png", "--model=run", "--out=codes.txt"]);
    crate::support::refused(&said, &["codes.txt", ".npy"]);
}

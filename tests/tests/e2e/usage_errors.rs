//! Things that cannot be asked for.

use std::fs;

use crate::support::{fail, refused, run, train, vq};

/// Nothing may be left where a run was refused.
fn refuse(more: &[&str], parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    fail(folder.path(), train("run", more), parts);
    assert!(!folder.path().join("run").exists());
}

#[test]
fn a_recipe_with_a_typo() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine.toml"), "[train]\nepochs = 3\nlearning_rate = 1e-3\n")
        .unwrap();
    let args = ["train", "--config", "mine.toml", "--out", "run"];
    fail(folder.path(), args, &["mine.toml", "line 3", "learning_rate", "expected"]);
    assert!(!folder.path().join("run").exists());
    fs::write(folder.path().join("mine.toml"), "[train\n").unwrap();
    fail(folder.path(), args, &["mine.toml", "line 1"]);
    fs::write(folder.path().join("mine.toml"), "[train]\nepochs = \"many\"\n").unwrap();
    fail(folder.path(), args, &["mine.toml", "line 2", "many"]);
    let args = ["train", "--config", "other.toml", "--out", "run"];
    fail(folder.path(), args, &["other.toml"]);
    fail(folder.path(), ["train", "--config", "cifar11"], &["cifar11", "cifar10-paper"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn overrides_that_fit_nothing() {
    refuse(&["--set=train.epoch=3"], &["train.epoch", "known are", "epochs"]);
    refuse(&["--set=train.epochs"], &["key=value"]);
    refuse(&["--set=train.epochs=many"], &["train.epochs"]);
    refuse(&["--set=model.levels.1.hidden=8"], &["not an index below 1"]);
}

/// Kernels that were not asked for would compute something else than what was to be compared.
#[test]
fn an_instruction_set_that_cannot_be_had() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = vq(folder.path());
    command.env("VQ_CPU", "avx152").args(train("run", &[]));
    refused(&command.output().unwrap().into(), &["VQ_CPU", "avx152", "portable"]);
    assert!(!folder.path().join("run").exists());
}

#[test]
fn values_out_of_range() {
    let key = "model.levels.0.quantizer.codebook_size";
    refuse(&[&format!("--set={key}=0")], &[key, "at least 1", "got 0"]);
    refuse(&["--set=model.image_size=[30,16]"], &["model.image_size.0", "multiple", "4", "got 30"]);
    refuse(&["--batch-size=97"], &["97", "96", "batch"]);
    refuse(&["--batch-size=0"], &["train.batch_size", "at least 1"]);
    refuse(&["--epochs=0"], &["train.epochs", "at least 1"]);
    refuse(&["--lr=0"], &["train.lr", "above 0"]);
    refuse(&["--lr=nan"], &["train.lr", "above 0"]);
    refuse(
        &[
            "--set=model.channels=1",
            "--set=model.normalization.mean=[0.5]",
            "--set=model.normalization.std=[1.0]",
        ],
        &["model.channels"],
    );
}

#[test]
fn devices_that_are_not_there() {
    for (device, feature) in [("cuda", "cuda"), ("cuda:1", "cuda"), ("metal", "metal")] {
        let folder = tempfile::tempdir().unwrap();
        let said = run(folder.path(), train("run", &["--device", device, "--epochs=1"]));
        if said.code == Some(0) {
            println!("skipped: this build has {device}");
            continue;
        }
        crate::support::refused(&said, &["--device cpu"]);
        assert!(
            said.err.contains(&format!("--features {feature}")) || said.err.contains("driver"),
            "{said:?}"
        );
        assert!(!folder.path().join("run").exists());
    }
}

#[test]
fn wrong_usage_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    for (args, part) in [
        (&["train", "--epoch=3"][..], "--epochs"),
        (&["train", "--epochs=x"], "invalid"),
        (&["train", "--device=tpu"], "cuda:N"),
        (&["train", "--data=imagenet"], "folder:PATH"),
        (&["train", "--resume", "--overwrite"], "cannot be used with"),
        (&["train", "--threads=0"], "invalid"),
        (&["reconstruct"], "IMAGE"),
        (&["reconstruct", "a.png", "--size=0"], "WIDTHxHEIGHT"),
        (&[], "Usage"),
    ] {
        let said = run(folder.path(), args.iter().copied());
        assert_eq!(said.code, Some(2), "{said:?}");
        assert!(said.err.contains(part), "{said:?}");
    }
}

#[test]
fn a_number_of_shapes_is_refused_for_other_images() {
    let folder = tempfile::tempdir().unwrap();
    for source in ["cifar10", "folder:pictures"] {
        let data = format!("--data={source}");
        let args = ["train", "--out=run", "--train-count=100", &data];
        fail(folder.path(), args, &["--train-count", "built-in shapes", source]);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn there_is_nothing_to_resume_or_to_load() {
    let folder = tempfile::tempdir().unwrap();
    fail(folder.path(), ["train", "--resume", "--out=run"], &["run", "config.toml", "--resume"]);
    for args in [&["inspect"][..], &["eval"], &["encode", "a.png"], &["reconstruct", "a.png"]] {
        fail(folder.path(), args.iter().copied(), &["results", "train first"]);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

//! Data that is not what it should be.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crate::support::{fail, picture, train, trained};

const FILES: [&str; 6] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
];
const BYTES: u64 = 10_000 * 3073;

/// CIFAR-10 of the right sizes, all black airplanes. The files take no room on disk.
fn cifar(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for name in FILES {
        File::create(folder.join(name)).unwrap().set_len(BYTES).unwrap();
    }
}

fn refuse(folder: &Path, more: &[&str], parts: &[&str]) {
    let mut args = train("run", more);
    args.retain(|arg| *arg != "--data=shapes" && !arg.contains("image_size"));
    fail(folder, args, parts);
    assert!(!folder.join("run").exists());
}

#[test]
fn cifar_files_that_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let download = "cargo xtask download-cifar";
    refuse(folder.path(), &["--data=cifar10"], &["data_batch_1.bin is missing", download]);
    cifar(&folder.path().join("data/cifar-10-batches-bin"));
    fs::remove_file(folder.path().join("data/cifar-10-batches-bin/data_batch_3.bin")).unwrap();
    // Half of it is there, so it is meant: no falling back on the shapes.
    for source in ["--data=auto", "--data=cifar10", "--data=cifar10:data"] {
        refuse(folder.path(), &[source], &["data_batch_3.bin is missing", download]);
    }
    let elsewhere = ["--data=cifar10", "--data-dir=else where"];
    refuse(folder.path(), &elsewhere, &["else where", "--dir 'else where'"]);
}

#[test]
fn cifar_files_that_are_cut_short() {
    let folder = tempfile::tempdir().unwrap();
    let batches = folder.path().join("data/cifar-10-batches-bin");
    cifar(&batches);
    let file = File::options().write(true).open(batches.join("data_batch_5.bin")).unwrap();
    file.set_len(BYTES / 2).unwrap();
    refuse(
        folder.path(),
        &["--data=auto"],
        &["data_batch_5.bin", "15365000 bytes", "30730000", "cargo xtask download-cifar"],
    );
}

#[test]
fn a_label_over_9() {
    let folder = tempfile::tempdir().unwrap();
    cifar(folder.path());
    let mut file = File::options().write(true).open(folder.path().join("test_batch.bin")).unwrap();
    file.seek(SeekFrom::Start(7 * 3073)).unwrap();
    file.write_all(&[10]).unwrap();
    refuse(
        folder.path(),
        &["--data=cifar10:."],
        &["test_batch.bin", "record 7", "label 10", "0 to 9", "download-cifar"],
    );
}

#[test]
fn folders_without_images() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    refuse(folder.path(), &["--data=folder:empty"], &["empty", "holds no image"]);
    refuse(folder.path(), &["--data=folder:file"], &["file", "not a folder"]);
    refuse(folder.path(), &["--data=folder:nowhere"], &["nowhere"]);
}

#[test]
fn pictures_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let photos = folder.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for index in 0..20 {
        picture(&photos.join(format!("{index}.png")), 32, 32);
    }
    fs::write(photos.join("text.png"), "this is no picture").unwrap();
    refuse(
        folder.path(),
        &["--data=folder:photos", "--on-broken=refuse"],
        &["1 of 21", "text.png", "repair or remove"],
    );

    let model = format!("--model={}", trained().join("run").display());
    fs::copy(photos.join("text.png"), folder.path().join("text.png")).unwrap();
    let whole = fs::read(photos.join("0.png")).unwrap();
    fs::write(folder.path().join("half.png"), &whole[..whole.len() / 2]).unwrap();
    fs::copy(photos.join("0.png"), folder.path().join("good.png")).unwrap();
    for command in ["reconstruct", "encode"] {
        for broken in ["text.png", "half.png"] {
            let args = [command, &model, "good.png", broken];
            fail(folder.path(), args, &[broken, "not a readable image"]);
        }
        fail(folder.path(), [command, &model, "none.png"], &["none.png"]);
    }
    let left = ["good_recon.png", "codes.safetensors"].map(|name| folder.path().join(name));
    assert!(left.iter().all(|path| !path.exists()));
}

//! Images that the program makes itself, and models with several levels of codes trained on them.

use std::fs;

use crate::support::{TINY, fail, names, picture, succeed};

#[test]
fn made_images_are_a_folder_to_train_on() {
    let folder = tempfile::tempdir().unwrap();
    let make = ["data", "make-images", "made", "--size=20x18", "--count=12"];
    let said = succeed(folder.path(), make);
    assert!(said.out.contains("12 images of 20×18") && said.err.is_empty(), "{said:?}");
    let made = folder.path().join("made");
    assert_eq!(names(&made).len(), 10);
    assert_eq!(names(&made.join("circle")), ["00000000.png", "00000010.png"]);
    let image = image::open(made.join("circle/00000000.png")).unwrap();
    assert_eq!((image.width(), image.height()), (20, 18));

    let before = fs::read(made.join("star/00000004.png")).unwrap();
    fail(folder.path(), make, &["made", "not empty", "--overwrite"]);
    let more = ["data", "make-images", "made", "--size=20x18", "--seed=1", "--overwrite"];
    succeed(folder.path(), more.into_iter().chain(["--classes=star,ring", "--count=4"]));
    assert_ne!(fs::read(made.join("star/00000004.png")).unwrap(), before);
    assert_eq!(names(&made.join("star")), ["00000004.png", "00000014.png"]);
    assert!(names(&made.join("circle")).is_empty());

    let said = crate::support::run(folder.path(), more.into_iter().chain(["--classes=cube"]));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.err.contains("capsule"), "{said:?}");
    fs::write(folder.path().join("file"), "x").unwrap();
    fail(folder.path(), ["data", "make-images", "file/made"], &["cannot write", "file/made"]);
}

#[test]
fn a_model_of_two_levels_shows_what_each_carries() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut args = vec!["train", "--config=cifar10-hierarchical", "--out=run", "--threads=2"];
    args.extend(TINY);
    args.extend([
        "--set=model.levels.1.hidden=8",
        "--set=model.levels.1.residual_blocks=1",
        "--set=model.levels.1.residual_hidden=4",
        "--set=model.levels.1.quantizer.codebook_size=8",
        "--set=model.levels.1.quantizer.dim=4",
    ]);
    args.retain(|arg| *arg != "--epochs=2");
    args.push("--epochs=1");
    succeed(folder.path(), args);
    let run = names(&path("run"));
    for name in ["epoch_1_recon_level0.png", "epoch_1_recon_level1.png", "codebook.1.svg"] {
        assert!(run.iter().any(|other| other == name), "{name} is missing: {run:?}");
    }
    succeed(folder.path(), ["eval", "--model=run", "--out=eval"]);
    assert_eq!(
        names(&path("eval")),
        [
            "eval_codebook.1.svg",
            "eval_codebook.svg",
            "eval_orig.png",
            "eval_recon.png",
            "eval_recon_level0.png",
            "eval_recon_level1.png",
        ]
    );

    picture(&path("a.png"), 24, 16);
    succeed(folder.path(), ["encode", "--model=run", "a.png"]);
    let mut pictures = Vec::new();
    for levels in ["all", "top", "bottom", "0,1", "1"] {
        let args = ["decode", "codes.safetensors", "--model=run", "--levels", levels, "--out"];
        succeed(folder.path(), args.into_iter().chain([levels]));
        pictures.push(fs::read(path(levels).join("a_decoded.png")).unwrap());
    }
    let [all, top, bottom, both, one] = &pictures[..] else { panic!("five pictures") };
    assert!(all == both && top == one && top != bottom && top != all && bottom != all);
    fail(
        folder.path(),
        ["decode", "codes.safetensors", "--model=run", "--levels=2"],
        &["--levels 2", "2 level(s)"],
    );
}

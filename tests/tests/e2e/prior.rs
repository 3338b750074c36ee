//! From a model to new images: encode, train-prior, sample.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::{fail, names, picture, succeed, train, trained};

/// A prior that trains in a second.
const SMALL: [&str; 9] = [
    "--set=prior.network.channels=8",
    "--set=prior.network.layers=2",
    "--set=prior.network.skip_channels=8",
    "--set=prior.head_hidden=8",
    "--set=train.samples=10",
    "--set=train.eval_every=1",
    "--set=train.log_every=1",
    "--batch-size=8",
    "--epochs=2",
];

/// The trained model, as an absolute path.
fn model() -> String {
    trained().join("run").display().to_string()
}

fn train_prior<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train-prior", "--model", model, "--codes", "codes", "--out", out];
    args.extend(SMALL);
    args.extend(more);
    args
}

/// A folder with `codes`, `codes-test` and a prior in `prior`, made once for all tests that only look.
fn with_prior() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let model = model();
        let encode = |args: &[&str]| {
            let mut all = vec!["encode", "--model", &model];
            all.extend(args);
            succeed(folder.path(), all)
        };
        let said = encode(&["--dataset", "train", "--out", "codes", "--shard-images", "40"]);
        assert!(said.out.contains("codes of 96 images of shapes train"), "{said:?}");
        let said = encode(&["--dataset=train", "--out=codes-more", "--train-count=130"]);
        assert!(said.out.contains("codes of 130 images of shapes train"), "{said:?}");
        encode(&["--dataset=test", "--out=codes-test"]);
        let said = succeed(
            folder.path(),
            train_prior(&model, "prior", &["--held-out", "codes-test", "--log-format=text"]),
        );
        for part in ["unigram", "bits per held-out code", "held out", "best so far", "vq sample"] {
            assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
        }
        folder
    });
    folder.path()
}

#[test]
fn five_commands_end_in_new_images() {
    let folder = with_prior();
    assert_eq!(
        names(&folder.join("codes")),
        ["manifest.json", "shard-00000.bin", "shard-00001.bin", "shard-00002.bin"]
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(folder.join("codes/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["levels"][0]["grid"], serde_json::json!([4, 4]));
    assert_eq!(manifest["levels"][0]["codebook_sizes"], serde_json::json!([16]));
    let expected = [
        ".lock",
        "best",
        "checkpoints",
        "config.toml",
        "curves.svg",
        "epoch_1_samples.png",
        "epoch_2_samples.png",
        "last",
        "metrics.jsonl",
    ];
    assert_eq!(names(&folder.join("prior")), expected);
    // Ten samples, a column for each class.
    let drawn = image::open(folder.join("prior/epoch_2_samples.png")).unwrap();
    assert_eq!((drawn.width(), drawn.height()), (10 * 18 + 2, 18 + 2));
    assert!(folder.join("prior/best/unigram.json").is_file());
    let says = ["holds the run of a prior", "`vq train-prior`"];
    fail(folder, ["train", "--resume", "--out=prior"], &says);

    let model = model();
    let out = tempfile::tempdir().unwrap();
    let prior = folder.join("prior").display().to_string();
    let sample = |to: &str, more: &[&str]| {
        let mut args = vec!["sample", "--model", &model, "--prior", &prior, "--out", to];
        args.extend(more);
        succeed(out.path(), args);
        fs::read(out.path().join(to).join("grid.png")).unwrap()
    };
    let grid = sample("a", &["--count=20", "--seed=3"]);
    assert_eq!(names(&out.path().join("a")).len(), 21);
    // Ten classes side by side, 16×16 pixels each.
    let picture_of = image::load_from_memory(&grid).unwrap();
    assert_eq!((picture_of.width(), picture_of.height()), (10 * 18 + 2, 2 * 18 + 2));
    assert_eq!(grid, sample("b", &["--count=20", "--seed=3"]));
    assert_ne!(grid, sample("c", &["--count=20", "--seed=4"]));
    // An image does not depend on how many are drawn with it.
    sample("d", &["--count=5", "--seed=3"]);
    let one = |to: &str| fs::read(out.path().join(to).join("00004.png")).unwrap();
    assert_eq!(one("a"), one("d"));
    let heart = sample("e", &["--count=3", "--class=heart", "--guidance=2", "--top-k=4"]);
    assert_eq!(heart, sample("f", &["--count=3", "--class=7", "--guidance=2", "--top-k=4"]));
    sample("g", &["--count=2", "--class=none", "--temperature=0", "--top-p=0.9"]);

    picture(&out.path().join("given.png"), 20, 16);
    let keep = ["--complete=given.png", "--count=3", "--keep=top-half"];
    let completed = sample("h", &keep);
    assert_eq!(completed, sample("i", &keep));
    assert_ne!(completed, sample("j", &[keep[0], keep[1], keep[2], "--seed=1"]));
}

#[test]
fn a_resumed_prior_is_the_same_file() {
    let folder = with_prior();
    let model = model();
    // More epochs would stretch a cosine, so the rate is a constant one.
    succeed(
        folder,
        train_prior(
            &model,
            "constant",
            &[
                "--held-out=codes-test",
                "--set=train.schedule=constant",
                "--set=train.warmup_steps=1",
            ],
        ),
    );
    succeed(
        folder,
        train_prior(
            &model,
            "halves",
            &[
                "--held-out=codes-test",
                "--set=train.schedule=constant",
                "--set=train.warmup_steps=1",
                "--epochs=1",
            ],
        ),
    );
    succeed(folder, ["train-prior", "--resume", "--out=halves", "--epochs=2"]);
    for file in ["model.safetensors", "config.json"] {
        let bytes = |run: &str| fs::read(folder.join(run).join("last").join(file)).unwrap();
        assert_eq!(bytes("constant"), bytes("halves"));
    }
    fail(
        folder,
        ["train-prior", "--resume", "--out=halves", "--kind=transformer"],
        &["prior.network", "--out"],
    );
    fail(folder, train_prior(&model, "halves", &[]), &["halves", "--resume", "--overwrite"]);
}

#[test]
fn encoding_goes_on_where_it_was_interrupted_and_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let path = |name: &str| folder.path().join(name);
    let encode =
        ["encode", "--model", &model, "--dataset=train", "--out=codes", "--shard-images=40"];
    succeed(folder.path(), encode);
    let whole = fs::read(path("codes/shard-00001.bin")).unwrap();
    fs::write(path("codes/shard-00001.bin"), &whole[..whole.len() - 3]).unwrap();
    let parts = ["shard-00001.bin", "truncated", "vq encode"];
    fail(folder.path(), train_prior(&model, "prior", &[]), &parts);
    assert!(!path("prior").exists());
    let said = succeed(folder.path(), encode);
    assert!(said.err.contains("40 images are encoded already"), "{said:?}");
    assert_eq!(fs::read(path("codes/shard-00001.bin")).unwrap(), whole);
    succeed(folder.path(), encode);

    fail(
        folder.path(),
        ["encode", "--model", &model, "--dataset=test", "--out=codes"],
        &["codes", "holds other codes", "--out"],
    );
    fail(
        folder.path(),
        ["train-prior", "--model", &model, "--codes", "nowhere"],
        &["nowhere", "vq encode --dataset"],
    );
    for args in [
        &["encode", "--dataset=train", "a.png"][..],
        &["encode", "a.png", "--data=shapes"],
        &["encode", "a.png", "--train-count=5"],
        &["compress", "a.png", "--data-dir=data"],
        &["compress", "a.png", "--on-broken=skip"],
    ] {
        let said = crate::support::run(folder.path(), args.iter().copied());
        assert_eq!(said.code, Some(2), "{said:?}");
        assert!(said.err.contains("cannot be used with"), "{said:?}");
    }
}

#[test]
fn codes_and_priors_of_another_model_are_refused() {
    let folder = with_prior();
    let out = tempfile::tempdir().unwrap();
    succeed(out.path(), train("other", &["--epochs=1", "--seed=5"]));
    let other = out.path().join("other").display().to_string();
    fail(folder, train_prior(&other, "refused", &[]), &["codes", "another model"]);
    assert!(!folder.join("refused").exists());
    fail(
        folder,
        ["sample", "--model", &other, "--prior", "prior", "--out", "refused"],
        &["prior", "another model", "--model"],
    );
    assert!(!folder.join("refused").exists());
    let model = model();
    let sample = |more: &[&str], parts: &[&str]| {
        let mut args = vec!["sample", "--model", &model, "--out", "refused", "--prior", "prior"];
        args.extend(more);
        fail(folder, args, parts);
    };
    sample(&["prior"], &["1 level(s)", "2 prior(s)", "top one first"]);
    sample(&["--class=dragon"], &["dragon", "heart", "0 to 9"]);
    sample(&["--temperature=-1"], &["temperature"]);
    sample(&["--top-p=0"], &["top_p"]);
    sample(&["--guidance=nan"], &["guidance"]);
    sample(&["--count=0"], &["--count"]);
    assert!(!folder.join("refused").exists());
    let swapped = ["sample", "--model", &model, "--prior", &model];
    fail(folder, swapped, &["run", "this is a model", "give a prior"]);
    for args in [
        &["sample", "--model=prior", "--prior=prior"][..],
        &["encode", "--model=prior", "--dataset=test", "--out=refused"],
        &["train-prior", "--model=prior", "--codes=codes", "--out=refused"],
    ] {
        fail(folder, args.iter().copied(), &["prior", "this is a prior", "give the model"]);
    }
    assert!(!folder.join("refused").exists());
}

#[test]
fn an_earlier_runs_images_do_not_stay() {
    let prior = with_prior().join("prior").display().to_string();
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("samples");
    let mut args = vec!["sample", "--model", &model, "--prior", &prior];
    args.push("--count=70");
    let said = succeed(folder.path(), args.iter().copied());
    assert!(said.out.contains("70 images"), "{said:?}");
    assert_eq!(names(&out).len(), 71);
    args[5] = "--count=2";
    succeed(folder.path(), args.iter().copied());
    assert_eq!(names(&out), ["00000.png", "00001.png", "grid.png"]);
    // Somebody else's.
    fs::remove_file(out.join("grid.png")).unwrap();
    fail(folder.path(), args.iter().copied(), &["00000.png", "--out", "--overwrite"]);
    args.push("--overwrite");
    succeed(folder.path(), args);
    assert_eq!(names(&out).len(), 3);
}

#[test]
fn what_cannot_be_completed_or_guided_is_refused() {
    let folder = with_prior();
    let model = model();
    picture(&folder.join("to-complete.png"), 16, 16);
    succeed(
        folder,
        train_prior(&model, "labelled", &["--set=prior.label_dropout=0", "--epochs=1"]),
    );
    let sample = |prior: &str, more: &[&str]| {
        let mut args = vec!["sample", "--model", &model, "--out=nothing", "--prior", prior];
        args.extend(more);
        crate::support::run(folder, args)
    };
    let complete = ["--complete=to-complete.png", "--keep=top-half"];
    for (prior, more, part) in [
        ("labelled", &["--guidance=2"][..], "label_dropout"),
        ("labelled", &["--class=none"], "label_dropout"),
        ("labelled", &complete, "--class"),
    ] {
        crate::support::refused(&sample(prior, more), &[part]);
    }
    assert!(!folder.join("nothing").exists());
    let of_a_class = [&complete[..], &["--class=ring", "--count=1"]].concat();
    assert_eq!(sample("labelled", &of_a_class).code, Some(0));
    // Without a class the first image is not that of class 0.
    let first = |more: &[&str]| {
        let args = [&complete[..], &["--count=1", "--seed=2", "--temperature=3"], more].concat();
        assert_eq!(sample("prior", &args).code, Some(0));
        fs::read(folder.join("nothing/00000.png")).unwrap()
    };
    assert_eq!(first(&[]), first(&["--class=none"]));
}

#[test]
fn a_model_of_two_levels_has_a_prior_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = "[model]\nimage_size = [16, 16]\n
        [[model.levels]]\ndownsample = 2\nhidden = 8\nresidual_blocks = 1\nresidual_hidden = 4
        [model.levels.quantizer]\ncodebook_size = 16\ndim = 4
        [[model.levels]]\ndownsample = 2\nhidden = 8\nresidual_blocks = 1\nresidual_hidden = 4
        [model.levels.quantizer]\ncodebook_size = 8\ndim = 4
        [data]\nsource = 'shapes'\ntrain_count = 48\ntest_count = 16
        [train]\nepochs = 1\nbatch_size = 8\nsamples = 8\nwarmup_steps = 2";
    fs::write(folder.path().join("two.toml"), recipe).unwrap();
    succeed(folder.path(), ["train", "--config=two.toml", "--out=model"]);
    succeed(folder.path(), ["encode", "--model=model", "--dataset=train", "--out=codes"]);
    let epochs = ["--epochs=1", "--kind=transformer"];
    let sizes = [
        "--set=prior.network.channels=8",
        "--set=prior.network.layers=1",
        "--set=prior.network.mlp_hidden=8",
        "--set=prior.conditioner.channels=8",
        "--set=train.samples=4",
        "--batch-size=8",
    ];
    for (out, level) in [("top", "--level=top"), ("bottom", "--level=0")] {
        let mut args = vec!["train-prior", "--model=model", "--out", out, level];
        args.extend(epochs);
        args.extend(sizes);
        succeed(folder.path(), args);
        assert!(folder.path().join(out).join("epoch_1_samples.png").is_file());
    }
    let sample = ["sample", "--model=model", "--count=4", "--prior"];
    let mut args = sample.to_vec();
    args.extend(["top", "bottom"]);
    succeed(folder.path(), args);
    assert!(folder.path().join("samples/grid.png").is_file());
    let mut args = sample.to_vec();
    args.extend(["bottom", "top"]);
    fail(folder.path(), args, &["bottom is a prior for level 0", "top one first"]);
}

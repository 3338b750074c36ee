//! Training from nothing: what it writes and says.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{fail, names, succeed, train, trained};

#[test]
fn a_run_leaves_everything_behind() {
    let run = trained().join("run");
    let expected = [
        ".lock",
        "best",
        "checkpoints",
        "codebook.svg",
        "config.toml",
        "curves.svg",
        "epoch_1_orig.png",
        "epoch_1_recon.png",
        "epoch_2_orig.png",
        "epoch_2_recon.png",
        "last",
        "metrics.jsonl",
    ];
    assert_eq!(names(&run), expected);
    assert_eq!(names(&run.join("checkpoints")), ["step-000000012", "step-000000024"]);
    assert_eq!(
        names(&run.join("last")),
        ["config.json", "model.safetensors", "training.safetensors"]
    );
    // The same images each time, and not the same reconstructions.
    let bytes = |name: &str| fs::read(run.join(name)).unwrap();
    assert_eq!(bytes("epoch_1_orig.png"), bytes("epoch_2_orig.png"));
    assert_ne!(bytes("epoch_1_recon.png"), bytes("epoch_2_recon.png"));
    // 8 images of 16×16 in one row, 2 pixels between and around them.
    let grid = image::open(run.join("epoch_2_recon.png")).unwrap();
    assert_eq!((grid.width(), grid.height()), (8 * 18 + 2, 20));

    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records: Vec<Value> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |event: &str| records.iter().filter(|record| record["event"] == event).count();
    assert_eq!((count("step"), count("epoch")), (24, 2));
    assert!(records.iter().any(|record| record["test"]["psnr"].is_f64()), "{records:?}");
}

#[test]
fn plain_lines_tell_how_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeed(folder.path(), train("run", &["--epochs", "1"]));
    for part in [
        "data    shapes",
        "step 12/12  epoch 1/1",
        "images/s",
        "left",
        "test PSNR",
        "done",
        "run/epoch_1",
    ] {
        assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
    }
    assert!(said.err.lines().all(|line| line.starts_with("note: ")), "{said:?}");
}

#[test]
fn json_is_json_throughout() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeed(folder.path(), train("run", &["--epochs=1", "--log-format=json"]));
    let records: Vec<Value> =
        said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for event in ["note", "run-started", "step", "epoch", "checkpoint", "run-finished"] {
        assert!(records.iter().any(|record| record["event"] == event), "{event}: {records:?}");
    }
    assert_eq!(said.err, "");
}

#[test]
fn without_data_the_shapes_are_taken_and_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train("run", &["--epochs=1"]);
    args.retain(|arg| !arg.starts_with("--data="));
    let said = succeed(folder.path(), args);
    for part in ["CIFAR-10 is not in data", "cargo xtask download-cifar", "recipe `shapes`"] {
        assert!(said.err.contains(part), "`{part}` is missing: {said:?}");
    }
    // Kept in the recipe, so that resuming does not go by what is on disk by then.
    let recipe = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
    assert!(recipe.contains("source = \"shapes\""), "{recipe}");
}

#[test]
fn flags_reach_the_recipe_and_the_recipe_is_accepted_back() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--batch_size=16", "--lr=0.002", "--seed=7", "--epochs=1", "--threads=1"];
    succeed(folder.path(), train("run", &flags));
    let recipe = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
    for part in ["batch_size = 16", "lr = 0.002", "seed = 7", "epochs = 1", "codebook_size = 16"] {
        assert!(recipe.contains(part), "`{part}` is missing: {recipe}");
    }
    succeed(folder.path(), ["train", "--config", "run/config.toml", "--out", "again"]);
    let model = |run: &str| fs::read(folder.path().join(run).join("last/model.safetensors"));
    assert_eq!(model("run").unwrap(), model("again").unwrap());
}

#[test]
fn a_folder_with_a_run_is_refused_with_three_ways_on() {
    let folder = tempfile::tempdir().unwrap();
    succeed(folder.path(), train("run", &["--epochs=1"]));
    let before = fs::read(folder.path().join("run/metrics.jsonl")).unwrap();
    fail(folder.path(), train("run", &[]), &["run", "--resume", "--out", "--overwrite"]);
    assert_eq!(fs::read(folder.path().join("run/metrics.jsonl")).unwrap(), before);

    fs::write(folder.path().join("run/mine.txt"), "kept").unwrap();
    succeed(folder.path(), train("run", &["--epochs=1", "--seed=1", "--overwrite"]));
    assert_ne!(fs::read(folder.path().join("run/metrics.jsonl")).unwrap(), before);
    assert_eq!(fs::read_to_string(folder.path().join("run/mine.txt")).unwrap(), "kept");
}

#[test]
fn resuming_goes_on_to_more_epochs() {
    let folder = tempfile::tempdir().unwrap();
    succeed(folder.path(), train("run", &["--epochs=1"]));
    let said = succeed(folder.path(), ["train", "--out", "run", "--resume"]);
    assert!(said.err.contains("all 1 epochs are done"), "{said:?}");
    let said = succeed(folder.path(), ["train", "--out", "run", "--resume", "--epochs=2"]);
    assert!(said.err.contains("train.epochs: 1 → 2"), "{said:?}");
    assert!(folder.path().join("run/epoch_2_recon.png").is_file());
    let recipe = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
    assert!(recipe.contains("epochs = 2"), "{recipe}");
}

#[test]
fn threads_do_not_change_the_model() {
    let folder = tempfile::tempdir().unwrap();
    succeed(folder.path(), train("one", &["--threads=1"]));
    succeed(folder.path(), train("two", &["--threads=2"]));
    let model = |run: &str| fs::read(folder.path().join(run).join("last/model.safetensors"));
    assert_eq!(model("one").unwrap(), model("two").unwrap());
}

#[test]
fn a_folder_of_images_is_trained_on_and_broken_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let classes = ["cats", "dogs"].map(|name| folder.path().join("photos").join(name));
    for (number, class) in classes.iter().enumerate() {
        fs::create_dir_all(class).unwrap();
        for index in 0..12 {
            let size = 20 + index + 5 * number as u32;
            crate::support::picture(&class.join(format!("{index}.png")), size, 40 - index);
        }
    }
    fs::write(classes[0].join("text.png"), "this is no picture").unwrap();
    // Right at its start and its end.
    let spoilt = classes[1].join("5.png");
    let mut bytes = fs::read(&spoilt).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8].fill(0xa5);
    fs::write(&spoilt, bytes).unwrap();
    let args = train("run", &["--data=folder:photos", "--epochs=1"]);
    let said = succeed(folder.path(), args);
    assert!(said.err.contains("text.png"), "{said:?}");
    assert!(said.err.contains("cannot decode") && said.err.contains("5.png"), "{said:?}");
    let said = succeed(folder.path(), train("again", &["--data=folder:photos", "--epochs=1"]));
    assert!(said.err.contains("taking another image"), "{said:?}");
    let model = |run: &str| fs::read(folder.path().join(run).join("last/model.safetensors"));
    assert_eq!(model("run").unwrap(), model("again").unwrap());
    let config: Value = read_json(&folder.path().join("run/last/config.json"));
    assert_eq!(config["class_names"], serde_json::json!(["cats", "dogs"]));
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

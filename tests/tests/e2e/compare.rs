//! Comparing quantizers: runs, leaves out what is done, goes on with what is not, tells what fails.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Said, TINY, fail, names, run, signal, start, steps, succeed, wait_until};

/// Two variants that learn, one that cannot, and one that takes part only when asked for.
const VARIANTS: &str = "
    baseline = 'vector'
    [train]
    epochs = 1
    checkpoint_every_steps = 5
    keep_checkpoints = 1
    [[variant]]
    name = 'vector'
    quantizer = { kind = 'vector' }
    [[variant]]
    name = 'scalar'
    quantizer = { kind = 'finite-scalar' }
    train = { beta = 0.25 }
    [[variant]]
    name = 'wild'
    optional = true
    quantizer = { kind = 'vector', rule = 'gradient' }
    train = { lr = 1e30, warmup_steps = 0, grad_clip = 0.0 }
";

/// `vq compare` of 2 seeds on the tiny model, with `VARIANTS` written beside it.
fn compare<'a>(folder: &Path, more: &[&'a str]) -> Vec<&'a str> {
    fs::write(folder.join("mine.toml"), VARIANTS).unwrap();
    let mut args = vec!["compare", "--variants=mine.toml", "--out=out", "--seeds=2"];
    args.extend(TINY.iter().filter(|arg| !arg.starts_with("--epochs")));
    args.extend(more);
    args
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join("out").join(name)).unwrap()
}

/// When something in a folder was last written, by file.
fn times(folder: &Path) -> Vec<(String, std::time::SystemTime)> {
    let time = |name: String| {
        let written = fs::symlink_metadata(folder.join(&name)).unwrap().modified().unwrap();
        (name, written)
    };
    names(folder).into_iter().map(time).collect()
}

#[test]
fn it_trains_writes_its_tables_and_leaves_out_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let said = succeed(path, compare(path, &[]));
    for part in ["run     1 of 4: vector, seed 0", "run     4 of 4: scalar, seed 1", "compare.png"]
    {
        assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
    }
    let runs = ["scalar-0", "scalar-1", "vector-0", "vector-1"];
    let files = ["compare-runs.csv", "compare.csv", "compare.md", "compare.png"];
    let mut all: Vec<&str> = files.into_iter().chain(runs).collect();
    all.sort_unstable();
    assert_eq!(names(&path.join("out")), all);
    // A run's folder is that of vq train: it can be used and resumed as one.
    succeed(path, ["eval", "--model", "out/scalar-1"]);
    for (run, part) in [("scalar-1", "kind = \"finite-scalar\""), ("vector-1", "kind = \"vector\"")]
    {
        let recipe = read(path, &format!("{run}/config.toml"));
        // K = 16 of the tiny model.
        let sizes = recipe.contains("levels = [") || recipe.contains("codebook_size = 16");
        assert!(recipe.contains(part) && recipe.contains("seed = 1") && sizes, "{recipe}");
    }

    let table = read(path, "compare.md");
    for part in [
        "Data: shapes",
        "96 images",
        "seeds: 2 from 0 on",
        "All spend 64 bits an image.",
        "`scalar`: quantizer.kind = \"finite-scalar\" (not \"vector\"), quantizer.levels = [4, 4]",
        "train.beta = 0.25 (not ",
    ] {
        assert!(table.contains(part), "`{part}` is missing:\n{table}");
    }
    let rows: Vec<&str> = table.lines().filter(|line| line.ends_with("| 2 |")).collect();
    assert_eq!(rows.len(), 2, "{table}");
    assert!(rows.iter().all(|row| row.contains(" of 16 |") && row.contains(" ± ")), "{table}");
    assert_eq!(read(path, "compare.csv").lines().count(), 3);
    let lines = read(path, "compare-runs.csv");
    assert_eq!(lines.lines().filter(|line| line.contains(",done,")).count(), 4, "{lines}");
    let chart = image::open(path.join("out/compare.png")).unwrap();
    assert!(chart.width() > 600 && chart.height() > 100);

    // Again: nothing is trained, and the same figures stand in the table.
    let before: Vec<_> = runs.map(|run| times(&path.join("out").join(run))).into();
    let again = succeed(path, compare(path, &[]));
    assert!(again.out.contains("4 done already") && !again.out.contains("run     "), "{again:?}");
    let after: Vec<_> = runs.map(|run| times(&path.join("out").join(run))).into();
    assert_eq!(before, after);
    assert_eq!(read(path, "compare.md"), table);

    // One more seed trains two runs.
    let said = succeed(path, compare(path, &["--seeds=3", "--log-format=json"]));
    let records: Vec<Value> =
        said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |event: &str| records.iter().filter(|record| record["event"] == event).count();
    assert_eq!((count("compare-started"), count("compare-run"), count("compared")), (1, 2, 1));
    let last = records.last().unwrap();
    assert_eq!((&last["rows"][0]["done"], &last["seeds"]), (&3.into(), &3.into()));
    assert!(last["rows"][1]["means"]["psnr"].as_f64().unwrap() > 1.0, "{last}");

    // The same folder cannot hold runs of another length, and nothing of it is touched.
    fail(path, compare(path, &["--epochs=2"]), &["vector-0", "train.epochs", "--overwrite"]);
    let said = succeed(path, compare(path, &["--epochs=2", "--seeds=1", "--overwrite"]));
    assert!(said.out.contains("0 done already") && said.out.contains("epoch 2/2"), "{said:?}");
}

#[test]
fn a_run_that_was_killed_goes_on_from_its_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    // 150 steps.
    let longer = ["--set=data.train_count=400", "--epochs=3", "--quantizers=vector"];
    let mut straight = compare(path, &longer);
    straight.push("--out=straight");
    succeed(path, straight);

    let out = path.join("out");
    let mut child = start(path, &compare(path, &longer));
    wait_until(|| steps(&out.join("vector-0")) > 20);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(steps(&out.join("vector-0")) < 150, "it was done before it was killed");
    let said = succeed(path, compare(path, &longer));
    assert!(said.out.contains("resume  ") && said.out.contains("of 150)"), "{said:?}");

    // Ctrl-C in the second run of another start.
    fs::remove_dir_all(out.join("vector-1")).unwrap();
    let child = start(path, &compare(path, &longer));
    wait_until(|| steps(&out.join("vector-1")) > 10);
    signal(&child, "-INT");
    let said: Said = child.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(130), "{said:?}");
    assert!(said.err.contains("the same command goes on"), "{said:?}");
    assert!(read(path, "compare.md").contains("Not done yet: `vector` (1 of 2)"), "{said:?}");
    succeed(path, compare(path, &longer));
    // To the bit what it would have been.
    for run in ["vector-0", "vector-1"] {
        let model = |out: &str| fs::read(path.join(out).join(run).join("last/model.safetensors"));
        assert_eq!(model("straight").unwrap(), model("out").unwrap(), "{run}");
    }
}

#[test]
fn a_run_that_fails_is_told_and_does_not_stop_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let said = succeed(path, compare(path, &["--quantizers=wild,vector", "--seeds=1"]));
    assert!(said.err.contains("wild-0") && said.err.contains("finite"), "{said:?}");
    let table = read(path, "compare.md");
    assert!(table.contains("Failed: `wild` with seed 0: step "), "{table}");
    assert!(table.contains("| **vector** |") && table.contains("| 0 of 1 |"), "{table}");
    assert!(read(path, "compare-runs.csv").contains("wild,0,failed,"));
    // It is not tried again until its folder is gone.
    let again = succeed(path, compare(path, &["--quantizers=wild,vector", "--seeds=1"]));
    assert!(again.out.contains("1 failed") && !again.out.contains("run     "), "{again:?}");
    fs::remove_dir_all(path.join("out/wild-0")).unwrap();
    let again = succeed(path, compare(path, &["--quantizers=wild,vector", "--seeds=1"]));
    assert!(again.out.contains("run     1 of 2: wild"), "{again:?}");
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for (more, parts) in [
        (&["--quantizers=vector,magic"][..], &["magic", "vector, scalar, wild"][..]),
        (&["--quantizers="], &["known are"]),
        (&["--seeds=0"], &["seeds", "at least 1"]),
        (&["--epochs=0"], &["train.epochs"]),
        (&["--variants=nowhere.toml"], &["nowhere.toml"]),
        (&["--variants=cifar10"], &["vq train --config"]),
        (&["--config=compare"], &["vq compare --variants"]),
        (&["--data=folder:nowhere"], &["nowhere"]),
        (&["--batch-size=97"], &["97", "96"]),
        (&["--set=train.bta=1"], &["train.bta"]),
    ] {
        fail(path, compare(path, more), parts);
    }
    for (text, parts) in [
        ("baseline = 'b'\n[[variant]]\nname = 'a'", &["baseline", "`b`"][..]),
        ("baseline = 'a'\n[[variant]]\nname = 'a'\n[[variant]]\nname = 'a'", &["two variants"]),
        ("baseline = 'a'\n[[variant]]\nname = 'a'\nkind = 'sim'", &["line 4", "kind"]),
        ("baseline = '../a'\n[[variant]]\nname = '../a'", &["../a", "letters"]),
        (
            "baseline = 'a'\n[[variant]]\nname = 'a'\nquantizer.kind = 'fsq'",
            &["`a`", "fsq", "finite-scalar"],
        ),
        (
            "baseline = 'a'\n[[variant]]\nname = 'a'\n[[variant]]\nname = 'b'\nquantizer.dim = 0",
            &["`b`", "quantizer.dim"],
        ),
        (
            "baseline = 'a'\n[[variant]]\nname = 'a'\ntrain.epochs = 9",
            &["`a`", "train.epochs", "same for all"],
        ),
        ("baseline = 'a'\n[[variant]]\nname = 'a'\ntrain.beta = 'x'", &["`a`", "x"]),
    ] {
        let args = compare(path, &[]);
        fs::write(path.join("mine.toml"), text).unwrap();
        fail(path, args, parts);
    }
    assert_eq!(names(path), ["mine.toml"]);
    let said = run(path, ["compare", "--seeds=many"]);
    assert_eq!(said.code, Some(2), "{said:?}");
}

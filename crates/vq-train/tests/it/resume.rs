//! Point 34: N steps + resume + N steps = 2N steps, to the bit.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vq_train::{Outcome, Recipe, read_metrics, read_progress};

use crate::support::{At, Memory, last, recipe, resumed, train, trainer};

const RULES: [&[&str]; 9] = [
    &["model.levels.0.quantizer.rule=ema"],
    &["model.levels.0.quantizer.rule=gradient", "train.revival.threshold=0.6"],
    &["train.weight_ema=0.9", "train.revival.threshold=0.6", "train.l1=0.1"],
    &[
        "model.levels.0.quantizer.rule=gradient",
        "model.levels.0.quantizer.gradient_estimator=rotation",
        "train.weight_ema=0.9",
        "train.kmeans.rounds=0",
    ],
    &["model.levels.0.quantizer.rule=ema", "train.accumulate=3", "train.revival.threshold=0.6"],
    &["model.levels.0.quantizer.rule=gradient", "train.accumulate=2"],
    &["train.precision=bf16"],
    &["model.likelihood=categorical", "train.accumulate=3"],
    &["model.likelihood=logistic-mixture", "model.mixtures=3", "train.weight_ema=0.9"],
];

/// A recipe of every other kind of quantizer, and of what is random about it.
const KINDS: [&[&str]; 8] = [
    &["model.levels.0.quantizer.kind=product", "train.revival.threshold=0.6"],
    &[
        "model.levels.0.quantizer.kind=product",
        "model.levels.0.quantizer.rule=gradient",
        "train.revival.threshold=0.6",
        "train.weight_ema=0.9",
    ],
    &[
        "model.levels.0.quantizer.kind=residual",
        "model.levels.0.quantizer.stages=3",
        "model.levels.0.quantizer.quantizer_dropout=0.5",
        "train.revival.threshold=0.6",
    ],
    &[
        "model.levels.0.quantizer.kind=finite-scalar",
        "model.levels.0.quantizer.levels=[5, 4, 2]",
        "train.weight_ema=0.9",
    ],
    &["model.levels.0.quantizer.kind=lookup-free", "model.levels.0.quantizer.bits=5"],
    &["model.levels.0.quantizer.kind=binary-spherical", "model.levels.0.quantizer.bits=5"],
    &["model.levels.0.quantizer.kind=sim", "train.weight_ema=0.9"],
    &["model.levels.0.quantizer.kind=index-backprop"],
];

/// Interrupts after `step`, then resumes to the end.
fn in_two_parts(recipe: &Recipe, run: &Path, step: u64) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut first = trainer(recipe, run)
        .unwrap()
        .with_observer(At { step, stop: Some(stop.clone()) })
        .with_stop_flag(stop);
    assert_eq!(first.run().unwrap(), Outcome::Interrupted);
    assert_eq!(read_progress(&run.join("last")).unwrap().step, step);
    let mut second = resumed(recipe, run).unwrap();
    assert_eq!(second.progress().step, step);
    assert_eq!(second.run().unwrap(), Outcome::Finished);
}

/// Both files of the checkpoint, so also moments, raw weights, statistics and history.
fn assert_same(a: &Path, b: &Path, what: &str) {
    for (name, (a, b)) in ["model", "training"].iter().zip(last(a).iter().zip(&last(b))) {
        assert!(a == b, "{what}: {name}.safetensors differs");
    }
}

#[test]
fn resuming_continues_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (index, rule) in RULES.iter().enumerate() {
        let recipe = recipe(rule);
        let straight = folder.path().join(format!("straight-{index}"));
        train(&recipe, &straight);
        // In the middle of an epoch, after its last step, after the very first step.
        for step in [7, 10, 1] {
            let parts = folder.path().join(format!("parts-{index}-{step}"));
            in_two_parts(&recipe, &parts, step);
            assert_same(&straight, &parts, &format!("{rule:?}, interrupted at step {step}"));
        }
    }
}

#[test]
fn resuming_continues_to_the_bit_with_every_quantizer() {
    let folder = tempfile::tempdir().unwrap();
    for (index, kind) in KINDS.iter().enumerate() {
        let recipe = recipe(kind);
        let straight = folder.path().join(format!("straight-{index}"));
        train(&recipe, &straight);
        for step in [7, 10] {
            let parts = folder.path().join(format!("parts-{index}-{step}"));
            in_two_parts(&recipe, &parts, step);
            assert_same(&straight, &parts, &format!("{kind:?}, interrupted at step {step}"));
        }
    }
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    for (index, rule) in RULES.iter().chain(&KINDS).enumerate() {
        let recipe = recipe(rule);
        let run = |threads: usize| {
            let run = folder.path().join(format!("{index}-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| train(&recipe, &run));
            run
        };
        assert_same(&run(1), &run(2), &format!("{rule:?}, 1 and 2 threads"));
    }
}

#[test]
fn the_epochs_records_are_those_of_an_uninterrupted_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.checkpoint_every_steps=2"]);
    let (straight, parts) = (folder.path().join("a"), folder.path().join("b"));
    train(&recipe, &straight);
    // A crash at step 9: the newest checkpoint is that of step 8, and step 9 is logged twice.
    let mut crashed = trainer(&recipe, &parts).unwrap().with_observer(At { step: 9, stop: None });
    assert_eq!(crashed.run().unwrap_err().to_string(), "crash");
    // Its last line was cut off.
    let metrics = parts.join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    assert!(text.contains("\"step\":9"));
    fs::write(&metrics, &text[..text.len() - 20]).unwrap();
    let mut trainer = resumed(&recipe, &parts).unwrap();
    assert_eq!(trainer.progress().step, 8);
    trainer.run().unwrap();
    assert_same(&straight, &parts, "after a crash");

    let records = |run: &Path, event: &str, drop: &[&str]| -> Vec<serde_json::Value> {
        let mut records = read_metrics(&run.join("metrics.jsonl")).unwrap();
        records.retain(|record| record["event"] == event);
        for record in &mut records {
            for key in drop {
                record.as_object_mut().unwrap().remove(*key);
            }
        }
        records
    };
    let timings = ["images_per_second", "train_seconds", "evaluation_seconds"];
    for (event, count) in [("step", 15), ("epoch", 3)] {
        let straight = records(&straight, event, &timings);
        assert_eq!(straight.len(), count);
        assert_eq!(straight, records(&parts, event, &timings));
    }
}

#[test]
fn a_crash_before_the_first_checkpoint_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&[]);
    let (straight, crashed) = (folder.path().join("a"), folder.path().join("b"));
    train(&recipe, &straight);
    trainer(&recipe, &crashed)
        .unwrap()
        .with_observer(At { step: 3, stop: None })
        .run()
        .unwrap_err();
    let mut trainer = resumed(&recipe, &crashed).unwrap();
    assert_eq!(trainer.progress().step, 0);
    trainer.run().unwrap();
    assert_same(&straight, &crashed, "from the start");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_loudly() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.keep_checkpoints=3", "train.checkpoint_every_steps=2"]);
    let (straight, damaged) = (folder.path().join("a"), folder.path().join("b"));
    train(&recipe, &straight);
    for name in ["model.safetensors", "training.safetensors", "config.json"] {
        let stop = Arc::new(AtomicBool::new(false));
        let mut first = trainer(&recipe, &damaged)
            .unwrap()
            .with_observer(At { step: 9, stop: Some(stop.clone()) })
            .with_stop_flag(stop);
        first.run().unwrap();
        let cut = fs::canonicalize(damaged.join("last")).unwrap().join(name);
        let bytes = fs::read(&cut).unwrap();
        fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();

        let memory = Memory::default();
        let mut second = resumed(&recipe, &damaged).unwrap().with_observer(memory.clone());
        assert_eq!(second.progress().step, 8, "{name}");
        second.run().unwrap();
        let warnings = memory.all("warning");
        let message = warnings[0]["message"].as_str().unwrap();
        for part in ["step-000000009", "step-000000008", name] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert_same(&straight, &damaged, name);
    }
}

#[test]
fn a_run_without_a_whole_checkpoint_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&[]);
    train(&recipe, folder.path());
    for entry in fs::read_dir(folder.path().join("checkpoints")).unwrap() {
        let file = entry.unwrap().path().join("training.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    }
    let error = resumed(&recipe, folder.path()).err().unwrap().to_string();
    for part in ["step-0000000", "damaged", "--overwrite"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn more_epochs_may_be_asked_for_another_model_may_not() {
    let folder = tempfile::tempdir().unwrap();
    let one = recipe(&["train.epochs=1"]);
    train(&one, folder.path());
    let mut more = resumed(&recipe(&["train.epochs=2"]), folder.path()).unwrap();
    assert_eq!((more.progress().epoch, more.progress().step), (1, 5));
    more.run().unwrap();
    assert_eq!(more.progress().step, 10);
    // Nothing left to do.
    assert_eq!(resumed(&one, folder.path()).unwrap().run().unwrap(), Outcome::Finished);

    for (change, part) in [
        ("model.levels.0.quantizer.dim=8", "model.levels.0.quantizer.dim"),
        ("train.seed=1", "train.seed"),
        ("train.batch_size=4", "batches an epoch"),
        ("data.train_count=42", "42 images to learn from"),
    ] {
        let error = resumed(&recipe(&[change]), folder.path()).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
}

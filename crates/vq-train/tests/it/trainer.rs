//! The loop, with a real tokenizer.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vq_train::{Error, Outcome, load_model, read_metrics, read_progress};

use crate::support::{Memory, last, recipe, resumed, train, trainer};

#[test]
fn learns_and_says_what_happens_in_order() {
    let run = tempfile::tempdir().unwrap();
    let overrides =
        ["train.epochs=8", "train.lr=0.01", "train.beta=0.25", "train.keep_checkpoints=1"];
    let recipe = recipe(&overrides);
    let memory = Memory::default();
    let mut trainer = trainer(&recipe, run.path()).unwrap().with_observer(memory.clone());
    assert_eq!(trainer.run().unwrap(), Outcome::Finished);

    let mut names: Vec<String> =
        memory.0.lock().unwrap().iter().map(|e| e["event"].as_str().unwrap().to_owned()).collect();
    if !vq_ops::test_device().is_cpu() {
        // Codes that nobody chose in the first epoch are revived in every tenth step only, and told of before.
        names.retain(|name| name != "warning");
    }
    let epoch = ["step", "step", "step", "step", "step", "epoch", "checkpoint"];
    let expected: Vec<&str> = std::iter::once("run-started")
        .chain(std::iter::repeat_n(epoch, 8).flatten())
        .chain(std::iter::once("run-finished"))
        .collect();
    assert_eq!(names, expected);

    let epochs = memory.all("epoch");
    let (first, last) = (&epochs[0], &epochs[7]);
    assert!(last["train"]["reconstruction"].as_f64() < first["train"]["reconstruction"].as_f64());
    assert!(last["test"]["psnr"].as_f64() > first["test"]["psnr"].as_f64());
    for key in ["mse", "nmse", "psnr", "ssim", "commitment", "perplexity", "codes_in_use"] {
        assert!(last["test"][key].is_number(), "{key}");
    }
    // The terms add up.
    for step in memory.all("step") {
        let term = |name: &str| step[name].as_f64().unwrap();
        let sum = term("reconstruction") + term("codebook") + 0.25 * term("commitment");
        assert!((term("loss") - sum).abs() < 1e-5 * sum, "{step}");
    }

    // One line per event in the metrics file.
    let text = fs::read_to_string(run.path().join("metrics.jsonl")).unwrap();
    assert_eq!(text.lines().count(), memory.0.lock().unwrap().len());
    let progress = read_progress(&run.path().join("last")).unwrap();
    assert_eq!((progress.step, progress.epoch, progress.history.len()), (40, 8, 8));
    assert!(
        load_model(run.path(), &vq_ops::test_device()).unwrap().codebooks_initialized().unwrap()
    );
    // The newest and the best, which may be one.
    assert!(fs::read_dir(run.path().join("checkpoints")).unwrap().count() <= 2);
}

#[test]
fn the_best_checkpoint_is_that_of_the_highest_psnr() {
    let run = tempfile::tempdir().unwrap();
    train(&recipe(&["train.epochs=6", "train.lr=0.02"]), run.path());
    let history = read_progress(&run.path().join("last")).unwrap().history;
    let psnr = |record: &vq_train::EpochRecord| record.test.as_ref().unwrap().get("psnr").unwrap();
    let best = history.iter().max_by(|a, b| psnr(a).total_cmp(&psnr(b))).unwrap();
    assert_eq!(read_progress(&run.path().join("best")).unwrap().step, best.step);
}

#[test]
fn evaluates_every_so_many_epochs_and_at_the_end() {
    let run = tempfile::tempdir().unwrap();
    train(&recipe(&["train.epochs=5", "train.eval_every=2"]), run.path());
    let history = read_progress(&run.path().join("last")).unwrap().history;
    let due: Vec<bool> = history.iter().map(|record| record.test.is_some()).collect();
    assert_eq!(due, [false, true, false, true, true]);
}

/// Nothing is kept of what was begun before the first step.
#[test]
fn a_stop_flag_that_is_raised_already_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.epochs=1"]);
    let (straight, stopped) = (folder.path().join("a"), folder.path().join("b"));
    train(&recipe, &straight);
    let stop = Arc::new(AtomicBool::new(true));
    let mut first = trainer(&recipe, &stopped).unwrap().with_stop_flag(stop.clone());
    assert_eq!(first.run().unwrap(), Outcome::Interrupted);
    let mut second = resumed(&recipe, &stopped).unwrap().with_stop_flag(stop);
    assert_eq!(second.run().unwrap(), Outcome::Interrupted);
    assert!(!stopped.join("last").exists());
    let mut third = resumed(&recipe, &stopped).unwrap();
    assert_eq!(third.progress().step, 0);
    assert!(!third.task().model().codebooks_initialized().unwrap());
    third.run().unwrap();
    assert!(last(&straight) == last(&stopped));
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let run = tempfile::tempdir().unwrap();
    let recipe = recipe(&[
        "train.epochs=1",
        "train.lr=1e-3",
        "train.checkpoint_every_steps=1",
        "train.grad_clip=0",
    ]);
    train(&recipe, run.path());
    // Goes on from a good checkpoint with a rate that blows up.
    let wild =
        recipe.with_override("train.lr=1e30").unwrap().with_override("train.epochs=9").unwrap();
    let error = resumed(&wild, run.path()).unwrap().run().unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error:?}");
    let error = error.to_string();
    for part in ["step ", "Last good checkpoint", "checkpoints/step-00000000", "train.lr"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // That checkpoint is good.
    resumed(&recipe, run.path()).unwrap();
}

#[test]
fn a_collapse_is_said_once_with_advice() {
    let run = tempfile::tempdir().unwrap();
    let paper = [
        "model.levels.0.quantizer.rule=gradient",
        "model.levels.0.quantizer.codebook_size=64",
        "train.kmeans.rounds=0",
        "train.revival.threshold=0",
    ];
    let memory = Memory::default();
    trainer(&recipe(&paper), run.path()).unwrap().with_observer(memory.clone()).run().unwrap();
    let mut warnings = memory.all("warning");
    warnings.retain(|warning| warning["kind"] == "collapse");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let message = warnings[0]["message"].as_str().unwrap();
    assert!(message.contains("of 64 codes") && message.contains("ema"), "{message}");

    let memory = Memory::default();
    let healthy = ["model.levels.0.quantizer.decay=0.8", "train.epochs=8"];
    trainer(&recipe(&healthy), run.path()).unwrap().with_observer(memory.clone()).run().unwrap();
    let mut warnings = memory.all("warning");
    if !vq_ops::test_device().is_cpu() {
        warnings.retain(|warning| warning["kind"] == "collapse");
    }
    assert_eq!(warnings.len(), 0, "{warnings:?}");
}

/// Point 14.
#[test]
fn a_revival_threshold_that_mean_usage_cannot_meet_is_said_at_the_start() {
    let run = tempfile::tempdir().unwrap();
    let memory = Memory::default();
    let recipe = recipe(&["train.revival.threshold=1.5", "train.epochs=1"]);
    trainer(&recipe, run.path()).unwrap().with_observer(memory.clone()).run().unwrap();
    let second = memory.0.lock().unwrap()[1].clone();
    assert_eq!(second["kind"], "settings");
    assert!(second["message"].as_str().unwrap().contains("train.revival.threshold = 1.5"));
}

#[test]
fn the_picture_images_are_the_same_in_every_epoch() {
    struct Pictures(Arc<std::sync::Mutex<Vec<Vec<f32>>>>);
    impl vq_train::Observer for Pictures {
        fn observe(
            &mut self,
            event: &vq_train::Event<'_>,
        ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            if let vq_train::Event::EpochFinished(event) = event {
                let samples = event.evaluation.unwrap().samples.as_ref().unwrap();
                assert_eq!(samples.originals.dims(), [4, 3, 16, 16]);
                assert_eq!(samples.reconstructions.dims(), [4, 3, 16, 16]);
                let pixels = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
                let reconstruction: Vec<f32> = pixels(&samples.reconstructions);
                assert!(reconstruction.iter().all(|p| (0.0..=1.0).contains(p)));
                self.0.lock().unwrap().push(pixels(&samples.originals));
            }
            Ok(())
        }
    }
    let run = tempfile::tempdir().unwrap();
    let seen = Arc::default();
    trainer(&recipe(&[]), run.path())
        .unwrap()
        .with_observer(Pictures(Arc::clone(&seen)))
        .run()
        .unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    assert!(seen[0] == seen[1] && seen[1] == seen[2]);
}

#[test]
fn every_quantizer_trains_and_reports_its_terms_and_each_of_its_codebooks() {
    for (kind, more) in [
        ("product", None),
        ("residual", None),
        ("finite-scalar", Some("model.levels.0.quantizer.levels=[5, 4]")),
        ("lookup-free", Some("model.levels.0.quantizer.bits=4")),
        ("binary-spherical", Some("model.levels.0.quantizer.bits=4")),
        ("sim", None),
        ("index-backprop", None),
    ] {
        let kind_key = format!("model.levels.0.quantizer.kind={kind}");
        let overrides: Vec<&str> = [kind_key.as_str(), "train.epochs=2", "train.beta=0.25"]
            .into_iter()
            .chain(more)
            .collect();
        let run = tempfile::tempdir().unwrap();
        let memory = Memory::default();
        let recipe = recipe(&overrides);
        let mut trainer = trainer(&recipe, run.path()).unwrap().with_observer(memory.clone());
        assert_eq!(trainer.run().unwrap(), Outcome::Finished, "{kind}");
        let quantizer = &recipe.model.levels[0].quantizer;
        let has_entropy = quantizer.kind.has_key("entropy_weight");
        for step in memory.all("step") {
            let term = |name: &str| step[name].as_f64().unwrap();
            let entropy = if has_entropy { term("entropy") } else { 0.0 };
            assert_eq!(step["entropy"].is_number(), has_entropy, "{step}");
            let terms =
                [term("reconstruction"), term("codebook"), 0.25 * term("commitment"), entropy];
            // An entropy loss may be negative, so that the sum is smaller than its terms.
            let size: f64 = terms.iter().map(|term| term.abs()).sum();
            assert!((term("loss") - terms.iter().sum::<f64>()).abs() < 1e-5 * size, "{step}");
        }
        let epochs = memory.all("epoch");
        let test = &epochs[1]["test"];
        let perplexity = test["perplexity"].as_f64().unwrap();
        assert!(perplexity >= 1.0 && perplexity <= quantizer.codebook_size as f64, "{test}");
        let count = quantizer.codes_per_position();
        let each: Vec<f64> =
            (0..8).map_while(|index| test[format!("perplexity/{index}")].as_f64()).collect();
        assert_eq!(each.len(), if count > 1 { count } else { 0 }, "{kind}: {test}");
        if count > 1 {
            let mean = each.iter().map(|p| p.ln()).sum::<f64>() / count as f64;
            assert!((perplexity.ln() - mean).abs() < 1e-9, "{test}");
        }
        load_model(run.path(), &vq_ops::test_device()).unwrap();
    }
}

/// A histogram is the only table of 2¹⁸ codes.
#[test]
fn a_quarter_of_a_million_implicit_codes_train() {
    for (kind, more) in [
        ("finite-scalar", "model.levels.0.quantizer.levels=[8, 8, 8, 8, 8, 8]"),
        ("lookup-free", "model.levels.0.quantizer.bits=18"),
    ] {
        let kind = format!("model.levels.0.quantizer.kind={kind}");
        let recipe = recipe(&[&kind, more, "train.epochs=1", "train.checkpoint_every_steps=2"]);
        assert_eq!(recipe.model.levels[0].quantizer.codebook_size, 262_144);
        let run = tempfile::tempdir().unwrap();
        train(&recipe, run.path());
        let model = load_model(run.path(), &vq_ops::test_device()).unwrap();
        let stored = model.tensors().values().map(candle_core::Tensor::elem_count).max().unwrap();
        assert!(stored < 10_000, "{stored}");
    }
}

/// The figures of the codebooks that apply to each kind, in every epoch's record and in the metrics file.
#[test]
fn epochs_have_the_figures_of_their_codebooks() {
    let figures = |more: &[&str]| -> Vec<serde_json::Value> {
        let run = tempfile::tempdir().unwrap();
        train(&recipe(more), run.path());
        let mut records = read_metrics(&run.path().join("metrics.jsonl")).unwrap();
        records.retain(|record| record["event"] == "epoch");
        records.into_iter().map(|mut record| record["train"].take()).collect()
    };
    for epoch in figures(&[]) {
        for name in ["code_distance", "code_spread", "code_spacing", "drift"] {
            assert!(epoch[name].as_f64().unwrap() > 0.0, "{name}: {epoch}");
        }
        for name in ["dead_codes", "duplicate_codes", "revived"] {
            assert!(epoch[name].as_f64().unwrap() >= 0.0, "{name}: {epoch}");
        }
        // As many as 5 steps of 8 images on grids of 4×4 reach of 16 codes: all.
        let codes = epoch["dead_codes"].as_f64().unwrap() + epoch["codes_in_use"].as_f64().unwrap();
        assert!((15.0..=16.0).contains(&codes), "{epoch}");
    }
    let implicit = figures(&[
        "model.levels.0.quantizer.kind=finite-scalar",
        "model.levels.0.quantizer.levels=[5, 4, 2]",
    ]);
    for name in ["code_spread", "code_spacing", "duplicate_codes", "drift", "revived"] {
        assert!(implicit[0].get(name).is_none(), "{name}: {}", implicit[0]);
    }
    assert!(implicit[0]["code_distance"].is_f64() && implicit[0]["dead_codes"].is_f64());
    let residual = figures(&["model.levels.0.quantizer.kind=residual"]);
    assert!(residual[0].get("code_distance").is_none() && residual[0]["drift"].is_f64());
}

/// Codes that cannot come alive: said once, and in a resumed run not again.
#[test]
fn advice_on_the_codebooks_is_given_once() {
    let run = tempfile::tempdir().unwrap();
    // Half of the codes can be reached: no collapse.
    let paper = [
        "model.levels.0.quantizer.rule=gradient",
        "model.levels.0.quantizer.codebook_size=256",
        "train.revival.threshold=0",
        "train.epochs=4",
    ];
    let memory = Memory::default();
    trainer(&recipe(&paper), run.path()).unwrap().with_observer(memory.clone()).run().unwrap();
    let said = |memory: &Memory| -> Vec<String> {
        let warnings = memory.all("warning").into_iter().filter(|w| w["kind"] == "codebook");
        warnings.map(|warning| warning["message"].as_str().unwrap().to_owned()).collect()
    };
    let dead: Vec<String> =
        said(&memory).into_iter().filter(|message| message.contains("not chosen")).collect();
    assert_eq!(dead.len(), 1, "{:?}", said(&memory));
    assert!(dead[0].contains("quantizer.rule = \"ema\""), "{dead:?}");
    assert!(dead[0].contains("train.revival.threshold = 0.1"), "{dead:?}");
    let longer = recipe(&paper).with_override("train.epochs=6").unwrap();
    let memory = Memory::default();
    resumed(&longer, run.path()).unwrap().with_observer(memory.clone()).run().unwrap();
    assert!(said(&memory).iter().all(|message| !message.contains("not chosen")));
}

/// What devices with a queue of their own do: nothing but the time of the reports changes.
#[test]
fn steps_that_are_read_together_are_the_same_steps() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(&["train.epochs=2", "train.accumulate=2"]);
    let steps = |interval: usize| {
        let (memory, run) = (Memory::default(), folder.path().join(interval.to_string()));
        let trainer = trainer(&recipe, &run).unwrap().with_observer(memory.clone());
        trainer.with_read_interval(interval).run().unwrap();
        let mut steps = memory.all("step");
        for step in &mut steps {
            step.as_object_mut().unwrap().remove("images_per_second").unwrap();
        }
        let progress = read_progress(&run.join("last")).unwrap();
        (steps, progress.history, progress.running)
    };
    let (one_by_one, together) = (steps(1), steps(3));
    assert_eq!(one_by_one.0.len(), 10);
    assert_eq!(one_by_one, together);
}

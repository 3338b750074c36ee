//! Runs that end before their time.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::{Said, fail, signal, start, steps, succeed, train, wait_until};

fn model(run: &Path) -> Vec<u8> {
    fs::read(run.join("last/model.safetensors")).unwrap()
}

/// 50 steps an epoch.
const LONGER: [&str; 2] = ["--set=data.train_count=400", "--epochs=3"];

#[test]
fn kill_in_an_epoch_and_resume_is_the_straight_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    succeed(folder.path(), train("straight", &LONGER));
    // From the end of the first epoch, and from a checkpoint within the second.
    for (name, every) in [("epochs", 0), ("steps", 7)] {
        let every = format!("--set=train.checkpoint_every_steps={every}");
        let more = [LONGER[0], LONGER[1], every.as_str()];
        let mut child = start(folder.path(), &train(name, &more));
        wait_until(|| steps(&path(name)) > 70);
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9), "it was done before it was killed");
        let before = steps(&path(name));
        assert!((70..150).contains(&before), "{before}");

        let said = succeed(folder.path(), ["train", "--out", name, "--resume"]);
        let from = if name == "epochs" { "(step 50 of 150)" } else { "of 150)" };
        assert!(said.out.contains(from), "{said:?}");
        assert_eq!(model(&path("straight")), model(&path(name)), "{name}");
        // The metrics, too, are those of one run: every step once.
        assert_eq!(steps(&path(name)), 150);
    }
}

#[test]
fn a_run_that_goes_on_is_let_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(folder.path(), &train("run", &LONGER));
    wait_until(|| steps(&folder.path().join("run")) > 10);
    let says = ["is being written by another run", "--out"];
    fail(folder.path(), ["train", "--out=run", "--resume"], &says);
    let mut again = train("run", &[]);
    again.push("--overwrite");
    fail(folder.path(), again, &says);
    assert!(child.wait().unwrap().success());
    assert_eq!(steps(&folder.path().join("run")), 150);
}

#[test]
fn ctrl_c_and_sigterm_save_and_end_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    succeed(folder.path(), train("straight", &LONGER));
    for (name, code) in [("-INT", 130), ("-TERM", 143)] {
        let run = &name[1..];
        let child = start(folder.path(), &train(run, &LONGER));
        wait_until(|| steps(&path(run)) > 60);
        // As `timeout` does: to the program, and to all of its group.
        signal(&child, name);
        signal(&child, name);
        let said: Said = child.wait_with_output().unwrap().into();
        assert_eq!(said.code, Some(code), "{said:?}");
        let advice = format!("vq train --resume --out {run}");
        assert!(said.out.lines().last().unwrap().ends_with(&advice), "{said:?}");
        assert!(!said.err.contains("error"), "{said:?}");
        assert!(path(run).join("curves.svg").is_file());

        // The last step is the one that was saved.
        let inspected =
            succeed(folder.path(), ["inspect", &format!("{run}/last"), "--log-format=json"]);
        let record: Value = serde_json::from_str(&inspected.out).unwrap();
        assert_eq!(record["training"]["step"], steps(&path(run)));
        succeed(folder.path(), ["train", "--out", run, "--resume"]);
        assert_eq!(model(&path("straight")), model(&path(run)));
    }
}

/// `VQ_KILLS` says how often; 8 by default.
#[test]
fn a_kill_at_any_moment_leaves_a_checkpoint_that_resumes() {
    let kills = std::env::var("VQ_KILLS").map_or(8, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let endless = ["--set=train.checkpoint_every_steps=2", "--epochs=100000"];
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut step = 0;
    for kill in 0..kills {
        let is_started = run.join("config.toml").is_file();
        let args = if is_started {
            vec!["train", "--out", "run", "--resume"]
        } else {
            train("run", &endless)
        };
        let mut child = start(folder.path(), &args);
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(100 + (random >> 33) % 700));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "kill {kill}: {:?}", Said::from(output));

        if !run.join("last").exists() {
            assert_eq!(step, 0, "kill {kill}: the checkpoints are gone");
            continue;
        }
        let inspected = succeed(folder.path(), ["inspect", "run/last", "--log-format=json"]);
        let record: Value = serde_json::from_str(&inspected.out).unwrap();
        let now = record["training"]["step"].as_u64().unwrap();
        assert!(now >= step, "kill {kill}: went back from {step} to {now}");
        step = now;
    }
    assert!(step > 0, "no run got as far as a checkpoint");
    let child = start(folder.path(), &["train", "--out", "run", "--resume"]);
    let before = steps(&run);
    wait_until(|| steps(&run) > before + 5);
    signal(&child, "-TERM");
    let said: Said = child.wait_with_output().unwrap().into();
    assert_eq!(said.code, Some(143), "{said:?}");
    assert!(!said.err.contains("warning"), "no checkpoint was passed over: {said:?}");
}

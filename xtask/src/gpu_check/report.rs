//! What was found: lines as they come, and all of it as JSON.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::Error;

/// Everything found so far.
pub(super) struct Report {
    device: String,
    checks: Vec<Check>,
    speeds: Vec<Speed>,
}

struct Check {
    name: String,
    /// None where it passed.
    problem: Option<String>,
    detail: String,
}

/// Images a second of one way to train.
pub(super) struct Speed {
    pub(super) program: String,
    pub(super) model: String,
    pub(super) format: String,
    pub(super) batch: usize,
    pub(super) images_per_second: Result<f64, String>,
}

/// Prints a line at once.
pub(super) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A closed pipe is no reason to stop.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

impl Report {
    pub(super) fn new(device: &str) -> Self {
        Self { device: device.to_owned(), checks: Vec::new(), speeds: Vec::new() }
    }

    /// Notes a check and goes on, whatever became of it. `Ok` holds what was measured.
    pub(super) fn check(&mut self, name: &str, found: Result<String, String>) {
        let (detail, problem) = match found {
            Ok(detail) => (detail, None),
            Err(problem) => (String::new(), Some(problem)),
        };
        match &problem {
            None => say(&format!("ok      {name:<44} {detail}")),
            Some(problem) => say(&format!("FAILED  {name:<44} {problem}")),
        }
        self.checks.push(Check { name: name.to_owned(), problem, detail });
    }

    pub(super) fn speed(&mut self, speed: Speed) {
        let Speed { program, model, format, batch, images_per_second } = &speed;
        let value = match images_per_second {
            Ok(value) => format!("{value:>12.0}"),
            Err(problem) => format!("failed: {problem}"),
        };
        say(&format!("{program:<24} {model:<12} {format:<5} {batch:>5}  {value}"));
        self.speeds.push(speed);
    }

    /// (failed, all)
    pub(super) fn checks(&self) -> (usize, usize) {
        let failed = self.checks.iter().filter(|check| check.problem.is_some()).count();
        (failed, self.checks.len())
    }

    /// Ours over the fastest of PyTorch's, where both are there.
    pub(super) fn ratios(&self) -> String {
        let mut text = "\n## Ours over PyTorch's fastest\n".to_owned();
        for ours in self.speeds.iter().filter(|speed| speed.program == "vq") {
            let best = self
                .speeds
                .iter()
                .filter(|speed| speed.program != "vq")
                .filter(|speed| {
                    (&speed.model, &speed.format, speed.batch)
                        == (&ours.model, &ours.format, ours.batch)
                })
                .filter_map(|speed| Some((speed.images_per_second.as_ref().ok()?, &speed.program)))
                .max_by(|a, b| a.0.total_cmp(b.0));
            if let (Ok(ours_value), Some((best, program))) = (&ours.images_per_second, best) {
                let (model, format, batch) = (&ours.model, &ours.format, ours.batch);
                let ratio = ours_value / best;
                let _ =
                    write!(text, "\n{model:<12} {format:<5} {batch:>5}  {ratio:.2}  ({program})");
            }
        }
        text
    }

    /// `gpu-check.json` in that folder.
    pub(super) fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join("gpu-check.json");
        let text = format!("{:#}\n", self.json());
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|error| Error::Write { path, problem: error.to_string() })
    }

    fn json(&self) -> Value {
        let checks = self.checks.iter().map(|check| {
            json!({ "name": check.name, "passed": check.problem.is_none(), "problem": check.problem, "detail": check.detail })
        });
        let speeds = self.speeds.iter().map(|speed| {
            json!({
                "program": speed.program,
                "model": speed.model,
                "format": speed.format,
                "batch": speed.batch,
                "images_per_second": speed.images_per_second.as_ref().ok(),
                "problem": speed.images_per_second.as_ref().err(),
            })
        });
        json!({
            "device": self.device,
            "checks": checks.collect::<Vec<_>>(),
            "speeds": speeds.collect::<Vec<_>>(),
        })
    }
}

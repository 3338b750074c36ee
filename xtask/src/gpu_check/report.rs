//! What was found: lines as they come, and all of it as JSON.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::Error;

/// The program whose speeds are ours.
pub(super) const OURS: &str = "vq";

/// Everything found so far.
pub(super) struct Report {
    device: String,
    checks: Vec<Check>,
    speeds: Vec<Speed>,
    runs: Vec<Run>,
}

/// A whole run.
pub(super) struct Run {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    /// Its last words.
    pub(super) said: Result<String, String>,
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
    pub(super) fn new(device: String) -> Self {
        Self { device, checks: Vec::new(), speeds: Vec::new(), runs: Vec::new() }
    }

    pub(super) fn title(&self) -> String {
        format!("# gpu-check: {}", self.device)
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
            Err(problem) => format!("FAILED: {problem}"),
        };
        say(&format!("{program:<24} {model:<12} {format:<6} {batch:>5}  {value}"));
        self.speeds.push(speed);
    }

    pub(super) fn run(&mut self, run: Run) {
        let Run { name, seconds, said } = &run;
        let said = match said {
            Ok(said) => said.replace('\n', "\n    "),
            Err(problem) => format!("FAILED: {problem}"),
        };
        say(&format!("{name:<24} {seconds:>8.1}  {said}"));
        self.runs.push(run);
    }

    /// What became of all of it; an error where a check or a run failed or a speed of ours was not measured.
    /// PyTorch's failures are its own.
    pub(super) fn verdict(&self) -> Result<String, String> {
        let failed = self.checks.iter().filter(|check| check.problem.is_some()).count();
        let ours = || self.speeds.iter().filter(|speed| speed.program == OURS);
        let unmeasured = ours().filter(|speed| speed.images_per_second.is_err()).count();
        let (checks, speeds) = (self.checks.len(), ours().count());
        let mut parts = Vec::new();
        if failed > 0 {
            parts.push(format!("{failed} of {checks} checks failed"));
        } else if checks > 0 {
            parts.push(format!("all {checks} checks passed"));
        }
        if speeds > unmeasured {
            parts.push(format!("{} runs of the training loop timed", speeds - unmeasured));
        }
        if unmeasured > 0 {
            parts.push(format!("{unmeasured} of {speeds} runs of the training loop failed"));
        }
        let broken = self.runs.iter().filter(|run| run.said.is_err()).count();
        if broken > 0 {
            parts.push(format!("{broken} of {} whole runs failed", self.runs.len()));
        } else if !self.runs.is_empty() {
            parts.push(format!("{} whole runs done", self.runs.len()));
        }
        let text =
            if parts.is_empty() { "nothing was checked".to_owned() } else { parts.join("; ") };
        if failed + unmeasured + broken > 0 { Err(text) } else { Ok(text) }
    }

    /// Ours over the fastest of PyTorch's, where both are there.
    pub(super) fn ratios(&self) -> String {
        let mut text = "\n## Ours as a multiple of PyTorch's fastest way\n\n\
             model        format batch  ratio  PyTorch's way"
            .to_owned();
        for ours in self.speeds.iter().filter(|speed| speed.program == OURS) {
            let best = self
                .speeds
                .iter()
                .filter(|speed| speed.program != OURS)
                .filter(|speed| {
                    (&speed.model, &speed.format, speed.batch)
                        == (&ours.model, &ours.format, ours.batch)
                })
                .filter_map(|speed| Some((speed.images_per_second.as_ref().ok()?, &speed.program)))
                .max_by(|a, b| a.0.total_cmp(b.0));
            let (model, format, batch) = (&ours.model, &ours.format, ours.batch);
            let found = match (&ours.images_per_second, best) {
                (Ok(ours), Some((best, program))) => format!("{:>5.2}  {program}", ours / best),
                _ => "    -  not measured".to_owned(),
            };
            let _ = write!(text, "\n{model:<12} {format:<6} {batch:>5}  {found}");
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
        let runs = self.runs.iter().map(|run| {
            json!({
                "name": run.name,
                "seconds": run.seconds,
                "said": run.said.as_ref().ok(),
                "problem": run.said.as_ref().err(),
            })
        });
        json!({
            "device": self.device,
            "checks": checks.collect::<Vec<_>>(),
            "speeds": speeds.collect::<Vec<_>>(),
            "runs": runs.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(program: &str, images_per_second: Result<f64, String>) -> Speed {
        let (model, format) = ("standard".to_owned(), "f32".to_owned());
        Speed { program: program.to_owned(), model, format, batch: 8, images_per_second }
    }

    #[test]
    fn ratios_are_to_the_fastest_of_the_same_work() {
        let mut report = Report::new("cpu".to_owned());
        report.speed(speed(OURS, Ok(300.)));
        report.speed(speed("pytorch eager", Ok(100.)));
        report.speed(speed("pytorch compiled", Ok(150.)));
        report.speed(speed("pytorch graphs", Err("no".to_owned())));
        report.speed(Speed { batch: 16, ..speed("pytorch eager", Ok(900.)) });
        let text = report.ratios();
        assert!(text.ends_with("standard     f32        8   2.00  pytorch compiled"), "{text}");
    }

    #[test]
    fn a_failed_check_or_run_of_ours_fails_all_and_pytorchs_do_not() {
        let mut report = Report::new("cpu".to_owned());
        assert_eq!(report.verdict().unwrap(), "nothing was checked");
        report.check("good", Ok(String::new()));
        report.speed(speed("pytorch", Err("not installed".to_owned())));
        assert_eq!(report.verdict().unwrap(), "all 1 checks passed");
        report.check("bad", Err("1.0e0 (allowed 1e-4)".to_owned()));
        assert_eq!(report.verdict().unwrap_err(), "1 of 2 checks failed");
        report.speed(speed(OURS, Ok(10.)));
        assert!(report.verdict().unwrap_err().ends_with("; 1 runs of the training loop timed"));
        report.speed(speed(OURS, Err("memory".to_owned())));
        assert!(report.verdict().unwrap_err().contains("1 of 2 runs of the training loop failed"));
    }
}

//! The same training in PyTorch, for comparison.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::Options;
use super::report::{Report, Speed};

/// Trains the standard model and imagenet256's; it says what it measures in lines of JSON.
const SCRIPT: &str = include_str!("pytorch.py");

pub(super) fn measure(options: &Options, report: &mut Report) {
    if let Err(problem) = run(options, report) {
        let (program, model) = ("pytorch".to_owned(), "-".to_owned());
        let images_per_second = Err(problem);
        let format = "-".to_owned();
        report.speed(Speed { program, model, format, batch: 0, images_per_second });
    }
}

fn run(options: &Options, report: &mut Report) -> Result<(), String> {
    let batches: Vec<String> = options.batches.iter().map(ToString::to_string).collect();
    let mut child = Command::new(&options.python)
        .args([
            "-c",
            SCRIPT,
            &options.device,
            &options.models.join(","),
            &options.formats.join(","),
        ])
        .args([&batches.join(","), &options.seconds.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", options.python))?;
    if let Some(lines) = child.stdout.take() {
        for line in BufReader::new(lines).lines() {
            let line = line.map_err(|error| error.to_string())?;
            if let Some(speed) = parse(&line) {
                report.speed(speed);
            }
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("the script ended with {status}")) }
}

fn parse(line: &str) -> Option<Speed> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| value.get(key)?.as_str().map(str::to_owned);
    let images_per_second = match value.get("images_per_second")?.as_f64() {
        Some(found) => Ok(found),
        None => Err(text("problem").unwrap_or_default()),
    };
    Some(Speed {
        program: format!("pytorch {}", text("way")?),
        model: text("model")?,
        format: text("format")?,
        batch: value.get("batch")?.as_u64()? as usize,
        images_per_second,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_script_are_read_and_others_are_not() {
        let line = r#"{"way":"eager","model":"standard","format":"bf16","batch":128,"images_per_second":12.5}"#;
        let speed = parse(line).unwrap();
        assert_eq!((speed.program.as_str(), speed.batch), ("pytorch eager", 128));
        assert_eq!(speed.images_per_second, Ok(12.5));
        let line = r#"{"way":"graphs","model":"standard","format":"f32","batch":1,"images_per_second":null,"problem":"memory"}"#;
        assert_eq!(parse(line).unwrap().images_per_second, Err("memory".to_owned()));
        assert!(parse("warming up").is_none());
    }
}

//! Whole runs on real images, by the program that users have: `vq`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::Options;
use super::report::{Report, Run, say};

/// What each command is called in the report, and the command, whose words hold no spaces; `$DATA` is the source of
/// the images and `$OUT` the folder of all runs.
fn commands(options: &Options) -> Vec<(&'static str, String)> {
    let device = &options.device;
    let train = format!("train --data $DATA --device {device} --overwrite");
    let encode = format!("encode --data $DATA --device {device} --dataset train");
    let prior = "--model $OUT/likelihood --prior $OUT/prior";
    let (epochs, likelihood) = (options.epochs, options.likelihood_epochs);
    vec![
        ("default", format!("{train} --config cifar10 --epochs {epochs} --out $OUT/default")),
        (
            "default, bf16",
            format!(
                "{train} --config cifar10 --epochs {epochs} --precision bf16 --out $OUT/default-bf16"
            ),
        ),
        (
            "with a likelihood",
            format!(
                "{train} --config cifar10-likelihood --epochs {likelihood} --out $OUT/likelihood"
            ),
        ),
        ("its codes", format!("{encode} --model $OUT/likelihood --out $OUT/codes")),
        (
            "their prior",
            format!(
                "train-prior --device {device} --overwrite --model $OUT/likelihood --codes $OUT/codes --epochs {} \
                 --out $OUT/prior",
                options.prior_epochs
            ),
        ),
        (
            "bits per dimension",
            format!("eval --data $DATA --device {device} --bits-per-dim {prior}"),
        ),
    ]
}

/// Runs all of them, one after the other; what fails is noted.
pub(super) fn run(options: &Options, data: &str, report: &mut Report) {
    let folder = options.out.clone().unwrap_or_else(|| PathBuf::from("gpu-check"));
    let program = program(options);
    for (name, command) in commands(options) {
        let start = Instant::now();
        let said = run_one(&program, (&folder, data), name, &command);
        report.run(Run { name, seconds: start.elapsed().as_secs_f64(), said });
    }
    say(&format!("\nPictures, curves and logs: {}", folder.display()));
}

/// `vq`: the one that was named, or the one beside this program.
fn program(options: &Options) -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("vq"));
    options.vq.clone().or_else(beside).unwrap_or_else(|| PathBuf::from("vq"))
}

/// What it said at last: of a run that learned its final figures, of an evaluation all.
fn run_one(
    program: &Path,
    (folder, data): (&Path, &str),
    name: &str,
    command: &str,
) -> Result<String, String> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let words = command.split(' ').map(|word| match word.strip_prefix("$OUT/") {
        Some(part) => folder.join(part).into_os_string(),
        None if word == "$DATA" => data.into(),
        None => word.into(),
    });
    let output = Command::new(program)
        .args(words)
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let (said, warned) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let log = folder.join(format!("{}.log", name.replace([' ', ','], "-")));
    std::fs::write(&log, format!("vq {command}\n{said}\n{warned}"))
        .map_err(|error| format!("{}: {error}", log.display()))?;
    let last = |text: &str| {
        text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing was said").to_owned()
    };
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, last(&warned)));
    }
    Ok(if command.starts_with("eval ") { said.trim_end().to_owned() } else { last(&said) })
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_run_and_its_last_words_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().join("two words");
        let of = |program: &str, name: &str, command: &str| {
            run_one(Path::new(program), (&here, "cifar10:my data"), name, command)
        };
        let said = of("echo", "a, b", "train --data $DATA --out $OUT/run").unwrap();
        let run = here.join("run");
        assert_eq!(said, format!("train --data cifar10:my data --out {}", run.display()));
        assert!(here.join("a--b.log").exists());
        let failed = of("false", "c", "train").unwrap_err();
        assert!(failed.contains("exit status: 1"), "{failed}");
        assert!(of("/nowhere", "d", "train").is_err());
    }
}

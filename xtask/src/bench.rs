//! `cargo xtask bench`: our code, naive candle and PyTorch on the same work, in turn.
//!
//! Every contender is a process of its own that prepares itself, warms up, and then works for one
//! measured piece whenever it is told to. The pieces alternate between the contenders of a group, so
//! that a machine whose speed drifts slows all of them alike; ratios are taken within a round.

#[cfg(feature = "bench")]
mod naive;
#[cfg(feature = "bench")]
mod prior;
#[cfg(feature = "bench")]
mod profile;
mod python;
mod table;
#[cfg(feature = "bench")]
pub mod worker;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use clap::Args;

/// What `cargo xtask bench` takes.
#[derive(Args, Debug)]
pub struct Options {
    /// Also measure PyTorch, in a virtual environment that is made where it is missing (about 5 GB)
    #[arg(long)]
    pytorch: bool,
    /// The virtual environment
    #[arg(long, value_name = "DIR", default_value = "target/bench-venv")]
    venv: PathBuf,
    /// Rounds in which every contender works once
    #[arg(long, value_name = "N", default_value_t = 7)]
    rounds: usize,
    /// Groups to measure: train, train-bf16, forward, forward-bf16, search, prior, profile
    #[arg(long, value_delimiter = ',', default_values_t = ["train", "train-bf16", "forward", "forward-bf16", "search", "prior", PROFILE].map(String::from))]
    groups: Vec<String>,
    /// Write the tables there too, as Markdown
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command could not be started or failed.
    #[error("{command}: {problem}")]
    Command {
        /// What was run.
        command: String,
        /// What became of it.
        problem: String,
    },
    /// The tables could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A group of that name does not exist.
    #[error(
        "there is no group {0:?}; the groups are train, train-bf16, forward, forward-bf16, search, prior, \
         profile"
    )]
    Group(String),
}

/// Measures and returns the tables.
pub fn run(options: &Options) -> Result<String, Error> {
    let groups = options
        .groups
        .iter()
        .filter(|name| *name != PROFILE)
        .map(|name| Group::named(name))
        .collect::<Result<Vec<_>, _>>()?;
    let worker = build_worker()?;
    let python = if options.pytorch { Some(python::prepare(&options.venv)?) } else { None };
    let mut report = machine();
    if let Some(python) = &python {
        let _ = writeln!(
            report,
            "PyTorch {}, of {}.",
            python::version(python)?,
            options.venv.display()
        );
    }
    for group in groups {
        for work in group.works {
            let table = measure(&group, work, &worker, python.as_deref(), options.rounds)?;
            say(&table);
            report.push_str(&table);
        }
    }
    if options.groups.iter().any(|name| name == PROFILE) {
        let table = profile(&worker)?;
        say(&table);
        report.push_str(&table);
    }
    if let Some(path) = &options.out {
        std::fs::write(path, &report)
            .map_err(|source| Error::Write { path: path.clone(), source })?;
    }
    Ok(report)
}

/// The measured programs on PyTorch's side.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/pytorch.py");

/// The group whose table is of operations, not of contenders.
const PROFILE: &str = "profile";

/// A step's operations one by one.
fn profile(worker: &Path) -> Result<String, Error> {
    let output = Command::new(worker).args(["bench-worker", "profile", "all"]).output();
    match output {
        Ok(output) if output.status.success() => Ok(format!(
            "\n### Where a training step's time goes\n\n{}",
            String::from_utf8_lossy(&output.stdout)
        )),
        Ok(output) => Err(Error::Command {
            command: "profile".to_owned(),
            problem: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
        Err(error) => {
            Err(Error::Command { command: "profile".to_owned(), problem: error.to_string() })
        }
    }
}

/// Contenders that do the same work.
struct Group {
    /// Heading of its tables.
    title: &'static str,
    /// What is counted per second.
    unit: &'static str,
    works: &'static [&'static str],
    ours: &'static [&'static str],
    pytorch: &'static [&'static str],
    /// Floating-point operations per unit of a work, where they are known.
    flops: fn(&str) -> f64,
}

/// A training step of the standard model, per image: 45.6 M multiply-adds forward, again for the
/// inputs' gradients (but the first layer's) and again for the weights'.
const TRAIN_FLOPS: f64 = 265e6;
/// A forward pass of the standard model, per image.
const FORWARD_FLOPS: f64 = 91.2e6;

/// A training step of the default PixelCNN on 8×8 codes out of 512, per image: 4.08 M weights at 64 positions,
/// thrice.
const PIXELCNN_FLOPS: f64 = 3. * 2. * 64. * 4.08e6;
/// A training step of the default Transformer there: 4.13 M weights, and attention over 64 positions in 6 layers.
const TRANSFORMER_FLOPS: f64 = 3. * 2. * 64. * (4.13e6 + 6. * 2. * 64. * 256.);

impl Group {
    fn named(name: &str) -> Result<Self, Error> {
        let compiled = &["eager", "eager-cl", "compiled", "compiled-cl"];
        Ok(match name {
            "train" => Self {
                title: "Training, f32",
                unit: "images",
                works: &["train"],
                ours: &["ours", "candle"],
                pytorch: compiled,
                flops: |_| TRAIN_FLOPS,
            },
            "train-bf16" => Self {
                title: "Training, bf16",
                unit: "images",
                works: &["train"],
                ours: &["ours-bf16"],
                pytorch: &["eager-bf16", "eager-cl-bf16", "compiled-bf16", "compiled-cl-bf16"],
                flops: |_| TRAIN_FLOPS,
            },
            "forward" => Self {
                title: "Encoding and reconstructing, f32",
                unit: "images",
                works: &["forward"],
                ours: &["ours", "candle"],
                pytorch: compiled,
                flops: |_| FORWARD_FLOPS,
            },
            "forward-bf16" => Self {
                title: "Encoding and reconstructing, bf16",
                unit: "images",
                works: &["forward"],
                ours: &["ours-bf16"],
                pytorch: &["eager-cl-bf16", "compiled-bf16", "compiled-cl-bf16"],
                flops: |_| FORWARD_FLOPS,
            },
            "search" => Self {
                title: "Nearest codes",
                unit: "vectors",
                works: &["search-512", "search-8192", "search-65536"],
                ours: &["ours"],
                pytorch: &["matmul", "chunked", "compiled"],
                flops: |work| {
                    let codes = work.rsplit('-').next().and_then(|k| k.parse().ok());
                    2. * 64. * codes.unwrap_or(0.)
                },
            },
            "prior" => Self {
                title: "Training of priors, f32",
                unit: "images",
                works: &["pixelcnn", "transformer"],
                ours: &["ours"],
                pytorch: compiled,
                flops: |work| if work == "pixelcnn" { PIXELCNN_FLOPS } else { TRANSFORMER_FLOPS },
            },
            other => return Err(Error::Group(other.to_owned())),
        })
    }
}

/// A contender that waits for its next piece of work.
struct Contender {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    rates: Vec<f64>,
    peak_mib: f64,
    /// How much more memory a search took than vectors and codebook, where that was asked for.
    working_mib: Option<f64>,
}

impl Contender {
    fn start(name: String, command: &mut Command) -> Result<Self, Error> {
        let problem = |problem: String| Error::Command { command: name.clone(), problem };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| problem(e.to_string()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(problem("has no standard input and output".to_owned()));
        };
        let output = BufReader::new(output);
        let mut contender =
            Self { name, child, input, output, rates: Vec::new(), peak_mib: 0., working_mib: None };
        contender.line()?;
        say(&format!("{} is ready", contender.name));
        Ok(contender)
    }

    fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        match read {
            Ok(count) if count > 0 => Ok(line),
            _ => Err(Error::Command {
                command: self.name.clone(),
                problem: "ended before it was measured; its message is above".to_owned(),
            }),
        }
    }

    /// One piece: the contender answers with units done, seconds, its peak memory in MiB and, perhaps, its
    /// working memory.
    fn work(&mut self) -> Result<(), Error> {
        let told = writeln!(self.input, "go").and_then(|()| self.input.flush());
        let line = self.line()?;
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        match (told, numbers.as_slice()) {
            (Ok(()), &[units, seconds, peak, ref more @ ..]) if seconds > 0. && more.len() < 2 => {
                self.rates.push(units / seconds);
                self.peak_mib = peak;
                self.working_mib = more.first().copied();
                Ok(())
            }
            _ => Err(Error::Command {
                command: self.name.clone(),
                problem: format!("answered {line:?}"),
            }),
        }
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(
    group: &Group,
    work: &str,
    worker: &Path,
    python: Option<&Path>,
    rounds: usize,
) -> Result<String, Error> {
    let mut contenders = vec![Contender::start(
        "gemm".to_owned(),
        Command::new(worker).args(["bench-worker", "gemm", "peak"]),
    )?];
    for name in group.ours {
        let mut command = Command::new(worker);
        command.args(["bench-worker", work, name]);
        contenders.push(Contender::start((*name).to_owned(), &mut command)?);
    }
    if let Some(python) = python {
        for name in group.pytorch {
            let mut command = Command::new(python);
            command.args([SCRIPT, work, name]);
            contenders.push(Contender::start(format!("PyTorch {name}"), &mut command)?);
        }
    }
    for round in 1..=rounds {
        for contender in &mut contenders {
            contender.work()?;
        }
        say(&format!("{work}: round {round} of {rounds}"));
    }
    Ok(table::of(group, work, &contenders))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// How far it is; the report itself goes to standard output.
fn say(line: &str) {
    // Nobody listens, perhaps.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A line about this machine.
fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let flags = field("flags").unwrap_or_default();
    let wanted = ["avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16"];
    let has: Vec<&str> = wanted.into_iter().filter(|w| flags.split(' ').any(|f| f == *w)).collect();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "Machine: {}, {cores} cores, with {}.\n",
        field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        if has.is_empty() { format!("none of {}", wanted.join(", ")) } else { has.join(", ") },
    )
}

/// Builds this package with the feature `bench` and returns the program.
fn build_worker() -> Result<PathBuf, Error> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--package", "xtask", "--features", "bench"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stderr(Stdio::inherit());
    let problem = |problem: String| Error::Command { command: "cargo build".to_owned(), problem };
    let output = command.output().map_err(|error| problem(error.to_string()))?;
    if !output.status.success() {
        return Err(problem(format!("failed ({}); its message is above", output.status)));
    }
    // Where it went depends on the environment and on cargo's configuration.
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .next_back()
        .ok_or_else(|| problem("named no program that it built".to_owned()))
}

fn succeed(name: &str, command: &mut Command) -> Result<(), Error> {
    let problem = |problem: String| Error::Command { command: name.to_owned(), problem };
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(problem(format!("failed ({status}); its message is above"))),
        Err(error) => Err(problem(error.to_string())),
    }
}

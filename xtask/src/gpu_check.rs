//! `cargo xtask gpu-check`: does a device compute what the CPU computes, and how fast does it train?
//!
//! What does the work is compiled in with the feature `bench` (and `cuda` or `metal`): one binary that needs
//! no other file, `target/release/xtask`, to be copied to the machine with the device. Without the feature,
//! the task builds it and starts it.

#[cfg(feature = "bench")]
mod checks;
#[cfg(feature = "bench")]
mod operations;
#[cfg(feature = "bench")]
mod prior;
#[cfg(feature = "bench")]
mod pytorch;
#[cfg(feature = "bench")]
mod report;
#[cfg(feature = "bench")]
mod runs;
#[cfg(feature = "bench")]
mod speed;
#[cfg(feature = "bench")]
mod training;

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// What `cargo xtask gpu-check` takes.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// cuda, cuda:N, metal or cpu; the CPU checks the program, not the device
    #[arg(long, default_value = "cuda", value_name = "DEVICE")]
    device: String,
    /// Leave out the checks, the speed, PyTorch, or the whole runs
    #[arg(long, value_delimiter = ',', value_enum)]
    skip: Vec<Stage>,
    /// Models whose training is timed
    #[arg(long, value_delimiter = ',', default_values_t = ["standard", "imagenet256"].map(String::from))]
    models: Vec<String>,
    /// Formats of the products: f32 (in full), tf32, bf16
    #[arg(long, value_delimiter = ',', default_values_t = ["f32", "tf32", "bf16"].map(String::from))]
    formats: Vec<String>,
    /// Images a step
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512, 1024, 4096])]
    batches: Vec<usize>,
    /// Seconds that each model is timed for
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// A Python with PyTorch, to compare with
    #[arg(long, default_value = "python3", value_name = "PROGRAM")]
    python: String,
    /// CIFAR-10, as cifar10:DIR, for whole runs on real images: the default recipe in both formats, and a model
    /// with a likelihood with its prior and its bits per dimension. Without it there are none
    #[arg(long, value_name = "SOURCE")]
    data: Option<String>,
    /// The `vq` that does the whole runs [default: the one beside this program]
    #[arg(long, value_name = "PROGRAM")]
    vq: Option<PathBuf>,
    /// Epochs of the default recipe
    #[arg(long, default_value_t = 50)]
    epochs: usize,
    /// Epochs of the model with a likelihood
    #[arg(long, default_value_t = 50)]
    likelihood_epochs: usize,
    /// Epochs of its prior
    #[arg(long, default_value_t = 3)]
    prior_epochs: usize,
    /// Write the report as JSON into this folder, and the whole runs, which otherwise go to gpu-check
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    Checks,
    Speed,
    Pytorch,
    Runs,
}

/// Why the device is not known to be good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be built or started.
    #[error("cannot run {command}: {problem}")]
    Command {
        /// What was run.
        command: String,
        /// What became of it.
        problem: String,
    },
    /// There is no such device.
    #[error("there is no device to check: {0}")]
    Device(String),
    /// Something was wrong or did not run.
    #[error("{0}; each is named above with FAILED")]
    Failed(String),
    /// The report could not be written.
    #[error("cannot write {}: {problem}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// Checks and measures; the report is printed as it grows.
#[cfg(feature = "bench")]
pub fn run(options: &Options) -> Result<String, Error> {
    use report::{Report, say};

    let device = open(&options.device)?;
    let does = |stage| !options.skip.contains(&stage);
    let mut report = Report::new(describe(&device, &options.device));
    say(&report.title());
    if does(Stage::Checks) {
        say("\n## Checks: the device beside the CPU\n\n\
             The largest difference of a result or a gradient, relative to that tensor's largest value, and\n\
             in brackets what rounding in that format may make of it.\n");
        operations::check(&device, &mut report);
        training::check(&device, &mut report);
    }
    if does(Stage::Speed) {
        say("\n## Training: the whole loop, with making the batches\n\n\
             program                  model        format batch      images/s");
        speed::measure(&device, options, &mut report);
    }
    if does(Stage::Pytorch) {
        say("\n## PyTorch: the step alone, on images that lie on the device\n\n\
             program                  model        format batch      images/s");
        pytorch::measure(options, &mut report);
        if does(Stage::Speed) {
            say(&report.ratios());
        }
    }
    if let Some(data) = options.data.as_deref().filter(|_| does(Stage::Runs)) {
        say("\n## Whole runs\n\nname                      seconds  what vq said at last");
        runs::run(options, data, &mut report);
    }
    say("");
    if let Some(folder) = &options.out {
        report.write(folder)?;
    }
    report.verdict().map_err(Error::Failed)
}

/// What was checked, for whoever reads the report later.
#[cfg(feature = "bench")]
fn describe(device: &candle_core::Device, name: &str) -> String {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = device
        && let Ok(model) = device.cuda_stream().context().name()
    {
        return format!("{name}, {model}");
    }
    if device.is_cpu() { format!("{name}, {} threads", threads()) } else { name.to_owned() }
}

#[cfg(feature = "bench")]
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

#[cfg(feature = "bench")]
fn open(name: &str) -> Result<candle_core::Device, Error> {
    use candle_core::Device;

    let opened = match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("metal", _) => vq_ops::open_metal(),
        ("cuda", number) => match number.parse() {
            Ok(number) => vq_ops::open_cuda(number),
            Err(_) => return Err(Error::Device(format!("{name} is none of cuda, cuda:N"))),
        },
        _ => return Err(Error::Device(format!("{name} is none of cuda, cuda:N, metal, cpu"))),
    };
    opened.map_err(|error| Error::Device(error.to_string()))
}

/// Builds this program with what does the work, and starts it.
#[cfg(not(feature = "bench"))]
pub fn run(options: &Options) -> Result<String, Error> {
    use std::process::Command;

    let feature = match options.device.split(':').next() {
        Some("cuda") => "bench,cuda",
        Some("metal") => "bench,metal",
        _ => "bench",
    };
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new(&cargo);
        command.args(arguments);
        command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        command
    };
    let run = |command: &mut Command, name: &str| {
        let problem = |problem: String| Error::Command { command: name.to_owned(), problem };
        match command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(problem(format!("{status}; its message is above"))),
            Err(error) => Err(problem(error.to_string())),
        }
    };
    if options.data.is_some() && options.vq.is_none() {
        let mut build = cargo(&["build", "--release", "--quiet", "--package", "vq-cli"]);
        if let Some(feature) = feature.strip_prefix("bench,") {
            build.args(["--features", feature]);
        }
        run(&mut build, "cargo build")?;
    }
    let start = ["run", "--release", "--quiet", "--package", "xtask", "--features", feature, "--"];
    run(cargo(&start).args(std::env::args_os().skip(1)), "cargo run").map(|()| String::new())
}

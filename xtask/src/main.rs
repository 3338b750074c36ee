//! `cargo xtask TASK`: tasks around the project.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{bench, ci, download_cifar, gpu_check};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tasks around the project")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring CIFAR-10 into a folder: download, check and unpack the official archive
    DownloadCifar(download_cifar::Options),
    /// Run what CI runs: formatting, lints, documentation, tests
    Ci,
    /// Measure our code, naive candle and PyTorch on the same work, in turn
    Bench(bench::Options),
    /// Check a GPU against the CPU, measure training on it, and compare with PyTorch
    GpuCheck(gpu_check::Options),
    /// One measured program of `bench`
    #[cfg(feature = "bench")]
    #[command(hide = true)]
    BenchWorker {
        /// What to do.
        work: String,
        /// How to do it.
        way: String,
    },
}

fn main() -> ExitCode {
    let (text, code) = match run(Arguments::parse().task) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("error: {}", one_line(&*error)), ExitCode::FAILURE),
    };
    // A closed pipe is no reason to fail.
    let _ = if code == ExitCode::SUCCESS {
        writeln!(std::io::stdout(), "{text}")
    } else {
        writeln!(std::io::stderr(), "{text}")
    };
    code
}

fn run(task: Task) -> Result<String, Box<dyn Error + Send + Sync>> {
    Ok(match task {
        Task::DownloadCifar(options) => download_cifar::run(&options)?.to_string(),
        Task::Ci => ci::run()?,
        Task::Bench(options) => bench::run(&options)?,
        Task::GpuCheck(options) => {
            #[cfg(feature = "bench")]
            set_up(true);
            gpu_check::run(&options)?
        }
        #[cfg(feature = "bench")]
        Task::BenchWorker { work, way } => {
            // The naive program is as candle's users would have it.
            set_up(way != "candle");
            bench::worker::run(&work, &way)?;
            String::new()
        }
    })
}

/// As the `vq` binary does before anything else.
#[cfg(feature = "bench")]
fn set_up(is_ours: bool) {
    vq_ops::process::keep_memory();
    if is_ours {
        // SAFETY: there are no other threads yet.
        #[allow(unsafe_code)]
        unsafe {
            vq_ops::process::keep_candle_on_one_thread();
        }
    }
}

/// An error's message on one line; the messages carry their causes.
fn one_line(error: &dyn Error) -> String {
    error.to_string().replace('\n', " ")
}

/// The allocator of the `vq` binary, so that what is measured is what users run.
#[cfg(feature = "bench")]
#[global_allocator]
static ALLOCATOR: vq_ops::process::Allocator = vq_ops::process::Allocator;

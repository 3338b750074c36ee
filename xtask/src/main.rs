//! `cargo xtask TASK`: tasks around the project.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::download_cifar;

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
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::DownloadCifar(options) => download_cifar::run(&options).map(|done| done.to_string()),
    };
    let (text, code) = match result {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("error: {}", one_line(&error)), ExitCode::FAILURE),
    };
    // A closed pipe is no reason to fail.
    let _ = if code == ExitCode::SUCCESS {
        writeln!(std::io::stdout(), "{text}")
    } else {
        writeln!(std::io::stderr(), "{text}")
    };
    code
}

/// An error's message on one line; the messages carry their causes.
fn one_line(error: &dyn Error) -> String {
    error.to_string().replace('\n', " ")
}

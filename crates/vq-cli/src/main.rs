//! The `vq` command: trains, judges and uses VQ-VAE image tokenizers.

mod cli;
mod codes_file;
mod commands;
mod compute;
mod data_args;
mod error;
mod file;
mod images;
mod npy;
mod observers;
mod output;
mod progress;
mod recipes;
mod run_args;
mod stop;
mod training;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;

#[global_allocator]
static ALLOCATOR: vq_ops::process::Allocator = vq_ops::process::Allocator;

/// Exit codes: 0 done; 1 an error, said in one line on stderr; 2 wrong usage (clap's); 130 and 143
/// a training run that Ctrl-C or SIGTERM stopped, saved and ready for `--resume`.
fn main() -> ExitCode {
    vq_ops::process::keep_memory();
    // SAFETY: there are no other threads yet.
    #[allow(unsafe_code)]
    unsafe {
        vq_ops::process::keep_candle_on_one_thread();
    }
    let cli = Cli::parse();
    output::start_log(cli.log_format);
    match commands::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

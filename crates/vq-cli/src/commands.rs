//! One file per command.

pub(crate) mod compare;
pub(crate) mod compress;
pub(crate) mod configs;
pub(crate) mod data;
pub(crate) mod decode;
pub(crate) mod decompress;
pub(crate) mod encode;
pub(crate) mod encode_dataset;
pub(crate) mod eval;
mod eval_prior;
pub(crate) mod inspect;
mod inspect_prior;
mod priors;
pub(crate) mod reconstruct;
pub(crate) mod sample;
mod sample_folder;
mod sample_keep;
pub(crate) mod train;
pub(crate) mod train_prior;

use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::error::Result;

pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    let format = cli.log_format;
    match &cli.command {
        Command::Train(args) => return train::run(args, format),
        Command::Compare(args) => return compare::run(args, format),
        Command::TrainPrior(args) => return train_prior::run(args, format),
        Command::Eval(args) => eval::run(args, format)?,
        Command::Reconstruct(args) => reconstruct::run(args, format)?,
        Command::Encode(args) => encode::run(args, format)?,
        Command::Decode(args) => decode::run(args, format)?,
        Command::Compress(args) => compress::run(args, format)?,
        Command::Decompress(args) => decompress::run(args, format)?,
        Command::Sample(args) => sample::run(args, format)?,
        Command::Inspect(args) => inspect::run(args, format)?,
        Command::Configs(args) => configs::run(args)?,
        Command::Data(args) => data::run(args, format)?,
    }
    Ok(ExitCode::SUCCESS)
}

//! The command line as a whole; each command's flags stand beside its code.

use clap::{Parser, Subcommand, ValueEnum};

use crate::commands::{
    compare, compress, configs, data, decode, decompress, encode, eval, inspect, reconstruct,
    sample, train, train_prior,
};

/// Trains, judges and uses VQ-VAE image tokenizers.
#[derive(Debug, Parser)]
#[command(name = "vq", version, propagate_version = true, args_override_self = true)]
#[command(max_term_width = 100)]
pub(crate) struct Cli {
    /// How to report: text for people, json (one object per line on stdout) for programs.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// See [`Cli::log_format`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Train(train::TrainArgs),
    Compare(compare::CompareArgs),
    Eval(eval::EvalArgs),
    Reconstruct(reconstruct::ReconstructArgs),
    Encode(encode::EncodeArgs),
    Decode(decode::DecodeArgs),
    TrainPrior(train_prior::TrainPriorArgs),
    Sample(sample::SampleArgs),
    Compress(compress::CompressArgs),
    Decompress(decompress::DecompressArgs),
    Inspect(inspect::InspectArgs),
    Configs(configs::ConfigsArgs),
    Data(data::DataCommands),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}

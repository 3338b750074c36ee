//! `vq configs`

use clap::Args;

use crate::error::Result;
use crate::{output, recipes};

/// List the embedded recipes, or print one as a start for your own.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  vq configs cifar10 > mine.toml && vq train --config mine.toml")]
pub(crate) struct ConfigsArgs {
    /// The recipe to print.
    name: Option<String>,
}

pub(crate) fn run(args: &ConfigsArgs) -> Result<()> {
    if let Some(name) = &args.name {
        return output::line(recipes::embedded(name)?.text.trim_end());
    }
    let width = recipes::all().map(|recipe| recipe.name.len()).max().unwrap_or(0) + 2;
    recipes::all()
        .try_for_each(|recipe| output::line(format!("{:width$}{}", recipe.name, recipe.summary())))
}

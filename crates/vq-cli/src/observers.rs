//! What looks at training: the report on the terminal and the pictures in the run folder.

mod pace;
mod pictures;
mod report;

pub(crate) use pictures::{Pictures, save_samples, save_usage};
pub(crate) use report::Reporter;

//! What looks at training: the report on the terminal and the pictures in the run folder.

mod pace;
mod pictures;
mod prior_pictures;
mod report;

pub(crate) use pictures::{GRID_COLUMNS, GRID_PADDING, Pictures, save_samples, save_usage};
pub(crate) use prior_pictures::PriorPictures;
pub(crate) use report::{Reporter, Subject};

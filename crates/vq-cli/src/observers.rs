//! What looks at training: the report on the terminal and the pictures in the run folder.

mod pace;
mod pictures;
mod prior_pictures;
mod report;

pub(crate) use pictures::{GRID_COLUMNS, GRID_PADDING, Pictures, save_samples, save_usage};
pub(crate) use prior_pictures::PriorPictures;
pub(crate) use report::{Reporter, Subject};

/// More classes than that do not get a column each.
const MOST_COLUMNS: usize = 16;

/// Columns of a grid of images whose classes come in turn: one for each class, where there are some and not too
/// many.
pub(crate) fn class_columns(classes: usize) -> usize {
    if (2..=MOST_COLUMNS).contains(&classes) { classes } else { GRID_COLUMNS }
}

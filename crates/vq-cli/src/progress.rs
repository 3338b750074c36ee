//! A progress bar for what is done before or instead of training.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::LogFormat;

/// Shown on a terminal and for text only; gone once it is dropped.
pub(crate) struct Progress(Option<ProgressBar>);

impl Progress {
    pub(crate) fn start(format: LogFormat, what: &'static str) -> Self {
        let is_shown = format == LogFormat::Text && io::stderr().is_terminal();
        Self(is_shown.then(|| {
            // The template is a constant; the plain bar would do if it were wrong.
            let style =
                ProgressStyle::with_template("{prefix} [{wide_bar}] {pos}/{len}  {eta} left")
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> ");
            ProgressBar::no_length().with_style(style).with_prefix(what)
        }))
    }

    /// So many are done, of so many in all where that is known.
    pub(crate) fn tell(&self, done: usize, total: Option<usize>) {
        let Some(bar) = &self.0 else { return };
        if let Some(total) = total {
            bar.set_length(total as u64);
        }
        bar.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

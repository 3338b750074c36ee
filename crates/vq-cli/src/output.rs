//! All that the program says, except for the progress bar.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::cli::LogFormat;
use crate::error::{Error, Result};

/// The log of what happens inside goes to stderr; `RUST_LOG` chooses how much of it.
pub(crate) fn start_log(format: LogFormat) {
    let filter =
        EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // Fails only if there is a log already.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}

/// A line on stdout. Whoever closes the pipe has read enough.
pub(crate) fn line(text: impl Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Stdout(error)),
        _ => Ok(()),
    }
}

/// A result, in the format that was asked for.
pub(crate) fn result(format: LogFormat, text: impl Display, record: &Value) -> Result<()> {
    match format {
        LogFormat::Text => line(text),
        LogFormat::Json => line(record),
    }
}

/// A path as records have it: JSON has no room for bytes that are not UTF-8, so that some stands for them.
pub(crate) fn path(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

/// Something that the user should know: on stderr, or as a record among the others.
pub(crate) fn note(format: LogFormat, message: &str) -> Result<()> {
    match format {
        LogFormat::Text => {
            aside("note", message);
            Ok(())
        }
        LogFormat::Json => line(json!({ "event": "note", "message": message })),
    }
}

/// The error that ends the program.
pub(crate) fn error(error: &Error) {
    aside("error", &error.one_line());
}

/// A line on stderr, which there is no way to complain about.
pub(crate) fn aside(kind: &str, message: &str) {
    let _ = writeln!(io::stderr().lock(), "{kind}: {message}");
}

/// Bits, to a tenth.
pub(crate) fn bits(bits: f64) -> f64 {
    (bits * 10.0).round() / 10.0
}

/// `1234567` as `1.23 M`.
pub(crate) fn count(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{:.2} G", n / 1e9),
        _ if n >= 1e6 => format!("{:.2} M", n / 1e6),
        _ if n >= 1e4 => format!("{:.1} k", n / 1e3),
        _ => format!("{n}"),
    }
}

/// Bytes as `1.2 GB` or `34 MB`.
pub(crate) fn bytes(n: u64) -> String {
    let n = n as f64;
    if n >= 1e9 { format!("{:.1} GB", n / 1e9) } else { format!("{:.0} MB", n / 1e6) }
}

/// Seconds as `1h02m`, `3m05s` or `12s`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest:02}s"),
        _ => format!("{hours}h{minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([0, 9999, 12_345, 45_600_000].map(count), ["0", "9999", "12.3 k", "45.60 M"]);
        assert_eq!([34_400_000, 12_340_000_000].map(bytes), ["34 MB", "12.3 GB"]);
        assert_eq!([0.4, 65.0, 3725.0].map(duration), ["0s", "1m05s", "1h02m"]);
    }
}

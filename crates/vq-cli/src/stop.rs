//! Ctrl-C and SIGTERM.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::error::{Error, Result};

/// Signals that come within this time are one request: `timeout` and job schedulers send theirs to a program and
/// to its process group at once.
const SAME_REQUEST: Duration = Duration::from_millis(500);

/// Raised by the first Ctrl-C or SIGTERM; another one, later, ends the program on the spot, which what is on
/// disk survives.
pub(crate) struct Stop {
    pub(crate) flag: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Stop {
    pub(crate) fn listen() -> Result<Self> {
        let stop = Self { flag: Arc::default(), signal: Arc::default() };
        stop.register()
            .map_err(|error| Error::other(format!("cannot listen for signals: {error}")))?;
        Ok(stop)
    }

    fn register(&self) -> io::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let (flag, first_signal) = (self.flag.clone(), self.signal.clone());
        let watch = move || {
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                match first {
                    None => {
                        first = Some(Instant::now());
                        first_signal.store(signal as usize, Ordering::Relaxed);
                        flag.store(true, Ordering::Relaxed);
                    }
                    Some(first) if first.elapsed() < SAME_REQUEST => {}
                    Some(_) => low_level::exit(128 + signal),
                }
            }
        };
        std::thread::Builder::new().name("vq-signals".to_owned()).spawn(watch)?;
        Ok(())
    }

    /// What shells report for a program that the signal ended: 130 or 143.
    pub(crate) fn exit_code(&self) -> u8 {
        128 + self.signal.load(Ordering::Relaxed) as u8
    }
}

//! Ctrl-C and SIGTERM.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Raised by the first Ctrl-C or SIGTERM; a second one ends the program on the spot, which what is on
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
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag still down.
            flag::register_conditional_shutdown(signal, 128 + signal, self.flag.clone())?;
            flag::register_usize(signal, self.signal.clone(), signal as usize)?;
            flag::register(signal, self.flag.clone())?;
        }
        Ok(())
    }

    /// What shells report for a program that the signal ended: 130 or 143.
    pub(crate) fn exit_code(&self) -> u8 {
        128 + self.signal.load(Ordering::Relaxed) as u8
    }
}

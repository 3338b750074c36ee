//! Which model it is.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// SHA-256, in hexadecimal, of a saved model: of its `model.safetensors` and then its `config.json`. Codes
/// and priors carry it, since another model reads other things into the same codes.
pub fn model_hash(folder: impl AsRef<Path>) -> Result<String> {
    let mut hasher = Hasher(Sha256::new());
    for name in [vq_model::MODEL_FILE, vq_model::CONFIG_FILE] {
        let path = folder.as_ref().join(name);
        let mut file = File::open(&path).map_err(Error::read(&path))?;
        io::copy(&mut file, &mut hasher).map_err(Error::read(&path))?;
    }
    let mut text = String::new();
    for byte in hasher.0.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

struct Hasher(Sha256);

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

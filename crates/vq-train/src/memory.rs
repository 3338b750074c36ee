//! How much memory training will take, before it is taken.

use std::collections::BTreeMap;
use std::fs;

use candle_core::Var;

use crate::Tokenizer;

/// About what training holds at its peak, in bytes, on the CPU.
///
/// Reckoned from shapes, with a fifth on top of the activations for the convolutions' scratch. Compared by
/// hand with the peak of the process (two levels, 128×128, batches of 32): 2.5 GB against 2.8 GB measured,
/// in 4 parts 0.8 GB against 1.0 GB. The process itself, some 100 MB, is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Parameters, their gradients, the optimizer's two moments and, where it is on, their average; and what is
    /// kept beside them, such as codebooks that follow an average, with what an update of it takes.
    pub parameters: u64,
    /// What is kept of a batch (with `train.accumulate`, of a part of one) for its backward pass, and the
    /// vectors of the whole batch that the codebooks are updated with.
    pub activations: u64,
    /// Batches that are prepared ahead.
    pub batches: u64,
    /// Images that are held in memory, of both splits.
    pub data: u64,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.parameters + self.activations + self.batches + self.data
    }
}

impl Tokenizer {
    /// About what training this will take.
    pub fn memory(&self) -> crate::Result<MemoryEstimate> {
        const VALUE: u64 = 4;
        // Of what is kept beside the parameters: itself, its next state, the sums of a step, and the codebook as the
        // search takes it.
        const BESIDE: u64 = 4;
        let config = self.config();
        let count = |vars: &BTreeMap<String, Var>| -> u64 {
            vars.values().map(|var| var.elem_count() as u64).sum()
        };
        let copies = if config.weight_ema > 0.0 { 5 } else { 4 };
        let parameters =
            count(self.model().parameters()) * copies + count(self.model().buffers()) * BESIDE;
        let part = config.batch_size.div_ceil(config.accumulate.max(1));
        let [train, test] = self.datasets();
        let [height, width] = self.model().config().image_size;
        let grids = self.model().config().grids(height, width)?;
        let levels = self.model().config().levels.iter().zip(grids);
        let vectors: usize = levels.map(|(level, [h, w])| h * w * level.quantizer.dim).sum();
        let image = train.shape().pixels() as u64;
        Ok(MemoryEstimate {
            parameters: parameters * VALUE,
            // z_e of every part, all of them joined, and a copy that the update works on.
            activations: self.model().activations()? * part as u64 * VALUE * 6 / 5
                + (3 * config.batch_size * vectors) as u64 * VALUE,
            // Those in the queue, the one that is trained on, and the one that is being made.
            batches: (config.prefetch as u64 + 2) * config.batch_size as u64 * image * VALUE,
            data: (train.held_bytes() + test.held_bytes()) as u64,
        })
    }
}

/// Bytes that this machine still has for new work, where it says so (on Linux).
pub fn available_memory() -> Option<u64> {
    parse(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figure_is_read() {
        let text = "MemTotal:  24 kB\nMemAvailable:   12 kB\n";
        assert_eq!(parse(text), Some(12 * 1024));
        assert_eq!(parse("MemTotal: 24 kB"), None);
    }
}

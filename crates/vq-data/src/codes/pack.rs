//! The record of an image: its label as a u32 (little-endian), then its codes, each in as few bits as its
//! codebook needs, lowest bits first, up to a whole byte.

use super::CodesManifest;

/// Which bits of a record are what.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    levels: Vec<Level>,
    record_bytes: usize,
}

#[derive(Clone, Debug)]
struct Level {
    codes: usize,
    /// K and bits of every code of a position.
    sizes: Vec<(u64, u32)>,
}

const LABEL_BYTES: usize = 4;

impl Layout {
    pub(super) fn new(manifest: &CodesManifest) -> Self {
        let levels = manifest.levels.iter().map(|level| Level {
            codes: level.codes_per_image(),
            sizes: level.codebook_sizes.iter().map(|&size| (size as u64, bits(size))).collect(),
        });
        let levels: Vec<Level> = levels.collect();
        let of_level = |level: &Level| {
            let position: usize = level.sizes.iter().map(|(_, bits)| *bits as usize).sum();
            level.codes / level.sizes.len().max(1) * position
        };
        let bits: usize = levels.iter().map(of_level).sum();
        Self { levels, record_bytes: LABEL_BYTES + bits.div_ceil(8) }
    }

    /// Bytes of every image's record.
    pub(super) fn record_bytes(&self) -> usize {
        self.record_bytes
    }

    /// Appends a record. The error says which codes do not fit.
    pub(super) fn pack(
        &self,
        label: u32,
        levels: &[&[u32]],
        out: &mut Vec<u8>,
    ) -> Result<(), String> {
        if levels.len() != self.levels.len() {
            return Err(format!("{} levels of codes, not {}", self.levels.len(), levels.len()));
        }
        for (index, (codes, level)) in levels.iter().zip(&self.levels).enumerate() {
            if codes.len() != level.codes {
                let (want, got) = (level.codes, codes.len());
                return Err(format!("{want} codes in level {index}, not {got}"));
            }
            let mut sized = codes.iter().zip(level.sizes.iter().cycle());
            if let Some((code, (size, _))) =
                sized.find(|(code, (size, _))| u64::from(**code) >= *size)
            {
                return Err(format!("codes below {size} in level {index}, not {code}"));
            }
        }
        out.extend_from_slice(&label.to_le_bytes());
        let (mut pending, mut filled) = (0u64, 0u32);
        for (codes, level) in levels.iter().zip(&self.levels) {
            for (code, (_, bits)) in codes.iter().zip(level.sizes.iter().cycle()) {
                pending |= u64::from(*code) << filled;
                filled += bits;
                while filled >= 8 {
                    out.push(pending as u8);
                    pending >>= 8;
                    filled -= 8;
                }
            }
        }
        if filled > 0 {
            out.push(pending as u8);
        }
        Ok(())
    }

    /// The label and the codes of a record; nothing where it is too short or holds a code that its
    /// codebook does not have.
    pub(super) fn unpack(&self, record: &[u8]) -> Option<(u32, Vec<Vec<u32>>)> {
        let (label, rest) = record.split_first_chunk::<LABEL_BYTES>()?;
        let mut bytes = rest.iter();
        let (mut pending, mut filled) = (0u64, 0u32);
        let mut levels = Vec::with_capacity(self.levels.len());
        for level in &self.levels {
            let mut codes = Vec::with_capacity(level.codes);
            for (size, bits) in level.sizes.iter().cycle().take(level.codes) {
                while filled < *bits {
                    pending |= u64::from(*bytes.next()?) << filled;
                    filled += 8;
                }
                let code = pending & ((1u64 << bits) - 1);
                if code >= *size {
                    return None;
                }
                codes.push(code as u32);
                pending >>= bits;
                filled -= bits;
            }
            levels.push(codes);
        }
        Some((u32::from_le_bytes(*label), levels))
    }
}

/// ⌈log₂ K⌉: bits that hold any of 0 to K − 1.
fn bits(size: usize) -> u32 {
    usize::BITS - size.saturating_sub(1).leading_zeros()
}

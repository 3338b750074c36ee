//! The file: a head, and blocks that are checked one by one.
//!
//! ```text
//! "VQIMAGES"  version u32  length of the head u32  head (JSON)  CRC-32 of all that u32
//! per block:  length of the payload u32  hash of the contents [u8; 8]  payload
//!             CRC-32 of the block's number u32 and of all that u32
//! ```
//!
//! Numbers are little-endian. All blocks but the last hold [`IMAGES_PER_BLOCK`] images.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};
use vq_model::Precision;

use super::{Block, BlockBits, Codec, CompressError};

const MAGIC: &[u8; 8] = b"VQIMAGES";
const VERSION: u32 = 1;
/// Images in every block but the last. Both sides run their networks on so many at a time.
pub const IMAGES_PER_BLOCK: usize = 64;
/// A longer head cannot be meant: that many names are those of millions of images.
const LONGEST_HEAD: u32 = 1 << 30;
/// Of a block, without its payload.
const FRAME: u64 = 4 + 8 + 4;

/// What a compressed file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressedHead {
    /// A hash of the model.
    pub model: String,
    /// Hashes of the priors, the top level's first; none where all codes were taken as equally probable.
    pub priors: Vec<String>,
    /// What the networks were computed with: parts that are separated by `; `, e.g. `vq 0.1.0; cpu avx512`.
    /// Only for the message where decoding gives something else.
    pub machine: String,
    /// The format of the model's convolutions' factors, which reading must compute with too.
    pub precision: Precision,
    /// Whether the pixels are in it.
    pub lossless: bool,
    /// Height and width of the images.
    pub size: [usize; 2],
    /// How many images there are.
    pub images: usize,
    /// Names of the images, in their order; empty where they have none.
    pub names: Vec<String>,
}

impl CompressedHead {
    /// The number of blocks.
    pub fn blocks(&self) -> usize {
        self.images.div_ceil(IMAGES_PER_BLOCK)
    }

    /// Images in a block.
    fn images_in(&self, block: usize) -> usize {
        self.images.saturating_sub(block * IMAGES_PER_BLOCK).min(IMAGES_PER_BLOCK)
    }

    /// An error where the model or a prior is another one: the hashes are those at hand.
    pub fn require(&self, model: &str, priors: &[String]) -> Result<(), CompressError> {
        let other = |what, made_by: &str, hash: &str, flag| {
            let (made_by, hash) = (short(made_by), short(hash));
            Err(CompressError::Other { what, made_by, hash, flag })
        };
        if self.model != model {
            return other("model", &self.model, model, "--model");
        }
        match (self.priors.len(), priors.len()) {
            (0, 0) => {}
            (0, _) => {
                let problem = "it was compressed without a prior: leave out --prior";
                return Err(CompressError::Input(problem.to_owned()));
            }
            (count, given) if count != given => {
                return Err(CompressError::Input(format!(
                    "it was compressed with {count} prior(s), and {given} are given: give the same ones (--prior)"
                )));
            }
            _ => {}
        }
        match self.priors.iter().zip(priors).find(|(own, given)| own != given) {
            Some((own, given)) => other("prior", own, given, "--prior"),
            None => Ok(()),
        }
    }
}

/// Writes a compressed file, block by block.
#[derive(Debug)]
pub struct CompressedWriter<W> {
    to: W,
    head: CompressedHead,
    block: usize,
    bytes: FileBytes,
}

/// How long the parts of a file are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct FileBytes {
    overhead: u64,
    payload: u64,
}

impl<W: Write> CompressedWriter<W> {
    /// Writes the head.
    pub fn new(mut to: W, head: CompressedHead) -> Result<Self, CompressError> {
        let json = serde_json::to_vec(&head).map_err(|e| CompressError::Input(e.to_string()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((json.len() as u32).to_le_bytes());
        bytes.extend(json);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        to.write_all(&bytes)?;
        let bytes = FileBytes { overhead: bytes.len() as u64, payload: 0 };
        Ok(Self { to, head, block: 0, bytes })
    }

    /// Writes the next block; the bits that were computed for it.
    pub fn write(&mut self, codec: &Codec, block: &Block) -> Result<BlockBits, CompressError> {
        let (images, expected) = (block.images()?, self.head.images_in(self.block));
        if images != expected {
            return Err(CompressError::Input(format!(
                "block {} holds {expected} images, got {images}",
                self.block
            )));
        }
        let (payload, bits) = codec.encode(block)?;
        let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
        bytes.extend(block.hash()?);
        bytes.extend(&payload);
        bytes.extend(checksum(self.block, &bytes).to_le_bytes());
        self.to.write_all(&bytes)?;
        self.block += 1;
        self.bytes.payload += payload.len() as u64;
        self.bytes.overhead += FRAME;
        Ok(bits)
    }

    /// What it wrote to, whole; and how many bytes of it are coded images, and how many are not.
    pub fn finish(mut self) -> Result<(W, u64, u64), CompressError> {
        if self.block != self.head.blocks() {
            let (done, all) = (self.block, self.head.blocks());
            return Err(CompressError::Input(format!("got {done} of {all} blocks")));
        }
        self.to.flush()?;
        Ok((self.to, self.bytes.payload, self.bytes.overhead))
    }
}

/// Reads a compressed file, block by block.
#[derive(Debug)]
pub struct CompressedReader<R> {
    from: R,
    head: CompressedHead,
    block: usize,
}

impl<R: Read> CompressedReader<R> {
    /// Reads and checks the head.
    pub fn new(mut from: R) -> Result<Self, CompressError> {
        let mut start = [0; 16];
        read(&mut from, &mut start, || CompressError::OtherFormat)?;
        let Some(numbers) = start.strip_prefix(MAGIC) else {
            return Err(CompressError::OtherFormat);
        };
        let (version, length) = match numbers {
            [a, b, c, d, e, f, g, h] => {
                (u32::from_le_bytes([*a, *b, *c, *d]), u32::from_le_bytes([*e, *f, *g, *h]))
            }
            _ => return Err(CompressError::OtherFormat),
        };
        let damaged = || CompressError::damaged("its head");
        if length > LONGEST_HEAD {
            return Err(damaged());
        }
        let json = read_up_to(&mut from, length as usize, damaged)?;
        let mut crc = [0; 4];
        read(&mut from, &mut crc, damaged)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&start);
        hasher.update(&json);
        if hasher.finalize() != u32::from_le_bytes(crc) {
            return Err(damaged());
        }
        if version > VERSION {
            return Err(CompressError::Version { found: version, supported: VERSION });
        }
        let head: CompressedHead = serde_json::from_slice(&json).map_err(|_| damaged())?;
        let sizes = 1..=1 << 16;
        let fits = head.size.iter().all(|side| sizes.contains(side));
        let named = head.names.is_empty() || head.names.len() == head.images;
        if head.images == 0 || !fits || !named {
            return Err(damaged());
        }
        Ok(Self { from, head, block: 0 })
    }

    /// What the file says about itself.
    pub fn head(&self) -> &CompressedHead {
        &self.head
    }

    /// Reads all blocks and checks that they are those that were written, without decoding them.
    pub fn check(mut self) -> Result<(), CompressError> {
        while self.next_payload()?.is_some() {}
        Ok(())
    }

    /// The next block, decoded; nothing at the end. `machine` says what is computed with here, as
    /// [`CompressedHead::machine`]. What is returned is what was written: anything else is an error.
    pub fn read(&mut self, codec: &Codec, machine: &str) -> Result<Option<Block>, CompressError> {
        let number = self.block;
        let Some(Payload { hash, bytes }) = self.next_payload()? else { return Ok(None) };
        let other = || CompressError::OtherMachine {
            block: number,
            theirs: self.head.machine.clone(),
            ours: machine.to_owned(),
        };
        let images = self.head.images_in(number);
        let block = match codec.decode(&bytes, images, self.head.size) {
            // The checksum was right: these are the bytes, read otherwise.
            Err(CompressError::Damaged { .. }) => return Err(other()),
            result => result?,
        };
        if block.hash()? == hash { Ok(Some(block)) } else { Err(other()) }
    }

    /// The next block, with its checksum checked.
    fn next_payload(&mut self) -> Result<Option<Payload>, CompressError> {
        let number = self.block;
        if number == self.head.blocks() {
            let mut more = [0];
            return match self.from.read(&mut more)? {
                0 => Ok(None),
                _ => Err(CompressError::damaged("something follows its last block")),
            };
        }
        let damaged =
            || CompressError::damaged(format!("block {number} of {}", self.head.blocks()));
        let (mut length, mut hash, mut crc) = ([0; 4], [0; 8], [0; 4]);
        read(&mut self.from, &mut length, damaged)?;
        read(&mut self.from, &mut hash, damaged)?;
        let payload = read_up_to(&mut self.from, u32::from_le_bytes(length) as usize, damaged)?;
        read(&mut self.from, &mut crc, damaged)?;
        let bytes = [&length[..], &hash, &payload].concat();
        if checksum(number, &bytes) != u32::from_le_bytes(crc) {
            return Err(damaged());
        }
        self.block += 1;
        Ok(Some(Payload { hash, bytes: payload }))
    }
}

/// A block as it stands in the file.
struct Payload {
    /// Of what it decodes to.
    hash: [u8; 8],
    bytes: Vec<u8>,
}

/// That of a block, which must not be taken for another one.
fn checksum(block: usize, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(block as u32).to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

fn read(
    from: &mut impl Read,
    to: &mut [u8],
    cut_short: impl Fn() -> CompressError,
) -> Result<(), CompressError> {
    from.read_exact(to).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => cut_short(),
        _ => error.into(),
    })
}

/// So many bytes. Memory grows with what is there, not with what a damaged length says.
fn read_up_to(
    from: &mut impl Read,
    length: usize,
    cut_short: impl Fn() -> CompressError,
) -> Result<Vec<u8>, CompressError> {
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() == length { Ok(bytes) } else { Err(cut_short()) }
}

/// Enough of a hash to tell models apart.
fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

//! Runs kernels from their PTX: threads of a warp together, instruction by instruction.

mod access;
mod decode;
mod each;
mod float;
mod integer;
mod lanes;
mod rounding;
mod steps;
mod text;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use lanes::{Block, Condition, Registers, Warp};

/// Which memory there is.
pub trait Memory {
    /// The live allocation that holds all of `address..address + bytes`, as its first address and its end; None
    /// where there is none.
    fn find(&self, address: u64, bytes: u64) -> Option<(u64, u64)>;
}

/// Kernels that were compiled together.
pub struct Module {
    parts: text::Parts,
    known: Mutex<HashMap<String, Result<Arc<Kernel>, String>>>,
}

/// A kernel, ready to run.
pub struct Kernel {
    name: String,
    parameters: Vec<(usize, usize)>,
    code: Code,
    /// Those of blocks that have ended.
    registers: Mutex<Vec<Registers>>,
    /// What the addresses in the code are of.
    _globals: Vec<Arc<Vec<u64>>>,
}

/// What a kernel's text says.
struct Code {
    steps: Vec<Step>,
    /// The text of each step.
    lines: Vec<String>,
    words: usize,
    longs: usize,
    predicates: usize,
    constants: Vec<(usize, u32)>,
    long_constants: Vec<(usize, u64)>,
    specials: Vec<(usize, Special)>,
    shared: usize,
    local: usize,
    /// First addresses and ends of the module's variables.
    globals: Vec<(u64, u64)>,
}

type Run = Box<dyn Fn(&mut Warp<'_>, u32) -> Result<(), String> + Send + Sync>;

enum Step {
    /// For the threads of a mask.
    Do(Run),
    /// To a step, where the predicate is as it should be.
    Branch {
        to: usize,
        when: Option<Condition>,
    },
    Barrier,
    End {
        when: Option<Condition>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
    Zero,
}

/// What went wrong, and where.
#[derive(Debug)]
pub struct Fault(String);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fault {}

impl Module {
    /// Takes a text apart; a kernel is read when it is first asked for. An error where it is no PTX.
    pub fn parse(text: &str) -> Result<Self, String> {
        Ok(Self { parts: text::split(text)?, known: Mutex::default() })
    }

    /// The kernel of that name; None where there is none, an error where it has something that is not known here.
    pub fn kernel(&self, name: &str) -> Option<Result<Arc<Kernel>, String>> {
        let part = self.parts.functions.get(name).filter(|part| part.is_entry)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let decoded = known.entry(name.to_owned()).or_insert_with(|| {
            let (code, parameters) = decode::decode(part, &self.parts)?;
            let globals = self.parts.globals.values().cloned().collect();
            let name = name.to_owned();
            let registers = Mutex::default();
            Ok(Arc::new(Kernel { name, parameters, code, registers, _globals: globals }))
        });
        Some(decoded.clone())
    }

    /// The names of all kernels.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.functions.iter().filter(|(_, part)| part.is_entry).map(|(name, _)| name.as_str())
    }
}

/// Steps of one block after which it is taken for endless.
const MOST_STEPS: u64 = 2_000_000_000;

impl Kernel {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offset and size of each parameter, in bytes.
    pub fn parameters(&self) -> &[(usize, usize)] {
        &self.parameters
    }

    /// Bytes of shared memory that a block has without asking for more.
    pub fn static_shared_bytes(&self) -> usize {
        self.code.shared
    }

    /// Runs all blocks, one after the other. Global memory is this process's own.
    ///
    /// An error where something is accessed that is not there or not aligned, and where a block can't go on.
    pub fn run(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared_bytes: usize,
        parameters: &[u8],
        memory: &dyn Memory,
    ) -> Result<(), Fault> {
        let threads = block.iter().product::<u32>() as usize;
        let mut warps = Vec::new();
        for number in 0..threads.div_ceil(32) {
            let left = self.registers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let registers = left.unwrap_or_else(|| Registers::new(&self.code));
            warps.push(Warp::new(&self.code, registers, number, threads, parameters, memory));
        }
        let mut shared = Block::new(self.code.shared.next_multiple_of(16) + dynamic_shared_bytes);
        let mut done = Ok(());
        for z in 0..grid[2] {
            for y in 0..grid[1] {
                for x in 0..grid[0] {
                    if done.is_ok() {
                        let place = [x, y, z];
                        let ran = self.run_block(&mut warps, &mut shared, place, grid, block);
                        let at = |why| Fault(format!("{}, block {place:?}: {why}", self.name));
                        done = ran.map_err(at);
                    }
                }
            }
        }
        let mut left = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        left.extend(warps.into_iter().map(Warp::into_registers));
        done
    }

    fn run_block(
        &self,
        warps: &mut [Warp<'_>],
        shared: &mut Block,
        place: [u32; 3],
        grid: [u32; 3],
        block: [u32; 3],
    ) -> Result<(), String> {
        shared.reset();
        for warp in warps.iter_mut() {
            warp.start(&self.code, place, grid, block);
        }
        let mut steps = 0;
        // Forwards and backwards in turn, so that a missing barrier shows.
        let mut is_forward = true;
        loop {
            for i in 0..warps.len() {
                let i = if is_forward { i } else { warps.len() - 1 - i };
                let warp = &mut warps[i];
                // SAFETY: no other warp runs, and the block's memory stays until all have ended.
                warp.block = std::ptr::from_mut(shared);
                warp.run(&self.code, &mut steps)
                    .map_err(|(step, why)| format!("warp {i}: {why}: {}", self.code.lines[step]))?;
                if steps > MOST_STEPS {
                    return Err("it does not end".to_owned());
                }
            }
            is_forward = !is_forward;
            if warps.iter().all(|warp| warp.alive == 0) {
                return Ok(());
            }
            // All that are alive wait now.
            for warp in warps.iter_mut() {
                warp.waiting = 0;
            }
        }
    }
}

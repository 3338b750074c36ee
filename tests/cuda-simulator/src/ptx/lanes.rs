//! A warp: 32 threads that take each step together, as far as they are at the same one.

use std::array;
use std::cmp::Ordering;

use super::{Code, Memory, Special, Step};

/// One value for each thread.
pub(super) type Words = [u32; 32];
pub(super) type Longs = [u64; 32];

pub(super) const ALL: u32 = u32::MAX;

/// Where generic addresses of these memories start; no memory of the process does.
const SHARED: u64 = 0x7100_0000_0000_0000;
const LOCAL: u64 = 0x7200_0000_0000_0000;

/// The kinds of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Parameter,
}

impl Space {
    /// What turns an address there into a generic one.
    pub(super) fn window(self) -> u64 {
        match self {
            Self::Shared => SHARED,
            Self::Local => LOCAL,
            Self::Generic | Self::Global | Self::Parameter => 0,
        }
    }
}

/// A predicate, or its opposite.
#[derive(Clone, Copy)]
pub(super) struct Condition {
    pub(super) predicate: usize,
    pub(super) negated: bool,
}

/// A block's shared memory.
pub(super) struct Block {
    words: Vec<u128>,
    bytes: usize,
}

impl Block {
    pub(super) fn new(bytes: usize) -> Self {
        Self { words: vec![0; bytes.div_ceil(16)], bytes }
    }

    /// Nobody has written anything: NaN in every format.
    pub(super) fn reset(&mut self) {
        self.words.fill(u128::MAX);
    }
}

/// What a warp's threads have for themselves.
pub(super) struct Registers {
    words: Vec<Words>,
    longs: Vec<Longs>,
    predicates: Vec<u32>,
    local: Vec<u128>,
}

impl Registers {
    pub(super) fn new(code: &Code) -> Self {
        let mut words = vec![[u32::MAX; 32]; code.words];
        let mut longs = vec![[u64::MAX; 32]; code.longs];
        for &(register, value) in &code.constants {
            words[register] = [value; 32];
        }
        for &(register, value) in &code.long_constants {
            longs[register] = [value; 32];
        }
        let local = vec![u128::MAX; code.local.div_ceil(16) * 32];
        Self { words, longs, predicates: vec![0; code.predicates], local }
    }
}

/// Threads 32·n to 32·n + 31 of a block.
pub(super) struct Warp<'a> {
    number: usize,
    pub(super) words: Vec<Words>,
    pub(super) longs: Vec<Longs>,
    pub(super) predicates: Vec<u32>,
    /// The carries of long sums.
    pub(super) carry: u32,
    pcs: [usize; 32],
    whole: u32,
    pub(super) alive: u32,
    pub(super) waiting: u32,
    pub(super) block: *mut Block,
    local: Vec<u128>,
    local_bytes: usize,
    parameters: &'a [u8],
    memory: &'a dyn Memory,
    /// Where the module's variables lie.
    globals: &'a [(u64, u64)],
    /// The allocations that were found last.
    found: [(u64, u64); 8],
    next: usize,
}

impl<'a> Warp<'a> {
    pub(super) fn new(
        code: &'a Code,
        registers: Registers,
        number: usize,
        threads: usize,
        parameters: &'a [u8],
        memory: &'a dyn Memory,
    ) -> Self {
        let count = (threads - 32 * number).min(32);
        let whole = if count == 32 { ALL } else { (1 << count) - 1 };
        let Registers { words, longs, predicates, local } = registers;
        Self {
            number,
            words,
            longs,
            predicates,
            carry: 0,
            pcs: [0; 32],
            whole,
            alive: 0,
            waiting: 0,
            block: std::ptr::null_mut(),
            local,
            local_bytes: code.local.next_multiple_of(16),
            parameters,
            memory,
            globals: &code.globals,
            found: [(0, 0); 8],
            next: 0,
        }
    }

    pub(super) fn into_registers(self) -> Registers {
        let Self { words, longs, predicates, local, .. } = self;
        Registers { words, longs, predicates, local }
    }

    /// Begins a block.
    pub(super) fn start(&mut self, code: &Code, place: [u32; 3], grid: [u32; 3], block: [u32; 3]) {
        self.pcs = [0; 32];
        self.alive = self.whole;
        self.waiting = 0;
        for &(register, special) in &code.specials {
            self.words[register] = array::from_fn(|lane| {
                let thread = (32 * self.number + lane) as u32;
                match special {
                    Special::Thread(0) => thread % block[0],
                    Special::Thread(1) => thread / block[0] % block[1],
                    Special::Thread(_) => thread / block[0] / block[1],
                    Special::Threads(axis) => block[axis],
                    Special::Block(axis) => place[axis],
                    Special::Blocks(axis) => grid[axis],
                    Special::Lane => lane as u32,
                    Special::Warp => self.number as u32,
                    Special::Zero => 0,
                }
            });
        }
    }

    /// Goes on until all threads have ended or wait at a barrier. An error with the step that made it.
    pub(super) fn run(&mut self, code: &Code, steps: &mut u64) -> Result<(), (usize, String)> {
        loop {
            let ready = self.alive & !self.waiting;
            if ready == 0 {
                return Ok(());
            }
            // Those that are behind come first: so that threads that went apart come together again.
            let (mut pc, mut stop) = (usize::MAX, usize::MAX);
            let mut mask = 0;
            for lane in lanes(ready) {
                let at = self.pcs[lane];
                match at.cmp(&pc) {
                    Ordering::Less => (stop, pc, mask) = (pc, at, 1 << lane),
                    Ordering::Equal => mask |= 1 << lane,
                    Ordering::Greater => stop = stop.min(at),
                }
            }
            loop {
                *steps += 1;
                match &code.steps[pc] {
                    Step::Do(run) => {
                        run(self, mask).map_err(|why| (pc, why))?;
                        pc += 1;
                    }
                    Step::Branch { to, when } => {
                        let taken = mask & when.map_or(ALL, |when| self.holds(when));
                        if taken == mask {
                            pc = *to;
                        } else if taken == 0 {
                            pc += 1;
                        } else {
                            self.put(mask & !taken, pc + 1);
                            self.put(taken, *to);
                            break;
                        }
                        if steps.is_multiple_of(1 << 16) {
                            self.put(mask, pc);
                            break;
                        }
                    }
                    Step::Barrier => {
                        self.waiting |= mask;
                        self.put(mask, pc + 1);
                        break;
                    }
                    Step::End { when } => {
                        let ended = mask & when.map_or(ALL, |when| self.holds(when));
                        self.alive &= !ended;
                        mask &= !ended;
                        if mask == 0 {
                            break;
                        }
                        pc += 1;
                    }
                }
                if pc >= stop {
                    self.put(mask, pc);
                    break;
                }
            }
            if *steps > super::MOST_STEPS {
                return Ok(());
            }
        }
    }

    fn put(&mut self, mask: u32, pc: usize) {
        for lane in lanes(mask) {
            self.pcs[lane] = pc;
        }
    }

    /// The threads that it holds of.
    pub(super) fn holds(&self, Condition { predicate, negated }: Condition) -> u32 {
        if negated { !self.predicates[predicate] } else { self.predicates[predicate] }
    }

    pub(super) fn set_words(&mut self, register: usize, mask: u32, values: &Words) {
        let to = &mut self.words[register];
        if mask == ALL {
            *to = *values;
            return;
        }
        for lane in 0..32 {
            to[lane] = if mask >> lane & 1 == 1 { values[lane] } else { to[lane] };
        }
    }

    pub(super) fn set_longs(&mut self, register: usize, mask: u32, values: &Longs) {
        let to = &mut self.longs[register];
        if mask == ALL {
            *to = *values;
            return;
        }
        for lane in 0..32 {
            to[lane] = if mask >> lane & 1 == 1 { values[lane] } else { to[lane] };
        }
    }

    pub(super) fn set_predicate(&mut self, register: usize, mask: u32, values: u32) {
        let to = &mut self.predicates[register];
        *to = *to & !mask | values & mask;
    }

    /// Where the memory of each thread lies in this process; an error where it is not there.
    pub(super) fn find_all(
        &mut self,
        space: Space,
        mask: u32,
        addresses: &Longs,
        bytes: usize,
    ) -> Result<[*mut u8; 32], String> {
        let (mut least, mut most, mut bits) = (u64::MAX, 0, 0);
        // Those of threads that take no part are as the first one that does.
        let first = addresses[mask.trailing_zeros() as usize & 31];
        for (lane, &address) in addresses.iter().enumerate() {
            let address = if mask >> lane & 1 == 1 { address } else { first };
            least = least.min(address);
            most = most.max(address);
            bits |= address;
        }
        // All in one allocation, as it nearly always is. Sizes are powers of two.
        let end = most.saturating_add(bytes as u64);
        if bits & (bytes as u64 - 1) == 0 {
            let first = match space {
                Space::Generic | Space::Global => {
                    self.is_allocated(least, end - least).then_some(0)
                }
                Space::Shared => {
                    // SAFETY: it is the memory of the block that runs.
                    let block = unsafe { &mut *self.block };
                    (end <= block.bytes as u64).then_some(block.words.as_mut_ptr() as usize)
                }
                Space::Local | Space::Parameter => None,
            };
            if let Some(first) = first {
                return Ok(addresses.map(|address| (first as u64).wrapping_add(address) as *mut u8));
            }
        }
        let mut places = [std::ptr::null_mut(); 32];
        for lane in lanes(mask) {
            places[lane] = self.find(space, lane, addresses[lane], bytes)?;
        }
        Ok(places)
    }

    /// Whether there is an allocation that holds all of it; it is known from now on.
    fn is_allocated(&mut self, address: u64, bytes: u64) -> bool {
        let holds =
            |range: &(u64, u64)| address >= range.0 && address.saturating_add(bytes) <= range.1;
        if self.found.iter().chain(self.globals).any(holds) {
            return true;
        }
        let Some(range) = self.memory.find(address, bytes) else { return false };
        self.found[self.next] = range;
        self.next = (self.next + 1) % self.found.len();
        true
    }

    /// Where a thread's memory lies.
    fn find(
        &mut self,
        space: Space,
        lane: usize,
        address: u64,
        bytes: usize,
    ) -> Result<*mut u8, String> {
        let thread = 32 * self.number + lane;
        let fault =
            |what: &str| Err(format!("thread {thread}: {bytes} bytes at {address:#x}: {what}"));
        if !address.is_multiple_of(bytes as u64) {
            return fault("not aligned");
        }
        let inside = |offset: u64, size: usize| {
            offset.checked_add(bytes as u64).is_some_and(|end| end <= size as u64)
        };
        match space {
            Space::Generic if (SHARED..LOCAL).contains(&address) => {
                self.find(Space::Shared, lane, address - SHARED, bytes)
            }
            Space::Generic if (LOCAL..LOCAL + (1 << 32)).contains(&address) => {
                self.find(Space::Local, lane, address - LOCAL, bytes)
            }
            Space::Generic | Space::Global => {
                if !self.is_allocated(address, bytes as u64) {
                    return fault("not allocated");
                }
                Ok(address as *mut u8)
            }
            Space::Shared => {
                // SAFETY: it is the memory of the block that runs.
                let block = unsafe { &mut *self.block };
                if !inside(address, block.bytes) {
                    return fault("beyond the shared memory");
                }
                Ok(block.words.as_mut_ptr().cast::<u8>().wrapping_add(address as usize))
            }
            Space::Local => {
                if !inside(address, self.local_bytes) {
                    return fault("beyond the local memory");
                }
                let first = lane * self.local_bytes;
                Ok(self.local.as_mut_ptr().cast::<u8>().wrapping_add(first + address as usize))
            }
            Space::Parameter => {
                if !inside(address, self.parameters.len()) {
                    return fault("beyond the parameters");
                }
                Ok(self.parameters.as_ptr().wrapping_add(address as usize).cast_mut())
            }
        }
    }
}

/// Calls `work` with each thread of a mask.
#[inline]
pub(super) fn for_each(mask: u32, mut work: impl FnMut(usize)) {
    if mask == ALL {
        // So that the compiler sees how many there are.
        for lane in 0..32 {
            work(lane);
        }
    } else {
        for lane in lanes(mask) {
            work(lane);
        }
    }
}

/// The threads of a mask.
pub(super) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros() as usize;
        mask &= mask - 1;
        Some(lane)
    })
}

//! Products by AMX tiles: 32 rows × 32 columns in four accumulators of 16 × 16.
//!
//! The instructions are written as assembler text because Rust's functions for them are not stable
//! (<https://github.com/rust-lang/rust/issues/126622>).

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::kernels::{PANEL, Product, STEP};

/// Whether the CPU has AMX with bfloat16 and the operating system lets this process use it.
pub(super) fn is_available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        let features = __cpuid_count(7, 0).edx;
        features & (BF16 | TILE) == BF16 | TILE && allowed()
    })
}

/// Asks Linux for the state that tiles need; it is granted once for all threads of the process.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this system call takes two numbers and touches no memory of ours. Kernels that do not
    // know it answer with an error.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> bool {
    false
}

/// Eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// [`is_available`] said yes.
#[allow(unsafe_code)]
pub(super) unsafe fn enter() {
    // SAFETY: the configuration is valid for palette 1.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags));
    }
}

/// # Safety
/// As [`enter`].
#[allow(unsafe_code)]
pub(super) unsafe fn leave() {
    // SAFETY: gives back what `enter` took; nobody else uses tiles.
    unsafe {
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }
}

/// # Safety
/// [`enter`] was called on this thread, and the pointers cover what [`Product`] says.
#[allow(unsafe_code)]
pub(super) unsafe fn product(job: &Product) {
    let (a_step, c_step) = (4 * job.a_step, 4 * job.c_step);
    let (a, c) = (job.a, job.c);
    let (a_below, c_below) = (a.wrapping_byte_add(16 * a_step), c.wrapping_byte_add(16 * c_step));
    let steps = job.pairs / STEP;
    if steps == 0 {
        // The loops below count down from at least one.
        for i in (0..job.rows).filter(|_| !job.accumulate) {
            // SAFETY: the caller's promise.
            unsafe { c.add(i * job.c_step).write_bytes(0, PANEL) };
        }
        return;
    }
    // SAFETY: the loop reads `steps` times 64 bytes of 32 rows of `a` and 16 rows of `b`, and it
    // reads and writes 128 bytes of 32 rows of `c`; with at most 16 rows, half of `a` and `c`.
    unsafe {
        if job.rows > 16 {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jz 3f",
                "tileloadd tmm0, [{c} + {c_step}*1]",
                "tileloadd tmm1, [{c} + {c_step}*1 + 64]",
                "tileloadd tmm2, [{c_below} + {c_step}*1]",
                "tileloadd tmm3, [{c_below} + {c_step}*1 + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b} + {panel}*1]",
                "tileloadd tmm4, [{a} + {a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {panel}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a_below} + {a_step}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {a_below}, 64",
                "add {b}, {b_step}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {c_step}*1], tmm0",
                "tilestored [{c} + {c_step}*1 + 64], tmm1",
                "tilestored [{c_below} + {c_step}*1], tmm2",
                "tilestored [{c_below} + {c_step}*1 + 64], tmm3",
                accumulate = in(reg) u32::from(job.accumulate),
                a = inout(reg) a => _,
                a_below = inout(reg) a_below => _,
                b = inout(reg) job.b => _,
                a_step = in(reg) a_step,
                panel = in(reg) 4 * PANEL,
                b_step = const 4 * PANEL * STEP,
                steps = inout(reg) steps => _,
                c = in(reg) c,
                c_below = in(reg) c_below,
                c_step = in(reg) c_step,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        } else {
            asm!(
                "test {accumulate:e}, {accumulate:e}",
                "jz 3f",
                "tileloadd tmm0, [{c} + {c_step}*1]",
                "tileloadd tmm1, [{c} + {c_step}*1 + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm6, [{b} + {panel}*1]",
                "tileloadd tmm4, [{a} + {a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {panel}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, {b_step}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {c_step}*1], tmm0",
                "tilestored [{c} + {c_step}*1 + 64], tmm1",
                accumulate = in(reg) u32::from(job.accumulate),
                a = inout(reg) a => _,
                b = inout(reg) job.b => _,
                a_step = in(reg) a_step,
                panel = in(reg) 4 * PANEL,
                b_step = const 4 * PANEL * STEP,
                steps = inout(reg) steps => _,
                c = in(reg) c,
                c_step = in(reg) c_step,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

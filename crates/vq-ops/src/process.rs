//! The memory and the threads of programs that train (feature `process`).

/// An allocator that hands memory out again quickly, for `#[global_allocator]`.
pub use mimalloc::MiMalloc as Allocator;

/// Lets [`Allocator`] keep what is freed, for good. A training step frees and takes the same tens of
/// megabytes every time; giving them back to the operating system in between makes it clear every page
/// anew. The process's peak memory stays as it is.
pub fn keep_memory() {
    purge_after(-1);
}

/// Does `work` with what it frees given back to the operating system, and has [`Allocator`] keep memory again
/// from then on: for what takes far more for a moment than the program needs later.
pub fn give_memory_back<R>(work: impl FnOnce() -> R) -> R {
    purge_after(0);
    let result = work();
    // SAFETY: may be called at any time.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_collect(true);
    }
    keep_memory();
    result
}

/// Milliseconds after which [`Allocator`] gives back what is freed; never, if negative.
fn purge_after(milliseconds: std::ffi::c_long) {
    /// `mi_option_purge_delay`; the binding leaves it out.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: takes two numbers; an option that does not exist is ignored.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds);
    }
}

/// Has candle work through its elementwise operations on the calling thread, unless `CANDLE_NUM_THREADS` says
/// otherwise. Its own threads wait for their next piece by spinning, on the cores that the operations of this
/// crate (on rayon's threads) need: training steps in bfloat16 were an eighth faster without them, and took nearly
/// equal times. candle's matrix products are not concerned.
///
/// # Safety
/// Changes the environment: nothing may read or change it at the same time. Call it first in `main`, while
/// the program has no other threads.
#[allow(unsafe_code)]
pub unsafe fn keep_candle_on_one_thread() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: the caller's promise.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

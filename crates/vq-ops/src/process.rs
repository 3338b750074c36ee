//! The memory of programs that train (feature `process`).

/// An allocator that hands memory out again quickly, for `#[global_allocator]`.
pub use mimalloc::MiMalloc as Allocator;

/// Lets [`Allocator`] keep what is freed, for good. A training step frees and takes the same tens of
/// megabytes every time; giving them back to the operating system in between makes it clear every page
/// anew. The process's peak memory stays as it is.
pub fn keep_memory() {
    /// `mi_option_purge_delay`, in milliseconds; the binding leaves it out.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: takes two numbers; an option that does not exist is ignored.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
}

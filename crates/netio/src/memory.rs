//! Memory that is free again, back to the kernel.
//!
//! A process's memory is freed before its sockets are closed when it is killed, and its sockets are what tells the other
//! instance: what a daemon needed to read ten thousand connections, and never again, must not stay with it.

/// Gives back what the allocator keeps for later. It looks through all of its memory, some milliseconds for a hundred MiB:
/// for a start, not for a loop.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim touches only memory that is not allocated, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

//! Network namespaces, for tests and labs. The product itself never changes its namespace.

use std::io;

use crate::sys::check;

/// Moves the calling thread into a new, empty network namespace; threads and children that it
/// starts from then on are in it too. The namespace goes with its last thread and descriptor.
/// Errors: EPERM without CAP_SYS_ADMIN.
pub fn isolate_thread() -> io::Result<()> {
    // SAFETY: takes no pointer; it changes only which namespace this thread is in.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

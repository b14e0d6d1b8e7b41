//! The few raw calls that more than one room needs. Nothing here is public.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Turns a C return value into a result: negative means `errno`.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sets one integer socket option.
pub(crate) fn set_option(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_option_of(socket, level, name, &value)
}

/// Sets a socket option whose value is the plain C struct `T`.
pub(crate) fn set_option_of<T: Copy>(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: `value` lives through the call and the length is exactly its size; the kernel only
    // reads it. The descriptor is open because it is borrowed.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Packets that the kernel dropped at this socket so far: its receive buffer was full, or what arrived was damaged.
/// 0 where it does not say (before Linux 4.12).
pub(crate) fn dropped_at(socket: &impl AsFd) -> u32 {
    // include/uapi/linux/sock_diag.h: nine numbers, of which this is the last.
    const COUNT: usize = 9;
    let mut values = [0_u32; COUNT];
    let mut length = size_of_val(&values) as libc::socklen_t;
    // SAFETY: `values` and `length` live through the call, and the length is the array's size. The descriptor is open
    // because it is borrowed.
    let read = check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    });
    let [.., drops] = values;
    if read.is_ok() { drops } else { 0 }
}

/// Reads one integer socket option.
pub(crate) fn get_option(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `length` live through the call, and the length is the value's size. The descriptor is open
    // because it is borrowed.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &raw mut length,
        )
    })?;
    Ok(value)
}

/// Makes a descriptor non-blocking.
pub(crate) fn set_nonblocking(file: &impl AsFd) -> io::Result<()> {
    let raw = file.as_fd().as_raw_fd();
    // SAFETY: fcntl with F_GETFL takes no pointer; the descriptor is open because it is borrowed.
    let flags = check(unsafe { libc::fcntl(raw, libc::F_GETFL) })?;
    // SAFETY: as above, F_SETFL takes an integer.
    check(unsafe { libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

/// True for the errors that mean "nothing now": no data, or a signal came first.
pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A network namespace of its own for one test thread, entered for as long as the thread lives.
/// Panics (so the test fails, it is never skipped) when not root.
#[cfg(test)]
pub(crate) fn in_new_namespace<R: Send + 'static>(body: impl FnOnce() -> R + Send + 'static) -> R {
    let run = move || {
        crate::netns::isolate_thread().expect("these tests need root");
        body()
    };
    match std::thread::spawn(run).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Runs `ip` inside the calling thread's namespace (a child inherits it).
#[cfg(test)]
pub(crate) fn ip(arguments: &str) -> String {
    let output = std::process::Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An Ethernet interface that is up and leads nowhere (a veth pair: not every kernel has dummies).
#[cfg(test)]
pub(crate) fn stub(name: &str) {
    ip(&format!("link add {name} type veth peer name {name}-peer"));
    ip(&format!("link set {name} up"));
    ip(&format!("link set {name}-peer up"));
}

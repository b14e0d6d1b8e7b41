//! What the process may do and how soon it gets the processor.
//!
//! Order at start (security.md, "Privilege"): open everything, raise priorities, then
//! [`drop_privileges`]. Threads inherit what the starting thread has, so drop before spawning
//! workers or drop in each thread: capabilities are per thread on Linux.

use std::io;

use crate::sys::check;

/// What became of a wish for a higher priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// SCHED_FIFO at the lowest real-time priority.
    RealTime,
    /// A nice value, as real time was refused (containers without RT bandwidth).
    Nice(i32),
    /// Nothing was granted.
    Unchanged,
}

/// Raises the calling thread above ordinary work: SCHED_FIFO priority 1, which never starves
/// the kernel's own real-time threads, else nice −15. Children of fork do not inherit it.
pub fn raise_thread_priority() -> Priority {
    let parameter = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 names the calling thread; the parameter lives through the call.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) } == 0 {
        return Priority::RealTime;
    }
    const NICE: i32 = -15;
    // SAFETY: takes no pointer; on Linux PRIO_PROCESS with 0 names the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == 0 {
        return Priority::Nice(NICE);
    }
    Priority::Unchanged
}

/// Lowers or raises the nice value of the calling thread (workers: a little above the default).
pub fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: takes no pointer; on Linux PRIO_PROCESS with 0 names the calling thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// The calling thread, and those it starts, take no signals: they are for the thread that waits for them, whose descriptors
/// the handlers write to ([`crate::descriptor::own_table`]). SIGKILL and faults of the thread's own come all the same.
pub fn block_signals() -> io::Result<()> {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set, and only then is it read; no old set is asked for.
    let error = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Keeps present and future memory resident, so that a page fault never delays a heartbeat.
/// Optional: it makes everything resident, and a killed process frees memory before its sockets
/// (dataplane.md), so use it only with a small heap.
pub fn lock_memory() -> io::Result<()> {
    const MCL_ONFAULT: libc::c_int = 4;
    // SAFETY: takes no pointer.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | MCL_ONFAULT) }).map(drop)
}

/// No core files and no debugger of another user: keys live in this process.
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit lives through the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) })?;
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// CAP_NET_ADMIN.
const NET_ADMIN: u32 = 12;
/// CAP_NET_RAW.
const NET_RAW: u32 = 13;

/// The kernel's `struct __user_cap_header_struct`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// The kernel's `struct __user_cap_data_struct`; version 3 takes two.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;

/// The calling thread keeps CAP_NET_ADMIN and CAP_NET_RAW alone (those it has of them), empties
/// its bounding and ambient sets, and can gain nothing by exec. The user id stays.
/// A program run afterwards (the notify hook) has no capability at all.
pub fn drop_privileges() -> io::Result<()> {
    keep_of(1 << NET_ADMIN | 1 << NET_RAW)
}

/// The same, keeping nothing: for threads that only write what they are given.
pub fn drop_all_privileges() -> io::Result<()> {
    keep_of(0)
}

fn keep_of(wanted: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: integers only. Kernels before 4.3 have no ambient set: nothing to clear then.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    for capability in 0..64 {
        // Without CAP_SETPCAP the bounding set cannot shrink; no_new_privs covers that case.
        // SAFETY: integers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            break;
        }
    }
    let mut data = [CapData::default(); 2];
    let mut header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    // SAFETY: version 3 fills two data structs; both pointers are valid for that.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(got as libc::c_int)?;
    let [low, high] = &mut data;
    let keep = wanted & low.permitted;
    *low = CapData { effective: keep, permitted: keep, inheritable: 0 };
    *high = CapData::default();
    // SAFETY: version 3 reads two data structs; both pointers are valid for that.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(set as libc::c_int).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_line(name: &str) -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    }

    // All in a thread of its own: capabilities and priority belong to the thread.
    #[test]
    fn only_the_two_capabilities_stay() {
        std::thread::spawn(|| {
            assert!(crate::tun::Tun::open_vnet("tdmcap").is_ok(), "these tests need root");
            drop_privileges().unwrap();
            assert_eq!(status_line("CapEff:"), "0000000000003000");
            assert_eq!(status_line("CapPrm:"), "0000000000003000");
            assert_eq!(status_line("CapBnd:"), "0000000000000000");
            assert_eq!(status_line("NoNewPrivs:"), "1");
            // CAP_SYS_ADMIN is gone, CAP_NET_ADMIN works.
            // SAFETY: takes no pointer.
            assert!(unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0);
            assert!(crate::tun::Tun::open_vnet("tdmcap").is_ok());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn nothing_stays_and_threads_started_then_have_nothing() {
        std::thread::spawn(|| {
            drop_all_privileges().unwrap();
            std::thread::spawn(|| {
                for set in ["CapEff:", "CapPrm:", "CapInh:", "CapBnd:", "CapAmb:"] {
                    assert_eq!(status_line(set), "0000000000000000", "{set}");
                }
                assert_eq!(status_line("NoNewPrivs:"), "1");
            })
            .join()
            .unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_crash_leaves_no_core() {
        const CHILD: &str = "TANDEM_TEST_CRASH";
        if let Some(how) = std::env::var_os(CHILD) {
            if how == "forbidden" {
                forbid_core_dumps().unwrap();
                // SAFETY: integers only.
                let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
                assert_eq!(dumpable, 0);
                let mut limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
                // SAFETY: the limit lives through the call.
                check(unsafe { libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) }).unwrap();
                assert_eq!((limit.rlim_cur, limit.rlim_max), (0, 0));
            }
            std::process::abort();
        }
        use std::os::unix::process::ExitStatusExt;
        let folder = std::env::temp_dir().join(format!("tandem-core-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let dumped = |how: &str| {
            // The shell's limit is the child's, whatever this process was given.
            let script = "ulimit -c unlimited; exec \"$0\" --exact \"$1\" --nocapture";
            let status = std::process::Command::new("sh")
                .args(["-c", script])
                .arg(std::env::current_exe().unwrap())
                .arg("sched::tests::a_crash_leaves_no_core")
                .env(CHILD, how)
                .current_dir(&folder)
                .stderr(std::process::Stdio::null())
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(libc::SIGABRT), "{how}");
            status.core_dumped()
        };
        let (control, forbidden) = (dumped("allowed"), dumped("forbidden"));
        std::fs::remove_dir_all(&folder).unwrap();
        // Where the host's core_pattern keeps every core away, this proves only the limit and the flag.
        if !control {
            eprintln!("this host writes no core files at all");
        }
        assert!(!forbidden);
    }

    #[test]
    fn a_thread_without_signals_leaves_them_to_the_others() {
        std::thread::spawn(|| {
            block_signals().unwrap();
            std::thread::spawn(|| {
                // Signals 9 and 19 cannot be blocked, 32 and 33 are the C library's.
                let mask = u64::from_str_radix(&status_line("SigBlk:"), 16).unwrap();
                let term = 1 << (libc::SIGTERM - 1);
                let child = 1 << (libc::SIGCHLD - 1);
                assert_eq!(mask & (term | child), term | child, "{mask:x}");
            })
            .join()
            .unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn priority_rises() {
        std::thread::spawn(|| assert_ne!(raise_thread_priority(), Priority::Unchanged))
            .join()
            .unwrap();
    }
}

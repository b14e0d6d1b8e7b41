//! One run of the lab. Whatever it starts ends with it: on return, on error, on Ctrl-C, when its time is up,
//! and, should the lab itself be killed, at the start of the next run.
//!
//! Every namespace is called `tl<pid>-<short>`, every file lies under `/tmp/tandem-lab/<pid>`. A run whose
//! process is gone is stale and is cleaned by [`clean_stale`]. Only processes that the lab started are ended:
//! by their process id, or because they live in a namespace that the lab made.

use crate::error::{Error, IoContext, Result};
use crate::proc::Cmd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const ROOT: &str = "/tmp/tandem-lab";

/// What must be ended if the process is interrupted. Global, because a signal has no owner to ask.
#[derive(Default)]
struct State {
    ending: bool,
    pids: BTreeSet<u32>,
    namespaces: Vec<String>,
    dir: Option<PathBuf>,
    keep_dir: bool,
}

static STATE: Mutex<State> = Mutex::new(State {
    ending: false,
    pids: BTreeSet::new(),
    namespaces: Vec::new(),
    dir: None,
    keep_dir: false,
});

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run: the folder for its files and the right to make namespaces.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
}

impl Run {
    /// Starts the process's run. It ends by itself after `bound` (exit code 124), if one is given. There is one
    /// run per process at a time; its topologies may follow one another.
    pub fn start(bound: Option<Duration>) -> Result<Run> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::Machine("root is needed: network namespaces (try sudo)".into()));
        }
        clean_stale()?;
        let pid = std::process::id();
        let dir = Path::new(ROOT).join(pid.to_string());
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).doing(format!("create {}", dir.display()))?;
        // Another run that begins now must not find an empty file.
        let (born, whole) = (dir.join("born.new"), dir.join("born"));
        crate::error::write_file(&born, birth_of(pid).unwrap_or_default())?;
        std::fs::rename(&born, &whole).doing(format!("create {}", whole.display()))?;
        {
            let mut state = state();
            state.ending = false;
            state.keep_dir = false;
            state.dir = Some(dir.clone());
        }
        guard(bound)?;
        Ok(Run { dir })
    }

    /// The folder of this run: logs, configs, captures.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A folder below the run's, made now if needed.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).doing(format!("create {}", dir.display()))?;
        Ok(dir)
    }

    /// Keeps the folder when the run ends, for a person to look at.
    pub fn keep_files(&self) {
        state().keep_dir = true;
    }

    /// The full name of namespace `short` in this run.
    pub fn ns_name(&self, short: &str) -> String {
        format!("tl{}-{short}", std::process::id())
    }

    /// Deletes every namespace of this run so far, with all that still runs inside.
    pub fn clear_namespaces(&self) {
        let names = std::mem::take(&mut state().namespaces);
        delete_namespaces(&names);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        end();
    }
}

/// Ends everything of this process's run. Idempotent.
fn end() {
    let (pids, names, dir, keep) = {
        let mut state = state();
        state.ending = true;
        (
            std::mem::take(&mut state.pids),
            std::mem::take(&mut state.namespaces),
            state.dir.take(),
            state.keep_dir,
        )
    };
    for pid in pids {
        kill_pid(pid);
    }
    state().ending = false;
    delete_namespaces(&names);
    if let Some(dir) = dir {
        if keep {
            let _ = std::fs::write(dir.join("kept"), "");
            eprintln!("files kept in {}", dir.display());
        } else {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

fn kill_pid(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Registers a child while `start` runs, so that an interruption in between cannot miss it.
pub(crate) fn spawn_registered(
    start: impl FnOnce() -> std::io::Result<std::process::Child>,
) -> std::io::Result<std::process::Child> {
    let mut state = state();
    if state.ending {
        return Err(std::io::Error::other("the lab is ending"));
    }
    let child = start()?;
    state.pids.insert(child.id());
    Ok(child)
}

/// Forgets a child that was reaped: its number may be reused by a stranger from now on.
pub(crate) fn forget(pid: u32) {
    state().pids.remove(&pid);
}

pub(crate) fn register_namespace(name: &str) {
    state().namespaces.push(name.to_owned());
}

/// A thread that ends the run on SIGINT, SIGTERM, SIGHUP, or when its time is up.
fn guard(bound: Option<Duration>) -> Result<()> {
    static STARTED: std::sync::Once = std::sync::Once::new();
    let mut result = Ok(());
    STARTED.call_once(|| result = start_guard(bound));
    result
}

fn start_guard(bound: Option<Duration>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .doing("start the guard's runtime")?;
    // Streams are made here, so that from the return on no signal is missed.
    let (mut interrupt, mut terminate, mut hangup) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt()).doing("listen for SIGINT")?,
            signal(SignalKind::terminate()).doing("listen for SIGTERM")?,
            signal(SignalKind::hangup()).doing("listen for SIGHUP")?,
        )
    };
    std::thread::spawn(move || {
        let code = runtime.block_on(async {
            let time_up = async {
                match bound {
                    Some(bound) => tokio::time::sleep(bound).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
                _ = hangup.recv() => 129,
                () = time_up => 124,
            }
        });
        if code == 124 {
            eprintln!("lab: its time is up; cleaning up");
        } else {
            eprintln!("lab: interrupted; cleaning up");
        }
        end();
        std::process::exit(code);
    });
    Ok(())
}

/// The birth of a process in clock ticks since boot: with its number, a name for it that is never reused.
fn birth_of(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces; fields are counted after it. Birth is field 22, name is field 2.
    let rest = stat.rsplit_once(") ")?.1;
    // A zombie has ended, even if nobody has asked how.
    if rest.starts_with(['Z', 'X']) {
        return None;
    }
    rest.split(' ').nth(19).map(str::to_owned)
}

fn is_alive(pid: u32) -> bool {
    let Some(birth) = birth_of(pid) else { return false };
    match std::fs::read_to_string(Path::new(ROOT).join(pid.to_string()).join("born")) {
        Ok(born) => born == birth,
        Err(_) => true, // no record: leave it alone
    }
}

/// The process id in the name of a lab's namespace.
fn owner_of(namespace: &str) -> Option<u32> {
    namespace.strip_prefix("tl")?.split_once('-')?.0.parse().ok()
}

/// Removes the files that failed runs kept.
pub fn forget_kept_files() {
    if let Ok(entries) = std::fs::read_dir(ROOT) {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.parse().is_ok_and(|pid| !is_alive(pid)) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Removes namespaces, processes and folders of runs whose process is gone (but not what a failed run kept, see
/// [`forget_kept_files`]). Returns how many namespaces.
pub fn clean_stale() -> Result<usize> {
    let mut stale = Vec::new();
    if let Ok(entries) = std::fs::read_dir("/run/netns") {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if owner_of(&name).is_some_and(|pid| !is_alive(pid)) {
                stale.push(name);
            }
        }
    }
    delete_namespaces(&stale);
    if let Ok(entries) = std::fs::read_dir(ROOT) {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.parse().is_ok_and(|pid| !is_alive(pid)) && !entry.path().join("kept").exists() {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
    Ok(stale.len())
}

fn delete_namespaces(names: &[String]) {
    let brief = Duration::from_secs(10);
    for name in names {
        // Two rounds: a process may have been born while the first list was read.
        for _ in 0..2 {
            let Ok(list) = Cmd::new("ip").args(["netns", "pids", name]).unregistered().run(brief)
            else {
                break;
            };
            for pid in list.split_whitespace().filter_map(|word| word.parse().ok()) {
                kill_pid(pid);
            }
        }
        let _ = Cmd::new("ip").args(["netns", "del", name]).unregistered().run(brief);
        // A host with a systemd of its own (see `host`) has a cgroup of the same name.
        if let Some(root) = cgroup_root() {
            remove_cgroup(&root.join(name));
        }
    }
}

/// Where the machine's unified cgroup hierarchy is mounted.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(at))
    })
}

/// Removes a cgroup and those below it. One that a dying process is still in cannot be removed yet.
fn remove_cgroup(dir: &Path) {
    let gone = || {
        let _ = remove_cgroup_once(dir);
        !dir.exists()
    };
    let (within, every) = (Duration::from_secs(3), Duration::from_millis(20));
    let _ = crate::wait::for_true("a cgroup to go", within, every, gone);
}

fn remove_cgroup_once(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup_once(&entry.path())?;
        }
    }
    std::fs::remove_dir(dir)
}

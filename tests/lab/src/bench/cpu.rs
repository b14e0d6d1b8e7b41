//! What a span of time cost: of the whole machine from /proc/stat, of single threads from /proc/PID/task.
//!
//! The machine's share is what was not idle: the kernel counts idle time in microseconds, the other columns by looking at
//! each tick. Not counted is time that the hypervisor took, and that of processes which are neither ours nor the kernel's.

use crate::clock;
use crate::error::{Error, IoContext, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Ticks a second of /proc's times.
pub fn ticks_per_second() -> f64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    // 100 on every Linux; the call does not fail.
    ticks.map_or(100.0, |ticks| ticks as f64)
}

/// The machine's times at one moment, in seconds over all processors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    at: Duration,
    cpus: f64,
    idle: f64,
    stolen: f64,
    foreign: f64,
}

/// What the machine spent between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// CPU-seconds.
    pub busy_s: f64,
    /// CPU-seconds of processes that have nothing to do with the run.
    pub foreign_s: f64,
    /// CPU-seconds that the hypervisor took.
    pub stolen_s: f64,
}

impl Machine {
    /// Now, where a span begins. (Looking at every process takes a moment: outside of the span.)
    pub fn begin() -> Result<Machine> {
        let foreign = foreign_ticks()?;
        Self::read(foreign)
    }

    /// Now, where a span ends.
    pub fn end() -> Result<Machine> {
        let mut machine = Self::read(0)?;
        machine.foreign = foreign_ticks()? as f64 / ticks_per_second();
        Ok(machine)
    }

    fn read(foreign: u64) -> Result<Machine> {
        let text = std::fs::read_to_string("/proc/stat").doing("read /proc/stat")?;
        Self::parse(&text, clock::now(), foreign, ticks_per_second())
            .ok_or_else(|| Error::parse("/proc/stat", text))
    }

    fn parse(text: &str, at: Duration, foreign: u64, ticks: f64) -> Option<Machine> {
        let cpus = text.lines().filter(|line| {
            line.strip_prefix("cpu")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let cpus = cpus.count() as f64;
        let total = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let columns: Vec<f64> =
            total.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let column = |at: usize| columns.get(at).map(|value: &f64| value / ticks);
        let idle = column(3)? + column(4)?;
        (cpus > 0.0).then_some(Machine {
            at,
            cpus,
            idle,
            stolen: column(7)?,
            foreign: foreign as f64 / ticks,
        })
    }

    /// What was spent from here to `later`.
    pub fn until(&self, later: &Machine) -> Spent {
        let wall = (later.at.saturating_sub(self.at)).as_secs_f64() * self.cpus;
        let (stolen_s, foreign_s) =
            (later.stolen - self.stolen, (later.foreign - self.foreign).max(0.0));
        let busy = wall - (later.idle - self.idle) - stolen_s - foreign_s;
        Spent { busy_s: busy.max(0.0), foreign_s, stolen_s }
    }
}

/// Ticks of every process that is neither this one, nor below it, nor the kernel's own, with those of their children that
/// are gone: so that a process which ends does not change the sum.
fn foreign_ticks() -> Result<u64> {
    let mut processes = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").doing("read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // One that has just ended is in its parent's sum.
        if let Ok(stat) = std::fs::read_to_string(entry.path().join("stat"))
            && let Some(process) = process_of(&stat)
        {
            processes.insert(pid, process);
        }
    }
    Ok(foreign_of(&processes, std::process::id()))
}

/// Parent, and ticks so far.
type Process = (u32, u64);

fn process_of(stat: &str) -> Option<Process> {
    // The name, in parentheses, may hold anything; the parent is the second word after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    let times = words.get(11..15)?.iter().map(|word| word.parse::<u64>().ok());
    Some((words.get(1)?.parse().ok()?, times.sum::<Option<u64>>()?))
}

fn foreign_of(processes: &BTreeMap<u32, Process>, own: u32) -> u64 {
    // The kernel's threads are children of process 2.
    const KERNEL: u32 = 2;
    let parent = |pid: &u32| processes.get(pid).map(|(parent, _)| *parent);
    // Bounded: the list changes while it is read.
    let line = |pid: u32| std::iter::successors(Some(pid), parent).take(64);
    let is_ours = |pid: u32| line(pid).any(|at| at == own || at == KERNEL);
    processes.iter().filter(|(pid, _)| !is_ours(**pid)).map(|(_, (_, ticks))| ticks).sum()
}

/// The time of some threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ThreadTime {
    /// Seconds in user mode.
    pub user_s: f64,
    /// Seconds in the kernel.
    pub system_s: f64,
}

impl std::ops::AddAssign for ThreadTime {
    fn add_assign(&mut self, other: ThreadTime) {
        self.user_s += other.user_s;
        self.system_s += other.system_s;
    }
}

/// What each thread of some processes has run so far: nanoseconds, and ticks in user mode and in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Threads(BTreeMap<u32, [u64; 3]>);

impl Threads {
    /// Threads of `pids` whose name begins with `prefix`.
    pub fn now(pids: &[u32], prefix: &str) -> Result<Threads> {
        let mut threads = Threads::default();
        for pid in pids {
            let tasks = format!("/proc/{pid}/task");
            for task in std::fs::read_dir(&tasks).doing(tasks.as_str())? {
                let path = task.doing(tasks.as_str())?.path();
                let read = |name: &str| std::fs::read_to_string(path.join(name));
                // A thread may have ended since the list was read.
                let (Ok(name), Ok(schedstat), Ok(stat)) =
                    (read("comm"), read("schedstat"), read("stat"))
                else {
                    continue;
                };
                let id = path.file_name().and_then(|name| name.to_str()?.parse().ok());
                if name.starts_with(prefix)
                    && let Some(id) = id
                {
                    let times = times_of(&schedstat, &stat)
                        .ok_or_else(|| Error::parse(path.display().to_string(), stat))?;
                    threads.0.insert(id, times);
                }
            }
        }
        Ok(threads)
    }

    /// What those that are in both readings spent from here to `later`: the running time by the scheduler, in
    /// nanoseconds, divided as the ticks say.
    pub fn until(&self, later: &Threads) -> ThreadTime {
        let mut all = ThreadTime::default();
        for (id, [ran, user, system]) in &self.0 {
            if let Some([ran_then, user_then, system_then]) = later.0.get(id) {
                let seconds = ran_then.saturating_sub(*ran) as f64 / 1e9;
                let user = user_then.saturating_sub(*user) as f64;
                let ticks = user + system_then.saturating_sub(*system) as f64;
                let user_s = if ticks > 0.0 { seconds * user / ticks } else { 0.0 };
                all += ThreadTime { user_s, system_s: seconds - user_s };
            }
        }
        all
    }
}

fn times_of(schedstat: &str, stat: &str) -> Option<[u64; 3]> {
    let ran = schedstat.split_whitespace().next()?.parse().ok()?;
    // The name, in parentheses, may hold anything; after it, utime and stime are the 12th and 13th.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace().skip(11);
    Some([ran, words.next()?.parse().ok()?, words.next()?.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_what_was_neither_idle_nor_others() {
        let at = |seconds: u64, foreign: u64, line: &str| {
            let text = format!("{line}\ncpu0 1 2 3 4 5 6 7 8 9 0\ncpu1 1 2 3\nintr 5\n");
            Machine::parse(&text, Duration::from_secs(seconds), foreign, 100.0).unwrap()
        };
        let before = at(10, 1000, "cpu  1000 200 300 4000 50 0 70 5 0 0");
        let after = at(14, 1050, "cpu  1100 250 350 4200 100 0 90 15 0 0");
        let spent = before.until(&after);
        // 8 s, of them 2.5 idle or waiting for a disk, 0.1 stolen, 0.5 others'.
        assert!((spent.busy_s - 4.9).abs() < 1e-9, "{spent:?}");
        assert!((spent.foreign_s - 0.5).abs() < 1e-9 && (spent.stolen_s - 0.1).abs() < 1e-9);
        assert_eq!(Machine::parse("cpu  1 2\n", Duration::ZERO, 0, 100.0), None);
    }

    #[test]
    fn foreign_is_what_is_neither_below_us_nor_the_kernels() {
        let stat = "12 (a) b) S 7 2 3 4 5 6 7 8 9 10 1 20 300 4000 13";
        assert_eq!(process_of(stat), Some((7, 4321)));
        let processes = BTreeMap::from([
            (1, (0, 1)),
            (2, (0, 10)),
            (3, (2, 100)),
            (50, (1, 1_000)),
            (60, (50, 10_000)),
            (70, (60, 100_000)),
            (80, (1, 1_000_000)),
        ]);
        assert_eq!(foreign_of(&processes, 60), 1_001_001);
    }

    #[test]
    fn a_threads_time_is_read_past_a_name_with_spaces() {
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 111 222 13";
        assert_eq!(times_of("987 6 5\n", stat), Some([987, 111, 222]));
        assert_eq!(times_of("", stat), None);
    }

    #[test]
    fn running_time_is_divided_by_ticks_and_only_of_threads_in_both() {
        let before = Threads(BTreeMap::from([(1, [1_000_000_000, 10, 10]), (2, [5, 5, 5])]));
        let after = Threads(BTreeMap::from([(1, [3_000_000_000, 40, 20]), (3, [9, 9, 9])]));
        assert_eq!(before.until(&after), ThreadTime { user_s: 1.5, system_s: 0.5 });
    }

    #[test]
    fn this_process_has_threads() {
        let threads = Threads::now(&[std::process::id()], "").unwrap();
        assert!(!threads.0.is_empty());
        assert!(Machine::begin().unwrap().cpus >= 1.0);
    }
}

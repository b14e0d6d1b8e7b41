//! Whether the machine itself stood still: a processor that its host took away.
//!
//! Both instances, the peer and the probes share this machine. When it stops, all of them do, and what follows says nothing
//! about a pair on two hosts. A thread of real-time priority on each processor, above the daemons', sleeps a millisecond at
//! a time and notes how late it wakes. Ordinary load in the machine does not delay it so, but a host that runs something
//! else does. (So does a real-time thread that spins, since the kernel then stops all of them; `pair-saturated` would show
//! that.)

use crate::clock;
use crate::error::{Error, IoContext, Result};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Who wakes later than this was not run.
const LATE: Duration = Duration::from_millis(10);

/// A pause of the machine that is shorter than a heartbeat interval explains nothing.
const STOOD_STILL: Duration = Duration::from_millis(20);
/// It may have come so long before the silence that it led to.
const ABOUT: Duration = Duration::from_millis(100);

/// When each pause began, and how long it was.
type Pauses = Arc<Mutex<Vec<(Duration, Duration)>>>;

/// Watches all processors until dropped.
pub struct StallWatch {
    pauses: Pauses,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl StallWatch {
    /// Starts to watch. Errors: `chrt` or `taskset` (util-linux) failed.
    pub fn start() -> Result<StallWatch> {
        let mut watch = StallWatch {
            pauses: Pauses::default(),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        for processor in 0..processors {
            let (pauses, stop) = (Arc::clone(&watch.pauses), Arc::clone(&watch.stop));
            let (ready, begun) = std::sync::mpsc::channel();
            watch.threads.push(std::thread::spawn(move || {
                let pinned = pin(processor);
                let failed = pinned.is_err();
                let _ = ready.send(pinned);
                if !failed {
                    look(&pauses, &stop);
                }
            }));
            begun.recv().map_err(|_| Error::check("a watching thread ended"))??;
        }
        Ok(watch)
    }

    /// How long the machine stood still about a silence, if that explains it.
    pub fn explains(&self, start: Duration, silence: Duration) -> Option<Duration> {
        let pause = self.longest(start.saturating_sub(ABOUT), start + silence);
        (pause >= STOOD_STILL && pause * 4 >= silence).then_some(pause)
    }

    /// The longest pause of a processor that touches this time.
    pub fn longest(&self, from: Duration, to: Duration) -> Duration {
        let pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let within =
            pauses.iter().filter(|(start, length)| *start <= to && *start + *length >= from);
        within.map(|(_, length)| *length).max().unwrap_or_default()
    }
}

impl Drop for StallWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Ties the calling thread to a processor, above the daemons' real-time priority (1).
fn pin(processor: usize) -> Result<()> {
    let thread = std::fs::read_link("/proc/thread-self").doing("read /proc/thread-self")?;
    let id = thread.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let processor = processor.to_string();
    for words in [["taskset", "-cp", &processor, &id], ["chrt", "-fp", "40", &id]] {
        let [program, arguments @ ..] = words;
        let output = Command::new(program).args(arguments).output().doing(program)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::check(format!("{program}: {said}")));
        }
    }
    Ok(())
}

fn look(pauses: &Pauses, stop: &AtomicBool) {
    let step = Duration::from_millis(1);
    let mut before = clock::now();
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(step);
        let now = clock::now();
        let length = now - before;
        if length >= LATE {
            pauses.lock().unwrap_or_else(PoisonError::into_inner).push((before, length));
        }
        before = now;
    }
}

#[cfg(test)]
impl StallWatch {
    /// One that saw these pauses.
    pub(crate) fn saw(pauses: &[(Duration, Duration)]) -> StallWatch {
        let watch =
            StallWatch { pauses: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        watch.pauses.lock().unwrap_or_else(PoisonError::into_inner).extend(pauses);
        watch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_counts_where_it_touches() {
        let ms = Duration::from_millis;
        let watch = StallWatch::saw(&[(ms(100), ms(50)), (ms(400), ms(20))]);
        assert_eq!(watch.longest(ms(0), ms(99)), ms(0));
        assert_eq!(watch.longest(ms(150), ms(500)), ms(50));
        assert_eq!(watch.longest(ms(151), ms(500)), ms(20));
    }

    #[test]
    fn it_runs_on_every_processor_above_the_daemons() {
        let watch = StallWatch::start().unwrap();
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let real_time = tasks.filter(|task| {
            let path = task.as_ref().unwrap().path().join("stat");
            let stat = std::fs::read_to_string(path).unwrap_or_default();
            // proc(5): fields 40 and 41 are the real-time priority and the policy; the name, field 2, may hold spaces.
            let after_name = stat.rsplit(") ").next().unwrap_or_default().to_owned();
            let fields: Vec<&str> = after_name.split(' ').collect();
            fields.get(37) == Some(&"40") && fields.get(38) == Some(&"1")
        });
        assert_eq!(real_time.count(), watch.threads.len());
    }
}

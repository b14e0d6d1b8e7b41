//! Control's end of all workers, as if they were one: [`esp::Crew`] keeps the books.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread::JoinHandle;

use esp::Crew;
use netio::clock::boottime;
use netio::wake::{EventFd, QueueClosed, QueueSender};

use super::counters::add;
use super::{Counters, Snapshot, WorkerCommand, WorkerEvent, is_long};

/// Control's end of one worker.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) commands: QueueSender<WorkerCommand>,
    pub(super) reports: Receiver<WorkerEvent>,
    pub(super) ike: Receiver<WorkerEvent>,
    /// Long IKE messages in the queue.
    pub(super) long_ike: Arc<AtomicUsize>,
    pub(super) counters: Arc<Counters>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// The next event, reports before IKE messages. Errors: the worker has ended.
    fn poll(&mut self) -> Result<Option<WorkerEvent>, QueueClosed> {
        match self.reports.try_recv() {
            Ok(event) => return Ok(Some(event)),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(QueueClosed),
        }
        match self.ike.try_recv() {
            Ok(event) => {
                if let WorkerEvent::Ike { bytes, .. } | WorkerEvent::SteeredIke { bytes, .. } =
                    &event
                    && is_long(bytes)
                {
                    self.long_ike.fetch_sub(1, Ordering::AcqRel);
                }
                Ok(Some(event))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(QueueClosed),
        }
    }
}

/// Control's end of the workers. Dropping it ends their threads.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
    crew: Crew,
    event: EventFd,
    /// Who is polled next.
    next: usize,
}

impl Workers {
    pub(super) fn new(handles: Vec<Handle>, event: EventFd) -> Self {
        let crew = Crew::new(u8::try_from(handles.len()).unwrap_or(u8::MAX));
        Self { handles, crew, event, next: 0 }
    }

    /// Queues a command: one for shards with every worker, what concerns the pair link with the one that has it.
    /// A steered datagram is dropped and counted while the queue is full: packets may be lost, memory may not grow by
    /// them. Errors: a worker has ended.
    pub fn send(&mut self, command: WorkerCommand) -> Result<(), QueueClosed> {
        if let WorkerCommand::Shard(command) = command {
            let mut all = Ok(());
            let alone = self.handles.len() == 1;
            for (worker, command) in self.crew.give(command) {
                let handle = self.handles.get_mut(usize::from(worker)).ok_or(QueueClosed)?;
                // A shadow's window tops are needed when it takes over, which is a command too. (Of several workers, one may
                // wait to have obeyed as many commands as another: `read_handed`.)
                let quiet = alone && matches!(command, esp::Command::Window { .. });
                let command = WorkerCommand::Shard(command);
                all = all.and(match quiet {
                    true => handle.commands.send_quietly(command),
                    false => handle.commands.send(command),
                });
            }
            return all;
        }
        let first = self.handles.first_mut().ok_or(QueueClosed)?;
        if matches!(command, WorkerCommand::Steered { .. }) && first.commands.backlog() > 0 {
            add(&first.counters.steer_refused, 1);
            return first.commands.flush();
        }
        first.commands.send(command)
    }

    /// Passes on commands kept back while a worker was slow; call it once per turn.
    pub fn flush(&mut self) -> Result<(), QueueClosed> {
        self.handles.iter_mut().try_for_each(|handle| handle.commands.flush())
    }

    /// Set whenever [`Workers::poll`] has something; clear it before polling until `None`.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The next event; of each worker reports before IKE messages. Errors: a worker has ended, which is fatal.
    pub fn poll(&mut self) -> Result<Option<WorkerEvent>, QueueClosed> {
        let mut empty = 0;
        while empty < self.handles.len() {
            let at = self.next;
            self.next = (at + 1) % self.handles.len();
            let handle = self.handles.get_mut(at).ok_or(QueueClosed)?;
            let Some(event) = handle.poll()? else {
                empty += 1;
                continue;
            };
            empty = 0;
            let WorkerEvent::Report(report) = event else { return Ok(Some(event)) };
            let worker = u8::try_from(at).unwrap_or(u8::MAX);
            if let Some(report) = self.crew.take(boottime(), worker, report) {
                return Ok(Some(WorkerEvent::Report(report)));
            }
        }
        Ok(None)
    }

    /// What the workers counted so far. The shards' own counters come by `esp::Command::Query`.
    #[must_use]
    pub fn counters(&self) -> Snapshot {
        let mut all = Snapshot::default();
        for handle in &self.handles {
            all.add(&handle.counters.snapshot());
        }
        all
    }

    /// What one of them counted.
    #[cfg(test)]
    pub(super) fn counters_of(&self, worker: usize) -> Snapshot {
        self.handles[worker].counters.snapshot()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for handle in &mut self.handles {
            let _ = handle.commands.send(WorkerCommand::Stop);
        }
        for handle in &mut self.handles {
            if let Some(thread) = handle.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

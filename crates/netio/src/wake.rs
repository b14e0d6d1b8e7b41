//! How threads wait and wake each other: eventfd, epoll, and the queue from control to a worker.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Duration;

use tokio::io::unix::AsyncFd;

use crate::sys::{check, is_transient};

/// A counter that wakes whoever polls it. Clones share it.
#[derive(Clone, Debug)]
pub struct EventFd(Arc<OwnedFd>);

impl EventFd {
    /// A new, unset event.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let raw = check(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) })?;
        // SAFETY: `raw` was just returned by the kernel and has no other owner.
        Ok(Self(Arc::new(unsafe { OwnedFd::from_raw_fd(raw) })))
    }

    /// Sets the event. A counter at its limit is set already, so nothing can go wrong.
    pub fn set(&self) {
        let one = 1_u64;
        // SAFETY: eight readable bytes, as an eventfd wants.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    }

    /// Clears the event; true when it was set.
    pub fn clear(&self) -> bool {
        let mut count = 0_u64;
        // SAFETY: eight writable bytes, as an eventfd wants.
        let read =
            unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
        read == size_of::<u64>() as isize
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An [`EventFd`] that a tokio task waits for.
#[derive(Debug)]
pub struct AsyncEvent(AsyncFd<EventFd>);

impl AsyncEvent {
    /// Registers the event with the runtime that this is called in.
    pub fn new(event: EventFd) -> io::Result<Self> {
        // SAFETY: the EventFd keeps the descriptor open, and its number the same, for as long as
        // it is registered.
        Ok(Self(unsafe { AsyncFd::register(event) }?))
    }

    /// Waits until the event is set, and clears it. Cancel-safe.
    pub async fn wait(&self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            let was_set = guard.get_inner().clear();
            guard.clear_ready();
            if was_set {
                return Ok(());
            }
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Level-triggered epoll for input, with a number per descriptor.
#[derive(Debug)]
pub struct Poller(OwnedFd);

/// Which descriptors are ready, reused between waits.
pub struct Ready {
    events: [libc::epoll_event; 32],
    count: usize,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.tokens()).finish()
    }
}

impl Default for Ready {
    fn default() -> Self {
        Self { events: [libc::epoll_event { events: 0, u64: 0 }; 32], count: 0 }
    }
}

impl Ready {
    /// The numbers of the descriptors that have input (or an error to be read).
    pub fn tokens(&self) -> impl Iterator<Item = u64> + '_ {
        self.events.iter().take(self.count).map(|event| event.u64)
    }
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let raw = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: `raw` was just returned by the kernel and has no other owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(raw) }))
    }

    /// Whether a descriptor that was added is waited for. Its errors always are.
    pub fn listen(&self, file: &impl AsFd, token: u64, on: bool) -> io::Result<()> {
        let events = if on { libc::EPOLLIN as u32 } else { 0 };
        let mut event = libc::epoll_event { events, u64: token };
        let raw = file.as_fd().as_raw_fd();
        // SAFETY: a valid event that the kernel copies; the descriptor is open because borrowed.
        check(unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_MOD, raw, &raw mut event)
        })?;
        Ok(())
    }

    /// Adds a descriptor. It leaves the set by itself when closed.
    pub fn add(&self, file: &impl AsFd, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        let raw = file.as_fd().as_raw_fd();
        // SAFETY: a valid event that the kernel copies; the descriptor is open because borrowed.
        check(unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, raw, &raw mut event)
        })?;
        Ok(())
    }

    /// Takes a descriptor out of the set.
    pub fn remove(&self, file: &impl AsFd) -> io::Result<()> {
        let raw = file.as_fd().as_raw_fd();
        // SAFETY: EPOLL_CTL_DEL takes no event.
        check(unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, raw, std::ptr::null_mut())
        })?;
        Ok(())
    }

    /// Waits for input; without `timeout` for ever. A signal or the timeout gives an empty set.
    /// Precise to the timer slack (50 µs); to whole milliseconds, rounded up, before Linux 5.11.
    pub fn wait(&self, ready: &mut Ready, timeout: Option<Duration>) -> io::Result<()> {
        ready.count = 0;
        let result = match self.wait_precisely(ready, timeout) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                let millis = match timeout {
                    None => -1,
                    Some(time) => {
                        i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
                    }
                };
                let (events, room) = (ready.events.as_mut_ptr(), ready.events.len() as libc::c_int);
                // SAFETY: the array has room for the given number of events.
                check(unsafe { libc::epoll_wait(self.0.as_raw_fd(), events, room, millis) })
            }
            other => other,
        };
        match result {
            Ok(count) => {
                ready.count = usize::try_from(count).unwrap_or(0);
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn wait_precisely(
        &self,
        ready: &mut Ready,
        timeout: Option<Duration>,
    ) -> io::Result<libc::c_int> {
        let time = timeout.map(|time| libc::timespec {
            tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(time.subsec_nanos()),
        });
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the array has room for the given number of events; the time is null or lives
        // through the call; no signal mask is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.0.as_raw_fd(),
                ready.events.as_mut_ptr(),
                ready.events.len() as libc::c_int,
                time,
                std::ptr::null::<libc::sigset_t>(),
                0_usize,
            )
        };
        check(result as libc::c_int)
    }
}

/// The sending end of [`queue`]: keeps order, loses nothing, never blocks.
#[derive(Debug)]
pub struct QueueSender<T> {
    sender: SyncSender<T>,
    /// What did not fit, oldest first; goes out before anything newer.
    overflow: VecDeque<T>,
    /// Items queued since the receiver was woken last.
    quiet: usize,
    event: EventFd,
}

/// The receiving end of [`queue`]: owned by a worker, which polls [`QueueReceiver::event`].
#[derive(Debug)]
pub struct QueueReceiver<T> {
    receiver: Receiver<T>,
    event: EventFd,
}

/// Items that [`QueueSender::send_quietly`] queues before it wakes the receiver.
const MOST_QUIET: usize = 256;

/// An ordered queue of commands to a worker. `capacity` items fit without the sender keeping
/// any back; the receiver neither locks nor allocates.
pub fn queue<T>(capacity: usize) -> io::Result<(QueueSender<T>, QueueReceiver<T>)> {
    let (sender, receiver) = sync_channel(capacity.max(1));
    let event = EventFd::new()?;
    Ok((
        QueueSender { sender, overflow: VecDeque::new(), quiet: 0, event: event.clone() },
        QueueReceiver { receiver, event },
    ))
}

/// The receiver is gone: its thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the worker has ended")]
pub struct QueueClosed;

impl<T> QueueSender<T> {
    /// Queues one item and wakes the receiver.
    pub fn send(&mut self, item: T) -> Result<(), QueueClosed> {
        self.overflow.push_back(item);
        self.flush()
    }

    /// Queues one item that can wait for the next one that is sent, or for so many more of its kind.
    pub fn send_quietly(&mut self, item: T) -> Result<(), QueueClosed> {
        if !self.overflow.is_empty() || self.quiet >= MOST_QUIET {
            return self.send(item);
        }
        match self.sender.try_send(item) {
            Ok(()) => {
                self.quiet += 1;
                Ok(())
            }
            Err(TrySendError::Full(item)) => self.send(item),
            Err(TrySendError::Disconnected(_)) => Err(QueueClosed),
        }
    }

    /// Moves kept-back items on. Call it once per turn of the control loop.
    pub fn flush(&mut self) -> Result<(), QueueClosed> {
        let mut moved = false;
        let result = loop {
            let Some(item) = self.overflow.pop_front() else { break Ok(()) };
            match self.sender.try_send(item) {
                Ok(()) => moved = true,
                Err(TrySendError::Full(item)) => {
                    self.overflow.push_front(item);
                    break Ok(());
                }
                Err(TrySendError::Disconnected(_)) => break Err(QueueClosed),
            }
        };
        if moved || !self.overflow.is_empty() {
            self.quiet = 0;
            self.event.set();
        }
        result
    }

    /// Items kept back because the receiver is slow.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.overflow.len()
    }
}

impl<T> QueueReceiver<T> {
    /// What to poll: set whenever something was queued that cannot wait.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The next item, `Ok(None)` when there is none. Clear the event before draining, not after:
    /// an item queued in between then sets it again.
    pub fn take(&mut self) -> Result<Option<T>, QueueClosed> {
        match self.receiver.try_recv() {
            Ok(item) => Ok(Some(item)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(QueueClosed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_keeps_order_and_loses_nothing_beyond_its_capacity() {
        let (mut sender, mut receiver) = queue(4).unwrap();
        let poller = Poller::new().unwrap();
        poller.add(receiver.event(), 7).unwrap();
        let reader = std::thread::spawn(move || {
            let mut ready = Ready::default();
            let mut got = Vec::new();
            loop {
                poller.wait(&mut ready, Some(Duration::from_secs(5))).unwrap();
                assert_eq!(
                    ready.tokens().collect::<Vec<_>>(),
                    [7],
                    "woken by the queue, not by the clock"
                );
                receiver.event().clear();
                loop {
                    match receiver.take() {
                        Ok(Some(item)) => got.push(item),
                        Ok(None) => break,
                        Err(QueueClosed) => return got,
                    }
                }
                if got.len() == 1000 {
                    return got;
                }
            }
        });
        for item in 0..1000 {
            sender.send(item).unwrap();
        }
        while sender.backlog() > 0 {
            sender.flush().unwrap();
            std::thread::yield_now();
        }
        assert_eq!(reader.join().unwrap(), (0..1000).collect::<Vec<_>>());
        assert_eq!(sender.send(0), Err(QueueClosed));
    }

    #[test]
    fn what_is_sent_quietly_waits_for_the_next_or_for_many() {
        let (mut sender, mut receiver) = queue(MOST_QUIET * 2).unwrap();
        for item in 0..MOST_QUIET {
            sender.send_quietly(item).unwrap();
        }
        assert!(!receiver.event().clear());
        sender.send_quietly(MOST_QUIET).unwrap();
        assert!(receiver.event().clear(), "many");
        sender.send_quietly(MOST_QUIET + 1).unwrap();
        assert!(!receiver.event().clear());
        sender.send(MOST_QUIET + 2).unwrap();
        assert!(receiver.event().clear(), "the next");
        for item in 0..MOST_QUIET + 3 {
            assert_eq!(receiver.take(), Ok(Some(item)), "in order");
        }
        assert_eq!(receiver.take(), Ok(None));
        for item in 0..MOST_QUIET * 2 {
            sender.send_quietly(item).unwrap();
        }
        receiver.event().clear();
        sender.send_quietly(0).unwrap();
        assert!(receiver.event().clear(), "a full queue");
        assert_eq!(sender.backlog(), 1);
    }

    #[test]
    fn waits_are_precise_below_a_millisecond() {
        let poller = Poller::new().unwrap();
        let mut ready = Ready::default();
        let shortest = (0..20)
            .map(|_| {
                let start = std::time::Instant::now();
                poller.wait(&mut ready, Some(Duration::from_micros(200))).unwrap();
                start.elapsed()
            })
            .min()
            .unwrap();
        assert!(
            shortest >= Duration::from_micros(200) && shortest < Duration::from_micros(900),
            "{shortest:?}"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn tasks_wait_for_events_too() {
        let event = EventFd::new().unwrap();
        let waiter = AsyncEvent::new(event.clone()).unwrap();
        let setter = std::thread::spawn(move || event.set());
        waiter.wait().await.unwrap();
        setter.join().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), waiter.wait()).await.is_err());
    }

    #[test]
    fn events_are_set_and_cleared_and_waits_end() {
        let event = EventFd::new().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&event, 1).unwrap();
        let mut ready = Ready::default();
        poller.wait(&mut ready, Some(Duration::from_millis(1))).unwrap();
        assert_eq!(ready.tokens().count(), 0);
        event.set();
        event.clone().set();
        poller.wait(&mut ready, None).unwrap();
        assert_eq!(ready.tokens().count(), 1);
        assert!(event.clear());
        assert!(!event.clear());
        poller.remove(&event).unwrap();
        event.set();
        poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert_eq!(ready.tokens().count(), 0);
    }
}

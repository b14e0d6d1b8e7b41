//! Datagrams that come one by one and fast are read at intervals, not at each wake-up, as a network card moderates its
//! interrupts: a batch of a few costs the system calls, the wake-up and the write to the TUN of a full one. What comes in
//! runs (UDP_GRO) is a batch already.
//!
//! ```text
//!              few at once, and MANY a second
//!   listening ────────────────────────────────► polled, every INTERVAL
//!       ▲                                          │
//!       └──────────────────────────────────────────┘
//!              fewer than ENOUGH in an interval
//! ```

use std::io;
use std::time::Duration;

use netio::clock::boottime;

use super::{FIRST_RAW, FIRST_SOCKET, State};

/// How often a polled socket is read: what this adds to a packet's way, at most.
const INTERVAL: Duration = Duration::from_micros(50);

/// A read of this many is a batch worth having.
const BATCH_ENOUGH: usize = 16;

/// Datagrams no further apart than this are many.
const MANY: Duration = Duration::from_micros(12);

/// A socket that gives fewer in an interval is listened to again.
const ENOUGH: usize = 3;

/// How one socket is read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// When it was read last.
    last: Duration,
    /// When it is to be read, if it is polled.
    due: Option<Duration>,
}

/// What is to be done about a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Poll,
    Listen,
}

impl Pace {
    /// After a read of `count` datagrams.
    fn after(&mut self, now: Duration, count: usize) -> Change {
        let gap = now.saturating_sub(self.last);
        self.last = now;
        let few = (1..BATCH_ENOUGH).contains(&count);
        match self.due {
            None if few && gap < MANY * count as u32 => {
                self.due = Some(now + INTERVAL);
                Change::Poll
            }
            None => Change::None,
            Some(_) if count < ENOUGH => {
                self.due = None;
                Change::Listen
            }
            Some(_) => {
                self.due = Some(now + INTERVAL);
                Change::None
            }
        }
    }
}

/// Those of all sockets.
pub(super) struct Paces {
    sockets: Vec<Pace>,
    raws: Vec<Pace>,
}

impl Paces {
    /// For so many endpoints' sockets, all listened to.
    pub(super) fn new(count: usize) -> Self {
        Self { sockets: vec![Pace::default(); count], raws: vec![Pace::default(); count] }
    }

    /// When a polled socket is to be read.
    pub(super) fn due(&self) -> Option<Duration> {
        self.sockets.iter().chain(&self.raws).filter_map(|pace| pace.due).min()
    }
}

impl State {
    /// Reads the polled sockets whose time has come.
    pub(super) fn read_polled(&mut self) -> io::Result<()> {
        let Some(due) = self.paces.due() else { return Ok(()) };
        let now = boottime();
        if now < due {
            return Ok(());
        }
        let is_due =
            |pace: Option<&Pace>| pace.and_then(|pace| pace.due).is_some_and(|due| due <= now);
        for at in 0..self.sockets.len() {
            if is_due(self.paces.sockets.get(at)) {
                self.read_paced(at)?;
            }
            if is_due(self.paces.raws.get(at)) {
                self.read_raw_paced(at)?;
            }
        }
        Ok(())
    }

    /// Reads a UDP socket, and decides how it is read from now on.
    pub(super) fn read_paced(&mut self, at: usize) -> io::Result<()> {
        let mut count = 0;
        loop {
            let (got, more) = self.read_socket(at);
            count += got;
            if !more {
                break;
            }
        }
        let (Some(pace), Some(place)) = (self.paces.sockets.get_mut(at), self.sockets.get(at))
        else {
            return Ok(());
        };
        match pace.after(boottime(), count) {
            Change::None => Ok(()),
            change => {
                let token = FIRST_SOCKET + at as u64;
                self.poller.listen(&place.socket, token, change == Change::Listen)
            }
        }
    }

    /// The same for protocol 50.
    pub(super) fn read_raw_paced(&mut self, at: usize) -> io::Result<()> {
        let count = self.read_raw(at);
        let raw = self.sockets.get(at).and_then(|place| place.raw.as_ref());
        let (Some(pace), Some(raw)) = (self.paces.raws.get_mut(at), raw) else { return Ok(()) };
        match pace.after(boottime(), count) {
            Change::None => Ok(()),
            change => {
                let token = FIRST_RAW + at as u64;
                self.poller.listen(raw, token, change == Change::Listen)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn few_at_once_and_many_a_second_are_polled_until_they_are_few() {
        let mut pace = Pace::default();
        assert_eq!(pace.after(us(1000), 1), Change::None, "the first after a pause");
        assert_eq!(pace.after(us(1100), 8), Change::None, "80,000 a second are not many");
        assert_eq!(pace.after(us(1190), 8), Change::Poll);
        assert_eq!(pace.due, Some(us(1240)));
        assert_eq!(pace.after(us(1300), 100), Change::None, "the more the better");
        assert_eq!(pace.due, Some(us(1350)));
        assert_eq!(pace.after(us(1350), 3), Change::None);
        assert_eq!(pace.after(us(1400), 2), Change::Listen);
        assert_eq!(pace.due, None);
    }

    #[test]
    fn runs_are_batches_already_and_nothing_is_no_reason() {
        let mut pace = Pace::default();
        pace.after(us(1000), 44);
        assert_eq!(pace.after(us(1050), 44), Change::None);
        assert_eq!(pace.after(us(1051), 0), Change::None);
        assert_eq!(pace.after(us(1052), 16), Change::None);
        assert_eq!(pace.after(us(1053), 15), Change::Poll);
    }
}

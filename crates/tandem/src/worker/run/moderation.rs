//! Datagrams that come one by one and fast are read at intervals, not at each wake-up, as a network card moderates its
//! interrupts: a batch of a few costs the system calls, the wake-up and the write to the TUN of a full one. What comes in
//! runs (UDP_GRO) is a batch already.
//!
//! ```text
//!              few at once, and MANY a second, three times in a row
//!   listening ─────────────────────────────────────────────────────► polled, every INTERVAL
//!       ▲                                                                │
//!       └────────────────────────────────────────────────────────────────┘
//!              fewer than ENOUGH in an interval, or so many that the next read must not wait
//! ```

use std::io;
use std::time::Duration;

use netio::clock::boottime;

use super::{FIRST_RAW, FIRST_SOCKET, State};

/// How often a polled socket is read. With the slack of the kernel's timers (50 µs unless set), twice that may be added to
/// a packet's way.
const INTERVAL: Duration = Duration::from_micros(50);

/// A read of this many is a batch worth having.
const BATCH_ENOUGH: usize = 16;

/// Datagrams no further apart than this are many.
const MANY: Duration = Duration::from_micros(12);

/// A socket that gives fewer in an interval is listened to again.
const ENOUGH: usize = 3;

/// One that gives as many may hold more than a read takes (32 of UDP), or they come in runs.
const FULL: usize = 32;

/// So many quick reads in a row are a rate; two packets that follow each other are none.
const ROW: u8 = 3;

/// How one socket is read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// When it was read last.
    last: Duration,
    /// When it is to be read, if it is polled.
    due: Option<Duration>,
    /// Quick reads of a few in a row.
    quick: u8,
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
                self.quick += 1;
                if self.quick < ROW {
                    return Change::None;
                }
                self.quick = 0;
                self.due = Some(now + INTERVAL);
                Change::Poll
            }
            None => {
                self.quick = 0;
                Change::None
            }
            Some(_) if !(ENOUGH..FULL).contains(&count) => {
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

    /// A socket that is polled since 1200 µs.
    fn polled() -> Pace {
        let mut pace = Pace::default();
        for at in [1000, 1090, 1120] {
            assert_eq!(pace.after(us(at), 8), Change::None);
        }
        assert_eq!(pace.after(us(1200), 8), Change::Poll);
        assert_eq!(pace.due, Some(us(1250)));
        pace
    }

    #[test]
    fn few_at_once_and_many_a_second_are_polled_until_they_are_few() {
        let mut pace = polled();
        assert_eq!(pace.after(us(1300), 31), Change::None);
        assert_eq!(pace.due, Some(us(1350)));
        assert_eq!(pace.after(us(1350), 3), Change::None);
        assert_eq!(pace.after(us(1400), 2), Change::Listen);
        assert_eq!(pace.due, None);
    }

    #[test]
    fn what_may_hold_more_is_read_at_once() {
        let mut pace = polled();
        assert_eq!(pace.after(us(1300), 32), Change::Listen);
        assert_eq!(pace.due, None);
    }

    #[test]
    fn a_few_close_together_are_no_rate() {
        let mut pace = Pace::default();
        for start in [1000, 2000, 3000] {
            assert_eq!(pace.after(us(start), 1), Change::None, "the first after a pause");
            assert_eq!(pace.after(us(start + 5), 1), Change::None);
            assert_eq!(pace.after(us(start + 10), 1), Change::None);
        }
        for at in 0..9 {
            assert_eq!(pace.after(us(4000 + at * 100), 8), Change::None, "80,000 a second");
        }
    }

    #[test]
    fn runs_are_batches_already_and_nothing_is_no_reason() {
        let mut pace = Pace::default();
        for at in 0..9 {
            for count in [44, 0, 16] {
                assert_eq!(pace.after(us(1000 + at), count), Change::None);
            }
        }
    }
}

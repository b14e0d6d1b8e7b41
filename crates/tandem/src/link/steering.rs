//! The worker's end of the pair link: it receives what the other instance hands over, and hands over, without the
//! control thread.
//!
//! ```text
//!            ┌─ purpose 2: steered ──► SteerPort of the worker ── open ──► its shard
//!  UDP port ─┤ (the kernel sorts)         │ strays                 ▲
//!            └─ the rest: heartbeats ──► control's socket ─ strays ┘
//! ```
//! Both share the pair port, so that the other side, whatever its release, and firewalls between know one. The kernel may
//! put a datagram into the wrong socket where a network card joins datagrams (`netio::udp::SharedPort`): such a stray is
//! passed on unopened, because each purpose has its replay window at one place.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use netio::udp::{BatchSocket, RecvMeta, SendItem};

use super::datagram::{self, Opener, Purpose, Refused};
use super::steer::SteerHead;
use super::{Shared, lock};

/// The newest stream's opener, on its way from the manager to the worker.
#[derive(Default)]
pub(super) struct Handover {
    /// Counts up with each stream, so that the worker takes the lock once a stream.
    streams: AtomicU64,
    opener: Mutex<Option<Opener>>,
}

impl Handover {
    pub(super) fn put(&self, opener: Option<Opener>) {
        *lock(&self.opener) = opener;
        self.streams.fetch_add(1, Ordering::Release);
    }
}

/// One link's socket for steered packets.
#[derive(Debug)]
pub(super) struct SteerSocket {
    pub(super) remote: SocketAddr,
    pub(super) socket: BatchSocket,
}

/// What came over the pair link.
#[derive(Debug)]
pub enum Arrival<'a> {
    /// An authenticated packet that the other instance handed over, not seen before.
    Steered(SteerHead, &'a [u8]),
    /// Nothing for a worker: for control, unopened.
    Stray(&'a [u8]),
    /// Dropped and counted.
    Refused,
}

/// The worker's end. It owns its sockets; nothing here waits or allocates.
pub struct SteerPort {
    sockets: Vec<SteerSocket>,
    shared: Arc<Shared>,
    opener: Option<Opener>,
    /// The stream that the opener is of.
    stream: u64,
}

impl std::fmt::Debug for SteerPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.sockets).finish()
    }
}

impl SteerPort {
    pub(super) fn new(sockets: Vec<SteerSocket>, shared: Arc<Shared>) -> Self {
        Self { sockets, shared, opener: None, stream: 0 }
    }

    /// The socket of each link, to be waited for.
    pub fn sockets(&self) -> impl Iterator<Item = &BatchSocket> {
        self.sockets.iter().map(|place| &place.socket)
    }

    /// Receives on a link, if nothing is left of the last time. False when there is nothing.
    pub fn refill(&mut self, link: u8) -> bool {
        let Some(place) = self.sockets.get_mut(usize::from(link)) else { return false };
        place.socket.refill();
        place.socket.has_more()
    }

    /// The next datagram of those received on a link.
    pub fn take(&mut self, link: u8) -> Option<Arrival<'_>> {
        let place = self.sockets.get_mut(usize::from(link))?;
        let (meta, datagram) = place.socket.take()?;
        let RecvMeta { from, truncated, .. } = meta;
        if from != place.remote {
            super::Counters::add(&self.shared.counters.strangers);
            return Some(Arrival::Refused);
        }
        if truncated {
            self.shared.counters.refuse(Refused::Short);
            return Some(Arrival::Refused);
        }
        match sort(datagram) {
            Ok(Purpose::Heartbeat) => return Some(Arrival::Stray(datagram)),
            Err(refused) => {
                self.shared.counters.refuse(refused);
                return Some(Arrival::Refused);
            }
            Ok(Purpose::Steer) => {}
        }
        renew(&self.shared.steer_in, &mut self.stream, &mut self.opener);
        Some(open(&self.shared, self.opener.as_mut(), link, datagram))
    }

    /// Opens a datagram that had come to control's socket of a link.
    pub fn open<'d>(&mut self, link: u8, datagram: &'d mut [u8]) -> Arrival<'d> {
        renew(&self.shared.steer_in, &mut self.stream, &mut self.opener);
        open(&self.shared, self.opener.as_mut(), link, datagram)
    }

    /// Sends sealed packets on a link, in order, runs of equal length at once. Gives how many the kernel took.
    pub fn send<'a>(&mut self, link: u8, sealed: impl Iterator<Item = &'a [u8]>) -> usize {
        let Some(SteerSocket { remote, socket }) = self.sockets.get_mut(usize::from(link)) else {
            return 0;
        };
        let to = *remote;
        socket.send(sealed.map(|bytes| SendItem { to, bytes, tos: 0 }))
    }
}

/// Whose a datagram is. Nothing is authenticated yet: what cannot be a heartbeat is not copied for control.
fn sort(datagram: &[u8]) -> Result<Purpose, Refused> {
    match datagram::purpose_of(datagram)? {
        Purpose::Heartbeat if datagram.len() > ha::config::HEARTBEAT_MAX + datagram::OVERHEAD => {
            Err(Refused::Unknown)
        }
        purpose => Ok(purpose),
    }
}

/// Takes the opener of a newer stream, if there is one.
fn renew(handover: &Handover, stream: &mut u64, opener: &mut Option<Opener>) {
    let newest = handover.streams.load(Ordering::Acquire);
    if newest != *stream {
        *stream = newest;
        if let Some(newer) = lock(&handover.opener).take() {
            *opener = Some(newer);
        }
    }
}

fn open<'d>(
    shared: &Shared,
    opener: Option<&mut Opener>,
    link: u8,
    datagram: &'d mut [u8],
) -> Arrival<'d> {
    let opened = datagram::purpose_of(datagram)
        .and_then(|_| opener.ok_or(Refused::OtherKey)?.open(link, datagram))
        .and_then(|plain| SteerHead::decode(plain).ok_or(Refused::Unknown));
    match opened {
        Ok((head, packet)) => {
            super::Counters::add(&shared.counters.steered);
            Arrival::Steered(head, packet)
        }
        Err(refused) => {
            shared.counters.refuse(refused);
            Arrival::Refused
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_a_heartbeat_is_passed_on_to_control() {
        let longest = ha::config::HEARTBEAT_MAX + datagram::OVERHEAD;
        assert_eq!(sort(&vec![1; longest]), Ok(Purpose::Heartbeat));
        assert_eq!(sort(&vec![1; longest + 1]), Err(Refused::Unknown));
        assert_eq!(sort(&vec![2; longest + 1]), Ok(Purpose::Steer));
        assert_eq!(sort(&[1; 4]), Err(Refused::Short));
    }
}

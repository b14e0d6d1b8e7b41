//! Buffers that are allocated once: a [`Batch`] of [`Slot`]s that the worker
//! fills, the shard works on in place, and the worker writes out.
//!
//! ```text
//!  slot:  | HEADROOM | packet …                    | free … | TAILROOM |
//!  read:              ^ Slot::room() gives this part to recv or read
//!  seal:    SPI seq IV| packet | pad trailer tag
//!  open:              | SPI seq IV | inner | pad trailer tag
//! ```

use core::net::SocketAddr;

use wire::id::{EndpointId, EspSpi};
use wire::ip::Ecn;

use crate::reason::Reason;

/// Bytes in front of a packet as read: for the ESP header and IV (16), or for
/// the header of a steering frame.
pub const HEADROOM: usize = 64;

/// Bytes kept free behind a packet as read: for ESP padding, trailer and tag
/// (at most 21), or for the tag of a steering frame.
pub const TAILROOM: usize = 32;

/// Default size of one slot in bytes, headroom and tailroom included.
pub const SLOT_LEN: usize = 2048;

/// Size of a slot for inner packets of up to `mtu` bytes: such a packet fits as
/// read, and as it is received from a peer that pads as much as it can (RFC 4303
/// §2.4), behind an IPv4 header with all options. [`SLOT_LEN`] up to an
/// Ethernet's MTU; 9,472 bytes for 9,000.
#[must_use]
pub const fn slot_len(mtu: usize) -> usize {
    const IP_HEADER: usize = 60;
    const PADDING: usize = 255;
    const CACHE_LINE: usize = 64;
    let received = IP_HEADER + wire::esp::OVERHEAD + PADDING + mtu;
    let least = (HEADROOM + received + TAILROOM).next_multiple_of(CACHE_LINE);
    if least > SLOT_LEN { least } else { SLOT_LEN }
}

const _: () = assert!(slot_len(1500) == SLOT_LEN && slot_len(9000) == 9472);

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the LAN into a tunnel.
    Outbound,
    /// From a tunnel to the LAN.
    Inbound,
}

/// What is to be done with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not looked at yet.
    Pending,
    /// [`Slot::packet`] is an ESP packet: send it.
    Send {
        /// The endpoint whose socket it leaves by.
        endpoint: EndpointId,
        /// Source of the outer packet.
        from: SocketAddr,
        /// Destination of the outer packet.
        to: SocketAddr,
        /// In UDP (RFC 3948), or else as IP protocol 50, where the ports of
        /// `from` and `to` mean nothing.
        udp_encap: bool,
    },
    /// [`Slot::packet`] is an inner packet: write it to the TUN.
    Deliver {
        /// The endpoint it came through.
        endpoint: EndpointId,
    },
    /// [`Slot::packet`] is as it was read: hand it to the instance that owns
    /// the endpoint, with [`Slot::direction`]; back, if it is [`Slot::steered`].
    Steer {
        /// The endpoint that it belongs to.
        endpoint: EndpointId,
    },
    /// Hand the slot to another worker's [`Shard::handed`](crate::Shard::handed), in order.
    Hand {
        /// The worker.
        worker: u8,
    },
    /// The packet has moved into a queue of the shard; the slot is empty.
    Held,
    /// Dropped, and counted.
    Drop(Reason),
}

/// How a packet came over the pair link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steered {
    /// The endpoint that the other instance chose for it.
    pub endpoint: EndpointId,
    /// It had come from here, but the endpoint had left meanwhile.
    pub back: bool,
}

/// What a worker that handed a packet on had decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handed {
    /// The SA that it goes by, or came by.
    pub(crate) spi_in: Option<EspSpi>,
    /// It is to be steered for this endpoint, which one worker does for all.
    pub(crate) steer: Option<EndpointId>,
    /// It was to be steered, and came back: it is older than whatever waits for it.
    pub(crate) back: bool,
    /// How often it was handed on.
    pub(crate) hops: u8,
}

/// One packet's buffer, with what is known about the packet.
pub struct Slot {
    buf: Box<[u8]>,
    start: usize,
    len: usize,
    /// Came from the other instance over the pair link. Set by the worker.
    pub steered: Option<Steered>,
    /// ECN field of the outer header, if the socket tells it. Set by the
    /// worker for inbound packets.
    pub ecn: Ecn,
    /// Source of the outer packet. Set by the worker for inbound packets that
    /// came in UDP, so that a peer behind a NAT can be followed.
    pub peer: Option<SocketAddr>,
    /// Came from another worker of this instance.
    pub(crate) handed: Option<Handed>,
    pub(crate) direction: Direction,
    pub(crate) verdict: Verdict,
    pub(crate) traffic_class: u8,
}

impl Slot {
    /// A slot of `slot_len` bytes, headroom and tailroom included.
    #[must_use]
    pub fn new(slot_len: usize) -> Self {
        let slot_len = slot_len.max(HEADROOM + TAILROOM);
        Self {
            buf: vec![0; slot_len].into_boxed_slice(),
            start: HEADROOM,
            len: 0,
            steered: None,
            ecn: Ecn::NotEct,
            peer: None,
            handed: None,
            direction: Direction::Outbound,
            verdict: Verdict::Pending,
            traffic_class: 0,
        }
    }

    /// Forgets the packet, keeps the buffer.
    pub fn clear(&mut self) {
        self.start = HEADROOM;
        self.len = 0;
        self.steered = None;
        self.ecn = Ecn::NotEct;
        self.peer = None;
        self.handed = None;
        self.verdict = Verdict::Pending;
        self.traffic_class = 0;
    }

    /// Where the worker reads a packet into; [`Slot::set_len`] says how much
    /// came.
    pub fn room(&mut self) -> &mut [u8] {
        let end = self.buf.len() - TAILROOM;
        self.buf.get_mut(HEADROOM..end).unwrap_or_default()
    }

    /// Says that the first `len` bytes of [`Slot::room`] are a packet. A
    /// length beyond the room is cut to it.
    pub fn set_len(&mut self, len: usize) {
        self.start = HEADROOM;
        self.len = len.min(self.buf.len() - TAILROOM - HEADROOM);
        self.verdict = Verdict::Pending;
    }

    /// Copies a packet in. `false`, and an empty slot, if it does not fit.
    pub fn fill(&mut self, packet: &[u8]) -> bool {
        match self.room().get_mut(..packet.len()) {
            Some(room) => {
                room.copy_from_slice(packet);
                self.set_len(packet.len());
                true
            }
            None => {
                self.set_len(0);
                false
            }
        }
    }

    /// The packet as it stands.
    #[must_use]
    pub fn packet(&self) -> &[u8] {
        self.buf.get(self.start..self.start + self.len).unwrap_or_default()
    }

    /// The packet as it stands, to be changed.
    #[must_use]
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.buf.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }

    /// What the shard decided.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Which way the packet goes: by the call it was given to.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Traffic class (DSCP and ECN) for the outer header of a
    /// [`Verdict::Send`], copied from the inner one (RFC 4301 §5.1.2, RFC 6040
    /// §4.1). A sender that cannot set it sends 0, which RFC 6040 calls
    /// compatibility mode.
    #[must_use]
    pub fn outer_traffic_class(&self) -> u8 {
        self.traffic_class
    }

    /// Takes `head` more bytes in front of the packet and `tail` behind it.
    /// `None` if they are not there.
    pub fn widen(&mut self, head: usize, tail: usize) -> Option<&mut [u8]> {
        let start = self.start.checked_sub(head)?;
        let len = self.len.checked_add(head)?.checked_add(tail)?;
        let end = start.checked_add(len)?;
        self.buf.get(start..end)?;
        self.start = start;
        self.len = len;
        self.buf.get_mut(start..end)
    }

    /// Cuts `head` bytes off the front, then keeps `len` of the rest. `false`,
    /// and nothing changed, if there are fewer.
    pub fn narrow(&mut self, head: usize, len: usize) -> bool {
        if head.checked_add(len).is_none_or(|end| end > self.len) {
            return false;
        }
        self.start += head;
        self.len = len;
        true
    }
}

impl core::fmt::Debug for Slot {
    /// Without the packet: it may be plaintext.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Slot")
            .field("len", &self.len)
            .field("steered", &self.steered)
            .field("direction", &self.direction)
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

/// Slots of one turn of a worker.
#[derive(Debug)]
pub struct Batch {
    slots: Vec<Slot>,
    used: usize,
}

impl Batch {
    /// A batch of `count` slots of `slot_len` bytes each. The only allocation.
    #[must_use]
    pub fn new(count: usize, slot_len: usize) -> Self {
        Self { slots: (0..count).map(|_| Slot::new(slot_len)).collect(), used: 0 }
    }

    /// How many packets it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many packets it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether no more packets fit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.used == self.slots.len()
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// The unused slots, for a read of several packets at once; then
    /// [`Batch::commit`].
    pub fn unused(&mut self) -> &mut [Slot] {
        let unused = self.slots.get_mut(self.used..).unwrap_or_default();
        for slot in unused.iter_mut() {
            slot.clear();
        }
        unused
    }

    /// Says that the first `count` of [`Batch::unused`] are now in use.
    pub fn commit(&mut self, count: usize) {
        self.used = (self.used + count).min(self.slots.len());
    }

    /// The next unused slot, cleared and in use from now on.
    pub fn push(&mut self) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(self.used)?;
        self.used += 1;
        slot.clear();
        Some(slot)
    }

    /// Gives the last pushed slot back.
    pub fn pop(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// The slots in use, in order of arrival.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        self.slots.get(..self.used).unwrap_or_default()
    }

    /// The slots in use, in order of arrival.
    pub fn slots_mut(&mut self) -> &mut [Slot] {
        self.slots.get_mut(..self.used).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widen_and_narrow_keep_inside_the_buffer() {
        let mut slot = Slot::new(256);
        assert!(slot.fill(b"hello"));
        assert_eq!(slot.widen(HEADROOM, 10).map(|p| p.len()), Some(HEADROOM + 15));
        assert!(slot.widen(1, 0).is_none());
        assert!(slot.widen(0, 256).is_none());
        assert!(slot.narrow(HEADROOM, 5));
        assert_eq!(slot.packet(), b"hello");
        assert!(!slot.narrow(1, 5));
        assert!(!slot.narrow(usize::MAX, 5));
        assert_eq!(slot.packet(), b"hello");
        assert!(slot.narrow(1, 3));
        assert_eq!(slot.packet_mut(), b"ell");
    }

    #[test]
    fn a_packet_that_does_not_fit_is_refused() {
        let mut slot = Slot::new(HEADROOM + TAILROOM + 4);
        assert!(slot.fill(&[1; 4]));
        assert!(!slot.fill(&[1; 5]));
        assert!(slot.packet().is_empty());
        slot.set_len(1000);
        assert_eq!(slot.packet().len(), 4);
    }

    #[test]
    fn batches_fill_and_clear() {
        let mut batch = Batch::new(3, 256);
        assert!(batch.push().is_some_and(|slot| slot.fill(b"a")));
        assert_eq!(batch.unused().len(), 2);
        batch.unused()[0].fill(b"b");
        batch.commit(1);
        assert_eq!(batch.slots().iter().map(Slot::packet).collect::<Vec<_>>(), [b"a", b"b"]);
        batch.commit(9);
        assert!(batch.is_full());
        assert!(batch.push().is_none());
        batch.pop();
        assert_eq!(batch.len(), 2);
        batch.clear();
        assert!(batch.is_empty() && batch.slots().is_empty());
    }
}

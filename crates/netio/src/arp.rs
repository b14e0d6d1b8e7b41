//! Who answers for a virtual address: ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861).
//!
//! The kernel is kept from answering (`arp_ignore=1`, the address lives on the TUN), because the
//! kernel of a stopped owner would go on (architecture.md, "Addresses live and die with the
//! process"). This room reads the questions from a packet socket and answers only while the
//! caller's predicate says that we own the address and are inside the fence; the predicate is
//! asked for each answer, right before it is sent.
//!
//! [`packet`] is pure: total parsers and builders. [`Responder`] is the socket.

pub mod packet;
mod socket;

pub use socket::{Responder, Served};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// To everyone on the segment.
    pub const BROADCAST: Self = Self([0xff; 6]);
}

impl std::fmt::Debug for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

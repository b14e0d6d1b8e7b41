//! What two gateways say to each other beside the record log: ceilings, window tops, final counters.
//!
//! `ha` carries these as opaque bytes in authenticated frames. They are not part of the log nor of its digest,
//! because they change with traffic. Numbered fields (minicbor), so that neighbouring releases understand each
//! other; every list is bounded when it is decoded.

use minicbor::{CborLen, Decode, Encode};

/// Most entries in one message; senders split, receivers refuse more.
pub const MAX_ENTRIES: usize = 4096;

/// A message on `ha`'s side channel.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, CborLen)]
pub enum Side {
    /// The owner wants to use outbound sequence numbers up to and including these ceilings. Acknowledged.
    #[n(0)]
    Ceilings(#[n(0)] Vec<Ceiling>),
    /// The owner has accepted inbound sequence numbers up to these tops. Not acknowledged.
    #[n(1)]
    Tops(#[n(0)] Vec<Top>),
}

/// One SA's lease. Sequence numbers count packets, from 1 (RFC 4303 §2.2); 2³² is "all used".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, CborLen)]
pub struct Ceiling {
    /// Our inbound SPI: it names the Child SA on both instances.
    #[n(0)]
    pub spi_in: u32,
    /// The first number that may not be used.
    #[n(1)]
    pub ceiling: u64,
}

/// One SA's inbound window top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, CborLen)]
pub struct Top {
    /// Our inbound SPI.
    #[n(0)]
    pub spi_in: u32,
    /// Highest sequence number accepted.
    #[n(1)]
    pub top: u32,
}

/// The payload of a switchover's grant and of a heal: the exact counters of every Child SA of one endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, CborLen)]
pub struct Counters {
    /// One entry per Child SA.
    #[n(0)]
    pub sas: Vec<ExactSa>,
}

/// Where one Child SA stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, CborLen)]
pub struct ExactSa {
    /// Our inbound SPI.
    #[n(0)]
    pub spi_in: u32,
    /// The first outbound sequence number not used yet; 2³² when all are.
    #[n(1)]
    pub next_seq: u64,
    /// The first number that the new owner may not use before it has a lease of its own.
    #[n(2)]
    pub ceiling: u64,
    /// The inbound window, by `esp::Window::to_bytes`.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub window: Vec<u8>,
}

impl ExactSa {
    /// For the wire.
    pub fn of(counters: &esp::Counters) -> Self {
        Self {
            spi_in: counters.spi_in.0,
            next_seq: counters.next_seq,
            ceiling: counters.ceiling,
            window: counters.window.to_bytes().to_vec(),
        }
    }

    /// For a shard; `None` if the window's bytes are not one.
    pub fn counters(&self) -> Option<esp::Counters> {
        Some(esp::Counters {
            spi_in: wire::id::EspSpi(self.spi_in),
            next_seq: self.next_seq,
            ceiling: self.ceiling,
            window: esp::Window::from_bytes(&self.window)?,
        })
    }
}

/// Encodes; cannot fail for these types, as a `Vec` takes every write.
pub fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing to a Vec is infallible and none of these types has a failing encoder.
    let _ = minicbor::encode(value, &mut out);
    out
}

/// Decodes a whole message; trailing bytes and lists over [`MAX_ENTRIES`] are refused.
pub fn decode<'b, T: Decode<'b, ()> + Bounded>(bytes: &'b [u8]) -> Option<T> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let value: T = decoder.decode().ok()?;
    (decoder.position() == bytes.len() && value.entries() <= MAX_ENTRIES).then_some(value)
}

/// How many entries a decoded message holds.
pub trait Bounded {
    /// Entries, for the bound.
    fn entries(&self) -> usize;
}

impl Bounded for Side {
    fn entries(&self) -> usize {
        match self {
            Self::Ceilings(list) => list.len(),
            Self::Tops(list) => list.len(),
        }
    }
}

impl Bounded for Counters {
    fn entries(&self) -> usize {
        // A grant covers a whole endpoint in one frame; `ha` bounds the frame.
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refuses_trailing_bytes() {
        let side = Side::Ceilings(vec![Ceiling { spi_in: 0x1234_5678, ceiling: 1 << 20 }]);
        let mut bytes = encode(&side);
        assert_eq!(decode::<Side>(&bytes), Some(side));
        bytes.push(0);
        assert_eq!(decode::<Side>(&bytes), None);
    }

    #[test]
    fn refuses_lists_over_the_bound() {
        let tops = (0..=MAX_ENTRIES as u32).map(|spi_in| Top { spi_in, top: 1 }).collect();
        assert_eq!(decode::<Side>(&encode(&Side::Tops(tops))), None);
    }

    #[test]
    fn format_of_release_1() {
        // Golden bytes: a change here breaks rolling upgrades (ha.md, codec).
        let side = Side::Tops(vec![Top { spi_in: 1, top: 2 }]);
        assert_eq!(encode(&side), [0x82, 0x01, 0x81, 0x81, 0x82, 0x01, 0x02]);
    }
}

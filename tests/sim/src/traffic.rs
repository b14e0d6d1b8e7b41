//! Numbered inner packets, both ways, all the time.
//!
//! ```text
//!   IPv4 (20) │ UDP (8) │ MARKER (8) │ flow (8) │ number (8)
//! ```

use std::net::Ipv4Addr;

use crate::clock::Nanos;
use crate::scene::{INSIDE, beyond};

/// Inside every inner packet: where it shows on the WAN, something left in clear.
pub const MARKER: [u8; 8] = *b"\xf0inner\x9d!";
const LEN: usize = 20 + 8 + 24;

/// One direction to or from what lies behind one peer.
#[derive(Debug, Clone)]
pub struct Flow {
    /// Which peer.
    pub peer: usize,
    /// From behind the pair.
    pub outward: bool,
    /// Number of the next packet.
    pub next: u64,
    /// Packets that arrived.
    pub arrived: u64,
    /// When the last one came.
    pub last: Nanos,
    /// Which arrived, one bit each.
    seen: Vec<u64>,
}

impl Flow {
    /// Packets that did not arrive, of those from `first` up to and without `end`.
    #[must_use]
    pub fn missing(&self, first: u64, end: u64) -> Vec<u64> {
        let came = |n: &u64| {
            self.seen.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1)
        };
        (first..end).filter(|n| !came(n)).collect()
    }
}

/// All flows.
#[derive(Debug, Default)]
pub struct Traffic {
    /// By number.
    pub flows: Vec<Flow>,
}

impl Traffic {
    /// Two flows for each peer.
    #[must_use]
    pub fn new(peers: usize) -> Self {
        let flow = |n: usize| Flow {
            peer: n / 2,
            outward: n.is_multiple_of(2),
            next: 0,
            arrived: 0,
            last: 0,
            seen: Vec::new(),
        };
        Self { flows: (0..peers * 2).map(flow).collect() }
    }

    /// The next packet of a flow.
    pub fn packet(&mut self, flow: usize) -> Option<Vec<u8>> {
        let f = self.flows.get_mut(flow)?;
        let (src, dst) =
            if f.outward { (INSIDE, beyond(f.peer)) } else { (beyond(f.peer), INSIDE) };
        let number = f.next;
        f.next += 1;
        Some(build(src, dst, flow as u64, number))
    }

    /// An inner packet came out of a tunnel. Why it cannot be one of ours, if so.
    ///
    /// # Errors
    /// One sentence.
    pub fn arrive(&mut self, now: Nanos, at_pair: bool, packet: &[u8]) -> Result<(), String> {
        let body = packet.get(28..LEN).ok_or("an inner packet came out cut short")?;
        let word = |at: usize| {
            let bytes = body.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(u64::MAX, u64::from_be_bytes)
        };
        let number = word(16);
        let flow =
            self.flows.get_mut(word(8) as usize).ok_or("an inner packet of no flow came out")?;
        if flow.outward == at_pair || number >= flow.next {
            return Err(format!("inner packet {number} came out where it does not belong"));
        }
        let at = (number / 64) as usize;
        if flow.seen.len() <= at {
            flow.seen.resize(at + 1, 0);
        }
        if let Some(word) = flow.seen.get_mut(at) {
            *word |= 1 << (number % 64);
        }
        flow.arrived += 1;
        flow.last = now;
        Ok(())
    }
}

fn build(src: Ipv4Addr, dst: Ipv4Addr, flow: u64, number: u64) -> Vec<u8> {
    let mut p = vec![0; 12];
    if let Some(head) = p.get_mut(..10) {
        // Version 4, five words; total length; TTL 64; UDP.
        head.copy_from_slice(&[0x45, 0, 0, LEN as u8, 0, 0, 0, 0, 64, 17]);
    }
    p.extend(src.octets());
    p.extend(dst.octets());
    let mut sum: u32 = p
        .chunks(2)
        .map(|w| {
            u32::from(w.first().copied().unwrap_or(0)) << 8
                | u32::from(w.get(1).copied().unwrap_or(0))
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if let Some(check) = p.get_mut(10..12) {
        check.copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    p.extend([0x27, 0x10, 0x27, 0x10, 0, (LEN - 20) as u8, 0, 0]);
    p.extend(MARKER);
    p.extend(flow.to_be_bytes());
    p.extend(number.to_be_bytes());
    p
}

/// Whether bytes on the WAN show an inner packet.
#[must_use]
pub fn in_clear(bytes: &[u8]) -> bool {
    bytes.windows(MARKER.len()).any(|window| window == MARKER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_well_formed_and_counted() {
        let mut traffic = Traffic::new(1);
        let packet = traffic.packet(0).unwrap();
        let parsed = wire::ip::Packet::parse(&packet).unwrap();
        assert_eq!(parsed.dst, std::net::IpAddr::V4(beyond(0)));
        assert!(in_clear(&packet));
        traffic.arrive(5, false, &packet).unwrap();
        assert_eq!((traffic.flows[0].arrived, traffic.flows[0].last), (1, 5));
        traffic.packet(0);
        assert_eq!(traffic.flows[0].missing(0, 2), [1]);
        assert!(traffic.arrive(5, true, &packet).is_err(), "it came back to where it began");
        let back = traffic.packet(1).unwrap();
        traffic.arrive(6, true, &back).unwrap();
        assert!(!in_clear(&[7; 100]));
    }
}

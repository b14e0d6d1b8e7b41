//! Numbered inner packets, both ways, all the time.
//!
//! ```text
//!   IPv4 (20) │ UDP (8) │ MARKER (8) │ flow (8) │ number (8)
//! ```

use std::fmt;
use std::net::Ipv4Addr;

use crate::clock::Nanos;
use crate::dice::Dice;
use crate::pins::Pinned;
use crate::scene::{INSIDE, Scene, beyond};

/// Inside every inner packet: where it shows on the WAN, something left in clear.
pub const MARKER: [u8; 8] = *b"\xf0inner\x9d!";
const LEN: usize = 20 + 8 + 24;
/// Flows outward for each peer, where there are two endpoints.
const OUTWARD: usize = 4;

/// Which packet it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// Its flow.
    pub flow: usize,
    /// Its number.
    pub number: u64,
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.flow, self.number)
    }
}

/// One direction to or from what lies behind one peer.
#[derive(Debug, Clone)]
pub struct Flow {
    /// Which peer.
    pub peer: usize,
    /// From behind the pair.
    pub outward: bool,
    /// Outward: the endpoint whose address is the next hop. Else the endpoint whose tunnel the peer takes.
    pub via: usize,
    ports: (u16, u16),
    /// It sends nothing before.
    pub rests_until: Nanos,
    /// Number of the next packet.
    pub next: u64,
    /// Packets that arrived.
    pub arrived: u64,
    /// When the last one came.
    pub last: Nanos,
    /// Outward: which instance got the packets from a number on.
    entries: Vec<(u64, usize)>,
    /// Outward: the tunnel of the newest packet.
    pinned: Option<Pinned>,
    /// The newest number that left the pair.
    newest: Option<u64>,
    /// Numbers that left the pair after a newer one.
    pub late: Vec<u64>,
    /// Its order is not promised: its next hop moved, and its tunnel is elsewhere.
    pub unordered: bool,
    /// Towards the pair, by number: the place in the order of arrivals there.
    places: Vec<u32>,
    arrivals: u32,
    /// Which arrived.
    seen: Bits,
    /// Which left the pair.
    left: Bits,
}

/// A set of numbers, one bit each.
#[derive(Debug, Clone, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn has(&self, n: u64) -> bool {
        self.0.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1)
    }

    fn add(&mut self, n: u64) {
        let at = (n / 64) as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        if let Some(word) = self.0.get_mut(at) {
            *word |= 1 << (n % 64);
        }
    }
}

impl Flow {
    fn new(peer: usize, outward: bool, via: usize, ports: (u16, u16)) -> Self {
        Self {
            peer,
            outward,
            via,
            ports,
            rests_until: 0,
            next: 0,
            arrived: 0,
            last: 0,
            entries: Vec::new(),
            pinned: None,
            newest: None,
            late: Vec::new(),
            unordered: false,
            places: Vec::new(),
            arrivals: 0,
            seen: Bits::default(),
            left: Bits::default(),
        }
    }

    /// Packets that did not arrive, of those from `first` up to and without `end`.
    #[must_use]
    pub fn missing(&self, first: u64, end: u64) -> Vec<u64> {
        (first..end).filter(|n| !self.seen.has(*n)).collect()
    }

    /// Those of them that the pair lost, on a WAN that may lose others.
    #[must_use]
    pub fn missing_at_pair(&self, first: u64, end: u64) -> Vec<u64> {
        let reached = |n: u64| self.outward || self.places.get(n as usize).is_some_and(|p| *p > 0);
        let passed = |n: u64| if self.outward { self.left.has(n) } else { self.seen.has(n) };
        (first..end).filter(|n| reached(*n) && !passed(*n)).collect()
    }

    /// The instance that gets the packets from now on.
    pub fn enters_at(&mut self, host: usize) {
        if self.entries.last().is_none_or(|(_, last)| *last != host) {
            self.entries.push((self.next.saturating_sub(1), host));
        }
    }

    /// The instance that got a packet from the LAN.
    #[must_use]
    pub fn entry_of(&self, number: u64) -> Option<usize> {
        self.entries.iter().rev().find(|(first, _)| *first <= number).map(|(_, host)| *host)
    }

    /// A packet leaves the pair for its peer.
    ///
    /// # Errors
    /// The flow changed its tunnel, and must not.
    pub fn leaves(&mut self, number: u64, now: Pinned) -> Result<(), String> {
        self.left.add(number);
        if !self.pass(number) {
            self.late.push(number);
            return Ok(());
        }
        match self.pinned.replace(now) {
            Some(before) if !before.may_become(&now) => Err(format!(
                "packet {number} of a flow left through the tunnel at endpoint {}, the one before at {}, and both live",
                now.endpoint, before.endpoint
            )),
            _ => Ok(()),
        }
    }

    /// The next hop at an endpoint is another instance now. What came to the former one for a tunnel there or elsewhere
    /// is on its way there still, and nothing waits for it.
    pub fn next_hop_moves(&mut self, endpoint: usize) {
        let elsewhere = self.pinned.is_some_and(|pinned| pinned.endpoint != endpoint);
        self.unordered |= self.outward && self.via == endpoint && elsewhere;
    }

    /// A packet reaches the pair from its peer, at whichever instance.
    pub fn reaches(&mut self, number: u64) {
        let at = number as usize;
        if self.places.len() <= at {
            self.places.resize(at + 1, 0);
        }
        if let Some(place) = self.places.get_mut(at).filter(|place| **place == 0) {
            self.arrivals += 1;
            *place = self.arrivals;
        }
    }

    /// Keeps the order of what leaves the pair. Whether this is newer than all before.
    fn pass(&mut self, place: u64) -> bool {
        let newer = self.newest.is_none_or(|newest| place > newest);
        if newer {
            self.newest = Some(place);
        }
        newer
    }
}

/// All flows.
#[derive(Debug, Default)]
pub struct Traffic {
    /// By number.
    pub flows: Vec<Flow>,
}

impl Traffic {
    /// For each peer two flows, or, with two endpoints, several outward and one back through each tunnel.
    #[must_use]
    pub fn new(scene: &Scene, dice: &mut Dice) -> Self {
        let mut flows = Vec::new();
        let endpoints = scene.endpoints.len();
        for peer in 0..scene.peers {
            let outward = if endpoints > 1 { OUTWARD } else { 1 };
            for n in 0..outward {
                let ports = (dice.between(1024, 65_535) as u16, dice.between(1, 1023) as u16);
                flows.push(Flow::new(peer, true, n % endpoints, ports));
            }
            flows.extend((0..endpoints).map(|via| Flow::new(peer, false, via, (10_000, 10_000))));
        }
        Self { flows }
    }

    /// The next packet of a flow.
    pub fn packet(&mut self, flow: usize) -> Option<Vec<u8>> {
        let f = self.flows.get_mut(flow)?;
        let (src, dst) =
            if f.outward { (INSIDE, beyond(f.peer)) } else { (beyond(f.peer), INSIDE) };
        let number = f.next;
        f.next += 1;
        Some(build((src, dst), f.ports, flow as u64, number))
    }

    /// An inner packet came out of a tunnel. Why it cannot be one of ours, if so.
    ///
    /// # Errors
    /// One sentence.
    pub fn arrive(&mut self, now: Nanos, at_pair: bool, packet: &[u8]) -> Result<(), String> {
        let Inner { flow, number } = inner(packet).ok_or("an inner packet came out damaged")?;
        let flow = self.flows.get_mut(flow).ok_or("an inner packet of no flow came out")?;
        if flow.outward == at_pair || number >= flow.next {
            return Err(format!("inner packet {number} came out where it does not belong"));
        }
        flow.seen.add(number);
        flow.arrived += 1;
        flow.last = now;
        if at_pair {
            let place = flow.places.get(number as usize).copied().unwrap_or(0);
            if place > 0 && !flow.pass(place.into()) {
                flow.late.push(number);
            }
        }
        Ok(())
    }
}

/// Which of our packets this is, if any: bytes after it do not matter.
#[must_use]
pub fn inner(packet: &[u8]) -> Option<Inner> {
    let body = packet.get(28..LEN)?;
    let word = |at: usize| {
        let bytes = body.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(u64::MAX, u64::from_be_bytes)
    };
    let flow = usize::try_from(word(8)).ok()?;
    (body.get(..8)? == MARKER).then(|| Inner { flow, number: word(16) })
}

fn build(addresses: (Ipv4Addr, Ipv4Addr), ports: (u16, u16), flow: u64, number: u64) -> Vec<u8> {
    let mut p = vec![0; 12];
    if let Some(head) = p.get_mut(..10) {
        // Version 4, five words; total length; TTL 64; UDP.
        head.copy_from_slice(&[0x45, 0, 0, LEN as u8, 0, 0, 0, 0, 64, 17]);
    }
    p.extend(addresses.0.octets());
    p.extend(addresses.1.octets());
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
    p.extend(ports.0.to_be_bytes());
    p.extend(ports.1.to_be_bytes());
    p.extend([0, (LEN - 20) as u8, 0, 0]);
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

    fn two_flows() -> Traffic {
        let flow = |outward| Flow::new(0, outward, 0, (9, 9));
        Traffic { flows: vec![flow(true), flow(false)] }
    }

    #[test]
    fn packets_are_well_formed_and_counted() {
        let mut traffic = two_flows();
        let packet = traffic.packet(0).unwrap();
        let parsed = wire::ip::Packet::parse(&packet).unwrap();
        assert_eq!(parsed.dst, std::net::IpAddr::V4(beyond(0)));
        assert!(in_clear(&packet));
        assert_eq!(inner(&packet), Some(Inner { flow: 0, number: 0 }));
        traffic.arrive(5, false, &packet).unwrap();
        assert_eq!((traffic.flows[0].arrived, traffic.flows[0].last), (1, 5));
        traffic.packet(0);
        assert_eq!(traffic.flows[0].missing(0, 2), [1]);
        assert_eq!(traffic.flows[0].missing_at_pair(0, 1), [0], "it never left");
        assert!(traffic.flows[1].missing_at_pair(0, 1).is_empty(), "nor did it come");
        assert!(traffic.arrive(5, true, &packet).is_err(), "it came back to where it began");
        let back = traffic.packet(1).unwrap();
        traffic.arrive(6, true, &back).unwrap();
        assert!(!in_clear(&[7; 100]));
    }

    #[test]
    fn order_is_that_of_arrival_at_the_pair() {
        let mut traffic = two_flows();
        let packets: Vec<_> = (0..3).map(|_| traffic.packet(1).unwrap()).collect();
        // The WAN turned 0 and 1 around; the pair 2 and 0.
        for number in [1, 0, 2] {
            traffic.flows[1].reaches(number);
        }
        for number in [1, 2, 0] {
            traffic.arrive(5, true, &packets[number]).unwrap();
        }
        assert_eq!(traffic.flows[1].late, [0]);
    }

    #[test]
    fn moves_and_turns_of_a_flow_are_found() {
        let at = |endpoint, sure| Pinned { endpoint, sure };
        let mut flow = Flow::new(0, true, 0, (9, 9));
        flow.leaves(1, at(0, [true; 2])).unwrap();
        flow.leaves(3, at(0, [true; 2])).unwrap();
        flow.leaves(2, at(1, [true; 2])).unwrap();
        assert_eq!(flow.late, [2], "late, and from before");
        flow.leaves(4, at(1, [false, true])).unwrap();
        assert!(flow.leaves(5, at(0, [true, true])).is_ok(), "new again");
        assert!(flow.leaves(6, at(1, [true, true])).is_err());
    }

    #[test]
    fn a_packet_knows_where_it_came_in() {
        let mut traffic = two_flows();
        for host in [0, 0, 1] {
            traffic.packet(0);
            traffic.flows[0].enters_at(host);
        }
        let entries: Vec<_> = (0..4).map(|n| traffic.flows[0].entry_of(n)).collect();
        assert_eq!(entries, [Some(0), Some(0), Some(1), Some(1)]);
    }
}

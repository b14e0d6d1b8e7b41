//! Which SA an outbound packet belongs to: the selectors of the SAs in
//! outbound use, most specific first, newest first among equals; behind them
//! the configured policies, which tell "no SA yet" from "not ours to protect".
//!
//! A direct-mapped cache of flows stands in front; any change of the table
//! empties it by raising the epoch.

use core::cmp::Reverse;
use core::net::IpAddr;
use core::slice;
use core::time::Duration;

use wire::id::{EndpointId, EspSpi};
use wire::ip::{L4, Packet};
use wire::ts::{AddrRange, TrafficSelector};

use crate::command::Policy;
use crate::report::Report;

/// Lines of the flow cache; a power of two.
const CACHE_LINES: usize = 512;
/// A policy without an SA is reported at most this often.
const NO_SA_INTERVAL: Duration = Duration::from_secs(1);

/// Small is specific: fewer addresses, then a protocol, then fewer ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    remote: u128,
    local: u128,
    any_protocol: bool,
    ports: u32,
}

impl Rank {
    fn of(local: &TrafficSelector, remote: &TrafficSelector) -> Self {
        let ports = |ts: &TrafficSelector| {
            let (start, end) = ts.ports().to_wire();
            u32::from(end.saturating_sub(start))
        };
        Self {
            remote: span(&remote.addrs()),
            local: span(&local.addrs()),
            any_protocol: local.protocol() == 0 && remote.protocol() == 0,
            ports: ports(local) + ports(remote),
        }
    }
}

fn span(range: &AddrRange) -> u128 {
    match (range.first(), range.last()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(b.to_bits().saturating_sub(a.to_bits())),
        (IpAddr::V6(a), IpAddr::V6(b)) => b.to_bits().saturating_sub(a.to_bits()),
        // A range is of one family.
        _ => u128::MAX,
    }
}

#[derive(Debug)]
struct Entry {
    rank: Rank,
    age: Reverse<u64>,
    local: TrafficSelector,
    remote: TrafficSelector,
    spi_in: EspSpi,
}

#[derive(Debug)]
struct Configured {
    policy: Policy,
    asked: Option<Duration>,
    ask: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    l4: L4,
}

impl Key {
    fn of(packet: &Packet) -> Self {
        Self { src: packet.src, dst: packet.dst, protocol: packet.protocol, l4: packet.l4 }
    }

    /// Where it sits in the cache. Only spread matters: a collision costs a
    /// look-up, nothing else.
    fn line(&self) -> usize {
        const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
        let addr = |addr: IpAddr| match addr {
            IpAddr::V4(a) => u64::from(a.to_bits()),
            IpAddr::V6(a) => {
                let bits = a.to_bits();
                (bits >> 64) as u64 ^ (bits as u64).rotate_left(29)
            }
        };
        let l4 = match self.l4 {
            L4::Ports { src, dst } => u64::from(src) << 16 | u64::from(dst),
            L4::Single(value) => 1 << 32 | u64::from(value),
            L4::Hidden => 2 << 32,
        };
        let hash = addr(self.src).wrapping_mul(MIX);
        let hash = (hash ^ addr(self.dst)).wrapping_mul(MIX);
        let hash = (hash ^ l4 ^ u64::from(self.protocol) << 40).wrapping_mul(MIX);
        (hash >> 32) as usize % CACHE_LINES
    }
}

#[derive(Debug, Clone, Copy)]
struct Line {
    epoch: u64,
    key: Key,
    spi_in: EspSpi,
}

/// Where a packet belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    /// To this SA.
    Sa(EspSpi),
    /// To a configured policy without an SA, by its index.
    NoSa(usize, EndpointId),
    /// Nowhere.
    None,
}

#[derive(Debug)]
pub(crate) struct Policies {
    entries: Vec<Entry>,
    configured: Vec<Configured>,
    cache: Box<[Option<Line>]>,
    epoch: u64,
    uses: u64,
    asking: bool,
}

impl Policies {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            configured: Vec::new(),
            cache: vec![None; CACHE_LINES].into_boxed_slice(),
            epoch: 0,
            uses: 0,
            asking: false,
        }
    }

    pub(crate) fn configure(&mut self, policies: Vec<Policy>) {
        self.configured = policies
            .into_iter()
            .map(|policy| Configured { policy, asked: None, ask: false })
            .collect();
    }

    /// Puts an SA into outbound use, in front of others that match alike.
    pub(crate) fn use_sa(
        &mut self,
        spi_in: EspSpi,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        self.uses += 1;
        self.insert(spi_in, Reverse(self.uses), local, remote);
    }

    /// Replaces the selectors of an SA in outbound use; its age stays.
    pub(crate) fn refresh(
        &mut self,
        spi_in: EspSpi,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        if let Some(age) = self.entries.iter().find(|e| e.spi_in == spi_in).map(|e| e.age) {
            self.insert(spi_in, age, local, remote);
        }
    }

    fn insert(
        &mut self,
        spi_in: EspSpi,
        age: Reverse<u64>,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        self.remove(spi_in);
        for local in local {
            for remote in remote {
                let rank = Rank::of(local, remote);
                let at = self.entries.partition_point(|e| (e.rank, e.age) < (rank, age));
                let entry = Entry { rank, age, local: *local, remote: *remote, spi_in };
                self.entries.insert(at, entry);
            }
        }
    }

    /// Takes an SA out of outbound use.
    pub(crate) fn remove(&mut self, spi_in: EspSpi) {
        self.entries.retain(|entry| entry.spi_in != spi_in);
        self.epoch += 1;
    }

    /// Where an outbound packet belongs.
    #[inline]
    pub(crate) fn lookup(&mut self, packet: &Packet) -> Match {
        let key = Key::of(packet);
        let at = key.line();
        if let Some(Some(line)) = self.cache.get(at)
            && line.epoch == self.epoch
            && line.key == key
        {
            return Match::Sa(line.spi_in);
        }
        self.search(packet, key, at)
    }

    fn search(&mut self, packet: &Packet, key: Key, at: usize) -> Match {
        let covers = |local, remote| {
            packet.matches(slice::from_ref::<TrafficSelector>(local), slice::from_ref(remote))
        };
        if let Some(entry) = self.entries.iter().find(|e| covers(&e.local, &e.remote)) {
            if let Some(line) = self.cache.get_mut(at) {
                *line = Some(Line { epoch: self.epoch, key, spi_in: entry.spi_in });
            }
            return Match::Sa(entry.spi_in);
        }
        let found = self
            .configured
            .iter()
            .position(|c| packet.matches(&c.policy.local_ts, &c.policy.remote_ts));
        match found.and_then(|at| Some((at, self.configured.get(at)?.policy.endpoint))) {
            Some((at, endpoint)) => Match::NoSa(at, endpoint),
            None => Match::None,
        }
    }

    /// Notes that a packet wanted an SA of a configured policy.
    pub(crate) fn want_sa(&mut self, at: usize, now: Duration) {
        let Some(configured) = self.configured.get_mut(at) else { return };
        if configured.asked.is_none_or(|asked| now >= asked + NO_SA_INTERVAL) {
            configured.asked = Some(now);
            configured.ask = true;
            self.asking = true;
        }
    }

    /// Whether a policy has something to report.
    pub(crate) fn is_asking(&self) -> bool {
        self.asking
    }

    /// The next policy that wants an SA.
    pub(crate) fn take_note(&mut self) -> Option<Report> {
        if !self.asking {
            return None;
        }
        let Some(configured) = self.configured.iter_mut().find(|c| c.ask) else {
            self.asking = false;
            return None;
        };
        configured.ask = false;
        let Policy { endpoint, connection, child, .. } = configured.policy;
        Some(Report::NoSa { endpoint, connection, child })
    }
}

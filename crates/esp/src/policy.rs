//! Which SA an outbound packet belongs to: the selectors of the SAs in
//! outbound use, most specific first; behind them the configured policies,
//! which tell "no SA yet" from "not ours to protect".
//!
//! ```text
//!  packet ─► most specific selectors that match ─► their group ─► its live tunnels that match
//!                                                             pin ─► one of them ─► its newest SA
//! ```
//! Both instances hold the SAs of all endpoints, so both choose alike; nothing
//! that differs between them (the age of an SA) has a say before the tunnel is
//! chosen.
//!
//! Both are found by the packet's addresses (`index`). A cache of flows stands
//! in front, in which each has two places; any change of the table empties it by
//! raising the epoch.

use core::net::IpAddr;
use core::slice;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

use wire::id::{ConnectionId, EndpointId, EspSpi};
use wire::ip::{Fragment, L4, Packet};
use wire::ts::{AddrRange, TrafficSelector};

use crate::bug::Bug;
use crate::command::Policy;
use crate::index::Index;
use crate::pin::{self, Lot, Pin};
use crate::report::{Flow, Report};

/// Pairs of lines of the flow cache: a power of two between these, some for each policy.
const CACHE_PAIRS: (usize, usize) = (1 << 11, 1 << 15);
/// As many, so that with one flow a policy hardly three share a pair.
const PAIRS_PER_POLICY: usize = 2;
/// A policy without an SA is reported at most this often.
pub(crate) const NO_SA_INTERVAL: Duration = Duration::from_secs(1);
/// The same while another tunnel of the connection carries its packets.
const MISSING_INTERVAL: Duration = Duration::from_secs(10);
/// A flow that sent nothing for this long is not shown any more.
const SHOWN_FOR: Duration = Duration::from_secs(60);

/// A tunnel whose SA is to be used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tunnel {
    pub(crate) endpoint: EndpointId,
    pub(crate) connection: ConnectionId,
    pub(crate) spi_in: EspSpi,
}

/// Among selectors that cover as many addresses, small is specific: a protocol,
/// then fewer ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
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
            any_protocol: local.protocol() == 0 && remote.protocol() == 0,
            ports: ports(local) + ports(remote),
        }
    }
}

#[derive(Debug)]
struct Entry {
    rank: Rank,
    /// Grows with each SA that is put into use.
    age: u64,
    local: TrafficSelector,
    remote: TrafficSelector,
    tunnel: Tunnel,
    /// Flows are pinned to one of the tunnels that share it.
    group: ConnectionId,
    pin: Pin,
}

impl Entry {
    fn covers(&self, packet: &Packet) -> bool {
        packet.matches(slice::from_ref(&self.local), slice::from_ref(&self.remote))
    }
}

/// An SA in outbound use: its age, and where its entries are.
#[derive(Debug)]
struct Used {
    age: u64,
    pairs: Vec<(AddrRange, AddrRange)>,
}

#[derive(Debug)]
struct Configured {
    policy: Policy,
    asked: Option<Duration>,
    ask: bool,
}

impl Configured {
    /// Which child of which group: the same in all its tunnels.
    fn group_child(&self) -> (ConnectionId, u16) {
        (self.policy.group, self.policy.child)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    l4: L4,
    /// Fragments are pinned without their ports, and by the protocol that all of a datagram carry.
    fragment: Option<u8>,
}

impl Key {
    fn of(packet: &Packet) -> Self {
        Self {
            src: packet.src,
            dst: packet.dst,
            protocol: packet.protocol,
            l4: packet.l4,
            fragment: (packet.fragment != Fragment::Whole).then(|| packet.flow().protocol),
        }
    }

    /// Where it sits in the cache. Only spread matters: a collision costs a
    /// look-up, nothing else.
    fn pair(&self, pairs: usize) -> usize {
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
        (hash >> 32) as usize & (pairs - 1)
    }
}

#[derive(Debug, Clone, Copy)]
struct Line {
    epoch: u64,
    key: Key,
    spi_in: EspSpi,
    endpoint: EndpointId,
    seen: Duration,
}

/// The two places of a flow.
#[derive(Debug, Clone, Copy, Default)]
struct LinePair([Option<Line>; 2]);

impl LinePair {
    #[inline]
    fn find(&mut self, epoch: u64, key: &Key) -> Option<&mut Line> {
        self.0.iter_mut().flatten().find(|line| line.epoch == epoch && line.key == *key)
    }

    /// In the flow's own place, an empty one, or that of the flow that was idle for longer.
    fn put(&mut self, new: Line) {
        let rank = |line: &Option<Line>| match line {
            Some(line) if line.epoch != new.epoch => (1, Duration::ZERO),
            Some(line) if line.key == new.key => (0, Duration::ZERO),
            Some(line) => (2, line.seen),
            None => (1, Duration::ZERO),
        };
        if let Some(place) = self.0.iter_mut().min_by_key(|line| rank(line)) {
            *place = Some(new);
        }
    }
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
    entries: Index<Entry>,
    used: BTreeMap<EspSpi, Used>,
    configured: Vec<Configured>,
    /// Into `configured`: by addresses, and those of one child of one group.
    by_addresses: Index<usize>,
    by_child: BTreeMap<(ConnectionId, u16), Vec<usize>>,
    places: BTreeMap<(ConnectionId, EndpointId), (ConnectionId, Pin)>,
    cache: Box<[LinePair]>,
    epoch: u64,
    uses: u64,
    /// Policies that ask for an SA, each once.
    asking: VecDeque<usize>,
    /// When tunnels were last looked for that are not up.
    missed_at: Duration,
    /// Endpoints whose tunnels are as good as down.
    shunned: Vec<EndpointId>,
    pub(crate) bug: Bug,
}

impl Policies {
    pub(crate) fn new() -> Self {
        Self {
            entries: Index::new(),
            used: BTreeMap::new(),
            configured: Vec::new(),
            by_addresses: Index::new(),
            by_child: BTreeMap::new(),
            places: BTreeMap::new(),
            cache: vec![LinePair::default(); CACHE_PAIRS.0].into_boxed_slice(),
            epoch: 0,
            uses: 0,
            asking: VecDeque::new(),
            missed_at: Duration::ZERO,
            shunned: Vec::new(),
            bug: Bug::None,
        }
    }

    pub(crate) fn configure(&mut self, policies: Vec<Policy>) {
        self.by_addresses = Index::new();
        self.by_child.clear();
        self.places.clear();
        for (at, policy) in policies.iter().enumerate() {
            for (local, remote) in pairs(&policy.local_ts, &policy.remote_ts) {
                self.by_addresses.insert(&local.addrs(), &remote.addrs(), at);
            }
            self.by_child.entry((policy.group, policy.child)).or_default().push(at);
            let place = (policy.group, policy.pin);
            self.places.entry((policy.connection, policy.endpoint)).or_insert(place);
        }
        // Each is in it at most once, so packets never make it grow.
        self.asking = VecDeque::with_capacity(policies.len());
        let (least, most) = CACHE_PAIRS;
        let pairs = (policies.len() * PAIRS_PER_POLICY).next_power_of_two().clamp(least, most);
        if pairs != self.cache.len() {
            self.cache = vec![LinePair::default(); pairs].into_boxed_slice();
        }
        self.configured = policies
            .into_iter()
            .map(|policy| Configured { policy, asked: None, ask: false })
            .collect();
        for entry in self.entries.iter_mut() {
            (entry.group, entry.pin) = place(&self.places, entry.tunnel);
        }
        self.epoch += 1;
    }

    /// Whether packets may be pinned to an endpoint's tunnels.
    pub(crate) fn pin_to(&mut self, endpoint: EndpointId, on: bool) {
        self.shunned.retain(|shunned| *shunned != endpoint);
        if !on {
            self.shunned.push(endpoint);
        }
        self.epoch += 1;
    }

    /// Puts an SA into outbound use, in front of others of its tunnel that match alike.
    pub(crate) fn use_sa(
        &mut self,
        tunnel: Tunnel,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        self.uses += 1;
        self.insert(tunnel, self.uses, local, remote);
    }

    /// Replaces the selectors of an SA in outbound use; its age stays.
    pub(crate) fn refresh(
        &mut self,
        tunnel: Tunnel,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        if let Some(age) = self.used.get(&tunnel.spi_in).map(|used| used.age) {
            self.insert(tunnel, age, local, remote);
        }
    }

    fn insert(
        &mut self,
        tunnel: Tunnel,
        age: u64,
        local: &[TrafficSelector],
        remote: &[TrafficSelector],
    ) {
        self.remove(tunnel.spi_in);
        let (group, pin) = place(&self.places, tunnel);
        for (local, remote) in pairs(local, remote) {
            let rank = Rank::of(local, remote);
            let entry = Entry { rank, age, local: *local, remote: *remote, tunnel, group, pin };
            self.entries.insert(&local.addrs(), &remote.addrs(), entry);
        }
        let pairs = pairs(local, remote).map(|(local, remote)| (local.addrs(), remote.addrs()));
        self.used.insert(tunnel.spi_in, Used { age, pairs: pairs.collect() });
        self.epoch += 1;
    }

    /// Takes an SA out of outbound use.
    pub(crate) fn remove(&mut self, spi_in: EspSpi) {
        // Many were never in use, of a shadow above all: the flows of others need not be looked up again.
        let Some(used) = self.used.remove(&spi_in) else { return };
        for (local, remote) in used.pairs {
            self.entries.remove(&local, &remote, |entry| entry.tunnel.spi_in == spi_in);
        }
        self.epoch += 1;
    }

    /// Where an outbound packet belongs; `bytes` are those it was parsed from. One that the other
    /// instance has pinned and handed over brings the endpoint it was `chosen` for.
    #[inline]
    pub(crate) fn lookup(
        &mut self,
        now: Duration,
        packet: &Packet,
        bytes: &[u8],
        chosen: Option<EndpointId>,
    ) -> Match {
        let key = Key::of(packet);
        let at = key.pair(self.cache.len());
        if let Some(line) = self.cache.get_mut(at).and_then(|pair| pair.find(self.epoch, &key))
            // Now and then a look at which tunnels are missing.
            && now < self.missed_at + NO_SA_INTERVAL
            && chosen.is_none_or(|chosen| chosen == line.endpoint)
        {
            line.seen = now;
            return Match::Sa(line.spi_in);
        }
        let pinned = self.search(packet, bytes, None);
        // The other instance may know of a tunnel a moment before it is in use here, or for a moment longer.
        if let Some(chosen) = chosen
            && pinned.is_none_or(|pinned| pinned.endpoint != chosen)
            && let Some(other) = self.search(packet, bytes, Some(chosen))
        {
            return Match::Sa(other.spi_in);
        }
        let Some(tunnel) = pinned else {
            return self.search_configured(packet, chosen);
        };
        self.want_missing(now, tunnel, packet);
        let Tunnel { endpoint, spi_in, .. } = tunnel;
        // Errors about different flows have one key.
        if !packet.is_icmp_error()
            && let Some(pair) = self.cache.get_mut(at)
        {
            pair.put(Line { epoch: self.epoch, key, spi_in, endpoint, seen: now });
        }
        Match::Sa(spi_in)
    }

    /// The newest SA of the packet's tunnel: of the pinned one, or of the one at an endpoint.
    fn search(&self, packet: &Packet, bytes: &[u8], at: Option<EndpointId>) -> Option<Tunnel> {
        // The pinned tunnel is one that is in use; a packet that was pinned before goes where it was to go.
        let fits = |e: &Entry| {
            let endpoint = e.tunnel.endpoint;
            e.covers(packet) && at.map_or(!self.shunned.contains(&endpoint), |at| at == endpoint)
        };
        let (there, (rank, group)) = self.entries.at(packet.src, packet.dst).find_map(|there| {
            let fitting = there.clone().filter(|e| fits(e));
            let best = fitting.map(|e| (e.rank, e.group)).min()?;
            Some((there, best))
        })?;
        let alike = there.filter(|e| (e.rank, e.group) == (rank, group) && fits(e));
        let hash = pin::flow_hash(&packet.pinned_flow(bytes));
        if self.bug == Bug::PinModulo {
            let many = alike.clone().count().max(1);
            return alike.map(|e| e.tunnel).nth(hash as usize % many);
        }
        let mut best: Option<(Lot, &Entry)> = None;
        for entry in alike {
            let lot = match self.bug {
                Bug::PinBySa => Pin { id: entry.tunnel.spi_in.0.into(), ..entry.pin }.draw(hash),
                _ => entry.pin.draw(hash),
            };
            // All SAs of a tunnel draw alike, and the newest of them is used.
            let wins = |(best, of): (Lot, &Entry)| {
                lot.beats(&best) || !best.beats(&lot) && entry.age > of.age
            };
            if best.is_none_or(wins) {
                best = Some((lot, entry));
            }
        }
        if self.bug == Bug::PinToTheDead {
            let all = self.configured.iter().filter(|c| c.policy.group == group);
            let lots = all.map(|c| c.policy.pin.draw(hash));
            let beaten = |(best, _): &(Lot, &Entry)| lots.clone().any(|lot| lot.beats(best));
            return best.filter(|best| !beaten(best)).map(|(_, entry)| entry.tunnel);
        }
        best.map(|(_, entry)| entry.tunnel)
    }

    fn search_configured(&self, packet: &Packet, chosen: Option<EndpointId>) -> Match {
        let there = self.by_addresses.at(packet.src, packet.dst).flatten();
        let policies = there.filter_map(|at| Some((*at, &self.configured.get(*at)?.policy)));
        let matching = policies.filter(|(_, p)| packet.matches(&p.local_ts, &p.remote_ts));
        // The first as configured, but rather one at the endpoint that was chosen.
        match matching.min_by_key(|(at, p)| (chosen.is_some_and(|id| id != p.endpoint), *at)) {
            Some((at, policy)) => Match::NoSa(at, policy.endpoint),
            None => Match::None,
        }
    }

    /// Flows of the last minute, from the cache: those whose places two later ones took are missing.
    pub(crate) fn flows(&self, now: Duration) -> Vec<Flow> {
        let lines = self.cache.iter().flat_map(|pair| &pair.0).flatten();
        let shown = lines.filter(|l| l.epoch == self.epoch && now < l.seen + SHOWN_FOR);
        shown
            .map(|line| Flow {
                src: line.key.src,
                dst: line.key.dst,
                protocol: line.key.protocol,
                ports: match line.key.l4 {
                    L4::Ports { src, dst } => Some((src, dst)),
                    L4::Single(_) | L4::Hidden => None,
                },
                endpoint: line.endpoint,
                spi_in: line.spi_in,
                idle: now.saturating_sub(line.seen),
            })
            .collect()
    }

    /// Notes that a packet wanted an SA of a configured policy, or of its like at other endpoints.
    pub(crate) fn want_sa(&mut self, at: usize, now: Duration) {
        let Some(wanted) = self.configured.get(at).map(|c| c.group_child()) else { return };
        for at in self.by_child.get(&wanted).into_iter().flatten() {
            want(&mut self.configured, &mut self.asking, *at, now, NO_SA_INTERVAL);
        }
    }

    /// Notes that a tunnel carries a packet which others of its group would carry, too.
    fn want_missing(&mut self, now: Duration, tunnel: Tunnel, packet: &Packet) {
        if now < self.missed_at + NO_SA_INTERVAL {
            return;
        }
        self.missed_at = now;
        let (group, _) = place(&self.places, tunnel);
        let entries = &self.entries;
        let is_up = |policy: &Policy| {
            let it = (policy.connection, policy.endpoint);
            let of_it = |e: &Entry| (e.tunnel.connection, e.tunnel.endpoint) == it;
            entries.at(packet.src, packet.dst).flatten().any(|e| of_it(e) && e.covers(packet))
        };
        let of_group = self.by_child.range((group, 0)..=(group, u16::MAX));
        for at in of_group.flat_map(|(_, list)| list) {
            let missing = self.configured.get(*at).is_some_and(|c| {
                packet.matches(&c.policy.local_ts, &c.policy.remote_ts) && !is_up(&c.policy)
            });
            if missing {
                want(&mut self.configured, &mut self.asking, *at, now, MISSING_INTERVAL);
            }
        }
    }

    /// Whether a policy has something to report.
    pub(crate) fn is_asking(&self) -> bool {
        !self.asking.is_empty()
    }

    /// The next policy that wants an SA.
    pub(crate) fn take_note(&mut self) -> Option<Report> {
        let configured = self.configured.get_mut(self.asking.pop_front()?)?;
        configured.ask = false;
        let Policy { endpoint, connection, child, .. } = configured.policy;
        Some(Report::NoSa { endpoint, connection, child })
    }
}

/// Every local selector with every remote one.
fn pairs<'a>(
    local: &'a [TrafficSelector],
    remote: &'a [TrafficSelector],
) -> impl Iterator<Item = (&'a TrafficSelector, &'a TrafficSelector)> {
    local.iter().flat_map(move |local| remote.iter().map(move |remote| (local, remote)))
}

/// Group and pin of a tunnel. One that is configured no more is pinned by its endpoint's number.
fn place(
    places: &BTreeMap<(ConnectionId, EndpointId), (ConnectionId, Pin)>,
    tunnel: Tunnel,
) -> (ConnectionId, Pin) {
    let known = places.get(&(tunnel.connection, tunnel.endpoint)).copied();
    known.unwrap_or((tunnel.connection, Pin { id: tunnel.endpoint.0.into(), weight: 1 }))
}

/// Has a policy ask for an SA, if it did not lately.
fn want(
    configured: &mut [Configured],
    asking: &mut VecDeque<usize>,
    at: usize,
    now: Duration,
    interval: Duration,
) {
    let Some(configured) = configured.get_mut(at) else { return };
    if configured.asked.is_none_or(|asked| now >= asked + interval) {
        configured.asked = Some(now);
        if !core::mem::replace(&mut configured.ask, true) {
            asking.push_back(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_three_flows_that_share_a_pair_the_idle_one_goes() {
        let key = |port| Key {
            src: IpAddr::from([10, 1, 0, 9]),
            dst: IpAddr::from([10, 2, 0, 9]),
            protocol: 17,
            l4: L4::Ports { src: port, dst: 53 },
            fragment: None,
        };
        let line = |epoch, port, seen| Line {
            epoch,
            key: key(port),
            spi_in: EspSpi(u32::from(port)),
            endpoint: EndpointId(0),
            seen: Duration::from_secs(seen),
        };
        let mut pair = LinePair::default();
        let held = |pair: &mut LinePair, epoch| {
            let ports = (1..=4).filter(|port| pair.find(epoch, &key(*port)).is_some());
            ports.collect::<Vec<_>>()
        };
        pair.put(line(1, 1, 10));
        pair.put(line(1, 2, 11));
        assert_eq!(held(&mut pair, 1), [1, 2]);
        pair.find(1, &key(1)).unwrap().seen = Duration::from_secs(12);
        pair.put(line(1, 3, 13));
        assert_eq!(held(&mut pair, 1), [1, 3]);
        // Its own place, though the other was idle for longer.
        pair.put(line(1, 3, 14));
        assert_eq!(held(&mut pair, 1), [1, 3]);
        // What an older table said is as good as empty.
        assert_eq!(held(&mut pair, 2), []);
        pair.put(line(2, 4, 15));
        pair.put(line(2, 1, 16));
        assert_eq!(held(&mut pair, 2), [1, 4]);
    }
}

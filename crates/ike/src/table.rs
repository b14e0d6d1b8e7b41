//! All IKE SAs of an endpoint with the indexes that find them, and the
//! difference between two states in terms of the data plane.
//!
//! Owner and shadow both change it only through [`Table::commit`], so both
//! derive the same [`ChildOp`]s from the same values.

use core::{net::IpAddr, time::Duration};
use std::collections::{BTreeMap, BTreeSet};

use wire::{
    id::{ConnectionId, EspSpi, IkeSpi, Term},
    ike::Identity,
};

use crate::{
    ChildOp, ChildSa,
    config::{ConnectionConfig, EndpointConfig},
    nat,
    record::{Bytes, note_key},
    retransmit,
    state::{Child, IkeSa, Path, Phase},
};

/// The configuration, with connections found by whatever names them: there may be ten thousand, and a message of a
/// stranger must not make us look at each.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) config: EndpointConfig,
    by_name: BTreeMap<String, usize>,
    by_id: BTreeMap<ConnectionId, usize>,
    by_note: BTreeMap<IkeSpi, usize>,
    /// By the peer's address; none is `any`.
    by_remote: BTreeMap<Option<IpAddr>, Vec<usize>>,
    by_remote_id: BTreeMap<Identity, Vec<usize>>,
}

impl Registry {
    pub(crate) fn new(config: EndpointConfig) -> Self {
        let index = |(n, c): (usize, &ConnectionConfig)| (c.name.clone(), n);
        let by_name = config.connections.iter().enumerate().map(index).collect();
        let by_id = config.connections.iter().enumerate().map(|(n, c)| (c.id, n)).collect();
        let note = |(n, c): (usize, &ConnectionConfig)| (note_key(&c.name), n);
        let by_note = config.connections.iter().enumerate().map(note).collect();
        let (mut by_remote, mut by_remote_id) = (BTreeMap::new(), BTreeMap::new());
        for (n, c) in config.connections.iter().enumerate() {
            by_remote.entry(c.remote_address.ip()).or_insert_with(Vec::new).push(n);
            by_remote_id.entry(c.remote_id.clone()).or_insert_with(Vec::new).push(n);
        }
        Self { config, by_name, by_id, by_note, by_remote, by_remote_id }
    }

    pub(crate) fn named(&self, name: &str) -> Option<&ConnectionConfig> {
        self.by_name.get(name).and_then(|n| self.config.connections.get(*n))
    }

    pub(crate) fn by_id(&self, id: ConnectionId) -> Option<&ConnectionConfig> {
        self.by_id.get(&id).and_then(|n| self.config.connections.get(*n))
    }

    /// The connection whose note has this key.
    pub(crate) fn noted(&self, key: IkeSpi) -> Option<&ConnectionConfig> {
        self.by_note.get(&key).and_then(|n| self.config.connections.get(*n))
    }

    /// Connections that a peer at `remote` may mean, the most exact first.
    pub(crate) fn candidates(
        &self,
        local: IpAddr,
        remote: IpAddr,
    ) -> impl Iterator<Item = &ConnectionConfig> + Clone {
        let lists = [Some(remote), None].into_iter().filter_map(|at| self.by_remote.get(&at));
        let all = lists.flatten().filter_map(|n| self.config.connections.get(*n));
        all.filter(move |c| c.local_address == local)
    }

    /// Connections with a peer of this name.
    pub(crate) fn with_peer<'a>(
        &'a self,
        remote_id: &Identity,
    ) -> impl Iterator<Item = &'a ConnectionConfig> {
        let list = self.by_remote_id.get(remote_id);
        list.into_iter().flatten().filter_map(|n| self.config.connections.get(*n))
    }

    pub(crate) fn of(&self, sa: &IkeSa) -> Option<&ConnectionConfig> {
        sa.connection.as_deref().and_then(|name| self.named(name))
    }
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) sa: IkeSa,
    deadline: Option<Duration>,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    sas: BTreeMap<IkeSpi, Entry>,
    /// By SHA-256 of the IKE_SA_INIT request, to recognise repetitions.
    inits: BTreeMap<Vec<u8>, IkeSpi>,
    by_connection: BTreeMap<String, BTreeSet<IkeSpi>>,
    by_child: BTreeMap<EspSpi, IkeSpi>,
    half_open: Tally,
    /// Our own unfinished initiations.
    initiating: Tally,
    deadlines: BTreeSet<(Duration, IkeSpi)>,
}

/// IKE SAs of a kind, by the peer's address and in all.
#[derive(Debug, Default)]
struct Tally {
    of: BTreeMap<IpAddr, usize>,
    all: usize,
}

impl Tally {
    fn of(&self, peer: IpAddr) -> usize {
        self.of.get(&peer).copied().unwrap_or(0)
    }

    fn add(&mut self, peer: IpAddr) {
        *self.of.entry(peer).or_default() += 1;
        self.all += 1;
    }

    fn remove(&mut self, peer: IpAddr) {
        if let Some(count) = self.of.get_mut(&peer) {
            self.all -= 1;
            *count -= 1;
            if *count == 0 {
                self.of.remove(&peer);
            }
        }
    }
}

/// Which Child SA sends for each child of a connection.
type Senders = BTreeMap<(String, String), (u64, EspSpi)>;

impl Table {
    pub(crate) fn get(&self, spi: IkeSpi) -> Option<&IkeSa> {
        self.sas.get(&spi).map(|entry| &entry.sa)
    }

    /// For what is not replicated: times of repetition, of the last sign of life.
    pub(crate) fn adjust(&mut self, spi: IkeSpi, registry: &Registry, f: impl FnOnce(&mut IkeSa)) {
        if let Some(entry) = self.sas.get_mut(&spi) {
            f(&mut entry.sa);
        }
        self.rearm(spi, registry);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &IkeSa> {
        self.sas.values().map(|entry| &entry.sa)
    }

    pub(crate) fn of_connection<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a IkeSa> {
        let spis = self.by_connection.get(name);
        spis.into_iter().flatten().filter_map(|spi| self.get(*spi))
    }

    pub(crate) fn of_child(&self, spi: EspSpi) -> Option<&IkeSa> {
        self.by_child.get(&spi).and_then(|ike| self.get(*ike))
    }

    pub(crate) fn of_init(&self, hash: &[u8]) -> Option<&IkeSa> {
        self.inits.get(hash).and_then(|ike| self.get(*ike))
    }

    /// Half-open SAs from one address, and in all.
    pub(crate) fn half_open(&self, from: IpAddr) -> (usize, usize) {
        (self.half_open.of(from), self.half_open.all)
    }

    /// Unfinished initiations of ours, in all.
    pub(crate) fn initiating(&self) -> usize {
        self.initiating.all
    }

    /// The same to one address.
    pub(crate) fn initiating_to(&self, peer: IpAddr) -> usize {
        self.initiating.of(peer)
    }

    /// The first deadline; that of a snoozed SA no earlier than it wakes.
    pub(crate) fn next_deadline(&self, snoozed: &BTreeMap<IkeSpi, Duration>) -> Option<Duration> {
        let awake = self.deadlines.iter().find(|(_, spi)| !snoozed.contains_key(spi));
        let asleep = snoozed
            .iter()
            .filter_map(|(spi, until)| self.deadline_of(*spi).map(|at| at.max(*until)));
        awake.map(|(at, _)| *at).into_iter().chain(asleep).min()
    }

    pub(crate) fn deadline_of(&self, spi: IkeSpi) -> Option<Duration> {
        self.sas.get(&spi).and_then(|entry| entry.deadline)
    }

    pub(crate) fn due_all(&self, now: Duration) -> Vec<IkeSpi> {
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, spi)| *spi).collect()
    }

    /// The Child SAs that send, of one connection.
    pub(crate) fn sending(&self, connection: &str) -> Vec<EspSpi> {
        let names = [connection.to_owned()].into_iter().collect();
        self.senders(&names).into_values().map(|(_, spi)| spi).collect()
    }

    /// The IKE SAs of each connection that has some.
    pub(crate) fn connections(&self) -> impl Iterator<Item = impl Iterator<Item = &IkeSa> + Clone> {
        self.by_connection.values().map(|spis| spis.iter().filter_map(|spi| self.get(*spi)))
    }

    /// How many Child SAs send, of those of one connection.
    pub(crate) fn count_sending<'a>(sas: impl Iterator<Item = &'a IkeSa> + Clone) -> usize {
        let all = sas.flat_map(IkeSa::children).filter(|child| may_send(child));
        let beaten = |child: &Child| {
            let rank = |c: &Child| (c.outbound, c.spi_in);
            all.clone().any(|other| other.name == child.name && rank(other) > rank(child))
        };
        all.clone().filter(|child| !beaten(child)).count()
    }

    /// Recomputes the deadline of one SA.
    pub(crate) fn rearm(&mut self, spi: IkeSpi, registry: &Registry) {
        let Some(entry) = self.sas.get_mut(&spi) else { return };
        if let Some(old) = entry.deadline.take() {
            self.deadlines.remove(&(old, spi));
        }
        let conn = registry.of(&entry.sa);
        entry.deadline = retransmit::deadline(&entry.sa, conn, &registry.config.limits);
        if let Some(new) = entry.deadline {
            self.deadlines.insert((new, spi));
        }
    }

    /// [`Table::adjust`] for all of them at once: much less work than for one after the other.
    pub(crate) fn adjust_all(&mut self, registry: &Registry, mut f: impl FnMut(&mut IkeSa)) {
        for entry in self.sas.values_mut() {
            f(&mut entry.sa);
            let conn = registry.of(&entry.sa);
            entry.deadline = retransmit::deadline(&entry.sa, conn, &registry.config.limits);
        }
        let armed = self.sas.iter().filter_map(|(spi, entry)| Some((entry.deadline?, *spi)));
        self.deadlines = armed.collect();
    }

    /// Replaces values (`None` deletes) and says what the data plane must do
    /// about it.
    pub(crate) fn commit(
        &mut self,
        registry: &Registry,
        changes: BTreeMap<IkeSpi, Option<IkeSa>>,
    ) -> Vec<ChildOp> {
        let mut names: BTreeSet<String> = BTreeSet::new();
        let mut before: BTreeMap<EspSpi, Path> = BTreeMap::new();
        for (spi, new) in &changes {
            let old = self.get(*spi);
            names.extend(old.into_iter().chain(new).filter_map(|sa| sa.connection.clone()));
            if let Some(sa) = old {
                before.extend(sa.children().iter().map(|c| (c.spi_in, sa.path)));
            }
        }
        let old_senders = self.senders(&names);
        let spis: Vec<IkeSpi> = changes.keys().copied().collect();
        // Out with all old values first: children may move from one to another.
        for spi in &spis {
            self.unlink(*spi);
        }
        for (spi, new) in changes {
            if let Some(sa) = new {
                self.link(spi, sa);
                self.rearm(spi, registry);
            }
        }

        let mut ops = Vec::new();
        let mut moves = Vec::new();
        for sa in spis.iter().filter_map(|spi| self.get(*spi)) {
            for child in sa.children() {
                match before.remove(&child.spi_in) {
                    None => ops.extend(
                        child_sa(registry, sa, child).map(|c| ChildOp::Install(Box::new(c))),
                    ),
                    Some(path) if outer(&path) != outer(&sa.path) => {
                        let (local, remote, udp_encap) = outer(&sa.path);
                        moves.push(ChildOp::Move {
                            spi_in: child.spi_in,
                            local,
                            remote,
                            udp_encap,
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        let senders = self.senders(&names);
        let used = senders
            .iter()
            .filter(|(key, now)| old_senders.get(*key).is_none_or(|before| before.1 != now.1));
        ops.extend(used.map(|(_, (_, spi_in))| ChildOp::UseOutbound { spi_in: *spi_in }));
        ops.extend(moves);
        ops.extend(before.into_keys().map(|spi_in| ChildOp::Remove { spi_in }));
        ops
    }

    /// All it takes to fill an empty data plane.
    pub(crate) fn install_all(&self, registry: &Registry) -> Vec<ChildOp> {
        let mut ops = Vec::new();
        for sa in self.iter() {
            for child in sa.children() {
                ops.extend(child_sa(registry, sa, child).map(|c| ChildOp::Install(Box::new(c))));
            }
        }
        let names = self.by_connection.keys().cloned().collect();
        let used = self.senders(&names);
        ops.extend(used.into_values().map(|(_, spi_in)| ChildOp::UseOutbound { spi_in }));
        ops
    }

    fn senders(&self, names: &BTreeSet<String>) -> Senders {
        let mut senders = Senders::new();
        for name in names {
            for child in self.of_connection(name).flat_map(IkeSa::children) {
                if !may_send(child) {
                    continue;
                }
                let best = senders.entry((name.clone(), child.name.clone())).or_default();
                *best = (*best).max((child.outbound, child.spi_in));
            }
        }
        senders
    }

    fn unlink(&mut self, spi: IkeSpi) {
        let Some(entry) = self.sas.remove(&spi) else { return };
        let sa = entry.sa;
        if let Some(at) = entry.deadline {
            self.deadlines.remove(&(at, spi));
        }
        if let Some(name) = &sa.connection
            && let Some(set) = self.by_connection.get_mut(name)
        {
            set.remove(&spi);
            if set.is_empty() {
                self.by_connection.remove(name);
            }
        }
        for child in sa.esp_spis() {
            if self.by_child.get(&child) == Some(&spi) {
                self.by_child.remove(&child);
            }
        }
        if let Some(hash) = init_hash(&sa) {
            self.inits.remove(&hash);
        }
        if sa.is_half_open() {
            self.half_open.remove(sa.path.remote.ip());
        }
        if sa.is_initiating() {
            self.initiating.remove(sa.path.remote.ip());
        }
    }

    fn link(&mut self, spi: IkeSpi, sa: IkeSa) {
        if let Some(name) = &sa.connection {
            self.by_connection.entry(name.clone()).or_default().insert(spi);
        }
        for child in sa.esp_spis() {
            self.by_child.insert(child, spi);
        }
        if let Some(hash) = init_hash(&sa) {
            self.inits.insert(hash, spi);
        }
        if sa.is_half_open() {
            self.half_open.add(sa.path.remote.ip());
        }
        if sa.is_initiating() {
            self.initiating.add(sa.path.remote.ip());
        }
        self.sas.insert(spi, Entry { sa, deadline: None });
    }

    /// Every inbound ESP SPI in use or reserved.
    pub(crate) fn esp_spis(&self) -> impl Iterator<Item = EspSpi> + '_ {
        self.by_child.keys().copied()
    }
}

/// Whether it sends unless another of its name comes first. One that is deferred sends when the others are gone.
fn may_send(child: &Child) -> bool {
    (child.outbound > 0 || child.is_deferred()) && !child.is_retired()
}

/// The hash that a repeated IKE_SA_INIT request has.
fn init_hash(sa: &IkeSa) -> Option<Vec<u8>> {
    match &sa.phase {
        Phase::InitAnswered(s) => Some(crypto::hash::sha256(&[&s.request]).to_vec()),
        Phase::Established(e) => e.init_hash.as_ref().map(Bytes::to_vec),
        _ => None,
    }
}

/// Outer addresses of ESP.
fn outer(path: &Path) -> (core::net::SocketAddr, core::net::SocketAddr, bool) {
    if path.encap {
        (nat::esp_address(path.local), nat::esp_address(path.remote), true)
    } else {
        (path.local, path.remote, false)
    }
}

fn child_sa(registry: &Registry, sa: &IkeSa, child: &Child) -> Option<ChildSa> {
    let (local, remote, udp_encap) = outer(&sa.path);
    Some(ChildSa {
        connection: registry.of(sa)?.id,
        child: child.name.clone(),
        spi_in: child.spi_in,
        spi_out: child.spi_out,
        aead: child.aead,
        keymat_in: child.key_in.duplicate(),
        keymat_out: child.key_out.duplicate(),
        local_ts: child.local_ts.clone(),
        remote_ts: child.remote_ts.clone(),
        local,
        remote,
        udp_encap,
        born: Term(child.term),
    })
}

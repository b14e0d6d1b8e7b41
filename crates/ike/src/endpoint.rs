//! All IKE SAs at one endpoint: where datagrams, commands and time come in and
//! transitions go out, and the face of replication.
//!
//! Demultiplexing is by our own SPI alone (RFC 7296 §2.6). A datagram for an
//! unknown SPI is dropped in silence: INVALID_IKE_SPI would be unprotected and
//! help an attacker more than a peer (§2.21.4 allows it).

use core::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crypto::aead::IvSequence;
use wire::{
    id::{ConnectionId, EspSpi, IkeSpi, MessageId, Term},
    ike::{ExchangeType, Header, Message, MessageBuilder, Notify, NotifyType, ParseError, Payload},
};
use zeroize::Zeroizing;

use crate::{
    ActivateError, ChildOp, Context, Doubt, Keepalive, Target, Transition, Transmit, auth, child,
    config::{EndpointConfig, RemoteAddress, Start},
    cookie::Cookies,
    error::Error,
    established,
    event::{ChildStatus, DeleteReason, Event, IkeStatus, Status, What},
    init,
    record::{self, RecordError, Stamp},
    retransmit,
    state::{ChildState, Fate, IkeSa, Phase, Task},
    step::{Collected, Step},
    sync,
    table::{Registry, Table},
};

/// Wait after an own failure, such as no free SPI, so that it cannot spin.
const SNOOZE: Duration = Duration::from_secs(1);
/// The same unauthenticated failure of one address is told once in this time.
const QUIET: Duration = Duration::from_secs(10);
/// Addresses remembered for that.
const QUIET_MAX: usize = 256;

/// Datagrams that had no effect, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Handed in.
    pub received: u64,
    /// Not well-formed.
    pub malformed: u64,
    /// Did not decrypt.
    pub not_authentic: u64,
    /// Nothing waited for it: unknown SPI, wrong state, wrong message id.
    pub not_expected: u64,
    /// Over a limit of half-open SAs or sizes.
    pub over_limit: u64,
    /// A public value that was refused.
    pub bad_crypto: u64,
    /// We could not do our part.
    pub internal: u64,
    /// Came while another instance owns the endpoint.
    pub not_owner: u64,
    /// Cookies demanded, requests refused without keeping state.
    pub refused: u64,
}

/// When a connection that is to be up is tried next.
#[derive(Debug, Clone, Copy)]
struct Due {
    at: Duration,
    tries: u32,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Endpoint {
    registry: Registry,
    table: Table,
    cookies: Cookies,
    ivs: BTreeMap<IkeSpi, IvSequence>,
    term: Option<Term>,
    active: bool,
    quiet_until: Duration,
    due: BTreeMap<ConnectionId, Due>,
    /// Connections an operator took down.
    held: BTreeSet<ConnectionId>,
    /// Connections that are re-established without INITIAL_CONTACT.
    doubted: BTreeSet<ConnectionId>,
    keepalive_at: Option<Duration>,
    told: BTreeMap<(IpAddr, u8), Duration>,
    snoozed: BTreeMap<IkeSpi, Duration>,
    counters: Counters,
    transitions: VecDeque<Transition>,
    keepalives: VecDeque<Keepalive>,
    events: VecDeque<Event>,
}

impl Endpoint {
    /// An endpoint without SAs, as a shadow: call [`Endpoint::activate`] to own
    /// it.
    #[must_use]
    pub fn new(config: EndpointConfig) -> Self {
        Self {
            registry: Registry::new(config),
            table: Table::default(),
            cookies: Cookies::default(),
            ivs: BTreeMap::new(),
            term: None,
            active: false,
            quiet_until: Duration::ZERO,
            due: BTreeMap::new(),
            held: BTreeSet::new(),
            doubted: BTreeSet::new(),
            keepalive_at: None,
            told: BTreeMap::new(),
            snoozed: BTreeMap::new(),
            counters: Counters::default(),
            transitions: VecDeque::new(),
            keepalives: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &EndpointConfig {
        &self.registry.config
    }

    /// Whether we own it.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Datagrams without effect.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    // --- what comes in -----------------------------------------------------

    /// Handles one IKE datagram, without non-ESP marker. `from` is the peer,
    /// `to` our own address and port (500 or 4500).
    pub fn handle_datagram(
        &mut self,
        cx: &mut Context<'_>,
        from: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) {
        self.counters.received += 1;
        if !self.active {
            self.counters.not_owner += 1;
            return;
        }
        let config = &self.registry.config;
        if datagram.len() > config.limits.message_len || !config.addresses.contains(&to.ip()) {
            self.counters.over_limit += 1;
            return;
        }
        let message = match Message::parse(datagram) {
            Ok(message) => message,
            Err(error) => {
                self.counters.malformed += 1;
                if let ParseError::MajorVersion(_) = error {
                    self.answer_newer_version(datagram, from, to);
                }
                return;
            }
        };
        let header = message.header;
        let result = if is_first(&header) {
            self.first_message(cx, datagram, &message, from, to)
        } else {
            // RFC 7296 §2.6: the I flag tells which SPI is ours.
            let (ours, theirs) = if header.from_initiator {
                (header.responder_spi, header.initiator_spi)
            } else {
                (header.initiator_spi, header.responder_spi)
            };
            match self.table.get(ours) {
                Some(sa)
                    if sa.initiator != header.from_initiator
                        && (sa.peer_spi == theirs || sa.peer_spi.is_zero()) =>
                {
                    let sa = sa.clone();
                    self.step(cx, |step| dispatch(step, sa, datagram, &message, from, to))
                }
                _ => Err(Error::NotExpected),
            }
        };
        match result {
            Ok(()) => {}
            Err(Error::Malformed(_)) => self.counters.malformed += 1,
            Err(Error::NotAuthentic) => self.counters.not_authentic += 1,
            Err(Error::NotExpected) => self.counters.not_expected += 1,
            Err(Error::Limit) => self.counters.over_limit += 1,
            Err(Error::Crypto(_)) => self.counters.bad_crypto += 1,
            Err(error @ Error::Internal(_)) => {
                self.counters.internal += 1;
                tracing::warn!(%error, %from, "IKE message could not be handled");
            }
        }
    }

    fn first_message(
        &mut self,
        cx: &mut Context<'_>,
        datagram: &[u8],
        message: &Message<'_>,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Result<(), Error> {
        let mut cookies = core::mem::take(&mut self.cookies);
        let result = self.step(cx, |step| {
            if init::repeated(step, datagram, from, to) {
                return Ok(());
            }
            init::answer(step, &mut cookies, datagram, message, from, to)
        });
        self.cookies = cookies;
        result
    }

    /// RFC 7296 §2.5: a request of a newer major version gets
    /// INVALID_MAJOR_VERSION, never longer than the request.
    fn answer_newer_version(&mut self, datagram: &[u8], from: SocketAddr, to: SocketAddr) {
        let Some(header) = Header::peek(datagram).filter(|h| !h.response) else { return };
        let mut builder = MessageBuilder::clear(&header.to_response());
        builder.push(&Payload::Notify(Notify::new(NotifyType::INVALID_MAJOR_VERSION, &[])));
        if let Ok(bytes) = builder.finish() {
            if bytes.len() <= datagram.len() {
                self.counters.refused += 1;
                let transmits = vec![Transmit { from: to, to: from, bytes }];
                self.transitions.push_back(Transition { transmits, ..Transition::default() });
            }
        }
    }

    /// Does what is due. Call it at [`Endpoint::poll_timeout`] or later.
    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        if !self.active {
            return;
        }
        let now = cx.now;
        self.snoozed.retain(|_, until| *until > now);
        // Each SA once per call, so that nothing can spin.
        for spi in self.table.due_all(now) {
            if !self.snoozed.contains_key(&spi) {
                self.tick(cx, spi);
            }
        }
        self.start_due(cx);
        self.send_keepalives(now);
    }

    fn tick(&mut self, cx: &mut Context<'_>, spi: IkeSpi) {
        let now = cx.now;
        let Some(sa) = self.table.get(spi).cloned() else { return };
        let backoff = self.registry.of(&sa).map(|c| c.timers.retransmit).unwrap_or_default();
        let overdue = sa.outstanding().filter(|out| retransmit::again_at(out, &backoff).is_due(now));
        let result = match overdue {
            Some(out) if out.sent > retransmit::tries(&sa, &backoff) => {
                self.step(cx, |step| retransmit::give_up(step, sa))
            }
            Some(_) => {
                self.repeat(now, &sa, true);
                Ok(())
            }
            None => self.step(cx, |step| retransmit::tick(step, sa)),
        };
        if let Err(error) = result {
            self.counters.internal += 1;
            tracing::warn!(%error, %spi, "a task of an IKE SA could not begin");
        }
        if self.table.deadline_of(spi).is_some_and(|at| at <= now) {
            self.snoozed.insert(spi, now + SNOOZE);
        }
    }

    /// Sends the outstanding request again, byte for byte.
    fn repeat(&mut self, now: Duration, sa: &IkeSa, count: bool) {
        let Some(out) = sa.outstanding() else { return };
        let bytes = out.bytes.to_vec();
        let sent = out.sent.saturating_add(u8::from(count));
        self.table.adjust(sa.spi, &self.registry, |sa| {
            if let Some(out) = sa.outstanding_mut() {
                out.sent_at = Stamp::at(now);
                out.sent = sent;
            }
        });
        if count {
            self.events.push_back(Event::Retransmitting {
                connection: sa.connection.clone(),
                spi: sa.spi,
                sent,
            });
        }
        let transmits = vec![Transmit { from: sa.path.local, to: sa.path.remote, bytes }];
        self.transitions.push_back(Transition { transmits, ..Transition::default() });
    }

    /// An authentic ESP packet came in on this Child SA lately: the peer lives
    /// (RFC 7296 §2.4), and is ready to receive on it (§2.8).
    pub fn note_inbound(&mut self, cx: &mut Context<'_>, spi_in: EspSpi) {
        let now = cx.now;
        if !self.active {
            return;
        }
        let Some(sa) = self.table.of_child(spi_in) else { return };
        let spi = sa.spi;
        let waiting = sa.children().iter().any(|c| {
            c.spi_in == spi_in && c.outbound == 0 && c.state == ChildState::Live
        });
        self.table.adjust(spi, &self.registry, |sa| {
            if let Phase::Established(e) = &mut sa.phase {
                e.heard = e.heard.max(Stamp::at(now));
            }
        });
        if waiting {
            if let Some(sa) = self.table.get(spi).cloned() {
                // Nothing in it can fail.
                let _ = self.step(cx, |step| retransmit::first_packet(step, sa, spi_in));
            }
        }
    }

    // --- commands ----------------------------------------------------------

    /// Brings a connection up: all its children that are ours to start, or all
    /// if none is. False if there is no such connection or nowhere to go.
    pub fn initiate(&mut self, cx: &mut Context<'_>, id: ConnectionId) -> bool {
        self.held.remove(&id);
        let Some(conn) = self.registry.by_id(id) else { return false };
        let mut names: Vec<String> = conn
            .children
            .iter()
            .filter(|c| c.start == Start::Initiate)
            .map(|c| c.name.clone())
            .collect();
        if names.is_empty() {
            names = conn.children.iter().map(|c| c.name.clone()).collect();
        }
        self.bring_up(cx, id, names)
    }

    /// A packet wants a Child SA that is not up (`start = trap`, or a lost one).
    pub fn acquire(&mut self, cx: &mut Context<'_>, id: ConnectionId, child: &str) -> bool {
        let paused = self.due.get(&id).is_some_and(|due| due.at > cx.now);
        if self.held.contains(&id) || paused {
            return false;
        }
        let allowed = self.registry.by_id(id).is_some_and(|conn| {
            conn.children.iter().any(|c| c.name == child && c.start != Start::Respond)
        });
        allowed && self.bring_up(cx, id, vec![child.to_owned()])
    }

    fn bring_up(&mut self, cx: &mut Context<'_>, id: ConnectionId, names: Vec<String>) -> bool {
        if !self.active {
            return false;
        }
        let Some(conn) = self.registry.by_id(id) else { return false };
        let name = conn.name.clone();
        let remote = match conn.remote_address {
            RemoteAddress::Ip(ip) => ip,
            RemoteAddress::Any => return false,
        };
        if self.table.of_connection(&name).any(IkeSa::is_initiating) {
            return true;
        }
        let live = self.table.of_connection(&name).find(|sa| is_live(sa)).cloned();
        let fresh = !self.doubted.contains(&id);
        self.due.entry(id).and_modify(|due| due.tries = due.tries.saturating_add(1)).or_insert(Due {
            at: cx.now,
            tries: 1,
        });
        let result = match live {
            Some(sa) => self.step(cx, |step| want_children(step, sa, &names)),
            None => self.step(cx, |step| {
                let conn = step.registry.by_id(id).ok_or(Error::NotExpected)?;
                init::start(step, conn, remote, names, fresh).map(|_| ())
            }),
        };
        if let Err(error) = result {
            tracing::warn!(%error, connection = name, "cannot initiate");
            return false;
        }
        true
    }

    /// Rekeys at once, or as soon as the window is free. Also for what `esp`
    /// reports as expiring. False if there is no such SA.
    pub fn rekey(&mut self, cx: &mut Context<'_>, target: Target) -> bool {
        let now = Stamp::at(cx.now);
        self.for_each(cx, target, move |e, child| {
            match child {
                None => e.rekey_at = now,
                Some(spi) => {
                    if let Some(c) = e.child_mut(spi).filter(|c| c.state == ChildState::Live) {
                        c.rekey_at = now;
                    }
                }
            }
        })
    }

    /// Deletes, and tells the peer. A connection stays down until
    /// [`Endpoint::initiate`] or the peer brings it up.
    pub fn terminate(&mut self, cx: &mut Context<'_>, target: Target) -> bool {
        if let Target::Connection(id) = target {
            self.held.insert(id);
            let name = self.registry.by_id(id).map(|c| c.name.clone()).unwrap_or_default();
            let unfinished: Vec<IkeSpi> = self
                .table
                .of_connection(&name)
                .filter(|sa| sa.is_initiating())
                .map(|sa| sa.spi)
                .collect();
            for spi in unfinished {
                if let Some(sa) = self.table.get(spi).cloned() {
                    let _ = self.step(cx, |step| {
                        established::drop_sa(step, &sa, DeleteReason::Command)
                    });
                }
            }
        }
        self.for_each(cx, target, |e, child| match child {
            None => {
                e.wanted.clear();
                if e.fate == Fate::Live || e.fate == Fate::Doubtful {
                    e.fate = Fate::Deleting(DeleteReason::Command);
                }
            }
            Some(spi) => {
                if let Some(c) = e.child_mut(spi).filter(|c| c.state == ChildState::Live) {
                    c.state = ChildState::Doomed;
                }
            }
        })
    }

    /// Marks SAs of a target and lets each begin its next task.
    fn for_each(
        &mut self,
        cx: &mut Context<'_>,
        target: Target,
        mark: impl Fn(&mut crate::state::Established, Option<EspSpi>),
    ) -> bool {
        if !self.active {
            return false;
        }
        let of = |table: &Table, name: &str| -> Vec<IkeSpi> {
            table.of_connection(name).filter(|sa| sa.established().is_some()).map(|sa| sa.spi).collect()
        };
        let name = |id| self.registry.by_id(id).map(|c| c.name.clone()).unwrap_or_default();
        let (spis, children): (Vec<IkeSpi>, Option<Vec<EspSpi>>) = match target {
            Target::Connection(id) => (of(&self.table, &name(id)), None),
            Target::Children(id) => {
                let spis = of(&self.table, &name(id));
                let all = spis.iter().filter_map(|s| self.table.get(*s)).flat_map(IkeSa::children);
                let children = all.map(|c| c.spi_in).collect();
                (spis, Some(children))
            }
            Target::Ike(spi) => (vec![spi], None),
            Target::Child(spi) => {
                (self.table.of_child(spi).map(|sa| sa.spi).into_iter().collect(), Some(vec![spi]))
            }
        };
        let mut any = false;
        for spi in spis {
            let Some(mut sa) = self.table.get(spi).cloned() else { continue };
            let Phase::Established(e) = &mut sa.phase else { continue };
            match &children {
                None => mark(e, None),
                Some(list) => list.iter().for_each(|child| mark(e, Some(*child))),
            }
            any = true;
            let result = self.step(cx, |step| {
                established::advance(step, &mut sa)?;
                step.put(sa);
                Ok(())
            });
            if let Err(error) = result {
                tracing::warn!(%error, %spi, "command could not begin");
            }
        }
        any
    }

    // --- starting ----------------------------------------------------------

    /// Notes whether a connection that is to be up still is.
    fn review(&mut self, now: Duration, name: &str) {
        let Some(conn) = self.registry.named(name) else { return };
        let id = conn.id;
        let wanted = conn.children.iter().any(|c| c.start == Start::Initiate)
            && conn.remote_address != RemoteAddress::Any
            && !self.held.contains(&id);
        let (mut up, mut trying) = (false, false);
        for sa in self.table.of_connection(name) {
            up |= is_live(sa);
            trying |= sa.is_initiating();
        }
        if up {
            self.due.remove(&id);
            self.doubted.remove(&id);
        } else if wanted && !trying {
            let tries = self.due.get(&id).map_or(0, |due| due.tries);
            let pause = match tries {
                0 => Duration::ZERO,
                n => conn
                    .timers
                    .retry
                    .saturating_mul(1 << (n - 1).min(16))
                    .min(conn.timers.retry_max),
            };
            self.due.insert(id, Due { at: now + pause, tries });
        }
    }

    /// Begins the connections that are due, paced (peers.md 12).
    fn start_due(&mut self, cx: &mut Context<'_>) {
        if cx.now < self.quiet_until {
            return;
        }
        let due: Vec<ConnectionId> =
            self.due.iter().filter(|(_, d)| d.at <= cx.now).map(|(id, _)| *id).collect();
        if due.is_empty() {
            return;
        }
        let limits = self.registry.config.limits;
        let mut per_peer: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for sa in self.table.iter().filter(|sa| sa.is_initiating()) {
            *per_peer.entry(sa.path.remote.ip()).or_default() += 1;
        }
        let mut all: usize = per_peer.values().sum();
        for id in due {
            let Some(conn) = self.registry.by_id(id) else { continue };
            let (RemoteAddress::Ip(ip), name) = (conn.remote_address, conn.name.clone()) else {
                self.due.remove(&id);
                continue;
            };
            let busy = self.table.of_connection(&name).any(|sa| sa.is_initiating() || is_live(sa));
            let ours = conn.children.iter().any(|c| c.start == Start::Initiate);
            if busy || !ours || self.held.contains(&id) {
                // A pause after `acquire` failed, or a start that came true.
                self.due.remove(&id);
                continue;
            }
            let of_peer = per_peer.entry(ip).or_default();
            if all >= limits.initiations_total || *of_peer >= limits.initiations_per_peer {
                continue;
            }
            *of_peer += 1;
            all += 1;
            self.initiate(cx, id);
        }
    }

    /// Whether the pacing above holds something back until another finishes.
    fn next_start(&self) -> Option<Duration> {
        let limits = self.registry.config.limits;
        let initiating: Vec<IpAddr> = self
            .due
            .values()
            .next()
            .map(|_| {
                self.table
                    .iter()
                    .filter(|sa| sa.is_initiating())
                    .map(|sa| sa.path.remote.ip())
                    .collect()
            })
            .unwrap_or_default();
        self.due
            .iter()
            .filter(|(id, _)| {
                let remote = self.registry.by_id(**id).map(|c| c.remote_address);
                let of_peer = match remote {
                    Some(RemoteAddress::Ip(ip)) => initiating.iter().filter(|r| **r == ip).count(),
                    _ => 0,
                };
                initiating.len() < limits.initiations_total && of_peer < limits.initiations_per_peer
            })
            .map(|(_, due)| due.at.max(self.quiet_until))
            .min()
    }

    // --- NAT keepalives ----------------------------------------------------

    fn send_keepalives(&mut self, now: Duration) {
        if self.keepalive_at.is_none_or(|at| at > now) {
            return;
        }
        let mut sent = BTreeSet::new();
        for sa in self.table.iter().filter(|sa| sa.path.nat_here && sa.established().is_some()) {
            if sent.insert((sa.path.local, sa.path.remote)) {
                self.keepalives.push_back(Keepalive { from: sa.path.local, to: sa.path.remote });
            }
        }
        self.keepalive_at = None;
        self.arm_keepalives(now);
    }

    /// RFC 3948 §4: whoever is behind a NAT sends them.
    fn arm_keepalives(&mut self, now: Duration) {
        if self.keepalive_at.is_some() {
            return;
        }
        let interval = self
            .table
            .iter()
            .filter(|sa| sa.path.nat_here && sa.established().is_some())
            .filter_map(|sa| self.registry.of(sa))
            .map(|conn| conn.timers.keepalive)
            .filter(|interval| !interval.is_zero())
            .min();
        self.keepalive_at = interval.map(|interval| now + interval);
    }

    // --- one step ----------------------------------------------------------

    fn step(
        &mut self,
        cx: &mut Context<'_>,
        f: impl FnOnce(&mut Step<'_, '_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let quiet = cx.now < self.quiet_until;
        let mut step = Step {
            cx,
            registry: &self.registry,
            table: &self.table,
            term: self.term.unwrap_or_default().0,
            quiet,
            ivs: &mut self.ivs,
            done: Collected::default(),
        };
        let result = f(&mut step);
        let done = core::mem::take(&mut step.done);
        match result {
            Ok(()) => {
                self.commit(cx, done);
                Ok(())
            }
            Err(error) => {
                done.allocated.iter().for_each(|spi| cx.spis.release(*spi));
                Err(error)
            }
        }
    }

    fn commit(&mut self, cx: &mut Context<'_>, done: Collected) {
        let now = cx.now;
        for event in done.events {
            self.tell(now, event);
        }
        let mut used: BTreeSet<EspSpi> = done.allocated.into_iter().collect();
        let mut names = BTreeSet::new();
        let mut nat = false;
        for (spi, new) in &done.changes {
            if let Some(old) = self.table.get(*spi) {
                used.extend(old.esp_spis());
                names.extend(old.connection.clone());
            }
            if let Some(new) = new {
                names.extend(new.connection.clone());
                nat |= new.path.nat_here;
            } else {
                self.ivs.remove(spi);
                self.snoozed.remove(spi);
            }
        }
        let mut transition = Transition { transmits: done.transmits, ..Transition::default() };
        for (spi, new) in &done.changes {
            match new {
                Some(sa) => transition.puts.push((*spi, record::encode(sa, now))),
                None => transition.deletes.push(*spi),
            }
        }
        transition.children = self.table.commit(&self.registry, done.changes);
        if !transition.is_record() && !transition.transmits.is_empty() {
            self.counters.refused += 1;
        }
        if transition.is_record() || !transition.transmits.is_empty() {
            self.transitions.push_back(transition);
        }
        for spi in used {
            if self.table.of_child(spi).is_none() {
                cx.spis.release(spi);
            }
        }
        for name in names {
            self.review(now, &name);
        }
        if nat {
            self.arm_keepalives(now);
        }
    }

    /// Queues an event; the same complaint about unauthenticated messages of
    /// one address is not repeated for a while, so that a flood cannot fill
    /// logs.
    fn tell(&mut self, now: Duration, event: Event) {
        if let Event::Failed(failure) = &event {
            let early = matches!(failure.what, What::Address | What::IkeProposal | What::Identity);
            if early {
                let key = (failure.peer.ip(), failure.what as u8);
                self.told.retain(|_, at| *at + QUIET > now);
                if self.told.contains_key(&key) || self.told.len() >= QUIET_MAX {
                    return;
                }
                self.told.insert(key, now);
            }
        }
        self.events.push_back(event);
    }

    // --- what goes out -----------------------------------------------------

    /// The next step to replicate and then to send.
    pub fn poll_transition(&mut self) -> Option<Transition> {
        self.transitions.pop_front()
    }

    /// The next thing to tell a person.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The next NAT keepalive to send.
    pub fn poll_keepalive(&mut self) -> Option<Keepalive> {
        self.keepalives.pop_front()
    }

    /// When [`Endpoint::handle_timeout`] is next needed; `None` for a shadow or
    /// when nothing ever is.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        if !self.active {
            return None;
        }
        let sas = self.table.next_deadline(&self.snoozed);
        sas.into_iter().chain(self.next_start()).chain(self.keepalive_at).min()
    }

    // --- replication -------------------------------------------------------

    /// Applies the records of the owner, in order, each whole. Gives what the
    /// workers must hold, ready to run. Nothing changes on an error.
    ///
    /// # Errors
    /// See [`RecordError`]; [`RecordError::Owner`] while we own the endpoint.
    pub fn apply(
        &mut self,
        now: Duration,
        puts: &[(IkeSpi, Zeroizing<Vec<u8>>)],
        deletes: &[IkeSpi],
    ) -> Result<Vec<ChildOp>, RecordError> {
        if self.active {
            return Err(RecordError::Owner);
        }
        let mut changes = BTreeMap::new();
        for spi in deletes {
            changes.insert(*spi, None);
        }
        for (spi, bytes) in puts {
            let sa = record::decode(bytes, now)?;
            if sa.spi != *spi {
                return Err(RecordError::Key);
            }
            if sa.connection.is_some() && self.registry.of(&sa).is_none() {
                return Err(RecordError::Connection);
            }
            changes.insert(*spi, Some(sa));
        }
        Ok(self.table.commit(&self.registry, changes))
    }

    /// Forgets every SA (before a snapshot is applied). Gives what the workers
    /// must forget.
    ///
    /// # Errors
    /// [`RecordError::Owner`] while we own the endpoint.
    pub fn clear(&mut self) -> Result<Vec<ChildOp>, RecordError> {
        if self.active {
            return Err(RecordError::Owner);
        }
        let all: Vec<IkeSpi> = self.table.iter().map(|sa| sa.spi).collect();
        let changes = all.into_iter().map(|spi| (spi, None)).collect();
        Ok(self.table.commit(&self.registry, changes))
    }

    /// Every record as of `now`, its ages fresh.
    #[must_use]
    pub fn snapshot(&self, now: Duration) -> Vec<(IkeSpi, Zeroizing<Vec<u8>>)> {
        self.table.iter().map(|sa| (sa.spi, record::encode(sa, now))).collect()
    }

    /// All it takes to fill empty workers.
    #[must_use]
    pub fn install_all(&self) -> Vec<ChildOp> {
        self.table.install_all(&self.registry)
    }

    /// Inbound ESP SPIs in use or reserved, whichever instance chose them: an
    /// allocator must not hand them out.
    pub fn esp_spis(&self) -> impl Iterator<Item = EspSpi> + '_ {
        self.table.esp_spis()
    }

    /// Makes the shadow the owner in a new term: repeats outstanding requests
    /// byte for byte, arms timers, starts what is to be up.
    ///
    /// # Errors
    /// [`ActivateError::OldTerm`] unless `term` is above every earlier one.
    pub fn activate(
        &mut self,
        cx: &mut Context<'_>,
        term: Term,
        doubt: Doubt,
    ) -> Result<(), ActivateError> {
        if self.term.is_some_and(|old| old >= term) {
            return Err(ActivateError::OldTerm);
        }
        // A new term is a new IV space for every key (ha.md).
        self.ivs.clear();
        self.term = Some(term);
        self.active = true;
        self.due.clear();
        self.doubted.clear();
        self.snoozed.clear();
        self.transitions.clear();
        let now = cx.now;
        let spis: Vec<IkeSpi> = self.table.iter().map(|sa| sa.spi).collect();
        for spi in spis {
            // The peer may have been heard by the old owner since the record.
            self.table.adjust(spi, &self.registry, |sa| {
                if let Phase::Established(e) = &mut sa.phase {
                    e.heard = Stamp::at(now);
                }
            });
            let Some(sa) = self.table.get(spi).cloned() else { continue };
            match doubt {
                Doubt::None => self.repeat(now, &sa, false),
                Doubt::InDoubt => self.take_over_in_doubt(cx, sa),
            }
        }
        let names: Vec<String> =
            self.registry.config.connections.iter().map(|c| c.name.clone()).collect();
        for name in names {
            self.review(now, &name);
        }
        self.start_due(cx);
        self.arm_keepalives(now);
        Ok(())
    }

    fn take_over_in_doubt(&mut self, cx: &mut Context<'_>, sa: IkeSa) {
        let id = self.registry.of(&sa).map(|c| c.id);
        let spi = sa.spi;
        let result = match &sa.phase {
            // A peer that goes on with it is answered as usual.
            Phase::InitAnswered(_) | Phase::Closed(_) => Ok(()),
            // The responder may have answered already: begin anew.
            Phase::InitSent(_) | Phase::AuthSent(_) => {
                self.doubted.extend(id);
                self.step(cx, |step| established::drop_sa(step, &sa, DeleteReason::InDoubt))
            }
            Phase::Established(_) if sync::is_preferred(&sa) => {
                self.step(cx, |step| sync::request(step, sa))
            }
            Phase::Established(_) => {
                self.doubted.extend(id);
                self.step(cx, |step| sync::reestablish(step, sa))
            }
        };
        if let Err(error) = result {
            tracing::warn!(%error, %spi, "takeover in doubt");
        }
    }

    /// No longer the owner; the state stays warm as a shadow's. What was not
    /// polled yet is dropped: it was not committed.
    pub fn deactivate(&mut self) {
        self.active = false;
        self.transitions.clear();
        self.keepalives.clear();
        self.due.clear();
        self.keepalive_at = None;
    }

    /// No exchange of ours begins before `until` (ha.md, split brain). Answers
    /// and repetitions go on.
    pub fn hold_initiations(&mut self, until: Duration) {
        self.quiet_until = until;
    }

    // --- status ------------------------------------------------------------

    /// A picture for `tandem status`.
    #[must_use]
    pub fn status(&self, now: Duration) -> Status {
        let mut status = Status::default();
        for sa in self.table.iter() {
            if sa.is_half_open() {
                status.half_open += 1;
            } else if !matches!(sa.phase, Phase::Closed(_)) {
                // A closed one only repeats its last answer.
                status.ike_sas.push(self.ike_status(sa, now));
            }
        }
        status.ike_sas.sort_by(|a, b| {
            a.connection.cmp(&b.connection).then(b.age.cmp(&a.age)).then(a.spi.cmp(&b.spi))
        });
        status
    }

    fn ike_status(&self, sa: &IkeSa, now: Duration) -> IkeStatus {
        let conn = self.registry.of(sa);
        let e = sa.established();
        let state = match (&sa.phase, e) {
            (_, None) => "connecting",
            (_, Some(e)) => match (e.fate, e.task()) {
                (Fate::Live, Some(Task::Rekey(_))) => "rekeying",
                (Fate::Live, Some(Task::Sync(..))) => "synchronising",
                (Fate::Live, _) => "established",
                (Fate::Deleting(_), _) => "deleting",
                (Fate::Replaced(_), _) => "replaced",
                (Fate::Rival(..), _) => "rekeying",
                (Fate::Doubtful, _) => "in doubt",
            },
        };
        let connection = sa.connection.clone().unwrap_or_default();
        let senders = self.table.sending(&connection);
        IkeStatus {
            connection: sa.connection.clone(),
            spi: sa.spi,
            peer_spi: sa.peer_spi,
            state,
            initiator: sa.initiator,
            local: sa.path.local,
            remote: sa.path.remote,
            local_id: conn.map(|c| c.local_id.to_string()),
            remote_id: conn.map(|c| c.remote_id.to_string()),
            suite: e.map(|e| e.suite().to_string()),
            age: sa.since.age(now),
            rekey_in: e.map(|e| e.rekey_at.until(now)),
            heard: e.map(|e| e.heard.age(now)),
            nat: (sa.path.nat_here, sa.path.nat_there),
            children: sa
                .children()
                .iter()
                .map(|c| ChildStatus {
                    name: c.name.clone(),
                    spi_in: c.spi_in,
                    spi_out: c.spi_out,
                    state: match c.state {
                        ChildState::Retired(_) => "retired",
                        ChildState::Doomed => "deleting",
                        ChildState::Live if rekeying(e, c.spi_in) => "rekeying",
                        ChildState::Live if senders.contains(&c.spi_in) => "installed",
                        ChildState::Live => "receiving",
                    },
                    suite: c.suite().to_string(),
                    udp_encap: sa.path.encap,
                    local_ts: c.local_ts.clone(),
                    remote_ts: c.remote_ts.clone(),
                    age: c.since.age(now),
                    rekey_in: (c.state == ChildState::Live).then(|| c.rekey_at.until(now)),
                })
                .collect(),
        }
    }
}

fn rekeying(e: Option<&crate::state::Established>, spi_in: EspSpi) -> bool {
    matches!(e.and_then(|e| e.task()), Some(Task::Child(new)) if new.rekeys == Some(spi_in))
}

/// Whether an IKE SA carries its connection.
fn is_live(sa: &IkeSa) -> bool {
    sa.established().is_some_and(|e| matches!(e.fate, Fate::Live | Fate::Rival(..)))
}

/// RFC 7296 §3.1: a first message.
fn is_first(header: &Header) -> bool {
    header.exchange == ExchangeType::IKE_SA_INIT
        && header.from_initiator
        && !header.response
        && header.message_id == MessageId(0)
        && header.responder_spi.is_zero()
}

/// Wishes for children of an IKE SA that is up.
fn want_children(step: &mut Step<'_, '_>, mut sa: IkeSa, names: &[String]) -> Result<(), Error> {
    let now = step.now();
    let Phase::Established(e) = &mut sa.phase else { return Err(Error::NotExpected) };
    let asked = match e.task() {
        Some(Task::Child(new)) => Some(new.name.clone()),
        _ => None,
    };
    for name in names {
        if !e.has_live(name) && asked.as_ref() != Some(name) {
            child::want(e, name, now, 0);
        }
    }
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

/// Hands a message to the state it is for.
fn dispatch(
    step: &mut Step<'_, '_>,
    sa: IkeSa,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let response = message.header.response;
    match (&sa.phase, response) {
        (Phase::InitSent(state), true) => {
            let state = state.clone();
            init::finish(step, sa, state, datagram, message, from, to)
        }
        (Phase::AuthSent(state), true) => {
            let state = state.clone();
            auth::finish(step, sa, state, datagram, message, from, to)
        }
        (Phase::InitAnswered(state), false) => {
            let state = state.clone();
            auth::answer(step, sa, state, datagram, message, from, to)
        }
        (Phase::Established(_), false) => {
            established::on_request(step, sa, datagram, message, from, to)
        }
        (Phase::Established(_), true) => {
            established::on_response(step, sa, datagram, message, from, to)
        }
        (Phase::Closed(closed), false)
            if closed.answered.request[..] == crypto::hash::sha256(&[datagram]) =>
        {
            let bytes = closed.answered.response.to_vec();
            step.transmit(to, from, bytes);
            Ok(())
        }
        _ => Err(Error::NotExpected),
    }
}

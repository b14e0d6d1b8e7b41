//! All IKE SAs at one endpoint: where datagrams, commands and time come in and
//! transitions go out, and the face of replication.
//!
//! Demultiplexing is by our own SPI alone (RFC 7296 §2.6). A datagram for an
//! unknown SPI is dropped in silence: INVALID_IKE_SPI would be unprotected and
//! help an attacker more than a peer (§2.21.4 allows it).

mod applying;
mod commands;
mod due;
mod replication;
mod starting;
mod status;

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

use crate::{
    Context, Keepalive, Transition, Transmit, auth,
    config::EndpointConfig,
    cookie::Cookies,
    error::Error,
    established,
    event::{Event, What},
    init,
    note::{Failed, Notes},
    record::{self, NEWEST_FORMAT, OLDEST_FORMAT, Stamp},
    retransmit,
    state::{ChildState, Established, IkeSa, Phase},
    step::{Collected, Step},
    table::{Registry, Table},
};

pub use applying::{Application, Applied};
use due::DueList;

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
    /// Answered without a change of state: cookies, refusals, repeated answers.
    pub stateless: u64,
}

/// Ended SAs of a kind that are remembered: as many as can end while two owners do not hear of each other, and more.
const BURIED_MAX: usize = 4096;

/// SAs that ended here in this ownership, the latest last, by our SPIs. Another instance's older word must not bring them
/// back.
#[derive(Debug, Default)]
struct Buried {
    ikes: VecDeque<IkeSpi>,
    children: VecDeque<EspSpi>,
}

impl Buried {
    fn push<T>(list: &mut VecDeque<T>, spi: T) {
        if list.len() >= BURIED_MAX {
            list.pop_front();
        }
        list.push_back(spi);
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Endpoint {
    registry: Registry,
    table: Table,
    cookies: Cookies,
    /// The IVs of the term, one sequence for all keys: whatever comes back within a term cannot begin it
    /// anew.
    ivs: IvSequence,
    buried: Buried,
    term: Option<Term>,
    active: bool,
    quiet_until: Duration,
    due: DueList,
    /// What is known of connections beside their SAs.
    notes: Notes,
    /// What anybody can bring about that sends us a datagram, by connection: it is told here, and
    /// makes no record.
    knocked: BTreeMap<String, Failed>,
    /// This instance stops or drains: nothing begins any more. No note, for the next owner is not to keep to it.
    leaving: bool,
    /// The format in which records are written.
    format: u8,
    /// The newest one that is read.
    newest_format: u8,
    /// Connections that are re-established without INITIAL_CONTACT.
    doubted: BTreeSet<ConnectionId>,
    /// IKE SAs taken over in doubt that wait for the quiet time to end.
    doubtful: BTreeSet<IkeSpi>,
    /// When an IKE SA last changed under our ownership.
    used: BTreeMap<IkeSpi, Duration>,
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
            ivs: IvSequence::new(0),
            buried: Buried::default(),
            term: None,
            active: false,
            quiet_until: Duration::ZERO,
            due: DueList::default(),
            notes: Notes::default(),
            knocked: BTreeMap::new(),
            leaving: false,
            format: NEWEST_FORMAT,
            newest_format: NEWEST_FORMAT,
            doubted: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            used: BTreeMap::new(),
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

    /// Reads and writes no newer format than this one, as a build that does not know it.
    pub fn hold_format(&mut self, newest: u8) {
        self.newest_format = newest.clamp(OLDEST_FORMAT, NEWEST_FORMAT);
        self.format = self.format.min(self.newest_format);
    }

    /// Writes records in this format from now on. What was written before is not written anew:
    /// [`Endpoint::snapshot`] does that.
    pub fn set_format(&mut self, format: u8) {
        self.format = format.clamp(OLDEST_FORMAT, self.newest_format);
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
                self.answer_malformed(datagram, error, from, to);
                return;
            }
        };
        let header = message.header;
        let result = if is_first(&header) && self.leaving {
            // The peer tries again, and whoever serves it then answers.
            Err(Error::NotExpected)
        } else if is_first(&header) {
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

    /// RFC 7296 §2.5: a request of a newer major version, and a first message with
    /// an unknown critical payload, are told so in clear, never with more bytes
    /// than they have. Anything else that is malformed gets silence.
    fn answer_malformed(
        &mut self,
        datagram: &[u8],
        error: ParseError,
        from: SocketAddr,
        to: SocketAddr,
    ) {
        let Some(header) = Header::peek(datagram).filter(|h| !h.response) else { return };
        let (kind, data) = match error {
            ParseError::MajorVersion(_) => (NotifyType::INVALID_MAJOR_VERSION, Vec::new()),
            ParseError::UnsupportedCritical(_) if is_first(&header) => {
                (NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, error.notify_data())
            }
            _ => return,
        };
        let mut builder = MessageBuilder::clear(&header.to_response());
        builder.push(&Payload::Notify(Notify::new(kind, &data)));
        if let Ok(bytes) = builder.finish()
            && bytes.len() <= datagram.len()
        {
            self.counters.stateless += 1;
            let transmits = vec![Transmit { from: to, to: from, bytes }];
            self.transitions.push_back(Transition { transmits, ..Transition::default() });
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
        self.resolve_doubts(cx);
        self.start_due(cx);
        self.send_keepalives(now);
    }

    fn tick(&mut self, cx: &mut Context<'_>, spi: IkeSpi) {
        let now = cx.now;
        let Some(sa) = self.table.get(spi).cloned() else { return };
        let backoff = self.registry.of(&sa).map(|c| c.timers.retransmit).unwrap_or_default();
        let overdue =
            sa.outstanding().filter(|out| retransmit::again_at(out, &backoff).is_due(now));
        let result = match overdue {
            // Giving up a synchronisation begins another exchange: not in the quiet time.
            Some(out)
                if out.sent > retransmit::tries(&sa, &backoff)
                    && !(sa.in_doubt() && now < self.quiet_until) =>
            {
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
        // Whoever answers with a refusal is not silent.
        if count && !sa.is_refused() {
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
        let waiting = sa
            .children()
            .iter()
            .any(|c| c.spi_in == spi_in && c.outbound == 0 && c.state == ChildState::Live);
        self.table.adjust(spi, &self.registry, |sa| {
            if let Phase::Established(e) = &mut sa.phase {
                e.heard = e.heard.max(Stamp::at(now));
            }
        });
        if waiting && let Some(sa) = self.table.get(spi).cloned() {
            // Nothing in it can fail.
            let _ = self.step(cx, |step| retransmit::first_packet(step, sa, spi_in));
        }
    }

    /// The newest authentic ESP packet of this Child SA came from `from`, and not from where we send to: a peer behind a
    /// NAT whose mapping changed is followed (RFC 7296 §2.23), though IKE be silent. False if the Child SA is not here.
    pub fn note_moved(&mut self, cx: &mut Context<'_>, spi_in: EspSpi, from: SocketAddr) -> bool {
        let Some(sa) = self.table.of_child(spi_in).filter(|_| self.active).cloned() else {
            return false;
        };
        // A connection that is gone has nobody to follow.
        let _ = self.step(cx, |step| established::esp_from(step, sa, from));
        true
    }

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
        let mut orphaned = BTreeMap::new();
        for (spi, new) in &done.changes {
            if let Some(old) = self.table.get(*spi) {
                used.extend(old.esp_spis());
                if old.established().is_some()
                    && new.as_ref().and_then(IkeSa::established).is_none()
                {
                    Buried::push(&mut self.buried.ikes, *spi);
                    orphaned
                        .extend(old.children().iter().map(|c| (c.spi_in, old.connection.clone())));
                }
                names.extend(old.connection.clone());
            }
            if let Some(new) = new {
                names.extend(new.connection.clone());
                nat |= new.path.nat_here;
                self.used.insert(*spi, now);
            } else {
                self.snoozed.remove(spi);
                self.used.remove(spi);
            }
        }
        let mut transition = Transition { transmits: done.transmits, ..Transition::default() };
        for (spi, new) in &done.changes {
            match new {
                Some(sa) => transition.puts.push((*spi, record::encode(sa, self.format, now))),
                None => transition.deletes.push(*spi),
            }
        }
        transition.children = self.table.commit(&self.registry, done.changes);
        if !transition.is_record() && !transition.transmits.is_empty() {
            self.counters.stateless += 1;
        }
        if transition.is_record() || !transition.transmits.is_empty() {
            self.transitions.push_back(transition);
        }
        for spi in used {
            if self.table.of_child(spi).is_none() {
                cx.spis.release(spi);
                // What only went with its IKE SA may live on at the peer, in one that another instance rekeyed that to:
                // then the peer's Delete of the old one, or its silence in it, says nothing of the children. Unless
                // others are in their place here, or an operator wants them down.
                let name = orphaned.get(&spi).cloned().flatten().unwrap_or_default();
                let lives_on = orphaned.contains_key(&spi)
                    && !self
                        .table
                        .of_connection(&name)
                        .any(|sa| sa.established().is_some_and(Established::carries))
                    && !self
                        .registry
                        .config
                        .connections
                        .iter()
                        .any(|c| c.name == name && self.stays_down(&c.name));
                if !lives_on {
                    Buried::push(&mut self.buried.children, spi);
                }
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
            let early = matches!(
                failure.what,
                What::Address | What::IkeProposal | What::Identity | What::Secret
            );
            let anybody = early && failure.began == crate::event::Side::Peer;
            if anybody {
                let key = (failure.peer.ip(), failure.what as u8);
                self.told.retain(|_, at| *at + QUIET > now);
                if self.told.contains_key(&key) || self.told.len() >= QUIET_MAX {
                    return;
                }
                self.told.insert(key, now);
            }
            let known = failure.connection.clone().filter(|c| self.registry.named(c).is_some());
            if let Some(connection) = &known
                && anybody
            {
                self.knocked.insert(connection.clone(), Failed::new(failure.to_string(), now));
            } else if let Some(connection) = known
                && self.notes.fail(&connection, Some(failure.to_string()), now)
            {
                self.put_note(&connection, now);
            }
        }
        self.events.push_back(event);
    }

    /// Whether a connection is not to be begun by itself, nor by a packet.
    fn stays_down(&self, connection: &str) -> bool {
        self.leaving || self.notes.is_held(connection)
    }

    /// The record of a note that has changed.
    fn put_note(&mut self, connection: &str, now: Duration) {
        let Some((key, bytes)) = self.notes.record(connection, self.format, now) else { return };
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        match bytes {
            Some(bytes) => puts.push((key, bytes)),
            None => deletes.push(key),
        }
        self.transitions.push_back(Transition { puts, deletes, ..Transition::default() });
    }

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
        let doubts = (!self.doubtful.is_empty()).then_some(self.quiet_until);
        sas.into_iter().chain(doubts).chain(self.next_start()).chain(self.keepalive_at).min()
    }
}

/// RFC 7296 §3.1: a first message.
fn is_first(header: &Header) -> bool {
    header.exchange == ExchangeType::IKE_SA_INIT
        && header.from_initiator
        && !header.response
        && header.message_id == MessageId(0)
        && header.responder_spi.is_zero()
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

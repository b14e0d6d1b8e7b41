//! [`Pair`]: the face of one instance, and what all its endpoints share (hello, heartbeats, stream).
//!
//! ```text
//!  stream up ──► our hello ──► their hello ──┬─ equal index or name, no common release:
//!                                            │    close, own nothing new for boot_wait
//!                                            ├─ another config digest: joined, nothing replicated
//!                                            └─ else joined: the lower of the two newest releases is
//!                                               settled for this stream, and records may flow
//! ```

use crate::bug::Bug;
use crate::codec::{self, Frame, Heartbeat, Hello};
use crate::config::{Config, ConfigError, LAG, QUIET, WARN_EVERY};
use crate::contact::{Contact, Death, Heard};
use crate::endpoint::{Cx, Endpoint, Joined, Out, Role};
use crate::event::{Event, HookState, Probe, Transmit, Warning, Why};
use crate::status::{LinkStatus, Status};
use crate::types::{
    ApplyId, Batch, EndpointId, LinkId, Opaque, Position, SideId, SyncId, Term, Value,
};
use core::mem::{Discriminant, discriminant};
use core::time::Duration;

/// Whether a side message is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SideKind {
    /// Kept and resent after a reconnect until acknowledged (leases).
    Acked,
    /// Lost with the stream (window tops).
    Unacked,
}

/// Why [`Pair::append`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// Only an owner that is not handing over writes the log.
    #[error("not the owner of this endpoint, or it is being handed over")]
    NotOwner,
    /// Above [`crate::config::BATCH_MAX`] or [`crate::config::VALUE_MAX`].
    #[error("the record is too large")]
    TooLarge,
}

/// Why [`Pair::switchover`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwitchoverError {
    /// No such endpoint, or the other owns it.
    #[error("not the owner of this endpoint")]
    NotOwner,
    /// There is nobody to hand it to.
    #[error("the other instance is out of contact")]
    NoContact,
    /// The other has not all of our state yet.
    #[error("the other instance is not in sync yet")]
    NotSynced,
    /// The other's uplink is down and ours is not.
    #[error("the other instance reports a dead uplink")]
    PeerUplink,
    /// Its addresses cannot move.
    #[error("it never leaves its home (on_failure = \"withdraw\")")]
    Stays,
    /// One is under way.
    #[error("a switchover is already under way")]
    Busy,
}

/// Numbers for boots and lineages, from the seed that was passed in (splitmix64).
pub(crate) struct Seed(u64);

impl Seed {
    /// The next number, never 0.
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).max(1)
    }
}

struct Stream {
    link: LinkId,
    up_at: Duration,
    /// 0 until the other's hello came.
    epoch: u64,
    compatible: bool,
}

/// One instance's half of the pair protocol. Sans-IO: time, randomness and bytes are arguments.
///
/// Each turn of the control loop: read every socket to exhaustion, hand the input in, then call
/// [`Pair::handle_turn`], then drain [`Pair::poll_event`] (in order) and [`Pair::poll_transmit`],
/// and sleep no longer than [`Pair::poll_timeout`]. `now` is CLOCK_BOOTTIME and never goes back.
pub struct Pair {
    config: Config,
    contact: Contact,
    endpoints: Vec<Endpoint>,
    out: Out,
    rng: Seed,
    stream: Option<Stream>,
    epochs: u64,
    release: Option<u32>,
    peer_newest: Option<u32>,
    peer_build: Option<String>,
    barred_until: Duration,
    leaving: bool,
    turned_at: Duration,
    next_heartbeat: Duration,
    /// Last reports, by kind.
    warned: Vec<(Discriminant<Warning>, Duration)>,
    malformed: u64,
    bug: Bug,
}

impl Pair {
    /// Starts an instance that holds nothing. `seed` must be random at every start; `terms` holds,
    /// for each endpoint, the number in its term file, or `None` if there is no file.
    ///
    /// # Errors
    /// The config breaks a rule.
    pub fn new(
        config: Config,
        now: Duration,
        seed: u64,
        terms: &[Option<Term>],
    ) -> Result<Pair, ConfigError> {
        config.check()?;
        let mut rng = Seed(seed);
        let contact = Contact::new(rng.draw(), now, &config);
        let endpoints = (0..config.endpoints.len())
            .filter_map(|n| {
                let id = EndpointId(u8::try_from(n).ok()?);
                Endpoint::new(id, &config, terms.get(n).copied().flatten())
            })
            .collect();
        let mut pair = Pair {
            contact,
            endpoints,
            out: Out::default(),
            rng,
            stream: None,
            epochs: 0,
            release: None,
            peer_newest: None,
            peer_build: None,
            barred_until: Duration::ZERO,
            leaving: false,
            turned_at: now,
            next_heartbeat: now,
            warned: Vec::new(),
            malformed: 0,
            bug: Bug::None,
            config,
        };
        pair.each(now, Endpoint::reserve);
        Ok(pair)
    }

    /// Switches a deliberate mistake on, for the simulations that must catch it.
    #[cfg(any(test, feature = "bugs"))]
    pub fn set_bug(&mut self, bug: Bug) {
        self.bug = bug;
    }

    // ---- the network

    /// The stream to the other is up, over this link. Our hello leaves; it expects the other's.
    pub fn handle_stream_up(&mut self, now: Duration, link: LinkId) {
        if self.stream.is_some() {
            self.handle_stream_down(now, false);
        }
        self.contact.stream_up(now);
        self.stream = Some(Stream { link, up_at: now, epoch: 0, compatible: false });
        let hello = Hello {
            release: self.config.releases.own,
            oldest: self.config.releases.oldest,
            index: self.config.index,
            name: self.config.name.clone(),
            boot: self.contact.boot,
            config_digest: self.config.config_digest,
            claims: self.endpoints.iter().map(|endpoint| endpoint.claim(self.leaving)).collect(),
            build: (self.config.releases.own >= codec::BUILD_SINCE
                && !self.config.build.is_empty())
            .then(|| self.config.build.clone()),
        };
        self.out.frame(&Frame::Hello(hello));
        self.finish(now);
    }

    /// The stream ended; with `goodbye`, the other said that it is leaving.
    pub fn handle_stream_down(&mut self, now: Duration, goodbye: bool) {
        if self.stream.take().is_none() {
            return;
        }
        if goodbye {
            self.contact.goodbye(now, &self.config);
            self.out.event(Event::Contact(false));
        } else {
            self.contact.stream_lost = Some(now);
            self.probe(now);
        }
        for endpoint in &mut self.endpoints {
            if let Role::Follower(follower) = &mut endpoint.role {
                follower.stream_down();
            }
            endpoint.incoming = None;
        }
        self.finish(now);
    }

    /// An authenticated frame, in order.
    pub fn handle_frame(&mut self, now: Duration, bytes: &[u8]) {
        let Some(stream) = &self.stream else { return };
        let joined = stream.epoch != 0;
        match codec::frame(bytes) {
            Ok(Frame::Hello(hello)) if !joined => self.handle_hello(now, hello),
            Ok(Frame::Hello(_)) => self.bad_frame(now, "a second hello"),
            Ok(_) if !joined => self.bad_frame(now, "a frame before hello"),
            Ok(frame) => self.handle_joined(now, frame),
            Err(what) => self.bad_frame(now, what),
        }
        self.finish(now);
    }

    fn bad_frame(&mut self, now: Duration, what: &'static str) {
        // A gap in the log would follow: a new stream begins with a snapshot.
        self.malformed += 1;
        self.out.warnings.push(Warning::Malformed(what));
        self.close(now);
    }

    fn close(&mut self, now: Duration) {
        if self.stream.is_some() {
            self.out.transmits.push_back(Transmit::CloseStream { goodbye: false });
            self.handle_stream_down(now, false);
        }
    }

    fn handle_hello(&mut self, now: Duration, hello: Hello) {
        let (own, other) = (self.config.releases, (hello.oldest, hello.release));
        let release = own.own.min(hello.release);
        let refusal = if hello.index == self.config.index {
            Some(Warning::EqualIndex(hello.index))
        } else if hello.name == self.config.name {
            Some(Warning::EqualName(hello.name.clone()))
        } else if hello.name != self.config.peer_name {
            let expected = self.config.peer_name.clone();
            Some(Warning::OtherName { heard: hello.name.clone(), expected })
        } else if release < own.oldest || release < hello.oldest {
            Some(Warning::OldRelease { ours: (own.oldest, own.own), theirs: other })
        } else {
            None
        };
        if let Some(warning) = refusal {
            self.out.warnings.push(warning);
            // Whoever owns goes on; nobody acquires while such a neighbour is about.
            self.barred_until = now + self.config.boot_wait;
            self.contact.sign_at = now;
            for endpoint in &mut self.endpoints {
                if !matches!(endpoint.role, Role::Owner(_)) {
                    endpoint.notify(HookState::Fault, &mut self.out);
                }
            }
            self.close(now);
            return;
        }
        self.barred_until = Duration::ZERO;
        self.release = Some(release);
        self.peer_newest = Some(hello.release);
        self.peer_build = hello.build;
        // Ahead of all that this hello brings about.
        self.out.event(Event::Settled { release });
        let compatible = hello.config_digest == self.config.config_digest;
        if !compatible {
            let (ours, theirs) = (self.config.config_digest, hello.config_digest);
            self.out.warnings.push(Warning::WrongDigest { ours, theirs });
        }
        let was_alive = self.contact.alive;
        let restarted = self.contact.greet(now, hello.boot, hello.claims, &self.config);
        if was_alive && !self.contact.alive {
            self.out.event(Event::Contact(false));
        }
        self.epochs += 1;
        if let Some(stream) = &mut self.stream {
            stream.epoch = self.epochs;
            stream.compatible = compatible;
        }
        self.out.hurry = true;
        if restarted {
            tracing::info!("the other instance has restarted");
            self.each(now, Endpoint::peer_restarted);
        }
        self.each(now, Endpoint::handle_claims);
        // For who owns then: before the other hears a heartbeat of ours, which the fence counts from as soon as there is
        // somebody to hear it.
        self.each(now, Endpoint::fence_turn);
        for endpoint in &mut self.endpoints {
            if !matches!(endpoint.role, Role::Owner(_)) {
                endpoint.notify(HookState::Backup, &mut self.out);
            }
        }
    }

    fn handle_joined(&mut self, now: Duration, frame: Frame) {
        if !self.joined().compatible {
            return;
        }
        let id = match &frame {
            Frame::Chunk(chunk) => chunk.id,
            Frame::Record(record) => record.id,
            Frame::Grant(grant) => grant.id,
            Frame::Handover(handover) => handover.id,
            Frame::ChunkAck { id, .. }
            | Frame::Ack { id, .. }
            | Frame::Side { id, .. }
            | Frame::SideAck { id, .. }
            | Frame::Owned { id, .. }
            | Frame::Refused { id, .. }
            | Frame::Resync { id, .. } => *id,
            Frame::Hello(_) => return,
        };
        let Some(n) = self.endpoints.iter().position(|endpoint| endpoint.hash == id) else {
            return;
        };
        self.one(now, n, |endpoint, cx| match frame {
            Frame::Chunk(chunk) => endpoint.handle_chunk(cx, chunk),
            Frame::Record(record) => endpoint.handle_record(cx, record),
            Frame::Grant(grant) => endpoint.handle_grant(cx, grant),
            Frame::Handover(handover) => endpoint.handle_handover(cx, handover),
            Frame::ChunkAck { term, snap, part, .. } => {
                endpoint.handle_chunk_ack(cx, term, snap, part);
            }
            Frame::Ack { term, position, snap, .. } => {
                endpoint.handle_ack(cx, term, position, snap)
            }
            Frame::Side { term, side, bytes, .. } => endpoint.handle_side(cx, term, side, &bytes),
            Frame::SideAck { term, side, .. } => endpoint.handle_side_ack(cx, term, side),
            Frame::Owned { term, .. } => endpoint.handle_owned(cx, term),
            Frame::Refused { term, .. } => endpoint.handle_refused(cx, term),
            Frame::Resync { term, .. } => endpoint.handle_resync(cx, term),
            Frame::Hello(_) => {}
        });
    }

    /// An authenticated heartbeat; its number is checked here.
    pub fn handle_heartbeat(&mut self, now: Duration, link: LinkId, bytes: &[u8]) {
        match codec::heartbeat(bytes) {
            Ok(heartbeat) if heartbeat.index == self.config.index => {}
            Ok(heartbeat) => {
                let was_alive = self.contact.alive;
                let heard = self.contact.hear(now, link, heartbeat);
                if self.contact.alive && !was_alive {
                    tracing::debug!("contact");
                    self.out.event(Event::Contact(true));
                    // After every heal: neighbours may have learnt the other's address.
                    self.each(now, |endpoint, cx| {
                        if matches!(endpoint.role, Role::Owner(_)) {
                            endpoint.announce(cx);
                        }
                    });
                }
                if heard == Heard::Claims {
                    self.each(now, Endpoint::handle_claims);
                }
                // A shadow takes its state for exact as long as its newest echo is younger than `fence_after` when our
                // death is proven: an echo that waited for our next interval would leave little time for the proof.
                let spoke = Duration::from_nanos(self.contact.mark());
                if heard != Heard::Nothing
                    && now >= spoke + self.config.heartbeat / 2
                    && self.endpoints.iter().any(|e| matches!(e.role, Role::Owner(_)))
                {
                    self.out.hurry = true;
                }
            }
            Err(what) => {
                self.malformed += 1;
                self.out.warnings.push(Warning::Malformed(what));
            }
        }
        self.finish(now);
    }

    /// How a [`Transmit::Probe`] ended.
    pub fn handle_probe_result(&mut self, now: Duration, link: LinkId, result: Probe) {
        self.contact.probe_result(now, link, result, self.config.heartbeat);
        self.finish(now);
    }

    // ---- the host

    /// The control loop has read every socket to exhaustion and handed everything in. Timers,
    /// judgement and the fence happen here and only here, so call it in every turn, and at the
    /// latest at [`Pair::poll_timeout`].
    pub fn handle_turn(&mut self, now: Duration) {
        self.turned_at = now;
        if let Some(death) = self.contact.judge(now, &self.config) {
            tracing::info!(?death, "the other instance is dead or beyond reach");
            self.out.event(Event::Contact(false));
            if death == Death::Silence {
                for endpoint in &self.endpoints {
                    if matches!(endpoint.role, Role::Owner(_)) {
                        let (endpoint, until) = (endpoint.id, now + QUIET);
                        self.out.event(Event::Quiet { endpoint, until });
                    }
                }
            }
        }
        self.check_stream(now);
        self.each(now, Endpoint::turn);
        self.probe(now);
        if now >= self.next_heartbeat {
            self.out.hurry = true;
        }
        self.finish(now);
    }

    /// A stream whose link carried no heartbeat for `dead_after` is dropped, and so is one on which
    /// no hello came.
    fn check_stream(&mut self, now: Duration) {
        let Some(stream) = &self.stream else { return };
        let heard = self.contact.links.get(usize::from(stream.link.0)).and_then(|l| l.heard_at);
        let since = heard.map_or(stream.up_at, |heard| heard.max(stream.up_at));
        let silent = now >= (since + self.config.dead_after).max(self.contact.listen_until);
        if silent || (stream.epoch == 0 && now >= stream.up_at + LAG) {
            self.close(now);
        }
    }

    fn probe(&mut self, now: Duration) {
        let links = self.contact.probes(now, &self.config);
        self.out.transmits.extend(links.into_iter().map(|link| Transmit::Probe { link }));
    }

    /// Whether this endpoint's uplink works here. It does until told otherwise.
    pub fn handle_uplink(&mut self, now: Duration, endpoint: EndpointId, up: bool) {
        if let Some(endpoint) = self.endpoints.get_mut(usize::from(endpoint.0)) {
            if up && !endpoint.uplink {
                endpoint.uplink_since = Some(now);
            }
            endpoint.uplink = up;
        }
        self.finish(now);
    }

    /// The term file holds this number, synced: answers [`Event::Reserve`].
    pub fn handle_reserved(&mut self, now: Duration, endpoint: EndpointId, up_to: Term) {
        if let Some(endpoint) = self.endpoints.get_mut(usize::from(endpoint.0)) {
            endpoint.terms.reserved(up_to);
            endpoint.term_wanted = None;
        }
        self.finish(now);
    }

    // ---- the gateway

    /// Owner: adds one atomic record to the log. What depends on it waits for
    /// [`Event::Acked`] with this position or a later one (in solo it comes at once).
    ///
    /// # Errors
    /// Not the owner, or over the limits; nothing was changed.
    pub fn append(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        batch: Batch,
    ) -> Result<Position, AppendError> {
        let result =
            self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.append(cx, batch));
        self.finish(now);
        result.unwrap_or(Err(AppendError::NotOwner))
    }

    /// Owner: puts what is held once more, in the format that is settled; answers
    /// [`Event::Rewrite`], in as many records as it takes. Deletes are for values that have no place
    /// in that format. A loser that owes the winner its tail does it unasked, before it gives its
    /// final counters.
    ///
    /// # Errors
    /// Not the owner, or over the limits; nothing was changed.
    pub fn rewrite(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        batch: Batch,
    ) -> Result<Option<Position>, AppendError> {
        let result =
            self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.rewrite(cx, batch));
        self.finish(now);
        result.unwrap_or(Err(AppendError::NotOwner))
    }

    /// Owner: everything is rewritten, so a snapshot may leave. Answers [`Event::Rewrite`].
    pub fn rewritten(&mut self, now: Duration, endpoint: EndpointId) {
        self.one(now, usize::from(endpoint.0), Endpoint::rewritten);
        self.finish(now);
    }

    /// Owner: sends bytes to the shadow's gateway outside log and digest, ahead of what remains of
    /// a snapshot. `None`: not sent (solo, not the owner, no stream for an unacknowledged one, or
    /// over [`crate::config::SIDE_MAX`]).
    pub fn send_side(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        kind: SideKind,
        bytes: Vec<u8>,
    ) -> Option<SideId> {
        let id = self
            .one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.send_side(cx, kind, bytes))
            .flatten();
        self.finish(now);
        id
    }

    /// Owner: all counters are below acknowledged ceilings, and the workers obey these from now
    /// on. Answers [`crate::Mode::Syncing`] with its id.
    pub fn confirm_ceilings(&mut self, now: Duration, endpoint: EndpointId, sync: SyncId) {
        self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.confirm_ceilings(cx, sync));
        self.finish(now);
    }

    /// Shadow: everything up to and including this [`Event::Apply`] is installed, also in the
    /// workers. The acknowledgement leaves.
    pub fn applied(&mut self, now: Duration, endpoint: EndpointId, id: ApplyId) {
        self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.applied(cx, id));
        self.finish(now);
    }

    /// Shadow: this [`Event::Apply`] cannot be used. It and all after it are taken back and never
    /// acknowledged; the state before it stays, out of sync, until a whole snapshot is installed.
    ///
    /// It may come late, as [`Pair::applied`] may. `false`: there was nothing to take back any more,
    /// and a later [`Event::Apply`] holds as it is (one that empties the shadow stands alone, and
    /// a new life as a shadow begins without what the former had under way).
    pub fn unusable(&mut self, now: Duration, endpoint: EndpointId, id: ApplyId) -> bool {
        let reverted =
            self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.unusable(cx, id));
        self.finish(now);
        reverted.unwrap_or(false)
    }

    /// Owner: hand the endpoint to the other (the operator's `failover`). [`Event::Hold`] follows.
    ///
    /// # Errors
    /// Why it cannot be done now; nothing was changed.
    pub fn switchover(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
    ) -> Result<(), SwitchoverError> {
        let result = self.one(now, usize::from(endpoint.0), |endpoint, cx| endpoint.switchover(cx));
        self.finish(now);
        result.unwrap_or(Err(SwitchoverError::NotOwner))
    }

    /// The workers have disowned the endpoint: their exact counters and windows (at most
    /// [`crate::config::COUNTERS_MAX`] bytes), and for a grant also the ceilings that the new
    /// owner may use. Answers [`Event::Hold`], and [`Event::StandDown`] with `counters_wanted`.
    pub fn final_counters(&mut self, now: Duration, endpoint: EndpointId, counters: Opaque) {
        self.one(now, usize::from(endpoint.0), |endpoint, cx| {
            endpoint.final_counters(cx, counters)
        });
        self.finish(now);
    }

    /// A clean stop: every owned endpoint stands down, then the stream closes with a goodbye, and
    /// the other takes over at once. Nothing is owned afterwards, and the last transmit (after
    /// which the process may end) is the [`Transmit::CloseStream`], also if there is no stream.
    pub fn goodbye(&mut self, now: Duration) {
        self.leaving = true;
        self.each(now, |endpoint, cx| endpoint.stand_down(cx, Why::Goodbye));
        self.finish(now);
        self.stream = None;
        self.out.transmits.push_back(Transmit::CloseStream { goodbye: true });
    }

    // ---- outputs

    /// What to send next.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.out.transmits.pop_front()
    }

    /// What to do next. The order matters.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.out.events.pop_front()
    }

    /// When [`Pair::handle_turn`] is due at the latest: never more than one heartbeat interval
    /// after the last.
    #[must_use]
    pub fn poll_timeout(&self) -> Duration {
        let turn = self.turned_at + self.config.heartbeat;
        let endpoints = self.endpoints.iter().filter_map(Endpoint::timeout);
        let beat =
            (self.contact.peer.is_some() && !self.config.lone).then_some(self.next_heartbeat);
        let doubt = self.contact.doubts_at(&self.config).filter(|at| *at > self.turned_at);
        let next = endpoints
            .chain(self.contact.timeout(&self.config))
            .chain(beat)
            .chain(doubt)
            .chain([turn])
            .min();
        next.unwrap_or(turn).max(self.turned_at)
    }

    /// The fence of an endpoint as last reported by [`Event::Fence`]; zero: closed.
    #[must_use]
    pub fn fence(&self, endpoint: EndpointId) -> Duration {
        self.endpoints.get(usize::from(endpoint.0)).map_or(Duration::ZERO, Endpoint::told)
    }

    /// Whether the other lives and owns the endpoint, as last heard.
    #[must_use]
    pub fn others(&self, endpoint: EndpointId) -> bool {
        self.endpoints.get(usize::from(endpoint.0)).is_some_and(|e| e.others(&self.contact))
    }

    /// Whether an endpoint of ours could move to the other at any moment, and the other neither
    /// [drains](Pair::drain) nor, unless an operator asks for it, [declines](Pair::decline) it.
    #[must_use]
    pub fn is_welcome(&self, endpoint: EndpointId, asked: bool) -> bool {
        self.endpoints
            .get(usize::from(endpoint.0))
            .is_some_and(|e| e.is_welcome(&self.contact, asked, self.bug))
    }

    /// Whether the other lives and drains.
    #[must_use]
    pub fn other_drains(&self) -> bool {
        let claim = |e: &Endpoint| self.contact.claim(e.hash).and_then(|claim| claim.drains);
        self.contact.alive && self.endpoints.iter().any(|e| claim(e) == Some(true))
    }

    /// Whether flows may be pinned to the endpoint's tunnels. Always true but for an endpoint whose addresses cannot
    /// move: there its home must live, serve it, have its uplink and not [drain](Pair::drain), which both
    /// instances judge by the same heartbeats.
    #[must_use]
    pub fn in_use(&self, endpoint: EndpointId) -> bool {
        self.endpoints.get(usize::from(endpoint.0)).is_some_and(|e| e.in_use(&self.contact))
    }

    /// Tells the other whether this instance wants no endpoint at all. Changes nothing about takeovers.
    pub fn drain(&mut self, now: Duration, drains: bool) {
        for endpoint in &mut self.endpoints {
            endpoint.drains = drains;
        }
        self.finish(now);
    }

    /// Tells the other whether it is to keep the endpoint, should it own it, until it is asked: an
    /// operator moved it away. Changes nothing about takeovers.
    pub fn decline(&mut self, now: Duration, endpoint: EndpointId, declines: bool) {
        if let Some(endpoint) = self.endpoints.get_mut(usize::from(endpoint.0)) {
            endpoint.declines = declines;
        }
        self.finish(now);
    }

    /// The value of one key, in whatever role.
    #[must_use]
    pub fn value(&self, endpoint: EndpointId, key: u64) -> Option<&Value> {
        self.endpoints.get(usize::from(endpoint.0))?.store.get(key).map(|value| &**value)
    }

    /// Every key and value of an endpoint, in the order of keys.
    pub fn values(&self, endpoint: EndpointId) -> impl Iterator<Item = (u64, &Value)> {
        let endpoint = self.endpoints.get(usize::from(endpoint.0));
        endpoint.into_iter().flat_map(|e| e.store.iter().map(|(key, value)| (key, &**value)))
    }

    /// Figures for people and metrics.
    #[must_use]
    pub fn status(&self, now: Duration) -> Status {
        let ago = |at: Duration| now.saturating_sub(at);
        Status {
            contact: self.contact.alive,
            joined: self.joined().epoch != 0,
            compatible: self.joined().compatible,
            release: self.release,
            peer_newest: self.peer_newest,
            peer_build: self.peer_build.clone(),
            heard_ago: self.contact.heard_at().map(ago),
            echo_ago: self.contact.echoed_at().map(ago),
            rtt: self.contact.rtt,
            links: self
                .contact
                .links
                .iter()
                .zip(0..)
                .map(|(link, n)| LinkStatus {
                    link: LinkId(n),
                    heard_ago: link.heard_at.map(ago),
                    accepted: link.accepted,
                    replayed: link.replayed,
                })
                .collect(),
            endpoints: self.endpoints.iter().map(|e| e.status(&self.contact)).collect(),
            malformed: self.malformed,
        }
    }

    // ---- inside

    fn joined(&self) -> Joined {
        self.stream.as_ref().map_or(Joined::default(), |stream| Joined {
            epoch: stream.epoch,
            compatible: stream.compatible && stream.epoch != 0,
        })
    }

    fn one<T>(
        &mut self,
        now: Duration,
        n: usize,
        act: impl FnOnce(&mut Endpoint, &mut Cx<'_>) -> T,
    ) -> Option<T> {
        let joined = self.joined();
        let mut cx = Cx {
            now,
            config: &self.config,
            contact: &self.contact,
            joined,
            out: &mut self.out,
            rng: &mut self.rng,
            barred: now < self.barred_until,
            leaving: self.leaving,
            bug: self.bug,
        };
        Some(act(self.endpoints.get_mut(n)?, &mut cx))
    }

    fn each(&mut self, now: Duration, act: impl Fn(&mut Endpoint, &mut Cx<'_>)) {
        for n in 0..self.endpoints.len() {
            self.one(now, n, &act);
        }
    }

    /// Ends every input: what changed in our claims is said at once, and warnings are thinned.
    fn finish(&mut self, now: Duration) {
        for endpoint in &mut self.endpoints {
            endpoint.refresh_claim(&self.contact, self.leaving, &mut self.out);
        }
        if core::mem::take(&mut self.out.hurry) {
            self.send_heartbeats(now);
        }
        for warning in core::mem::take(&mut self.out.warnings) {
            let kind = discriminant(&warning);
            match self.warned.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, at)) if now < *at + WARN_EVERY => continue,
                Some((_, at)) => *at = now,
                None => self.warned.push((kind, now)),
            }
            self.out.event(Event::Warning(warning));
        }
    }

    fn send_heartbeats(&mut self, now: Duration) {
        self.next_heartbeat = now + self.config.heartbeat;
        if self.config.lone {
            return;
        }
        let mut heartbeat = Heartbeat {
            index: self.config.index,
            release: self.config.releases.own,
            config_digest: self.config.config_digest,
            claims: self.endpoints.iter().map(|endpoint| endpoint.claim(self.leaving)).collect(),
            ..Heartbeat::default()
        };
        if !self.contact.stamp(now, &mut heartbeat) {
            return;
        }
        let bytes = codec::encode_heartbeat(&heartbeat);
        for n in 0..self.config.links {
            let bytes = bytes.clone();
            self.out.transmits.push_back(Transmit::Heartbeat { link: LinkId(n), bytes });
        }
    }
}

#[cfg(test)]
mod tests;

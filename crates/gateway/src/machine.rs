//! The gateway: inputs, and the pump that carries every consequence to the outputs.
//!
//! An IKE message's path:
//!
//! ```text
//!  handle_ike ─► serves? ─► ike ─► Transition ─┬─ Install, Remove ─────────────► Output::Shard
//!                  │ no                        ├─ puts, deletes ─► pair.append ─► Output::Pair(Frame)
//!                  ▼                           └─ transmits, UseOutbound ─► Held{position}
//!        inbox, steer, or drop                                                │ Event::Acked
//!                                                  Output::Ike, Output::Shard ◄┘
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use wire::id::{EndpointId, EspSpi, IkeSpi, Term};

use crate::bug::Bug;
use crate::config::Config;
use crate::endpoint::{Datagram, Endpoint, INBOX, Part, STEER_QUIET};
use crate::face::Output;
use crate::formats;
use crate::held::Release;
use crate::peer_message::{self, Ceiling, Side, Top};
use crate::requests::Pending;
use crate::spi::SpiPool;

/// How often the shards are asked for their counters (liveness hints, status).
const QUERY_EVERY: Duration = Duration::from_secs(1);
/// A shadow's shards use an SA so much later than it is installed: several round trips of the pair link.
const SHADOW_USE: Duration = Duration::from_millis(20);
/// The token of those queries; status requests use their own.
const ROUTINE: u64 = u64::MAX;

/// What a gateway is given once, at its start.
pub struct Start {
    /// The validated configuration.
    pub config: Config,
    /// Randomness for IKE: keys, nonces, SPIs.
    pub rng: Box<dyn crypto::Rng + Send>,
    /// Randomness of this boot: lineages, SPI generations.
    pub seed: u64,
    /// What the term file of each endpoint holds.
    pub terms: Vec<Option<Term>>,
    /// How many workers carry packets here.
    pub workers: u8,
    /// What `tandem status` calls this build.
    pub release: String,
    /// The newest of [`crate::FORMATS`] to speak; `None`: all.
    pub hold_format: Option<u32>,
}

/// One instance's control plane. See the crate's documentation for the drain rule.
pub struct Gateway {
    pub(crate) config: Config,
    pub(crate) pair: ha::Pair,
    rng: Box<dyn crypto::Rng + Send>,
    pub(crate) spis: SpiPool,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) outputs: VecDeque<Output>,
    /// When contact was last lost: what was used since then is ours after a split.
    pub(crate) split_at: Duration,
    /// The link that carries the pair's stream, for status.
    pub(crate) stream_link: Option<u8>,
    pub(crate) release: String,
    /// The newest format that this instance speaks.
    pub(crate) newest_format: u32,
    pub(crate) started: Duration,
    next_query: Duration,
    /// When the last turn was.
    turned_at: Duration,
    /// The newest counters of the shards, by rising SPI.
    pub(crate) snapshot: Option<Box<esp::Snapshot>>,
    /// Requests whose answer is not known yet.
    pub(crate) pending: Vec<Pending>,
    pub(crate) counters: Counts,
    /// Endpoints are to leave, and not to come back.
    pub(crate) draining: bool,
    /// SAs that a shadow's shards will use, and from when on.
    pub(crate) soon: VecDeque<(Duration, EndpointId, EspSpi)>,
    pub(crate) bug: Bug,
    /// So many records are damaged before they are applied; zero but in the simulation.
    pub(crate) spoil: u32,
}

/// Totals for `tandem status`.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) ike_drops: BTreeMap<&'static str, u64>,
    pub(crate) changes: BTreeMap<&'static str, u64>,
}

/// Why a gateway could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The pair protocol refuses the configuration.
    #[error("pair: {0}")]
    Pair(#[from] ha::ConfigError),
}

impl Gateway {
    /// A gateway that owns nothing yet. Drain its outputs, then keep its times.
    ///
    /// # Errors
    /// What `ha` refuses in the configuration; [`Config::new`] has checked the rest.
    pub fn new(start: Start, now: Duration) -> Result<Self, StartError> {
        let Start { config, rng, seed, terms, workers, release, hold_format } = start;
        let terms: Vec<Option<ha::Term>> =
            terms.into_iter().map(|term| term.map(|term| ha::Term(term.0))).collect();
        let mut said = crate::pair_config::of(&config);
        said.build.clone_from(&release);
        if let Some(newest) = hold_format {
            said.releases = ha::Releases::held(newest)?;
        }
        let newest = said.releases.own;
        let pair = ha::Pair::new(said, now, seed, &terms)?;
        let endpoints = config
            .endpoints
            .iter()
            .filter_map(|endpoint| {
                let mut ike = ike::Endpoint::new(config.ike_endpoint(endpoint.id)?);
                ike.hold_format(formats::of_records(newest));
                Some(Endpoint::new(endpoint.id, endpoint.name.clone(), ike))
            })
            .collect();
        let mut gateway = Self {
            spis: SpiPool::new(config.local, workers, seed),
            config,
            pair,
            rng,
            endpoints,
            outputs: VecDeque::new(),
            split_at: now,
            stream_link: None,
            release,
            newest_format: newest,
            started: now,
            next_query: now,
            turned_at: now,
            snapshot: None,
            pending: Vec::new(),
            counters: Counts::default(),
            draining: false,
            soon: VecDeque::new(),
            bug: Bug::None,
            spoil: 0,
        };
        let policies = crate::pair_config::policies(&gateway.config);
        gateway.outputs.push_back(Output::Shard(esp::Command::Policies(policies)));
        gateway.pump(now);
        Ok(gateway)
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Gateway::handle_turn`] must be called at the latest.
    pub fn poll_timeout(&self) -> Duration {
        if self.is_busy() {
            return self.turned_at;
        }
        let mut next = self.pair.poll_timeout().min(self.next_query);
        let deadlines = self.pending.iter().filter_map(Pending::deadline);
        if let Some(deadline) = deadlines.chain(self.soon.front().map(|soon| soon.0)).min() {
            next = next.min(deadline);
        }
        for endpoint in &self.endpoints {
            match &endpoint.part {
                Part::Owner { .. } => {
                    next = next.min(endpoint.ike.poll_timeout().unwrap_or(Duration::MAX))
                }
                Part::Steering { last } => next = next.min(*last + STEER_QUIET),
                Part::Shadow | Part::Holding { .. } => {}
            }
        }
        next
    }

    /// An IKE message that came to one of our ports, without the non-ESP marker, or, with `steered`, from the other
    /// instance over the pair link.
    pub fn handle_ike(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &[u8],
        steered: bool,
    ) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        match &mut e.part {
            Part::Holding { inbox, .. } => {
                if inbox.len() < INBOX {
                    inbox.push_back(Datagram { from, to, bytes: bytes.to_vec() });
                } else {
                    self.count_ike_drop("queue_full");
                }
            }
            Part::Steering { last } if !steered => {
                *last = now;
                self.outputs.push_back(Output::SteerIke {
                    endpoint,
                    from,
                    to,
                    bytes: bytes.to_vec(),
                });
            }
            Part::Owner { .. } if now < e.valid_until => {
                let mut cx = ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis };
                e.ike.handle_datagram(&mut cx, from, to, bytes);
            }
            Part::Owner { .. } => self.count_ike_drop("fenced"),
            Part::Shadow | Part::Steering { .. } => self.count_ike_drop("not_owner"),
        }
        self.pump(now);
    }

    /// A heartbeat that `link` authenticated.
    pub fn handle_heartbeat(&mut self, now: Duration, link: u8, bytes: &[u8]) {
        self.pair.handle_heartbeat(now, ha::LinkId(link), bytes);
        self.pump(now);
    }

    /// A frame of the pair's stream.
    pub fn handle_frame(&mut self, now: Duration, bytes: &[u8]) {
        self.pair.handle_frame(now, bytes);
        self.pump(now);
    }

    /// The pair's stream stands, over this link.
    pub fn handle_stream_up(&mut self, now: Duration, link: u8) {
        self.stream_link = Some(link);
        self.pair.handle_stream_up(now, ha::LinkId(link));
        self.pump(now);
    }

    /// The pair's stream ended; with `goodbye`, the other instance stopped on purpose.
    pub fn handle_stream_down(&mut self, now: Duration, goodbye: bool) {
        self.stream_link = None;
        self.pair.handle_stream_down(now, goodbye);
        self.pump(now);
    }

    /// How a probe of the other's pair port ended.
    pub fn handle_probe_result(&mut self, now: Duration, link: u8, probe: ha::Probe) {
        self.pair.handle_probe_result(now, ha::LinkId(link), probe);
        self.pump(now);
    }

    /// The endpoint's WAN interface works, or does not.
    pub fn handle_uplink(&mut self, now: Duration, endpoint: EndpointId, up: bool) {
        self.pair.handle_uplink(now, ha::EndpointId(endpoint.0), up);
        self.pump(now);
    }

    /// A reservation is on disk.
    pub fn handle_reserved(&mut self, now: Duration, endpoint: EndpointId, up_to: Term) {
        self.pair.handle_reserved(now, ha::EndpointId(endpoint.0), ha::Term(up_to.0));
        self.pump(now);
    }

    /// The control loop has drained its sockets: timers run, the fence moves. Call it after every batch of inputs
    /// and at the latest when [`Gateway::poll_timeout`] passes.
    pub fn handle_turn(&mut self, now: Duration) {
        self.turned_at = now;
        self.pair.handle_turn(now);
        self.pump(now);
        for index in 0..self.endpoints.len() {
            let Some(e) = self.endpoints.get_mut(index) else { continue };
            if e.serves(now) && e.ike.poll_timeout().is_some_and(|due| due <= now) {
                let mut cx = ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis };
                e.ike.handle_timeout(&mut cx);
            }
            if let Part::Steering { last } = e.part
                && now >= last + STEER_QUIET
            {
                let endpoint = e.id;
                e.part = Part::Shadow;
                self.outputs
                    .push_back(Output::Shard(esp::Command::Disown { endpoint, steer: false }));
                self.outputs.push_back(Output::Addresses { endpoint, present: false });
            }
        }
        self.use_soon(now, None);
        self.go_on(now);
        // What IKE decided in this turn is in the log before an endpoint is offered: an offer ends the log.
        self.pump(now);
        self.plan(now);
        if now >= self.next_query {
            self.next_query = now + QUERY_EVERY;
            self.outputs.push_back(Output::Shard(esp::Command::Query { token: ROUTINE }));
        }
        self.pump(now);
    }

    /// A worker handed packets of this endpoint to the other instance: stragglers still arrive.
    pub fn note_steered(&mut self, now: Duration, endpoint: EndpointId) {
        if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0))
            && let Part::Steering { last } = &mut e.part
        {
            *last = now;
        }
    }

    /// Whether every endpoint is the other instance's, or nobody's.
    pub fn owns_nothing(&self) -> bool {
        !self.endpoints.iter().any(Endpoint::owns)
    }

    /// A planned stop: endpoints go to the other instance. Call it at each turn until [`Gateway::owns_nothing`], since
    /// the other may not be ready at once; then [`Gateway::goodbye`]. Where there is no living other instance, or the
    /// addresses cannot move, peers are told that their tunnels end, so that they can set up new ones with the next life.
    pub fn leave(&mut self, now: Duration) {
        let alone = !self.pair.status(now).contact;
        for index in 0..self.endpoints.len() {
            let Some(e) = self.endpoints.get(index).filter(|e| e.serves(now)) else { continue };
            if self.pair.switchover(now, e.ha_id()).is_ok() {
                continue;
            }
            if alone {
                self.end_tunnels(now, index);
            } else if self.stays(index) {
                self.close(now, index);
            }
        }
        self.pump(now);
    }

    /// Whether packets are still handed on that arrive after a switchover.
    pub fn hands_on(&self) -> bool {
        self.endpoints.iter().any(|e| matches!(e.part, Part::Steering { .. }))
    }

    /// Whether an endpoint that is owned here still has a tunnel whose peer must be told, or handed over.
    pub fn has_tunnels(&self) -> bool {
        self.endpoints.iter().any(|e| e.owns() && e.ike.has_sas())
    }

    /// Stops on purpose: endpoints go to the other instance, then the link closes with a goodbye.
    pub fn goodbye(&mut self, now: Duration) {
        self.pair.goodbye(now);
        self.pump(now);
    }

    /// What a worker's shard reported.
    pub fn handle_report(&mut self, now: Duration, report: esp::Report) {
        match report {
            esp::Report::LeaseLow { spi_in, next_seq, ceiling, rate_per_s } => {
                self.ask_lease(now, spi_in, (next_seq, ceiling), rate_per_s);
            }
            esp::Report::Obeying { endpoint, .. } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0))
                    && let Part::Owner { sync: Some(sync) } = &mut e.part
                {
                    sync.obeying = true;
                }
                self.confirm_sync(now, endpoint);
            }
            esp::Report::Windows(tops) => self.stream_tops(now, tops.as_slice()),
            esp::Report::Held { endpoint, counters, .. } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0))
                    && let Part::Holding { counters: slot, .. } = &mut e.part
                {
                    *slot = Some(counters);
                }
                self.grant(now, endpoint);
            }
            esp::Report::Disowned { endpoint, counters, .. } => {
                self.yield_counters(now, endpoint, &counters)
            }
            esp::Report::Expiring { spi_in, why, .. } => {
                tracing::info!(%spi_in, ?why, "Child SA is used up and will be rekeyed");
                self.with_sa(now, spi_in, |ike, cx| ike.rekey(cx, ike::Target::Child(spi_in)));
            }
            esp::Report::NoSa { endpoint, connection, child } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0))
                    && e.serves(now)
                {
                    let children =
                        self.config.connection(connection).map(|c| c.ike.children.as_slice());
                    let mut cx = ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis };
                    if let Some(child) =
                        children.and_then(|children| children.get(usize::from(child)))
                    {
                        e.ike.acquire(&mut cx, connection, &child.name);
                    }
                }
            }
            esp::Report::PeerMoved { spi_in, from, .. } => {
                self.with_sa(now, spi_in, |ike, cx| ike.note_moved(cx, spi_in, from));
            }
            esp::Report::Snapshot(snapshot) => self.take_snapshot(now, snapshot),
            esp::Report::Flows { token, flows } => self.answer_flows(token, &flows),
        }
        self.pump(now);
    }

    fn with_sa(
        &mut self,
        now: Duration,
        spi_in: EspSpi,
        act: impl Fn(&mut ike::Endpoint, &mut ike::Context<'_>) -> bool,
    ) {
        for e in &mut self.endpoints {
            if e.serves(now) {
                let mut cx = ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis };
                if act(&mut e.ike, &mut cx) {
                    return;
                }
            }
        }
        tracing::debug!(%spi_in, "report about a Child SA that is gone");
    }

    fn take_snapshot(&mut self, now: Duration, mut snapshot: Box<esp::Snapshot>) {
        snapshot.sas.sort_unstable_by_key(|sa| sa.spi_in);
        let old = self.snapshot.as_ref().map(|old| old.sas.as_slice()).unwrap_or_default();
        let before = |spi_in| {
            let at = old.binary_search_by_key(&spi_in, |sa| sa.spi_in).ok()?;
            old.get(at)?.last_in
        };
        for sa in &snapshot.sas {
            let Some(e) = self.endpoints.get_mut(usize::from(sa.endpoint.0)) else { continue };
            if sa.last_in > before(sa.spi_in) && e.serves(now) {
                let mut cx = ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis };
                e.ike.note_inbound(&mut cx, sa.spi_in);
            }
        }
        self.snapshot = Some(snapshot);
    }

    /// Carries every consequence to the outputs: `ha`'s events, IKE's transitions, and what these cause in turn.
    pub(crate) fn pump(&mut self, now: Duration) {
        loop {
            let mut idle = true;
            while let Some(event) = self.pair.poll_event() {
                idle = false;
                self.handle_pair_event(now, event);
            }
            for index in 0..self.endpoints.len() {
                idle &= !self.step_ike(now, index);
            }
            if idle {
                break;
            }
        }
        for e in &mut self.endpoints {
            let on = self.pair.others(e.ha_id());
            if on != e.others {
                e.others = on;
                self.outputs.push_back(Output::Shard(esp::Command::Steer { endpoint: e.id, on }));
            }
        }
        self.tell_use();
        self.settle_requests(now);
        while let Some(transmit) = self.pair.poll_transmit() {
            self.outputs.push_back(Output::Pair(transmit));
        }
    }

    /// Appends what IKE decided; `false` if there was nothing.
    pub(crate) fn step_ike(&mut self, now: Duration, index: usize) -> bool {
        let Some(e) = self.endpoints.get_mut(index) else { return false };
        let mut moved = false;
        while let Some(transition) = e.ike.poll_transition() {
            moved = true;
            let ike::Transition { puts, deletes, children, transmits } = transition;
            let mut release = Release { transmits, use_outbound: Vec::new() };
            for op in children {
                install(&mut self.outputs, &mut self.spis, e, op, &mut release.use_outbound);
            }
            if !puts.is_empty() || !deletes.is_empty() {
                let batch = ha::Batch {
                    puts: puts.into_iter().map(|(spi, value)| (spi.0, value)).collect(),
                    deletes: deletes.into_iter().map(|spi: IkeSpi| spi.0).collect(),
                };
                match self.pair.append(now, e.ha_id(), batch) {
                    Ok(position) => e.position = position.0,
                    Err(error) => {
                        // Without its record the step must not become visible to the peer.
                        tracing::error!(endpoint = e.name, %error, "a record could not be appended; its datagrams are withheld");
                        continue;
                    }
                }
            }
            e.held.push(e.position, release);
        }
        while let Some(ike::Keepalive { from, to }) = e.ike.poll_keepalive() {
            moved = true;
            self.outputs.push_back(Output::Ike { endpoint: e.id, from, to, bytes: vec![0xff] });
        }
        while let Some(event) = e.ike.poll_event() {
            moved = true;
            match event {
                ike::Event::KeyLog(line) => self.outputs.push_back(Output::KeyLog(line)),
                ike::Event::Failed(failure) => {
                    tracing::warn!(endpoint = e.name, "{failure}");
                    // What a stranger began says nothing of what an operator waits for.
                    if let Some(connection) = &failure.connection
                        && failure.began == ike::Side::Us
                    {
                        let text = failure.to_string();
                        let id = self.config.connection_named(connection).map(|c| c.ike.id);
                        self.pending.iter_mut().for_each(|p| p.note_failure(id, &text));
                    }
                }
                event @ ike::Event::Retransmitting { .. } => {
                    tracing::warn!(endpoint = e.name, "{event}")
                }
                event => tracing::info!(endpoint = e.name, "{event}"),
            }
        }
        self.release(index) || moved
    }

    /// Lets go what is committed.
    pub(crate) fn release(&mut self, index: usize) -> bool {
        let Some(e) = self.endpoints.get_mut(index) else { return false };
        let committed = if self.bug == Bug::SendBeforeCommit { u64::MAX } else { e.committed };
        let mut released = false;
        while let Some(release) = e.held.pop(committed) {
            released = true;
            for spi_in in release.use_outbound {
                self.outputs.push_back(Output::Shard(esp::Command::UseOutbound { spi_in }));
            }
            for ike::Transmit { from, to, bytes } in release.transmits {
                self.outputs.push_back(Output::Ike { endpoint: e.id, from, to, bytes });
            }
        }
        released
    }

    fn ask_lease(
        &mut self,
        now: Duration,
        spi_in: EspSpi,
        (next_seq, ceiling): (u64, u64),
        rate_per_s: u64,
    ) {
        for index in 0..self.endpoints.len() {
            let Some(e) = self.endpoints.get_mut(index) else { continue };
            if !e.owns() {
                continue;
            }
            if let Some(ceiling) = e.leases.ask(spi_in, next_seq, ceiling, rate_per_s) {
                self.say_ceilings(now, index, vec![ceiling]);
            }
        }
    }

    /// Tells the shadow about ceilings; they count when it has acknowledged them.
    pub(crate) fn say_ceilings(&mut self, now: Duration, index: usize, ceilings: Vec<Ceiling>) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let bytes = peer_message::encode(&Side::Ceilings(ceilings.clone()));
        match self.pair.send_side(now, e.ha_id(), ha::SideKind::Acked, bytes) {
            Some(id) => e.leases.sent(id, ceilings),
            // Solo: nobody to tell, and leases are not obeyed.
            None => e.leases.unsaid(&ceilings),
        }
    }

    fn stream_tops(&mut self, now: Duration, tops: &[(EspSpi, u32)]) {
        for e in self.endpoints.iter_mut().filter(|e| e.owns()) {
            let list: Vec<Top> = tops
                .iter()
                .filter(|(spi_in, _)| e.leases.knows(*spi_in))
                .map(|(spi_in, top)| Top { spi_in: spi_in.0, top: *top })
                .collect();
            if !list.is_empty() {
                let bytes = peer_message::encode(&Side::Tops(list));
                self.pair.send_side(now, e.ha_id(), ha::SideKind::Unacked, bytes);
            }
        }
    }

    pub(crate) fn context(&mut self, now: Duration) -> (ike::Context<'_>, &mut Vec<Endpoint>) {
        (ike::Context { now, rng: &mut *self.rng, spis: &mut self.spis }, &mut self.endpoints)
    }

    /// Child SAs that came in a record: into the shards of a shadow.
    ///
    /// The owner begins to use an SA when we have acknowledged it, and flows are pinned to a tunnel by who uses it: so a
    /// shadow waits a moment, lest it hand over packets that the owner would pin elsewhere.
    pub(crate) fn install_shadow(
        &mut self,
        now: Duration,
        index: usize,
        mut ops: Vec<ike::ChildOp>,
    ) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        // A snapshot may bring SAs of another lineage into the slots of those that it removes.
        ops.sort_by_key(|op| !matches!(op, ike::ChildOp::Remove { .. }));
        let removed: BTreeSet<EspSpi> = ops
            .iter()
            .filter_map(|op| match op {
                ike::ChildOp::Remove { spi_in } => Some(*spi_in),
                _ => None,
            })
            .collect();
        if !removed.is_empty() {
            self.soon.retain(|(_, _, soon)| !removed.contains(soon));
        }
        let mut later = Vec::new();
        for op in ops {
            let installed = match &op {
                ike::ChildOp::Install(child) => Some(child.spi_in),
                _ => None,
            };
            install(&mut self.outputs, &mut self.spis, e, op, &mut later);
            // What was accepted before is never accepted again, also if that was said before the record came.
            if let Some(spi_in) = installed
                && let top @ 1.. = e.leases.top(spi_in)
            {
                self.outputs.push_back(Output::Shard(esp::Command::Window { spi_in, top }));
            }
        }
        let due = match self.bug {
            Bug::ShadowNeverUses => Duration::MAX,
            Bug::ShadowUsesAtOnce => now,
            _ => now + SHADOW_USE,
        };
        self.soon.extend(later.into_iter().map(|spi_in| (due, e.id, spi_in)));
    }

    /// Has the shards use what is due, or all of one endpoint.
    pub(crate) fn use_soon(&mut self, now: Duration, endpoint: Option<EndpointId>) {
        for (due, of, spi_in) in std::mem::take(&mut self.soon) {
            if now >= due || endpoint == Some(of) {
                self.outputs.push_back(Output::Shard(esp::Command::UseOutbound { spi_in }));
            } else {
                self.soon.push_back((due, of, spi_in));
            }
        }
    }

    fn count_ike_drop(&mut self, reason: &'static str) {
        *self.counters.ike_drops.entry(reason).or_default() += 1;
    }
}

/// One change of what the shards hold. Outbound use waits in `later`, for commitment.
fn install(
    outputs: &mut VecDeque<Output>,
    spis: &mut SpiPool,
    e: &mut Endpoint,
    op: ike::ChildOp,
    later: &mut Vec<EspSpi>,
) {
    match op {
        ike::ChildOp::Install(child) => {
            // Another instance's record, of a shadow or in healing, may bring back what we chose once and released.
            spis.adopt(child.spi_in);
            let ceiling = e.leases.install(child.spi_in);
            let sa = esp::Sa {
                endpoint: e.id,
                connection: child.connection,
                spi_in: child.spi_in,
                spi_out: child.spi_out,
                alg: child.aead,
                keymat_in: child.keymat_in,
                keymat_out: child.keymat_out,
                local_ts: child.local_ts,
                remote_ts: child.remote_ts,
                local: child.local,
                remote: child.remote,
                udp_encap: child.udp_encap,
                next_seq: 1,
                ceiling,
                born: child.born,
            };
            outputs.push_back(Output::Shard(esp::Command::Install(Box::new(sa))));
        }
        ike::ChildOp::UseOutbound { spi_in } => later.push(spi_in),
        ike::ChildOp::Move { spi_in, local, remote, udp_encap } => {
            outputs.push_back(Output::Shard(esp::Command::Move {
                spi_in,
                local,
                remote,
                udp_encap,
            }));
        }
        ike::ChildOp::Remove { spi_in } => {
            e.leases.remove(spi_in);
            spis.release(spi_in);
            outputs.push_back(Output::Shard(esp::Command::Remove { spi_in }));
        }
    }
}

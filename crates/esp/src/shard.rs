//! One worker's whole logic, composed: policies, SAs, endpoints, queues and
//! reports. It does no I/O, reads no clock and allocates nothing per packet.

use core::time::Duration;
use std::collections::VecDeque;

use crypto::aead::IvSequence;
use wire::esp::Header;
use wire::id::{EndpointId, EspSpi};
use wire::ip::Packet;

use crate::batch::{Batch, Direction, SLOT_LEN, Slot, Verdict};
use crate::command::{Command, CommandError, Counters, Sa};
use crate::endpoint::{Admission, Arrival, Endpoint, Obey, Role};
use crate::policy::{Match, Policies, Tunnel};
use crate::queue::Queue;
use crate::reason::{Reason, Stats};
use crate::report::{Report, Snapshot, Tops};
use crate::sa::{Ended, SaState};
use crate::table::Table;

/// Sizes of a shard, fixed when it is made.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Endpoints in the configuration.
    pub endpoints: usize,
    /// SPI slots per instance: bound of [`wire::id::SpiLayout::slot`].
    pub max_slots: usize,
    /// Packets that one endpoint can hold during a switchover, both
    /// directions together.
    pub queue_len: usize,
    /// Size of one queued slot in bytes; that of the batches' slots.
    pub slot_len: usize,
    /// Window tops are reported this long after the first of them moved: not at once, since control, which has the
    /// higher priority, would then run ahead of whoever waits for the packet.
    pub window_interval: Duration,
}

impl Default for Config {
    /// One endpoint, 2,048 packets of queue (4 MiB), tops every 3 ms.
    fn default() -> Self {
        Self {
            endpoints: 1,
            max_slots: 1 << 16,
            queue_len: 2048,
            slot_len: SLOT_LEN,
            window_interval: Duration::from_millis(3),
        }
    }
}

/// Removed SAs that are remembered; what healing brings back was removed since the split.
const ENDED_MAX: usize = 256;

/// One worker's logic. See the crate's documentation for the loop around it.
#[derive(Debug)]
pub struct Shard {
    config: Config,
    table: Table,
    pub(crate) policies: Policies,
    endpoints: Vec<Endpoint>,
    stats: Stats,
    /// Answers to commands.
    answers: VecDeque<Report>,
    /// SAs with something to report.
    noted: Vec<EspSpi>,
    /// SAs whose window moved.
    moved: Vec<EspSpi>,
    /// SAs that were removed, the latest last: healing from a split can bring one back, and it must not repeat numbers.
    ended: VecDeque<Ended>,
    /// When the first of them moved.
    moved_at: Duration,
}

impl Shard {
    /// A shard that owns nothing. All of its memory for packets is allocated
    /// here.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let endpoint = |_| Endpoint::new(Queue::new(config.queue_len, config.slot_len));
        Self {
            config,
            table: Table::new(config.max_slots),
            policies: Policies::new(),
            endpoints: (0..config.endpoints).map(endpoint).collect(),
            stats: Stats::default(),
            answers: VecDeque::new(),
            noted: Vec::new(),
            moved: Vec::new(),
            ended: VecDeque::new(),
            moved_at: Duration::ZERO,
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Takes inner packets as read from the TUN (or steered by the other
    /// instance) and decides on each: [`Verdict::Send`], [`Verdict::Steer`],
    /// [`Verdict::Held`] or [`Verdict::Drop`]. `fences` holds, by endpoint,
    /// the time until which this instance may send; endpoints beyond its end
    /// are fenced.
    pub fn outbound(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        self.turn(now, fences, batch, Direction::Outbound);
    }

    /// Takes ESP packets, without outer headers, and decides on each:
    /// [`Verdict::Deliver`], [`Verdict::Steer`], [`Verdict::Held`] or
    /// [`Verdict::Drop`]. `fences` is as in [`Shard::outbound`].
    pub fn inbound(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        self.turn(now, fences, batch, Direction::Inbound);
    }

    /// Works off queues whose time has come, in order, into `batch`, which is
    /// emptied first; any verdict but [`Verdict::Pending`] and
    /// [`Verdict::Held`] can come, in both directions. Returns how many
    /// packets there were: call again until it is 0.
    pub fn flush(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) -> usize {
        batch.clear();
        let mut fenced = false;
        for at in 0..self.endpoints.len() {
            while let Some(slot) = self.release(at, now, batch) {
                let verdict = match slot.direction {
                    Direction::Outbound => self.outbound_one(now, fences, slot, true),
                    Direction::Inbound => self.inbound_one(now, fences, slot, true),
                };
                fenced |= self.settle(slot, verdict);
            }
        }
        self.stats.fenced_batches += u64::from(fenced);
        batch.len()
    }

    /// When [`Shard::flush`] or [`Shard::poll_report`] has something to do;
    /// zero is at once, `None` not before the next packet or command.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Duration> {
        let looking =
            |e: &Endpoint| matches!(e.role, Role::Owner { obey: Obey::Wanted { look: true }, .. });
        if !self.answers.is_empty()
            || !self.noted.is_empty()
            || self.policies.is_asking()
            || self.endpoints.iter().any(looking)
        {
            return Some(Duration::ZERO);
        }
        let tops = (!self.moved.is_empty()).then(|| self.moved_at + self.config.window_interval);
        self.endpoints.iter().filter_map(Endpoint::release_at).chain(tops).min()
    }

    /// Applies one command.
    ///
    /// # Errors
    /// [`CommandError`]: nothing was changed.
    pub fn apply(&mut self, command: Command) -> Result<(), CommandError> {
        match command {
            Command::Policies(policies) => self.policies.configure(policies),
            Command::Install(sa) => self.install(*sa)?,
            Command::UseOutbound { spi_in } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                sa.used = true;
                self.policies.use_sa(tunnel_of(sa), &sa.local_ts, &sa.remote_ts);
            }
            Command::Move { spi_in, local, remote, udp_encap } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                sa.relocate(local, remote, udp_encap);
            }
            Command::Remove { spi_in } => self.remove(spi_in)?,
            Command::Own { endpoint, term, seq_jump, obey_leases } => {
                let e = self.endpoint(endpoint)?;
                if let Some(had) = e.term.filter(|had| *had > term) {
                    return Err(CommandError::StaleTerm { endpoint, had, got: term });
                }
                let obey = if obey_leases { Obey::Yes } else { Obey::No };
                e.role = Role::Owner { obey, held: false };
                if e.term != Some(term) {
                    e.ivs = IvSequence::new(term.0);
                }
                e.term = Some(term);
                e.seq_jump = seq_jump;
            }
            Command::ObeyLeases { endpoint, on } => self.obey_leases(endpoint, on)?,
            Command::Hold { endpoint } => {
                let e = self.endpoint(endpoint)?;
                let (Role::Owner { held, .. }, Some(term)) = (&mut e.role, e.term) else {
                    return Err(CommandError::NotOwner(endpoint));
                };
                *held = true;
                let counters = self.counters(endpoint);
                self.answers.push_back(Report::Held { endpoint, term, counters });
            }
            Command::Release { endpoint } => {
                let Role::Owner { held, .. } = &mut self.endpoint(endpoint)?.role else {
                    return Err(CommandError::NotOwner(endpoint));
                };
                *held = false;
            }
            Command::Disown { endpoint, steer } => {
                self.endpoint(endpoint)?;
                let mut counters = self.counters(endpoint);
                if !steer && self.endpoint(endpoint)?.ownership().is_some() {
                    // Whoever goes on after a split may still have what was removed here meanwhile.
                    let ended = self.ended.iter().filter(|ended| ended.endpoint == endpoint);
                    counters.extend(ended.map(Ended::counters));
                }
                let e = self.endpoint(endpoint)?;
                e.role = if steer { Role::Steering } else { Role::Idle };
                e.direct_until = Duration::ZERO;
                e.back_until = Duration::ZERO;
                let term = e.term;
                self.answers.push_back(Report::Disowned { endpoint, term, counters });
            }
            Command::Steer { endpoint, on } => self.endpoint(endpoint)?.others = on,
            Command::Pin { endpoint, on } => {
                self.endpoint(endpoint)?;
                self.policies.pin_to(endpoint, on);
            }
            Command::HandBack { endpoint, until } => self.endpoint(endpoint)?.back_until = until,
            Command::HoldDirect { endpoint, until } => {
                self.endpoint(endpoint)?.direct_until = until;
            }
            Command::Lease { spi_in, ceiling } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                if let Some(e) = self.endpoints.get_mut(usize::from(sa.endpoint.0)) {
                    // First into the term: a ceiling that is given in it must
                    // not move the place where the SA starts.
                    if let Some(own) = e.ownership() {
                        sa.enter_term(own);
                    }
                    if let Role::Owner { obey: Obey::Wanted { look }, .. } = &mut e.role {
                        *look = true;
                    }
                }
                sa.lease(ceiling);
                note(sa, &mut self.noted);
            }
            Command::Resume { term, counters } => {
                let spi_in = counters.spi_in;
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                let e = self.endpoints.get(usize::from(sa.endpoint.0));
                if let Some(own) = e.and_then(Endpoint::ownership).filter(|own| own.term == term) {
                    // Healing in the running term: an SA that was idle since the term began enters it now, so that
                    // the counters are merged with its own and do not replace them.
                    sa.enter_term(own);
                }
                sa.resume(term, &counters);
                note(sa, &mut self.noted);
            }
            Command::Window { spi_in, top } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                let owned = self
                    .endpoints
                    .get(usize::from(sa.endpoint.0))
                    .is_some_and(|e| e.ownership().is_some());
                // The last words of a former owner come too late: the grant's
                // exact window knows more.
                if !owned {
                    sa.refuse_through(top);
                }
            }
            Command::Query { token } => {
                let sas = self.table.iter().map(SaState::stats);
                let snapshot = Snapshot { token, stats: self.stats, sas: sas.collect() };
                self.answers.push_back(Report::Snapshot(Box::new(snapshot)));
            }
            Command::Flows { token, now } => {
                let flows = self.policies.flows(now);
                self.answers.push_back(Report::Flows { token, flows });
            }
        }
        Ok(())
    }

    /// The next thing the control thread should know, if any. Window tops come
    /// [`Config::window_interval`] after the first of them moved.
    pub fn poll_report(&mut self, now: Duration) -> Option<Report> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        if let Some(report) = self.poll_obeying() {
            return Some(report);
        }
        while let Some(spi_in) = self.noted.last().copied() {
            let Some(sa) = self.table.get_mut(spi_in) else {
                self.noted.pop();
                continue;
            };
            if let Some(report) = sa.take_note() {
                return Some(report);
            }
            sa.listed = false;
            self.noted.pop();
        }
        if let Some(report) = self.policies.take_note() {
            return Some(report);
        }
        self.poll_tops(now)
    }

    fn poll_tops(&mut self, now: Duration) -> Option<Report> {
        if self.moved.is_empty() || now < self.moved_at + self.config.window_interval {
            return None;
        }
        let mut tops = Tops::new();
        while let Some(spi_in) = self.moved.last().copied() {
            if let Some(sa) = self.table.get_mut(spi_in) {
                if !tops.push(spi_in, sa.top()) {
                    // The rest follows in the next report, at once.
                    return Some(Report::Windows(tops));
                }
                sa.moved = false;
            }
            self.moved.pop();
        }
        Some(Report::Windows(tops))
    }

    /// Whether an endpoint that wanted to obey leases now can.
    fn poll_obeying(&mut self) -> Option<Report> {
        let wants =
            |e: &Endpoint| matches!(e.role, Role::Owner { obey: Obey::Wanted { look: true }, .. });
        let at = self.endpoints.iter().position(wants)?;
        let e = self.endpoints.get_mut(at)?;
        let own = e.ownership()?;
        let endpoint = EndpointId(u8::try_from(at).ok()?);
        let mut all_below = true;
        for sa in self.table.iter_mut().filter(|sa| sa.endpoint == endpoint) {
            sa.enter_term(own);
            all_below &= sa.below_ceiling();
        }
        if let Role::Owner { obey, .. } = &mut e.role {
            *obey = if all_below { Obey::Yes } else { Obey::Wanted { look: false } };
        }
        all_below.then_some(Report::Obeying { endpoint })
    }

    fn obey_leases(&mut self, endpoint: EndpointId, on: bool) -> Result<(), CommandError> {
        let e = self.endpoint(endpoint)?;
        let Role::Owner { obey, .. } = &mut e.role else {
            return Err(CommandError::NotOwner(endpoint));
        };
        if !on {
            *obey = Obey::No;
            return Ok(());
        }
        if *obey != Obey::Yes {
            *obey = Obey::Wanted { look: true };
        } else {
            // Asked again, answered again.
            self.answers.push_back(Report::Obeying { endpoint });
        }
        let Some(own) = self.endpoint(endpoint)?.ownership() else { return Ok(()) };
        for sa in self.table.iter_mut().filter(|sa| sa.endpoint == endpoint) {
            sa.enter_term(own);
            if !sa.below_ceiling() {
                sa.ask_lease();
            }
            note(sa, &mut self.noted);
            move_top(sa, &mut self.moved);
        }
        Ok(())
    }

    /// Has the endpoints that wait for ceilings looked at again.
    fn look_at_leases(&mut self) {
        for e in &mut self.endpoints {
            if let Role::Owner { obey: Obey::Wanted { look }, .. } = &mut e.role {
                *look = true;
            }
        }
    }

    fn remove(&mut self, spi_in: EspSpi) -> Result<(), CommandError> {
        let sa = self.table.remove(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(sa.ended());
        self.policies.remove(spi_in);
        self.noted.retain(|spi| *spi != spi_in);
        self.moved.retain(|spi| *spi != spi_in);
        self.look_at_leases();
        Ok(())
    }

    fn install(&mut self, sa: Sa) -> Result<(), CommandError> {
        let spi_in = sa.spi_in;
        let owned = self.endpoint(sa.endpoint)?.ownership().map(|own| own.term);
        if let Some(old) = self.table.get_mut(spi_in)
            && old.is_same(&sa)
        {
            old.update(sa);
            note(old, &mut self.noted);
            if old.used {
                self.policies.refresh(tunnel_of(old), &old.local_ts, &old.remote_ts);
            }
            return Ok(());
        }
        // Another instance that lost everything chooses SPIs anew. What its earlier life chose at an endpoint that is
        // not ours is history, if it did so: that endpoint's records will say so a moment later.
        let endpoint = sa.endpoint;
        if let Some(other) = self.table.other_at(spi_in).map(|other| (other.spi_in, other.endpoint))
            && other.1 != endpoint
            && self.endpoint(other.1)?.ownership().is_none()
        {
            self.remove(other.0)?;
        }
        let mut state = SaState::new(sa, owned)?;
        self.ended.retain(|ended| !state.recall(ended));
        self.table.insert(state)?;
        // Other keys: whatever was in use under this SPI is gone.
        self.policies.remove(spi_in);
        self.noted.retain(|spi| *spi != spi_in);
        self.moved.retain(|spi| *spi != spi_in);
        // An SA is in each list at most once, so packets never make them grow.
        let room = self.table.len();
        self.noted.reserve(room.saturating_sub(self.noted.len()));
        self.moved.reserve(room.saturating_sub(self.moved.len()));
        if let Some(sa) = self.table.get_mut(spi_in) {
            note(sa, &mut self.noted);
        }
        Ok(())
    }

    /// Exact counters of all SAs of an endpoint that is owned; else none.
    fn counters(&mut self, endpoint: EndpointId) -> Vec<Counters> {
        let own = self.endpoint(endpoint).ok().and_then(|e| e.ownership());
        let Some(own) = own else { return Vec::new() };
        let of_it = self.table.iter_mut().filter(|sa| sa.endpoint == endpoint);
        of_it
            .map(|sa| {
                sa.enter_term(own);
                sa.counters()
            })
            .collect()
    }

    fn endpoint(&mut self, endpoint: EndpointId) -> Result<&mut Endpoint, CommandError> {
        self.endpoints
            .get_mut(usize::from(endpoint.0))
            .ok_or(CommandError::UnknownEndpoint(endpoint))
    }

    /// The next packet of an endpoint's queue, if it may go, in a slot of
    /// `batch`, if there is one left.
    fn release<'a>(
        &mut self,
        at: usize,
        now: Duration,
        batch: &'a mut Batch,
    ) -> Option<&'a mut Slot> {
        let endpoint = self.endpoints.get_mut(at)?;
        if now < endpoint.release_at()? {
            return None;
        }
        let slot = batch.push()?;
        // Not empty, or there were no time of release.
        endpoint.queue.pop(slot);
        Some(slot)
    }

    fn turn(
        &mut self,
        now: Duration,
        fences: &[Duration],
        batch: &mut Batch,
        direction: Direction,
    ) {
        let mut fenced = false;
        for slot in batch.slots_mut() {
            slot.direction = direction;
            let verdict = match direction {
                Direction::Outbound => self.outbound_one(now, fences, slot, false),
                Direction::Inbound => self.inbound_one(now, fences, slot, false),
            };
            fenced |= self.settle(slot, verdict);
        }
        self.stats.fenced_batches += u64::from(fenced);
    }

    /// Writes the verdict down and counts it. Whether it was the fence's.
    fn settle(&mut self, slot: &mut Slot, verdict: Result<Verdict, Reason>) -> bool {
        slot.verdict = verdict.unwrap_or_else(Verdict::Drop);
        match slot.verdict {
            Verdict::Drop(reason) => {
                self.stats.count_drop(reason);
                return reason == Reason::Fenced;
            }
            Verdict::Steer { .. } => self.stats.steered += 1,
            Verdict::Held => self.stats.held += 1,
            // Counted with their bytes where they were made.
            Verdict::Send { .. } | Verdict::Deliver { .. } | Verdict::Pending => {}
        }
        false
    }

    fn outbound_one(
        &mut self,
        now: Duration,
        fences: &[Duration],
        slot: &mut Slot,
        released: bool,
    ) -> Result<Verdict, Reason> {
        let packet = Packet::parse(slot.packet()).map_err(|_| Reason::MalformedInner)?;
        let arrival = Arrival { steered: slot.steered, released };
        let chosen = slot.steered.map(|steered| steered.endpoint);
        let spi_in = match self.policies.lookup(now, &packet, slot.packet(), chosen) {
            Match::Sa(spi_in) => spi_in,
            Match::NoSa(at, endpoint) => {
                return match self.endpoint(endpoint).map(|e| e.admit(now, arrival)) {
                    Ok(Admission::Steer) => Ok(Verdict::Steer { endpoint }),
                    Ok(Admission::Drop(reason)) => Err(reason),
                    Ok(Admission::Process(_) | Admission::Queue) => {
                        self.policies.want_sa(at, now);
                        Err(Reason::NoSa)
                    }
                    Err(_) => Err(Reason::NotOwner),
                };
            }
            Match::None => return Err(Reason::NoPolicy),
        };
        let sa = self.table.get_mut(spi_in).ok_or(Reason::NoSa)?;
        let endpoint = sa.endpoint;
        let e = self.endpoints.get_mut(usize::from(endpoint.0)).ok_or(Reason::NotOwner)?;
        let own = match e.admit(now, arrival) {
            Admission::Process(own) => own,
            Admission::Steer => return Ok(Verdict::Steer { endpoint }),
            Admission::Queue => return hold(&mut e.queue, slot),
            Admission::Drop(reason) => return Err(reason),
        };
        if !is_inside_fence(fences, endpoint, now) {
            return Err(Reason::Fenced);
        }
        sa.enter_term(own);
        let sealed = sa.seal(slot, &packet, own, &mut e.ivs, now);
        note(sa, &mut self.noted);
        if sealed.is_ok() {
            self.stats.sealed += 1;
            self.stats.sealed_bytes += packet.total_len as u64;
        }
        sealed
    }

    fn inbound_one(
        &mut self,
        now: Duration,
        fences: &[Duration],
        slot: &mut Slot,
        released: bool,
    ) -> Result<Verdict, Reason> {
        let header = Header::parse(slot.packet()).ok_or(Reason::MalformedEsp)?;
        let sa = self.table.get_mut(header.spi).ok_or(Reason::UnknownSpi)?;
        let endpoint = sa.endpoint;
        let arrival = Arrival { steered: slot.steered, released };
        let e = self.endpoints.get_mut(usize::from(endpoint.0)).ok_or(Reason::NotOwner)?;
        let own = match e.admit(now, arrival) {
            Admission::Process(own) => own,
            Admission::Steer => return Ok(Verdict::Steer { endpoint }),
            Admission::Queue => return hold(&mut e.queue, slot),
            Admission::Drop(reason) => return Err(reason),
        };
        if !is_inside_fence(fences, endpoint, now) {
            return Err(Reason::Fenced);
        }
        sa.enter_term(own);
        let top = sa.top();
        let opened = sa.open(slot, now);
        // Also when the packet is dropped after its tag was verified.
        if sa.top() != top {
            if self.moved.is_empty() {
                self.moved_at = now;
            }
            move_top(sa, &mut self.moved);
        }
        note(sa, &mut self.noted);
        opened?;
        self.stats.opened += 1;
        self.stats.opened_bytes += slot.packet().len() as u64;
        Ok(Verdict::Deliver { endpoint })
    }
}

/// ha.md, "The fence": valid until then, not at it.
fn is_inside_fence(fences: &[Duration], endpoint: EndpointId, now: Duration) -> bool {
    fences.get(usize::from(endpoint.0)).is_some_and(|valid_until| now < *valid_until)
}

fn hold(queue: &mut Queue, slot: &mut Slot) -> Result<Verdict, Reason> {
    if queue.push(slot) { Ok(Verdict::Held) } else { Err(Reason::QueueFull) }
}

fn tunnel_of(sa: &SaState) -> Tunnel {
    Tunnel { endpoint: sa.endpoint, connection: sa.connection, spi_in: sa.spi_in }
}

/// Lists an SA that has something to report.
#[inline]
fn note(sa: &mut SaState, noted: &mut Vec<EspSpi>) {
    if !sa.listed && sa.has_notes() {
        sa.listed = true;
        noted.push(sa.spi_in);
    }
}

/// Lists an SA whose window top is to be streamed.
#[inline]
fn move_top(sa: &mut SaState, moved: &mut Vec<EspSpi>) {
    if !sa.moved {
        sa.moved = true;
        moved.push(sa.spi_in);
    }
}

//! One worker's whole logic, composed: policies, SAs, endpoints, queues and
//! reports. It does no I/O, reads no clock and allocates nothing per packet.

mod apply;
mod hand;

use core::time::Duration;
use std::collections::VecDeque;

use wire::esp::Header;
use wire::id::{EndpointId, EspSpi};
use wire::ip::Packet;

use crate::batch::{Batch, Direction, SLOT_LEN, Slot, Verdict};
use crate::endpoint::{Admission, Arrival, Endpoint, Obey, Role};
use crate::foreign::Foreign;
use crate::policy::{Match, Policies};
use crate::queue::Queue;
use crate::reason::{Reason, Stats};
use crate::report::{Report, Tops};
use crate::sa::{Ended, SaState};
use crate::table::Table;

/// Sizes of a shard, fixed when it is made.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Endpoints in the configuration.
    pub endpoints: usize,
    /// SPI slots per instance: bound of [`wire::id::SpiLayout::slot`].
    pub max_slots: usize,
    /// Packets that one endpoint can hold here during a switchover, both
    /// directions together.
    pub queue_len: usize,
    /// Size of one queued slot in bytes; that of the batches' slots.
    pub slot_len: usize,
    /// Window tops are reported this long after the first of them moved: not at once, since control, which has the
    /// higher priority, would then run ahead of whoever waits for the packet.
    pub window_interval: Duration,
    /// Which worker of the instance this is, from 0. Worker 0 steers for all.
    pub worker: u8,
    /// How many there are. Each SA is one's alone: [`wire::id::SpiLayout::worker_of`].
    pub workers: u8,
}

impl Default for Config {
    /// The only worker, one endpoint, 2,048 packets of queue (4 MiB), tops every 5 ms.
    fn default() -> Self {
        Self {
            endpoints: 1,
            max_slots: 1 << 16,
            queue_len: 2048,
            slot_len: SLOT_LEN,
            window_interval: Duration::from_millis(5),
            worker: 0,
            workers: 1,
        }
    }
}

/// Removed SAs that are remembered; what healing brings back was removed since the split.
const ENDED_MAX: usize = 256;

/// One worker's logic. See the crate's documentation for the loop around it.
#[derive(Debug)]
pub struct Shard {
    config: Config,
    table: Table<SaState>,
    /// What is known of the other workers' SAs.
    foreign: Table<Foreign>,
    pub(crate) policies: Policies,
    endpoints: Vec<Endpoint>,
    stats: Stats,
    /// Commands so far.
    obeyed: u64,
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
            foreign: Table::new(config.max_slots),
            policies: Policies::new(),
            endpoints: (0..config.endpoints).map(endpoint).collect(),
            stats: Stats::default(),
            obeyed: 0,
            answers: VecDeque::new(),
            noted: Vec::new(),
            moved: Vec::new(),
            ended: VecDeque::new(),
            moved_at: Duration::ZERO,
        }
    }

    /// How many commands it has obeyed, those that failed included.
    #[must_use]
    pub fn obeyed(&self) -> u64 {
        self.obeyed
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Takes inner packets as read from the TUN (or steered by the other
    /// instance) and decides on each: [`Verdict::Send`], [`Verdict::Steer`],
    /// [`Verdict::Hand`], [`Verdict::Held`] or [`Verdict::Drop`]. `fences` holds, by endpoint,
    /// the time until which this instance may send; endpoints beyond its end
    /// are fenced.
    pub fn outbound(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        self.turn(now, fences, batch, Direction::Outbound);
    }

    /// Takes ESP packets, without outer headers, and decides on each:
    /// [`Verdict::Deliver`], [`Verdict::Steer`], [`Verdict::Hand`],
    /// [`Verdict::Held`] or [`Verdict::Drop`]. `fences` is as in [`Shard::outbound`].
    pub fn inbound(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        self.turn(now, fences, batch, Direction::Inbound);
    }

    /// Takes packets of either direction that another worker's shard gave the
    /// verdict [`Verdict::Hand`] for, and decides on each; again that verdict
    /// can come. The caller has told this shard all commands that the other
    /// had been told by then: so no packet is lost between the two.
    pub fn handed(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        let mut fenced = false;
        for slot in batch.slots_mut() {
            let verdict = self.handed_one(now, fences, slot, false);
            fenced |= self.settle(slot, verdict);
        }
        self.stats.fenced_batches += u64::from(fenced);
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
                let verdict = self.handed_one(now, fences, slot, true);
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
        all_below.then_some(Report::Obeying { endpoint, at: self.obeyed })
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
            Verdict::Hand { .. } => self.stats.handed += 1,
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
                    Ok(Admission::Steer) => self.steer(slot, endpoint),
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
        self.outbound_by(now, fences, slot, &packet, spi_in, arrival)
    }

    /// Judges an outbound packet that belongs to this SA.
    #[inline]
    fn outbound_by(
        &mut self,
        now: Duration,
        fences: &[Duration],
        slot: &mut Slot,
        packet: &Packet,
        spi_in: EspSpi,
        arrival: Arrival,
    ) -> Result<Verdict, Reason> {
        let Some(sa) = self.table.get_mut(spi_in) else {
            return self.not_here(now, slot, spi_in, arrival, Reason::NoSa);
        };
        let endpoint = sa.endpoint;
        let e = self.endpoints.get_mut(usize::from(endpoint.0)).ok_or(Reason::NotOwner)?;
        let own = match e.admit(now, arrival) {
            Admission::Process(own) => own,
            Admission::Steer => return self.steer(slot, endpoint),
            Admission::Queue => return hold(&mut e.queue, slot),
            Admission::Drop(reason) => return Err(reason),
        };
        if !is_inside_fence(fences, endpoint, now) {
            return Err(Reason::Fenced);
        }
        sa.enter_term(own);
        let sealed = sa.seal(slot, packet, own, &mut e.ivs, now);
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
        let arrival = Arrival { steered: slot.steered, released };
        let Some(sa) = self.table.get_mut(header.spi) else {
            return self.not_here(now, slot, header.spi, arrival, Reason::UnknownSpi);
        };
        let endpoint = sa.endpoint;
        let e = self.endpoints.get_mut(usize::from(endpoint.0)).ok_or(Reason::NotOwner)?;
        let own = match e.admit(now, arrival) {
            Admission::Process(own) => own,
            Admission::Steer => return self.steer(slot, endpoint),
            Admission::Queue => return hold(&mut e.queue, slot),
            Admission::Drop(reason) => return Err(reason),
        };
        if !is_inside_fence(fences, endpoint, now) {
            return Err(Reason::Fenced);
        }
        sa.enter_term(own);
        let top = sa.top();
        let opened = sa.open(slot, now);
        // Also when the packet is dropped after its tag was verified. Without a shadow there is nobody to tell; one that
        // comes is told of all.
        if sa.top() != top && own.leasing {
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

//! The loop itself.

mod deliver;
mod handed;
mod lookout;
mod moderation;
mod raw;
mod steered;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use esp::segment::Segments;
use esp::{Batch, Direction, Shard, Slot, Verdict};
use netio::clock::boottime;
use netio::esp::EspSocket;
use netio::tun::Tun;
use netio::udp::{RecvMeta, SendCounters, SendItem};
use netio::wake::{Poller, QueueReceiver, Ready};
use wire::id::EndpointId;
use wire::ip::Ecn;
use wire::natt::{self, Datagram};
use wire::vnet::Offload;

use deliver::Delivery;
use lookout::Lookout;
use moderation::Paces;

use super::counters::add;
use super::outlet::Outlet;
use super::ring::{Parcel, Ring};
use super::{BATCH, Counters, EndpointSocket, Share, WorkerCommand, WorkerEvent, is_long};
use crate::link::{SteerPort, SteerSender};

const TUN: u64 = 0;
const COMMANDS: u64 = 1;
const HANDED: u64 = 2;
const FIRST_SOCKET: u64 = 3;
/// The sockets for protocol 50 count up from here.
const FIRST_RAW: u64 = 1 << 31;
/// The pair links' sockets count up from here.
const FIRST_LINK: u64 = 1 << 32;

/// While control does not take reports, the shard is asked again after this.
const REPORT_PAUSE: Duration = Duration::from_millis(1);

/// Everything a worker owns.
pub(super) struct State {
    shard: Shard,
    io: Io,
    sockets: Vec<EndpointSocket>,
    paces: Paces,
    commands: QueueReceiver<WorkerCommand>,
    poller: Poller,
    lookout: Lookout,
    batch: Batch,
    /// What one read of the TUN gives.
    read: Box<[u8]>,
    /// The most packets that a read lately gave, at least one.
    most_read: usize,
    /// What control passed on: steered datagrams that came to its socket.
    strays: VecDeque<(u8, Vec<u8>)>,
    /// Where the first packet of the next batch waits, when steered packets change their direction.
    spare: Slot,
    metas: Box<[RecvMeta; BATCH]>,
    /// The fence words as last read.
    fences: Vec<Duration>,
    /// A report that control had no room for.
    kept: Option<WorkerEvent>,
    /// What another worker handed over, and knew more than is known here so far.
    early: Option<Parcel>,
}

/// What a worker is made of.
pub(super) struct Parts {
    /// Which one it is, of how many.
    pub(super) worker: (u8, u8),
    pub(super) share: Share,
    /// See [`super::Start`].
    pub(super) fences: Arc<[AtomicU64]>,
    pub(super) endpoints: usize,
    pub(super) mtu: usize,
    pub(super) steering: Option<SteerPort>,
    /// To the other workers, if there are any.
    pub(super) ring: Option<Ring>,
    pub(super) commands: QueueReceiver<WorkerCommand>,
    pub(super) outlet: Outlet,
    pub(super) counters: Arc<Counters>,
}

/// What writing needs, apart from batch and sockets.
struct Io {
    tun: Arc<Tun>,
    words: Arc<[AtomicU64]>,
    /// Who seals what is handed over.
    steer: Option<SteerSender>,
    steering: Option<SteerPort>,
    /// When each endpoint's handing over was last told.
    steered_told: Vec<Duration>,
    ring: Option<Ring>,
    /// Commands for the shard that were obeyed.
    heard: u64,
    outlet: Outlet,
    counters: Arc<Counters>,
    deliver: Delivery,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    Go,
    Stop,
}

impl State {
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        let Parts { share, fences, endpoints, steering, ring, commands, outlet, counters, .. } =
            parts;
        let poller = Poller::new()?;
        if share.reads_tun {
            poller.add(&*share.tun, TUN)?;
        }
        poller.add(commands.event(), COMMANDS)?;
        if let Some(ring) = &ring {
            poller.add(ring.event(), HANDED)?;
        }
        for (place, token) in share.sockets.iter().zip(FIRST_SOCKET..) {
            poller.add(&place.socket, token)?;
        }
        for (place, token) in share.sockets.iter().zip(FIRST_RAW..) {
            if let Some(raw) = &place.raw {
                poller.add(raw, token)?;
            }
        }
        let links = steering.iter().flat_map(SteerPort::sockets);
        for (socket, token) in links.zip(FIRST_LINK..) {
            poller.add(socket, token)?;
        }
        let (worker, workers) = parts.worker;
        let slot_len = esp::slot_len(parts.mtu);
        let shard = esp::Config { endpoints, worker, workers, slot_len, ..esp::Config::default() };
        Ok(Self {
            batch: Batch::new(BATCH, shard.slot_len),
            read: vec![0; netio::tun::READ_LEN].into_boxed_slice(),
            most_read: 1,
            spare: Slot::new(shard.slot_len),
            strays: VecDeque::new(),
            shard: Shard::new(shard),
            fences: vec![Duration::ZERO; fences.len()],
            io: Io {
                deliver: Delivery::new(Arc::clone(&share.tun), Arc::clone(&counters)),
                tun: share.tun,
                words: fences,
                steer: None,
                steering,
                steered_told: vec![Duration::ZERO; endpoints],
                ring,
                heard: 0,
                outlet,
                counters,
            },
            paces: Paces::new(share.sockets.len()),
            sockets: share.sockets,
            commands,
            poller,
            lookout: Lookout::default(),
            metas: Box::new([RecvMeta::EMPTY; BATCH]),
            kept: None,
            early: None,
        })
    }

    /// Runs until told to stop or control is gone.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut ready = Ready::default();
        loop {
            if self.obey() == Flow::Stop {
                return Ok(());
            }
            if self.is_late() && self.read_handed() == Flow::Stop {
                return Ok(());
            }
            self.flush();
            self.report();
            self.wait(&mut ready)?;
            for token in ready.tokens() {
                // What control decided meanwhile comes before the next packets.
                if self.obey() == Flow::Stop {
                    return Ok(());
                }
                match token {
                    TUN => self.read_tun()?,
                    COMMANDS => {
                        self.commands.event().clear();
                    }
                    HANDED => {
                        if self.read_handed() == Flow::Stop {
                            return Ok(());
                        }
                    }
                    link @ FIRST_LINK.. => {
                        if self.read_link((link - FIRST_LINK) as u8) == Flow::Stop {
                            return Ok(());
                        }
                    }
                    raw @ FIRST_RAW.. => self.read_raw_paced((raw - FIRST_RAW) as usize)?,
                    socket => self.read_paced((socket - FIRST_SOCKET) as usize)?,
                }
            }
            self.read_polled()?;
            if self.take_strays() == Flow::Stop {
                return Ok(());
            }
        }
    }

    /// Until something is ready or due. It may be looked for first.
    fn wait(&mut self, ready: &mut Ready) -> io::Result<()> {
        let timeout = self.timeout();
        let begun = boottime();
        let mut now = begun;
        let mut found = false;
        if let Some(look) = self.lookout.look(begun) {
            let until = begun + timeout.map_or(look, |timeout| timeout.min(look));
            loop {
                self.poller.wait(ready, Some(Duration::ZERO))?;
                now = boottime();
                found = ready.tokens().next().is_some();
                if found || now >= until {
                    break;
                }
                std::thread::yield_now();
            }
        }
        if !found {
            self.poller
                .wait(ready, timeout.map(|timeout| (begun + timeout).saturating_sub(now)))?;
            now = boottime();
        }
        self.lookout.waited(now.saturating_sub(begun), found);
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let due = self.shard.next_wakeup().into_iter().chain(self.paces.due()).min();
        let wait = due.map(|at| at.saturating_sub(boottime()));
        match self.kept {
            None => wait,
            // Control does not take reports: do not spin over the shard's next one.
            Some(_) => {
                let read = self.paces.due().map(|at| at.saturating_sub(boottime()));
                read.into_iter().chain([REPORT_PAUSE]).min()
            }
        }
    }

    /// Applies all commands that are there.
    fn obey(&mut self) -> Flow {
        loop {
            let command = match self.commands.take() {
                Ok(Some(command)) => command,
                Ok(None) => return Flow::Go,
                Err(_) => return Flow::Stop,
            };
            match command {
                WorkerCommand::Steered { link, datagram } => {
                    self.strays.push_back((link, datagram));
                }
                WorkerCommand::Shard(command) => {
                    let obeyed = self.shard.apply(command);
                    self.io.heard = self.shard.obeyed();
                    if let Err(error) = obeyed {
                        match error {
                            // A lease or a top for an SA removed a moment ago.
                            esp::CommandError::UnknownSa(_) => {
                                tracing::debug!(%error, "worker command")
                            }
                            _ => tracing::error!(%error, "worker command"),
                        }
                    }
                }
                WorkerCommand::Steering(sender) => self.io.steer = Some(sender),
                WorkerCommand::Stop => return Flow::Stop,
            }
        }
    }

    /// Asks the shard about the batch, writes it and empties it.
    fn judge(&mut self, direction: Direction) {
        self.io.read_fences(&mut self.fences);
        match direction {
            Direction::Outbound => self.shard.outbound(boottime(), &self.fences, &mut self.batch),
            Direction::Inbound => self.shard.inbound(boottime(), &self.fences, &mut self.batch),
        }
        let carried =
            |slot: &&Slot| matches!(slot.verdict(), Verdict::Send { .. } | Verdict::Deliver { .. });
        self.lookout.carried(direction, self.batch.slots().iter().filter(carried).count());
        self.io.write(&mut self.batch, &mut self.sockets);
        self.batch.clear();
    }

    /// Works off the shard's queues whose time has come.
    fn flush(&mut self) {
        while self.shard.next_wakeup().is_some_and(|at| at <= boottime()) {
            self.io.read_fences(&mut self.fences);
            if self.shard.flush(boottime(), &self.fences, &mut self.batch) == 0 {
                break;
            }
            self.io.write(&mut self.batch, &mut self.sockets);
        }
        self.batch.clear();
    }

    /// Passes the shard's reports on; what does not fit stays there.
    fn report(&mut self) {
        if let Some(event) = self.kept.take()
            && let Err(event) = self.io.outlet.report(event)
        {
            self.kept = Some(event);
            return;
        }
        let now = boottime();
        while self.shard.next_wakeup().is_some_and(|at| at <= now) {
            let Some(report) = self.shard.poll_report(now) else { return };
            if let Err(event) = self.io.outlet.report(WorkerEvent::Report(report)) {
                self.kept = Some(event);
                return;
            }
        }
    }

    /// Reads until nothing is left, or until the batch has no room for what one read may give. So the ends of several reads
    /// that do not fill a send of their own go together.
    fn read_tun(&mut self) -> io::Result<()> {
        while self.batch.len() + self.most_read <= self.batch.capacity()
            && let Some((length, offload)) = self.io.tun.read(&mut self.read)?
        {
            let count = self.split(length, offload);
            // It fades: a peer that asks for tiny segments once does not make every batch small for good.
            self.most_read = count.max(self.most_read - 1).clamp(1, self.batch.capacity());
            add(&self.io.counters.tun_read, count as u64);
            add(&self.io.counters.tun_split, u64::from(count > 1));
        }
        if !self.batch.is_empty() {
            self.judge(Direction::Outbound);
        }
        Ok(())
    }

    /// Puts what was read into the batch, by the packet; gives their number.
    fn split(&mut self, length: usize, offload: Offload) -> usize {
        let read = |whole: &[u8]| Segments::new(whole.get(..length)?, offload);
        let Some(mut segments) = read(&self.read) else {
            add(&self.io.counters.tun_malformed, 1);
            return 0;
        };
        let packets = segments.packets();
        let mut count = 0;
        while !segments.is_done() {
            if self.batch.is_full() {
                self.judge(Direction::Outbound);
            }
            let Some(slot) = self.batch.push() else { break };
            let whole = self.read.get(..length).unwrap_or_default();
            let Some(length) = segments.next_into(whole, slot.room()) else {
                self.batch.pop();
                // What was to follow is lost with it.
                add(&self.io.counters.tun_malformed, packets.saturating_sub(count) as u64);
                break;
            };
            slot.set_len(length);
            count += 1;
        }
        count
    }

    /// One batch: how many datagrams, and whether the socket holds more that it has received already.
    fn read_socket(&mut self, at: usize) -> (usize, bool) {
        let Some(EndpointSocket { endpoint, socket, .. }) = self.sockets.get_mut(at) else {
            return (0, false);
        };
        let endpoint = *endpoint;
        let (errors, dropped) = (socket.receive_errors(), socket.receive_dropped());
        let slots = self.batch.unused();
        let io = &self.io;
        // An IKE message may be longer than any packet (security.md: 64 KB).
        let long = |meta: RecvMeta, bytes: &[u8]| io.take_long(&meta, bytes, endpoint);
        let rooms = slots.iter_mut().map(Slot::room);
        let got = socket.recv_or_give(rooms, &mut self.metas[..], long);
        add(&self.io.counters.receive_errors, socket.receive_errors() - errors);
        add(&self.io.counters.receive_dropped, socket.receive_dropped() - dropped);
        // ESP packets move to the front; the rest is dealt with on the spot.
        let mut kept = 0;
        for (i, meta) in self.metas.iter().enumerate().take(got) {
            let Some(slot) = slots.get_mut(i) else { break };
            slot.set_len(meta.len);
            if self.io.is_esp(slot, meta, endpoint) {
                slot.ecn = Ecn::of(meta.tos);
                slot.peer = Some(meta.from);
                slots.swap(kept, i);
                kept += 1;
            }
        }
        if kept > 0 {
            self.batch.commit(kept);
            add(&self.io.counters.esp_received, kept as u64);
            self.judge(Direction::Inbound);
        }
        (got, self.sockets.get(at).is_some_and(|socket| socket.socket.has_more()))
    }
}

/// Until when an endpoint may send.
fn valid_until(words: &[AtomicU64], endpoint: EndpointId) -> Duration {
    let word = words.get(usize::from(endpoint.0));
    word.map_or(Duration::ZERO, |word| Duration::from_nanos(word.load(Ordering::Acquire)))
}

impl Io {
    fn read_fences(&self, into: &mut [Duration]) {
        for (to, word) in into.iter_mut().zip(self.words.iter()) {
            *to = Duration::from_nanos(word.load(Ordering::Acquire));
        }
    }

    /// True for an ESP packet; everything else is handled here.
    fn is_esp(&self, slot: &Slot, meta: &RecvMeta, endpoint: EndpointId) -> bool {
        let counters = &self.counters;
        if meta.truncated {
            add(&counters.truncated, 1);
            return false;
        }
        match natt::classify(slot.packet()) {
            Datagram::Esp(_) => return true,
            Datagram::Ike(bytes) => {
                self.take_ike(meta, bytes, endpoint);
            }
            Datagram::Keepalive => add(&counters.keepalives, 1),
            Datagram::Short => add(&counters.short, 1),
        }
        false
    }

    /// False when it was dropped.
    fn take_ike(&self, meta: &RecvMeta, message: &[u8], endpoint: EndpointId) -> bool {
        let from = meta.from;
        let event = |bytes| WorkerEvent::Ike { endpoint, from, bytes };
        self.outlet.take_ike(&self.counters, message, event)
    }

    /// A datagram that no slot holds: an IKE message, or nothing of ours.
    fn take_long(&self, meta: &RecvMeta, bytes: &[u8], endpoint: EndpointId) {
        match natt::classify(bytes) {
            Datagram::Ike(message) if is_long(message) => {
                self.take_ike(meta, message, endpoint);
            }
            _ => add(&self.counters.truncated, 1),
        }
    }

    /// Writes a judged batch. The fences are compared here once more, right before the calls.
    fn write(&mut self, batch: &mut Batch, sockets: &mut [EndpointSocket]) {
        let counters = Arc::clone(&self.counters);
        let now = boottime();
        let mut late = 0_u64;
        let (mut to_send, mut sent) = (0_u64, 0_u64);
        for EndpointSocket { endpoint, socket, raw } in sockets.iter_mut() {
            let open = now < valid_until(&self.words, *endpoint);
            let items = batch.slots().iter().filter_map(|slot| match slot.verdict() {
                Verdict::Send { endpoint: of, to, udp_encap: true, .. } if of == *endpoint => {
                    if !open {
                        late += 1;
                        return None;
                    }
                    to_send += 1;
                    Some(SendItem { to, bytes: slot.packet(), tos: slot.outer_traffic_class() })
                }
                _ => None,
            });
            sent += socket.send(items) as u64;
            let unwrapped = raw::send(batch, *endpoint, open, raw.as_mut());
            late += unwrapped.late;
            to_send += unwrapped.to_send;
            sent += unwrapped.sent;
        }
        let now = boottime();
        let words = &self.words;
        let is_open = |endpoint| now < valid_until(words, endpoint);
        let delivered = self.deliver.write(batch.slots(), is_open);
        late += delivered.late;
        let mut to_steer = 0;
        for slot in batch.slots_mut() {
            if let Verdict::Steer { endpoint } = slot.verdict() {
                to_steer += 1;
                self.seal_steered(now, endpoint, slot, sockets);
            }
        }
        if to_steer > 0 {
            let steered = self.hand_over(batch);
            add(&counters.steered, steered);
            add(&counters.steer_lost, to_steer - steered);
        }
        self.hand_on(batch);
        add(&counters.sent, sent);
        add(&counters.unsent, to_send - sent);
        if sent < to_send {
            self.say_why(sockets);
        }
        add(&counters.tun_written, delivered.written);
        add(&counters.tun_refused, delivered.refused);
        add(&counters.late, late);
        add(&counters.late_batches, u64::from(late > 0));
    }
}

impl Io {
    /// What the sockets refused so far, by reason.
    #[cold]
    fn say_why(&self, sockets: &[EndpointSocket]) {
        let of_all = sockets.iter().flat_map(|EndpointSocket { socket, raw, .. }| {
            std::iter::once(socket.counters()).chain(raw.as_ref().map(EspSocket::counters))
        });
        let mut sums = SendCounters::default();
        for of in of_all {
            sums.full += of.full;
            sums.unreachable += of.unreachable;
            sums.refused_by_host += of.refused_by_host;
            sums.not_local += of.not_local;
            sums.too_large += of.too_large;
        }
        let counters = &self.counters;
        for (counter, sum) in [
            (&counters.unsent_full, sums.full),
            (&counters.unsent_unreachable, sums.unreachable),
            (&counters.unsent_refused, sums.refused_by_host),
            (&counters.unsent_not_local, sums.not_local),
            (&counters.unsent_too_large, sums.too_large),
        ] {
            counter.store(sum, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Peer, isolated, test_state};
    use super::*;

    #[test]
    fn what_a_read_loses_is_counted_by_the_packet() {
        isolated(|| {
            let mut state = test_state();
            let inner = wire::ip::udp_packet(
                "10.1.0.9:5000".parse().unwrap(),
                "10.2.0.5:4000".parse().unwrap(),
                &[7; 10_000],
            );
            let inner = inner.unwrap();
            state.read[..inner.len()].copy_from_slice(&inner);
            // No slot holds 4,000 bytes.
            let carried = wire::vnet::Carried::Udp;
            let offload = Offload::Segments { carried, segment_len: 4000, transport_at: 20 };
            assert_eq!(state.split(inner.len(), offload), 0);
            assert_eq!(state.io.counters.snapshot().tun_malformed, 3);
            assert!(state.batch.is_empty());
        });
    }

    #[test]
    fn one_read_of_many_segments_does_not_keep_batches_small() {
        isolated(|| {
            let mut state = test_state();
            let application = super::super::tests::application("tdm0");
            state.most_read = BATCH;
            for _ in 0..BATCH {
                application.send(b"small").unwrap();
            }
            let before = state.io.counters.snapshot().tun_read;
            while netio::udp::wait_readable(&*state.io.tun, 0).unwrap() {
                state.read_tun().unwrap();
            }
            assert_eq!(state.io.counters.snapshot().tun_read - before, BATCH as u64);
            assert_eq!(state.most_read, 1);
        });
    }

    #[test]
    fn what_becomes_invalid_between_judging_and_writing_is_dropped() {
        isolated(|| {
            let mut state = test_state();
            let mut peer = Peer::new();
            let inner = wire::ip::udp_packet(
                "10.1.0.9:5000".parse().unwrap(),
                "10.2.0.5:4000".parse().unwrap(),
                b"late",
            );
            let sealed = peer.seal(b"late");
            let open = [Duration::MAX];
            state.obey();
            state.batch.push().unwrap().fill(&inner.unwrap());
            state.shard.outbound(boottime(), &open, &mut state.batch);
            assert!(matches!(state.batch.slots()[0].verdict(), Verdict::Send { .. }));
            // A steal of the processor comes here, and the fence passes.
            state.io.words[0].store(1, Ordering::Release);
            state.io.write(&mut state.batch, &mut state.sockets);
            state.batch.clear();
            state.batch.push().unwrap().fill(&sealed);
            state.shard.inbound(boottime(), &open, &mut state.batch);
            assert!(matches!(state.batch.slots()[0].verdict(), Verdict::Deliver { .. }));
            state.io.write(&mut state.batch, &mut state.sockets);
            let counters = state.io.counters.snapshot();
            assert_eq!(
                (counters.late, counters.late_batches, counters.sent, counters.tun_written),
                (2, 2, 0, 0)
            );
            peer.hears_nothing();
        });
    }
}

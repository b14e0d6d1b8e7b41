//! Several workers: what each decides by itself, by hand; then a crew of them in a model, where commands reach each at
//! another time and packets come to any of them.
//!
//! Nothing may be lost, come twice or overtake its flow; no number and no IV may be used twice; and every answer is that
//! of all of them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use core::time::Duration;
use crypto::Secret;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, Config, Counters, Crew, Direction, Policy, Reason, Report, SLOT_LEN};
use esp::{Sa, Shard, Slot, Steered, Verdict, Window};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use wire::id::{ConnectionId, EspSpi, SpiLayout, Term};

/// An SA of a worker, by the layout's field, towards 10.(2 + connection).0.0/16.
fn sa_of(connection: u16, worker: u8, generation: u16) -> Sa {
    let (left, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let key = |way: u8| {
        let mut key = vec![way; left.alg.keymat_len()];
        key[..4].copy_from_slice(&[connection as u8, worker, generation as u8, 0]);
        Secret::new(key)
    };
    let remote = format!("10.{}.0.0/16", 2 + connection);
    Sa {
        connection: ConnectionId(connection),
        spi_in: SpiLayout::new(0, generation, worker, connection).unwrap().spi(),
        spi_out: SpiLayout::new(1, generation, worker, connection).unwrap().spi(),
        keymat_in: key(1),
        keymat_out: key(2),
        local_ts: vec![ts("10.1.0.0/16")],
        remote_ts: vec![ts(&remote)],
        ..copy(&left)
    }
}

/// The peer's side of it.
fn turned(sa: &Sa) -> Sa {
    Sa {
        spi_in: sa.spi_out,
        spi_out: sa.spi_in,
        keymat_in: sa.keymat_out.duplicate(),
        keymat_out: sa.keymat_in.duplicate(),
        local_ts: sa.remote_ts.clone(),
        remote_ts: sa.local_ts.clone(),
        ..copy(sa)
    }
}

/// Packet `number` of a flow through a connection.
fn packet(connection: u16, flow: u16, number: u32) -> Vec<u8> {
    let to = format!("10.{}.0.5:4000", 2 + connection);
    udp(&format!("10.1.0.9:{}", 5000 + flow), &to, &number.to_be_bytes())
}

/// The same the other way.
fn answer(connection: u16, flow: u16, number: u32) -> Vec<u8> {
    let from = format!("10.{}.0.5:4000", 2 + connection);
    udp(&from, &format!("10.1.0.9:{}", 5000 + flow), &number.to_be_bytes())
}

fn shard(worker: u8, workers: u8) -> Shard {
    Shard::new(Config { worker, workers, queue_len: 4096, ..config() })
}

fn own_command(term: u64) -> Command {
    Command::Own { endpoint: MAIN, term: Term(term), seq_jump: 0, obey_leases: false }
}

fn give(shard: &mut Shard, commands: impl IntoIterator<Item = Command>) {
    for command in commands {
        shard.apply(command).unwrap();
    }
}

fn using(sa: &Sa) -> [Command; 2] {
    let spi_in = sa.spi_in;
    [Command::Install(Box::new(copy(sa))), Command::UseOutbound { spi_in }]
}

/// A batch of one after this shard's verdict, for [`Shard::handed`] of another.
fn judged(shard: &mut Shard, inner: &[u8]) -> Batch {
    let mut batch = batch_of(&[inner]);
    shard.outbound(ms(1), OPEN, &mut batch);
    batch
}

fn verdict(batch: &Batch) -> Verdict {
    batch.slots()[0].verdict()
}

#[test]
fn one_worker_holds_what_was_chosen_for_many() {
    let mut only = owner(2);
    let mut far = owner(2);
    for (connection, worker) in [(0, 0), (1, 7), (2, 15)] {
        let sa = sa_of(connection, worker, 1);
        give(&mut only, using(&sa));
        give(&mut far, using(&turned(&sa)));
        let esp = sealed(&mut only, ms(1), &packet(connection, 0, 9));
        assert_eq!(number_of(&opened(&mut far, ms(1), &esp)), 9);
    }
}

// A worker has no keys of another's SA, no numbers, and nothing to say about it.
#[test]
fn commands_about_anothers_sa_change_nothing_and_are_no_errors() {
    let sa = sa_of(0, 1, 1);
    let mut reader = shard(0, 2);
    give(&mut reader, [own_command(2)]);
    for command in using(&sa) {
        reader.apply(command.without_keys()).unwrap();
    }
    let spi_in = sa.spi_in;
    let counters = Counters { spi_in, next_seq: 9, ceiling: 99, window: Window::new() };
    let of_it = [
        Command::Lease { spi_in, ceiling: 1 << 21 },
        Command::Window { spi_in, top: 5 },
        Command::Resume { term: Term(2), counters: Box::new(counters) },
        Command::Move { spi_in, local: sa.local, remote: sa.remote, udp_encap: false },
        Command::ObeyLeases { endpoint: MAIN, on: true },
        Command::Query { token: 1 },
        Command::Hold { endpoint: MAIN },
    ];
    give(&mut reader, of_it);
    let said = reports(&mut reader, ms(1));
    let [Report::Snapshot(snapshot), Report::Held { counters, .. }, Report::Obeying { .. }] =
        &said[..]
    else {
        panic!("{said:?}")
    };
    assert!(snapshot.sas.is_empty() && counters.is_empty());
    assert_eq!(verdict(&judged(&mut reader, &packet(0, 0, 0))), Verdict::Hand { worker: 1 });
    give(&mut reader, [Command::Remove { spi_in }]);
    assert!(matches!(verdict(&judged(&mut reader, &packet(0, 0, 0))), Verdict::Drop(_)));
}

#[test]
fn the_sa_that_was_chosen_is_used_or_the_packet_judged_anew() {
    let (old, new) = (sa_of(0, 1, 1), sa_of(0, 3, 2));
    let (mut reader, mut owner) = (shard(0, 2), shard(1, 2));
    for shard in [&mut reader, &mut owner] {
        give(shard, [own_command(2)]);
        give(shard, using(&old));
    }
    let (mut first, mut second) =
        (judged(&mut reader, &packet(0, 0, 1)), judged(&mut reader, &packet(0, 0, 2)));
    // The owner is further: it uses another one, and still has the old.
    give(&mut owner, using(&new));
    owner.handed(ms(1), OPEN, &mut first);
    assert!(matches!(verdict(&first), Verdict::Send { .. }));
    let spi = |batch: &Batch| wire::esp::Header::parse(batch.slots()[0].packet()).unwrap().spi;
    assert_eq!(spi(&first), old.spi_out);
    give(&mut owner, [Command::Remove { spi_in: old.spi_in }]);
    owner.handed(ms(1), OPEN, &mut second);
    assert_eq!(spi(&second), new.spi_out);
}

#[test]
fn what_waited_is_judged_by_what_holds_then() {
    let (old, new) = (sa_of(0, 1, 1), sa_of(0, 3, 2));
    let (mut reader, mut owner) = (shard(0, 2), shard(1, 2));
    for shard in [&mut reader, &mut owner] {
        give(shard, [own_command(2)]);
        give(shard, using(&old));
    }
    let mut batch = judged(&mut reader, &packet(0, 0, 1));
    give(&mut owner, [Command::Hold { endpoint: MAIN }]);
    owner.handed(ms(1), OPEN, &mut batch);
    assert_eq!(verdict(&batch), Verdict::Held);
    give(&mut owner, using(&new));
    give(&mut owner, [Command::Release { endpoint: MAIN }]);
    assert_eq!(owner.flush(ms(2), OPEN, &mut batch), 1);
    let spi = wire::esp::Header::parse(batch.slots()[0].packet()).unwrap().spi;
    assert_eq!(spi, new.spi_out, "the old one is still there");
}

#[test]
fn a_successor_of_another_worker_gets_the_packet() {
    let (old, new) = (sa_of(0, 1, 1), sa_of(0, 2, 2));
    let mut shards = [shard(0, 3), shard(1, 3), shard(2, 3)];
    for shard in &mut shards {
        give(shard, [own_command(2)]);
        give(shard, using(&old));
    }
    let mut batch = judged(&mut shards[0], &packet(0, 0, 1));
    for shard in &mut shards {
        give(shard, using(&new));
        give(shard, [Command::Remove { spi_in: old.spi_in }]);
    }
    shards[1].handed(ms(1), OPEN, &mut batch);
    assert_eq!(verdict(&batch), Verdict::Hand { worker: 2 });
    shards[2].handed(ms(1), OPEN, &mut batch);
    assert!(matches!(verdict(&batch), Verdict::Send { .. }));
}

// Two that take themselves for the same worker: a bug of the caller, which must not become an endless loop.
#[test]
fn a_packet_is_not_handed_on_for_ever() {
    let sa = sa_of(0, 1, 1);
    let mut one = shard(0, 2);
    give(&mut one, [own_command(2)]);
    give(&mut one, using(&sa));
    let mut batch = judged(&mut one, &packet(0, 0, 1));
    let mut hops = 1;
    while verdict(&batch) == (Verdict::Hand { worker: 1 }) {
        hops += 1;
        assert!(hops < 10);
        one.handed(ms(1), OPEN, &mut batch);
    }
    assert_eq!((hops, verdict(&batch)), (5, Verdict::Drop(Reason::HandedTooOften)));
    assert_eq!(one.stats().dropped(Reason::HandedTooOften), 1);
    assert_eq!(one.stats().handed, 4);
}

#[test]
fn the_first_worker_steers_for_all() {
    let sa = sa_of(0, 1, 1);
    let mut shards = [shard(0, 2), shard(1, 2)];
    for shard in &mut shards {
        give(shard, using(&sa));
        give(shard, [Command::Steer { endpoint: MAIN, on: true }]);
    }
    let [first, second] = &mut shards;
    let steer = Verdict::Steer { endpoint: MAIN };
    // Idle: the reader knows enough, and the SA's worker never sees it.
    assert_eq!(verdict(&judged(first, &packet(0, 0, 1))), steer);
    let mut batch = judged(second, &packet(0, 0, 1));
    assert_eq!(verdict(&batch), Verdict::Hand { worker: 0 });
    first.handed(ms(1), OPEN, &mut batch);
    assert_eq!(verdict(&batch), steer);
    assert_eq!((first.stats().steered, second.stats().steered), (2, 0));
    // On its way there the endpoint became ours.
    let mut batch = judged(second, &packet(0, 0, 1));
    for shard in [&mut *first, &mut *second] {
        give(shard, [own_command(2)]);
    }
    first.handed(ms(1), OPEN, &mut batch);
    assert_eq!(verdict(&batch), Verdict::Hand { worker: 1 });
    second.handed(ms(1), OPEN, &mut batch);
    assert!(matches!(verdict(&batch), Verdict::Send { .. }));
}

#[test]
fn a_policy_without_an_sa_is_steered_by_the_first_worker() {
    let policy = Policy {
        endpoint: MAIN,
        connection: ConnectionId(0),
        group: ConnectionId(0),
        child: 0,
        local_ts: vec![ts("10.1.0.0/16")],
        remote_ts: vec![ts("10.2.0.0/16")],
        pin: esp::pin::Pin { id: 1, weight: 1 },
    };
    let mut second = shard(1, 2);
    give(
        &mut second,
        [Command::Policies(vec![policy]), Command::Steer { endpoint: MAIN, on: true }],
    );
    assert_eq!(verdict(&judged(&mut second, &packet(0, 0, 1))), Verdict::Hand { worker: 0 });
}

// What the other instance hands over passes a direct hold also at another worker than the one that reads the link.
#[test]
fn what_is_steered_in_stays_so() {
    let sa = sa_of(0, 1, 1);
    let mut shards = [shard(0, 2), shard(1, 2)];
    for shard in &mut shards {
        give(shard, [own_command(2), Command::HoldDirect { endpoint: MAIN, until: ms(50) }]);
        give(shard, using(&sa));
    }
    let [first, second] = &mut shards;
    let mut direct = judged(first, &packet(0, 0, 2));
    second.handed(ms(1), OPEN, &mut direct);
    assert_eq!(verdict(&direct), Verdict::Held);
    let mut batch = batch_of(&[packet(0, 0, 1)]);
    batch.slots_mut()[0].steered = Some(Steered { endpoint: MAIN, back: false });
    first.outbound(ms(1), OPEN, &mut batch);
    assert_eq!(verdict(&batch), Verdict::Hand { worker: 1 });
    second.handed(ms(1), OPEN, &mut batch);
    assert!(matches!(verdict(&batch), Verdict::Send { .. }));
    let mut batch = Batch::new(4, SLOT_LEN);
    assert_eq!(second.flush(ms(50), OPEN, &mut batch), 1);
    assert!(matches!(verdict(&batch), Verdict::Send { .. }));
}

// An earlier life of the other instance, with another number of workers.
#[test]
fn an_earlier_lifes_sa_makes_room_for_anothers_too() {
    let mut reader = Shard::new(Config { worker: 0, workers: 2, endpoints: 2, ..config() });
    let (old, new) = (sa_of(0, 1, 1), sa_of(0, 1, 2));
    let new = Sa { endpoint: wire::id::EndpointId(1), ..new };
    give(&mut reader, using(&old));
    give(&mut reader, using(&new));
    assert!(reader.apply(Command::Remove { spi_in: old.spi_in }).is_err(), "it is gone");
    let again = Sa { endpoint: wire::id::EndpointId(1), ..sa_of(0, 1, 3) };
    assert!(reader.apply(Command::Install(Box::new(again))).is_err(), "taken within an endpoint");
}

// ---- the model

const CONNECTIONS: u16 = 4;
const FLOWS: u16 = 3;

#[derive(Debug, Clone)]
enum Op {
    /// So many packets of a flow are read.
    Out {
        connection: u16,
        flow: u16,
        count: u8,
    },
    /// So many come from the peer.
    In {
        connection: u16,
        flow: u16,
        count: u8,
    },
    /// A worker obeys one command.
    Obey {
        worker: u8,
    },
    /// A worker takes a parcel from another.
    Take {
        worker: u8,
        from: u8,
    },
    /// A worker works its queue off.
    Flush {
        worker: u8,
    },
    Hold,
    Release,
    /// Gives the endpoint away, and has its packets handed over.
    GiveAway,
    /// Owns it, in a new term.
    Own,
    /// A new SA in place of a connection's, which is removed when all use it.
    Rekey {
        connection: u16,
    },
    RemoveOld {
        connection: u16,
    },
    Wait,
    Ask,
}

fn any_op() -> impl Strategy<Value = Op> {
    let traffic = || (0..CONNECTIONS, 0..FLOWS, 1..5_u8);
    prop_oneof![
        8 => traffic().prop_map(|(connection, flow, count)| Op::Out { connection, flow, count }),
        4 => traffic().prop_map(|(connection, flow, count)| Op::In { connection, flow, count }),
        8 => (0..4_u8).prop_map(|worker| Op::Obey { worker }),
        8 => (0..4_u8, 0..4_u8).prop_map(|(worker, from)| Op::Take { worker, from }),
        4 => (0..4_u8).prop_map(|worker| Op::Flush { worker }),
        1 => Just(Op::Hold),
        1 => Just(Op::Release),
        1 => Just(Op::GiveAway),
        1 => Just(Op::Own),
        2 => (0..CONNECTIONS).prop_map(|connection| Op::Rekey { connection }),
        2 => (0..CONNECTIONS).prop_map(|connection| Op::RemoveOld { connection }),
        1 => Just(Op::Ask),
        2 => Just(Op::Wait),
    ]
}

/// What control last did to the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Owner,
    Held,
    Given,
}

struct Worker {
    shard: Shard,
    commands: VecDeque<Command>,
    heard: u64,
}

/// A packet in a ring, as it lies there: with what the sender had heard.
type Parcel = (u64, Batch);

struct Model {
    crew: Crew,
    workers: Vec<Worker>,
    rings: BTreeMap<(usize, usize), VecDeque<Parcel>>,
    /// Which worker reads a flow, and which one an SA's packets come to.
    readers: Vec<usize>,
    peer: Shard,
    role: Role,
    term: u64,
    generation: u16,
    /// By connection: the worker's field of its SPIs, the SAs oldest first.
    sas: Vec<(u8, VecDeque<EspSpi>)>,
    /// Next numbers, by whether they go out, connection and flow: of what came to us, and of what left.
    sent: BTreeMap<(bool, u16, u16), u32>,
    left: BTreeMap<(bool, u16, u16), u32>,
    used: BTreeSet<(u32, u32)>,
    ivs: BTreeSet<(u32, [u8; 8])>,
    asked: usize,
    answered: usize,
    now: Duration,
    /// The endpoint came back a moment ago.
    fresh: bool,
}

impl Model {
    fn new(workers: u8, fields: &[u8], readers: &[u8]) -> Self {
        let workers = workers.max(1);
        let worker = |at| Worker { shard: shard(at, workers), commands: VecDeque::new(), heard: 0 };
        let mut peer = owner(2);
        peer.apply(Command::Steer { endpoint: MAIN, on: false }).unwrap();
        let mut model = Self {
            crew: Crew::new(workers),
            workers: (0..workers).map(worker).collect(),
            rings: BTreeMap::new(),
            readers: readers.iter().map(|reader| usize::from(reader % workers)).collect(),
            peer,
            role: Role::Owner,
            term: 2,
            generation: 0,
            sas: fields.iter().map(|field| (*field, VecDeque::new())).collect(),
            sent: BTreeMap::new(),
            left: BTreeMap::new(),
            used: BTreeSet::new(),
            ivs: BTreeSet::new(),
            asked: 0,
            answered: 0,
            now: ms(1000),
            fresh: false,
        };
        model.command(Command::Steer { endpoint: MAIN, on: true });
        model.command(own_command(2));
        for connection in 0..CONNECTIONS {
            model.rekey(connection);
        }
        model.settle();
        model
    }

    fn command(&mut self, command: Command) {
        for (worker, command) in self.crew.give(command) {
            self.workers[usize::from(worker)].commands.push_back(command);
        }
    }

    fn obey(&mut self, worker: usize) -> bool {
        let of = &mut self.workers[worker];
        let Some(command) = of.commands.pop_front() else { return false };
        of.heard += 1;
        of.shard.apply(command).unwrap();
        while let Some(report) = of.shard.poll_report(self.now) {
            let whole = self.crew.take(self.now, worker as u8, report);
            match whole {
                Some(Report::Snapshot(snapshot)) => {
                    self.answered += 1;
                    assert_eq!(snapshot.token, self.answered as u64);
                    let spis: BTreeSet<_> = snapshot.sas.iter().map(|sa| sa.spi_in).collect();
                    assert_eq!(spis.len(), snapshot.sas.len(), "an SA has two owners");
                }
                Some(Report::Held { counters, .. } | Report::Disowned { counters, .. }) => {
                    let spis: BTreeSet<_> = counters.iter().map(|sa| sa.spi_in).collect();
                    assert_eq!(spis.len(), counters.len(), "an SA has two owners");
                    assert!(spis.len() >= usize::from(CONNECTIONS), "an SA has no owner");
                }
                _ => {}
            }
        }
        true
    }

    fn rekey(&mut self, connection: u16) {
        self.generation += 1;
        let (field, _) = self.sas[usize::from(connection)];
        let sa = Sa { born: Term(self.term), ..sa_of(connection, field, self.generation) };
        // The slot is another one in each generation.
        let place = |spi: EspSpi| {
            let old = SpiLayout::of(spi).unwrap();
            SpiLayout::new(old.instance(), old.generation(), field, self.generation).unwrap().spi()
        };
        let sa = Sa { spi_in: place(sa.spi_in), spi_out: place(sa.spi_out), ..sa };
        let mut far = turned(&sa);
        far.born = Term(0);
        give(&mut self.peer, using(&far));
        for command in using(&sa) {
            self.command(command);
        }
        self.sas[usize::from(connection)].1.push_back(sa.spi_in);
    }

    fn remove_old(&mut self, connection: u16) {
        let sas = &mut self.sas[usize::from(connection)].1;
        if sas.len() < 2 {
            return;
        }
        let spi_in = sas.pop_front().unwrap();
        self.command(Command::Remove { spi_in });
    }

    /// What came to a worker is judged, and what is written is looked at.
    fn judged(&mut self, worker: usize, batch: &mut Batch) {
        let mut on: BTreeMap<usize, Batch> = BTreeMap::new();
        for slot in batch.slots_mut() {
            match slot.verdict() {
                Verdict::Hand { worker: to } => {
                    assert_ne!(usize::from(to), worker, "to itself");
                    let parcel = on.entry(to.into()).or_insert_with(|| Batch::new(64, SLOT_LEN));
                    std::mem::swap(parcel.push().unwrap(), slot);
                }
                Verdict::Send { .. } => self.leaves(slot),
                Verdict::Deliver { .. } => {
                    let (connection, flow, number) = known(slot.packet(), Direction::Inbound);
                    self.in_order(false, connection, flow, number);
                }
                Verdict::Steer { .. } => {
                    assert_eq!(worker, 0, "it has no pair link");
                    match slot.direction() {
                        Direction::Outbound => {
                            let (connection, flow, number) =
                                known(slot.packet(), Direction::Outbound);
                            self.in_order(true, connection, flow, number);
                        }
                        Direction::Inbound => {
                            let inner = opened(&mut Self::eye(self, slot), self.now, slot.packet());
                            let (connection, flow, number) = known(&inner, Direction::Inbound);
                            self.in_order(false, connection, flow, number);
                        }
                    }
                }
                Verdict::Held => {}
                other => panic!("worker {worker}: {other:?}"),
            }
        }
        let heard = self.workers[worker].heard;
        for (to, parcel) in on {
            self.rings.entry((worker, to)).or_default().push_back((heard, parcel));
        }
    }

    /// A shard that can open what was steered: whose it is does not matter here.
    fn eye(&self, slot: &Slot) -> Shard {
        let spi = wire::esp::Header::parse(slot.packet()).unwrap().spi;
        let layout = SpiLayout::of(spi).unwrap();
        let connection = self
            .sas
            .iter()
            .position(|(field, sas)| *field == layout.worker() && sas.contains(&spi))
            .expect("steered after it was removed");
        let sa = sa_of(connection as u16, layout.worker(), layout.generation());
        let mut eye = owner(2);
        give(&mut eye, using(&Sa { spi_in: spi, ..sa }));
        eye
    }

    fn leaves(&mut self, slot: &Slot) {
        let bytes = slot.packet();
        let head = wire::esp::Header::parse(bytes).unwrap();
        assert!(self.used.insert((head.spi.0, head.seq)), "a number was used twice: {head:?}");
        assert!(self.ivs.insert((head.spi.0, iv_of(bytes))), "an IV was used twice: {head:?}");
        let inner = opened(&mut self.peer, self.now, bytes);
        let (connection, flow, number) = known(&inner, Direction::Outbound);
        self.in_order(true, connection, flow, number);
    }

    fn in_order(&mut self, out: bool, connection: u16, flow: u16, number: u32) {
        let next = self.left.entry((out, connection, flow)).or_default();
        assert_eq!(number, *next, "out {out}, connection {connection}, flow {flow}");
        *next += 1;
    }

    fn take(&mut self, worker: usize, from: usize) -> bool {
        let Some(ring) = self.rings.get_mut(&(from, worker)) else { return false };
        let Some((heard, _)) = ring.front() else { return false };
        // As the loop does: first all that the sender knew.
        let heard = *heard;
        while self.workers[worker].heard < heard {
            assert!(self.obey(worker));
        }
        let (_, mut parcel) = self.rings.get_mut(&(from, worker)).unwrap().pop_front().unwrap();
        self.workers[worker].shard.handed(self.now, OPEN, &mut parcel);
        self.judged(worker, &mut parcel);
        true
    }

    fn flush(&mut self, worker: usize) {
        let mut batch = Batch::new(16, SLOT_LEN);
        while self.workers[worker].shard.flush(self.now, OPEN, &mut batch) > 0 {
            self.judged(worker, &mut batch);
        }
    }

    /// Until nothing is on its way.
    fn settle(&mut self) {
        let many = self.workers.len();
        loop {
            let mut idle = true;
            for worker in 0..many {
                while self.obey(worker) {
                    idle = false;
                }
                self.flush(worker);
                for from in 0..many {
                    while self.take(worker, from) {
                        idle = false;
                    }
                }
            }
            if idle {
                return;
            }
        }
    }

    fn play(&mut self, op: Op) {
        // Between coming back and the next change lies an exchange with the other instance.
        if self.fresh && matches!(op, Op::Hold | Op::GiveAway | Op::Own | Op::RemoveOld { .. }) {
            self.wait();
        }
        let many = self.workers.len();
        match op {
            Op::Out { connection, flow, count } => {
                let worker = self.readers[usize::from(connection * FLOWS + flow)];
                let next = self.sent.entry((true, connection, flow)).or_default();
                let packets: Vec<_> =
                    (0..count).map(|n| packet(connection, flow, *next + u32::from(n))).collect();
                *next += u32::from(count);
                let mut batch = batch_of(&packets);
                self.workers[worker].shard.outbound(self.now, OPEN, &mut batch);
                self.judged(worker, &mut batch);
            }
            Op::In { connection, flow, count } => {
                // By the SPI: flows of one SA come to one worker, which may be the wrong one.
                let worker = self.readers[usize::from(connection * FLOWS)];
                let next = self.sent.entry((false, connection, flow)).or_default();
                let first = *next;
                *next += u32::from(count);
                let packets: Vec<_> = (0..count)
                    .map(|n| {
                        sealed(
                            &mut self.peer,
                            self.now,
                            &answer(connection, flow, first + u32::from(n)),
                        )
                    })
                    .collect();
                let mut batch = batch_of(&packets);
                self.workers[worker].shard.inbound(self.now, OPEN, &mut batch);
                self.judged(worker, &mut batch);
            }
            Op::Obey { worker } => {
                self.obey(usize::from(worker) % many);
            }
            Op::Take { worker, from } => {
                self.take(usize::from(worker) % many, usize::from(from) % many);
            }
            Op::Flush { worker } => self.flush(usize::from(worker) % many),
            Op::Hold if self.role == Role::Owner => {
                self.role = Role::Held;
                self.command(Command::Hold { endpoint: MAIN });
            }
            Op::Release if self.role == Role::Held => {
                self.role = Role::Owner;
                self.command(Command::Release { endpoint: MAIN });
            }
            Op::GiveAway if self.role != Role::Given => {
                self.role = Role::Given;
                self.command(Command::Disown { endpoint: MAIN, steer: true });
                let until = Duration::MAX;
                self.command(Command::HandBack { endpoint: MAIN, until });
            }
            Op::Own => {
                if self.role == Role::Given {
                    // It comes back long after, and as gateway does it: what is read before a worker knows it is older
                    // than what it is handed afterwards.
                    self.settle();
                    let until = self.now + ms(2);
                    self.command(Command::HoldDirect { endpoint: MAIN, until });
                    self.fresh = true;
                }
                self.role = Role::Owner;
                self.term += 2;
                self.command(own_command(self.term));
            }
            Op::Rekey { connection } => {
                // The peer uses it when it is installed, as IKE has it.
                self.rekey(connection);
                self.install_everywhere();
            }
            Op::RemoveOld { connection } if self.role != Role::Held => {
                // After the peer's last packets with it, none of which waits for a hold to end.
                self.settle();
                self.remove_old(connection);
            }
            Op::Wait => self.wait(),
            Op::Ask => {
                self.asked += 1;
                self.command(Command::Query { token: self.asked as u64 });
            }
            Op::Hold | Op::Release | Op::GiveAway | Op::RemoveOld { .. } => {}
        }
    }

    /// A response with a new SA leaves when the workers' queues hold it; a packet with it is seconds away, so its owner
    /// has obeyed. The others may not have.
    fn install_everywhere(&mut self) {
        for (field, _) in self.sas.clone() {
            let worker = usize::from(field) % self.workers.len();
            while self.obey(worker) {}
        }
    }

    /// Long enough for all workers to have done what they have to.
    fn wait(&mut self) {
        self.settle();
        self.now += ms(2);
        self.settle();
        self.fresh = false;
    }

    fn finish(mut self) -> Self {
        self.wait();
        if self.role == Role::Held {
            self.command(Command::Release { endpoint: MAIN });
            self.settle();
        }
        assert_eq!(self.sent, self.left, "packets are missing");
        assert_eq!(self.asked, self.answered, "answers are missing");
        self
    }
}

/// Connection, flow and number of an inner packet.
fn known(packet: &[u8], direction: Direction) -> (u16, u16, u32) {
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let (net, port) = match direction {
        Direction::Outbound => (packet[17], port(20)),
        Direction::Inbound => (packet[13], port(22)),
    };
    (u16::from(net) - 2, port - 5000, number_of(packet))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_doubled_or_overtaken(
        workers in 1..=4_u8,
        // As the other instance chose them, which has sixteen.
        fields in proptest::collection::vec(0..16_u8, usize::from(CONNECTIONS)),
        readers in proptest::collection::vec(0..16_u8, usize::from(CONNECTIONS * FLOWS)),
        ops in proptest::collection::vec(any_op(), 1..150),
    ) {
        let mut model = Model::new(workers, &fields, &readers);
        for op in ops {
            model.play(op);
        }
        model.finish();
    }
}

#[test]
fn the_model_hands_on_and_steers() {
    // Otherwise it would show nothing.
    let mut model = Model::new(2, &[0, 1, 2, 3], &[1; (CONNECTIONS * FLOWS) as usize]);
    for connection in 0..CONNECTIONS {
        model.play(Op::Out { connection, flow: 0, count: 3 });
        model.play(Op::In { connection, flow: 0, count: 3 });
    }
    model.play(Op::Hold);
    model.play(Op::Out { connection: 0, flow: 1, count: 4 });
    model.play(Op::GiveAway);
    model.play(Op::Out { connection: 0, flow: 1, count: 4 });
    let model = model.finish();
    let sum = |of: fn(&esp::Stats) -> u64| {
        model.workers.iter().map(|worker| of(worker.shard.stats())).sum::<u64>()
    };
    assert!(sum(|s| s.handed) >= 12 + 8, "{}", sum(|s| s.handed));
    assert_eq!(sum(|s| s.sealed) + sum(|s| s.steered) + sum(|s| s.opened), 12 + 12 + 8);
    assert!(sum(|s| s.steered) >= 4);
}

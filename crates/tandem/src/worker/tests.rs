//! A real worker over a real TUN and real sockets, in a namespace of its own; the remote peer is a
//! bare shard with a UDP socket. These tests need root and fail without it.
//!
//! ```text
//!  application 10.1.0.9 ── TUN ── worker 127.0.0.1:4500 ══ ESP ══ 127.0.0.2:4500 peer (10.2.0.5)
//! ```

use super::*;
use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crypto::Secret;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, INITIAL_CEILING, Reason, Report, SLOT_LEN, Sa, Shard};
use netio::clock::boottime;
use wire::id::{ConnectionId, EspSpi, SpiLayout, Term};
use wire::ts::{Cidr, TrafficSelector};

use crate::link::{Link, LinkConfig, LinkEvent, LinkPath, Started, SteerKind};

const MAIN: EndpointId = EndpointId(0);
const PEER: &str = "127.0.0.2:4500";
const APPLICATION: &str = "10.1.0.9:5000";
const FAR: &str = "10.2.0.5:4000";

pub(crate) fn isolated(body: impl FnOnce() + Send + 'static) {
    let run = move || {
        netio::netns::isolate_thread().expect("these tests need root");
        ip("link set lo up");
        body();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status =
        std::process::Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn spi(instance: u8) -> EspSpi {
    SpiLayout::new(instance, 1, 0, 3).unwrap().spi()
}

/// One end of the SA pair: `ours` is 0 for the worker, 1 for the peer.
fn sa(ours: u8, local: &str) -> Box<Sa> {
    let alg = AeadAlg::Aes256Gcm16;
    let key = |byte: u8| Secret::new(vec![byte; alg.keymat_len()]);
    let nets = ["10.1.0.0/16", "10.2.0.0/16"]
        .map(|net| vec![TrafficSelector::from(net.parse::<Cidr>().unwrap())]);
    let [worker_net, peer_net] = nets;
    let (local_ts, remote_ts) =
        if ours == 0 { (worker_net, peer_net) } else { (peer_net, worker_net) };
    Box::new(Sa {
        endpoint: MAIN,
        connection: ConnectionId(0),
        spi_in: spi(ours),
        spi_out: spi(1 - ours),
        alg,
        keymat_in: key(1 + ours),
        keymat_out: key(2 - ours),
        local_ts,
        remote_ts,
        local: local.parse().unwrap(),
        remote: if ours == 0 { PEER } else { "127.0.0.1:4500" }.parse().unwrap(),
        udp_encap: true,
        next_seq: 1,
        ceiling: INITIAL_CEILING,
        born: Term(1),
    })
}

/// Owns the endpoint first: an SA installed by its owner starts at 1, a later owner's at the ceiling.
fn own(mut apply: impl FnMut(Command), local: &str, ours: u8, term: u64) {
    apply(Command::Own { endpoint: MAIN, term: Term(term), seq_jump: 0, obey_leases: false });
    apply(Command::Install(sa(ours, local)));
    apply(Command::UseOutbound { spi_in: spi(ours) });
}

struct Host {
    worker: WorkerHandle,
    fences: Arc<[AtomicU64]>,
}

impl Host {
    /// A worker that owns the endpoint, or not yet, at that address.
    fn new(tun: &str, local: &str, owner: bool) -> Self {
        Self::linked(tun, local, owner, None)
    }

    fn linked(tun: &str, local: &str, owner: bool, steering: Option<SteerPort>) -> Self {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let mut worker = spawn(Start { steering, ..start(tun, local, &fences) }).unwrap();
        if owner {
            own(|command| worker.send(WorkerCommand::Shard(command)).unwrap(), local, 0, 2);
        } else {
            worker.send(WorkerCommand::Shard(Command::Install(sa(0, local)))).unwrap();
            worker.send(WorkerCommand::Shard(Command::UseOutbound { spi_in: spi(0) })).unwrap();
        }
        Self { worker, fences }
    }

    fn event(&mut self) -> WorkerEvent {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            if let Some(event) = self.worker.poll().unwrap() {
                return event;
            }
            assert!(Instant::now() < deadline, "no event");
            netio::udp::wait_readable(self.worker.event(), 100).unwrap();
            self.worker.event().clear();
        }
    }

    fn wait_for(&self, what: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let counters = self.worker.counters();
            if what(&counters) {
                return counters;
            }
            assert!(Instant::now() < deadline, "{counters:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn start(tun: &str, local: &str, fences: &Arc<[AtomicU64]>) -> Start {
    let tun = Tun::open_vnet(tun).unwrap();
    tun.configure(1400, 2000).unwrap();
    let socket = BatchSocket::bind(local.parse().unwrap(), SOCKET_OPTIONS).unwrap();
    Start {
        tun: Arc::new(tun),
        sockets: vec![EndpointSocket { endpoint: MAIN, socket }],
        fences: Arc::clone(fences),
        endpoints: 1,
        steering: None,
    }
}

/// A worker's state without its thread: it owns the endpoint once its commands are obeyed.
pub(super) fn test_state() -> run::State {
    linked_state(None).1
}

/// The same with a pair link, and control's end of the queue, which ends the worker when it goes.
pub(super) fn linked_state(
    steering: Option<SteerPort>,
) -> (QueueSender<WorkerCommand>, run::State) {
    let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
    let local = "127.0.0.1:4500";
    let (mut commands, asked) = queue(64).unwrap();
    let outlet = run::Outlet::new(
        sync_channel(64).0,
        sync_channel(64).0,
        EventFd::new().unwrap(),
        Arc::default(),
    );
    let start = Start { steering, ..start("tdm0", local, &fences) };
    let state = run::State::new(start, asked, outlet, Arc::default()).unwrap();
    own(|command| commands.send(WorkerCommand::Shard(command)).unwrap(), local, 0, 2);
    (commands, state)
}

/// The remote gateway with a host behind it.
pub(super) struct Peer {
    shard: Shard,
    batch: Batch,
    socket: UdpSocket,
}

impl Peer {
    pub(super) fn new() -> Self {
        let mut shard = Shard::new(esp::Config::default());
        own(|command| shard.apply(command).unwrap(), PEER, 1, 1);
        let socket = UdpSocket::bind(PEER).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        Self { shard, batch: Batch::new(1, SLOT_LEN), socket }
    }

    /// Sealed, as it would come over the wire.
    pub(super) fn seal(&mut self, payload: &[u8]) -> Vec<u8> {
        let inner =
            wire::ip::udp_packet(FAR.parse().unwrap(), APPLICATION.parse().unwrap(), payload);
        self.seal_whole(&inner.unwrap())
    }

    fn seal_whole(&mut self, inner: &[u8]) -> Vec<u8> {
        self.batch.clear();
        assert!(self.batch.push().unwrap().fill(inner));
        self.shard.outbound(boottime(), &[Duration::MAX], &mut self.batch);
        assert!(matches!(self.batch.slots()[0].verdict(), esp::Verdict::Send { .. }));
        self.batch.slots()[0].packet().to_vec()
    }

    fn send(&mut self, to: &str, payload: &[u8]) {
        let datagram = self.seal(payload);
        self.socket.send_to(&datagram, to).unwrap();
    }

    /// The payload of the next packet and where it came from.
    pub(super) fn receive(&mut self) -> (Vec<u8>, SocketAddr) {
        self.batch.clear();
        let slot = self.batch.push().unwrap();
        let (length, from) = self.socket.recv_from(slot.room()).expect("a packet at the peer");
        slot.set_len(length);
        self.shard.inbound(boottime(), &[Duration::MAX], &mut self.batch);
        let slot = &self.batch.slots()[0];
        assert!(matches!(slot.verdict(), esp::Verdict::Deliver { .. }), "{:?}", slot.verdict());
        (slot.packet()[28..].to_vec(), from)
    }

    pub(super) fn hears_nothing(&self) {
        self.socket.set_nonblocking(true).unwrap();
        assert!(self.socket.recv_from(&mut [0; 2000]).is_err(), "nothing may leave");
        self.socket.set_nonblocking(false).unwrap();
    }
}

/// A socket of a host on the LAN side, and the routes around it.
fn application(tun: &str) -> UdpSocket {
    ip(&format!("address add 10.1.0.9/32 dev {tun}"));
    ip(&format!("route add 10.2.0.0/16 dev {tun} src 10.1.0.9"));
    let socket = UdpSocket::bind(APPLICATION).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket.connect(FAR).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2000];
    let length = socket.recv(&mut buffer).expect("a packet at the application");
    buffer[..length].to_vec()
}

#[test]
fn packets_pass_both_ways_in_order_and_windows_are_reported() {
    isolated(|| {
        let mut host = Host::new("tdm0", "127.0.0.1:4500", true);
        let application = application("tdm0");
        let mut peer = Peer::new();
        for number in 0..1000_u32 {
            application.send(&number.to_be_bytes()).unwrap();
            if number % 100 == 99 {
                for expected in number - 99..=number {
                    assert_eq!(peer.receive().0, expected.to_be_bytes());
                }
            }
        }
        for number in 0..1000_u32 {
            peer.send("127.0.0.1:4500", &number.to_be_bytes());
            if number % 100 == 99 {
                for expected in number - 99..=number {
                    assert_eq!(receive(&application), expected.to_be_bytes());
                }
            }
        }
        let counters = host.worker.counters();
        assert_eq!(
            (counters.sent, counters.tun_written, counters.late),
            (1000, 1000, 0),
            "{counters:?}"
        );
        let mut top = 0;
        while top < 1000 {
            if let WorkerEvent::Report(Report::Windows(tops)) = host.event() {
                assert!(tops.as_slice()[0].1 > top);
                top = tops.as_slice()[0].1;
            }
        }
    });
}

#[test]
fn a_closed_fence_lets_nothing_out_either_way() {
    isolated(|| {
        let mut host = Host::new("tdm0", "127.0.0.1:4500", true);
        let application = application("tdm0");
        let mut peer = Peer::new();
        application.send(b"open").unwrap();
        peer.receive();
        host.fences[0].store(u64::try_from(boottime().as_nanos()).unwrap(), Ordering::Release);
        application.send(b"closed").unwrap();
        peer.send("127.0.0.1:4500", b"closed");
        host.wait_for(|counters| counters.tun_read >= 2 && counters.esp_received >= 1);
        host.worker.send(WorkerCommand::Shard(Command::Query { token: 1 })).unwrap();
        let stats = loop {
            if let WorkerEvent::Report(Report::Snapshot(snapshot)) = host.event() {
                break snapshot.stats;
            }
        };
        assert_eq!(stats.dropped(Reason::Fenced), 2);
        peer.hears_nothing();
        assert_eq!(host.worker.counters().tun_written, 0);
        host.fences[0].store(u64::MAX, Ordering::Release);
        application.send(b"open again").unwrap();
        assert_eq!(peer.receive().0, b"open again");
    });
}

#[test]
fn ike_goes_to_control_and_junk_is_counted() {
    isolated(|| {
        let mut host = Host::new("tdm0", "127.0.0.1:4500", true);
        let application = application("tdm0");
        let mut peer = Peer::new();
        let to = "127.0.0.1:4500";
        peer.socket.send_to(&[0xff], to).unwrap();
        peer.socket.send_to(&[0, 0, 0], to).unwrap();
        peer.socket.send_to(&[7; 40], to).unwrap();
        peer.socket.send_to(&[9; 3000], to).unwrap();
        peer.send(to, b"between");
        let mut ike = vec![0; 4];
        ike.extend(b"an IKE message");
        peer.socket.send_to(&ike, to).unwrap();
        peer.send(to, b"after");
        // Longer than any slot.
        let mut long = vec![0; 4];
        long.extend([8; 30_000]);
        peer.socket.send_to(&long, to).unwrap();
        let mut messages = Vec::new();
        while messages.len() < 2 {
            if let WorkerEvent::Ike { endpoint, from, bytes } = host.event() {
                assert_eq!((endpoint, from.to_string().as_str()), (MAIN, PEER));
                messages.push(bytes);
            }
        }
        // A long one may overtake those of the same batch.
        messages.sort_by_key(Vec::len);
        assert!(messages.iter().map(|bytes| &bytes[..]).eq([&ike[4..], &long[4..]]));
        assert_eq!(receive(&application), b"between");
        assert_eq!(receive(&application), b"after");
        let c = host.worker.counters();
        assert_eq!(
            (c.keepalives, c.short, c.truncated, c.ike_received, c.esp_received),
            (1, 1, 1, 2, 3),
            "{c:?}"
        );
        // Beyond the queue's bound IKE messages are dropped, ESP goes on.
        for _ in 0..3000 {
            peer.socket.send_to(&ike, to).unwrap();
        }
        peer.send(to, b"still");
        assert_eq!(receive(&application), b"still");
        let c = host.wait_for(|c| c.ike_received + c.ike_dropped == 3002);
        assert!(c.ike_dropped >= 3000 - 2 * IKE_QUEUE as u64, "{c:?}");
    });
}

/// A pair link over loopback, both ends up.
pub(super) async fn links() -> [Started; 2] {
    let config = |index: u8| LinkConfig {
        index,
        secret: zeroize::Zeroizing::new(b"s".to_vec()),
        links: vec![LinkPath {
            local: SocketAddr::from(([127, 9, 0, index], 4600)),
            remote: SocketAddr::from(([127, 9, 0, 1 - index], 4600)),
        }],
        dead_after: Duration::from_secs(10),
        retry: Duration::from_millis(20),
    };
    let [mut left, mut right] = [0, 1].map(|index| Link::start(config(index)).unwrap());
    for side in [&mut left, &mut right] {
        assert_eq!(side.events.recv().await, Some(LinkEvent::StreamUp { link: 0 }));
    }
    [left, right]
}

#[test]
fn steered_packets_are_carried_on_by_the_other_instance() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [left, right] = runtime.block_on(links());
        let (left_link, right_link) = (left.handle, right.handle);
        let mut old = Host::linked("tdm0", "127.0.0.1:4500", true, Some(left.steering));
        let mut new = Host::linked("tdm1", "127.0.0.3:4500", false, Some(right.steering));
        let application = application("tdm0");
        let mut peer = Peer::new();
        application.send(b"first").unwrap();
        assert_eq!(peer.receive(), (b"first".to_vec(), "127.0.0.1:4500".parse().unwrap()));

        // The switchover as the shards see it.
        old.worker.send(WorkerCommand::Steering(left_link.steer_sender().unwrap())).unwrap();
        old.worker.send(WorkerCommand::Shard(Command::Hold { endpoint: MAIN })).unwrap();
        application.send(b"queued").unwrap();
        old.wait_for(|counters| counters.tun_read >= 2);
        old.worker
            .send(WorkerCommand::Shard(Command::Disown { endpoint: MAIN, steer: true }))
            .unwrap();
        let own = Command::Own { endpoint: MAIN, term: Term(3), seq_jump: 0, obey_leases: false };
        new.worker.send(WorkerCommand::Shard(own)).unwrap();
        application.send(b"late").unwrap();
        old.wait_for(|counters| counters.tun_read >= 3);
        // Both hosts share one namespace here: the return route follows the owner.
        ip("route replace 10.2.0.0/16 dev tdm1 src 10.1.0.9");
        peer.send("127.0.0.1:4500", b"inbound");
        // Sealed by the new owner, queued packets first, and opened by it.
        assert_eq!(peer.receive(), (b"queued".to_vec(), "127.0.0.3:4500".parse().unwrap()));
        assert_eq!(peer.receive().0, b"late");
        assert_eq!(receive(&application), b"inbound");
        let told = std::iter::from_fn(|| Some(old.event()))
            .take(10)
            .any(|event| matches!(event, WorkerEvent::Steered(MAIN)));
        assert!(told);
        assert_eq!(old.worker.counters().steered, 3);
        assert_eq!(old.worker.counters().steer_lost, 0);
        assert_eq!(new.worker.counters().steered_in, 3);
        // An IKE message goes on to control, a long one too; what control's socket got by mistake takes its way as well.
        let from = PEER.parse().unwrap();
        for length in [300, 30_000] {
            let head = SteerHead { kind: SteerKind::Ike, ..esp_from(from) };
            assert!(left_link.send_steer(&head, &vec![9; length]));
            let message = std::iter::from_fn(|| Some(new.event())).take(50).find_map(|event| {
                let WorkerEvent::SteeredIke { head, bytes } = event else { return None };
                Some((head.from, bytes))
            });
            assert_eq!(message, Some((Some(from), vec![9; length])));
        }
        let stray = left_link.steer_sender().unwrap();
        let stray = stray.seal_copy(&esp_from(from), &peer.seal(b"stray")).unwrap();
        for _ in 0..2 {
            let datagram = stray.clone();
            new.worker.send(WorkerCommand::Steered { link: 0, datagram }).unwrap();
        }
        assert_eq!(receive(&application), b"stray");
        assert_eq!(new.worker.counters().steered_in, 4, "the second is a replay");

        // While direct arrivals are held, steered ones pass; a peer that moved is noticed in both.
        let hold = |until| WorkerCommand::Shard(Command::HoldDirect { endpoint: MAIN, until });
        new.worker.send(hold(boottime() + Duration::from_secs(60))).unwrap();
        new.worker.send(WorkerCommand::Shard(Command::Query { token: 1 })).unwrap();
        while !matches!(new.event(), WorkerEvent::Report(Report::Snapshot(_))) {}
        peer.send("127.0.0.3:4500", b"direct");
        new.wait_for(|counters| counters.esp_received == 1);
        let moved = "127.0.0.77:999".parse().unwrap();
        let head = esp_from(moved);
        assert!(left_link.send_steer(&head, &peer.seal(b"steered")));
        assert_eq!(receive(&application), b"steered");
        let noticed =
            std::iter::from_fn(|| Some(new.event())).take(20).find_map(|event| match event {
                WorkerEvent::Report(Report::PeerMoved { from, .. }) => Some(from),
                _ => None,
            });
        assert_eq!(noticed, Some(moved));
        new.worker.send(hold(Duration::ZERO)).unwrap();
        assert_eq!(receive(&application), b"direct");
        // Nothing is steered twice.
        assert!(right_link.send_steer(&head, &peer.seal(b"back again")));
        old.wait_for(|counters| counters.steered_in == 1);
        old.worker.send(WorkerCommand::Shard(Command::Query { token: 2 })).unwrap();
        let stats = loop {
            if let WorkerEvent::Report(Report::Snapshot(snapshot)) = old.event() {
                break snapshot.stats;
            }
        };
        assert_eq!((stats.dropped(Reason::SteeredTwice), stats.steered), (1, 3));
    });
}

/// The head of inner packets.
pub(super) const PLAIN: SteerHead =
    SteerHead { kind: SteerKind::Plain, endpoint: MAIN, from: None, local_port: 0, back: false };

#[test]
fn a_mixed_burst_keeps_the_order_of_each_way() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [mut left, right] = runtime.block_on(links());
        let host = Host::linked("tdm0", "127.0.0.1:4500", true, Some(right.steering));
        let application = application("tdm0");
        let mut peer = Peer::new();
        let sender = left.handle.steer_sender().unwrap();
        // Changes of the way after one, after some, and after more than a batch.
        let ways = [1, 1, 3, 2, 150, 1, 70, 64, 1, 65];
        let mut number = 0_u32;
        let mut sealed = Vec::new();
        let mut expected = [Vec::new(), Vec::new()];
        for (at, count) in ways.into_iter().enumerate() {
            for _ in 0..count {
                number += 1;
                let bytes = number.to_be_bytes();
                expected[at % 2].push(bytes);
                let (head, packet) = if at % 2 == 0 {
                    let (from, to) = (APPLICATION.parse().unwrap(), FAR.parse().unwrap());
                    (PLAIN, wire::ip::udp_packet(from, to, &bytes).unwrap())
                } else {
                    (esp_from(PEER.parse().unwrap()), peer.seal(&bytes))
                };
                sealed.push(sender.seal_copy(&head, &packet).unwrap());
            }
        }
        let sent = left.steering.send(sender.link(), sealed.iter().map(Vec::as_slice));
        assert_eq!(sent, sealed.len());
        for bytes in &expected[0] {
            assert_eq!(peer.receive().0, bytes);
        }
        for bytes in &expected[1] {
            assert_eq!(receive(&application), bytes);
        }
        assert_eq!(host.worker.counters().steered_in, u64::from(number));
    });
}

#[test]
fn what_no_slot_holds_is_counted_and_does_not_take_the_rest_along() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [mut left, right] = runtime.block_on(links());
        let mut host = Host::linked("tdm0", "127.0.0.1:4500", true, Some(right.steering));
        let mut peer = Peer::new();
        let sender = left.handle.steer_sender().unwrap();
        let inner =
            wire::ip::udp_packet(APPLICATION.parse().unwrap(), FAR.parse().unwrap(), b"fits");
        let inner = inner.unwrap();
        let packets: [&[u8]; 4] = [&inner, &[0x45; 40_000], &inner, &[]];
        let sealed = packets.map(|packet| sender.seal_copy(&PLAIN, packet).unwrap());
        left.steering.send(sender.link(), sealed.iter().map(Vec::as_slice));
        assert_eq!((peer.receive().0, peer.receive().0), (b"fits".to_vec(), b"fits".to_vec()));
        let counters = host.wait_for(|counters| counters.steered_in == 3);
        assert_eq!((counters.truncated, counters.sent), (1, 2));
        host.worker.send(WorkerCommand::Shard(Command::Query { token: 1 })).unwrap();
        let stats = loop {
            if let WorkerEvent::Report(Report::Snapshot(snapshot)) = host.event() {
                break snapshot.stats;
            }
        };
        // The empty one alone: of the long one nothing is left.
        assert_eq!(stats.dropped(Reason::MalformedInner), 1);
    });
}

/// TUN to pair link in one worker, pair link to the peer in the other.
#[test]
fn no_allocation_while_packets_are_steered() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [left, right] = runtime.block_on(links());
        let sender = left.handle.steer_sender().unwrap();
        let mut ends = Vec::new();
        let sides =
            [("tdm0", "127.0.0.1:4500", left.steering), ("tdm1", "127.0.0.3:4500", right.steering)];
        for (tun, local, steering) in sides {
            let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
            let (commands, asked) = queue(64).unwrap();
            let (reports, taken) = sync_channel(REPORT_QUEUE);
            let outlet = run::Outlet::new(
                reports,
                sync_channel(1).0,
                EventFd::new().unwrap(),
                Arc::default(),
            );
            let start = Start { steering: Some(steering), ..start(tun, local, &fences) };
            let counters = Arc::new(Counters::default());
            let state = run::State::new(start, asked, outlet, Arc::clone(&counters)).unwrap();
            ends.push((commands, taken, counters, Some(state)));
        }
        let shard = |command| WorkerCommand::Shard(command);
        ends[0].0.send(WorkerCommand::Steering(sender)).unwrap();
        ends[0].0.send(shard(Command::Install(sa(0, "127.0.0.1:4500")))).unwrap();
        ends[0].0.send(shard(Command::UseOutbound { spi_in: spi(0) })).unwrap();
        ends[0].0.send(shard(Command::Steer { endpoint: MAIN, on: true })).unwrap();
        let to_new = &mut ends[1].0;
        own(|command| to_new.send(shard(command)).unwrap(), "127.0.0.3:4500", 0, 3);
        let application = application("tdm0");
        let mut peer = Peer::new();
        let workers: Vec<_> = ends
            .iter_mut()
            .map(|end| {
                let mut state = end.3.take().unwrap();
                std::thread::spawn(move || {
                    // Warm up (until the first stop), then measure (until the second).
                    state.run().unwrap();
                    allocation_counter::measure(|| state.run().unwrap())
                })
            })
            .collect();
        for bursts in [20, 400] {
            for number in (0..bursts * 32_u32).map(|number| number.to_be_bytes()) {
                application.send(&number).unwrap();
                if number[3] % 32 == 31 {
                    for _ in 0..32 {
                        peer.receive();
                    }
                }
            }
            for (commands, taken, ..) in &mut ends {
                while taken.try_recv().is_ok() {}
                commands.send(WorkerCommand::Stop).unwrap();
            }
        }
        for worker in workers {
            let measured = worker.join().unwrap();
            assert_eq!(measured.count_total, 0, "{measured:?}");
        }
        let passed = [ends[0].2.snapshot(), ends[1].2.snapshot()];
        let all = 420 * 32;
        assert_eq!((passed[0].steered, passed[1].steered_in, passed[1].sent), (all, all, all));
    });
}

fn esp_from(from: SocketAddr) -> SteerHead {
    SteerHead {
        kind: SteerKind::Esp,
        endpoint: MAIN,
        from: Some(from),
        local_port: 4500,
        back: false,
    }
}

/// Part `number` of a bulk transfer to a host that is not there.
fn tcp_segment(number: u32) -> Vec<u8> {
    let (src, dst) = ([10, 2, 0, 5], [10, 1, 0, 77]);
    let payload = [number as u8; 500];
    let mut tcp = vec![0x13, 0x88, 0x0f, 0xa0];
    tcp.extend((number * payload.len() as u32).to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    tcp.extend(payload);
    let protocol = wire::ip::protocol::TCP;
    let sum = wire::ip::transport_checksum(src.into(), dst.into(), protocol, &tcp).unwrap();
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0];
    packet.extend((20 + tcp.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(src);
    packet.extend(dst);
    let sum = wire::ip::ipv4_header_checksum(&packet).unwrap();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(tcp);
    packet
}

/// TUN, shard and sockets, in bursts: sending in segments, receiving in runs, merging.
#[test]
fn no_allocation_while_packets_pass() {
    isolated(|| {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let local = "127.0.0.1:4500";
        let (mut commands, asked) = queue(64).unwrap();
        let (reports, taken) = sync_channel(REPORT_QUEUE);
        let (ike, _) = sync_channel(1);
        let outlet = run::Outlet::new(reports, ike, EventFd::new().unwrap(), Arc::default());
        let counters = Arc::new(Counters::default());
        let mut state =
            run::State::new(start("tdm0", local, &fences), asked, outlet, Arc::clone(&counters))
                .unwrap();
        own(|command| commands.send(WorkerCommand::Shard(command)).unwrap(), local, 0, 2);
        let application = application("tdm0");
        let mut peer = Peer::new();
        let worker = std::thread::spawn(move || {
            // Warm up (until the first stop), then measure (until the second).
            state.run().unwrap();
            allocation_counter::measure(|| state.run().unwrap())
        });
        const BURST: u32 = 32;
        let mut exchange = |bursts: u32| {
            for _ in 0..bursts {
                for number in 0..BURST {
                    application.send(&number.to_be_bytes()).unwrap();
                }
                for number in 0..BURST {
                    assert_eq!(peer.receive().0, number.to_be_bytes());
                }
                for number in 0..BURST {
                    let segment = peer.seal_whole(&tcp_segment(number));
                    peer.socket.send_to(&segment, local).unwrap();
                }
                for number in 0..BURST {
                    peer.send(local, &number.to_be_bytes());
                }
                for number in 0..BURST {
                    assert_eq!(receive(&application), number.to_be_bytes());
                }
                while taken.try_recv().is_ok() {}
            }
        };
        exchange(20);
        commands.send(WorkerCommand::Stop).unwrap();
        exchange(1100);
        commands.send(WorkerCommand::Stop).unwrap();
        let measured = worker.join().unwrap();
        assert_eq!(measured.count_total, 0, "{measured:?}");
        let passed = counters.snapshot();
        let bursts = u64::from(1100 * BURST);
        assert!(passed.sent >= bursts && passed.tun_written >= 2 * bursts, "{passed:?}");
        assert!(passed.sent + passed.tun_written >= 100_000, "{passed:?}");
        assert!(passed.tun_merged > 0, "nothing was merged: {passed:?}");
    });
}

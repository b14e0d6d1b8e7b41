//! A real worker over a real TUN and real sockets, in a namespace of its own; the remote peer is a
//! bare shard with a UDP socket. These tests need root and fail without it.
//!
//! ```text
//!  application 10.1.0.9 ── TUN ── worker 127.0.0.1:4500 ══ ESP ══ 127.0.0.2:4500 peer (10.2.0.5)
//! ```

mod raw;
mod several;
pub(crate) mod steering;

use super::*;
use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crypto::Secret;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, INITIAL_CEILING, Reason, Report, Sa, Shard};
use netio::clock::boottime;
use netio::wake::{QueueReceiver, QueueSender};
use wire::id::{ConnectionId, EspSpi, SpiLayout, Term};
use wire::ts::{Cidr, TrafficSelector};

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
    spi_of(0, instance)
}

fn spi_of(worker: u8, instance: u8) -> EspSpi {
    SpiLayout::new(instance, 1, worker, 3).unwrap().spi()
}

/// One end of the SA pair: `ours` is 0 for the worker, 1 for the peer.
fn sa(ours: u8, local: &str) -> Box<Sa> {
    sa_of(0, PEER, ours, local)
}

/// The same for another worker, with another network behind the peer: 10.3.0.0/16 for worker 1.
fn sa_of(worker: u8, peer: &str, ours: u8, local: &str) -> Box<Sa> {
    let alg = AeadAlg::Aes256Gcm16;
    let key = |byte: u8| Secret::new(vec![byte + 10 * worker; alg.keymat_len()]);
    let nets = ["10.1.0.0/16".to_owned(), format!("10.{}.0.0/16", 2 + worker)]
        .map(|net| vec![TrafficSelector::from(net.parse::<Cidr>().unwrap())]);
    let [worker_net, peer_net] = nets;
    let (local_ts, remote_ts) =
        if ours == 0 { (worker_net, peer_net) } else { (peer_net, worker_net) };
    Box::new(Sa {
        endpoint: MAIN,
        connection: ConnectionId(0),
        spi_in: spi_of(worker, ours),
        spi_out: spi_of(worker, 1 - ours),
        alg,
        keymat_in: key(1 + ours),
        keymat_out: key(2 - ours),
        local_ts,
        remote_ts,
        local: local.parse().unwrap(),
        remote: if ours == 0 { peer } else { "127.0.0.1:4500" }.parse().unwrap(),
        udp_encap: true,
        next_seq: 1,
        ceiling: INITIAL_CEILING,
        born: Term(1),
    })
}

/// Owns the endpoint first: an SA installed by its owner starts at 1, a later owner's at the ceiling.
fn own(apply: impl FnMut(Command), local: &str, ours: u8, term: u64) {
    own_with(apply, sa(ours, local), term);
}

fn own_with(mut apply: impl FnMut(Command), sa: Box<Sa>, term: u64) {
    let spi_in = sa.spi_in;
    apply(Command::Own { endpoint: MAIN, term: Term(term), seq_jump: 0, obey_leases: false });
    apply(Command::Install(sa));
    apply(Command::UseOutbound { spi_in });
}

struct Host {
    worker: Workers,
    fences: Arc<[AtomicU64]>,
}

impl Host {
    /// A worker that owns the endpoint, or not yet, at that address.
    fn new(tun: &str, local: &str, owner: bool) -> Self {
        Self::linked(tun, local, owner, None)
    }

    fn linked(tun: &str, local: &str, owner: bool, steering: Option<SteerPort>) -> Self {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let start = Start { steering, ..start(tun, local, &fences) };
        Self::started(start, local, owner, fences)
    }

    fn started(start: Start, local: &str, owner: bool, fences: Arc<[AtomicU64]>) -> Self {
        let mut worker = spawn(start).unwrap();
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
    start_with(tun, local, fences, 1400)
}

fn start_with(tun: &str, local: &str, fences: &Arc<[AtomicU64]>, mtu: u16) -> Start {
    let tun = Tun::open_vnet(tun).unwrap();
    tun.configure(mtu.into(), 2000).unwrap();
    let socket = BatchSocket::bind(local.parse().unwrap(), SOCKET_OPTIONS).unwrap();
    let sockets = vec![EndpointSocket { endpoint: MAIN, socket, raw: None }];
    Start {
        shares: vec![Share { tun: Arc::new(tun), reads_tun: true, sockets }],
        fences: Arc::clone(fences),
        endpoints: 1,
        mtu: mtu.into(),
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
    state_of(Start { steering, ..start("tdm0", "127.0.0.1:4500", &fences) })
}

/// The state of the first of these workers, as the only one.
fn only(
    mut start: Start,
    commands: QueueReceiver<WorkerCommand>,
    outlet: outlet::Outlet,
    counters: Arc<Counters>,
) -> run::State {
    let parts = run::Parts {
        worker: (0, 1),
        share: start.shares.remove(0),
        fences: start.fences,
        endpoints: start.endpoints,
        mtu: start.mtu,
        steering: start.steering,
        ring: None,
        commands,
        outlet,
        counters,
    };
    run::State::new(parts).unwrap()
}

fn state_of(start: Start) -> (QueueSender<WorkerCommand>, run::State) {
    let local = start.shares[0].sockets[0].socket.local_addr().to_string();
    let (mut commands, asked) = queue(64).unwrap();
    let outlet = outlet::Outlet::new(
        sync_channel(64).0,
        sync_channel(64).0,
        EventFd::new().unwrap(),
        Arc::default(),
    );
    let state = only(start, asked, outlet, Arc::default());
    own(|command| commands.send(WorkerCommand::Shard(command)).unwrap(), &local, 0, 2);
    (commands, state)
}

/// The remote gateway with a host behind it.
pub(super) struct Peer {
    shard: Shard,
    batch: Batch,
    socket: UdpSocket,
    far: SocketAddr,
}

impl Peer {
    pub(super) fn new() -> Self {
        Self::with(PEER, FAR, sa(1, PEER))
    }

    fn with(at: &str, far: &str, sa: Box<Sa>) -> Self {
        let mut shard = Shard::new(esp::Config::default());
        own_with(|command| shard.apply(command).unwrap(), sa, 1);
        let socket = UdpSocket::bind(at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        Self { shard, batch: Batch::new(1, esp::slot_len(9000)), socket, far: far.parse().unwrap() }
    }

    /// Sealed, as it would come over the wire.
    pub(super) fn seal(&mut self, payload: &[u8]) -> Vec<u8> {
        let inner = wire::ip::udp_packet(self.far, APPLICATION.parse().unwrap(), payload);
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
pub(super) fn application(tun: &str) -> UdpSocket {
    ip(&format!("address add 10.1.0.9/32 dev {tun}"));
    ip(&format!("route add 10.2.0.0/16 dev {tun} src 10.1.0.9"));
    let socket = UdpSocket::bind(APPLICATION).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket.connect(FAR).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 9000];
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
        // Counted right after they left.
        let counters = host.wait_for(|counters| counters.sent + counters.tun_written >= 2000);
        assert_eq!(
            (counters.sent, counters.tun_written, counters.late),
            (1000, 1000, 0),
            "{counters:?}"
        );
        // A shadow that comes is told of all windows, and from then on of those that move.
        let next_top = |host: &mut Host| loop {
            if let WorkerEvent::Report(Report::Windows(tops)) = host.event() {
                return tops.as_slice()[0].1;
            }
        };
        let obey = Command::ObeyLeases { endpoint: MAIN, on: true };
        host.worker.send(WorkerCommand::Shard(obey)).unwrap();
        assert_eq!(next_top(&mut host), 1000);
        peer.send("127.0.0.1:4500", b"one more");
        assert_eq!(next_top(&mut host), 1001);
    });
}

#[test]
fn a_sleeping_shadow_knows_all_window_tops_when_it_takes_over() {
    isolated(|| {
        let mut host = Host::new("tdm0", "127.0.0.1:4500", false);
        let application = application("tdm0");
        let mut peer = Peer::new();
        for top in 1..=5 {
            let command = Command::Window { spi_in: spi(0), top };
            host.worker.send(WorkerCommand::Shard(command)).unwrap();
        }
        own(
            |command| host.worker.send(WorkerCommand::Shard(command)).unwrap(),
            "127.0.0.1:4500",
            0,
            2,
        );
        for number in 1..=6_u8 {
            peer.send("127.0.0.1:4500", &[number]);
        }
        assert_eq!(receive(&application), [6], "the owner had accepted the first five");
        // Counted right after it was written.
        let counters = host.wait_for(|c| c.esp_received == 6 && c.tun_written > 0);
        assert_eq!(counters.tun_written, 1, "{counters:?}");
    });
}

#[test]
fn slots_hold_what_a_larger_mtu_lets_through() {
    isolated(|| {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let start = start_with("tdm0", "127.0.0.1:4500", &fences, 9000);
        let host = Host::started(start, "127.0.0.1:4500", true, fences);
        let application = application("tdm0");
        let mut peer = Peer::new();
        // IPv4 and UDP take 28 bytes.
        let full = [7; 8972];
        application.send(&full).unwrap();
        assert_eq!(peer.receive().0, full);
        peer.send("127.0.0.1:4500", &full);
        assert_eq!(receive(&application), full);
        let dropped: Vec<_> = host.worker.counters().drops().collect();
        assert_eq!(dropped, []);
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
        let outlet = outlet::Outlet::new(reports, ike, EventFd::new().unwrap(), Arc::default());
        let counters = Arc::new(Counters::default());
        let mut state = only(start("tdm0", local, &fences), asked, outlet, Arc::clone(&counters));
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

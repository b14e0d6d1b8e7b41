//! ESP as protocol 50: what the other tests show of UDP, by raw sockets at both ends.

use super::steering::links;
use super::*;
use netio::udp::{RecvMeta, SendItem};

/// The sockets of an endpoint at this address.
fn with_raw(mut start: Start) -> Start {
    for place in &mut start.shares[0].sockets {
        place.raw = Some(EspSocket::bind(place.socket.local_addr().ip(), SOCKET_BUFFER).unwrap());
    }
    start
}

/// The SA's packets leave as protocol 50 from now on.
fn unwrap(local: &str) -> Command {
    let (local, remote) = (local.parse().unwrap(), PEER.parse().unwrap());
    Command::Move { spi_in: spi(0), local, remote, udp_encap: false }
}

impl Host {
    fn raw(tun: &str, local: &str, owner: bool, steering: Option<SteerPort>) -> Self {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let start = Start { steering, ..with_raw(start(tun, local, &fences)) };
        let mut host = Self::started(start, local, owner, fences);
        host.worker.send(WorkerCommand::Shard(unwrap(local))).unwrap();
        host
    }
}

/// A peer that has both sockets.
struct RawPeer {
    peer: Peer,
    raw: EspSocket,
}

impl RawPeer {
    fn new() -> Self {
        let raw = EspSocket::bind("127.0.0.2".parse().unwrap(), SOCKET_BUFFER).unwrap();
        Self { peer: Peer::new(), raw }
    }

    fn send(&mut self, to: &str, payload: &[u8]) {
        let packet = self.peer.seal(payload);
        self.send_sealed(to, &packet);
    }

    fn send_sealed(&mut self, to: &str, bytes: &[u8]) {
        let item = SendItem { to: to.parse().unwrap(), bytes, tos: 0 };
        assert_eq!(self.raw.send([item].into_iter()), 1);
    }

    /// The payload of the next packet and where it came from.
    fn receive(&mut self) -> (Vec<u8>, String) {
        let Self { peer, raw } = self;
        peer.batch.clear();
        let slot = peer.batch.push().unwrap();
        let mut metas = [RecvMeta::EMPTY];
        assert!(netio::udp::wait_readable(raw, 2000).unwrap(), "no packet at the peer");
        assert_eq!(raw.recv([slot.room()].into_iter(), &mut metas), 1);
        slot.set_len(metas[0].start + metas[0].len);
        assert!(slot.narrow(metas[0].start, metas[0].len));
        peer.shard.inbound(boottime(), &[Duration::MAX], &mut peer.batch);
        let slot = &peer.batch.slots()[0];
        assert!(matches!(slot.verdict(), esp::Verdict::Deliver { .. }), "{:?}", slot.verdict());
        (slot.packet()[28..].to_vec(), metas[0].from.ip().to_string())
    }
}

#[test]
fn packets_pass_both_ways_and_those_in_udp_come_in_as_well() {
    isolated(|| {
        let mut host = Host::raw("tdm0", "127.0.0.1:4500", true, None);
        let application = application("tdm0");
        let mut peer = RawPeer::new();
        for number in 0..300_u32 {
            application.send(&number.to_be_bytes()).unwrap();
            if number % 100 == 99 {
                for expected in number - 99..=number {
                    let (payload, from) = peer.receive();
                    assert_eq!(
                        (&payload[..], &from[..]),
                        (&expected.to_be_bytes()[..], "127.0.0.1")
                    );
                }
            }
        }
        // RFC 7296 §2.23: what comes in UDP is to be processed, whether there is a NAT or not.
        for number in 0..300_u32 {
            match number % 3 {
                0 => peer.peer.send("127.0.0.1:4500", &number.to_be_bytes()),
                _ => peer.send("127.0.0.1:0", &number.to_be_bytes()),
            }
            assert_eq!(receive(&application), number.to_be_bytes());
        }
        // Neither kind makes the peer one to be followed, and the answer goes as the SA says.
        application.send(b"still").unwrap();
        assert_eq!(peer.receive().0, b"still");
        peer.peer.hears_nothing();
        // What is no packet, what belongs to nobody, what fits no slot.
        for junk in [&[1_u8, 2, 3][..], &[0; 40], &[9; 3000]] {
            peer.send_sealed("127.0.0.1:0", junk);
        }
        let c = host.wait_for(|c| (c.esp_received, c.truncated) == (302, 1));
        assert_eq!((c.sent, c.unsent, c.tun_written, c.late), (301, 0, 300, 0), "{c:?}");
        assert_eq!((c.ike_received, c.short, c.keepalives), (0, 0, 0), "no marker is looked for");
        host.worker.send(WorkerCommand::Shard(Command::Query { token: 1 })).unwrap();
        let stats = loop {
            match host.event() {
                WorkerEvent::Report(Report::Snapshot(snapshot)) => break snapshot.stats,
                event => assert!(!matches!(event, WorkerEvent::Report(Report::PeerMoved { .. }))),
            }
        };
        assert_eq!(
            (stats.dropped(Reason::MalformedEsp), stats.dropped(Reason::UnknownSpi)),
            (1, 1)
        );
    });
}

// No NAT passes protocol 50 on: where such packets come from says nothing of where UDP has to go.
#[test]
fn a_peer_is_not_followed_by_what_comes_without_udp() {
    isolated(|| {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let local = "127.0.0.1:4500";
        let start = with_raw(start("tdm0", local, &fences));
        let mut host = Host::started(start, local, true, fences);
        let application = application("tdm0");
        let mut peer = RawPeer::new();
        peer.raw = EspSocket::bind("127.0.0.77".parse().unwrap(), SOCKET_BUFFER).unwrap();
        peer.send(local, b"without");
        assert_eq!(receive(&application), b"without");
        let moves = |host: &mut Host| {
            host.worker.send(WorkerCommand::Shard(Command::Query { token: 1 })).unwrap();
            let mut moves = Vec::new();
            loop {
                match host.event() {
                    WorkerEvent::Report(Report::Snapshot(_)) => break moves,
                    WorkerEvent::Report(Report::PeerMoved { from, .. }) => moves.push(from),
                    _ => {}
                }
            }
        };
        assert_eq!(moves(&mut host), []);
        // While in UDP it would be.
        let elsewhere = UdpSocket::bind("127.0.0.77:999").unwrap();
        elsewhere.send_to(&peer.peer.seal(b"in UDP"), local).unwrap();
        assert_eq!(receive(&application), b"in UDP");
        let noticed = std::iter::from_fn(|| Some(host.event())).take(20).any(|event| {
            matches!(event, WorkerEvent::Report(Report::PeerMoved { from, .. }) if from.port() == 999)
        });
        assert!(noticed);
    });
}

#[test]
fn the_fence_holds_and_a_missing_socket_is_counted() {
    isolated(|| {
        let open: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let local = "127.0.0.1:4500";
        let mut peer = RawPeer::new();
        for (tun, start) in [
            ("tdm0", with_raw(start("tdm0", local, &open))),
            ("tdm1", start("tdm1", "127.0.0.1:4501", &open)),
        ] {
            let (mut commands, mut state) = state_of(start);
            commands.send(WorkerCommand::Shard(unwrap(local))).unwrap();
            let fence = Arc::clone(&open);
            let counters = state.write_outbound(b"late", || fence[0].store(1, Ordering::Release));
            assert_eq!((counters.late, counters.late_batches, counters.sent), (1, 1, 0), "{tun}");
            open[0].store(u64::MAX, Ordering::Release);
            let counters = state.write_outbound(b"now", || ());
            let expected = if tun == "tdm0" { (1, 0) } else { (0, 1) };
            assert_eq!((counters.sent, counters.unsent), expected, "{tun}");
        }
        assert_eq!(peer.receive().0, b"now");
        assert!(!netio::udp::wait_readable(&peer.raw, 0).unwrap(), "nothing else may leave");
    });
}

#[test]
fn what_comes_to_the_wrong_instance_is_steered() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [left, right] = runtime.block_on(links());
        let mut old = Host::raw("tdm0", "127.0.0.1:4500", true, Some(left.steering));
        let mut new = Host::raw("tdm1", "127.0.0.3:4500", false, Some(right.steering));
        let application = application("tdm0");
        let mut peer = RawPeer::new();
        old.worker.send(WorkerCommand::Steering(left.handle.steer_sender().unwrap())).unwrap();
        let own = Command::Own { endpoint: MAIN, term: Term(3), seq_jump: 0, obey_leases: false };
        new.worker.send(WorkerCommand::Shard(own)).unwrap();
        let disown = Command::Disown { endpoint: MAIN, steer: true };
        old.worker.send(WorkerCommand::Shard(disown)).unwrap();
        application.send(b"out").unwrap();
        assert_eq!(peer.receive(), (b"out".to_vec(), "127.0.0.3".to_owned()));
        // Both hosts share one namespace here: the return route follows the owner.
        ip("route replace 10.2.0.0/16 dev tdm1 src 10.1.0.9");
        for number in 0..100_u32 {
            peer.send("127.0.0.1:0", &number.to_be_bytes());
        }
        for number in 0..100_u32 {
            assert_eq!(receive(&application), number.to_be_bytes());
        }
        // Counted right after they left.
        let old = old.wait_for(|counters| counters.steered >= 101);
        let new = new.wait_for(|counters| counters.sent >= 1 && counters.steered_in >= 101);
        assert_eq!((old.esp_received, old.steered, old.steer_lost), (100, 101, 0));
        assert_eq!((new.esp_received, new.steered_in, new.sent), (0, 101, 1));
    });
}

#[test]
fn no_allocation_while_packets_pass() {
    isolated(|| {
        let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
        let local = "127.0.0.1:4500";
        let (mut commands, mut state) = state_of(with_raw(start("tdm0", local, &fences)));
        commands.send(WorkerCommand::Shard(unwrap(local))).unwrap();
        let application = application("tdm0");
        let mut peer = RawPeer::new();
        let worker = std::thread::spawn(move || {
            // Warm up (until the first stop), then measure (until the second).
            state.run().unwrap();
            (allocation_counter::measure(|| state.run().unwrap()), state)
        });
        for bursts in [20, 300] {
            for _ in 0..bursts {
                for number in 0..32_u32 {
                    application.send(&number.to_be_bytes()).unwrap();
                    peer.send("127.0.0.1:0", &number.to_be_bytes());
                }
                for number in 0..32_u32 {
                    assert_eq!(peer.receive().0, number.to_be_bytes());
                    assert_eq!(receive(&application), number.to_be_bytes());
                }
            }
            commands.send(WorkerCommand::Stop).unwrap();
        }
        let (measured, state) = worker.join().unwrap();
        assert_eq!(measured.count_total, 0, "{measured:?}");
        let passed = state.counters();
        assert_eq!((passed.sent, passed.tun_written), (320 * 32, 320 * 32), "{passed:?}");
    });
}

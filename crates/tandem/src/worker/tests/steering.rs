//! Two workers, or a worker and a hand-made other side, with a pair link between them.

use super::*;
use crate::link::{Link, LinkConfig, LinkEvent, LinkPath, Started, SteerKind};

/// A pair link over loopback, both ends up.
pub(crate) async fn links() -> [Started; 2] {
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
        // The old owner hears of the new one before it hands anything over.
        let own = Command::Own { endpoint: MAIN, term: Term(3), seq_jump: 0, obey_leases: false };
        new.worker.send(WorkerCommand::Shard(own)).unwrap();
        old.worker
            .send(WorkerCommand::Shard(Command::Disown { endpoint: MAIN, steer: true }))
            .unwrap();
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
        assert_eq!(old.wait_for(|counters| counters.steered >= 3).steered, 3);
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
        new.wait_for(|_| right_link.counters().replayed == 1);
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
pub(crate) const PLAIN: SteerHead =
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
        host.wait_for(|c| (c.steered_in, c.truncated, c.sent) == (3, 1, 2));
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
            let outlet = outlet::Outlet::new(
                reports,
                sync_channel(1).0,
                EventFd::new().unwrap(),
                Arc::default(),
            );
            let start = Start { steering: Some(steering), ..start(tun, local, &fences) };
            let counters = Arc::new(Counters::default());
            let state = only(start, asked, outlet, Arc::clone(&counters));
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

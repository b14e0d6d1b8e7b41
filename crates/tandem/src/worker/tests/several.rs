//! Two workers over one TUN and one port, each with an SA to a peer of its own.
//!
//! ```text
//!  10.1.0.9 ── TUN ═╤═ worker 0 ═╤═ 127.0.0.1:4500 ══ ESP ══ 127.0.0.2:4500  (10.2.0.5)
//!                   ╘═ worker 1 ═╛                 ╘═ ESP ══ 127.0.0.12:4500 (10.3.0.5)
//! ```

use super::steering::links;
use super::*;
use netio::udp::Group;
use netio::wake::QueueSender;

const LOCAL: &str = "127.0.0.1:4500";
const PEERS: [(&str, &str); 2] = [(PEER, FAR), ("127.0.0.12:4500", "10.3.0.5:4000")];

/// How packets come to the workers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// As they should.
    Sorts,
    /// Each ESP packet to the wrong one.
    Errs,
    /// The TUN has one queue.
    OneQueue,
    /// As protocol 50.
    Raw,
}

fn shares(tun: &str, kernel: Kernel) -> Vec<Share> {
    let queues = match kernel {
        Kernel::OneQueue => vec![Tun::open_plain(tun).unwrap()],
        _ => Tun::open_queues(tun, 2).unwrap(),
    };
    queues[0].configure(1400, 2000).unwrap();
    let mut queues = queues.into_iter().map(Arc::new);
    let first = queues.next().unwrap();
    let second = queues.next();
    let reads = [true, second.is_some()];
    let queues = [Arc::clone(&first), second.unwrap_or(first)];
    let group = Group::bind(LOCAL.parse().unwrap(), SOCKET_OPTIONS, 2).unwrap();
    assert!(group.unsorted.is_none());
    let mut sockets = group.sockets;
    if kernel == Kernel::Errs {
        sockets.reverse();
    }
    let all = queues.into_iter().zip(reads).zip(sockets).zip(0..);
    all.map(|(((tun, reads_tun), socket), worker)| {
        let raw = || EspSocket::bind_share(socket.local_addr().ip(), SOCKET_BUFFER, worker, 2);
        let raw = (kernel == Kernel::Raw).then(|| raw().unwrap());
        let sockets = vec![EndpointSocket { endpoint: MAIN, socket, raw }];
        Share { tun, reads_tun, sockets }
    })
    .collect()
}

/// Both SAs, in use.
fn commands() -> Vec<Command> {
    let mut commands = Vec::new();
    for worker in 0..2 {
        let sa = sa_of(worker, PEERS[usize::from(worker)].0, 0, LOCAL);
        own_with(|command| commands.push(command), sa, 2);
    }
    commands
}

fn start_two(kernel: Kernel, steering: Option<SteerPort>) -> Host {
    let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
    let shares = shares("tdm0", kernel);
    let mut worker =
        spawn(Start { shares, fences: Arc::clone(&fences), endpoints: 1, mtu: 1400, steering })
            .unwrap();
    for command in commands() {
        worker.send(WorkerCommand::Shard(command)).unwrap();
    }
    Host { worker, fences }
}

fn peers() -> [Peer; 2] {
    [0, 1].map(|worker: u8| {
        let (at, far) = PEERS[usize::from(worker)];
        Peer::with(at, far, sa_of(worker, at, 1, at))
    })
}

/// Towards both networks.
fn applications() -> [UdpSocket; 2] {
    ip("address add 10.1.0.9/32 dev tdm0");
    PEERS.map(|(_, far)| {
        let far: SocketAddr = far.parse().unwrap();
        let std::net::IpAddr::V4(address) = far.ip() else { panic!("IPv4") };
        ip(&format!("route add 10.{}.0.0/16 dev tdm0 src 10.1.0.9", address.octets()[1]));
        // Two sockets on one port: what comes in goes to the one that is connected there.
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&APPLICATION.parse::<SocketAddr>().unwrap().into()).unwrap();
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.connect(far).unwrap();
        socket
    })
}

impl Host {
    fn stats(&mut self) -> esp::Snapshot {
        self.worker.send(WorkerCommand::Shard(Command::Query { token: 9 })).unwrap();
        loop {
            if let WorkerEvent::Report(Report::Snapshot(snapshot)) = self.event() {
                return *snapshot;
            }
        }
    }
}

/// Bursts both ways through both SAs, in order. First one packet each way by itself: by the answer the kernel moves the
/// flow to another queue, and what is on its way then can be overtaken.
fn exchange(applications: &[UdpSocket; 2], peers: &mut [Peer; 2], bursts: u32) {
    const BURST: u32 = 20;
    for number in 0..bursts * BURST {
        for (application, peer) in applications.iter().zip(&mut *peers) {
            application.send(&number.to_be_bytes()).unwrap();
            if number == 0 {
                assert_eq!(peer.receive().0, number.to_be_bytes());
            }
            peer.send(LOCAL, &number.to_be_bytes());
            if number == 0 {
                assert_eq!(receive(application), number.to_be_bytes());
            }
        }
        if number % BURST == BURST - 1 {
            for expected in (number + 1 - BURST).max(1)..=number {
                for (application, peer) in applications.iter().zip(&mut *peers) {
                    assert_eq!(peer.receive().0, expected.to_be_bytes());
                    assert_eq!(receive(application), expected.to_be_bytes());
                }
            }
        }
    }
}

#[test]
fn packets_pass_through_both_and_are_handed_on_only_until_the_kernel_knows() {
    isolated(|| {
        let mut host = start_two(Kernel::Sorts, None);
        let applications = applications();
        let mut peers = peers();
        exchange(&applications, &mut peers, 10);
        let before = host.stats();
        exchange(&applications, &mut peers, 40);
        let after = host.stats();
        assert_eq!(after.stats.handed, before.stats.handed, "answers come where they are wanted");
        let mut sas: Vec<_> =
            after.sas.iter().map(|sa| (sa.spi_in, sa.packets_out, sa.packets_in)).collect();
        sas.sort_unstable();
        assert_eq!(sas, [(spi_of(0, 0), 1000, 1000), (spi_of(1, 0), 1000, 1000)]);
        for worker in 0..2 {
            let counters = host.worker.counters_of(worker);
            assert_eq!((counters.sent, counters.tun_written), (1000, 1000), "worker {worker}");
        }
        let all = host.worker.counters();
        assert_eq!((all.sent, all.handed, all.hand_lost), (2000, all.handed_in, 0), "{all:?}");
    });
}

#[test]
fn what_comes_to_the_wrong_worker_is_handed_on_in_order() {
    isolated(|| {
        let mut host = start_two(Kernel::Errs, None);
        let applications = applications();
        let mut peers = peers();
        exchange(&applications, &mut peers, 50);
        assert_eq!(host.stats().stats.dropped_in_all(), 0);
        let all = host.worker.counters();
        // All that came in, at the least.
        assert!(all.handed >= 2000 && all.handed == all.handed_in && all.hand_lost == 0, "{all:?}");
    });
}

#[test]
fn one_queue_serves_two_workers() {
    isolated(|| {
        let mut host = start_two(Kernel::OneQueue, None);
        let applications = applications();
        let mut peers = peers();
        exchange(&applications, &mut peers, 50);
        // Whoever answers has counted what left before.
        assert_eq!(host.stats().stats.dropped_in_all(), 0);
        let (first, second) = (host.worker.counters_of(0), host.worker.counters_of(1));
        assert_eq!((first.tun_read, second.tun_read), (2000, 0));
        assert_eq!((first.handed, second.handed), (1000, 0));
        assert_eq!((first.sent, second.sent, second.tun_written), (1000, 1000, 1000));
    });
}

#[test]
fn protocol_50_comes_to_each_once() {
    isolated(|| {
        let mut host = start_two(Kernel::Raw, None);
        let mut peers = peers();
        let applications = applications();
        let bare = peers.each_ref().map(|peer| {
            EspSocket::bind(peer.socket.local_addr().unwrap().ip(), SOCKET_BUFFER).unwrap()
        });
        for (at, mut socket) in bare.into_iter().enumerate() {
            for number in 0..50_u32 {
                let bytes = peers[at].seal(&number.to_be_bytes());
                let to = LOCAL.parse().unwrap();
                let item = netio::udp::SendItem { to, bytes: &bytes, tos: 0 };
                assert_eq!(socket.send([item].into_iter()), 1);
            }
            for number in 0..50_u32 {
                assert_eq!(receive(&applications[at]), number.to_be_bytes());
            }
        }
        let snapshot = host.stats();
        assert_eq!((snapshot.stats.opened, snapshot.stats.handed), (100, 0));
        // A second copy would be a replay.
        assert_eq!(snapshot.stats.dropped_in_all(), 0);
        assert_eq!(host.worker.counters().esp_received, 100);
    });
}

#[test]
fn a_hold_is_answered_for_both_and_keeps_order() {
    isolated(|| {
        let mut host = start_two(Kernel::Errs, None);
        let applications = applications();
        let mut peers = peers();
        exchange(&applications, &mut peers, 1);
        host.worker.send(WorkerCommand::Shard(Command::Hold { endpoint: MAIN })).unwrap();
        let counters = loop {
            if let WorkerEvent::Report(Report::Held { counters, .. }) = host.event() {
                break counters;
            }
        };
        let mut held: Vec<_> = counters.iter().map(|c| (c.spi_in, c.next_seq)).collect();
        held.sort_unstable();
        assert_eq!(held, [(spi_of(0, 0), 21), (spi_of(1, 0), 21)]);
        for number in 0..100_u32 {
            for (application, peer) in applications.iter().zip(&mut peers) {
                application.send(&number.to_be_bytes()).unwrap();
                peer.send(LOCAL, &number.to_be_bytes());
            }
            if number == 60 {
                let release = Command::Release { endpoint: MAIN };
                host.worker.send(WorkerCommand::Shard(release)).unwrap();
            }
        }
        for number in 0..100_u32 {
            for (application, peer) in applications.iter().zip(&mut peers) {
                assert_eq!(peer.receive().0, number.to_be_bytes());
                assert_eq!(receive(application), number.to_be_bytes());
            }
        }
    });
}

#[test]
fn steering_is_the_first_workers_for_all() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let [left, right] = runtime.block_on(links());
        let (near, far) = (left.handle, right.handle);
        let mut host = start_two(Kernel::Sorts, Some(left.steering));
        let mut other = right.steering;
        let applications = applications();
        let mut peers = peers();
        exchange(&applications, &mut peers, 1);
        // What the other instance hands over goes to the SA's worker.
        let sender = far.steer_sender().unwrap();
        for (at, peer) in peers.iter_mut().enumerate() {
            let head = SteerHead {
                kind: crate::link::SteerKind::Esp,
                endpoint: MAIN,
                from: Some(PEERS[at].0.parse().unwrap()),
                local_port: 4500,
                back: false,
            };
            let sealed = sender.seal_copy(&head, &peer.seal(b"steered")).unwrap();
            assert_eq!(other.send(sender.link(), [&sealed[..]].into_iter()), 1);
            assert_eq!(receive(&applications[at]), b"steered");
        }
        // And what is to be handed over leaves by the first.
        host.worker.send(WorkerCommand::Steering(near.steer_sender().unwrap())).unwrap();
        host.worker.send(WorkerCommand::Shard(Command::Hold { endpoint: MAIN })).unwrap();
        let disown = Command::Disown { endpoint: MAIN, steer: true };
        for number in 0..40_u32 {
            if number == 20 {
                host.worker.send(WorkerCommand::Shard(disown.without_keys())).unwrap();
            }
            for application in &applications {
                application.send(&number.to_be_bytes()).unwrap();
            }
        }
        let mut next = [0_u32; 2];
        while next != [40, 40] {
            let socket = other.sockets().next().unwrap();
            assert!(netio::udp::wait_readable(socket, 3000).unwrap(), "{next:?}");
            other.refill(0);
            while let Some(arrival) = other.take(0) {
                let crate::link::Arrival::Steered(head, packet) = arrival else {
                    panic!("no packet")
                };
                assert_eq!((head.endpoint, head.back), (MAIN, false));
                let at = usize::from(packet[17] - 2);
                assert_eq!(packet[28..], next[at].to_be_bytes(), "in the order of each flow");
                next[at] += 1;
            }
        }
        // Counted after the send.
        host.wait_for(|counters| counters.steered == 80);
        assert_eq!(host.worker.counters_of(0).steered, 80);
        assert_eq!(host.worker.counters_of(1).steered, 0);
    });
}

/// Both workers without their threads.
fn states() -> [(QueueSender<WorkerCommand>, Arc<Counters>, run::State); 2] {
    let fences: Arc<[AtomicU64]> = Arc::new([AtomicU64::new(u64::MAX)]);
    let mut rings = ring::Ring::new(2, esp::slot_len(1400)).unwrap().into_iter();
    let mut shares = shares("tdm0", Kernel::OneQueue).into_iter();
    [0, 1].map(|worker| {
        let (commands, asked) = queue(64).unwrap();
        let (reports, _) = sync_channel(REPORT_QUEUE);
        let outlet = outlet::Outlet::new(
            reports,
            sync_channel(1).0,
            EventFd::new().unwrap(),
            Arc::default(),
        );
        let counters = Arc::new(Counters::default());
        let state = run::State::new(run::Parts {
            worker: (worker, 2),
            share: shares.next().unwrap(),
            fences: Arc::clone(&fences),
            endpoints: 1,
            mtu: 1400,
            steering: None,
            ring: rings.next(),
            commands: asked,
            outlet,
            counters: Arc::clone(&counters),
        });
        (commands, counters, state.unwrap())
    })
}

// Control tells all workers, but not at one moment.
#[test]
fn what_the_sender_knew_is_known_before_its_packet_is_judged() {
    isolated(|| {
        let [(mut first, _, mut reader), (mut second, _, mut owner)] = states();
        let applications = applications();
        let mut peers = peers();
        let mut crew = esp::Crew::new(2);
        let mut later = Vec::new();
        for (worker, command) in commands().into_iter().flat_map(|command| crew.give(command)) {
            match worker {
                0 => first.send(WorkerCommand::Shard(command)).unwrap(),
                _ => later.push(command),
            }
        }
        reader.obey_now();
        applications[1].send(b"early").unwrap();
        reader.read_tun_now();
        owner.read_handed_now();
        peers[1].hears_nothing();
        let last = later.pop().unwrap();
        for command in later {
            second.send(WorkerCommand::Shard(command)).unwrap();
        }
        owner.read_handed_now();
        peers[1].hears_nothing();
        second.send(WorkerCommand::Shard(last)).unwrap();
        owner.read_handed_now();
        assert_eq!(peers[1].receive().0, b"early");
    });
}

#[test]
fn no_allocation_while_packets_are_handed_on() {
    isolated(|| {
        let mut ends = states();
        let applications = applications();
        let mut peers = peers();
        let mut crew = esp::Crew::new(2);
        for (worker, command) in commands().into_iter().flat_map(|command| crew.give(command)) {
            ends[usize::from(worker)].0.send(WorkerCommand::Shard(command)).unwrap();
        }
        let mut controls = Vec::new();
        let mut counted = Vec::new();
        let mut workers = Vec::new();
        for (commands, counters, mut state) in ends {
            controls.push(commands);
            counted.push(counters);
            workers.push(std::thread::spawn(move || {
                // Warm up (until the first stop), then measure (until the second).
                state.run().unwrap();
                allocation_counter::measure(|| state.run().unwrap())
            }));
        }
        for bursts in [20, 300] {
            exchange(&applications, &mut peers, bursts);
            for commands in &mut controls {
                commands.send(WorkerCommand::Stop).unwrap();
            }
            // A measured run must have begun before there are packets for it.
            std::thread::yield_now();
        }
        for worker in workers {
            let measured = worker.join().unwrap();
            assert_eq!(measured.count_total, 0, "{measured:?}");
        }
        assert_eq!(counted[1].snapshot().handed_in, 320 * 20);
    });
}

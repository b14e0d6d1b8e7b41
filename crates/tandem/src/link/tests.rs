//! Two instances of the link in one process, over loopback addresses, with a relay where a test
//! wants to cut, keep or change what passes.

use super::*;
use std::sync::atomic::{AtomicU16, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use wire::id::EndpointId;

const DEAD_AFTER: Duration = Duration::from_millis(100);

/// Ports of its own for each test, below the ephemeral range.
fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = (std::process::id() % 300) as u16;
    20_000 + process * 40 + NEXT.fetch_add(1, Ordering::Relaxed)
}

fn config(index: u8, secret: &[u8], port: u16, links: u8) -> LinkConfig {
    let address = |link: u8, index: u8| SocketAddr::from(([127, 77, link, 1 + index], port));
    let other = 1 - index.min(1);
    LinkConfig {
        index,
        secret: Zeroizing::new(secret.to_vec()),
        links: (0..links)
            .map(|link| LinkPath { local: address(link, index), remote: address(link, other) })
            .collect(),
        dead_after: DEAD_AFTER,
        retry: Duration::from_millis(50),
    }
}

/// An instance with its events; heartbeats every 20 ms on the links not cut.
struct Side {
    handle: LinkHandle,
    events: mpsc::Receiver<LinkEvent>,
    steering: SteerPort,
    beats: tokio::task::JoinHandle<()>,
    cut: Arc<Mutex<Vec<u8>>>,
}

impl Side {
    fn start(index: u8, secret: &[u8], port: u16, links: u8) -> Self {
        let started = || Link::start(config(index, secret, port, links));
        // Other tests of this process run commands: until such a child has become another program, it holds copies of
        // sockets that were closed here meanwhile.
        let patience = std::time::Instant::now() + Duration::from_secs(3);
        let Started { handle, events, steering } = loop {
            match started() {
                Err(error)
                    if error.source.kind() == io::ErrorKind::AddrInUse
                        && std::time::Instant::now() < patience =>
                {
                    std::thread::yield_now();
                }
                other => break other.unwrap(),
            }
        };
        let cut = Arc::new(Mutex::new(Vec::new()));
        let beats = tokio::spawn({
            let (handle, cut) = (handle.clone(), Arc::clone(&cut));
            async move {
                for number in 0_u64.. {
                    for link in 0..links {
                        if !lock(&cut).contains(&link) {
                            handle.send_heartbeat(link, &number.to_be_bytes());
                        }
                    }
                    sleep(Duration::from_millis(20)).await;
                }
            }
        });
        Self { handle, events, steering, beats, cut }
    }

    /// The next event that is no heartbeat.
    async fn next(&mut self) -> LinkEvent {
        loop {
            let event = timeout(Duration::from_secs(5), self.events.recv())
                .await
                .expect("an event")
                .unwrap();
            if !matches!(event, LinkEvent::Heartbeat { .. }) {
                return event;
            }
        }
    }

    /// The next packet that was handed over on link 0, and what was refused before it.
    fn steered(&mut self) -> (SteerHead, Vec<u8>, u64) {
        let mut refused = 0;
        loop {
            match self.steering.take(0) {
                Some(Arrival::Steered(head, packet)) => return (head, packet.to_vec(), refused),
                Some(Arrival::Stray(bytes)) => panic!("a stray of {} B", bytes.len()),
                Some(Arrival::Refused) => refused += 1,
                None => {
                    let socket = self.steering.sockets().next().unwrap();
                    assert!(netio::udp::wait_readable(socket, 3000).unwrap(), "a steered packet");
                    self.steering.refill(0);
                }
            }
        }
    }

    async fn up(&mut self) -> u8 {
        match self.next().await {
            LinkEvent::StreamUp { link } => link,
            other => panic!("{other:?}"),
        }
    }

    /// Ends all tasks at once, as a kill would: no goodbye. Waits until the sockets are closed.
    async fn kill(self) {
        self.beats.abort();
        let _ = self.beats.await;
        let shared = Arc::downgrade(&self.handle.shared);
        drop((self.handle, self.events, self.steering));
        while shared.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

async fn both(port: u16, links: u8) -> (Side, Side) {
    let (mut left, mut right) =
        (Side::start(0, b"s", port, links), Side::start(1, b"s", port, links));
    assert_eq!(left.up().await, right.up().await);
    (left, right)
}

#[tokio::test(flavor = "current_thread")]
async fn frames_keep_order_and_size_and_heartbeats_use_every_link() {
    let (left, mut right) = both(port(), 2).await;
    let frames: Vec<Vec<u8>> = (0..50_usize).map(|i| vec![i as u8; i * i * 400]).collect();
    for frame in &frames {
        assert!(left.handle.send_frame(frame));
    }
    let largest = vec![7; ha::config::FRAME_MAX];
    assert!(left.handle.send_frame(&largest));
    assert!(!left.handle.send_frame(&vec![0; ha::config::FRAME_MAX + 1]));
    for frame in frames.iter().chain([&largest]) {
        assert_eq!(right.next().await, LinkEvent::Frame(Zeroizing::new(frame.clone())));
    }
    let mut heard = [false; 2];
    while heard != [true; 2] {
        if let LinkEvent::Heartbeat { link, .. } = right.events.recv().await.unwrap() {
            heard[usize::from(link)] = true;
        }
    }
    drop(left);
}

#[tokio::test(flavor = "current_thread")]
async fn goodbye_death_and_silence_are_told_apart() {
    let port = port();
    let (left, mut right) = both(port, 2).await;
    left.handle.send_frame(b"last");
    left.handle.close_stream(true).await.unwrap();
    assert_eq!(right.next().await, LinkEvent::Frame(Zeroizing::new(b"last".to_vec())));
    assert!(matches!(right.next().await, LinkEvent::StreamDown { end: StreamEnd::Goodbye, .. }));
    left.kill().await;
    sleep(Duration::from_millis(20)).await;

    let mut left = Side::start(0, b"s", port, 2);
    let link = left.up().await;
    assert_eq!(right.up().await, link);
    // The stream's link falls silent one way; the other one works: the stream moves.
    lock(&right.cut).push(link);
    assert_eq!(left.next().await, LinkEvent::StreamDown { link, end: StreamEnd::Silent });
    assert_eq!(right.next().await, LinkEvent::StreamDown { link, end: StreamEnd::Closed });
    lock(&right.cut).clear();
    left.up().await;
    right.up().await;

    // A dead process: its sockets close, its port refuses.
    let died = Instant::now();
    left.kill().await;
    assert!(matches!(right.next().await, LinkEvent::StreamDown { end: StreamEnd::Closed, .. }));
    for link in 0..2 {
        right.handle.probe(link);
    }
    for _ in 0..2 {
        assert!(matches!(
            right.next().await,
            LinkEvent::ProbeResult { result: ProbeResult::Refused, .. }
        ));
    }
    assert!(died.elapsed() < Duration::from_millis(50), "{:?}", died.elapsed());
    // And comes back.
    let mut left = Side::start(0, b"s", port, 2);
    left.up().await;
    right.up().await;
    left.handle.probe(0);
    assert_eq!(
        left.next().await,
        LinkEvent::ProbeResult { link: 0, result: ProbeResult::Accepted }
    );
}

const PLAIN: SteerHead = SteerHead {
    kind: SteerKind::Plain,
    endpoint: EndpointId(0),
    from: None,
    local_port: 0,
    back: false,
};

/// Sealed by these senders in turn, `count` packets with their number in them.
fn seal_all(senders: &[SteerSender], numbers: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    let packet = |number: u32| [&number.to_be_bytes()[..], &[7; 1200]].concat();
    numbers
        .zip(senders.iter().cycle())
        .map(|(number, sender)| sender.seal_copy(&PLAIN, &packet(number)).unwrap())
        .collect()
}

#[tokio::test(flavor = "current_thread")]
async fn steered_packets_go_from_worker_to_worker() {
    let (mut left, mut right) = both(port(), 1).await;
    let sender = left.handle.steer_sender().unwrap();
    let head = SteerHead {
        kind: SteerKind::Esp,
        endpoint: EndpointId(2),
        from: Some("192.0.2.9:4500".parse().unwrap()),
        local_port: 4500,
        back: false,
    };
    // Runs of equal ones, and sizes that end a run; the largest is longer than a worker's slots and the link's MTU.
    let sizes = [1400, 1400, 1400, 30, 1400, 0, 60_000, 1];
    let all: Vec<Vec<u8>> =
        sizes.iter().zip(1_u8..).map(|(size, byte)| vec![byte; *size]).collect();
    let sealed: Vec<_> =
        all.iter().map(|packet| sender.seal_copy(&head, packet).unwrap()).collect();
    let worker = std::thread::spawn(move || {
        (left.steering.send(sender.link(), sealed.iter().map(Vec::as_slice)), left)
    });
    for packet in &all {
        assert_eq!(right.steered(), (head, packet.clone(), 0));
    }
    let (sent, left) = worker.join().unwrap();
    assert_eq!(sent, all.len());
    // The few of control's go the same way, from the same port.
    assert!(left.handle.send_steer(&PLAIN, b"plain"));
    assert_eq!(right.steered(), (PLAIN, b"plain".to_vec(), 0));
    assert_eq!(right.handle.counters().steered, all.len() as u64 + 1);
    // None of them was an event of control's.
    let mut events = std::iter::from_fn(|| right.events.try_recv().ok());
    assert!(events.all(|event| matches!(event, LinkEvent::Heartbeat { .. })));
}

#[tokio::test(flavor = "current_thread")]
async fn threads_that_seal_at_once_never_share_a_counter() {
    const EACH: u32 = 400;
    let (mut left, mut right) = both(port(), 1).await;
    let sender = left.handle.steer_sender().unwrap();
    // A worker with a clone, and control with its own: one key.
    let threads: Vec<_> = [sender.clone(), left.handle.steer_sender().unwrap(), sender]
        .into_iter()
        .zip(0..)
        .map(|(sender, at): (_, u32)| {
            std::thread::spawn(move || seal_all(&[sender], at * EACH..(at + 1) * EACH))
        })
        .collect();
    let sealed: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    let counters: std::collections::BTreeSet<_> =
        sealed.iter().map(|datagram| datagram[..datagram::HEADER].to_vec()).collect();
    assert_eq!(counters.len(), sealed.len());
    // All are taken, however they were mixed: the window is wide enough.
    for part in sealed.chunks(100) {
        left.steering.send(0, part.iter().map(Vec::as_slice));
        for _ in part {
            assert_eq!(right.steered().2, 0);
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn steered_packets_are_taken_once_and_only_unchanged() {
    let (mut left, mut right) = both(port(), 2).await;
    let mut sender = left.handle.steer_sender().unwrap();
    sender.link = 0;
    let before = right.handle.counters();
    let sealed = seal_all(&[sender.clone()], 0..3);
    let mut other_link = sender.clone();
    other_link.link = 1;
    let mut bad = Vec::new();
    // Cut, longer, changed in every part; for another link; of this purpose by its first byte alone.
    bad.extend(
        [1, datagram::OVERHEAD - 1, datagram::OVERHEAD, 600].map(|n| sealed[1][..n].to_vec()),
    );
    bad.push([&sealed[1][..], &[0]].concat());
    for at in [1, 4, 5, 12, 13, 40, sealed[1].len() - 1] {
        let mut changed = sealed[1].clone();
        changed[at] ^= 1;
        bad.push(changed);
    }
    bad.extend(seal_all(&[other_link], 9..10));
    bad.push([&[2][..], &[0xee; 9000]].concat());
    // Authentic, and no head that we know: of a later release, say.
    let mut unknown = vec![0; datagram::HEADER];
    unknown.extend([3; 200]);
    unknown.extend([0; 16]);
    sender.sealer.seal(0, &mut unknown).unwrap();
    bad.push(unknown);
    let all = [&sealed[0], &sealed[0]].into_iter().chain(&bad).chain([&sealed[1], &sealed[2]]);
    left.steering.send(0, all.map(Vec::as_slice));
    let number = |packet: &[u8]| packet[3];
    let (_, packet, refused) = right.steered();
    assert_eq!((number(&packet), refused), (0, 0));
    let (_, packet, refused) = right.steered();
    assert_eq!((number(&packet), refused), (1, 1 + bad.len() as u64));
    assert_eq!((number(&right.steered().1), right.handle.counters().steered), (2, 3));
    let after = right.handle.counters();
    let grown = [
        after.replayed - before.replayed,
        after.short - before.short,
        after.other_key - before.other_key,
        after.forged - before.forged,
        after.unknown - before.unknown,
    ];
    // One of the changed has the counter of what was taken before.
    assert_eq!(grown, [2, 2, 3, 8, 1], "{after:?}");
    // From elsewhere it is not even looked at.
    let stranger = std::net::UdpSocket::bind("127.77.0.99:0").unwrap();
    let to = left.handle.shared.ports[0].remote;
    stranger.send_to(&seal_all(&[sender.clone()], 5..6)[0], to).unwrap();
    left.steering.send(0, seal_all(&[sender], 6..7).iter().map(Vec::as_slice));
    assert_eq!((number(&right.steered().1), right.handle.counters().strangers), (6, 1));
}

#[tokio::test(flavor = "current_thread")]
async fn strays_are_passed_on_and_opened_once() {
    let (left, mut right) = both(port(), 1).await;
    let sealed = seal_all(&[left.handle.steer_sender().unwrap()], 0..2);
    // A steered one at control's socket: an event, unopened; the worker opens it.
    let mut datagram = sealed[0].clone();
    let event = right.handle.take_stray(0, &mut datagram).unwrap();
    let LinkEvent::Steered { link: 0, datagram } = event else { panic!("{event:?}") };
    assert_eq!(datagram, sealed[0]);
    let taken = |port: &mut SteerPort, datagram: &[u8]| {
        matches!(port.open(0, &mut datagram.to_vec()), Arrival::Steered(..))
    };
    assert!(taken(&mut right.steering, &datagram));
    assert!(!taken(&mut right.steering, &datagram), "a replay by the other way");
    // A heartbeat at the worker's: opened by control, once.
    let mut beat = vec![0; datagram::HEADER];
    beat.extend([0xaa; 8]);
    beat.extend([0; 16]);
    left.handle.shared.tx().heartbeat.as_ref().unwrap().seal(0, &mut beat).unwrap();
    let event = right.handle.take_stray(0, &mut beat.clone());
    assert_eq!(event, Some(LinkEvent::Heartbeat { link: 0, bytes: vec![0xaa; 8] }));
    assert_eq!(right.handle.take_stray(0, &mut beat), None);
}

#[tokio::test(flavor = "current_thread")]
async fn a_wrong_secret_gives_no_stream_and_one_warning() {
    let port = port();
    let (mut left, mut right) = (Side::start(0, b"one", port, 2), Side::start(1, b"two", port, 2));
    assert!(timeout(Duration::from_millis(800), left.next()).await.is_err());
    assert!(timeout(Duration::from_millis(1), right.next()).await.is_err());
    let (l, r) = (left.handle.counters(), right.handle.counters());
    assert!(r.refused_handshakes > 5 && l.hang_ups > 5, "{l:?} {r:?}");
    assert_eq!((l.warnings, r.warnings), (1, 1));
    assert_eq!((l.streams, r.streams), (0, 0));
}

#[tokio::test(flavor = "current_thread")]
async fn equal_indices_are_refused_and_named() {
    let port = port();
    // Both believe that they are index 1: each waits a little, then connects.
    let mut left_config = config(0, b"s", port, 1);
    left_config.index = 1;
    let Started { handle: left, mut events, steering: _port } = Link::start(left_config).unwrap();
    let mut right = Side::start(1, b"s", port, 1);
    assert!(timeout(Duration::from_millis(800), right.next()).await.is_err());
    assert!(events.try_recv().is_err());
    let refused = left.counters().refused_handshakes + right.handle.counters().refused_handshakes;
    assert!(refused > 0);
}

#[tokio::test(flavor = "current_thread")]
async fn junk_replays_and_strangers_change_nothing() {
    let port = port();
    let (left, mut right) = both(port, 1).await;
    let before = right.handle.counters();
    // From the right address and port, as a forger on the segment would: the left's own socket.
    let udp = &left.handle.shared.ports[0].udp;
    let to = left.handle.shared.ports[0].remote;
    let mut replay = vec![0; datagram::HEADER];
    replay.extend([0xaa; 8]);
    replay.extend([0; 16]);
    left.handle.shared.tx().heartbeat.as_ref().unwrap().seal(0, &mut replay).unwrap();
    for _ in 0..3 {
        udp.send_to(&replay, to).unwrap();
    }
    for length in 0..replay.len() {
        udp.send_to(&replay[..length], to).unwrap();
    }
    for purpose in 0..=255 {
        udp.send_to(&[purpose; 64], to).unwrap();
    }
    let stranger = std::net::UdpSocket::bind("127.77.0.99:0").unwrap();
    stranger.send_to(&replay, to).unwrap();
    let mut stranger = stream::connect_from("127.77.0.99:0".parse().unwrap(), to).await.unwrap();
    assert_eq!(
        timeout(DEAD_AFTER, stranger.read(&mut [0; 1])).await.unwrap().unwrap(),
        0,
        "hung up on"
    );
    // And on the listener: junk, half a handshake, a replayed first message, and silence.
    let local = left.handle.shared.ports[0].local;
    let mut held = Vec::new();
    for bytes in [&[0_u8; 200][..], &[1; 20], &[]] {
        let mut stream = stream::connect_from(local, to).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        held.push(stream);
    }
    let psk = noise::derive_psk(b"s");
    let (_, first) = noise::Initiator::start(&psk, 0).unwrap();
    for _ in 0..2 {
        let mut stream = stream::connect_from(local, to).await.unwrap();
        stream.write_all(&first).await.unwrap();
        let mut answer = [0; noise::MESSAGE_LEN];
        stream.read_exact(&mut answer).await.unwrap();
        stream.write_all(&[0, 30]).await.unwrap();
        stream.write_all(&[9; 30]).await.unwrap();
        assert_eq!(stream.read(&mut answer).await.unwrap_or(0), 0, "hung up on");
    }
    assert!(timeout(Duration::from_millis(300), right.next()).await.is_err(), "the stream goes on");
    // What claims to be steered went the worker's way.
    right.steering.refill(0);
    assert!(matches!(right.steering.take(0), Some(Arrival::Refused)));
    assert!(right.steering.take(0).is_none());
    let after = right.handle.counters();
    // The two copies, and the eight cut ones that are long enough to show a counter seen before.
    assert_eq!(after.replayed - before.replayed, 2 + 8);
    assert!(after.short >= before.short + 20 && after.unknown >= before.unknown + 250, "{after:?}");
    assert!(
        after.other_key >= before.other_key + 2 && after.strangers == before.strangers + 2,
        "{after:?}"
    );
    assert_eq!((after.streams, after.broken_streams), (before.streams, before.broken_streams));
    left.handle.send_frame(b"still");
    assert_eq!(right.next().await, LinkEvent::Frame(Zeroizing::new(b"still".to_vec())));
    drop(held);
}

#[tokio::test(flavor = "current_thread")]
async fn datagrams_under_an_earlier_streams_keys_are_refused() {
    let port = port();
    let (mut left, mut right) = both(port, 1).await;
    let old = left.handle.steer_sender().unwrap();
    assert!(left.handle.send_steer(&PLAIN, b"in time"));
    assert_eq!(right.steered(), (PLAIN, b"in time".to_vec(), 0));
    left.handle.close_stream(false).await.unwrap();
    assert!(matches!(left.next().await, LinkEvent::StreamDown { end: StreamEnd::Local, .. }));
    assert!(matches!(right.next().await, LinkEvent::StreamDown { end: StreamEnd::Closed, .. }));
    left.up().await;
    right.up().await;
    let before = right.handle.counters().other_key;
    let new = left.handle.steer_sender().unwrap();
    let sealed = [&old, &new, &old].map(|sender| sender.seal_copy(&PLAIN, b"x").unwrap());
    assert_eq!(left.steering.send(0, sealed.iter().map(Vec::as_slice)), 3);
    assert_eq!(right.steered(), (PLAIN, b"x".to_vec(), 1));
    while right.steering.take(0).is_some() || right.handle.counters().other_key < before + 2 {
        right.steering.refill(0);
    }
    assert_eq!(right.handle.counters().other_key, before + 2);
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_address_names_link_and_remedy() {
    let mut config = config(0, b"s", port(), 1);
    config.links[0].local = "192.0.2.77:4600".parse().unwrap();
    let error = Link::start(config).unwrap_err().to_string();
    assert!(error.contains("pair link 0") && error.contains("192.0.2.77:4600"), "{error}");
    assert!(error.contains("not on this host"), "{error}");
    let port = port();
    let _first = Side::start(0, b"s", port, 1);
    let error = Link::start(super::tests::config(0, b"s", port, 1)).unwrap_err().to_string();
    assert!(error.contains("running already"), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn many_restarts_always_end_in_one_stream() {
    let port = port();
    let mut right = Side::start(1, b"s", port, 3);
    for round in 0..10 {
        let mut left = Side::start(0, b"s", port, 3);
        let link = left.up().await;
        assert_eq!(right.up().await, link, "round {round}");
        assert!(timeout(Duration::from_millis(150), left.next()).await.is_err(), "it stays");
        left.kill().await;
        assert!(matches!(right.next().await, LinkEvent::StreamDown { .. }));
    }
}

#[tokio::test(flavor = "current_thread")]
async fn connections_begun_by_both_at_once_settle_on_one() {
    for round in 0..15 {
        let port = port();
        // Both try at once and often, which the higher index normally leaves to the lower.
        let start = |index| {
            let mut config = config(index, b"s", port, 2);
            config.retry = Duration::from_millis(1);
            config.dead_after = Duration::from_secs(10);
            let Started { handle, events, steering } = Link::start(config).unwrap();
            (handle, events, steering)
        };
        let ((left, mut left_events, _left_port), (right, mut right_events, _right_port)) =
            (start(0), start(1));
        sleep(Duration::from_millis(100)).await;
        // Whatever happened on the way, both ends hold the same, standing stream now.
        let state = |events: &mut mpsc::Receiver<LinkEvent>| {
            std::iter::from_fn(|| events.try_recv().ok()).last().map(|event| format!("{event:?}"))
        };
        let (l, r) = (state(&mut left_events), state(&mut right_events));
        assert!(
            l.as_ref().is_some_and(|last| last.starts_with("StreamUp")),
            "round {round}: {l:?}"
        );
        assert_eq!(l, r, "round {round}");
        assert!(left.send_frame(b"to the right") && right.send_frame(b"to the left"));
        let frame = |text: &[u8]| Some(LinkEvent::Frame(Zeroizing::new(text.to_vec())));
        assert_eq!(
            timeout(Duration::from_secs(1), right_events.recv()).await.unwrap(),
            frame(b"to the right")
        );
        assert_eq!(
            timeout(Duration::from_secs(1), left_events.recv()).await.unwrap(),
            frame(b"to the left")
        );
        sleep(Duration::from_millis(20)).await;
        assert!(left_events.try_recv().is_err() && right_events.try_recv().is_err());
    }
}

/// Begins a stream by hand: handshake as instance `index`, then keys.
async fn begin(index: u8, local: SocketAddr, to: SocketAddr) -> tokio::net::TcpStream {
    let (initiator, first) = noise::Initiator::start(&noise::derive_psk(b"s"), index).unwrap();
    let mut stream = stream::connect_from(local, to).await.unwrap();
    stream.write_all(&first).await.unwrap();
    let mut answer = [0; noise::MESSAGE_LEN];
    stream.read_exact(&mut answer).await.unwrap();
    let session = initiator.finish(&answer).unwrap();
    let keys = datagram::Keys::random(&mut rand_core::OsRng);
    let plain = [&[frame::Kind::Keys.byte()][..], &keys.encode()].concat();
    let mut record = Vec::new();
    session.seal(0, &plain, &mut record).unwrap();
    stream.write_all(&record).await.unwrap();
    stream
}

#[tokio::test(flavor = "current_thread")]
async fn of_two_streams_the_lower_indexs_stays_and_of_its_own_the_newer() {
    let (mut left, mut right) = both(port(), 1).await;
    let (left_at, right_at) =
        (left.handle.shared.ports[0].local, right.handle.shared.ports[0].local);
    let mut refused = begin(1, right_at, left_at).await;
    assert_eq!(timeout(DEAD_AFTER * 5, refused.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
    assert!(timeout(DEAD_AFTER * 2, left.next()).await.is_err(), "the stream stays");
    let _newer = begin(0, left_at, right_at).await;
    assert_eq!(right.next().await, LinkEvent::StreamDown { link: 0, end: StreamEnd::Replaced });
    assert_eq!(right.next().await, LinkEvent::StreamUp { link: 0 });
}

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
    beats: tokio::task::JoinHandle<()>,
    cut: Arc<Mutex<Vec<u8>>>,
}

impl Side {
    fn start(index: u8, secret: &[u8], port: u16, links: u8) -> Self {
        let (handle, events) = Link::start(config(index, secret, port, links)).unwrap();
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
        Self { handle, events, beats, cut }
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
        drop((self.handle, self.events));
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

#[tokio::test(flavor = "current_thread")]
async fn steered_packets_arrive_from_any_thread() {
    let (left, mut right) = both(port(), 1).await;
    let sender = left.handle.steer_sender().unwrap();
    let head = SteerHead {
        kind: SteerKind::Esp,
        endpoint: EndpointId(2),
        from: Some("192.0.2.9:4500".parse().unwrap()),
        local_port: 4500,
        back: false,
    };
    let worker = std::thread::spawn(move || {
        let mut scratch = Vec::new();
        (0..200_u8).all(|i| sender.send(&head, &[i; 1400], &mut scratch))
    });
    for i in 0..200_u8 {
        assert_eq!(right.next().await, LinkEvent::Steered { head, bytes: vec![i; 1400] });
    }
    assert!(worker.join().unwrap());
    assert!(
        left.handle.send_steer(&SteerHead { kind: SteerKind::Plain, from: None, ..head }, b"plain")
    );
    let LinkEvent::Steered { head: got, bytes } = right.next().await else { panic!() };
    assert_eq!((got.kind, got.from, &bytes[..]), (SteerKind::Plain, None, &b"plain"[..]));
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
    let (left, mut events) = Link::start(left_config).unwrap();
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
    left.handle.close_stream(false).await.unwrap();
    assert!(matches!(left.next().await, LinkEvent::StreamDown { end: StreamEnd::Local, .. }));
    assert!(matches!(right.next().await, LinkEvent::StreamDown { end: StreamEnd::Closed, .. }));
    left.up().await;
    right.up().await;
    let before = right.handle.counters().other_key;
    let head = SteerHead {
        kind: SteerKind::Plain,
        endpoint: EndpointId(0),
        from: None,
        local_port: 0,
        back: false,
    };
    assert!(old.send(&head, b"old", &mut Vec::new()));
    assert!(left.handle.send_steer(&head, b"new"));
    let LinkEvent::Steered { bytes, .. } = right.next().await else { panic!() };
    assert_eq!(bytes, b"new");
    assert_eq!(right.handle.counters().other_key, before + 1);
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
            Link::start(config).unwrap()
        };
        let ((left, mut left_events), (right, mut right_events)) = (start(0), start(1));
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

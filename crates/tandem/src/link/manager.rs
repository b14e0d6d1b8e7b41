//! The task that decides which connection is *the* stream, and the small tasks around it.
//!
//! ```text
//!             connected (ours)              Keys from the other
//!   none ────────────────────────► pending ─────────────────────► up ──► StreamUp
//!    ▲  │                             │                            │
//!    │  └── accepted, with its Keys ──┼────────────────────────────►│
//!    └──────── ended, silent ─────────┴────────────────────────────┘──► StreamDown
//! ```
//! The lower index connects; the higher does so only after a second without a stream, for hosts
//! whose firewall lets connections through one way, and so that equal indices are noticed. Of two
//! streams the one that the lower index began wins, on both sides; of two begun by the same
//! side the newer one, because its maker has given the older up.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use zeroize::Zeroizing;

use super::datagram::{self, Keys, Purpose, Refused};
use super::frame::Kind;
use super::noise::Session;
use super::stream::{self, End, Outbox};
use super::{Command, Counters, LinkEvent, Shared, StreamEnd, probe};

/// What the small tasks tell the manager.
pub(super) enum Internal {
    /// We connected and shook hands on this link.
    Connected { link: u8, stream: TcpStream, session: Session },
    /// An attempt to connect is over, whatever came of it.
    AttemptOver { link: u8 },
    /// The other connected, shook hands and sent its keys.
    Accepted { link: u8, stream: TcpStream, session: Session, keys: Keys },
    /// The other's keys on a stream that we began.
    PeerKeys { generation: u64, keys: Keys },
    /// A frame.
    Frame { generation: u64, bytes: Zeroizing<Vec<u8>> },
    /// A stream's task stopped.
    Ended { generation: u64, end: End },
}

/// Between tasks and manager: small, so that a stream is read no faster than it is handled.
const INTERNAL_QUEUE: usize = 64;

/// How long a goodbye may take to reach the kernel.
const GOODBYE_TIME: Duration = Duration::from_millis(200);

/// What [`spawn`] needs.
pub(super) struct Start {
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::Sender<LinkEvent>,
    pub(super) asked: mpsc::UnboundedReceiver<Command>,
    pub(super) listeners: Vec<TcpListener>,
    pub(super) receivers: Vec<UdpSocket>,
    pub(super) dead_after: Duration,
    pub(super) retry: Duration,
}

/// Starts everything. All tasks end with the manager, and it ends with its handles.
pub(super) fn spawn(start: Start) {
    tokio::spawn(async move {
        let (internal, inbox) = mpsc::channel(INTERNAL_QUEUE);
        let mut side_tasks = JoinSet::new();
        for (link, listener) in (0_u8..).zip(start.listeners) {
            side_tasks.spawn(accept_loop(
                Arc::clone(&start.shared),
                link,
                listener,
                internal.clone(),
            ));
        }
        for (link, socket) in (0_u8..).zip(start.receivers) {
            side_tasks.spawn(datagram_loop(
                Arc::clone(&start.shared),
                link,
                socket,
                start.events.clone(),
            ));
        }
        let links = start.shared.ports.len();
        let manager = Manager {
            shared: start.shared,
            events: start.events,
            internal,
            side_tasks,
            attempts: vec![false; links],
            stream: None,
            generation: 0,
            none_since: Instant::now(),
            leaving: false,
            dead_after: start.dead_after,
            retry: start.retry,
        };
        manager.run(start.asked, inbox).await;
    });
}

struct Active {
    generation: u64,
    link: u8,
    /// Index of the instance that began it.
    initiator: u8,
    up: bool,
    since: Instant,
    outbox: Arc<Outbox>,
    /// Sealers for datagrams, put to use when the stream is up.
    keys: Keys,
    _tasks: JoinSet<()>,
}

struct Manager {
    shared: Arc<Shared>,
    events: mpsc::Sender<LinkEvent>,
    internal: mpsc::Sender<Internal>,
    side_tasks: JoinSet<()>,
    /// Per link: an attempt to connect is under way.
    attempts: Vec<bool>,
    stream: Option<Active>,
    generation: u64,
    none_since: Instant,
    /// We said goodbye: no new stream.
    leaving: bool,
    dead_after: Duration,
    retry: Duration,
}

/// The control loop dropped its receiver: there is nobody to work for.
struct Gone;

impl Manager {
    async fn run(
        mut self,
        mut asked: mpsc::UnboundedReceiver<Command>,
        mut inbox: mpsc::Receiver<Internal>,
    ) {
        let mut retry = interval(self.retry);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watch_every = (self.dead_after / 4).max(Duration::from_millis(1));
        let mut watch = interval(watch_every);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_watch = Instant::now();
        let mut amnesty = Instant::now();
        loop {
            let outcome = tokio::select! {
                biased;
                Some(internal) = inbox.recv() => self.handle(internal).await,
                command = asked.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                _ = watch.tick() => {
                    // Who was not running (SIGSTOP, a starved core) heard nothing meanwhile.
                    let now = Instant::now();
                    if now > last_watch + watch_every * 2 {
                        amnesty = now + self.dead_after;
                    }
                    last_watch = now;
                    if now >= amnesty { self.drop_if_silent(now).await } else { Ok(()) }
                }
                _ = retry.tick() => {
                    self.connect();
                    Ok(())
                }
            };
            while self.side_tasks.try_join_next().is_some() {}
            if outcome.is_err() {
                return;
            }
        }
    }

    async fn tell(&self, event: LinkEvent) -> Result<(), Gone> {
        self.events.send(event).await.map_err(|_| Gone)
    }

    async fn handle(&mut self, internal: Internal) -> Result<(), Gone> {
        match internal {
            Internal::AttemptOver { link } => {
                if let Some(attempt) = self.attempts.get_mut(usize::from(link)) {
                    *attempt = false;
                }
                Ok(())
            }
            Internal::Connected { link, stream, session } => {
                // The first link that works is taken, the others' connections are dropped here
                // before the other side has counted them.
                if self.stream.is_none() && !self.leaving {
                    self.adopt(link, self.shared.index, stream, session, 0);
                }
                Ok(())
            }
            Internal::Accepted { link, stream, session, keys } => {
                let initiator = 1 - self.shared.index.min(1);
                let better =
                    self.stream.as_ref().is_none_or(|active| initiator <= active.initiator);
                if !better || self.leaving {
                    return Ok(());
                }
                self.end(StreamEnd::Replaced).await?;
                // Its keys were record 0.
                self.adopt(link, initiator, stream, session, 1);
                self.come_up(&keys).await
            }
            Internal::PeerKeys { generation, keys } => match &self.stream {
                Some(active) if active.generation == generation && !active.up => {
                    self.come_up(&keys).await
                }
                _ => Ok(()),
            },
            Internal::Frame { generation, bytes } => match &self.stream {
                Some(active) if active.generation == generation && active.up => {
                    self.tell(LinkEvent::Frame(bytes)).await
                }
                _ => Ok(()),
            },
            Internal::Ended { generation, end } => {
                if self.stream.as_ref().is_none_or(|active| active.generation != generation) {
                    return Ok(());
                }
                if end == End::Broken {
                    Counters::add(&self.shared.counters.broken_streams);
                }
                self.end(match end {
                    End::Goodbye => StreamEnd::Goodbye,
                    End::Closed => StreamEnd::Closed,
                    End::Broken | End::Overflow => StreamEnd::Local,
                })
                .await
            }
        }
    }

    /// Makes a connection the stream, sends our keys on it and starts its tasks.
    fn adopt(
        &mut self,
        link: u8,
        initiator: u8,
        stream: TcpStream,
        session: Session,
        first_number: u64,
    ) {
        self.generation += 1;
        let keys = Keys::random(&mut rand_core::OsRng);
        let outbox = Arc::new(Outbox::new(Arc::new(session)));
        outbox.push(Kind::Keys, &keys.encode());
        let mut tasks = JoinSet::new();
        let internal = self.internal.clone();
        stream::run(
            &mut tasks,
            stream,
            Arc::clone(&outbox),
            first_number,
            self.generation,
            internal,
        );
        self.stream = Some(Active {
            generation: self.generation,
            link,
            initiator,
            up: false,
            since: Instant::now(),
            outbox,
            keys,
            _tasks: tasks,
        });
    }

    /// Both sides have both sets of keys.
    async fn come_up(&mut self, peer: &Keys) -> Result<(), Gone> {
        let Some(active) = &mut self.stream else { return Ok(()) };
        active.up = true;
        active.since = Instant::now();
        let link = active.link;
        {
            let mut rx = self.shared.rx();
            rx.heartbeat = peer.opener(Purpose::Heartbeat);
        }
        self.shared.steer_in.put(peer.opener(Purpose::Steer));
        {
            let mut tx = self.shared.tx();
            tx.heartbeat = active.keys.sealer(Purpose::Heartbeat);
            tx.steer = active.keys.sealer(Purpose::Steer).map(Arc::new);
            tx.stream = Some((link, Arc::clone(&active.outbox)));
        }
        Counters::add(&self.shared.counters.streams);
        tracing::debug!(link, initiator = active.initiator, "pair stream up");
        self.tell(LinkEvent::StreamUp { link }).await
    }

    /// Drops the stream, if any. The datagram keys stay in use until the next one: a death is
    /// proven only if no authentic heartbeat follows.
    async fn end(&mut self, end: StreamEnd) -> Result<(), Gone> {
        let Some(active) = self.stream.take() else { return Ok(()) };
        self.shared.tx().stream = None;
        self.none_since = Instant::now();
        if !active.up {
            return Ok(());
        }
        tracing::debug!(link = active.link, ?end, "pair stream down");
        self.tell(LinkEvent::StreamDown { link: active.link, end }).await
    }

    async fn drop_if_silent(&mut self, now: Instant) -> Result<(), Gone> {
        let Some(active) = &self.stream else { return Ok(()) };
        let heard = self.shared.rx().heard.get(usize::from(active.link)).copied().flatten();
        // A stream that never came up gets the time of a handshake.
        let patience =
            if active.up { self.dead_after } else { self.dead_after.max(Duration::from_secs(1)) };
        let last = heard.map_or(active.since, |heard| heard.max(active.since));
        if now < last + patience {
            return Ok(());
        }
        self.end(StreamEnd::Silent).await
    }

    fn connect(&mut self) {
        let lower = self.shared.index == 0;
        if self.stream.is_some()
            || self.leaving
            || (!lower && self.none_since.elapsed() < self.retry * 5)
        {
            return;
        }
        for (link, attempt) in (0_u8..).zip(&mut self.attempts) {
            if std::mem::replace(attempt, true) {
                continue;
            }
            let (shared, internal) = (Arc::clone(&self.shared), self.internal.clone());
            self.side_tasks.spawn(async move {
                let connected = stream::initiate(&shared, link).await;
                let _ = internal.send(Internal::AttemptOver { link }).await;
                if let Some((stream, session)) = connected {
                    let _ = internal.send(Internal::Connected { link, stream, session }).await;
                }
            });
        }
    }

    async fn obey(&mut self, command: Command) -> Result<(), Gone> {
        match command {
            Command::Probe { link } => {
                let (shared, events) = (Arc::clone(&self.shared), self.events.clone());
                self.side_tasks.spawn(async move {
                    let result = match shared.port(link) {
                        Some(port) => probe::probe(port.local, port.remote).await,
                        None => super::ProbeResult::Unknown,
                    };
                    let _ = events.send(LinkEvent::ProbeResult { link, result }).await;
                });
                Ok(())
            }
            Command::Close { goodbye, done } => {
                self.leaving |= goodbye;
                if goodbye && let Some(active) = &self.stream {
                    let (sent, on_its_way) = oneshot::channel();
                    active.outbox.goodbye(sent);
                    let _ = timeout(GOODBYE_TIME, on_its_way).await;
                }
                let _ = done.send(());
                self.end(StreamEnd::Local).await
            }
        }
    }
}

async fn accept_loop(
    shared: Arc<Shared>,
    link: u8,
    listener: TcpListener,
    internal: mpsc::Sender<Internal>,
) {
    let under_way = Arc::new(Semaphore::new(stream::HANDSHAKES_MAX));
    let Some(remote) = shared.port(link).map(|port| port.remote.ip()) else { return };
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        let accepted = accepted.and_then(|(stream, from)| Ok((stream::sudden(stream)?, from)));
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory: that passes or shows elsewhere.
                tracing::debug!(%error, "accept on the pair port");
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        while handshakes.try_join_next().is_some() {}
        let from: IpAddr = from.ip();
        if from != remote {
            Counters::add(&shared.counters.strangers);
            continue;
        }
        let Ok(permit) = Arc::clone(&under_way).try_acquire_owned() else {
            Counters::add(&shared.counters.broken_handshakes);
            continue;
        };
        let (shared, internal) = (Arc::clone(&shared), internal.clone());
        handshakes.spawn(async move {
            if let Some((stream, session, keys)) = stream::accept(&shared, stream, from).await {
                let _ = internal.send(Internal::Accepted { link, stream, session, keys }).await;
            }
            drop(permit);
        });
    }
}

async fn datagram_loop(
    shared: Arc<Shared>,
    link: u8,
    socket: UdpSocket,
    events: mpsc::Sender<LinkEvent>,
) {
    let Some(remote) = shared.port(link).map(|port| port.remote) else { return };
    let mut buffer = vec![0; 1 << 16];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(got) => got,
            Err(error) => {
                tracing::debug!(%error, link, "receive on a pair link");
                sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        if from != remote {
            Counters::add(&shared.counters.strangers);
            continue;
        }
        let Some(datagram) = buffer.get_mut(..length) else { continue };
        match open(&shared, link, datagram) {
            Ok(event) => {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            Err(refused) => shared.counters.refuse(refused),
        }
    }
}

/// Opens a datagram that came by a link.
pub(super) fn open(shared: &Shared, link: u8, datagram: &mut [u8]) -> Result<LinkEvent, Refused> {
    match datagram::purpose_of(datagram)? {
        Purpose::Heartbeat => {
            let rx = &mut *shared.rx();
            let bytes =
                rx.heartbeat.as_mut().ok_or(Refused::OtherKey)?.open(link, datagram)?.to_vec();
            if let Some(heard) = rx.heard.get_mut(usize::from(link)) {
                *heard = Some(Instant::now());
            }
            Counters::add(&shared.counters.heartbeats);
            Ok(LinkEvent::Heartbeat { link, bytes })
        }
        // Its replay window is the worker's.
        Purpose::Steer => Ok(LinkEvent::Steered { link, datagram: datagram.to_vec() }),
    }
}

//! The pair link's transport: an authenticated stream, heartbeats on every link, steered packets,
//! and the probe that proves a death (ha.md, "Pair link" and "Detecting death").
//!
//! What runs where: everything but [`SteerSender`] and [`SteerPort`], which are a worker's, lives on the control thread's
//! runtime. Sending seals at once on the caller's stack, so that order is the order of calls; tasks only wait.
//!
//! ```text
//!  LinkHandle ──seal──► outbox ──► writer task ──► TCP ─┐
//!      │                                                │ one stream, on the first link that works
//!      └──seal──► UDP socket of each link               │
//!  LinkEvent ◄── manager ◄── reader task ◄── TCP ───────┘
//!      ▲             ▲  └── connects (lower index), settles duplicates, drops silent streams
//!      └── UDP task of each link (heartbeats)       SteerPort: steered packets, in the worker
//! ```
//! Nothing is parsed before it is authenticated; what is not is counted in [`Counters`].

mod counters;
mod datagram;
mod frame;
mod manager;
mod noise;
mod probe;
mod steer;
mod steering;
mod stream;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use zeroize::Zeroizing;

pub use counters::{Counters, Snapshot};
pub use steer::{
    STEER_HEADROOM, STEER_OVERHEAD, STEER_TAILROOM, SteerHead, SteerKind, SteerSender,
};
pub use steering::{Arrival, SteerPort};

use datagram::{OVERHEAD, Opener, Purpose, Sealer};
use netio::udp::{Options, SharedPort};
use steering::{Handover, SteerSocket};
use stream::Outbox;

/// One path between the hosts; the TCP listener and the UDP socket share the address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkPath {
    /// Ours, present on this host.
    pub local: SocketAddr,
    /// The other instance's.
    pub remote: SocketAddr,
}

/// What the link is told at its start.
pub struct LinkConfig {
    /// This instance's index, 0 or 1: the lower connects.
    pub index: u8,
    /// The bytes of the pair's secret file.
    pub secret: Zeroizing<Vec<u8>>,
    /// The links, in the same order on both instances.
    pub links: Vec<LinkPath>,
    /// A stream whose link carried no heartbeat for this long is dropped.
    pub dead_after: Duration,
    /// How often connecting is tried on all links (200 ms).
    pub retry: Duration,
}

impl std::fmt::Debug for LinkConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LinkConfig(index {}, {:?}, …)", self.index, self.links)
    }
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The other said goodbye.
    Goodbye,
    /// The other's kernel ended it: closed or reset.
    Closed,
    /// Its link carried no heartbeat for `dead_after`.
    Silent,
    /// The other opened a new one.
    Replaced,
    /// We closed it: [`LinkHandle::close_stream`], or what came was no protocol, or the other
    /// took nothing off it.
    Local,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The other's kernel refused: nobody listens on the pair port.
    Refused,
    /// Somebody listens.
    Accepted,
    /// Nothing came back, or the network is unreachable: nothing is known.
    Unknown,
}

/// What the link tells the control loop.
#[derive(PartialEq, Eq)]
pub enum LinkEvent {
    /// A stream stands; datagrams are sealed under its keys from now on.
    StreamUp {
        /// The link it runs on.
        link: u8,
    },
    /// The stream is over.
    StreamDown {
        /// The link it ran on.
        link: u8,
        /// How.
        end: StreamEnd,
    },
    /// An authenticated frame, in order.
    Frame(Zeroizing<Vec<u8>>),
    /// An authenticated heartbeat, not seen before.
    Heartbeat {
        /// The link it came by.
        link: u8,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The answer to [`LinkHandle::probe`].
    ProbeResult {
        /// The link asked for.
        link: u8,
        /// What was found.
        result: ProbeResult,
    },
    /// A datagram for the worker's [`SteerPort::open`] came to control's socket. Not authenticated yet.
    Steered {
        /// The link it came by.
        link: u8,
        /// The datagram.
        datagram: Vec<u8>,
    },
}

impl std::fmt::Debug for LinkEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::StreamUp { link } => write!(f, "StreamUp(link {link})"),
            Self::StreamDown { link, end } => write!(f, "StreamDown(link {link}, {end:?})"),
            Self::Frame(bytes) => write!(f, "Frame({} B)", bytes.len()),
            Self::Heartbeat { link, bytes } => {
                write!(f, "Heartbeat(link {link}, {} B)", bytes.len())
            }
            Self::ProbeResult { link, result } => write!(f, "ProbeResult(link {link}, {result:?})"),
            Self::Steered { link, datagram } => {
                write!(f, "Steered(link {link}, {} B)", datagram.len())
            }
        }
    }
}

/// Why the link could not start.
#[derive(Debug, thiserror::Error)]
#[error("pair link {link}: cannot open {what} {address}: {source}; {hint}")]
pub struct LinkError {
    /// Which link.
    pub link: u8,
    /// "TCP" or "UDP".
    pub what: &'static str,
    /// The configured address.
    pub address: SocketAddr,
    /// What the kernel said.
    pub source: io::Error,
    /// What to do about it.
    pub hint: &'static str,
}

/// Events wait here when the control loop is busy; then the sockets' buffers fill.
const EVENT_QUEUE: usize = 4096;

/// Buffers of control's UDP socket of a link.
const HEARTBEAT_BUFFER: usize = 1 << 20;

/// Heartbeats are network control, and say so: DSCP CS6 (RFC 4594 §3.1). It also keeps a network card from joining them with
/// steered packets.
const HEARTBEAT_CLASS: u32 = 48 << 2;

/// A link, started.
#[derive(Debug)]
pub struct Started {
    /// Control's end.
    pub handle: LinkHandle,
    /// What control is told.
    pub events: mpsc::Receiver<LinkEvent>,
    /// The worker's end.
    pub steering: SteerPort,
}

/// The pair link.
#[derive(Debug)]
pub struct Link;

impl Link {
    /// Opens all sockets and starts the tasks on the current runtime. They end when the handle
    /// and the receiver are dropped. Errors name the link, the address and what to do.
    pub fn start(config: LinkConfig) -> Result<Started, LinkError> {
        let mut ports = Vec::new();
        let mut steering = Vec::new();
        let mut listeners = Vec::new();
        let mut receivers = Vec::new();
        for (link, path) in config.links.iter().enumerate() {
            let link = u8::try_from(link).unwrap_or(u8::MAX);
            let failed = |what| {
                move |source: io::Error| LinkError {
                    link,
                    what,
                    address: path.local,
                    hint: hint(&source),
                    source,
                }
            };
            listeners.push(stream::listen(path.local).map_err(failed("TCP"))?);
            let (sender, receiver, socket) = open_udp(path.local).map_err(failed("UDP"))?;
            steering.push(SteerSocket { remote: path.remote, socket });
            ports.push(Port { remote: path.remote, local: path.local, udp: sender });
            receivers.push(receiver);
        }
        let heard = vec![None; ports.len()];
        let shared = Arc::new(Shared {
            ports,
            psk: noise::derive_psk(&config.secret),
            index: config.index,
            tx: Mutex::new(Tx::default()),
            rx: Mutex::new(Rx { heartbeat: None, heard }),
            steer_in: Handover::default(),
            counters: Counters::default(),
        });
        let steering = SteerPort::new(steering, Arc::clone(&shared));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let (commands, asked) = mpsc::unbounded_channel();
        manager::spawn(manager::Start {
            shared: Arc::clone(&shared),
            events,
            asked,
            listeners,
            receivers,
            dead_after: config.dead_after,
            retry: config.retry,
        });
        Ok(Started { handle: LinkHandle { shared, commands }, events: receiver, steering })
    }
}

/// Control's socket to send on, the same to receive on, the worker's.
fn open_udp(
    local: SocketAddr,
) -> io::Result<(std::net::UdpSocket, tokio::net::UdpSocket, netio::udp::BatchSocket)> {
    let steer = Purpose::Steer.byte();
    let port = SharedPort::open(local, steer, HEARTBEAT_BUFFER, Options::default())?;
    if !port.sorted {
        tracing::warn!(%local, "the kernel does not sort the pair link's datagrams (SO_ATTACH_REUSEPORT_CBPF): steering costs more");
    }
    let reference = socket2::SockRef::from(&port.rest);
    let marked = match local {
        SocketAddr::V4(_) => reference.set_tos_v4(HEARTBEAT_CLASS),
        SocketAddr::V6(_) => reference.set_tclass_v6(HEARTBEAT_CLASS),
    };
    if let Err(error) = marked {
        tracing::debug!(%error, %local, "heartbeats go without a DSCP");
    }
    let receiver = tokio::net::UdpSocket::from_std(port.rest.try_clone()?)?;
    Ok((port.rest, receiver, port.chosen))
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "the address is not on this host: is the interface up, and is --instance the right one? (ip -br address)"
        }
        io::ErrorKind::AddrInUse => {
            "another process has the port: is tandemd running already? (ss -lntup)"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one"
        }
        _ => "see the addresses under [instances.…] links",
    }
}

/// One link's addresses and the socket that sends on it.
struct Port {
    local: SocketAddr,
    remote: SocketAddr,
    udp: std::net::UdpSocket,
}

/// What handle and tasks share. The locks are held for a seal or an open, never across an await.
struct Shared {
    ports: Vec<Port>,
    psk: Zeroizing<[u8; 32]>,
    index: u8,
    tx: Mutex<Tx>,
    rx: Mutex<Rx>,
    /// What opens steered packets, for the worker.
    steer_in: Handover,
    counters: Counters,
}

#[derive(Default)]
struct Tx {
    heartbeat: Option<Sealer>,
    steer: Option<Arc<Sealer>>,
    /// The stream that frames go to, with its link.
    stream: Option<(u8, Arc<Outbox>)>,
    /// Reused for each heartbeat.
    scratch: Vec<u8>,
}

struct Rx {
    heartbeat: Option<Opener>,
    /// When each link last carried an authentic heartbeat.
    heard: Vec<Option<Instant>>,
}

impl Shared {
    fn port(&self, link: u8) -> Option<&Port> {
        self.ports.get(usize::from(link))
    }

    fn tx(&self) -> MutexGuard<'_, Tx> {
        lock(&self.tx)
    }

    fn rx(&self) -> MutexGuard<'_, Rx> {
        lock(&self.rx)
    }
}

/// A holder that panicked has ended the process or its test; the data is whole either way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the manager is asked for.
enum Command {
    Probe { link: u8 },
    Close { goodbye: bool, done: oneshot::Sender<()> },
}

/// The control loop's end of the link. Nothing here waits.
#[derive(Clone)]
pub struct LinkHandle {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
}

impl std::fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LinkHandle({} links)", self.shared.ports.len())
    }
}

impl LinkHandle {
    /// Sends a frame on the stream, in order. False when there is none, or the frame is above
    /// `ha::config::FRAME_MAX` bytes.
    pub fn send_frame(&self, frame: &[u8]) -> bool {
        if frame.len() > frame::FRAME_MAX {
            return false;
        }
        match &self.shared.tx().stream {
            Some((_, outbox)) => outbox.push_frame(frame),
            None => false,
        }
    }

    /// Sends a heartbeat on one link. False when there are no keys yet, no such link, or the
    /// kernel would not take it.
    pub fn send_heartbeat(&self, link: u8, bytes: &[u8]) -> bool {
        let Some(port) = self.shared.port(link) else { return false };
        let tx = &mut *self.shared.tx();
        let Some(sealer) = &tx.heartbeat else { return false };
        tx.scratch.clear();
        tx.scratch.resize(datagram::HEADER, 0);
        tx.scratch.extend_from_slice(bytes);
        tx.scratch.resize(bytes.len() + OVERHEAD, 0);
        sealer.seal(link, &mut tx.scratch).is_some()
            && port.udp.send_to(&tx.scratch, port.remote).is_ok()
    }

    /// Tries a TCP connection to the other's pair port on a link;
    /// [`LinkEvent::ProbeResult`] follows: `Refused` as soon as that is certain, the other two
    /// within [`PROBE_TIME`].
    pub fn probe(&self, link: u8) {
        // The manager lives as long as a handle does.
        let _ = self.commands.send(Command::Probe { link });
    }

    /// Hands one packet over; for few packets, workers have a [`SteerSender`] and a [`SteerPort`].
    pub fn send_steer(&self, head: &SteerHead, packet: &[u8]) -> bool {
        let sealed = self.steer_sender().and_then(|sender| {
            Some((self.shared.port(sender.link)?, sender.seal_copy(head, packet)?))
        });
        sealed.is_some_and(|(port, bytes)| port.udp.send_to(&bytes, port.remote).is_ok())
    }

    /// Opens a datagram of control's that had come to the worker's socket of a link: [`Arrival::Stray`].
    #[must_use]
    pub fn take_stray(&self, link: u8, datagram: &mut [u8]) -> Option<LinkEvent> {
        match manager::open(&self.shared, link, datagram) {
            Ok(event) => Some(event),
            Err(refused) => {
                self.shared.counters.refuse(refused);
                None
            }
        }
    }

    /// A sender of steered packets under the newest keys, on the link that carried a heartbeat
    /// last. `None` before the first stream.
    #[must_use]
    pub fn steer_sender(&self) -> Option<SteerSender> {
        let heard = self.shared.rx().heard.clone();
        let newest = heard
            .iter()
            .enumerate()
            .filter_map(|(i, at)| Some(((*at)?, i)))
            .max_by_key(|(at, _)| *at);
        let tx = self.shared.tx();
        let link = match (newest, &tx.stream) {
            (Some((_, link)), _) => u8::try_from(link).ok()?,
            (None, Some((link, _))) => *link,
            (None, None) => return None,
        };
        Some(SteerSender { sealer: Arc::clone(tx.steer.as_ref()?), link })
    }

    /// Closes the stream; with `goodbye` says so to the other and opens no other one. The
    /// receiver resolves when the bytes are with the kernel (at most 200 ms).
    pub fn close_stream(&self, goodbye: bool) -> oneshot::Receiver<()> {
        let (done, closed) = oneshot::channel();
        let _ = self.commands.send(Command::Close { goodbye, done });
        closed
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> Snapshot {
        self.shared.counters.snapshot()
    }
}

/// The longest that a probe takes.
pub const PROBE_TIME: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;

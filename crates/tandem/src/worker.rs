//! A worker: one thread that carries packets between the TUN, the endpoints' sockets and the pair
//! link. All decisions are `esp::Shard`'s; this room only reads a batch, asks, and writes.
//!
//! ```text
//!   TUN ──read──► split ──► batch ──► shard.outbound ──► sendmmsg ──► UDP 4500 or protocol 50 of the endpoint
//!   UDP 4500 ──recvmmsg──► classify ─┬─ ESP ──► shard.inbound ──► TUN
//!                                    ├─ IKE ──► queue to control (bounded, dropped when full)
//!                                    └─ keepalive ──► dropped
//!   protocol 50 ──recvmmsg──► shard.inbound ──► TUN
//!   verdict Steer ──seal──► sendmmsg ──► pair link
//!   pair link ──recvmmsg──► open ─┬─ packet ──► shard
//!                                 └─ IKE ──► queue to control
//!   control ──commands──► before each batch      reports ──► control
//! ```
//! There is no lock and no allocation on the way of a packet. The fences are read when a batch is
//! judged and again right before it is written: what became invalid in between is dropped and
//! counted as late.

mod counters;
mod outlet;
mod run;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use netio::esp::EspSocket;
use netio::tun::Tun;
use netio::udp::{BatchSocket, Options, SOCKET_BUFFER};
use netio::wake::{EventFd, QueueClosed, QueueSender, queue};
use wire::id::EndpointId;

use crate::link::{SteerHead, SteerPort, SteerSender};

pub use counters::{Counters, Snapshot};

/// Packets in one batch: what one recvmmsg takes, and more than one read of the TUN gives at an Ethernet's MTU.
pub const BATCH: usize = netio::udp::BATCH;

/// How to open a port-4500 socket: with the outer TOS byte, which RFC 6040 needs.
pub const SOCKET_OPTIONS: Options =
    Options { recv_tos: true, buffer_bytes: SOCKET_BUFFER, shared: false };

/// IKE messages that may wait for the control loop; more are dropped.
const IKE_QUEUE: usize = 512;

/// IKE messages longer than a usual slot that may wait: they are held whole, and anybody can send them.
const LONG_IKE_QUEUE: usize = 16;

/// Whether an IKE message is longer than a slot of the usual size.
fn is_long(message: &[u8]) -> bool {
    message.len() + wire::natt::NON_ESP_MARKER.len() > esp::SLOT_LEN - esp::HEADROOM - esp::TAILROOM
}

/// Reports that may wait for the control loop; the shard keeps the rest.
const REPORT_QUEUE: usize = 1024;

/// Commands that wait without the sender keeping any back. More steered datagrams are dropped, never a command.
const COMMAND_QUEUE: usize = 4096;

/// The sockets of one endpoint, bound to its WAN address.
#[derive(Debug)]
pub struct EndpointSocket {
    /// Whose.
    pub endpoint: EndpointId,
    /// Port 4500, opened with [`SOCKET_OPTIONS`].
    pub socket: BatchSocket,
    /// Protocol 50, where a connection may use it: RFC 7296 §2.23 lets a peer send either way.
    pub raw: Option<EspSocket>,
}

/// What a worker is made of.
#[derive(Debug)]
pub struct Start {
    /// The TUN; the worker reads it alone.
    pub tun: Arc<Tun>,
    /// One for each endpoint.
    pub sockets: Vec<EndpointSocket>,
    /// Until when each endpoint may send, in nanoseconds of CLOCK_BOOTTIME; written by control.
    pub fences: Arc<[AtomicU64]>,
    /// Endpoints in the configuration.
    pub endpoints: usize,
    /// The TUN's MTU, which its slots must hold ([`esp::slot_len`]): at 9,000 bytes, 19 MB an endpoint for what waits out
    /// a switchover, at an Ethernet's 4.
    pub mtu: usize,
    /// The pair link, if there is one.
    pub steering: Option<SteerPort>,
}

/// What control tells a worker. Order is kept, nothing is dropped.
#[derive(Debug)]
pub enum WorkerCommand {
    /// For the shard.
    Shard(esp::Command),
    /// A datagram for [`SteerPort::open`] that came to control's socket.
    Steered {
        /// The link it came by.
        link: u8,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// Hand packets over by this sender from now on.
    Steering(SteerSender),
    /// End the thread.
    Stop,
}

/// What a worker tells control.
#[expect(clippy::large_enum_variant, reason = "a box would be an allocation on the way of packets")]
#[derive(Debug)]
pub enum WorkerEvent {
    /// From the shard.
    Report(esp::Report),
    /// ESP packets that came for this endpoint were handed to the other instance; at most every 100 ms.
    Steered(EndpointId),
    /// An IKE message that arrived on port 4500, without the non-ESP marker.
    Ike {
        /// The endpoint whose socket it came by.
        endpoint: EndpointId,
        /// The peer.
        from: SocketAddr,
        /// The message.
        bytes: Vec<u8>,
    },
    /// An IKE message that the other instance handed over.
    SteeredIke {
        /// Whose it is and where it came from.
        head: SteerHead,
        /// The message.
        bytes: Vec<u8>,
    },
    /// A datagram of the pair link that is not for a worker, as it came.
    Stray {
        /// The link it came by.
        link: u8,
        /// The datagram.
        datagram: Vec<u8>,
    },
}

/// Control's end of a worker. Dropping it ends the thread.
#[derive(Debug)]
pub struct WorkerHandle {
    commands: QueueSender<WorkerCommand>,
    reports: Receiver<WorkerEvent>,
    ike: Receiver<WorkerEvent>,
    event: EventFd,
    /// Long IKE messages in the queue.
    long_ike: Arc<AtomicUsize>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread. All memory for packets is allocated here.
pub fn spawn(start: Start) -> io::Result<WorkerHandle> {
    let (commands, asked) = queue(COMMAND_QUEUE)?;
    let (ike_out, ike) = sync_channel(IKE_QUEUE);
    let (reports_out, reports) = sync_channel(REPORT_QUEUE);
    let event = EventFd::new()?;
    let long_ike = Arc::new(AtomicUsize::new(0));
    let outlet = outlet::Outlet::new(reports_out, ike_out, event.clone(), Arc::clone(&long_ike));
    let counters = Arc::new(Counters::default());
    let mut state = run::State::new(start, asked, outlet, Arc::clone(&counters))?;
    let (begun, wait) = sync_channel(1);
    let thread = std::thread::Builder::new().name("worker-0".to_owned()).spawn(move || {
        // A worker that panicked would leave the endpoint owned and silent: the process must
        // die, so that the other instance takes over.
        let _guard = AbortOnPanic;
        // All its descriptors exist by now.
        if let Err(error) = crate::daemon::apart() {
            tracing::error!(%error, "the worker is not apart: a death of this instance may be noticed late");
        }
        let _ = begun.send(());
        if let Err(error) = state.run() {
            tracing::error!(%error, "the worker cannot go on");
        }
    })?;
    // Nothing is opened until it has a table of its own. It cannot end before it said so.
    let _ = wait.recv();
    Ok(WorkerHandle { commands, reports, ike, event, long_ike, counters, thread: Some(thread) })
}

impl WorkerHandle {
    /// Queues a command. A steered datagram is dropped and counted while the queue is full: packets may be lost, memory
    /// may not grow by them. Errors: the worker has ended.
    pub fn send(&mut self, command: WorkerCommand) -> Result<(), QueueClosed> {
        if matches!(command, WorkerCommand::Steered { .. }) && self.commands.backlog() > 0 {
            counters::add(&self.counters.steer_refused, 1);
            return self.commands.flush();
        }
        self.commands.send(command)
    }

    /// Passes on commands kept back while the worker was slow; call it once per turn.
    pub fn flush(&mut self) -> Result<(), QueueClosed> {
        self.commands.flush()
    }

    /// Set whenever [`WorkerHandle::poll`] has something; clear it before polling until `None`.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The next event, reports before IKE messages. Errors: the worker has ended, which is fatal.
    pub fn poll(&mut self) -> Result<Option<WorkerEvent>, QueueClosed> {
        for queue in [&self.reports, &self.ike] {
            match queue.try_recv() {
                Ok(event) => {
                    if let WorkerEvent::Ike { bytes, .. } | WorkerEvent::SteeredIke { bytes, .. } =
                        &event
                        && is_long(bytes)
                    {
                        self.long_ike.fetch_sub(1, Ordering::AcqRel);
                    }
                    return Ok(Some(event));
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(QueueClosed),
            }
        }
        Ok(None)
    }

    /// What the worker counted so far. The shard's own counters come by `esp::Command::Query`.
    #[must_use]
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        let _ = self.commands.send(WorkerCommand::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

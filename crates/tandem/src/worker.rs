//! Workers: threads that carry packets between the TUN, the endpoints' sockets and the pair
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
//!   verdict Hand ──ring──► another worker ──► its shard ──► as above
//!   control ──commands──► before each batch      reports ──► control
//! ```
//! With `workers = N` each has a queue of the TUN, a socket of each port 4500 and of protocol 50, and the SAs whose SPI
//! names it. The kernel gives it their packets (`netio::udp::Group`, `netio::esp`, `netio::tun`); what comes elsewhere
//! all the same goes through the ring. The first worker has the pair link.
//!
//! There is no lock and no allocation on the way of a packet. The fences are read when a batch is
//! judged and again right before it is written: what became invalid in between is dropped and
//! counted as late.

mod counters;
mod outlet;
mod ring;
mod run;
#[cfg(test)]
pub(crate) mod tests;
mod workers;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::mpsc::sync_channel;

use netio::esp::EspSocket;
use netio::tun::Tun;
use netio::udp::{BatchSocket, Options, SOCKET_BUFFER};
use netio::wake::{EventFd, queue};
use wire::id::EndpointId;

use crate::link::{SteerHead, SteerPort, SteerSender};

use workers::Handle;

pub use counters::{Counters, Snapshot};
pub use workers::Workers;

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

/// What is one worker's.
#[derive(Debug)]
pub struct Share {
    /// Its queue of the TUN.
    pub tun: Arc<Tun>,
    /// Whether it reads it: where there is one queue, one worker reads it, and all write to it.
    pub reads_tun: bool,
    /// One for each endpoint.
    pub sockets: Vec<EndpointSocket>,
}

/// What the workers are made of.
#[derive(Debug)]
pub struct Start {
    /// One for each worker, at least one.
    pub shares: Vec<Share>,
    /// Until when each endpoint may send, in nanoseconds of CLOCK_BOOTTIME; written by control.
    pub fences: Arc<[AtomicU64]>,
    /// Endpoints in the configuration.
    pub endpoints: usize,
    /// The TUN's MTU, which its slots must hold ([`esp::slot_len`]): at 9,000 bytes, 19 MB a worker and endpoint for
    /// what waits out a switchover, at an Ethernet's 4.
    pub mtu: usize,
    /// The pair link, if there is one: the first worker's.
    pub steering: Option<SteerPort>,
}

/// What control tells the workers. Order is kept, nothing is dropped.
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

/// Starts the threads. All memory for packets is allocated here.
pub fn spawn(start: Start) -> io::Result<Workers> {
    let Start { shares, fences, endpoints, mtu, steering } = start;
    let workers = u8::try_from(shares.len()).map_err(io::Error::other)?;
    let event = EventFd::new()?;
    let mut rings = match shares.len() {
        0 | 1 => Vec::new(),
        many => ring::Ring::new(many, esp::slot_len(mtu))?,
    };
    rings.reverse();
    let mut steering = steering;
    let mut states = Vec::new();
    let mut handles = Vec::new();
    for (worker, share) in (0..workers).zip(shares) {
        let (commands, asked) = queue(COMMAND_QUEUE)?;
        let (ike_out, ike) = sync_channel(IKE_QUEUE);
        let (reports_out, reports) = sync_channel(REPORT_QUEUE);
        let long_ike = Arc::new(AtomicUsize::new(0));
        let counters = Arc::new(Counters::default());
        states.push(run::State::new(run::Parts {
            worker: (worker, workers),
            share,
            fences: Arc::clone(&fences),
            endpoints,
            mtu,
            // The first one steers for all.
            steering: steering.take(),
            ring: rings.pop(),
            commands: asked,
            outlet: outlet::Outlet::new(reports_out, ike_out, event.clone(), Arc::clone(&long_ike)),
            counters: Arc::clone(&counters),
        })?);
        handles.push(Handle { commands, reports, ike, long_ike, counters, thread: None });
    }
    // All their descriptors exist by now: see `daemon::apart`. Numbers are given from below, and those from HIGH on are
    // not in a worker's table.
    if EventFd::new()?.as_fd().as_raw_fd() >= netio::descriptor::HIGH {
        return Err(io::Error::other(
            "so many workers at so many endpoints need too many descriptors",
        ));
    }
    for ((worker, mut state), handle) in states.into_iter().enumerate().zip(&mut handles) {
        let (begun, wait) = sync_channel(1);
        let name = format!("worker-{worker}");
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            // A worker that panicked would leave the endpoint owned and silent: the process must
            // die, so that the other instance takes over.
            let _guard = AbortOnPanic;
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
        handle.thread = Some(thread);
    }
    Ok(Workers::new(handles, event))
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

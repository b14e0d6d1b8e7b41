//! What runs in the hosts: a sender of numbered UDP packets to many addresses, a receiver of all of them.
//!
//! Both read orders ([`Order`], one JSON line each) from standard input and answer each with a line. Packets are 64 bytes
//! long with their IP header and leave by sendmmsg, each as a packet of its own.
//!
//! * `stream`: as many packets as the path carries. No more than [`WINDOW`] are on the way: the receiver says through a
//!   UNIX socket (the hosts share a file system) how many came, so that the path is full and yet drops nothing.
//! * `pace`: a packet to each flow at a steady rate, until the next order. The receiver keeps each flow's longest silence.

use lab::clock;
use lab::error::IoContext;
use lab::{Error, Result};
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt::RcvBufForce,
};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, IoSlice, IoSliceMut, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Packets of a stream that are on the way at once: more than any batch, less than any queue.
const WINDOW: u64 = 1024;
/// One sendmmsg.
const BATCH: usize = 64;
/// Payload of a packet of 64 bytes.
const PAYLOAD: usize = 64 - 28;
const PORT: u16 = 7100;
/// After so long without news, what is on the way is lost.
const GIVE_UP: Duration = Duration::from_millis(100);
/// Of a stream, this share at its beginning is not counted.
const WARM: u32 = 5;
/// Received packets may wait: 8 MiB.
const BUFFER: usize = 8 << 20;

#[derive(clap::Args)]
pub(crate) struct SendArgs {
    /// Where the receiver says how many came
    #[arg(long)]
    feedback: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct ReceiveArgs {
    /// Where to say how many came
    #[arg(long)]
    feedback: PathBuf,
}

/// What an agent is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Receiver: packets of this epoch count from now on, in so many flows.
    Epoch { epoch: u32, flows: usize },
    /// Sender: answered by [`Streamed`].
    Stream { epoch: u32, to: Vec<Ipv4Addr>, millis: u64 },
    /// Sender: flows whose index is a multiple of `every` have a packet each `fast_ms`, the others each `slow_ms`.
    Pace { epoch: u32, to: Vec<Ipv4Addr>, every: usize, fast_ms: u64, slow_ms: u64 },
    /// Sender: ends a pace.
    Rest,
    /// Receiver: silences count from now on.
    Mark,
    /// Receiver: answered by [`Silences`].
    Silences,
}

/// What a stream came to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Streamed {
    /// Packets a second that were received.
    pub(crate) rate: f64,
    /// Sent and not received.
    pub(crate) lost: u64,
    /// Sent in all.
    pub(crate) sent: u64,
}

/// Of each flow, since the mark.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Silences {
    /// The longest time between two packets, or since the last, microseconds.
    pub(crate) longest_us: Vec<u64>,
    /// Packets.
    pub(crate) received: Vec<u64>,
}

fn nanos() -> u64 {
    clock::nanos(clock::now())
}

/// Orders as they come; the process ends with its parent.
fn orders() -> Receiver<Order> {
    let (out, orders) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Some(order) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else {
                break;
            };
            if out.send(order).is_err() {
                break;
            }
        }
        std::process::exit(0);
    });
    orders
}

fn answer(value: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string(value).map_err(|e| Error::parse("an answer", e.to_string()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).doing("answer")
}

fn socket() -> Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).doing("open a UDP socket")
}

/// Sends packets by the batch.
struct Sender {
    socket: UdpSocket,
    headers: MultiHeaders<SockaddrIn>,
    packets: Vec<[u8; PAYLOAD]>,
    to: Vec<Option<SockaddrIn>>,
    epoch: u32,
    sent: u64,
}

impl Sender {
    fn new() -> Result<Self> {
        Ok(Self {
            socket: socket()?,
            headers: MultiHeaders::preallocate(BATCH, None),
            packets: Vec::with_capacity(BATCH),
            to: Vec::with_capacity(BATCH),
            epoch: 0,
            sent: 0,
        })
    }

    /// Adds a packet of a flow; a full batch leaves.
    fn add(&mut self, flow: usize, to: Ipv4Addr) {
        let mut packet = [0; PAYLOAD];
        packet[..4].copy_from_slice(&self.epoch.to_be_bytes());
        packet[4..8].copy_from_slice(&(flow as u32).to_be_bytes());
        self.packets.push(packet);
        self.to.push(Some(SocketAddrV4::new(to, PORT).into()));
        if self.packets.len() == BATCH {
            self.flush();
        }
    }

    /// Sends what was added. What the host's own stack refuses (no route, say) was sent and is lost.
    fn flush(&mut self) {
        let slices: Vec<[IoSlice<'_>; 1]> =
            self.packets.iter().map(|packet| [IoSlice::new(packet)]).collect();
        let mut at = 0;
        while at < slices.len() {
            let fd = self.socket.as_raw_fd();
            let flags = MsgFlags::empty();
            let left = (&slices[at..], &self.to[at..]);
            let done = sendmmsg(fd, &mut self.headers, left.0, left.1, [], flags)
                .map_or(1, |sent| sent.count());
            at += done.max(1);
        }
        self.sent += slices.len() as u64;
        drop(slices);
        self.packets.clear();
        self.to.clear();
    }
}

/// The sender.
pub(crate) fn send(args: &SendArgs) -> Result<()> {
    let _ = std::fs::remove_file(&args.feedback);
    let feedback = UnixDatagram::bind(&args.feedback).doing("open a feedback socket")?;
    feedback.set_read_timeout(Some(GIVE_UP)).doing("set a timeout")?;
    let orders = orders();
    let mut sender = Sender::new()?;
    while let Ok(order) = orders.recv() {
        match order {
            Order::Stream { epoch, to, millis } => {
                sender.epoch = epoch;
                let time = Duration::from_millis(millis);
                answer(&stream(&mut sender, &feedback, &to, time)?)?;
            }
            Order::Pace { epoch, to, every, fast_ms, slow_ms } => {
                sender.epoch = epoch;
                pace(&mut sender, &orders, &to, every.max(1), (fast_ms.max(1), slow_ms.max(1)));
                answer(&())?;
            }
            Order::Epoch { .. } | Order::Rest | Order::Mark | Order::Silences => {}
        }
    }
    Ok(())
}

fn stream(
    sender: &mut Sender,
    feedback: &UnixDatagram,
    to: &[Ipv4Addr],
    time: Duration,
) -> Result<Streamed> {
    let began = clock::now();
    let (warm, end) = (began + time / WARM, began + time);
    let first = sender.sent;
    let (mut received, mut lost) = (0_u64, 0_u64);
    let mut counted: Option<(Duration, u64)> = None;
    let mut next = 0;
    loop {
        let now = clock::now();
        if now >= warm && counted.is_none() {
            counted = Some((now, received));
        }
        if now >= end {
            break;
        }
        while sender.sent - first < received + lost + WINDOW {
            for _ in 0..BATCH {
                sender.add(next, to[next]);
                next = (next + 1) % to.len();
            }
        }
        // The newest word counts; the older ones are passed over.
        match heard(feedback, sender.epoch)? {
            Some(count) => received = received.max(count),
            None => lost = (sender.sent - first).saturating_sub(received),
        }
    }
    let (since, before) = counted.unwrap_or((began, 0));
    let rate = (received - before) as f64 / (clock::now() - since).as_secs_f64();
    // What is still on the way comes, or never.
    while let Some(count) = heard(feedback, sender.epoch)? {
        received = received.max(count);
    }
    let sent = sender.sent - first;
    Ok(Streamed { rate, lost: sent.saturating_sub(received), sent })
}

/// How many have come, as the receiver said last; none if it said nothing for [`GIVE_UP`].
fn heard(feedback: &UnixDatagram, epoch: u32) -> Result<Option<u64>> {
    let mut bytes = [0; 16];
    loop {
        match feedback.recv(&mut bytes) {
            Ok(16) => {
                let word = u128::from_be_bytes(bytes);
                if (word >> 64) as u32 == epoch {
                    return Ok(Some(word as u64));
                }
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error).doing("hear from the receiver"),
        }
    }
}

fn pace(
    sender: &mut Sender,
    orders: &Receiver<Order>,
    to: &[Ipv4Addr],
    every: usize,
    (fast_ms, slow_ms): (u64, u64),
) {
    let (fast, slow): (Vec<usize>, Vec<usize>) = (0..to.len()).partition(|flow| flow % every == 0);
    let turn = |list: &[usize], period: u64, tick: u64| -> Vec<usize> {
        list.iter().skip((tick % period) as usize).step_by(period as usize).copied().collect()
    };
    let mut due = clock::now();
    for tick in 0_u64.. {
        if orders.try_recv().is_ok() {
            return;
        }
        clock::sleep_until(due);
        for flow in turn(&fast, fast_ms, tick).into_iter().chain(turn(&slow, slow_ms, tick)) {
            sender.add(flow, to[flow]);
        }
        sender.flush();
        due += Duration::from_millis(1);
        // After a long stall of the whole machine, go on from now instead of sending it all at once.
        if clock::now() > due + Duration::from_millis(50) {
            due = clock::now();
        }
    }
}

/// What came of one flow.
#[derive(Debug, Clone, Copy, Default)]
struct Flow {
    last: u64,
    longest: u64,
    received: u64,
}

#[derive(Debug, Default)]
struct Arrived {
    epoch: u32,
    total: u64,
    flows: Vec<Flow>,
}

fn lock(arrived: &Mutex<Arrived>) -> MutexGuard<'_, Arrived> {
    arrived.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The receiver.
pub(crate) fn receive(args: &ReceiveArgs) -> Result<()> {
    let arrived = Arc::new(Mutex::new(Arrived::default()));
    let counting = Arc::clone(&arrived);
    let socket = socket()?;
    setsockopt(&socket, RcvBufForce, &BUFFER).doing("enlarge a receive buffer")?;
    let feedback = UnixDatagram::unbound().doing("open a feedback socket")?;
    feedback.set_nonblocking(true).doing("open a feedback socket")?;
    let path = args.feedback.clone();
    std::thread::spawn(move || {
        if let Err(error) = count(&socket, &feedback, &path, &counting) {
            eprintln!("scale: receiver: {error}");
            std::process::exit(1);
        }
    });
    for order in orders() {
        match order {
            Order::Epoch { epoch, flows } => {
                *lock(&arrived) = Arrived { epoch, total: 0, flows: vec![Flow::default(); flows] };
                answer(&())?;
            }
            Order::Mark => {
                let now = nanos();
                for flow in &mut lock(&arrived).flows {
                    *flow = Flow {
                        last: if flow.last == 0 { now } else { flow.last },
                        ..Flow::default()
                    };
                }
                answer(&())?;
            }
            Order::Silences => {
                let now = nanos();
                let flows = lock(&arrived).flows.clone();
                let longest = |flow: &Flow| flow.longest.max(now.saturating_sub(flow.last)) / 1000;
                answer(&Silences {
                    longest_us: flows.iter().map(longest).collect(),
                    received: flows.iter().map(|flow| flow.received).collect(),
                })?;
            }
            Order::Stream { .. } | Order::Pace { .. } | Order::Rest => {}
        }
    }
    Ok(())
}

fn count(
    socket: &UdpSocket,
    feedback: &UnixDatagram,
    path: &std::path::Path,
    arrived: &Mutex<Arrived>,
) -> Result<()> {
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    let mut buffers = vec![[0_u8; PAYLOAD]; BATCH];
    loop {
        let mut lengths = [0; BATCH];
        {
            let mut slices: Vec<[IoSliceMut<'_>; 1]> =
                buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
            let flags = MsgFlags::MSG_WAITFORONE;
            let got = recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None)
                .doing("receive")?;
            for (length, message) in lengths.iter_mut().zip(got) {
                *length = message.bytes;
            }
        }
        let now = nanos();
        let mut arrived = lock(arrived);
        let epoch = arrived.epoch;
        for (packet, length) in buffers.iter().zip(lengths) {
            let number = |at: usize| {
                packet.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
            };
            if length != PAYLOAD || number(0) != epoch {
                continue;
            }
            arrived.total += 1;
            if let Some(flow) = arrived.flows.get_mut(number(4) as usize) {
                if flow.last != 0 {
                    flow.longest = flow.longest.max(now.saturating_sub(flow.last));
                }
                flow.last = now;
                flow.received += 1;
            }
        }
        let word = u128::from(epoch) << 64 | u128::from(arrived.total);
        drop(arrived);
        // A full queue: a later word says more.
        let _ = feedback.send_to(&word.to_be_bytes(), path);
    }
}

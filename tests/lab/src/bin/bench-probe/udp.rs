//! Numbered UDP packets, many in a system call; and small requests.

use crate::say;
use lab::bench::probe::{Head, READY, RoundTrips, UdpCount, UdpSent};
use lab::clock;
use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt,
};
use std::io::{BufRead, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Packets of one system call, at most.
const BATCH: usize = 64;
/// How long packets may gather before they are sent.
const GATHER: Duration = Duration::from_micros(100);
/// After a longer stall of the machine the schedule moves, instead of everything going out at once.
const STALL: Duration = Duration::from_millis(2);
/// Of the receiver: it must not be what drops.
const RECEIVE_BUFFER: usize = 16 << 20;

pub(crate) fn sink(bind: SocketAddrV4) -> std::io::Result<()> {
    let socket = UdpSocket::bind(bind)?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    let count = Arc::new(Mutex::new(UdpCount::default()));
    let shared = Arc::clone(&count);
    std::thread::spawn(move || {
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
        let mut buffer = vec![0; BATCH * 2048];
        loop {
            // An error is an earlier packet's: nothing was received, and the next call will.
            let _ = receive(&socket, &mut headers, &mut buffer, &shared);
        }
    });
    say(&READY)?;
    for line in std::io::stdin().lock().lines() {
        line?;
        say(&*count.lock().unwrap_or_else(PoisonError::into_inner))?;
    }
    Ok(())
}

fn receive(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<SockaddrIn>,
    buffer: &mut [u8],
    count: &Mutex<UdpCount>,
) -> nix::Result<()> {
    let mut slices: Vec<_> = buffer.chunks_exact_mut(2048).map(|b| [IoSliceMut::new(b)]).collect();
    let flags = MsgFlags::MSG_WAITFORONE;
    let messages = recvmmsg(socket.as_raw_fd(), headers, slices.iter_mut(), flags, None)?;
    let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
    for message in messages {
        if let Some(head) = message.iovs().next().and_then(Head::read) {
            count.take(head);
        }
    }
    Ok(())
}

pub(crate) fn source(
    to: SocketAddrV4,
    size: usize,
    rate: f64,
    time: Duration,
    run: u64,
) -> std::io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(to)?;
    let size = size.max(Head::LEN);
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut buffer = vec![0x5a_u8; BATCH * size];
    let started = clock::now();
    // `schedule` is `started`, moved by what was stalled away.
    let (mut schedule, mut packets, mut last) = (started, 0_u64, started);
    loop {
        let now = clock::now();
        if now >= started + time {
            break;
        }
        let due = ((now - schedule).as_secs_f64() * rate) as u64;
        let missing = due.saturating_sub(packets);
        if missing == 0 || (missing < BATCH as u64 && now < last + GATHER) {
            std::thread::sleep(GATHER / 2);
            continue;
        }
        let late = Duration::from_secs_f64(missing as f64 / rate);
        if late > STALL {
            schedule += late - STALL;
            continue;
        }
        let count = (missing as usize).min(BATCH);
        for (number, packet) in (packets..).zip(buffer.chunks_exact_mut(size)).take(count) {
            packet[..Head::LEN].copy_from_slice(&Head { run, number }.bytes());
        }
        packets += send(&socket, &mut headers, &buffer[..count * size], size)? as u64;
        last = now;
    }
    say(&UdpSent { packets, nanos: clock::nanos(clock::now() - started) })
}

/// How many of the packets the kernel took.
fn send(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<SockaddrIn>,
    packets: &[u8],
    size: usize,
) -> std::io::Result<usize> {
    let slices: Vec<_> = packets.chunks_exact(size).map(|packet| [IoSlice::new(packet)]).collect();
    let addresses = [None; BATCH];
    let flags = MsgFlags::empty();
    match sendmmsg(socket.as_raw_fd(), headers, &slices, addresses, [], flags) {
        Ok(results) => Ok(results.count()),
        // No room, or an answer to an earlier packet: sent none.
        Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::ECONNREFUSED | Errno::EMSGSIZE) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}

pub(crate) fn echo(bind: SocketAddr) -> std::io::Result<()> {
    let socket = UdpSocket::bind(bind)?;
    say(&READY)?;
    let mut buffer = [0; 2048];
    loop {
        // An error is an earlier answer's, for which nobody waits any more.
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

pub(crate) fn ask(to: SocketAddr, count: u32, pause: Duration) -> std::io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut trips = RoundTrips::default();
    for number in 0..count {
        let request = Head { run: 0, number: number.into() };
        let mut packet = [0; 64];
        packet[..Head::LEN].copy_from_slice(&request.bytes());
        let sent = clock::now();
        socket.send(&packet)?;
        let mut answer = [0; 64];
        loop {
            match socket.recv(&mut answer) {
                // The answer to an earlier request, given up before.
                Ok(_) if Head::read(&answer) != Some(request) => {}
                Ok(_) => {
                    trips.nanos.push(clock::nanos(clock::now() - sent));
                    break;
                }
                Err(_) => {
                    trips.lost += 1;
                    break;
                }
            }
        }
        std::thread::sleep(pause);
    }
    say(&trips)
}

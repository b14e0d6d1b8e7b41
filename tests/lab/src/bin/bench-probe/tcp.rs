//! TCP streams, a thread each.

use crate::say;
use lab::bench::probe::{BEGIN, READY, TcpCount};
use lab::clock;
use socket2::{Domain, Socket, Type};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes of one write and of one read.
const CHUNK: usize = 128 * 1024;

pub(crate) fn sink(
    bind: SocketAddr,
    streams: usize,
    skip: Duration,
    time: Duration,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(bind)?;
    say(&READY)?;
    let total = Arc::new(AtomicU64::new(0));
    for _ in 0..streams {
        let (mut stream, _) = listener.accept()?;
        let total = Arc::clone(&total);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 2 * CHUNK];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                total.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
    }
    std::thread::sleep(skip);
    say(&BEGIN)?;
    let (begun, before) = (clock::now(), total.load(Ordering::Relaxed));
    std::thread::sleep(time);
    let (ended, after) = (clock::now(), total.load(Ordering::Relaxed));
    say(&TcpCount { bytes: after - before, nanos: clock::nanos(ended - begun) })
}

pub(crate) fn source(
    to: SocketAddr,
    streams: usize,
    rate: u64,
    congestion: Option<&str>,
) -> std::io::Result<()> {
    let share = rate / streams.max(1) as u64;
    let threads: Vec<_> = (0..streams)
        .map(|_| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if let Some(congestion) = congestion {
                // By the socket, since a namespace may not name one that the host keeps from it; and before it is one of
                // the other kind, whose pacing would stay.
                socket.set_tcp_congestion(congestion.as_bytes())?;
            }
            socket.connect(&to.into())?;
            let stream = TcpStream::from(socket);
            Ok(std::thread::spawn(move || fill(stream, share)))
        })
        .collect::<std::io::Result<_>>()?;
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Writes until the other end closes, or this process is ended.
fn fill(mut stream: TcpStream, rate: u64) -> std::io::Result<()> {
    let data = vec![0x5a_u8; CHUNK];
    if rate == 0 {
        loop {
            stream.write_all(&data)?;
        }
    }
    let started = clock::now();
    let mut sent = 0_u64;
    loop {
        // What is due, but after a stall not all that was missed.
        let due = (clock::now() - started).as_secs_f64() * rate as f64;
        let missing = (due as u64).saturating_sub(sent);
        sent += missing;
        let mut left = missing.min(4 * CHUNK as u64);
        while left > 0 {
            let length = left.min(CHUNK as u64);
            stream.write_all(&data[..length as usize])?;
            left -= length;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

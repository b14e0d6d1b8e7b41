//! `lab-probe`: what runs inside a host's namespace. It sends, receives and reports records (`lab::probe`) on
//! standard output; it judges nothing.

use clap::{Parser, Subcommand};
use lab::clock;
use lab::probe::{Record, TCP_PORT, UDP_PORT};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

#[derive(Parser)]
#[command(about = "The lab's sender and receiver; started by the lab, not by people")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Numbered packets at a steady rate to the other end, and a receiver for its packets.
    Udp {
        #[arg(long)]
        bind: IpAddr,
        #[arg(long)]
        to: IpAddr,
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        #[arg(long, default_value_t = 64)]
        size: usize,
        #[arg(long, default_value_t = UDP_PORT)]
        port: u16,
    },
    /// Many short flows: of each, some packets in UDP or a TCP connection to `serve`, which answers both.
    Many {
        #[arg(long)]
        bind: IpAddr,
        #[arg(long)]
        to: IpAddr,
        #[arg(long)]
        udp: u16,
        #[arg(long)]
        tcp: u16,
    },
    /// The server of `bulk`, `idle` and `many`.
    Serve {
        #[arg(long)]
        bind: IpAddr,
    },
    /// A TCP stream of so many bytes a second (0: as fast as it goes).
    Bulk {
        #[arg(long)]
        to: IpAddr,
        #[arg(long, default_value_t = 0)]
        rate: u64,
    },
    /// A TCP connection that says nothing until it is told to (a byte on standard input), then wants an echo.
    Idle {
        #[arg(long)]
        to: IpAddr,
    },
    /// One TCP flow from each of these addresses and ports to `sink`, all fed alike: the same bytes in turn.
    Spread {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        from: Vec<SocketAddr>,
        #[arg(long, default_value_t = 0)]
        millis: u64,
        /// Bytes a second of all together (0: as fast as it goes).
        #[arg(long, default_value_t = 0)]
        rate: u64,
    },
    /// Takes what `spread` sends, and says how much it was.
    Sink {
        #[arg(long)]
        bind: SocketAddr,
    },
    /// Burns a core.
    Burn,
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    match &args.what {
        What::Burn => burn(),
        // No records, and standard output for itself.
        What::Spread { to, from, millis, rate } => {
            return spread(*to, from, Duration::from_millis(*millis), *rate);
        }
        _ => {}
    }
    let (out, records) = channel();
    std::thread::spawn(move || report(&records));
    match args.what {
        What::Udp { bind, to, rate, size, port } => {
            exit_with_parent();
            udp((bind, to, port), rate, size, out)
        }
        What::Many { bind, to, udp, tcp } => many(bind, to, udp, tcp),
        What::Serve { bind } => {
            exit_with_parent();
            serve(bind, out)
        }
        What::Bulk { to, rate } => {
            exit_with_parent();
            bulk(to, rate, &out)
        }
        What::Idle { to } => idle(to, &out),
        What::Sink { bind } => {
            exit_with_parent();
            sink(bind)
        }
        What::Spread { .. } | What::Burn => Ok(()),
    }
}

fn burn() -> ! {
    let mut number = 1_u64;
    loop {
        number =
            std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

/// Writes records home every 10 ms, so that the threads with a clock to keep never wait for a pipe.
fn report(records: &Receiver<Record>) {
    let mut stdout = std::io::stdout().lock();
    let mut buffer = Vec::new();
    while let Ok(record) = records.recv() {
        buffer.extend(record.bytes());
        std::thread::sleep(Duration::from_millis(10));
        while let Ok(record) = records.try_recv() {
            buffer.extend(record.bytes());
        }
        if stdout.write_all(&buffer).and_then(|()| stdout.flush()).is_err() {
            std::process::exit(0);
        }
        buffer.clear();
    }
}

fn exit_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while !matches!(std::io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
        std::process::exit(0);
    });
}

fn record(out: &Sender<Record>, kind: u8, value: u64) {
    // The reporter ends only with the process.
    let _ = out.send(Record { kind, value, at: clock::nanos(clock::now()) });
}

/// Where [`serve`] sends UDP packets back.
const ECHO_PORT: u16 = UDP_PORT + 2;

/// Source ports of [`many`] count up from here.
const MANY_FROM: u16 = 20_000;

fn many(bind: IpAddr, to: IpAddr, udp: u16, tcp: u16) -> std::io::Result<()> {
    for port in (MANY_FROM..).take(udp.into()) {
        let socket = UdpSocket::bind((bind, port))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect((to, ECHO_PORT))?;
        let ask = || {
            for _ in 0..3 {
                socket.send(&[0; 64])?;
            }
            socket.recv(&mut [0; 64])
        };
        // The server may be about to start, or have no room for a packet.
        let mut answer = ask();
        for _ in 0..4 {
            answer = answer.or_else(|_| ask());
        }
        answer?;
    }
    for _ in 0..tcp {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(SocketAddr::new(to, TCP_PORT)),
            socket2::Type::STREAM,
            None,
        )?;
        socket.bind(&SocketAddr::new(bind, 0).into())?;
        socket.connect(&SocketAddr::new(to, TCP_PORT).into())?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"I")?;
    }
    Ok(())
}

fn udp(
    (bind, to, port): (IpAddr, IpAddr, u16),
    rate: u32,
    size: usize,
    out: Sender<Record>,
) -> std::io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(bind, port))?;
    let receiver = socket.try_clone()?;
    let received = out.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            if let Ok((length, _)) = receiver.recv_from(&mut buffer)
                && let Some(number) = buffer[..length].first_chunk::<8>()
            {
                record(&received, b'R', u64::from_be_bytes(*number));
            }
        }
    });
    let to = SocketAddr::new(to, port);
    let step = Duration::from_secs(1) / rate.max(1);
    let mut packet = vec![0; size.max(8)];
    let mut due = clock::now();
    for number in 0_u64.. {
        clock::sleep_until(due);
        packet[..8].copy_from_slice(&number.to_be_bytes());
        // What the host's own stack refuses (no route, say) was sent and is lost.
        record(&out, b'S', number);
        let _ = socket.send_to(&packet, to);
        due += step;
        // After a long stall of the whole machine, go on from now instead of sending it all at once.
        let now = clock::now();
        if now > due + Duration::from_millis(50) {
            due = now;
        }
    }
    Ok(())
}

fn serve(bind: IpAddr, out: Sender<Record>) -> std::io::Result<()> {
    let listener = TcpListener::bind(SocketAddr::new(bind, TCP_PORT))?;
    let echo = UdpSocket::bind(SocketAddr::new(bind, ECHO_PORT))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            // An error is the last packet's, which nobody waited for any more.
            if let Ok((length, from)) = echo.recv_from(&mut buffer) {
                let _ = echo.send_to(&buffer[..length], from);
            }
        }
    });
    record(&out, b'C', 0);
    let total = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&total);
    let ticker = out.clone();
    std::thread::spawn(move || {
        let mut last = 0;
        loop {
            std::thread::sleep(Duration::from_millis(5));
            let now = counter.load(Ordering::Relaxed);
            if now != last {
                record(&ticker, b'B', now);
                last = now;
            }
        }
    });
    for stream in listener.incoming() {
        let total = Arc::clone(&total);
        let stream = stream?;
        std::thread::spawn(move || {
            let _ = serve_one(stream, &total);
        });
    }
    Ok(())
}

/// The first byte says what the connection is: `b`ulk or `i`dle.
fn serve_one(mut stream: TcpStream, total: &AtomicU64) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        if kind == *b"b" {
            total.fetch_add(count as u64, Ordering::Relaxed);
        } else {
            stream.write_all(&buffer[..count])?;
        }
    }
}

fn connect(to: IpAddr, kind: u8, out: &Sender<Record>) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(SocketAddr::new(to, TCP_PORT))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind])?;
    record(out, b'C', 0);
    Ok(stream)
}

/// Reports the error, and stays until the record is home.
fn broken(out: &Sender<Record>, error: &std::io::Error) -> ! {
    record(out, b'X', u64::try_from(error.raw_os_error().unwrap_or(1)).unwrap_or(1));
    std::thread::sleep(Duration::from_millis(100));
    std::process::exit(1)
}

fn bulk(to: IpAddr, rate: u64, out: &Sender<Record>) -> std::io::Result<()> {
    let mut stream = connect(to, b'b', out)?;
    let data = vec![0x5a_u8; 128 * 1024];
    if rate == 0 {
        loop {
            if let Err(error) = stream.write_all(&data) {
                broken(out, &error);
            }
        }
    }
    // A bucket of 5 ms: after a stall the stream goes on at its rate instead of flooding queues that the UDP
    // probes share.
    let bucket = rate as f64 / 200.0;
    let (mut credit, mut last) = (0.0_f64, clock::now());
    loop {
        std::thread::sleep(Duration::from_millis(1));
        let now = clock::now();
        credit = (credit + (now - last).as_secs_f64() * rate as f64).min(bucket);
        last = now;
        let length = (credit as usize).min(data.len());
        match stream.write(&data[..length]) {
            Ok(count) => credit -= count as f64,
            Err(error) => broken(out, &error),
        }
    }
}

/// Bytes that each flow of [`spread`] gets in a turn.
const TURN: usize = 64 * 1024;

/// Prints the bytes that arrived, and the nanoseconds from the first to the last. A slow flow slows all of them, so
/// that each has the same share.
fn spread(to: SocketAddr, from: &[SocketAddr], time: Duration, rate: u64) -> std::io::Result<()> {
    let mut flows = Vec::new();
    for local in from {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(to),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        // Reset at the end: the same port is wanted again in a moment.
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_reuse_address(true)?;
        socket.bind(&(*local).into())?;
        socket.connect(&to.into())?;
        flows.push(TcpStream::from(socket));
    }
    let turn: Vec<u8> = lab::probe::MARK.iter().copied().cycle().take(TURN).collect();
    let started = clock::now();
    let mut sent = 0_u64;
    while clock::now() < started + time {
        for flow in &mut flows {
            flow.write_all(&turn)?;
        }
        sent += (flows.len() * TURN) as u64;
        if rate > 0 {
            clock::sleep_until(started + Duration::from_secs_f64(sent as f64 / rate as f64));
        }
    }
    let mut arrived = 0;
    for flow in &flows {
        flow.shutdown(std::net::Shutdown::Write)?;
    }
    for flow in &mut flows {
        let mut count = [0; 8];
        flow.read_exact(&mut count)?;
        arrived += u64::from_be_bytes(count);
    }
    println!("{arrived} {}", clock::nanos(clock::now() - started));
    Ok(())
}

fn sink(bind: SocketAddr) -> std::io::Result<()> {
    for stream in TcpListener::bind(bind)?.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = vec![0; 256 * 1024];
            let mut total = 0_u64;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return stream.write_all(&total.to_be_bytes()),
                    count => total += count as u64,
                }
            }
        });
    }
    Ok(())
}

fn idle(to: IpAddr, out: &Sender<Record>) -> std::io::Result<()> {
    let mut stream = connect(to, b'i', out)?;
    let mut byte = [0];
    let mut number = 0_u64;
    while std::io::stdin().read(&mut byte)? == 1 {
        number += 1;
        let mut echo = [0; 8];
        let asked =
            stream.write_all(&number.to_be_bytes()).and_then(|()| stream.read_exact(&mut echo));
        match asked {
            Ok(()) if echo == number.to_be_bytes() => record(out, b'E', number),
            Ok(()) => record(out, b'X', 0),
            Err(error) => broken(out, &error),
        }
    }
    Ok(())
}

//! `bench-probe`: the benchmark's generator and receiver, inside a client's namespace. One JSON document a line on
//! standard output (`lab::bench::probe`); it judges nothing.

mod tcp;
mod udp;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::Duration;

#[derive(Parser)]
#[command(about = "The benchmark's sender and receiver; started by it, not by people")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Takes TCP streams and counts what comes in a measured time that begins when all are there.
    TcpSink {
        #[arg(long)]
        bind: SocketAddr,
        #[arg(long)]
        streams: usize,
        #[arg(long)]
        skip_ms: u64,
        #[arg(long)]
        ms: u64,
    },
    /// Fills TCP streams until the other end closes them.
    TcpSource {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        streams: usize,
        /// Bytes a second of all together (0: as fast as it goes)
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// TCP congestion control, if not the host's
        #[arg(long)]
        congestion: Option<String>,
    },
    /// Counts UDP packets; each line on standard input asks for the count of the latest run.
    UdpSink {
        #[arg(long)]
        bind: SocketAddrV4,
    },
    /// Sends UDP packets at a rate, by sendmmsg and without segmentation offload.
    UdpSource {
        #[arg(long)]
        to: SocketAddrV4,
        #[arg(long)]
        size: usize,
        /// Packets a second
        #[arg(long)]
        rate: f64,
        #[arg(long)]
        ms: u64,
        /// The number of this run
        #[arg(long)]
        run: u64,
    },
    /// Sends every UDP packet back.
    Echo {
        #[arg(long)]
        bind: SocketAddr,
    },
    /// Times small requests to `echo`, one after the other.
    Ask {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        count: u32,
        #[arg(long)]
        pause_us: u64,
    },
}

fn main() -> std::io::Result<()> {
    match Args::parse().what {
        What::TcpSink { bind, streams, skip_ms, ms } => {
            tcp::sink(bind, streams, Duration::from_millis(skip_ms), Duration::from_millis(ms))
        }
        What::TcpSource { to, streams, rate, congestion } => {
            tcp::source(to, streams, rate, congestion.as_deref())
        }
        What::UdpSink { bind } => udp::sink(bind),
        What::UdpSource { to, size, rate, ms, run } => {
            udp::source(to, size, rate, Duration::from_millis(ms), run)
        }
        What::Echo { bind } => udp::echo(bind),
        What::Ask { to, count, pause_us } => udp::ask(to, count, Duration::from_micros(pause_us)),
    }
}

/// Prints a line at once.
fn say(value: &impl serde::Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
}

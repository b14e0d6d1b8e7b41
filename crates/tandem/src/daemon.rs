//! `tandemd`: one instance, from its command line to its last goodbye.
//!
//! ```text
//!  main thread = control thread (raised priority, tokio current-thread)
//!    setup ──► control loop ──► gateway ──► outputs
//!                 ▲   ▲  ▲                    │ commands, fences
//!    pair link ───┘   │  └── control socket   ▼
//!    port 500 ────────┘                    worker thread (shard, TUN, port 4500)
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `setup` | opens everything; every failure is one sentence with a hint |
//! | `control` | the loop: drain inputs, one turn, carry out the outputs in order |
//! | `addresses` | one task an endpoint: addresses, ARP and ND, announcements |
//! | `fences` | the words that say until when each endpoint may send |
//! | `answers` | the gateway's answers in the words of the control socket |

mod addresses;
mod answers;
mod control;
mod fences;
mod keylog;
mod latency;
mod setup;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tracing::error;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config_file::{self, Options};

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "tandemd", version, about = "The Tandem IPsec gateway daemon")]
struct Args {
    /// Configuration file, the same on both hosts
    #[arg(long, default_value = config_file::DEFAULT_PATH)]
    config: PathBuf,
    /// Which instance this is [default: the one named like this host]
    #[arg(long)]
    instance: Option<String>,
    /// Write every key to FOLDER, in the tables of tshark. Whoever can read them can read all traffic
    #[arg(long, value_name = "FOLDER")]
    keylog: Option<PathBuf>,
    /// Write and speak no newer pair format than N, as an older release does: until both hosts are upgraded
    /// and the way back is no longer needed [default: the newest that both know]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32)
        .range(i64::from(*gateway::FORMATS.start())..=i64::from(*gateway::FORMATS.end())))]
    hold_format: Option<u32>,
    /// What to log, as in `info` or `tandem=debug,ike=trace` [default: RUST_LOG, else info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

/// netlink's decoders warn about every attribute that is younger than they are.
const DEFAULT_LOG: &str = "info,netlink_packet_route=error";

/// Sets the calling thread apart from the control thread: it holds up nothing that shows the other instance our death,
/// and takes none of our signals. What it starts is apart as well.
pub(crate) fn apart() -> std::io::Result<()> {
    netio::sched::block_signals()?;
    netio::descriptor::own_table()
}

/// A log on a slow disk must not stop the control loop: lines go through a thread, and are dropped when 8,192 wait.
///
/// The thread starts long before the control thread gives its privileges up, and privileges belong to threads: it is
/// started by one that has none left.
fn log_writer() -> std::io::Result<(NonBlocking, WorkerGuard)> {
    let start = std::thread::Builder::new().name("log-start".to_owned()).spawn(|| {
        netio::sched::drop_all_privileges()?;
        if let Err(problem) = apart() {
            eprintln!("the log's thread is not apart: {problem}; a death of this instance may be noticed late");
        }
        Ok(NonBlockingBuilder::default().buffered_lines_limit(8_192).finish(std::io::stderr()))
    })?;
    start.join().map_err(|_| std::io::Error::other("its thread panicked"))?
}

/// Runs the daemon until it is told to stop.
pub fn main() -> ExitCode {
    let args = Args::parse();
    // Before the first key is read. The unit's LimitCORE=0 says the same; a daemon started by hand has no unit.
    if let Err(problem) = netio::sched::forbid_core_dumps() {
        eprintln!("core dumps cannot be switched off: {problem}");
        return ExitCode::FAILURE;
    }
    let filter = args
        .log
        .clone()
        .or_else(|| std::env::var("RUST_LOG").ok())
        .unwrap_or_else(|| DEFAULT_LOG.into());
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    let (writer, _flush_at_end) = match log_writer() {
        Ok(writer) => writer,
        Err(problem) => {
            eprintln!("the log cannot be started: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(writer)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    // The journal has a clock of its own.
    if under_systemd {
        subscriber.without_time().init()
    } else {
        subscriber.init()
    }
    let options = Options { keylog: args.keylog.is_some(), ..Options::here(args.instance) };
    let loaded = match config_file::load(&args.config, &options) {
        Ok(loaded) => loaded,
        Err(problem) => {
            eprintln!("{problem}");
            if matches!(problem, config_file::LoadError::Unreadable { .. }) {
                eprintln!("  hint: --config names another file");
            }
            return ExitCode::FAILURE;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // One thread for the term file, which is there before the pair link and stays.
        .max_blocking_threads(1)
        .thread_keep_alive(std::time::Duration::MAX)
        .on_thread_start(|| {
            // It is there before the control thread gives its privileges up, and needs none for a file of its own.
            let ready = netio::sched::drop_all_privileges().and_then(|()| apart());
            if let Err(problem) = ready {
                error!(%problem, "a thread is not apart: a death of this instance may be noticed late");
            }
        })
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(problem) => {
            error!(%problem, "the runtime could not be started");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        if let Err(problem) = tokio::task::spawn_blocking(|| {}).await {
            return Err(format!("a thread could not be started: {problem}"));
        }
        let parts = setup::open(loaded, args.keylog, args.hold_format).await?;
        control::run(parts).await
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error!("{problem}");
            ExitCode::FAILURE
        }
    }
}

//! `failover`: measures what the remote peer and the flows see when the pair is hurt, many times over.
//!
//! One endpoint (`--mode active-standby`, see `standby.rs`) or two with different homes (`--mode active-active`, see
//! `active.rs`). With `--json`, standard output is one document, a key for every kind of trial; those files say what is
//! in it. Exit code 0: every trial recovered and nothing was seen that must never be (IV repeats, clear text, ARP claims
//! of a dead host, changed SPIs, broken connections, a flow in another tunnel than its own).

mod active;
mod series;
mod standby;

use clap::Parser;
use lab::active::{Event, OnFailure};
use lab::run::Run;
use lab::scene::{PeerKind, Setup};
use lab::tandem::Bins;
use lab::trial::Kind;
use lab::{Error, clock};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(
    about = "Measures the gap, the losses and all that must not happen when an instance of the pair is hurt"
)]
struct Args {
    /// One endpoint, or two with different homes
    #[arg(long, value_enum, default_value = "active-standby")]
    mode: Mode,
    /// With two: what becomes of an endpoint whose home has failed
    #[arg(long, value_enum, default_value = "adopt")]
    on_failure: OnFailure,
    /// Trials of each kind
    #[arg(long, default_value_t = 5)]
    trials: u32,
    /// What is done to the pair. With two endpoints either instance is hurt in turn; `switchover` is `tandem drain`
    /// and back, `restart` an upgrade, and there is no standby
    #[arg(long, value_enum, default_value = "all")]
    kind: Wanted,
    /// Print one JSON document on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Where tandemd and tandem are [default: beside this program]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// The remote gateway: strongSwan with its own ESP, or on a real kernel's (user-mode-linux)
    #[arg(long, value_enum, default_value = "strongswan")]
    peer: Peer,
    /// Keep logs and the last captures
    #[arg(long)]
    keep_files: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    ActiveStandby,
    ActiveActive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Wanted {
    Kill,
    Stop,
    Switchover,
    Restart,
    Rejoin,
    StandbyKill,
    StandbyStop,
    All,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Peer {
    Strongswan,
    Kernel,
}

impl Wanted {
    /// Kinds of trials with one endpoint.
    fn kinds(self) -> lab::Result<Vec<Kind>> {
        Ok(match self {
            Wanted::Kill => vec![Kind::Kill],
            Wanted::Stop => vec![Kind::Stop],
            Wanted::Switchover => vec![Kind::Switchover],
            Wanted::Rejoin => vec![Kind::Rejoin],
            Wanted::StandbyKill => vec![Kind::StandbyKill],
            Wanted::StandbyStop => vec![Kind::StandbyStop],
            Wanted::All => Kind::ALL.to_vec(),
            Wanted::Restart => {
                return Err(Error::check("--kind restart is for --mode active-active"));
            }
        })
    }

    /// Kinds of trials with two.
    fn events(self) -> lab::Result<Vec<Event>> {
        Ok(match self {
            Wanted::Kill => vec![Event::Kill],
            Wanted::Stop => vec![Event::Stop],
            Wanted::Switchover => vec![Event::Drain],
            Wanted::Restart => vec![Event::Restart],
            Wanted::Rejoin => vec![Event::Rejoin],
            Wanted::All => Event::ALL.to_vec(),
            Wanted::StandbyKill | Wanted::StandbyStop => {
                return Err(Error::check("--mode active-active: there is no standby"));
            }
        })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match measure(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(faults) => {
            eprintln!("failover: {faults} things were seen that must never be");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("failover: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> lab::Result<u64> {
    let bins = Bins::find(args.bin_dir.as_deref())?;
    match args.mode {
        Mode::ActiveStandby => {
            let kinds = args.kind.kinds()?;
            if args.on_failure != OnFailure::Adopt {
                return Err(Error::check("--on-failure is for --mode active-active"));
            }
            let peer = match args.peer {
                Peer::Strongswan => PeerKind::Strongswan,
                Peer::Kernel => PeerKind::Kernel,
            };
            let setup = Setup { peer, ..Setup::default() };
            in_run(args, kinds.len(), |run| standby::trials(args, run, &bins, &setup, &kinds))
        }
        Mode::ActiveActive => {
            let events = args.kind.events()?;
            if !matches!(args.peer, Peer::Strongswan) {
                return Err(Error::check(
                    "--mode active-active has the plain strongSwan peer only",
                ));
            }
            in_run(args, events.len(), |run| active::trials(args, run, &bins, &events))
        }
    }
}

/// A run with time for so many kinds of trials, whose files stay when it fails.
fn in_run(
    args: &Args,
    kinds: usize,
    trials: impl FnOnce(&Run) -> lab::Result<u64>,
) -> lab::Result<u64> {
    let per_trial = 40 * u64::from(args.trials) * kinds as u64;
    let run = Run::start(Some(Duration::from_secs(180 + per_trial)))?;
    if args.keep_files {
        run.keep_files();
    }
    let result = trials(&run);
    if result.is_err() {
        run.keep_files();
    }
    result
}

/// The document, on standard output.
fn print_document(document: &impl Serialize) -> lab::Result<()> {
    let text = serde_json::to_string(document)
        .map_err(|error| Error::parse("the summary", error.to_string()))?;
    println!("{text}");
    Ok(())
}

/// Tenths.
fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Uniform in [0, 1), from the clock's fine digits and a generator that no two calls share.
fn random_phase() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    let number = RandomState::new().hash_one(clock::now());
    (number >> 11) as f64 / (1_u64 << 53) as f64
}

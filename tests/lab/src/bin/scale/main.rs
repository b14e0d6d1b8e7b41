//! `scale`: how a pair carries many tunnels: 1, 100, 1,000, 10,000.
//!
//! ```text
//!   lhost ── left ═ right ── router ── peer ── rhost      the lab's network (`lab::net`)
//!            one endpoint    N connections to it, from a lone Tandem, each with identities, key and selectors of its own
//! ```
//! For each number of tunnels (`rounds.rs`): how fast they come up, what each costs in memory at the owner and at its
//! shadow, how far the shadow lags behind, packets a second over one and over all of them, and the gap in every tunnel's
//! flow when the owner is killed. The same 10,000 flows are sent whatever the number of tunnels, so that the tunnels are all
//! that differs.
//!
//! With `--json`, standard output is one document (`report.rs`). Exit code 1: something did not come up or did not come
//! back, or a bar was missed that was measured.

mod agent;
mod config;
mod load;
mod memory;
mod peers;
mod report;
mod rounds;

use clap::{Parser, Subcommand};
use lab::run::Run;
use lab::tandem::Bins;
use lab::{Error, Result};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Measures what 1, 100, 1,000 and 10,000 tunnels cost a pair")]
struct Args {
    #[command(flatten)]
    wanted: Wanted,
    #[command(subcommand)]
    agent: Option<Agent>,
}

#[derive(clap::Args)]
struct Wanted {
    /// How many tunnels, each number in a round of its own; a repeated number is a round more
    #[arg(long, value_delimiter = ',', default_value = "100,1000,1,10000,1,10000,1")]
    tunnels: Vec<u32>,
    /// Shorter measurements
    #[arg(long)]
    quick: bool,
    /// Then a round with so many connections of a strongSwan in the peer's place (0: none)
    #[arg(long, default_value_t = 300)]
    strongswan: u32,
    /// Print one JSON document on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Where tandemd and tandem are [default: beside this program]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Keep logs and configurations
    #[arg(long)]
    keep_files: bool,
}

/// What runs inside a host's namespace; started by this program, not by people.
#[derive(Subcommand)]
enum Agent {
    /// Sends what it is told to on standard input.
    #[command(hide = true)]
    Send(agent::SendArgs),
    /// Receives, and says what came.
    #[command(hide = true)]
    Receive(agent::ReceiveArgs),
}

fn main() -> ExitCode {
    let Args { wanted, agent } = Args::parse();
    let outcome = match agent {
        Some(Agent::Send(args)) => agent::send(&args).map(|()| true),
        Some(Agent::Receive(args)) => agent::receive(&args).map(|()| true),
        None => measure(&wanted),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("scale: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every bar that was measured is met.
fn measure(wanted: &Wanted) -> Result<bool> {
    let most = wanted.tunnels.iter().chain([&wanted.strongswan]).max().copied().unwrap_or(0);
    if most > config::MAX_TUNNELS || wanted.tunnels.contains(&0) {
        return Err(Error::check(format!("--tunnels: 1 to {}", config::MAX_TUNNELS)));
    }
    let bins = Bins::find(wanted.bin_dir.as_deref())?;
    let rounds = wanted.tunnels.len() as u64 + u64::from(wanted.strongswan > 0);
    let run = Run::start(Some(Duration::from_secs(300 * rounds)))?;
    if wanted.keep_files {
        run.keep_files();
    }
    let outcome = all_rounds(wanted, &run, &bins);
    if outcome.is_err() {
        run.keep_files();
    }
    let document = outcome?;
    if wanted.json {
        let text = serde_json::to_string(&document)
            .map_err(|error| Error::parse("the summary", error.to_string()))?;
        println!("{text}");
    } else {
        print!("{}", document.table());
    }
    Ok(document.passes())
}

fn all_rounds(wanted: &Wanted, run: &Run, bins: &Bins) -> Result<report::Document> {
    let times = rounds::Times::of(wanted.quick);
    let bare = rounds::bare(run, bins)?;
    let mut done = Vec::new();
    for tunnels in &wanted.tunnels {
        done.push(rounds::round(run, bins, *tunnels, peers::Kind::Tandem, &times, &bare)?);
        run.clear_namespaces();
    }
    if wanted.strongswan > 0 {
        done.push(rounds::round(
            run,
            bins,
            wanted.strongswan,
            peers::Kind::Strongswan,
            &times,
            &bare,
        )?);
        run.clear_namespaces();
    }
    Ok(report::Document::of(done))
}

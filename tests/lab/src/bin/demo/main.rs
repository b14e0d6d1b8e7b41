//! `demo`: a real strongSwan gateway's tunnel survives the death of the instance that serves it, live.
//!
//! With one endpoint (`standby.rs`), or with two that have different homes (`active.rs`). With `--json`, standard output is
//! one document and nothing else (progress goes to standard error):
//!
//! ```json
//! {"peer":"strongSwan 5.9.8",
//!  "events":[{"kind":"kill","gap_ms":9.4,"lost":18,"sent":20000,"peer_spis_changed":0,"peer_ike_exchanges":0,
//!             "tcp_survived":true}, …],
//!  "cloud_promise_ms":{"planned":10000,"unplanned":60000}}
//! ```
//! `kind` is `kill`, `rejoin` or `switchover`; counts are over the trial (with one endpoint event to event + 10 s), both
//! ways. With `--mode active-active` each event also has `flows_moved`: flows that were seen in another tunnel than theirs.

mod active;
mod standby;

use clap::Parser;
use lab::active::OnFailure;
use lab::net::Net;
use lab::report::{self, CLOUD_PLANNED_MS, CLOUD_UNPLANNED_MS, Event, Page};
use lab::run::Run;
use lab::tandem::{Bins, Daemon};
use lab::{Error, clock};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Watch a real gateway's tunnel survive kill -9 of the instance that serves it")]
struct Args {
    /// One endpoint, or two with different homes
    #[arg(long, value_enum, default_value = "active-standby")]
    mode: Mode,
    /// With two: what becomes of an endpoint whose home has failed
    #[arg(long, value_enum, default_value = "adopt")]
    on_failure: OnFailure,
    /// Print one JSON document on standard output
    #[arg(long)]
    json: bool,
    /// Leave everything running afterwards and print commands to play with, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Who plays the remote gateway
    #[arg(long, value_enum, default_value = "strongswan")]
    peer: Peer,
    /// Where the report goes
    #[arg(long, default_value = "tandem-demo.html")]
    report: PathBuf,
    /// Where tandemd and tandem are [default: beside this program]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    ActiveStandby,
    ActiveActive,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// strongSwan with its own ESP
    Strongswan,
    /// strongSwan on a real kernel's ESP, in user-mode-linux
    Kernel,
    /// Tandem itself
    Tandem,
}

#[derive(Serialize)]
struct Document<'a> {
    peer: &'a str,
    events: Vec<EventRow<'a>>,
    cloud_promise_ms: CloudPromise,
}

#[derive(Serialize)]
struct EventRow<'a> {
    kind: &'a str,
    gap_ms: f64,
    lost: u64,
    sent: u64,
    peer_spis_changed: u64,
    peer_ike_exchanges: u64,
    tcp_survived: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    flows_moved: Option<u64>,
}

#[derive(Serialize)]
struct CloudPromise {
    planned: u32,
    unplanned: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match demo(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What people read. On standard error with `--json`, so that standard output is the document alone.
struct Stage {
    json: bool,
    live: bool,
    last: Duration,
}

impl Stage {
    fn say(&mut self, text: &str) {
        if self.live {
            eprint!("\r\x1b[K");
        }
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }

    /// A line that is drawn over and over: what arrives right now. `rates` is asked for packets a second to the peer and
    /// from it, and bits a second of TCP, within a window.
    fn pulse(
        &mut self,
        event: Duration,
        rates: impl Fn(Duration, Duration) -> (usize, usize, f64),
    ) {
        let now = clock::now();
        if !self.live || now < self.last + Duration::from_millis(100) {
            return;
        }
        self.last = now;
        // Records come home 10 ms late.
        let to = now.saturating_sub(Duration::from_millis(30));
        let (out, back, bits) = rates(to.saturating_sub(Duration::from_millis(500)), to);
        let _ = write!(
            std::io::stderr(),
            "\r\x1b[K    {:5.1} s   to peer {:4}/s   from peer {:4}/s   TCP {:5.1} Mb/s",
            (now - event).as_secs_f64(),
            out * 2,
            back * 2,
            bits / 1e6
        );
    }

    /// An event, in numbers.
    fn count(&mut self, event: &Event) {
        let moved = event.flows_moved.map(|moved| format!(" · {moved} flows moved"));
        self.say(&format!("  → {}", event.story));
        self.say(&format!(
            "    gap {:.1} ms · lost {} of {} packets · {} SPIs changed · {} IKE exchanges · TCP {}{}",
            event.gap_ms,
            event.lost,
            event.sent,
            event.spis_changed,
            event.ike_exchanges,
            if event.tcp_survived { "alive" } else { "BROKEN" },
            moved.unwrap_or_default()
        ));
    }
}

fn demo(args: &Args) -> lab::Result<bool> {
    let bins = Bins::find(args.bin_dir.as_deref())?;
    // Someone who plays sets the end himself.
    let bound = if args.keep { None } else { Some(Duration::from_secs(300)) };
    let run = Run::start(bound)?;
    let mut stage =
        Stage { json: args.json, live: std::io::stderr().is_terminal(), last: Duration::ZERO };
    let result = match args.mode {
        Mode::ActiveStandby => standby::play(args, &run, &bins, &mut stage),
        Mode::ActiveActive => active::play(args, &run, &bins, &mut stage),
    };
    if result.is_err() {
        run.keep_files();
    }
    result
}

/// Writes the report, and the document or the table.
fn tell(args: &Args, stage: &mut Stage, peer: &str, page: &Page) -> lab::Result<()> {
    lab::error::write_file(&args.report, report::render(page))?;
    give_back(&args.report);
    if args.json {
        let text = serde_json::to_string(&document(peer, &page.events))
            .map_err(|error| Error::parse("the document", error.to_string()))?;
        println!("{text}");
    } else {
        table(stage, &page.events);
    }
    stage.say(&format!("\nReport: {}", args.report.display()));
    Ok(())
}

fn tenth(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

fn document<'a>(peer: &'a str, events: &'a [Event]) -> Document<'a> {
    let events = events
        .iter()
        .map(|event| EventRow {
            kind: &event.kind,
            gap_ms: tenth(event.gap_ms),
            lost: event.lost,
            sent: event.sent,
            peer_spis_changed: event.spis_changed,
            peer_ike_exchanges: event.ike_exchanges,
            tcp_survived: event.tcp_survived,
            flows_moved: event.flows_moved,
        })
        .collect();
    Document {
        peer,
        events,
        cloud_promise_ms: CloudPromise { planned: CLOUD_PLANNED_MS, unplanned: CLOUD_UNPLANNED_MS },
    }
}

fn table(stage: &mut Stage, events: &[Event]) {
    let moves = events.iter().any(|event| event.flows_moved.is_some());
    stage.say(&format!(
        "\n  {:<28}{:>10}{:>8}{:>9}{:>8}{:>11}{:>8}{}{:>16}",
        "event",
        "gap",
        "lost",
        "sent",
        "SPIs",
        "exchanges",
        "TCP",
        if moves { "   moved" } else { "" },
        "cloud promises"
    ));
    for event in events {
        let cloud = event.promise_ms.map(|ms| format!("{} s", ms / 1000));
        let moved = event.flows_moved.map(|moved| format!("{moved:>8}"));
        stage.say(&format!(
            "  {:<28}{:>7.1} ms{:>8}{:>9}{:>8}{:>11}{:>8}{}{:>16}",
            event.title,
            event.gap_ms,
            event.lost,
            event.sent,
            event.spis_changed,
            event.ike_exchanges,
            if event.tcp_survived { "alive" } else { "broken" },
            moved.unwrap_or_default(),
            cloud.unwrap_or_default()
        ));
    }
}

/// Arrivals around an event, in milliseconds relative to it.
fn close_up(event: Duration, arrivals: impl Fn(Duration, Duration) -> Vec<(u64, u64)>) -> Vec<f64> {
    let close = Duration::from_secs_f64(report::CLOSE_MS / 1000.0);
    arrivals(event.saturating_sub(close), event + close)
        .iter()
        .map(|(_, at)| (*at as f64 - clock::nanos(event) as f64) / 1e6)
        .collect()
}

/// Under sudo the report belongs to whoever asked for it.
fn give_back(report: &Path) {
    let id = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        let _ = std::os::unix::fs::chown(report, Some(user), Some(group));
    }
}

/// Prints commands to play with, and starts again who was killed. `more` are the scene's own lines, `forget` keeps it small.
fn keep(
    stage: &mut Stage,
    instances: &mut [Daemon; 2],
    net: &Net,
    more: &[String],
    forget: impl Fn(Duration),
) -> lab::Result<()> {
    stage.say("\nEverything keeps running. In another terminal, as root:");
    for instance in instances.iter_mut() {
        stage.say(&format!("  {}", instance.tandem_line("status")));
        // By name and namespace: the number changes with every restart.
        stage.say(&format!(
            "  kill -9 $(for p in $(ip netns pids {}); do grep -qx tandemd /proc/$p/comm && echo $p; done)     # {}",
            instance.ns.name(),
            instance.name
        ));
    }
    for line in more {
        stage.say(&format!("  {line}"));
    }
    stage.say(&format!("  ip netns exec {} ping {}", net.lhost.name(), lab::net::RHOST));
    stage.say(&format!("  ip netns exec {} tcpdump -ni br0", net.wan.name()));
    stage.say("A killed instance is started again after two seconds. Ctrl-C ends it all.");
    loop {
        std::thread::sleep(Duration::from_secs(2));
        for instance in instances.iter_mut() {
            if !instance.is_running() {
                instance.bury()?;
                instance.start()?;
                stage.say(&format!("{} was started again", instance.name));
            }
        }
        forget(clock::now().saturating_sub(Duration::from_secs(60)));
    }
}

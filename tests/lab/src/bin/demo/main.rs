//! `demo`: a real strongSwan gateway's tunnel survives the death of the instance that serves it, live.
//!
//! With `--json`, standard output is one document and nothing else (progress goes to standard error):
//!
//! ```json
//! {"peer":"strongSwan 5.9.8",
//!  "events":[{"kind":"kill","gap_ms":9.4,"lost":18,"sent":20000,"peer_spis_changed":0,"peer_ike_exchanges":0,
//!             "tcp_survived":true}, …],
//!  "cloud_promise_ms":{"planned":10000,"unplanned":60000}}
//! ```
//! `kind` is `kill`, `rejoin` or `switchover`; counts are over the trial (event to event + 10 s), both ways.

use clap::Parser;
use lab::probe::Way;
use lab::report::{self, CLOSE_MS, CLOUD_PLANNED_MS, CLOUD_UNPLANNED_MS, Event, Page};
use lab::run::Run;
use lab::scene::{PeerKind, Remote, Scene, Setup};
use lab::tandem::Bins;
use lab::trial::{self, Kind, Outcome};
use lab::{Error, clock};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Watch a real gateway's tunnel survive kill -9 of the instance that serves it")]
struct Args {
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

#[derive(Clone, Copy, clap::ValueEnum)]
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
    events: Vec<EventRow>,
    cloud_promise_ms: CloudPromise,
}

#[derive(Serialize)]
struct EventRow {
    kind: &'static str,
    gap_ms: f64,
    lost: u64,
    sent: u64,
    peer_spis_changed: u64,
    peer_ike_exchanges: u64,
    tcp_survived: bool,
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

    /// A line that is drawn over and over: what arrives right now.
    fn pulse(&mut self, scene: &Scene, event: Duration) {
        let now = clock::now();
        if !self.live || now < self.last + Duration::from_millis(100) {
            return;
        }
        self.last = now;
        let span = Duration::from_millis(500);
        // Records come home 10 ms late.
        let to = now.saturating_sub(Duration::from_millis(30));
        let rate = |way| scene.udp.arrivals(way, to.saturating_sub(span), to).len() * 2;
        let _ = write!(
            std::io::stderr(),
            "\r\x1b[K    {:5.1} s   to peer {:4}/s   from peer {:4}/s   TCP {:5.1} Mb/s",
            (now - event).as_secs_f64(),
            rate(Way::Out),
            rate(Way::In),
            scene.tcp.rate(to.saturating_sub(span), to) / 1e6
        );
    }
}

fn demo(args: &Args) -> lab::Result<bool> {
    let bins = Bins::find(args.bin_dir.as_deref())?;
    // Someone who plays sets the end himself.
    let bound = if args.keep { None } else { Some(Duration::from_secs(300)) };
    let run = Run::start(bound)?;
    let result = play(args, &run, &bins);
    if result.is_err() {
        run.keep_files();
    }
    result
}

fn play(args: &Args, run: &Run, bins: &Bins) -> lab::Result<bool> {
    let mut stage =
        Stage { json: args.json, live: std::io::stderr().is_terminal(), last: Duration::ZERO };
    let peer = match args.peer {
        Peer::Strongswan => PeerKind::Strongswan,
        Peer::Kernel => PeerKind::Kernel,
        Peer::Tandem => PeerKind::Tandem,
    };
    stage.say("Building the stage");
    let setup = Setup { peer, ..Setup::default() };
    let mut scene = Scene::build(run, bins, &setup, &mut |line| stage.say(&format!("  · {line}")))?;
    let name = scene.remote.describe()?;
    let begin = clock::now();

    let mut outcomes = Vec::new();
    for kind in [Kind::Kill, Kind::Rejoin, Kind::Switchover] {
        stage.say(&format!("\n{}", headline(kind)));
        let outcome =
            trial::hurt(run, &mut scene, kind, 0.5, &mut |scene, event| stage.pulse(scene, event))?;
        let outcome = if kind == Kind::Kill {
            survivor(&mut scene, outcome)?
        } else {
            trial::heal(&mut scene, outcome)?
        };
        stage.say(&format!("  → {}", story(&outcome)));
        stage.say(&format!(
            "    gap {:.1} ms · lost {} of {} packets · {} SPIs changed · {} IKE exchanges · TCP {}",
            clock::millis(outcome.gap()),
            outcome.lost(),
            outcome.sent(),
            outcome.spis_changed,
            outcome.ike_exchanges,
            if outcome.tcp_broken == 0 { "alive" } else { "BROKEN" }
        ));
        outcomes.push(outcome);
    }
    scene.look(run)?.discard();
    let end = clock::now();
    let page = page_of(&scene, &name, begin, end, &outcomes);
    lab::error::write_file(&args.report, report::render(&page))?;
    give_back(&args.report);

    if args.json {
        let text = serde_json::to_string(&document(&name, &outcomes))
            .map_err(|error| Error::parse("the document", error.to_string()))?;
        println!("{text}");
    } else {
        table(&mut stage, &outcomes);
    }
    stage.say(&format!("\nReport: {}", args.report.display()));
    scene.check_clean()?;
    let clean = outcomes.iter().all(|outcome| {
        outcome.spis_changed == 0
            && outcome.ike_exchanges == 0
            && outcome.tcp_broken == 0
            && outcome.clear_text == 0
            && outcome.arp_claims == 0
    });
    if args.keep {
        keep(&mut stage, &mut scene)?;
    }
    Ok(clean)
}

/// After the kill only the survivor is there: it must own.
fn survivor(scene: &mut Scene, mut outcome: Outcome) -> lab::Result<Outcome> {
    for instance in &mut scene.instances {
        if instance.is_running() && instance.status()?.main().role == "owner" {
            outcome.owner_after = instance.name.clone();
        }
    }
    lab::error::ensure(
        outcome.owner_after != outcome.owner_before && !outcome.owner_after.is_empty(),
        || "nobody owns the endpoint after the kill".into(),
    )?;
    Ok(outcome)
}

fn headline(kind: Kind) -> &'static str {
    match kind {
        Kind::Kill => "Act 1: kill -9 the instance that serves the tunnel",
        Kind::Rejoin => "Act 2: the dead instance comes back",
        _ => "Act 3: a planned switchover",
    }
}

fn story(outcome: &Outcome) -> String {
    match outcome.kind {
        Kind::Kill => {
            format!("{} was killed; {} carried on", outcome.owner_before, outcome.owner_after)
        }
        Kind::Rejoin => {
            let synced = outcome
                .synced_after
                .map_or_else(String::new, |after| format!(" after {:.1} s", after.as_secs_f64()));
            format!(
                "it rejoined as standby and was in sync{synced}; {} still serves",
                outcome.owner_after
            )
        }
        _ => format!("{} handed over to {}", outcome.owner_before, outcome.owner_after),
    }
}

fn tenth(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

fn document<'a>(peer: &'a str, outcomes: &[Outcome]) -> Document<'a> {
    let events = outcomes
        .iter()
        .map(|outcome| EventRow {
            kind: outcome.kind.key(),
            gap_ms: tenth(clock::millis(outcome.gap())),
            lost: outcome.lost(),
            sent: outcome.sent(),
            peer_spis_changed: outcome.spis_changed,
            peer_ike_exchanges: outcome.ike_exchanges,
            tcp_survived: outcome.tcp_broken == 0,
        })
        .collect();
    Document {
        peer,
        events,
        cloud_promise_ms: CloudPromise { planned: CLOUD_PLANNED_MS, unplanned: CLOUD_UNPLANNED_MS },
    }
}

fn table(stage: &mut Stage, outcomes: &[Outcome]) {
    stage.say(&format!(
        "\n  {:<28}{:>10}{:>8}{:>9}{:>8}{:>11}{:>8}{:>16}",
        "event", "gap", "lost", "sent", "SPIs", "exchanges", "TCP", "cloud promises"
    ));
    for outcome in outcomes {
        let cloud = match outcome.kind {
            Kind::Kill => format!("{} s", CLOUD_UNPLANNED_MS / 1000),
            Kind::Switchover => format!("{} s", CLOUD_PLANNED_MS / 1000),
            _ => String::new(),
        };
        stage.say(&format!(
            "  {:<28}{:>7.1} ms{:>8}{:>9}{:>8}{:>11}{:>8}{:>16}",
            outcome.kind.title(),
            clock::millis(outcome.gap()),
            outcome.lost(),
            outcome.sent(),
            outcome.spis_changed,
            outcome.ike_exchanges,
            if outcome.tcp_broken == 0 { "alive" } else { "broken" },
            cloud
        ));
    }
}

fn page_of(
    scene: &Scene,
    peer: &str,
    begin: Duration,
    end: Duration,
    outcomes: &[Outcome],
) -> Page {
    let bucket = Duration::from_millis(20);
    let close = Duration::from_secs_f64(CLOSE_MS / 1000.0);
    let events = outcomes
        .iter()
        .map(|outcome| Event {
            kind: outcome.kind.key().into(),
            title: outcome.kind.title().into(),
            story: story(outcome),
            at_s: outcome.event.saturating_sub(begin).as_secs_f64(),
            gap_ms: clock::millis(outcome.gap()),
            lost: outcome.lost(),
            sent: outcome.sent(),
            spis_changed: outcome.spis_changed,
            ike_exchanges: outcome.ike_exchanges,
            tcp_survived: outcome.tcp_broken == 0,
            close: Way::BOTH.map(|way| {
                scene
                    .udp
                    .arrivals(way, outcome.event.saturating_sub(close), outcome.event + close)
                    .iter()
                    .map(|(_, at)| (*at as f64 - clock::nanos(outcome.event) as f64) / 1e6)
                    .collect()
            }),
        })
        .collect();
    Page {
        peer: peer.to_owned(),
        bucket,
        packets: Way::BOTH.map(|way| scene.udp.series(way, begin, end, bucket)),
        tcp: scene.tcp.series(begin, end, bucket),
        events,
        ivs: (scene.ivs.checked, scene.ivs.iv_repeats),
    }
}

/// Under sudo the report belongs to whoever asked for it.
fn give_back(report: &Path) {
    let id = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        let _ = std::os::unix::fs::chown(report, Some(user), Some(group));
    }
}

fn keep(stage: &mut Stage, scene: &mut Scene) -> lab::Result<()> {
    stage.say("\nEverything keeps running. In another terminal, as root:");
    for instance in &mut scene.instances {
        stage.say(&format!("  {}", instance.tandem_line("status")));
        // By name and namespace: the number changes with every restart.
        stage.say(&format!(
            "  kill -9 $(for p in $(ip netns pids {}); do grep -qx tandemd /proc/$p/comm && echo $p; done)     # {}",
            instance.ns.name(),
            instance.name
        ));
    }
    stage.say(&format!("  {}", scene.instances[0].tandem_line("failover")));
    if let Remote::Strongswan(charon) = &scene.remote {
        stage.say(&format!("  {}", charon.swanctl_line("--list-sas")));
    }
    stage.say(&format!("  ip netns exec {} ping {}", scene.net.lhost.name(), lab::net::RHOST));
    stage.say(&format!("  ip netns exec {} tcpdump -ni br0", scene.net.wan.name()));
    stage.say("A killed instance is started again after two seconds. Ctrl-C ends it all.");
    loop {
        std::thread::sleep(Duration::from_secs(2));
        for instance in &mut scene.instances {
            if !instance.is_running() {
                instance.bury()?;
                instance.start()?;
                stage.say(&format!("{} was started again", instance.name));
            }
        }
        scene.udp.forget(clock::now().saturating_sub(Duration::from_secs(60)));
    }
}

//! One round: a fresh pair, so many tunnels, every figure of them.

use crate::config;
use crate::load::{FAST_MS, Load};
use crate::memory::Memory;
use crate::peers::{self, Kind, Peer};
use crate::report::{Establishment, Lag, Rate, Round, Takeover};
use lab::error::IoContext;
use lab::net::Net;
use lab::run::Run;
use lab::stats::{maximum, nearest_rank};
use lab::tandem::{Bins, Daemon, Status};
use lab::{Error, Result, clock, wait};
use std::net::Ipv4Addr;
use std::time::Duration;

/// Anything may take so long, on a busy machine and with ten thousand connections to be read.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at a daemon.
const LOOK: Duration = Duration::from_millis(100);
/// What came up is left alone for so long before its memory is read.
const SETTLE: Duration = Duration::from_secs(3);
/// Flows that are looked at closely in a takeover.
const CLOSELY: usize = 1000;

/// How long and how often things are measured.
pub(crate) struct Times {
    stream: Duration,
    streams: usize,
    takeovers: usize,
}

impl Times {
    pub(crate) fn of(quick: bool) -> Times {
        match quick {
            true => Times { stream: Duration::from_secs(1), streams: 3, takeovers: 1 },
            false => Times { stream: Duration::from_secs(2), streams: 7, takeovers: 3 },
        }
    }
}

/// What a daemon says of itself, its tunnels only counted.
pub(crate) fn summary(daemon: &Daemon) -> Result<Status> {
    let text =
        daemon.tandem_cmd(&["status", "--summary", "--json"]).run(Duration::from_secs(10))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::parse("tandem status --summary --json", error.to_string()))
}

fn say(tunnels: u32, text: &str) {
    eprintln!("{tunnels} tunnels: {text}");
}

/// What an instance with one connection and no tunnel takes.
pub(crate) fn bare(run: &Run, bins: &Bins) -> Result<Memory> {
    let net = Net::build(run)?;
    let pair = config::pair(1);
    let mut instances = [
        Daemon::prepare(run, bins, &net.left, "left", &pair)?,
        Daemon::prepare(run, bins, &net.right, "right", &pair)?,
    ];
    for instance in &mut instances {
        instance.spawn()?;
    }
    let owner = wait_synced(&mut instances)?;
    std::thread::sleep(SETTLE);
    let memory = Memory::of(instances[owner].pid()?)?;
    run.clear_namespaces();
    Ok(memory)
}

/// The whole of it.
pub(crate) fn round(
    run: &Run,
    bins: &Bins,
    tunnels: u32,
    kind: Kind,
    times: &Times,
    bare: &Memory,
) -> Result<Round> {
    let net = Net::build(run)?;
    net.rhost.ip(&format!("route add local {} dev lo\n", config::BEHIND))?;
    let pair = config::pair(tunnels);
    let mut instances = [
        Daemon::prepare(run, bins, &net.left, "left", &pair)?,
        Daemon::prepare(run, bins, &net.right, "right", &pair)?,
    ];
    let began = clock::now();
    for instance in &mut instances {
        instance.spawn()?;
    }
    let owner = wait_synced(&mut instances)?;
    let start_s = (clock::now() - began).as_secs_f64();
    say(tunnels, &format!("the pair is in sync after {start_s:.1} s"));

    let before = memory(&mut instances)?;
    let mut peer = Peer::prepare(run, bins, &net, kind, tunnels)?;
    net.peer.ip(&format!("route add {} via {} dev eth1\n", config::BEHIND, lab::net::RHOST))?;
    let (establishment, lag_at_establishment) =
        establish(&mut instances, owner, &mut peer, tunnels)?;
    say(tunnels, &format!("established: {establishment:?}; lag: {lag_at_establishment:?}"));
    std::thread::sleep(SETTLE);
    let after = memory(&mut instances)?;
    let of_owner = after[owner].since(before[owner]);
    let of_shadow = after[1 - owner].since(before[1 - owner]);
    say(
        tunnels,
        &format!(
            "memory: bare {:.1} MiB; owner {:.1} to {:.1} MiB; shadow {:.1} to {:.1} MiB",
            mib(bare.rss),
            mib(before[owner].rss),
            mib(after[owner].rss),
            mib(before[1 - owner].rss),
            mib(after[1 - owner].rss),
        ),
    );

    let mut load = Load::start(run, &net)?;
    let watched = [pid(&mut instances[owner])?, pid(&mut instances[1 - owner])?];
    let (one, all) = (config::over_one(tunnels), config::over_all(tunnels));
    let (mut over_one, mut over_all) = (Vec::new(), Vec::new());
    load.stream(&all, Duration::from_secs(1))?;
    for _ in 0..times.streams {
        over_one.push(stream(&mut load, &one, times, &watched)?);
        over_all.push(stream(&mut load, &all, times, &watched)?);
    }
    let (over_one, over_all) = (Rate::of(&over_one), Rate::of(&over_all));
    say(tunnels, &format!("over one: {over_one:?}"));
    say(tunnels, &format!("over all: {over_all:?}"));
    let lag_under_traffic = lag_under_traffic(&mut load, &all, &instances[owner], times)?;
    say(tunnels, &format!("lag under traffic: {lag_under_traffic:?}"));

    let takeover = takeovers(&mut load, &mut instances, owner, tunnels, times)?;
    say(tunnels, &format!("takeover: {takeover:?}"));
    for instance in &instances {
        peers::clean(instance)?;
    }
    peer.check()?;
    Ok(Round {
        tunnels,
        peer: kind.name(),
        start_s,
        establishment,
        owner_kib_each: after[owner].since(*bare).kib_each(tunnels),
        shadow_kib_each: after[1 - owner].since(*bare).kib_each(tunnels),
        owner_kib_up: of_owner.kib_each(tunnels),
        shadow_kib_up: of_shadow.kib_each(tunnels),
        owner_before: before[owner],
        owner_after: after[owner],
        shadow_before: before[1 - owner],
        shadow_after: after[1 - owner],
        over_one,
        over_all,
        lag_at_establishment,
        lag_under_traffic,
        takeover,
    })
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn pid(daemon: &mut Daemon) -> Result<u32> {
    daemon.pid()
}

fn memory(instances: &mut [Daemon; 2]) -> Result<[Memory; 2]> {
    let [left, right] = instances;
    Ok([Memory::of(left.pid()?)?, Memory::of(right.pid()?)?])
}

/// Waits until one owns, says `synced`, and the other is its shadow; gives the owner's index.
fn wait_synced(instances: &mut [Daemon; 2]) -> Result<usize> {
    wait::until_ok("owner and shadow in sync", PATIENCE, LOOK, || {
        for instance in instances.iter_mut() {
            instance.proc()?.check_alive()?;
        }
        let states = [summary(&instances[0])?.main(), summary(&instances[1])?.main()];
        (0..2)
            .find(|owner| {
                states[*owner].role == "owner"
                    && states[*owner].mode == "synced"
                    && states[1 - owner].role == "shadow"
            })
            .ok_or_else(|| {
                let of = |i: usize| format!("{} ({})", states[i].role, states[i].mode);
                Error::check(format!("left is {}, right is {}", of(0), of(1)))
            })
    })
}

/// Lets the peer bring all tunnels up and looks on.
fn establish(
    instances: &mut [Daemon; 2],
    owner: usize,
    peer: &mut Peer,
    tunnels: u32,
) -> Result<(Establishment, Lag)> {
    let wanted = u64::from(tunnels);
    let mut samples: Vec<(Duration, u64)> = Vec::new();
    let mut lag = Lag::default();
    let mut look = |instances: &mut [Daemon; 2]| -> Result<bool> {
        for instance in instances.iter_mut() {
            instance.proc()?.check_alive()?;
        }
        let status = summary(&instances[owner])?;
        samples.push((clock::now(), status.tunnel_counts.children));
        lag.sample(&status.main());
        Ok(status.tunnel_counts.children >= wanted)
    };
    let began = clock::now();
    // strongSwan is asked for one after the other, which takes as long as it takes.
    std::thread::scope(|scope| -> Result<()> {
        let asking = scope.spawn(|| peer.begin(tunnels));
        let up = wait::until("all tunnels to come up", PATIENCE, LOOK, || {
            Ok(look(instances)?.then_some(()))
        });
        asking.join().map_err(|_| Error::check("a thread of the lab panicked"))??;
        up
    })?;
    wait::until("the peer and the shadow to hold all tunnels", PATIENCE, LOOK, || {
        let shadow = summary(&instances[1 - owner])?.tunnel_counts.children;
        Ok((shadow >= wanted && peer.is_up(tunnels)?).then_some(()))
    })?;
    let first = samples.iter().find(|(_, up)| *up > 0).copied().unwrap_or((began, 0));
    let last = samples.last().copied().unwrap_or(first);
    let (span, many) = ((last.0 - first.0).as_secs_f64(), last.1 - first.1);
    Ok((
        Establishment {
            took_s: (last.0 - began).as_secs_f64(),
            per_s: (many > 0).then(|| many as f64 / span),
        },
        lag,
    ))
}

/// Seconds of processor time that a process has had.
fn cpu_s(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).doing(path.as_str())?;
    // The name in parentheses may hold spaces; fields are counted after it. utime is field 14, stime 15.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u64 =
        rest.split(' ').skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    // USER_HZ, the same on every Linux.
    Ok(ticks as f64 / 100.0)
}

/// A stream; packets a second, those lost, and what a packet cost owner and shadow, microseconds.
struct Stream {
    rate: f64,
    lost: u64,
    cost_us: [f64; 2],
}

impl Rate {
    fn of(streams: &[Stream]) -> Rate {
        let median = |of: &dyn Fn(&Stream) -> f64| {
            nearest_rank(&streams.iter().map(of).collect::<Vec<_>>(), 50.0)
        };
        let rates: Vec<f64> = streams.iter().map(|s| s.rate).collect();
        Rate {
            per_s: median(&|s| s.rate),
            least_per_s: rates.iter().copied().fold(f64::INFINITY, f64::min),
            most_per_s: maximum(&rates),
            lost: streams.iter().map(|s| s.lost).sum(),
            owner_us_per_packet: median(&|s| s.cost_us[0]),
            shadow_us_per_packet: median(&|s| s.cost_us[1]),
        }
    }
}

fn stream(load: &mut Load, to: &[Ipv4Addr], times: &Times, watched: &[u32; 2]) -> Result<Stream> {
    let costs = || -> Result<[f64; 2]> { Ok([cpu_s(watched[0])?, cpu_s(watched[1])?]) };
    let before = costs()?;
    let streamed = load.stream(to, times.stream)?;
    let after = costs()?;
    let each = |i: usize| (after[i] - before[i]) * 1e6 / streamed.sent.max(1) as f64;
    Ok(Stream { rate: streamed.rate, lost: streamed.lost, cost_us: [each(0), each(1)] })
}

fn lag_under_traffic(
    load: &mut Load,
    all: &[Ipv4Addr],
    owner: &Daemon,
    times: &Times,
) -> Result<Lag> {
    let mut lag = Lag::default();
    std::thread::scope(|scope| -> Result<()> {
        let streaming = scope.spawn(|| load.stream(all, times.stream * 2));
        while !streaming.is_finished() {
            lag.sample(&summary(owner)?.main());
            std::thread::sleep(LOOK);
        }
        streaming.join().map_err(|_| Error::check("a thread of the lab panicked"))??;
        Ok(())
    })?;
    Ok(lag)
}

/// The owner is killed, again and again; whoever was killed comes back before the next time.
fn takeovers(
    load: &mut Load,
    instances: &mut [Daemon; 2],
    mut owner: usize,
    tunnels: u32,
    times: &Times,
) -> Result<Takeover> {
    let to = config::one_each(tunnels);
    let every = to.len().div_ceil(CLOSELY);
    let (mut gaps, mut silent, mut rejoins) = (Vec::new(), 0, Vec::new());
    for _ in 0..times.takeovers {
        load.pace(&to, every)?;
        // Each flow has had several packets.
        std::thread::sleep(Duration::from_millis(2500));
        load.mark()?;
        std::thread::sleep(Duration::from_millis(200));
        instances[owner].kill9()?;
        std::thread::sleep(Duration::from_secs(2));
        let silences = load.silences()?;
        gaps.extend(
            silences.longest_us.iter().step_by(every).map(|longest| *longest as f64 / 1000.0),
        );
        // Whose tunnel was not taken over has nothing more, at any rate.
        load.mark()?;
        std::thread::sleep(Duration::from_millis(2500));
        silent +=
            load.silences()?.received.iter().filter(|received| **received == 0).count() as u64;
        load.rest()?;
        instances[owner].bury()?;
        let began = clock::now();
        instances[owner].spawn()?;
        owner = wait_synced(instances)?;
        rejoins.push((clock::now() - began).as_secs_f64());
    }
    Ok(Takeover {
        trials: times.takeovers as u64,
        flows: gaps.len() as u64,
        interval_ms: FAST_MS,
        gap_p50_ms: nearest_rank(&gaps, 50.0),
        gap_p99_ms: nearest_rank(&gaps, 99.0),
        gap_max_ms: maximum(&gaps),
        silent,
        rejoin_s: nearest_rank(&rejoins, 50.0),
    })
}

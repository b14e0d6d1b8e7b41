//! The turns: who is measured when, and what in a turn.

use crate::document::cores;
use lab::bench::aead::{self, Aead};
use lab::bench::contender::{Contender, Programs, Scene, Start, start};
use lab::bench::profile::Profile;
use lab::bench::ratios::{Cell, Cells, short};
use lab::bench::search::{self, Outcome, Range};
use lab::bench::traffic::{TcpFound, TcpPlan, Traffic, UdpFound, Way};
use lab::error::{IoContext, Result, ensure};
use lab::run::Run;
use lab::{clock, stats};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// How long things take.
pub(crate) struct Lengths {
    warm_up: Duration,
    tcp: Duration,
    fixed: Duration,
    udp: Duration,
    search: Duration,
    aead: Duration,
    requests: u32,
    /// The longest that all may take.
    pub(crate) bound: Duration,
    /// No turn begins later than so long before that.
    reserve: Duration,
}

impl Lengths {
    pub(crate) const QUICK: Lengths = Lengths {
        warm_up: Duration::from_millis(700),
        tcp: Duration::from_secs(2),
        fixed: Duration::from_secs(3),
        udp: Duration::from_millis(1000),
        search: Duration::from_millis(500),
        aead: Duration::from_millis(200),
        requests: 300,
        bound: Duration::from_secs(15 * 60),
        reserve: Duration::from_secs(60),
    };
    pub(crate) const FULL: Lengths = Lengths {
        warm_up: Duration::from_millis(1500),
        tcp: Duration::from_millis(4500),
        fixed: Duration::from_secs(8),
        udp: Duration::from_secs(3),
        search: Duration::from_secs(1),
        aead: Duration::from_millis(500),
        requests: 1000,
        bound: Duration::from_secs(60 * 60),
        reserve: Duration::from_secs(120),
    };
}

/// Pause before each small request: long enough that the processors sleep in between.
const PAUSE: Duration = Duration::from_millis(3);
/// The sizes of UDP packets, with their cells.
const SIZES: [(usize, Cell); 3] = [(1300, Cell::Udp1300), (512, Cell::Udp512), (64, Cell::Udp64)];
/// Where a UDP rate is searched, packets a second.
const RANGE: Range = Range { start: 16e3, lowest: 500.0, highest: 4e6, precision: 1.05 };
/// A searched rate that does not hold in a round is lowered by this factor, so many times at most.
const STEP: f64 = 0.95;
const STEPS: u32 = 12;
/// IPv4 and TCP headers with timestamps.
const HEADERS: u32 = 52;

/// Cells that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Group {
    /// One stream out at full rate, with its CPU time.
    Tcp1,
    /// One stream back, and eight.
    Tcp,
    /// One stream out with TCP's usual congestion control, whatever the machine's is.
    Cubic,
    /// CPU time at the fixed rate.
    Fixed,
    /// Packets a second.
    Udp,
    /// Small requests.
    Latency,
    /// One stream with the wire's segmentation off.
    WireOff,
}

/// One cell of one round.
#[derive(Serialize)]
pub(crate) struct Record {
    round: u32,
    contender: &'static str,
    cell: Cell,
    value: f64,
    detail: Value,
}

/// A searched rate.
#[derive(Serialize)]
pub(crate) struct Search {
    contender: &'static str,
    size: usize,
    packets_s: f64,
}

/// A turn that was not played to its end.
#[derive(Serialize)]
pub(crate) struct Failure {
    pub(crate) round: u32,
    pub(crate) contender: &'static str,
    pub(crate) why: String,
}

/// All that was found.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) cells: Cells,
    pub(crate) records: Vec<Record>,
    pub(crate) searches: Vec<Search>,
    pub(crate) failures: Vec<Failure>,
    pub(crate) skipped: BTreeMap<Contender, String>,
    pub(crate) versions: BTreeMap<Contender, String>,
    pub(crate) seconds: f64,
    rates: BTreeMap<(Contender, usize), f64>,
    pub(crate) profiles: BTreeMap<(Contender, Cell), Profile>,
    /// CPU-seconds of TCP cells, and those of them that other processes took.
    watched_s: f64,
    foreign_s: f64,
}

impl Found {
    /// What part of the machine other processes took while TCP was measured.
    pub(crate) fn foreign_share(&self) -> f64 {
        if self.watched_s > 0.0 { self.foreign_s / self.watched_s } else { 0.0 }
    }
}

/// How it is measured.
pub(crate) struct Wishes<'a> {
    pub(crate) lengths: &'a Lengths,
    /// The fixed rate, Mb/s.
    pub(crate) fixed_mbps: u64,
    pub(crate) groups: &'a [Group],
    /// The clients' TCP congestion control, if not the machine's.
    pub(crate) congestion: Option<&'a str>,
    /// Whether to find out where the time goes.
    pub(crate) profile: bool,
}

/// What every turn needs.
struct Stage<'a> {
    run: &'a Run,
    programs: &'a Programs,
    probe: PathBuf,
    wishes: &'a Wishes<'a>,
}

/// Plays all rounds, and in them these groups of cells.
pub(crate) fn play(
    run: &Run,
    programs: &Programs,
    contenders: &[Contender],
    rounds: u32,
    wishes: &Wishes<'_>,
) -> Result<Found> {
    let lengths = wishes.lengths;
    let own = std::env::current_exe().doing("find the benchmark's own program")?;
    let probe = own.with_file_name("bench-probe");
    ensure(probe.exists(), || format!("there is no {}", probe.display()))?;
    let stage = Stage { run, programs, probe, wishes };
    let started = clock::now();
    let mut found = Found::default();
    let searched = contenders.iter().filter(|it| it.is_full() && stage.wants(Group::Udp));
    for contender in searched {
        eprintln!("{}  search  {}", seconds(started), contender.name());
        stage
            .turn(*contender, 0, &mut found, |scene, found| stage.search(*contender, scene, found));
    }
    for round in 0..rounds {
        for contender in order(contenders, round) {
            if found.skipped.contains_key(&contender) {
                continue;
            }
            let name = contender.name();
            if clock::now() - started > lengths.bound - lengths.reserve {
                let why = "no time was left for it".to_owned();
                found.failures.push(Failure { round, contender: name, why });
                continue;
            }
            eprintln!("{}  round {} of {rounds}  {name}", seconds(started), round + 1);
            stage.turn(contender, round, &mut found, |scene, found| {
                let mut cells = Turn { contender, round, found };
                stage.measure(scene, &mut cells)
            });
        }
    }
    found.seconds = (clock::now() - started).as_secs_f64();
    Ok(found)
}

/// How long ago, as `[ 12s]`.
fn seconds(started: Duration) -> String {
    format!("[{:4.0}s]", (clock::now() - started).as_secs_f64())
}

/// Another one begins in each round.
fn order(contenders: &[Contender], round: u32) -> Vec<Contender> {
    let mut order = contenders.to_vec();
    if !order.is_empty() {
        let count = order.len();
        order.rotate_left(round as usize % count);
    }
    order
}

/// One contender's turn in one round.
struct Turn<'a> {
    contender: Contender,
    round: u32,
    found: &'a mut Found,
}

impl Turn<'_> {
    fn note_tcp(&mut self, cell: Cell, value: f64, found: &TcpFound) {
        self.found.watched_s += found.count.nanos as f64 / 1e9 * cores() as f64;
        self.found.foreign_s += found.spent.foreign_s;
        if let Some(profile) = found.profile {
            *self.found.profiles.entry((self.contender, cell)).or_default() += profile;
        }
        let detail = json!({"bytes": found.count.bytes, "nanos": found.count.nanos,
            "machine": found.spent, "workers": found.workers,
            "cpu_s_per_gb": found.cpu_s_per_gb()});
        self.note(cell, value, detail);
    }

    fn note(&mut self, cell: Cell, value: f64, detail: Value) {
        eprintln!("    {cell:?} {}", short(value));
        let Turn { contender, round, .. } = *self;
        self.found.cells.entry((contender, cell)).or_default().insert(round, value);
        let contender = contender.name();
        self.found.records.push(Record { round, contender, cell, value, detail });
    }
}

impl Stage<'_> {
    /// Puts the contender in place, lets `what` measure it, and clears the place. What fails is written down.
    fn turn(
        &self,
        contender: Contender,
        round: u32,
        found: &mut Found,
        what: impl FnOnce(&Scene, &mut Found) -> Result<()>,
    ) {
        let result = start(self.run, self.programs, contender).and_then(|started| match started {
            Start::Up(mut scene) => {
                found.versions.insert(contender, scene.version.clone());
                let result = what(&scene, found).and_then(|()| scene.check_alive());
                if result.is_err() {
                    eprintln!("    drops: {:?}", scene.drops());
                }
                result
            }
            Start::Skipped(reason) => {
                eprintln!("    skipped: {reason}");
                found.skipped.insert(contender, reason);
                Ok(())
            }
        });
        self.run.clear_namespaces();
        if let Err(error) = result {
            let (contender, why) = (contender.name(), error.to_string());
            eprintln!("    FAILED: {why}");
            found.failures.push(Failure { round, contender, why });
        }
    }

    /// Searches the highest UDP rate of each size.
    fn search(&self, contender: Contender, scene: &Scene, found: &mut Found) -> Result<()> {
        let mut traffic = Traffic::start(self.run, &self.probe, scene)?;
        for (size, cell) in SIZES {
            let rate = search::highest(RANGE, |rate| {
                let found = traffic.udp(size, rate, self.wishes.lengths.search)?;
                let UdpFound { sent, count, outcome } = found;
                let (rate, sent, received) = (short(rate), sent.packets, count.received);
                eprintln!("      {size} bytes at {rate}: {received} of {sent}, {outcome:?}");
                Ok(outcome)
            })?;
            eprintln!("    {cell:?} {}", short(rate));
            found.rates.insert((contender, size), rate);
            found.searches.push(Search { contender: contender.name(), size, packets_s: rate });
        }
        Ok(())
    }

    fn wants(&self, group: Group) -> bool {
        self.wishes.groups.contains(&group)
    }

    fn measure(&self, scene: &Scene, turn: &mut Turn<'_>) -> Result<()> {
        let mut traffic = Traffic::start(self.run, &self.probe, scene)?;
        let plan = |streams: usize, way: Way| TcpPlan {
            streams,
            way,
            rate: 0,
            congestion: self.wishes.congestion,
            warm_up: self.wishes.lengths.warm_up,
            time: self.wishes.lengths.tcp,
            profile: self.wishes.profile,
        };
        if turn.contender == Contender::LowLatency {
            return if self.wants(Group::Latency) {
                self.latency(&mut traffic, turn)
            } else {
                Ok(())
            };
        }
        if self.wants(Group::Tcp1) {
            let tcp1 = traffic.tcp(&plan(1, Way::Out))?;
            turn.note_tcp(Cell::Tcp1, tcp1.gbps(), &tcp1);
            turn.note(Cell::CpuFull, tcp1.cpu_s_per_gb(), Value::Null);
            if turn.contender.is_tandem() {
                self.against_aead(scene, &tcp1, turn)?;
            }
        }
        if turn.contender.is_full() {
            self.measure_more(&mut traffic, &plan, turn)?;
        }
        if self.wants(Group::WireOff) {
            scene.net.segmentation_on_wire(false)?;
            let off = traffic.tcp(&plan(1, Way::Out))?;
            turn.note_tcp(Cell::Tcp1WireOff, off.gbps(), &off);
        }
        Ok(())
    }

    /// What is measured of the full contenders alone.
    fn measure_more<'a>(
        &self,
        traffic: &mut Traffic<'_>,
        plan: &impl Fn(usize, Way) -> TcpPlan<'a>,
        turn: &mut Turn<'_>,
    ) -> Result<()> {
        for (cell, streams, way) in [
            (Cell::Tcp1Back, 1, Way::Back),
            (Cell::Tcp8, 8, Way::Out),
            (Cell::Tcp8Back, 8, Way::Back),
        ] {
            if self.wants(Group::Tcp) {
                let found = traffic.tcp(&plan(streams, way))?;
                turn.note_tcp(cell, found.gbps(), &found);
            }
        }
        if self.wants(Group::Cubic) {
            let cubic = TcpPlan { congestion: Some("cubic"), ..plan(1, Way::Out) };
            let found = traffic.tcp(&cubic)?;
            turn.note_tcp(Cell::Tcp1Cubic, found.gbps(), &found);
        }
        if self.wants(Group::Fixed) {
            self.fixed(traffic, &plan(1, Way::Out), turn)?;
        }
        if self.wants(Group::Udp) {
            self.udp(traffic, turn)?;
        }
        if self.wants(Group::Latency) {
            self.latency(traffic, turn)?;
        }
        Ok(())
    }

    /// Small requests.
    fn latency(&self, traffic: &mut Traffic<'_>, turn: &mut Turn<'_>) -> Result<()> {
        let trips = traffic.requests(self.wishes.lengths.requests, PAUSE)?;
        let micros: Vec<f64> = trips.nanos.iter().map(|nanos| *nanos as f64 / 1e3).collect();
        let count = json!({"answered": micros.len(), "lost": trips.lost});
        turn.note(Cell::LatencyP50, stats::nearest_rank(&micros, 50.0), count);
        turn.note(Cell::LatencyP99, stats::nearest_rank(&micros, 99.0), Value::Null);
        Ok(())
    }

    /// CPU time at the fixed rate, of those that carry it.
    fn fixed(&self, traffic: &mut Traffic<'_>, plan: &TcpPlan, turn: &mut Turn<'_>) -> Result<()> {
        let rate = self.wishes.fixed_mbps * 1_000_000 / 8;
        let fixed = traffic.tcp(&TcpPlan { rate, time: self.wishes.lengths.fixed, ..*plan })?;
        let carried = fixed.gbps() * 1000.0 / self.wishes.fixed_mbps as f64;
        if carried > 0.95 {
            turn.note_tcp(Cell::CpuFixed, fixed.cpu_s_per_gb(), &fixed);
        } else {
            let percent = carried * 100.0;
            eprintln!(
                "    CpuFixed: {percent:.0} % of {} Mb/s were carried",
                self.wishes.fixed_mbps
            );
        }
        Ok(())
    }

    /// Confirms the searched rates.
    fn udp(&self, traffic: &mut Traffic<'_>, turn: &mut Turn<'_>) -> Result<()> {
        let (mut reordered, mut received) = (0, 0);
        for (size, cell) in SIZES {
            let Some(&rate) = turn.found.rates.get(&(turn.contender, size)) else { continue };
            let mut probes = 0;
            let confirmed = search::confirm(rate, STEP, STEPS, |rate| {
                probes += 1;
                let found = traffic.udp(size, rate, self.wishes.lengths.udp)?;
                Ok((found.outcome == Outcome::Carried, found))
            })?;
            let (rate, found): (f64, Option<UdpFound>) =
                confirmed.map_or((0.0, None), |(rate, found)| (rate, Some(found)));
            let detail = found.map(|found| {
                reordered += found.count.reordered;
                received += found.count.received;
                json!({"asked": rate, "probes": probes, "sent": found.sent.packets,
                    "received": found.count.received, "reordered": found.count.reordered,
                    "gbps": found.rate() * size as f64 * 8.0 / 1e9})
            });
            let value = found.map_or(0.0, |found| found.rate());
            turn.note(cell, value, detail.unwrap_or(json!({"probes": probes})));
        }
        if received > 0 {
            let ppm = reordered as f64 * 1e6 / received as f64;
            turn.note(Cell::Reordered, ppm, json!({"reordered": reordered, "received": received}));
        }
        Ok(())
    }

    /// The workers' time against that of the AEAD alone: each packet is sealed at one gateway and opened at the other.
    /// Acknowledgements, which are sealed and opened as well, are not counted in the AEAD's favour.
    fn against_aead(&self, scene: &Scene, tcp: &TcpFound, turn: &mut Turn<'_>) -> Result<()> {
        let mtu = scene.tunnel_mtu()?;
        let packets = tcp.count.bytes as f64 / f64::from(mtu.saturating_sub(HEADERS).max(1));
        let length = mtu as usize;
        let cipher = match turn.contender {
            Contender::Chacha => Aead::Chacha20Poly1305,
            _ => Aead::Aes256Gcm,
        };
        let loaded = aead::measure(cipher, length, cores(), self.wishes.lengths.aead)?;
        let alone = aead::measure(cipher, length, 1, self.wishes.lengths.aead)?;
        let aead_s = packets * loaded.both_ns() / 1e9;
        let all_s = tcp.workers.user_s + tcp.workers.system_s;
        let detail = json!({"packet": length, "packets": packets, "workers": tcp.workers,
            "aead": loaded, "aead_on_one_core": alone});
        turn.note(Cell::CpuVsAead, tcp.workers.user_s / aead_s, detail);
        turn.note(Cell::CpuVsAeadAll, all_s / aead_s, Value::Null);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_is_in_every_round_and_begins_once() {
        let all = Contender::ALL;
        let count = all.len() as u32;
        let firsts: Vec<Contender> = (0..count).map(|round| order(&all, round)[0]).collect();
        assert_eq!(firsts, all);
        for round in 0..=count {
            let mut sorted = order(&all, round);
            sorted.sort();
            let mut wanted = all.to_vec();
            wanted.sort();
            assert_eq!(sorted, wanted);
        }
        assert_eq!(order(&all, count), order(&all, 0));
    }

    #[test]
    fn the_lengths_fit_their_bounds() {
        // Of a contender's turn, what is not measuring: network, start, rates that did not hold, the generator's own.
        let overhead = Duration::from_secs(7);
        for (lengths, rounds) in [(Lengths::QUICK, 3), (Lengths::FULL, 7)] {
            let tcp = lengths.warm_up + lengths.tcp;
            let full = tcp * 6
                + lengths.fixed
                + lengths.warm_up
                + lengths.udp * 4
                + PAUSE * lengths.requests
                + lengths.aead * 2
                + overhead;
            let brief = tcp * 2 + lengths.aead * 2 + overhead / 4;
            let fulls = Contender::ALL.iter().filter(|one| one.is_full()).count() as u32;
            let briefs = Contender::ALL.len() as u32 - fulls;
            let searches = (lengths.search + Duration::from_millis(350)) * 15 * 3 * fulls;
            let total = searches + (full * fulls + brief * briefs) * rounds;
            assert!(total < lengths.bound - lengths.reserve, "{total:?}");
            assert!(full + overhead < lengths.reserve, "{full:?}");
        }
    }
}

//! What was measured, as one document and as a table, and the bars it is held against.

use crate::memory::Memory;
use lab::stats::nearest_rank;
use lab::tandem::EndpointStatus;
use serde::Serialize;
use std::fmt::Write as _;

/// How fast tunnels come up.
#[derive(Debug, Serialize)]
pub(crate) struct Establishment {
    /// From the peer's start (with the reading of its configuration) to the last tunnel.
    pub(crate) took_s: f64,
    /// From the first one on; none for one tunnel.
    pub(crate) per_s: Option<f64>,
}

/// How far the shadow is behind the owner, in records, at some moments.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Lag {
    /// Looks at it.
    pub(crate) samples: Vec<u64>,
    /// Looks at which the owner did not say `synced`.
    pub(crate) unsynced: u64,
}

impl Lag {
    pub(crate) fn sample(&mut self, endpoint: &EndpointStatus) {
        let acked = endpoint.acked_position.unwrap_or(0);
        self.samples.push(endpoint.position.saturating_sub(acked));
        self.unsynced += u64::from(endpoint.mode != "synced");
    }

    fn percentile(&self, percent: f64) -> f64 {
        nearest_rank(&self.samples.iter().map(|n| *n as f64).collect::<Vec<_>>(), percent)
    }
}

/// Packets a second, the median of several streams.
#[derive(Debug, Serialize)]
pub(crate) struct Rate {
    pub(crate) per_s: f64,
    pub(crate) least_per_s: f64,
    pub(crate) most_per_s: f64,
    /// Of all streams.
    pub(crate) lost: u64,
    /// Processor time of the whole daemon.
    pub(crate) owner_us_per_packet: f64,
    /// Likewise of its shadow, which is told what the owner has received.
    pub(crate) shadow_us_per_packet: f64,
}

/// What the flows saw of a SIGKILL of the owner.
#[derive(Debug, Serialize)]
pub(crate) struct Takeover {
    pub(crate) trials: u64,
    /// Gaps measured: flows of all trials.
    pub(crate) flows: u64,
    /// Between two packets of a flow; part of each gap.
    pub(crate) interval_ms: u64,
    pub(crate) gap_p50_ms: f64,
    pub(crate) gap_p99_ms: f64,
    pub(crate) gap_max_ms: f64,
    /// Tunnels without a packet from two seconds after the kill on, of all tunnels and trials.
    pub(crate) silent: u64,
    /// From the start of the killed instance to `synced`, its configuration read anew.
    pub(crate) rejoin_s: f64,
}

/// One number of tunnels.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    pub(crate) tunnels: u32,
    pub(crate) peer: &'static str,
    /// From the start of both instances to `synced`.
    pub(crate) start_s: f64,
    pub(crate) establishment: Establishment,
    /// Resident memory per tunnel, above a daemon with one connection and no tunnel: with its configuration.
    pub(crate) owner_kib_each: f64,
    pub(crate) shadow_kib_each: f64,
    /// The same above the daemon with the same configuration and no tunnel.
    pub(crate) owner_kib_up: f64,
    pub(crate) shadow_kib_up: f64,
    pub(crate) owner_before: Memory,
    pub(crate) owner_after: Memory,
    pub(crate) shadow_before: Memory,
    pub(crate) shadow_after: Memory,
    pub(crate) over_one: Rate,
    pub(crate) over_all: Rate,
    pub(crate) lag_at_establishment: Lag,
    pub(crate) lag_under_traffic: Lag,
    pub(crate) takeover: Takeover,
}

/// A figure that has to be reached.
#[derive(Debug, Serialize)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) bar: f64,
    /// The value must be at least that, and not at most.
    pub(crate) at_least: bool,
    pub(crate) pass: bool,
}

impl Bar {
    fn at_least(name: String, value: f64, bar: f64) -> Bar {
        Bar { name, value, bar, at_least: true, pass: value >= bar }
    }

    fn at_most(name: String, value: f64, bar: f64) -> Bar {
        Bar { name, value, bar, at_least: false, pass: value <= bar }
    }
}

/// All of it: what `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Document {
    pub(crate) rounds: Vec<Round>,
    pub(crate) bars: Vec<Bar>,
}

impl Document {
    pub(crate) fn of(rounds: Vec<Round>) -> Document {
        let bars = bars(&rounds);
        Document { rounds, bars }
    }

    /// Whether every bar is met, and every tunnel was taken over.
    pub(crate) fn passes(&self) -> bool {
        self.bars.iter().all(|bar| bar.pass)
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let header = [
            "tunnels",
            "peer",
            "start s",
            "up/s",
            "up s",
            "KiB owner",
            "KiB shadow",
            "pps one",
            "pps all",
            "us/packet",
            "us shadow",
            "lag up",
            "lag load",
            "gap p50",
            "gap p99",
            "gap max",
            "silent",
            "rejoin s",
        ];
        let mut rows = vec![header.map(str::to_owned)];
        for round in &self.rounds {
            rows.push(round.row());
        }
        let widths: Vec<usize> = (0..header.len())
            .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
            .collect();
        for row in &rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
            let _ = writeln!(out, "{}", cells.join("  ").trim_end());
        }
        out.push('\n');
        for bar in &self.bars {
            let (word, sign) =
                (if bar.pass { "pass" } else { "FAIL" }, if bar.at_least { "≥" } else { "≤" });
            let _ = writeln!(out, "{word}  {}: {:.3} ({sign} {})", bar.name, bar.value, bar.bar);
        }
        out
    }
}

impl Round {
    fn row(&self) -> [String; 18] {
        let lag = |lag: &Lag| format!("{:.0}/{:.0}", lag.percentile(50.0), lag.percentile(100.0));
        [
            self.tunnels.to_string(),
            self.peer.to_owned(),
            format!("{:.1}", self.start_s),
            self.establishment.per_s.map_or("–".to_owned(), |rate| format!("{rate:.0}")),
            format!("{:.1}", self.establishment.took_s),
            format!("{:.1}", self.owner_kib_each),
            format!("{:.1}", self.shadow_kib_each),
            format!("{:.0}", self.over_one.per_s),
            format!("{:.0}", self.over_all.per_s),
            format!("{:.2}", self.over_all.owner_us_per_packet),
            format!("{:.2}", self.over_all.shadow_us_per_packet),
            lag(&self.lag_at_establishment),
            lag(&self.lag_under_traffic),
            format!("{:.0}", self.takeover.gap_p50_ms),
            format!("{:.0}", self.takeover.gap_p99_ms),
            format!("{:.0}", self.takeover.gap_max_ms),
            self.takeover.silent.to_string(),
            format!("{:.1}", self.takeover.rejoin_s),
        ]
    }
}

/// The bars, for the largest number of tunnels to a Tandem.
fn bars(rounds: &[Round]) -> Vec<Bar> {
    let mut bars: Vec<Bar> = rounds
        .iter()
        .map(|round| {
            let name = format!("{} {}: tunnels silent after a takeover", round.tunnels, round.peer);
            Bar::at_most(name, round.takeover.silent as f64, 0.0)
        })
        .collect();
    let of_tandem = || rounds.iter().filter(|round| round.peer == "Tandem");
    let Some(most) = of_tandem().max_by_key(|round| round.tunnels) else { return bars };
    let many = most.tunnels;
    // Of rounds that alternate, the means: what the machine itself does meanwhile shows in both.
    let mean = |tunnels: u32| {
        let rates = of_tandem().filter(|round| round.tunnels == tunnels);
        let rates: Vec<f64> = rates.map(|round| round.over_all.per_s).collect();
        (!rates.is_empty()).then(|| rates.iter().sum::<f64>() / rates.len() as f64)
    };
    if many > 1
        && let (Some(most), Some(single)) = (mean(many), mean(1))
    {
        let name = format!("{many} SAs against 1, packets/s");
        bars.push(Bar::at_least(name, most / single, 0.95));
    }
    let kib = |of: &str| format!("{many} tunnels, KiB per tunnel on {of}");
    bars.push(Bar::at_most(kib("owner"), most.owner_kib_each, 24.0));
    bars.push(Bar::at_most(kib("shadow"), most.shadow_kib_each, 24.0));
    let name = format!("{many} tunnels, takeover gap p99, ms");
    bars.push(Bar::at_most(name, most.takeover.gap_p99_ms, 500.0));
    bars
}

//! From cells to ratios and bars. A ratio is the median of the ratios within each round.

use crate::bench::contender::Contender::{self, *};
use crate::stats::{maximum, nearest_rank};
use serde::Serialize;
use std::collections::BTreeMap;

/// A figure that a round has of a contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cell {
    /// One stream out, Gb/s.
    Tcp1,
    /// One stream back, Gb/s.
    Tcp1Back,
    /// One stream out with cubic, the kernel's default, for congestion control, Gb/s.
    Tcp1Cubic,
    /// Eight streams out, Gb/s.
    Tcp8,
    /// Eight streams back, Gb/s.
    Tcp8Back,
    /// One stream out with `tx-udp-segmentation` off on the WAN, Gb/s.
    Tcp1WireOff,
    /// CPU-seconds per GB at the fixed rate.
    CpuFixed,
    /// CPU-seconds per GB of [`Cell::Tcp1`].
    CpuFull,
    /// User CPU of both gateways' workers in [`Cell::Tcp1`], against the AEAD's alone.
    CpuVsAead,
    /// The same with their time in the kernel.
    CpuVsAeadAll,
    /// Packets of 64 bytes a second with less than 0.1 % lost.
    Udp64,
    /// 512 bytes.
    Udp512,
    /// 1300 bytes.
    Udp1300,
    /// Reordered packets of a million, at these three rates.
    Reordered,
    /// Median of small requests, µs.
    LatencyP50,
    /// Their 99th percentile, µs.
    LatencyP99,
}

/// The figures of all rounds.
pub type Cells = BTreeMap<(Contender, Cell), BTreeMap<u32, f64>>;

/// A ratio over the rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the rounds.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Each round that has it.
    pub rounds: Vec<f64>,
}

impl Ratio {
    /// Of the values of the rounds; none for none.
    pub fn of(rounds: Vec<f64>) -> Option<Ratio> {
        let min = rounds.iter().copied().reduce(f64::min)?;
        Some(Ratio { median: nearest_rank(&rounds, 50.0), min, max: maximum(&rounds), rounds })
    }
}

/// The keys of the document's `ratios`, in order.
pub const KEYS: [&str; 14] = [
    "tcp1_vs_wireguard_go",
    "tcp1_vs_libipsec",
    "tcp1_vs_gotatun",
    "tcp1_vs_plain",
    "tcp1_wire_off_vs_wireguard_go",
    "cpu_vs_wireguard_go",
    "udp1300_vs_plain",
    "udp1300_vs_best",
    "pps64_vs_best",
    "ha_on_vs_off",
    "esp50_vs_udp",
    "cpu_vs_aead",
    "latency_added_us",
    "latency_added_low_latency_us",
];

/// Others, without a bar: their ranges stand in the document as well.
pub const MORE_KEYS: [&str; 5] = [
    "cpu_full_vs_wireguard_go",
    "tcp1_cubic_vs_wireguard_go",
    "tcp1_cubic_vs_libipsec",
    "tcp1_cubic_vs_gotatun",
    "tcp1_cubic_vs_plain",
];

/// One round's cells.
struct Round<'a> {
    cells: &'a Cells,
    round: u32,
}

impl Round<'_> {
    fn of(&self, contender: Contender, cell: Cell) -> Option<f64> {
        self.cells.get(&(contender, cell))?.get(&self.round).copied()
    }

    fn over(&self, cell: Cell, one: Contender, other: Contender) -> Option<f64> {
        divide(self.of(one, cell)?, self.of(other, cell)?)
    }

    /// Against the best of those that were measured.
    fn over_best(&self, cell: Cell, others: &[Contender]) -> Option<f64> {
        let best = others.iter().filter_map(|other| self.of(*other, cell)).reduce(f64::max)?;
        divide(self.of(Tandem, cell)?, best)
    }

    /// CPU above plain routing's.
    fn cpu_over(&self, cell: Cell, other: Contender) -> Option<f64> {
        let plain = self.of(Plain, cell)?;
        divide(self.of(Tandem, cell)? - plain, self.of(other, cell)? - plain)
    }

    fn latency_added(&self, one: Contender) -> Option<f64> {
        Some(self.of(one, Cell::LatencyP50)? - self.of(Plain, Cell::LatencyP50)?)
    }

    fn ratio(&self, key: &str) -> Option<f64> {
        let best = [Libipsec, WireguardGo, Gotatun];
        match key {
            "tcp1_vs_wireguard_go" => self.over(Cell::Tcp1, Tandem, WireguardGo),
            "tcp1_vs_libipsec" => self.over(Cell::Tcp1, Tandem, Libipsec),
            "tcp1_vs_gotatun" => self.over_best(Cell::Tcp1, &[Gotatun, Boringtun]),
            "tcp1_vs_plain" => self.over(Cell::Tcp1, Tandem, Plain),
            "tcp1_wire_off_vs_wireguard_go" => self.over(Cell::Tcp1WireOff, Tandem, WireguardGo),
            "tcp1_cubic_vs_wireguard_go" => self.over(Cell::Tcp1Cubic, Tandem, WireguardGo),
            "tcp1_cubic_vs_libipsec" => self.over(Cell::Tcp1Cubic, Tandem, Libipsec),
            "tcp1_cubic_vs_gotatun" => self.over(Cell::Tcp1Cubic, Tandem, Gotatun),
            "tcp1_cubic_vs_plain" => self.over(Cell::Tcp1Cubic, Tandem, Plain),
            "cpu_vs_wireguard_go" => self.cpu_over(Cell::CpuFixed, WireguardGo),
            "cpu_full_vs_wireguard_go" => self.cpu_over(Cell::CpuFull, WireguardGo),
            "udp1300_vs_plain" => self.over(Cell::Udp1300, Tandem, Plain),
            "udp1300_vs_best" => self.over_best(Cell::Udp1300, &best),
            "pps64_vs_best" => self.over_best(Cell::Udp64, &best),
            "ha_on_vs_off" => self.over(Cell::Tcp1, Tandem, HaOff),
            "esp50_vs_udp" => self.over(Cell::Tcp1, Esp50, Tandem),
            "cpu_vs_aead" => self.of(Tandem, Cell::CpuVsAead),
            "latency_added_us" => self.latency_added(Tandem),
            "latency_added_low_latency_us" => self.latency_added(LowLatency),
            _ => None,
        }
    }
}

/// A quotient; none where nothing was carried to divide by.
fn divide(one: f64, other: f64) -> Option<f64> {
    (other > 0.0).then(|| one / other)
}

/// The ratio `key` over the rounds that have what it needs.
pub fn ratio(cells: &Cells, rounds: u32, key: &str) -> Option<Ratio> {
    let values = (0..rounds).filter_map(|round| Round { cells, round }.ratio(key));
    Ratio::of(values.collect())
}

/// The median of a cell over its rounds.
pub fn median(cells: &Cells, contender: Contender, cell: Cell) -> Option<f64> {
    let values: Vec<f64> = cells.get(&(contender, cell))?.values().copied().collect();
    Some(nearest_rank(&values, 50.0))
}

/// What a ratio must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Want {
    /// At least the first; the second is hoped for.
    AtLeast(f64, Option<f64>),
    /// At most.
    AtMost(f64),
}

impl Want {
    fn holds(self, value: f64) -> bool {
        match self {
            Want::AtLeast(bar, _) => value >= bar,
            Want::AtMost(bar) => value <= bar,
        }
    }

    fn text(self) -> String {
        match self {
            Want::AtLeast(bar, Some(stretch)) => format!("≥ {bar} (hoped for: {stretch})"),
            Want::AtLeast(bar, None) => format!("≥ {bar}"),
            Want::AtMost(bar) => format!("≤ {bar}"),
        }
    }
}

/// The bars, each for a key.
pub const BARS: [(&str, &str, Want); 14] = [
    (
        "tcp1_vs_wireguard_go",
        "TCP, one stream, against wireguard-go",
        Want::AtLeast(2.5, Some(3.5)),
    ),
    (
        "tcp1_vs_libipsec",
        "the same against strongSwan kernel-libipsec",
        Want::AtLeast(18.0, Some(25.0)),
    ),
    ("tcp1_vs_gotatun", "against gotatun or boringtun, the better", Want::AtLeast(8.0, None)),
    ("tcp1_vs_plain", "against plain routing", Want::AtLeast(0.40, Some(0.50))),
    (
        "tcp1_wire_off_vs_wireguard_go",
        "with tx-udp-segmentation off on the wire, against wireguard-go",
        Want::AtLeast(2.0, None),
    ),
    (
        "cpu_vs_wireguard_go",
        "CPU-seconds per GB above plain routing, against wireguard-go",
        Want::AtMost(0.25),
    ),
    (
        "udp1300_vs_plain",
        "UDP 1300 bytes with < 0.1 % lost, against plain routing",
        Want::AtLeast(0.7, None),
    ),
    ("udp1300_vs_best", "the same against the best contender", Want::AtLeast(1.4, None)),
    (
        "pps64_vs_best",
        "UDP 64 bytes, packets a second, against the best contender",
        Want::AtLeast(1.5, None),
    ),
    (
        "cpu_vs_aead",
        "user CPU of both gateways' workers, against ring's seal + open of the same bytes",
        Want::AtMost(2.2),
    ),
    ("ha_on_vs_off", "HA on against off, goodput", Want::AtLeast(0.97, None)),
    ("esp50_vs_udp", "protocol 50 against UDP encapsulation", Want::AtLeast(0.4, None)),
    ("latency_added_us", "small requests, p50 added over plain routing, µs", Want::AtMost(60.0)),
    ("latency_added_low_latency_us", "the same with low_latency = true", Want::AtMost(60.0)),
];

/// One bar's outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What is measured.
    pub figure: &'static str,
    /// The ratio's key.
    pub key: &'static str,
    /// What it must be.
    pub bar: String,
    /// What it was.
    pub measured: String,
    /// Whether that is enough. What was not measured is not.
    pub pass: bool,
}

/// Judges every bar.
pub fn judge(cells: &Cells, rounds: u32) -> Vec<Row> {
    let row = |(key, figure, want): &(&'static str, &'static str, Want)| {
        let found = ratio(cells, rounds, key);
        let measured = found.as_ref().map_or("not measured".to_owned(), |ratio| {
            let Ratio { median, min, max, rounds } = ratio;
            let range = format!("{} ({} to {})", short(*median), short(*min), short(*max));
            match rounds.len() {
                1 => format!("{range} in 1 round"),
                count => format!("{range} in {count} rounds"),
            }
        });
        let pass = found.is_some_and(|ratio| want.holds(ratio.median));
        Row { figure, key, bar: want.text(), measured, pass }
    };
    BARS.iter().map(row).collect()
}

/// Three digits that count.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(figures: &[(Contender, Cell, &[f64])]) -> Cells {
        figures
            .iter()
            .map(|(contender, cell, values)| {
                ((*contender, *cell), (0..).zip(values.iter().copied()).collect())
            })
            .collect()
    }

    #[test]
    fn a_ratio_is_the_median_of_each_rounds_ratio() {
        // The ratio of the medians would be 3.
        let cells = cells(&[
            (Tandem, Cell::Tcp1, &[6.0, 2.0, 9.0]),
            (WireguardGo, Cell::Tcp1, &[1.0, 2.0, 3.0]),
        ]);
        let found = ratio(&cells, 3, "tcp1_vs_wireguard_go").unwrap();
        assert_eq!((found.median, found.min, found.max), (3.0, 1.0, 6.0));
        let other = ratio(&cells, 2, "tcp1_vs_wireguard_go").unwrap();
        assert_eq!(other.rounds, [6.0, 1.0]);
    }

    #[test]
    fn a_round_without_one_side_does_not_count() {
        let mut cells =
            cells(&[(Tandem, Cell::Tcp1, &[6.0, 2.0]), (Plain, Cell::Tcp1, &[10.0, 8.0])]);
        cells.get_mut(&(Plain, Cell::Tcp1)).unwrap().remove(&0);
        assert_eq!(ratio(&cells, 2, "tcp1_vs_plain").unwrap().rounds, [0.25]);
        assert_eq!(ratio(&cells, 2, "tcp1_vs_libipsec"), None);
    }

    #[test]
    fn the_best_is_the_rounds_best_and_plain_routing_is_no_contender() {
        let cells = cells(&[
            (Plain, Cell::Udp64, &[100.0]),
            (Tandem, Cell::Udp64, &[30.0]),
            (Libipsec, Cell::Udp64, &[10.0]),
            (Gotatun, Cell::Udp64, &[20.0]),
            (Tandem, Cell::Tcp1, &[8.0]),
            (Gotatun, Cell::Tcp1, &[1.0]),
            (Boringtun, Cell::Tcp1, &[2.0]),
        ]);
        assert_eq!(ratio(&cells, 1, "pps64_vs_best").unwrap().median, 1.5);
        assert_eq!(ratio(&cells, 1, "tcp1_vs_gotatun").unwrap().median, 4.0);
    }

    #[test]
    fn cpu_is_compared_above_plain_routing_and_latency_by_difference() {
        let cells = cells(&[
            (Plain, Cell::CpuFixed, &[1.0]),
            (Tandem, Cell::CpuFixed, &[3.0]),
            (WireguardGo, Cell::CpuFixed, &[9.0]),
            (Plain, Cell::LatencyP50, &[30.0]),
            (Tandem, Cell::LatencyP50, &[75.0]),
        ]);
        assert_eq!(ratio(&cells, 1, "cpu_vs_wireguard_go").unwrap().median, 0.25);
        assert_eq!(ratio(&cells, 1, "latency_added_us").unwrap().median, 45.0);
    }

    #[test]
    fn each_key_has_one_bar_and_is_computed_from_cells_alone() {
        let all = [
            Cell::Tcp1,
            Cell::Tcp1WireOff,
            Cell::CpuFixed,
            Cell::CpuVsAead,
            Cell::Udp64,
            Cell::Udp1300,
            Cell::LatencyP50,
        ];
        let mut cells = Cells::new();
        for (n, contender) in (1..).zip(Contender::ALL) {
            for cell in all {
                cells.insert((contender, cell), BTreeMap::from([(0, f64::from(n))]));
            }
        }
        for key in KEYS {
            assert!(ratio(&cells, 1, key).is_some(), "{key}");
            assert_eq!(BARS.iter().filter(|bar| bar.0 == key).count(), 1, "{key}");
        }
        assert_eq!(BARS.len(), KEYS.len());
    }

    #[test]
    fn a_bar_holds_at_its_edge_and_what_was_not_measured_fails() {
        let cells = cells(&[(Tandem, Cell::Tcp1, &[5.0]), (WireguardGo, Cell::Tcp1, &[2.0])]);
        let rows = judge(&cells, 1);
        let row = |key: &str| rows.iter().find(|row| row.key == key).unwrap();
        assert!(row("tcp1_vs_wireguard_go").pass);
        assert!(row("tcp1_vs_wireguard_go").measured.starts_with("2.50 (2.50 to 2.50)"));
        assert!(!row("tcp1_vs_plain").pass);
        assert_eq!(row("tcp1_vs_plain").measured, "not measured");
        assert!(!Want::AtMost(60.0).holds(60.1) && Want::AtMost(60.0).holds(60.0));
        assert!(!Want::AtLeast(2.5, Some(3.5)).holds(2.49));
    }
}

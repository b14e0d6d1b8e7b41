//! The JSON document of a run.

use crate::rounds::{Failure, Found, Record, Search};
use lab::bench::contender::Contender;
use lab::bench::profile::{Line, Profile};
use lab::bench::ratios::{self, KEYS, MORE_KEYS, Ratio, Row};
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub(crate) struct Document<'a> {
    machine: Machine,
    quick: bool,
    rounds: u32,
    seconds: f64,
    complete: bool,
    foreign_share: f64,
    contenders: Vec<Entry<'a>>,
    searches: &'a [Search],
    cells: &'a [Record],
    failures: &'a [Failure],
    ratios: BTreeMap<&'static str, Option<f64>>,
    ranges: BTreeMap<&'static str, Ratio>,
    bars: &'a [Row],
    profiles: Vec<Profiled>,
}

/// Where the time went in a contender's cell.
#[derive(Serialize)]
struct Profiled {
    contender: &'static str,
    cell: ratios::Cell,
    stages: Vec<Line>,
}

#[derive(Serialize)]
struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    /// TCP congestion control of the clients.
    congestion: String,
}

#[derive(Serialize)]
struct Entry<'a> {
    name: &'static str,
    about: &'static str,
    version: Option<&'a str>,
    skipped: Option<&'a str>,
}

impl Machine {
    fn here(congestion: Option<&str>) -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        Machine {
            cpu: model
                .map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':']))
                .to_owned(),
            cores: cores(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            congestion: congestion.map_or_else(
                || read("/proc/sys/net/ipv4/tcp_congestion_control").trim().to_owned(),
                str::to_owned,
            ),
        }
    }
}

/// How many processors there are.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// One line on where the figures come from.
pub(crate) fn note(rounds: u32, congestion: Option<&str>) -> String {
    let Machine { cpu, cores, kernel, congestion } = Machine::here(congestion);
    format!(
        "Medians of {rounds} rounds; client, two gateways and client share {cores} cores ({cpu}, Linux {kernel}, TCP {congestion})"
    )
}

pub(crate) fn document<'a>(
    quick: bool,
    rounds: u32,
    contenders: &[Contender],
    found: &'a Found,
    bars: &'a [Row],
    congestion: Option<&str>,
) -> Document<'a> {
    let ratio = |key: &'static str| (key, ratios::ratio(&found.cells, rounds, key));
    let ranges: BTreeMap<_, _> =
        KEYS.iter().chain(&MORE_KEYS).filter_map(|key| Some((*key, ratio(key).1?))).collect();
    let entry = |contender: &Contender| Entry {
        name: contender.name(),
        about: contender.about(),
        version: found.versions.get(contender).map(String::as_str),
        skipped: found.skipped.get(contender).map(String::as_str),
    };
    let profiled = |((contender, cell), profile): (&(Contender, ratios::Cell), &Profile)| {
        Profiled { contender: contender.name(), cell: *cell, stages: profile.lines() }
    };
    Document {
        machine: Machine::here(congestion),
        quick,
        rounds,
        seconds: found.seconds,
        complete: found.failures.is_empty(),
        foreign_share: found.foreign_share(),
        contenders: contenders.iter().map(entry).collect(),
        searches: &found.searches,
        cells: &found.records,
        failures: &found.failures,
        ratios: KEYS.iter().map(|key| (*key, ranges.get(key).map(|r: &Ratio| r.median))).collect(),
        ranges,
        bars,
        profiles: found.profiles.iter().map(profiled).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_ratio_and_null_where_none_was_measured() {
        let mut found = Found::default();
        found.cells.insert((Contender::Tandem, ratios::Cell::Tcp1), BTreeMap::from([(0, 6.0)]));
        found.cells.insert((Contender::Plain, ratios::Cell::Tcp1), BTreeMap::from([(0, 12.0)]));
        found.skipped.insert(Contender::Esp50, "refused".into());
        let bars = ratios::judge(&found.cells, 1);
        let all = Contender::ALL;
        let value = serde_json::to_value(document(true, 1, &all, &found, &bars, None)).unwrap();
        let of = value["ratios"].as_object().unwrap();
        assert_eq!(of.len(), KEYS.len());
        assert_eq!(of["tcp1_vs_plain"], 0.5);
        assert!(of["tcp1_vs_libipsec"].is_null());
        assert_eq!(value["ranges"]["tcp1_vs_plain"]["max"], 0.5);
        let skipped = |name: &str| {
            let list = value["contenders"].as_array().unwrap();
            list.iter().find(|entry| entry["name"] == name).unwrap()["skipped"].clone()
        };
        assert_eq!(skipped("tandem-esp50"), "refused");
        assert!(skipped("tandem").is_null());
    }
}

//! `bench`: measures Tandem's data plane side by side with what users would pick instead.
//!
//! Every contender stands in the same network (`lab::bench::net`), one after the other; who begins changes with each round.
//! UDP rates are searched once, before the first round, and confirmed in each. With `--json`, standard output is one
//! document:
//!
//! ```json
//! {"machine":{"cpu":"…","cores":2,"kernel":"6.18"},"quick":false,"rounds":7,"seconds":3300.1,"complete":true,"foreign_share":0.0,
//!  "contenders":[{"name":"tandem","about":"…","version":"…","skipped":null}],
//!  "searches":[{"contender":"tandem","size":64,"packets_s":210000.0}],
//!  "cells":[{"round":0,"contender":"tandem","cell":"tcp1","value":5.5,"detail":{…}}],
//!  "failures":[{"round":0,"contender":"…","why":"…"}],
//!  "ratios":{"tcp1_vs_wireguard_go":2.9},
//!  "ranges":{"tcp1_vs_wireguard_go":{"median":2.9,"min":2.7,"max":3.0,"rounds":[2.9]}},
//!  "bars":[{"figure":"…","key":"…","bar":"≥ 2.5","measured":"…","pass":true}],
//!  "profiles":[{"contender":"tandem","cell":"tcp1","stages":[{"stage":"…","cpu_s_per_gb":0.2,"share":0.1}]}]}
//! ```
//! A ratio that was not measured is null. `cells` has the units of `lab::bench::ratios::Cell`. Exit code 0: every turn of
//! every round was played; with `--check` also every bar passed.

mod document;
mod rounds;

use clap::{Parser, ValueEnum};
use lab::Error;
use lab::bench::contender::{Contender, Programs};
use lab::bench::{ratios, report};
use lab::error::write_file;
use lab::run::Run;
use lab::tandem::Bins;
use rounds::{Failure, Found, Group, Lengths, Wishes};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Measures Tandem's data plane side by side with what users would pick instead")]
struct Args {
    /// Three short rounds (at most 15 minutes) instead of seven long ones (at most 60)
    #[arg(long)]
    quick: bool,
    /// How many rounds [default: 7, with --quick 3]
    #[arg(long)]
    rounds: Option<u32>,
    /// Only these contenders: names with commas between them
    #[arg(long, value_delimiter = ',', value_parser = Contender::parse)]
    only: Vec<Contender>,
    /// Tell where the time goes, by perf (some per cent slower): Tandem's `tcp1` and `fixed`, one round, unless said otherwise
    #[arg(long)]
    profile: bool,
    /// Only these cells (the bars that need others are missed)
    #[arg(long, value_delimiter = ',', value_enum)]
    cells: Vec<Group>,
    /// Print one JSON document on standard output; the table goes to standard error
    #[arg(long)]
    json: bool,
    /// Fail when a bar is missed
    #[arg(long)]
    check: bool,
    /// Write the chart (SVG) to this file
    #[arg(long)]
    chart: Option<PathBuf>,
    /// The rate at which CPU time is compared, Mb/s of TCP payload; who does not carry it is not compared
    #[arg(long, default_value_t = 1000)]
    fixed_mbps: u64,
    /// The clients' TCP congestion control [default: the machine's]
    #[arg(long)]
    congestion: Option<String>,
    /// Where tandemd and tandem are [default: beside this program]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// The folder whose bin/ has wireguard-go, gotatun and boringtun-cli
    #[arg(long)]
    tools: PathBuf,
    /// Keep logs
    #[arg(long)]
    keep_files: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match measure(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> lab::Result<bool> {
    let programs =
        Programs { bins: Bins::find(args.bin_dir.as_deref())?, tools: args.tools.clone() };
    let lengths = if args.quick { Lengths::QUICK } else { Lengths::FULL };
    let rounds = args.rounds.unwrap_or(match (args.profile, args.quick) {
        (true, _) => 1,
        (false, true) => 3,
        (false, false) => 7,
    });
    let mut contenders = Contender::ALL.to_vec();
    if !args.only.is_empty() {
        contenders.retain(|contender| args.only.contains(contender));
    } else if args.profile {
        contenders = vec![Contender::Tandem];
    }
    let run = Run::start(Some(lengths.bound))?;
    if args.keep_files {
        run.keep_files();
    }
    let groups = match args.cells.as_slice() {
        [] if args.profile => &[Group::Tcp1, Group::Fixed],
        [] => Group::value_variants(),
        some => some,
    };
    let congestion = args.congestion.as_deref();
    let wishes = Wishes {
        lengths: &lengths,
        fixed_mbps: args.fixed_mbps,
        groups,
        congestion,
        profile: args.profile,
    };
    let found = rounds::play(&run, &programs, &contenders, rounds, &wishes)?;
    if !found.failures.is_empty() {
        run.keep_files();
    }
    let rows = ratios::judge(&found.cells, rounds);
    let document = document::document(args.quick, rounds, &contenders, &found, &rows, congestion);
    let note = document::note(rounds, congestion);
    if let Some(path) = &args.chart {
        write_file(path, report::chart(&found.cells, &contenders, &note))?;
        eprintln!("wrote {}", path.display());
    }
    if args.json {
        let text = serde_json::to_string(&document)
            .map_err(|error| Error::parse("the document", error.to_string()))?;
        println!("{text}");
        eprint!("{}", summary(&found, &contenders, &rows, &note));
    } else {
        print!("{}", summary(&found, &contenders, &rows, &note));
    }
    let passed = rows.iter().all(|row| row.pass);
    Ok(found.failures.is_empty() && (passed || !args.check))
}

/// The table, what is missing in it, and the bars.
fn summary(found: &Found, contenders: &[Contender], rows: &[ratios::Row], note: &str) -> String {
    let mut text = report::table(&found.cells, contenders);
    for (contender, reason) in &found.skipped {
        let _ = writeln!(text, "skipped  {}: {reason}", contender.name());
    }
    for Failure { round, contender, why } in &found.failures {
        let _ = writeln!(text, "failed  {contender} in round {}: {why}", round + 1);
    }
    if found.profiles.is_empty() {
        text.push_str(&report::bars(rows));
    }
    for ((contender, cell), profile) in &found.profiles {
        let _ = writeln!(text, "\n{}, {cell:?}:\n{}", contender.name(), profile.table());
    }
    let share = found.foreign_share();
    if share > 0.02 {
        let percent = share * 100.0;
        let _ = writeln!(
            text,
            "Other processes took {percent:.0} % of the machine while TCP was measured: do not trust these figures"
        );
    }
    let _ = writeln!(text, "{note}");
    text
}

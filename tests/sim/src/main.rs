//! `cargo run --release -p sim -- --seeds 1000`: see `--help`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

/// Simulates the pair with faults, and checks the invariants of ha.md after every step.
#[derive(Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Replay one seed and print what happens.
    #[arg(long)]
    seed: Option<u64>,
    /// With a deliberate mistake (see --bugs for their names).
    #[arg(long)]
    bug: Option<String>,
    /// Proves that every deliberate mistake is caught, within --seeds seeds each.
    #[arg(long)]
    bugs: bool,
    /// Go on with new seeds for this long instead.
    #[arg(long)]
    minutes: Option<u64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let bug = match args.bug.as_deref().map(|name| (name, sim::bugs::named(name))) {
        Some((name, None)) => {
            let names: Vec<&str> = sim::bugs::ALL.iter().map(|(name, _, _)| *name).collect();
            eprintln!("no mistake is named {name}; there is: {}", names.join(", "));
            return ExitCode::from(2);
        }
        Some((_, bug)) => bug,
        None => None,
    };
    let failed = if let Some(seed) = args.seed {
        sim::log::set_verbose(true);
        let outcome = sim::run(seed, bug);
        match &outcome {
            Ok(outcome) => println!("{outcome:?}"),
            Err((invariant, why)) => println!("seed {seed}: invariant {invariant}: {why}"),
        }
        println!("{} passed, {} failed", u8::from(outcome.is_ok()), u8::from(outcome.is_err()));
        outcome.is_err()
    } else if args.bugs {
        catch_all(args.first, args.seeds)
    } else {
        run_all(&args, bug)
    };
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn run_all(args: &Args, bug: Option<sim::bugs::Bug>) -> bool {
    let began = Instant::now();
    let end = args.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let (mut passed, mut failed) = (0_u64, 0_u64);
    let mut total = sim::Outcome::default();
    let (mut excused, mut excused_by) = (0_u64, [0_u64; 2]);
    let mut said = began;
    let with = args.bug.as_ref().map(|name| format!(" --bug {name}")).unwrap_or_default();
    for seed in args.first.. {
        match end {
            Some(end) if began.elapsed() >= end => break,
            None if seed >= args.first + args.seeds => break,
            _ => {}
        }
        match sim::run(seed, bug) {
            Ok(outcome) => {
                passed += 1;
                total.time += outcome.time;
                total.steps += outcome.steps;
                total.faults += outcome.faults;
                total.esp_packets += outcome.esp_packets;
                total.ike_messages += outcome.ike_messages;
                excused += u64::from(outcome.excuses.iter().any(|steps| *steps > 0));
                for (seeds, steps) in excused_by.iter_mut().zip(outcome.excuses) {
                    *seeds += u64::from(steps > 0);
                }
            }
            Err((invariant, why)) => {
                failed += 1;
                println!("seed {seed} failed: invariant {invariant}: {why}");
                println!("    replay: cargo run --release -p sim -- --seed {seed}{with}");
            }
        }
        if said.elapsed() >= Duration::from_secs(10) {
            said = Instant::now();
            println!(
                "{} seeds, {failed} failed, {:.0} s",
                passed + failed,
                began.elapsed().as_secs_f64()
            );
        }
    }
    println!(
        "{:.1} h of virtual time, {} faults, {} ESP packets and {} IKE messages checked, {} steps, {:.0} s",
        total.time as f64 / 3.6e12,
        total.faults,
        total.esp_packets,
        total.ike_messages,
        total.steps,
        began.elapsed().as_secs_f64(),
    );
    let [cut, stopped] = excused_by;
    println!(
        "{excused} seeds had two senders that were excused: {cut} by a cut, {stopped} by a clock that stood still"
    );
    println!("{passed} passed, {failed} failed");
    failed > 0
}

fn catch_all(first: u64, seeds: u64) -> bool {
    let (mut caught, mut missed) = (0, 0);
    for (name, breaks, bug) in sim::bugs::ALL {
        let listed = breaks.iter().map(u8::to_string).collect::<Vec<_>>().join(" or ");
        // Caught is what violates a listed invariant with the mistake, and passes without it.
        let mut others = BTreeMap::<u8, u64>::new();
        let found = (first..first + seeds).find_map(|seed| {
            let (invariant, why) = sim::run(seed, Some(*bug)).err()?;
            if !breaks.contains(&invariant) {
                *others.entry(invariant).or_default() += 1;
                return None;
            }
            sim::run(seed, None).is_ok().then_some((seed, invariant, why))
        });
        let others: String = others
            .iter()
            .map(|(other, times)| format!(" ({times} seeds showed {other})"))
            .collect();
        match found {
            Some((seed, invariant, why)) => {
                caught += 1;
                println!(
                    "{name} (breaks {listed}): caught by seed {seed} after {} seeds, as {invariant}: {why}{others}",
                    seed - first + 1
                );
            }
            None => {
                missed += 1;
                println!("{name} (breaks {listed}): NOT caught within {seeds} seeds{others}");
            }
        }
    }
    println!("{caught} passed, {missed} failed");
    missed > 0
}

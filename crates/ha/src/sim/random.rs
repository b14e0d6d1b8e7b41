//! Thousands of seeds.

use super::world::{Fault, MS, Rng, Us, World};
use crate::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// One random fault, and what ends it.
fn draw_fault(world: &mut World, rng: &mut Rng, at: Us) {
    let host = rng.below(2) as usize;
    let most = if rng.chance(30) { 3000 * MS } else { 300 * MS };
    let long = 10 * MS + rng.below(most);
    let cut = |link, towards| {
        let begin = Fault::Cut { link, towards, cut: true };
        let end = Fault::Cut { link, towards, cut: false };
        vec![(0, begin), (long, end)]
    };
    let endpoint = rng.below(u64::from(world.endpoints)) as u8;
    let link = Some(rng.below(2) as u8);
    let lose_terms = rng.chance(10);
    let start = Fault::Start { host, lose_terms };
    let steps = match rng.below(20) {
        0..=2 => vec![(0, Fault::Kill(host)), (long, start)],
        3 => vec![(0, Fault::PowerOff(host)), (long, start)],
        4..=5 => vec![(0, Fault::Pause(host, long))],
        6 => cut(None, None),
        7..=8 => cut(None, Some(host)),
        9 => cut(link, None),
        10 => cut(link, Some(host)),
        11 => vec![(0, Fault::Loss(1 + rng.below(25))), (long, Fault::Loss(0))],
        12 => {
            let delay = Fault::Delay(rng.below(3 * MS), 1 + rng.below(8 * MS));
            vec![(0, delay), (long, Fault::Delay(300, 200))]
        }
        13 => vec![(0, Fault::Duplicate(30)), (long, Fault::Duplicate(0))],
        14 => vec![
            (0, Fault::SlowShadow(50 * MS + rng.below(900 * MS))),
            (long, Fault::SlowShadow(0)),
        ],
        15 => vec![(0, Fault::Busy(host, rng.below(60 * MS))), (long, Fault::Busy(host, 0))],
        16 => {
            let (down, up) =
                (Fault::Uplink(host, endpoint, false), Fault::Uplink(host, endpoint, true));
            vec![(0, down), (long, up)]
        }
        17 => vec![(0, Fault::Switchover(endpoint))],
        18 => vec![
            (0, Fault::Stall(rng.below(150 * MS))),
            (rng.below(20 * MS), Fault::Switchover(endpoint)),
            (long, Fault::Stall(0)),
        ],
        _ => vec![(0, Fault::Goodbye(host)), (long, start)],
    };
    for (after, fault) in steps {
        world.fault_at(at + after, fault);
    }
}

fn world(seed: u64, bug: Bug) -> (World, Rng) {
    let mut rng = Rng(seed ^ 0x5eed);
    let mut world = World::new(seed, 1 + rng.below(2) as u8, bug);
    world.slow_counters = 5;
    world.builds = Some(Rng(seed ^ 0xb011d));
    for host in 0..2 {
        world.hosts[host].rate = 900 + rng.below(201);
    }
    for host in 0..2 {
        let at = world.now + rng.below(300 * MS);
        world.fault_at(at, Fault::Start { host, lose_terms: false });
    }
    (world, rng)
}

/// Faults over each other, then peace; it must converge.
fn storm(seed: u64, bug: Bug, verbose: bool) {
    let (mut world, mut rng) = world(seed, bug);
    world.verbose = verbose;
    let mut at = world.now + 500 * MS + rng.below(1000 * MS);
    let faults = 3 + rng.below(12);
    let calm = rng.chance(50);
    for _ in 0..faults {
        draw_fault(&mut world, &mut rng, at);
        at += rng.below(if calm { 2500 * MS } else { 400 * MS });
    }
    world.run_until(at + 3100 * MS);
    for fault in [
        Fault::Cut { link: None, towards: None, cut: false },
        Fault::Loss(0),
        Fault::Delay(300, 200),
        Fault::SlowShadow(0),
        Fault::Stall(0),
        Fault::Duplicate(0),
        Fault::Busy(0, 0),
        Fault::Busy(1, 0),
    ] {
        world.fault(fault);
    }
    for host in 0..2 {
        world.fault(Fault::Resume(host));
        world.fault(Fault::Start { host, lose_terms: false });
        for endpoint in 0..world.endpoints {
            world.fault(Fault::Uplink(host, endpoint, true));
        }
    }
    // Boot wait, a lag, the backoff after a lag (1, 2, 4, … s) and a snapshot.
    let bound = world.now + 40_000 * MS;
    while !world.converged() {
        if world.now >= bound {
            world.fail("no convergence");
        }
        world.run_for(200 * MS);
    }
    world.run_for(500 * MS);
    if !world.converged() {
        world.fail("convergence did not last");
    }
}

/// Whether endpoint 0 could be served from here.
fn passes(world: &World, host: usize) -> bool {
    let h = &world.hosts[host];
    let open = |pair: &Pair| world.local(host) < pair.fence(EndpointId(0));
    !h.paused && h.pair.as_ref().is_some_and(open) && h.gateway[0].own.is_some()
}

/// One fault while in sync: nothing that was committed is lost.
fn single(seed: u64, bug: Bug, verbose: bool) {
    let (mut world, mut rng) = world(seed, bug);
    world.verbose = verbose;
    world.run_for(2500 * MS + rng.below(1000 * MS));
    if !world.converged() {
        world.fail("not in sync before the fault");
    }
    let at = world.now + rng.below(50 * MS);
    let host = rng.below(2) as usize;
    let long = 10 * MS + rng.below(1500 * MS);
    let link = Some(rng.below(2) as u8);
    let start = Fault::Start { host, lose_terms: rng.chance(20) };
    let cut = |link, towards| {
        vec![
            (0, Fault::Cut { link, towards, cut: true }),
            (long, Fault::Cut { link, towards, cut: false }),
        ]
    };
    let steps = match rng.below(10) {
        0..=2 => vec![(0, Fault::Kill(host)), (long, start)],
        3 => vec![(0, Fault::PowerOff(host)), (long, start)],
        4 => vec![(0, Fault::Pause(host, long))],
        5 => cut(None, Some(host)),
        6 => cut(link, None),
        7 => vec![(0, Fault::Switchover(0))],
        8 => vec![(0, Fault::Uplink(host, 0, false)), (long, Fault::Uplink(host, 0, true))],
        _ => vec![(0, Fault::Goodbye(host)), (long, start)],
    };
    let kind = steps[0].1.clone();
    // At most this long nobody may send, in ms of true time; clocks are up to 10 % off.
    let most = match (&kind, passes(&world, host)) {
        (Fault::Kill(_), true) => 30,
        (Fault::PowerOff(_) | Fault::Pause(..), true) => 130,
        // Towards the other: its fence closes first, then the other takes over.
        (Fault::Cut { link: None, .. }, false) => 60,
        (Fault::Switchover(_) | Fault::Uplink(..), _) => 12,
        (Fault::Goodbye(_), true) => 12,
        _ => 1,
    };
    for (after, fault) in steps {
        world.fault_at(at + after, fault);
    }
    let (mut silent, mut longest) = (0, 0);
    while world.now < at + long + 500 * MS {
        world.run_for(MS);
        silent = if passes(&world, 0) || passes(&world, 1) { 0 } else { silent + 1 };
        longest = longest.max(silent);
    }
    if longest > most {
        world.fail(&format!("nobody could send for {longest} ms, at most {most}: {kind:?}"));
    }
    world.run_until(at + long + 4000 * MS);
    if !world.converged() {
        world.fail("no convergence after one fault");
    }
    // What is still on its way may hide an older value.
    world.workload = false;
    world.run_for(300 * MS);
    world.check_nothing_lost();
    if world.ledger.mismatches > 0 {
        world.fail("digests differed");
    }
}

fn run(seed: u64, bug: Bug, verbose: bool) {
    if seed % 4 == 3 { single(seed, bug, verbose) } else { storm(seed, bug, verbose) }
}

fn setting(name: &str) -> Option<u64> {
    // A test may read the environment; the product may not.
    #[allow(clippy::disallowed_methods)]
    std::env::var(name).ok()?.parse().ok()
}

/// Runs a seed; the message of what it found.
fn found(seed: u64, bug: Bug) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| run(seed, bug, false))).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some(text.unwrap_or_else(|| "a panic in the product".into()))
}

/// `HA_SIM_SEEDS` seeds from `HA_SIM_FROM`; `HA_SIM_SEED` replays one, with its story.
#[test]
fn seeds() {
    if let Some(seed) = setting("HA_SIM_SEED") {
        return run(seed, Bug::None, true);
    }
    let from = setting("HA_SIM_FROM").unwrap_or(0);
    for seed in from..from + setting("HA_SIM_SEEDS").unwrap_or(300) {
        if let Some(what) = found(seed, Bug::None) {
            panic!("seed {seed} failed; replay it with HA_SIM_SEED={seed}\n{what}");
        }
    }
}

/// Each deliberate bug is found, and as a breach of the invariant that it belongs to.
#[test]
fn deliberate_bugs_are_found() {
    let bugs = [
        (Bug::TermReuse, "invariant 1"),
        (Bug::TermParity, "invariant 1"),
        (Bug::LeaseBeforeAck, "invariant 2"),
        (Bug::UsurperForgotten, "invariant 2"),
        (Bug::FenceByTurnAlone, "invariant 3"),
        (Bug::FenceWithoutListening, "invariant 3"),
        (Bug::AloneTooLong, "invariant 3"),
        (Bug::FenceOpenInGrant, "invariant 3"),
        (Bug::GrantAfterRefusal, "invariant 3"),
        (Bug::IgnoreHigherTerm, "invariant 3"),
        (Bug::CommitBeforeAck, "invariant 4"),
        (Bug::AckBeforeApply, "invariant 4"),
        (Bug::SoloBeforeEcho, "invariant 4"),
        (Bug::OldLogAcked, "invariant 4"),
        (Bug::EmptyBeatsLiving, "invariant"),
        (Bug::HealInOldTerm, "healing"),
        (Bug::PutLost, "digest"),
        (Bug::DigestIgnored, "invariant 7"),
    ];
    let most = setting("HA_SIM_BUG_SEEDS").unwrap_or(600);
    for (bug, invariant) in bugs {
        let drawn = super::drawn::found(bug);
        let seeds =
            (0..most).filter_map(|seed| Some(format!("seed {seed}: {}", found(seed, bug)?)));
        let hit = drawn.into_iter().chain(seeds).find_map(|what| {
            let line = what.lines().next().unwrap_or_default();
            line.contains(invariant).then(|| println!("{bug:?}: {line}"))
        });
        assert!(hit.is_some(), "{bug:?} was not found in {most} seeds");
    }
}

//! Trials with one endpoint: the owner is hurt, or the standby.
//!
//! The document has a key for every kind of trial (`kill`, `stop`, `switchover`,
//! `rejoin`, `standby-kill`, `standby-stop`):
//!
//! ```json
//! {"kill":{"trials":50,"gap_p50_ms":9.1,"gap_p99_ms":40.2,"gap_max_ms":40.2,"lost_max":41,"sent":1000000,
//!          "spis_changed":0,"tcp_broken":0,"packets_checked":2300000,"iv_repeats":0,
//!          "reordered_max":0,"ike_exchanges":0,"tcp_connections":100,"clear_text":0,"arp_claims":0,
//!          "sent_after_thaw":0,"frames_checked":4600000,
//!          "failed":0,"stood_still":0,"spis_compared":200,"marks_seen":50}}
//! ```
//! Numbers ending in `_ms` are milliseconds, percentiles are nearest-rank, everything else counts over all
//! trials of the kind (`…_max`: the worst trial). `trials` counts the measured ones and `failed` those that did not recover within
//! 10 s, after which the network is built anew. `stood_still` are trials that lost packets while the machine itself stood still
//! for a heartbeat interval or longer (`lab::stall`): played again and not counted, at most one of ten (of fewer, one); what must
//! never be seen is never excused so. `marks_seen` proves the capture that `ike_exchanges` is counted in.

use crate::series::{Found, Stage, series};
use crate::{Args, print_document, random_phase, tenth};
use lab::check::IvChecker;
use lab::clock;
use lab::run::Run;
use lab::scene::{Scene, Setup};
use lab::stall::StallWatch;
use lab::stats::{maximum, nearest_rank};
use lab::tandem::{Bins, Daemon};
use lab::trial::{Kind, Outcome, run_trial};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default, Serialize)]
struct Summary {
    trials: u64,
    gap_p50_ms: f64,
    gap_p99_ms: f64,
    gap_max_ms: f64,
    lost_max: u64,
    sent: u64,
    spis_changed: u64,
    tcp_broken: u64,
    packets_checked: u64,
    iv_repeats: u64,
    reordered_max: u64,
    ike_exchanges: u64,
    tcp_connections: u64,
    clear_text: u64,
    arp_claims: u64,
    sent_after_thaw: u64,
    frames_checked: u64,
    failed: u64,
    stood_still: u64,
    spis_compared: u64,
    marks_seen: u64,
}

impl Summary {
    fn of(found: &Found<Outcome>) -> Summary {
        let outcomes = &found.outcomes;
        let gaps: Vec<f64> = outcomes.iter().map(|outcome| clock::millis(outcome.gap())).collect();
        let sum =
            |value: fn(&Outcome) -> u64| outcomes.iter().map(value).fold(0, u64::saturating_add);
        let max = |value: fn(&Outcome) -> u64| outcomes.iter().map(value).max().unwrap_or(0);
        Summary {
            trials: outcomes.len() as u64,
            gap_p50_ms: tenth(nearest_rank(&gaps, 50.0)),
            gap_p99_ms: tenth(nearest_rank(&gaps, 99.0)),
            gap_max_ms: tenth(maximum(&gaps)),
            lost_max: max(Outcome::lost),
            sent: sum(Outcome::sent),
            spis_changed: sum(|outcome| outcome.spis_changed),
            tcp_broken: sum(|outcome| outcome.tcp_broken),
            packets_checked: found.packets_checked,
            iv_repeats: found.iv_repeats,
            reordered_max: max(Outcome::reordered),
            ike_exchanges: sum(|outcome| outcome.ike_exchanges),
            tcp_connections: sum(|outcome| outcome.tcp_connections),
            clear_text: sum(|outcome| outcome.clear_text),
            arp_claims: sum(|outcome| outcome.arp_claims),
            sent_after_thaw: sum(|outcome| outcome.sent_after_thaw),
            frames_checked: sum(|outcome| outcome.frames),
            failed: found.failed,
            stood_still: found.stood_still,
            spis_compared: sum(|outcome| outcome.spis_compared),
            marks_seen: sum(|outcome| outcome.marks_seen),
        }
    }

    /// What must never be seen, whatever the times.
    fn faults(&self) -> u64 {
        [
            self.failed,
            self.ike_exchanges,
            self.spis_changed,
            self.tcp_broken,
            self.iv_repeats,
            self.clear_text,
            self.arp_claims,
            self.sent_after_thaw,
        ]
        .iter()
        .fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// One owner.
struct Owned<'r> {
    run: &'r Run,
    bins: &'r Bins,
    setup: &'r Setup,
}

impl Stage for Owned<'_> {
    type Scene = Scene;
    type Kind = Kind;
    type Outcome = Outcome;

    fn build(&self, say: &mut dyn FnMut(&str)) -> lab::Result<Scene> {
        Scene::build(self.run, self.bins, self.setup, say)
    }

    fn play(&self, scene: &mut Scene, kind: Kind, _: u32) -> lab::Result<Outcome> {
        run_trial(self.run, scene, kind, random_phase(), &mut |_, _| {})
    }

    fn tell(&self, _: &Scene, outcome: &Outcome) -> String {
        let losses = match outcome.lost() {
            0 => String::new(),
            _ => format!("\n      lost: {}; dropped: {:?}", outcome.losses, outcome.drops),
        };
        format!(
            "{} → {}, gap {:.1} ms, lost {} of {}, reordered {}, SPIs changed {}, exchanges {}, TCP broken {}{losses}",
            outcome.owner_before,
            outcome.owner_after,
            clock::millis(outcome.gap()),
            outcome.lost(),
            outcome.sent(),
            outcome.reordered(),
            outcome.spis_changed,
            outcome.ike_exchanges,
            outcome.tcp_broken
        )
    }

    fn judge(&self, _: &Scene, outcome: &Outcome) -> lab::Result<()> {
        outcome.judge()
    }

    fn stood_still(&self, outcome: &Outcome, stalls: &StallWatch) -> Option<Duration> {
        outcome.stood_still(stalls)
    }

    fn forget(&self, scene: &Scene, outcome: &Outcome) {
        scene.udp.forget(outcome.event.saturating_sub(Duration::from_secs(5)));
    }

    fn look(&self, scene: &mut Scene) -> lab::Result<()> {
        scene.look(self.run)?.discard();
        Ok(())
    }

    fn key(&self, kind: Kind) -> &'static str {
        kind.key()
    }

    fn ivs<'s>(&self, scene: &'s Scene) -> &'s IvChecker {
        &scene.ivs
    }

    fn instances<'s>(&self, scene: &'s Scene) -> &'s [Daemon; 2] {
        &scene.instances
    }
}

pub(crate) fn trials(
    args: &Args,
    run: &Run,
    bins: &Bins,
    setup: &Setup,
    kinds: &[Kind],
) -> lab::Result<u64> {
    let stage = Owned { run, bins, setup };
    let mut scene = stage.build(&mut |line| eprintln!("  {line}"))?;
    let stalls = StallWatch::start()?;
    let mut summaries = BTreeMap::new();
    for kind in kinds {
        let (same, found) = series(args, run, &stage, scene, &stalls, *kind)?;
        scene = same;
        summaries.insert(kind.key(), Summary::of(&found));
    }
    scene.check_clean()?;
    if args.json {
        print_document(&summaries)?;
    } else {
        table(kinds, &summaries);
    }
    Ok(summaries.values().map(Summary::faults).fold(0, u64::saturating_add))
}

fn table(kinds: &[Kind], summaries: &BTreeMap<&str, Summary>) {
    println!(
        "{:<26}{:>7}{:>9}{:>9}{:>9}{:>10}{:>10}{:>7}{:>6}{:>12}{:>8}",
        "",
        "trials",
        "p50 ms",
        "p99 ms",
        "max ms",
        "lost max",
        "sent",
        "SPIs",
        "TCP",
        "IVs checked",
        "repeats"
    );
    for kind in kinds {
        let Some(s) = summaries.get(kind.key()) else { continue };
        println!(
            "{:<26}{:>7}{:>9.1}{:>9.1}{:>9.1}{:>10}{:>10}{:>7}{:>6}{:>12}{:>8}",
            kind.title(),
            s.trials,
            s.gap_p50_ms,
            s.gap_p99_ms,
            s.gap_max_ms,
            s.lost_max,
            s.sent,
            s.spis_changed,
            s.tcp_broken,
            s.packets_checked,
            s.iv_repeats
        );
    }
}

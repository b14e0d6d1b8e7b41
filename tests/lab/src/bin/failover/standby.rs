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

use crate::{Args, IvCount, excused, keep_evidence, print_document, random_phase, tenth};
use lab::clock;
use lab::run::Run;
use lab::scene::{Scene, Setup};
use lab::stall::StallWatch;
use lab::stats::{maximum, nearest_rank};
use lab::tandem::Bins;
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
    fn of(outcomes: &[Outcome], failed: u64, (packets_checked, iv_repeats): (u64, u64)) -> Summary {
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
            packets_checked,
            iv_repeats,
            reordered_max: max(Outcome::reordered),
            ike_exchanges: sum(|outcome| outcome.ike_exchanges),
            tcp_connections: sum(|outcome| outcome.tcp_connections),
            clear_text: sum(|outcome| outcome.clear_text),
            arp_claims: sum(|outcome| outcome.arp_claims),
            sent_after_thaw: sum(|outcome| outcome.sent_after_thaw),
            frames_checked: sum(|outcome| outcome.frames),
            failed,
            stood_still: 0,
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

pub(crate) fn trials(
    args: &Args,
    run: &Run,
    bins: &Bins,
    setup: &Setup,
    kinds: &[Kind],
) -> lab::Result<u64> {
    let mut scene = Scene::build(run, bins, setup, &mut |line| eprintln!("  {line}"))?;
    let stalls = StallWatch::start()?;
    let mut summaries = BTreeMap::new();
    for kind in kinds {
        let mut seen = IvCount::of(&scene.ivs);
        let mut counted = (0, 0);
        let mut failed = 0;
        let mut stood_still = 0;
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut trial = 0;
        while trial < args.trials {
            trial += 1;
            let logged = scene.instances.each_ref().map(|instance| instance.log().len());
            let outcome = match run_trial(run, &mut scene, *kind, random_phase(), &mut |_, _| {}) {
                Ok(outcome) => outcome,
                Err(error) => {
                    failed += 1;
                    eprintln!("  {} {trial}/{}: FAILED: {error}", kind.key(), args.trials);
                    seen.add_to(&scene.ivs, &mut counted);
                    run.keep_files();
                    drop(scene);
                    run.clear_namespaces();
                    scene = Scene::build(run, bins, setup, &mut |_| {})?;
                    seen = IvCount::of(&scene.ivs);
                    continue;
                }
            };
            eprintln!(
                "  {} {trial}/{}: {} → {}, gap {:.1} ms, lost {} of {}, reordered {}, SPIs changed {}, exchanges {}, \
                 TCP broken {}",
                kind.key(),
                args.trials,
                outcome.owner_before,
                outcome.owner_after,
                clock::millis(outcome.gap()),
                outcome.lost(),
                outcome.sent(),
                outcome.reordered(),
                outcome.spis_changed,
                outcome.ike_exchanges,
                outcome.tcp_broken
            );
            if outcome.lost() > 0 {
                eprintln!("      lost: {}; dropped: {:?}", outcome.losses, outcome.drops);
            }
            if let Err(problem) = outcome.judge() {
                eprintln!("      FAILED: {problem}");
                keep_evidence(run, &scene.instances, &format!("{}-{trial}", kind.key()), logged)?;
                if let Some(pause) = outcome.stood_still(&stalls)
                    && stood_still < excused(args.trials)
                {
                    eprintln!(
                        "      not counted, played again: the machine stood still for {:.0} ms",
                        clock::millis(pause)
                    );
                    stood_still += 1;
                    trial -= 1;
                    scene.udp.forget(outcome.event.saturating_sub(Duration::from_secs(5)));
                    continue;
                }
            }
            scene.udp.forget(outcome.event.saturating_sub(Duration::from_secs(5)));
            outcomes.push(outcome);
        }
        scene.look(run)?.discard();
        seen.add_to(&scene.ivs, &mut counted);
        let summary =
            Summary { stood_still: stood_still.into(), ..Summary::of(&outcomes, failed, counted) };
        summaries.insert(kind.key(), summary);
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

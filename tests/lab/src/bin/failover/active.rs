//! Trials with two endpoints: left and right are hurt in turn.
//!
//! The document has a key for every kind of trial (`kill`, `stop`, `switchover`, `restart`, `rejoin`), with the numbers of a trial with one endpoint (see `standby.rs`), of which `gap_…`
//! and `lost_max` tell of the flows that meet the hurt instance, and these:
//!
//! ```json
//! {"others_lost":0,"others_sent":20000,"home_lost_max":0,"home_reordered_max":0,"home_max_s":4.1,
//!  "flows_moved":0,"others_moved":0,"unmoved":0,"strayed":0,"packets_placed":100000,"tcp_reordered":0,
//!  "back_gap_max_ms":9.1,"back_lost_max":4}
//! ```
//! `others_lost`: packets lost of flows that do not meet it. `home_…`: on the way home. `flows_moved`, `others_moved`: flows of
//! the hurt endpoint, and of the other, that were seen in the other's tunnel, by the packets that tshark opened
//! (`packets_placed`); with `withdraw` the former do move, or stand in `unmoved`. `strayed`: flows that were not in their own tunnel at the end.
//! `tcp_reordered`: segments of the bulk stream that came out of order. `back_…`: what the peer sent, through the tunnel that
//! it chose; where endpoints are withdrawn it is judged by nothing else. There is no `marks_seen`: the captured ESP proves the
//! capture.

use crate::series::{Found, Stage, series};
use crate::{Args, print_document, random_phase, tenth};
use lab::active::outcome::Leg;
use lab::active::trial::watched;
use lab::active::{Active, Event, OnFailure, Outcome};
use lab::capture::Recording;
use lab::check::IvChecker;
use lab::run::Run;
use lab::stall::StallWatch;
use lab::stats::{maximum, nearest_rank};
use lab::tandem::{Bins, Daemon};
use lab::{Error, clock};
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
    others_lost: u64,
    others_sent: u64,
    home_lost_max: u64,
    home_reordered_max: u64,
    home_max_s: f64,
    sent: u64,
    flows_moved: u64,
    others_moved: u64,
    unmoved: u64,
    strayed: u64,
    packets_placed: u64,
    spis_changed: u64,
    tcp_broken: u64,
    packets_checked: u64,
    iv_repeats: u64,
    reordered_max: u64,
    tcp_reordered: u64,
    back_gap_max_ms: f64,
    back_lost_max: u64,
    ike_exchanges: u64,
    tcp_connections: u64,
    clear_text: u64,
    arp_claims: u64,
    sent_after_thaw: u64,
    frames_checked: u64,
    failed: u64,
    stood_still: u64,
    spis_compared: u64,
}

impl Summary {
    fn of(found: &Found<Outcome>) -> Summary {
        let outcomes = &found.outcomes;
        let ms = |value: fn(&Outcome) -> Duration| -> Vec<f64> {
            outcomes.iter().map(|outcome| clock::millis(value(outcome))).collect()
        };
        let gaps = ms(|o| o.away.gap());
        let sum =
            |value: fn(&Outcome) -> u64| outcomes.iter().map(value).fold(0, u64::saturating_add);
        let max = |value: fn(&Outcome) -> u64| outcomes.iter().map(value).max().unwrap_or(0);
        let judged = |leg: &Leg| leg.lost() + leg.others_lost();
        let home_lost = outcomes.iter().map(|o| judged(&o.home)).max().unwrap_or(0);
        Summary {
            trials: outcomes.len() as u64,
            gap_p50_ms: tenth(nearest_rank(&gaps, 50.0)),
            gap_p99_ms: tenth(nearest_rank(&gaps, 99.0)),
            gap_max_ms: tenth(maximum(&gaps)),
            lost_max: max(|o| o.away.lost()),
            others_lost: sum(|o| o.away.others_lost()),
            others_sent: sum(|o| o.away.others_sent()),
            home_lost_max: home_lost,
            home_reordered_max: max(|o| o.home.reordered()),
            home_max_s: tenth(maximum(&ms(|o| o.home_after)) / 1e3),
            sent: sum(Outcome::sent),
            flows_moved: sum(Outcome::flows_moved),
            others_moved: sum(Outcome::others_moved),
            unmoved: sum(|o| o.unmoved),
            strayed: sum(|o| o.strayed),
            packets_placed: sum(|o| o.placed),
            spis_changed: sum(|o| o.spis_changed),
            tcp_broken: sum(|o| o.tcp_broken),
            packets_checked: found.packets_checked,
            iv_repeats: found.iv_repeats,
            reordered_max: max(|o| o.away.reordered()),
            tcp_reordered: sum(|o| o.away.tcp_reordered + o.home.tcp_reordered),
            back_gap_max_ms: tenth(maximum(&ms(|o| o.away.back_gap().max(o.home.back_gap())))),
            back_lost_max: max(|o| o.away.back_lost() + o.home.back_lost()),
            ike_exchanges: sum(Outcome::ike_exchanges),
            tcp_connections: sum(|o| o.tcp_connections),
            clear_text: sum(|o| o.clear_text),
            arp_claims: sum(|o| o.arp_claims),
            sent_after_thaw: sum(|o| o.sent_after_thaw),
            frames_checked: sum(|o| o.frames),
            failed: found.failed,
            stood_still: found.stood_still,
            spis_compared: sum(|o| o.spis_compared),
        }
    }

    /// What must never be seen, whatever the times: trials that it was seen in, IV repeats and what did not recover.
    fn faults(&self, outcomes: &[Outcome]) -> u64 {
        let spoilt = outcomes.iter().filter(|outcome| outcome.judge_safety().is_err()).count();
        self.failed + self.iv_repeats + spoilt as u64
    }
}

/// Left and right in turn.
struct Turns<'r> {
    run: &'r Run,
    bins: &'r Bins,
    on_failure: OnFailure,
}

impl Stage for Turns<'_> {
    type Scene = Active;
    type Kind = Event;
    type Outcome = Outcome;

    fn build(&self, say: &mut dyn FnMut(&str)) -> lab::Result<Active> {
        Active::stage(self.run, self.bins, self.on_failure, say)
    }

    fn play(&self, scene: &mut Active, event: Event, number: u32) -> lab::Result<Outcome> {
        let hurt = 1 - number as usize % 2;
        watched(self.run, scene, event, hurt, random_phase(), &mut |_, _| {})
    }

    fn tell(&self, scene: &Active, outcome: &Outcome) -> String {
        format!("{}: {}", scene.instances[outcome.hurt].name, outcome.tell())
    }

    fn judge(&self, scene: &Active, outcome: &Outcome) -> lab::Result<()> {
        let flows = || outcome.tell_flows(&scene.flows);
        outcome.judge().map_err(|problem| Error::check(format!("{problem} ({})", flows())))
    }

    fn stood_still(&self, outcome: &Outcome, stalls: &StallWatch) -> Option<Duration> {
        outcome.stood_still(stalls)
    }

    fn forget(&self, scene: &Active, outcome: &Outcome) {
        scene.forget(outcome.away.from);
    }

    fn look(&self, scene: &mut Active) -> lab::Result<()> {
        scene.look(self.run).map(Recording::discard)
    }

    fn key(&self, event: Event) -> &'static str {
        event.key()
    }

    fn ivs<'s>(&self, scene: &'s Active) -> &'s IvChecker {
        &scene.ivs
    }

    fn instances<'s>(&self, scene: &'s Active) -> &'s [Daemon; 2] {
        &scene.instances
    }
}

pub(crate) fn trials(args: &Args, run: &Run, bins: &Bins, events: &[Event]) -> lab::Result<u64> {
    let stage = Turns { run, bins, on_failure: args.on_failure };
    let mut scene = stage.build(&mut |line| eprintln!("  {line}"))?;
    let stalls = StallWatch::start()?;
    let mut summaries = BTreeMap::new();
    let mut faults = 0;
    for event in events {
        let (same, found) = series(args, run, &stage, scene, &stalls, *event)?;
        scene = same;
        let summary = Summary::of(&found);
        faults += summary.faults(&found.outcomes);
        summaries.insert(event.key(), summary);
    }
    scene.check_clean()?;
    if args.json {
        print_document(&summaries)?;
    } else {
        table(events, &summaries);
    }
    Ok(faults)
}

fn table(events: &[Event], summaries: &BTreeMap<&str, Summary>) {
    println!(
        "{:<26}{:>7}{:>9}{:>9}{:>9}{:>10}{:>10}{:>10}{:>7}{:>7}{:>6}{:>6}{:>12}{:>8}",
        "",
        "trials",
        "p50 ms",
        "p99 ms",
        "max ms",
        "lost max",
        "others'",
        "home max",
        "moved",
        "others",
        "SPIs",
        "TCP",
        "IVs checked",
        "repeats"
    );
    for event in events {
        let Some(s) = summaries.get(event.key()) else { continue };
        println!(
            "{:<26}{:>7}{:>9.1}{:>9.1}{:>9.1}{:>10}{:>10}{:>10}{:>7}{:>7}{:>6}{:>6}{:>12}{:>8}",
            event.title(),
            s.trials,
            s.gap_p50_ms,
            s.gap_p99_ms,
            s.gap_max_ms,
            s.lost_max,
            s.others_lost,
            s.home_lost_max,
            s.flows_moved,
            s.others_moved,
            s.spis_changed,
            s.tcp_broken,
            s.packets_checked,
            s.iv_repeats
        );
    }
}

//! The demo with two endpoints, a tunnel at each: an instance is killed, comes back, its endpoint goes home; then the other
//! is drained and taken back into service.

use crate::{Args, Peer, Stage, close_up, keep, tell};
use lab::active::outcome::Leg;
use lab::active::trial::{Moment, watched};
use lab::active::{Active, ENDPOINTS, Event as What, Outcome, RATE};
use lab::probe::Way;
use lab::report::{CLOUD_PLANNED_MS, CLOUD_UNPLANNED_MS, Event, Page};
use lab::run::Run;
use lab::tandem::Bins;
use lab::{Error, clock};
use std::time::Duration;

pub(crate) fn play(args: &Args, run: &Run, bins: &Bins, stage: &mut Stage) -> lab::Result<bool> {
    if args.peer != Peer::Strongswan {
        return Err(Error::check("--mode active-active has the plain strongSwan peer only"));
    }
    stage.say("Building the stage");
    let say = &mut |line: &str| stage.say(&format!("  · {line}"));
    let mut scene = Active::stage(run, bins, args.on_failure, say)?;
    let peer = scene.peer.version()?;
    let begin = clock::now();
    let mut events = Vec::new();

    let killed = act(run, &mut scene, stage, What::Kill)?;
    for event in [kill(&scene, begin, &killed), rejoin(&scene, begin, &killed)] {
        stage.count(&event);
        events.push(event);
    }
    let drained = act(run, &mut scene, stage, What::Drain)?;
    let event = switchover(&scene, begin, &drained);
    stage.count(&event);
    events.push(event);
    let clean = killed.judge_safety().is_ok() && drained.judge_safety().is_ok();
    scene.look(run)?.discard();
    let page = page_of(&scene, &peer, begin, events);
    tell(args, stage, &peer, &page)?;
    scene.check_clean()?;
    if args.keep {
        let more = [
            scene.instances[0].tandem_line("flows"),
            scene.instances[0].tandem_line("drain"),
            scene.instances[0].tandem_line("undrain"),
            scene.peer.swanctl_line("--list-sas"),
        ];
        let Active { instances, net, flows, .. } = &mut scene;
        keep(stage, instances, net, &more, |before| {
            flows.iter().for_each(|flow| flow.udp.forget(before));
        })?;
    }
    Ok(clean)
}

/// Left is killed, right is drained.
fn act(run: &Run, scene: &mut Active, stage: &mut Stage, what: What) -> lab::Result<Outcome> {
    let hurt = usize::from(what != What::Kill);
    let mut since = clock::now();
    watched(run, scene, what, hurt, 0.5, &mut |scene, moment| {
        match (moment, what) {
            (Moment::Hurt, What::Kill) => {
                stage.say("\nAct 1: kill -9 one of the two instances, which both carry traffic");
            }
            (Moment::Home, What::Kill) => {
                stage.say("\nAct 2: it comes back, and its endpoint goes home");
            }
            (Moment::Hurt, _) => stage.say("\nAct 3: the other is drained, as for an upgrade"),
            (Moment::Home, _) => stage.say("  … and taken back into service"),
            (Moment::Tick, _) => {}
        }
        if !matches!(moment, Moment::Tick) {
            since = clock::now();
        }
        stage.pulse(since, |from, to| {
            let rate = |way| arrivals(scene, way, from, to).len();
            let bits = scene.tcp.as_ref().map_or(0.0, |tcp| tcp.rate(from, to));
            (rate(Way::Out), rate(Way::In), bits)
        });
    })
}

/// What all flows brought, one way.
fn arrivals(scene: &Active, way: Way, from: Duration, to: Duration) -> Vec<(u64, u64)> {
    scene.flows.iter().flat_map(|flow| flow.udp.arrivals(way, from, to)).collect()
}

/// What an event has of its trial and of one of its legs.
fn event_of(scene: &Active, begin: Duration, outcome: &Outcome, leg: &Leg) -> Event {
    Event {
        kind: String::new(),
        title: String::new(),
        story: String::new(),
        at_s: leg.from.saturating_sub(begin).as_secs_f64(),
        gap_ms: clock::millis(leg.gap()),
        lost: leg.lost() + leg.others_lost(),
        sent: leg.sent(),
        spis_changed: outcome.spis_changed,
        ike_exchanges: leg.ike_exchanges,
        tcp_survived: outcome.tcp_broken == 0,
        flows_moved: Some(leg.flows_moved + leg.others_moved),
        promise_ms: None,
        close: Way::BOTH.map(|way| close_up(leg.from, |from, to| arrivals(scene, way, from, to))),
    }
}

/// The names of the instance that was hurt, its endpoint, and the other instance.
fn names<'a>(scene: &'a Active, outcome: &Outcome) -> (&'a str, &'static str, &'a str) {
    let (hurt, other) = (outcome.hurt, 1 - outcome.hurt);
    (&scene.instances[hurt].name, ENDPOINTS[hurt].0, &scene.instances[other].name)
}

fn kill(scene: &Active, begin: Duration, outcome: &Outcome) -> Event {
    let (hurt, endpoint, other) = names(scene, outcome);
    let story = if outcome.withdraws {
        format!(
            "{hurt} was killed; {other} sends endpoint {endpoint}'s flows through its own tunnel"
        )
    } else {
        format!("{hurt} was killed; {other} carries endpoint {endpoint} beside its own")
    };
    Event {
        kind: "kill".into(),
        title: outcome.event.title().into(),
        story,
        promise_ms: Some(CLOUD_UNPLANNED_MS),
        ..event_of(scene, begin, outcome, &outcome.away)
    }
}

fn rejoin(scene: &Active, begin: Duration, outcome: &Outcome) -> Event {
    let (hurt, endpoint, _) = names(scene, outcome);
    let after = outcome.home_after.as_secs_f64();
    Event {
        kind: "rejoin".into(),
        title: "it returns, and so do flows".into(),
        story: format!(
            "{hurt} is back; endpoint {endpoint} was at home, all in sync, after {after:.1} s"
        ),
        ..event_of(scene, begin, outcome, &outcome.home)
    }
}

/// Both legs: there and back.
fn switchover(scene: &Active, begin: Duration, outcome: &Outcome) -> Event {
    let (hurt, endpoint, other) = names(scene, outcome);
    let story = if outcome.withdraws {
        format!(
            "{hurt}'s tunnel ended, {other} took its flows; then it came up anew, and they went back"
        )
    } else {
        format!("{hurt} gave endpoint {endpoint} to {other}, and got it back")
    };
    let away = event_of(scene, begin, outcome, &outcome.away);
    let home = event_of(scene, begin, outcome, &outcome.home);
    Event {
        kind: "switchover".into(),
        title: outcome.event.title().into(),
        story,
        gap_ms: away.gap_ms.max(home.gap_ms),
        lost: away.lost + home.lost,
        sent: away.sent + home.sent,
        ike_exchanges: away.ike_exchanges + home.ike_exchanges,
        flows_moved: Some(outcome.flows_moved() + outcome.others_moved()),
        promise_ms: Some(CLOUD_PLANNED_MS),
        ..away
    }
}

fn page_of(scene: &Active, peer: &str, begin: Duration, events: Vec<Event>) -> Page {
    let (bucket, end) = (Duration::from_millis(20), clock::now());
    let packets = Way::BOTH.map(|way| {
        let each = scene.flows.iter().map(|flow| flow.udp.series(way, begin, end, bucket));
        each.reduce(|sum, more| sum.iter().zip(more).map(|(a, b)| a + b).collect())
            .unwrap_or_default()
    });
    let rate = RATE * scene.flows.len() as u32;
    Page {
        intro: format!(
            "A real {peer} gateway held two IPsec tunnels to a Tandem pair, one at each instance, and traffic ran through \
             both at once. One instance was killed with SIGKILL and came back; then the other was drained, as for an \
             upgrade. Throughout, four flows of {RATE} numbered UDP packets a second ran each way, beside a bulk TCP stream \
             and an idle TCP connection."
        ),
        rate,
        bucket,
        packets,
        tcp: scene.tcp.as_ref().map(|tcp| tcp.series(begin, end, bucket)).unwrap_or_default(),
        events,
        ivs: (scene.ivs.checked, scene.ivs.iv_repeats),
    }
}

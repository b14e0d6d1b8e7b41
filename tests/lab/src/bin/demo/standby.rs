//! The demo with one endpoint: its owner is killed, comes back, and takes over again as planned.

use crate::{Args, Peer, Stage, close_up, keep, tell};
use lab::clock;
use lab::probe::Way;
use lab::report::{CLOUD_PLANNED_MS, CLOUD_UNPLANNED_MS, Event, Page};
use lab::run::Run;
use lab::scene::{PeerKind, Remote, Scene, Setup};
use lab::tandem::Bins;
use lab::trial::{self, Kind, Outcome};
use std::time::Duration;

pub(crate) fn play(args: &Args, run: &Run, bins: &Bins, stage: &mut Stage) -> lab::Result<bool> {
    let peer = match args.peer {
        Peer::Strongswan => PeerKind::Strongswan,
        Peer::Kernel => PeerKind::Kernel,
        Peer::Tandem => PeerKind::Tandem,
    };
    stage.say("Building the stage");
    let setup = Setup { peer, ..Setup::default() };
    let mut scene = Scene::build(run, bins, &setup, &mut |line| stage.say(&format!("  · {line}")))?;
    let name = scene.remote.describe()?;
    let begin = clock::now();

    let mut outcomes = Vec::new();
    for kind in [Kind::Kill, Kind::Rejoin, Kind::Switchover] {
        stage.say(&format!("\n{}", headline(kind)));
        let outcome = trial::hurt(run, &mut scene, kind, 0.5, &mut |scene, event| {
            stage.pulse(event, |from, to| {
                let rate = |way| scene.udp.arrivals(way, from, to).len();
                (rate(Way::Out), rate(Way::In), scene.tcp.rate(from, to))
            });
        })?;
        let outcome = if kind == Kind::Kill {
            survivor(&mut scene, outcome)?
        } else {
            trial::heal(&mut scene, outcome)?
        };
        stage.count(&event_of(&scene, begin, &outcome));
        outcomes.push(outcome);
    }
    scene.look(run)?.discard();
    let page = page_of(&scene, &name, begin, clock::now(), &outcomes);
    let clean = outcomes.iter().all(|outcome| {
        outcome.spis_changed == 0
            && outcome.ike_exchanges == 0
            && outcome.tcp_broken == 0
            && outcome.clear_text == 0
            && outcome.arp_claims == 0
    });
    tell(args, stage, &name, &page)?;
    scene.check_clean()?;
    if args.keep {
        let mut more = vec![scene.instances[0].tandem_line("failover")];
        if let Remote::Strongswan(charon) = &scene.remote {
            more.push(charon.swanctl_line("--list-sas"));
        }
        let Scene { instances, net, udp, .. } = &mut scene;
        keep(stage, instances, net, &more, |before| udp.forget(before))?;
    }
    Ok(clean)
}

/// After the kill only the survivor is there: it must own.
fn survivor(scene: &mut Scene, mut outcome: Outcome) -> lab::Result<Outcome> {
    for instance in &mut scene.instances {
        if instance.is_running() && instance.status()?.main().role == "owner" {
            outcome.owner_after = instance.name.clone();
        }
    }
    lab::error::ensure(
        outcome.owner_after != outcome.owner_before && !outcome.owner_after.is_empty(),
        || "nobody owns the endpoint after the kill".into(),
    )?;
    Ok(outcome)
}

fn headline(kind: Kind) -> &'static str {
    match kind {
        Kind::Kill => "Act 1: kill -9 the instance that serves the tunnel",
        Kind::Rejoin => "Act 2: the dead instance comes back",
        _ => "Act 3: a planned switchover",
    }
}

fn story(outcome: &Outcome) -> String {
    match outcome.kind {
        Kind::Kill => {
            format!("{} was killed; {} carried on", outcome.owner_before, outcome.owner_after)
        }
        Kind::Rejoin => {
            let synced = outcome
                .synced_after
                .map_or_else(String::new, |after| format!(" after {:.1} s", after.as_secs_f64()));
            format!(
                "it rejoined as standby and was in sync{synced}; {} still serves",
                outcome.owner_after
            )
        }
        _ => format!("{} handed over to {}", outcome.owner_before, outcome.owner_after),
    }
}

fn event_of(scene: &Scene, begin: Duration, outcome: &Outcome) -> Event {
    Event {
        kind: outcome.kind.key().into(),
        title: outcome.kind.title().into(),
        story: story(outcome),
        at_s: outcome.event.saturating_sub(begin).as_secs_f64(),
        gap_ms: clock::millis(outcome.gap()),
        lost: outcome.lost(),
        sent: outcome.sent(),
        spis_changed: outcome.spis_changed,
        ike_exchanges: outcome.ike_exchanges,
        tcp_survived: outcome.tcp_broken == 0,
        flows_moved: None,
        promise_ms: match outcome.kind {
            Kind::Kill => Some(CLOUD_UNPLANNED_MS),
            Kind::Switchover => Some(CLOUD_PLANNED_MS),
            _ => None,
        },
        close: Way::BOTH
            .map(|way| close_up(outcome.event, |from, to| scene.udp.arrivals(way, from, to))),
    }
}

fn page_of(
    scene: &Scene,
    peer: &str,
    begin: Duration,
    end: Duration,
    outcomes: &[Outcome],
) -> Page {
    let bucket = Duration::from_millis(20);
    Page {
        intro: format!(
            "A real {peer} gateway held one IPsec tunnel to a Tandem pair. The instance that served it was killed with \
             SIGKILL, came back, and then the tunnel was moved on purpose. Throughout, 1,000 numbered UDP packets a second \
             flowed each way, beside a bulk TCP stream and an idle TCP connection."
        ),
        rate: 1000,
        bucket,
        packets: Way::BOTH.map(|way| scene.udp.series(way, begin, end, bucket)),
        tcp: scene.tcp.series(begin, end, bucket),
        events: outcomes.iter().map(|outcome| event_of(scene, begin, outcome)).collect(),
        ivs: (scene.ivs.checked, scene.ivs.iv_repeats),
    }
}

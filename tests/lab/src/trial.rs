//! One fault, measured: what issue 2 calls a trial.
//!
//! The gap is the longest silence at a receiver, in the worse direction, from the event to the end of the
//! trial; no recovery within 10 s fails the trial. Lost is sent − received in both directions, tail included.
//! SPIs come from the peer, exchanges from a capture at the peer, 1 s before to 10 s after.

use crate::charon::Spis;
use crate::check;
use crate::clock;
use crate::error::{Result, ensure, ensure_zero};
use crate::net;
use crate::probe::{Measure, Way};
use crate::run::Run;
use crate::scene::{PATIENCE, Scene, grown};
use crate::stall::StallWatch;
use crate::wait;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// What is done to the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Kind {
    /// SIGKILL of the owner.
    Kill,
    /// SIGSTOP of the owner, SIGCONT two seconds later.
    Stop,
    /// A planned change of owner.
    Switchover,
    /// The dead instance comes back.
    Rejoin,
    /// SIGKILL of the standby.
    StandbyKill,
    /// SIGSTOP of the standby, SIGCONT two seconds later.
    StandbyStop,
}

impl Kind {
    /// All, in the order of the table.
    pub const ALL: [Kind; 6] = [
        Kind::Kill,
        Kind::Stop,
        Kind::Switchover,
        Kind::Rejoin,
        Kind::StandbyKill,
        Kind::StandbyStop,
    ];

    /// The key in JSON: the flag's spelling.
    pub fn key(self) -> &'static str {
        match self {
            Kind::Kill => "kill",
            Kind::Stop => "stop",
            Kind::Switchover => "switchover",
            Kind::Rejoin => "rejoin",
            Kind::StandbyKill => "standby-kill",
            Kind::StandbyStop => "standby-stop",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Kill => "kill -9 of the owner",
            Kind::Stop => "SIGSTOP of the owner",
            Kind::Switchover => "planned switchover",
            Kind::Rejoin => "the dead instance returns",
            Kind::StandbyKill => "kill -9 of the standby",
            Kind::StandbyStop => "SIGSTOP of the standby",
        }
    }
}

/// How long a trial watches after its event: the window in which exchanges count.
pub const OBSERVE: Duration = Duration::from_secs(10);
/// When a stopped instance goes on.
const THAW_AFTER: Duration = Duration::from_secs(2);

/// What a trial found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was done.
    pub kind: Kind,
    /// Who owned before.
    pub owner_before: String,
    /// Who owned afterwards.
    pub owner_after: String,
    /// When.
    pub event: Duration,
    /// The end of the trial.
    pub end: Duration,
    /// Packets from the endpoint's side to the peer's.
    pub out: Measure,
    /// The other way.
    pub back: Measure,
    /// SPIs that are not the same at the peer.
    pub spis_changed: u64,
    /// SPIs there were to compare.
    pub spis_compared: u64,
    /// IKE exchanges at the peer, 1 s before to 10 s after.
    pub ike_exchanges: u64,
    /// Marked datagrams that the capture which these are counted in did show; without any, no exchange would have
    /// been seen either.
    pub marks_seen: u64,
    /// TCP connections that did not survive.
    pub tcp_broken: u64,
    /// TCP connections there were.
    pub tcp_connections: u64,
    /// Unprotected packets between protected networks on the WAN since the last trial.
    pub clear_text: u64,
    /// ARP packets in which the hurt host claimed a virtual address although it did not own it.
    pub arp_claims: u64,
    /// Packets that a stopped owner sent, on WAN and LAN, after SIGCONT.
    pub sent_after_thaw: u64,
    /// Frames captured on WAN and LAN that these counts looked at.
    pub frames: u64,
    /// For a rejoin: how long until both were in sync.
    pub synced_after: Option<Duration>,
    /// Packets that instances which lived throughout say they dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Where losses fell, in words.
    pub losses: String,
}

impl Outcome {
    /// Whether the trial kept every bar that holds for one trial of its kind.
    pub fn judge(&self) -> Result<()> {
        self.judge_safety()?;
        let gap = clock::millis(self.gap());
        let bar = match self.kind {
            Kind::Kill => 150.0,
            Kind::Stop => 400.0,
            _ => f64::INFINITY,
        };
        ensure(gap <= bar, || format!("{}: gap {gap:.1} ms, bar {bar} ms", self.kind.title()))?;
        let may_lose = matches!(self.kind, Kind::Kill | Kind::Stop);
        let zeros = [
            ("packets lost", if may_lose { 0 } else { self.lost() }),
            ("packets reordered", if self.kind == Kind::Switchover { self.reordered() } else { 0 }),
        ];
        ensure_zero(self.kind.title(), &zeros)
    }

    /// The part of [`Outcome::judge`] that no slow machine excuses.
    pub fn judge_safety(&self) -> Result<()> {
        ensure_zero(
            self.kind.title(),
            &[
                ("SPIs changed", self.spis_changed),
                ("IKE exchanges", self.ike_exchanges),
                ("TCP connections broken", self.tcp_broken),
                ("packets in clear", self.clear_text),
                ("ARP claims of the hurt host", self.arp_claims),
                ("packets sent after SIGCONT", self.sent_after_thaw),
            ],
        )
    }

    /// How long the machine itself stood still about the longest silence, if that explains what was lost: then the trial
    /// says nothing about a pair on two hosts. What must never be seen is never explained.
    pub fn stood_still(&self, stalls: &StallWatch) -> Option<Duration> {
        let worse = if self.out.gap >= self.back.gap { &self.out } else { &self.back };
        self.judge_safety().ok()?;
        stalls.explains(worse.gap_start, worse.gap)
    }

    /// The longest silence, in the worse direction.
    pub fn gap(&self) -> Duration {
        self.out.gap.max(self.back.gap)
    }

    /// Packets lost both ways.
    pub fn lost(&self) -> u64 {
        self.out.lost() + self.back.lost()
    }

    /// Packets sent both ways.
    pub fn sent(&self) -> u64 {
        self.out.sent + self.back.sent
    }

    /// Packets out of order both ways.
    pub fn reordered(&self) -> u64 {
        self.out.reordered + self.back.reordered
    }
}

/// A hook that is called while a trial watches, with the trial's event time: for live displays.
pub type Watch<'a> = &'a mut dyn FnMut(&Scene, Duration);

/// Runs one trial and leaves the scene healed: both instances run and are in sync. `phase` (0 to 1) is where in
/// the pair's rhythm the event falls.
pub fn run_trial(
    run: &Run,
    scene: &mut Scene,
    kind: Kind,
    phase: f64,
    watch: Watch<'_>,
) -> Result<Outcome> {
    let outcome = hurt(run, scene, kind, phase, watch)?;
    heal(scene, outcome)
}

/// The instance that owns, for a trial to start from. A rejoin needs a dead instance: if both live, the owner is
/// killed first, which is no part of the trial.
fn find_owner(scene: &mut Scene, kind: Kind) -> Result<usize> {
    if kind != Kind::Rejoin {
        return scene.wait_synced(PATIENCE);
    }
    let dead = scene.instances.iter_mut().position(|instance| !instance.is_running());
    let dead = match dead {
        Some(dead) => dead,
        None => {
            let owner = scene.wait_synced(PATIENCE)?;
            scene.instances[owner].kill9()?;
            owner
        }
    };
    scene.instances[dead].bury()?;
    wait::until("the survivor to own", PATIENCE, Duration::from_millis(10), || {
        Ok((scene.instances[1 - dead].status()?.main().role == "owner").then_some(()))
    })?;
    Ok(1 - dead)
}

/// Brings a dead instance back, waits until both are in sync, and judges who owns now.
pub fn heal(scene: &mut Scene, mut outcome: Outcome) -> Result<Outcome> {
    for instance in &mut scene.instances {
        if !instance.is_running() {
            instance.bury()?;
            instance.start()?;
        }
    }
    let owner = scene.wait_synced(PATIENCE)?;
    outcome.owner_after = scene.instances[owner].name.clone();
    let moves = matches!(outcome.kind, Kind::Kill | Kind::Stop | Kind::Switchover);
    ensure((outcome.owner_after != outcome.owner_before) == moves, || {
        format!(
            "{}: owner was {}, is {}",
            outcome.kind.title(),
            outcome.owner_before,
            outcome.owner_after
        )
    })?;
    Ok(outcome)
}

/// One trial up to its measurement; what was killed stays dead until [`heal`].
pub fn hurt(
    run: &Run,
    scene: &mut Scene,
    kind: Kind,
    phase: f64,
    watch: Watch<'_>,
) -> Result<Outcome> {
    let owner = find_owner(scene, kind)?;
    scene.udp.wait_flowing(PATIENCE)?;
    let before = scene.remote.spis()?;
    scene.look(run)?.discard();
    mark(scene)?;

    let hurt = match kind {
        Kind::Kill | Kind::Stop | Kind::Switchover => owner,
        Kind::Rejoin | Kind::StandbyKill | Kind::StandbyStop => 1 - owner,
    };
    let drops_before = scene.drops();
    // One second of peace for the exchange count, then anywhere within five heartbeats.
    let start = clock::now()
        + Duration::from_secs(1)
        + Duration::from_millis(100).mul_f64(phase.clamp(0.0, 1.0));
    clock::sleep_until(start);
    let event = clock::now();
    match kind {
        Kind::Kill | Kind::StandbyKill => scene.instances[hurt].kill9()?,
        Kind::Stop | Kind::StandbyStop => scene.instances[hurt].freeze()?,
        Kind::Switchover => scene.instances[hurt].tandem(&["failover"]).map(drop)?,
        Kind::Rejoin => scene.instances[hurt].spawn()?,
    }
    let recovered = watch_until_flowing(scene, event, watch);
    let mut thawed = None;
    let end = event + OBSERVE;
    let mut synced_after = None;
    while clock::now() < end {
        if kind == Kind::Rejoin
            && synced_after.is_none()
            && scene.wait_synced(Duration::ZERO).is_ok()
        {
            synced_after = Some(clock::now() - event);
        }
        if matches!(kind, Kind::Stop | Kind::StandbyStop)
            && thawed.is_none()
            && clock::now() >= event + THAW_AFTER
        {
            thawed = Some(clock::now());
            scene.instances[hurt].thaw()?;
        }
        watch(scene, event);
        clock::sleep_until((clock::now() + Duration::from_millis(50)).min(end));
    }
    if let Err(error) = recovered {
        scene.dump(run);
        return Err(crate::Error::check(format!(
            "{error}: {}; dropped since: {:?}",
            scene.udp.tell_silence(event),
            grown(&drops_before, &scene.drops())
        )));
    }
    scene.udp.settle(end)?;
    scene.udp.check_alive()?;
    let tcp_broken = scene.tcp.broken(Duration::from_secs(10))?;
    let after = scene.remote.spis()?;
    let mut outcome = Outcome {
        kind,
        owner_before: scene.instances[owner].name.clone(),
        owner_after: String::new(),
        event,
        end,
        out: scene.udp.measure(Way::Out, event, end),
        back: scene.udp.measure(Way::In, event, end),
        spis_changed: changed(&before, &after),
        spis_compared: before.count(),
        ike_exchanges: 0,
        marks_seen: 0,
        tcp_broken,
        tcp_connections: scene.tcp.connections(),
        clear_text: 0,
        arp_claims: 0,
        sent_after_thaw: 0,
        frames: 0,
        synced_after,
        drops: grown(&drops_before, &scene.drops()),
        losses: scene.udp.tell_losses(event, end),
    };
    look_at_captures(run, scene, hurt, thawed, &mut outcome)?;

    Ok(outcome)
}

/// A datagram of the capture's own kind, to the peer: proves that the capture sees what passes.
fn mark(scene: &Scene) -> Result<()> {
    let send = format!("printf %s {MARK} > /dev/udp/{}/500", net::PEER_WAN);
    scene.net.router.cmd("bash").args(["-c", &send]).run(PATIENCE).map(drop)
}

/// Too short for an IKE header, so that it counts as no exchange.
const MARK: &str = "a-mark-by-the-lab";

/// Ethernet, IPv4 and UDP in front of it.
const MARK_FRAME: u32 = 14 + 20 + 8 + MARK.len() as u32;

fn changed(before: &Spis, after: &Spis) -> u64 {
    // Nothing established before would make every comparison a success.
    if before.0.is_empty() { u64::MAX } else { before.changed(after) }
}

/// Waits until packets sent after the event arrive both ways, within the 10 s that a trial allows.
fn watch_until_flowing(scene: &Scene, event: Duration, watch: Watch<'_>) -> Result<()> {
    wait::until("traffic both ways after the event", OBSERVE, Duration::from_millis(2), || {
        watch(scene, event);
        let settled = event + Duration::from_millis(20);
        Ok((clock::now() > settled
            && scene.udp.wait_arrivals_since(settled, Duration::ZERO).is_ok())
        .then_some(()))
    })
}

fn look_at_captures(
    run: &Run,
    scene: &mut Scene,
    hurt: usize,
    thawed: Option<Duration>,
    outcome: &mut Outcome,
) -> Result<()> {
    let seen = scene.look(run)?;
    let (event, end) = (outcome.event, outcome.end);
    outcome.ike_exchanges =
        check::ike_exchanges(&seen.peer_ike, event.saturating_sub(Duration::from_secs(1)), end);
    outcome.marks_seen =
        seen.peer_ike.packets().filter(|packet| packet.full_length == MARK_FRAME).count() as u64;
    ensure(outcome.marks_seen > 0, || "the capture at the peer showed nothing".into())?;
    outcome.clear_text = seen.clear_text();
    outcome.frames = (seen.wan.packets().count() + seen.lan.packets().count()) as u64;
    let host = &scene.instances[hurt].ns;
    let (wan_mac, lan_mac) = (host.mac("eth0")?, host.mac("eth1")?);
    let virtual_wan: Ipv4Addr = net::VIRTUAL_WAN.parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
    let virtual_lan: Ipv4Addr = net::VIRTUAL_LAN.parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
    if outcome.kind != Kind::Rejoin {
        // An owner may still have answered a moment before it died: a frame on its way counts as before.
        let quiet = if outcome.kind == Kind::Switchover {
            event + Duration::from_secs(1)
        } else {
            event + Duration::from_millis(5)
        };
        outcome.arp_claims = check::arp_claims(&seen.wan, wan_mac, virtual_wan, quiet, end)
            + check::arp_claims(&seen.lan, lan_mac, virtual_lan, quiet, end);
    }
    if let (Kind::Stop, Some(thawed)) = (outcome.kind, thawed) {
        let source = IpAddr::V4(virtual_wan);
        let inner: IpAddr = net::RHOST.parse().unwrap_or(source);
        outcome.sent_after_thaw = check::sent_as(&seen.wan, wan_mac, source, thawed, end)
            + check::sent_as(&seen.lan, lan_mac, inner, thawed, end);
    }
    seen.discard();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(gap_ms: u64) -> Outcome {
        let measure = Measure {
            gap: Duration::from_millis(gap_ms),
            gap_start: Duration::from_millis(1000),
            ..Measure::default()
        };
        Outcome {
            kind: Kind::StandbyKill,
            owner_before: "left".into(),
            owner_after: "left".into(),
            event: Duration::from_millis(900),
            end: Duration::from_secs(10),
            out: measure,
            back: measure,
            spis_changed: 0,
            spis_compared: 4,
            ike_exchanges: 0,
            marks_seen: 1,
            tcp_broken: 0,
            tcp_connections: 2,
            clear_text: 0,
            arp_claims: 0,
            sent_after_thaw: 0,
            frames: 1,
            synced_after: None,
            drops: BTreeMap::new(),
            losses: String::new(),
        }
    }

    #[test]
    fn a_machine_that_stood_still_explains_losses_there_and_nothing_else() {
        let ms = Duration::from_millis;
        let pause = |at, length| StallWatch::saw(&[(ms(at), ms(length))]);
        assert_eq!(outcome(180).stood_still(&pause(1010, 80)), Some(ms(80)));
        assert_eq!(outcome(180).stood_still(&pause(850, 60)), Some(ms(60)), "just before");
        assert_eq!(outcome(180).stood_still(&pause(5000, 80)), None, "elsewhere");
        assert_eq!(outcome(60).stood_still(&pause(1010, 19)), None, "too short");
        assert_eq!(outcome(180).stood_still(&pause(1010, 30)), None, "the silence is far longer");
        for spoilt in [
            Outcome { clear_text: 1, ..outcome(180) },
            Outcome { spis_changed: 2, ..outcome(180) },
            Outcome { sent_after_thaw: 1, ..outcome(180) },
        ] {
            assert_eq!(spoilt.stood_still(&pause(1010, 80)), None);
            assert!(spoilt.judge().is_err());
        }
    }
}

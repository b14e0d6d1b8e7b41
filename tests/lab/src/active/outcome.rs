//! What a trial of an active-active pair found, and the bars that it is held to.

use super::Flow;
use super::trial::{OBSERVE, THAW_AFTER};
use crate::clock;
use crate::error::{Result, ensure, ensure_zero};
use crate::probe::Measure;
use crate::stall::StallWatch;
use std::time::Duration;

/// What is done to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Event {
    /// SIGKILL, and a new start when all was watched.
    Kill,
    /// SIGSTOP, SIGCONT two seconds later.
    Stop,
    /// `tandem drain`, then `tandem undrain`.
    Drain,
    /// `tandem drain`, an orderly stop, and a new start: an upgrade.
    Restart,
    /// A dead instance comes back; its death is no part of the trial.
    Rejoin,
}

impl Event {
    /// All.
    pub const ALL: [Event; 5] =
        [Event::Kill, Event::Stop, Event::Drain, Event::Restart, Event::Rejoin];

    /// The key in JSON: the spelling of `tests/failover --kind`.
    pub fn key(self) -> &'static str {
        match self {
            Event::Kill => "kill",
            Event::Stop => "stop",
            Event::Drain => "switchover",
            Event::Restart => "restart",
            Event::Rejoin => "rejoin",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Event::Kill => "kill -9 of an instance",
            Event::Stop => "SIGSTOP of an instance",
            Event::Drain => "drain, and back",
            Event::Restart => "drained, restarted, back",
            Event::Rejoin => "the dead instance returns",
        }
    }

    /// Whether an operator does it on purpose: then nothing may be lost.
    pub fn is_planned(self) -> bool {
        matches!(self, Event::Drain | Event::Restart)
    }

    pub(super) fn first_leg(self) -> Duration {
        match self {
            Event::Kill | Event::Drain | Event::Restart => OBSERVE,
            Event::Stop => THAW_AFTER,
            Event::Rejoin => Duration::ZERO,
        }
    }

    /// The longest silence that its bar allows, milliseconds.
    fn bar_ms(self, withdraws: bool) -> f64 {
        match self {
            Event::Kill if withdraws => 200.0,
            Event::Kill => 150.0,
            Event::Stop => 400.0,
            Event::Drain | Event::Restart | Event::Rejoin => f64::INFINITY,
        }
    }
}

/// What a flow is to a trial, one way, in one leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It meets the instance that is hurt.
    Met,
    /// It does not.
    Other,
    /// It is not ours to judge.
    Reported,
}

/// One leg of a trial.
#[derive(Clone, Debug, Default)]
pub struct Leg {
    /// Its beginning.
    pub from: Duration,
    /// Its end.
    pub to: Duration,
    /// What each flow met, out, and those that are judged, back.
    pub parts: Vec<(Part, Measure)>,
    /// What came back from the peer, judged or not.
    pub back: Vec<Measure>,
    /// Flows of the hurt endpoint of which packets were seen in the other tunnel.
    pub flows_moved: u64,
    /// The same of the other endpoint.
    pub others_moved: u64,
    /// IKE exchanges that began.
    pub ike_exchanges: u64,
    /// TCP segments that came out of order (or after a lost one) at the bulk stream's receiver.
    pub tcp_reordered: u64,
}

impl Leg {
    fn of(&self, part: Part) -> impl Iterator<Item = &Measure> {
        self.parts.iter().filter(move |(own, _)| *own == part).map(|(_, measure)| measure)
    }

    /// The longest silence of a flow that meets the hurt instance.
    pub fn gap(&self) -> Duration {
        self.of(Part::Met).map(|measure| measure.gap).max().unwrap_or_default()
    }

    /// Packets lost of such flows.
    pub fn lost(&self) -> u64 {
        self.of(Part::Met).map(Measure::lost).sum()
    }

    /// Packets lost of flows that do not meet it.
    pub fn others_lost(&self) -> u64 {
        self.of(Part::Other).map(Measure::lost).sum()
    }

    /// Packets sent of flows that do not meet it.
    pub fn others_sent(&self) -> u64 {
        self.of(Part::Other).map(|measure| measure.sent).sum()
    }

    /// Packets sent of all that is judged.
    pub fn sent(&self) -> u64 {
        [Part::Met, Part::Other].iter().flat_map(|part| self.of(*part)).map(|m| m.sent).sum()
    }

    /// Packets out of order within a flow, of all that is judged.
    pub fn reordered(&self) -> u64 {
        let judged = [Part::Met, Part::Other];
        judged.iter().flat_map(|part| self.of(*part)).map(|measure| measure.reordered).sum()
    }

    /// The longest silence of what the peer sends.
    pub fn back_gap(&self) -> Duration {
        self.back.iter().map(|measure| measure.gap).max().unwrap_or_default()
    }

    /// Packets lost of what the peer sends.
    pub fn back_lost(&self) -> u64 {
        self.back.iter().map(Measure::lost).sum()
    }
}

/// What a trial found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was done.
    pub event: Event,
    /// To which instance.
    pub hurt: usize,
    /// Whether a dead instance's endpoint is withdrawn.
    pub withdraws: bool,
    /// From the event on.
    pub away: Leg,
    /// From the moment on when the instance may come back.
    pub home: Leg,
    /// How long its endpoint took to be at home again.
    pub home_after: Duration,
    /// Flows of a withdrawn endpoint that were not in the other's tunnel a second after the event.
    pub unmoved: u64,
    /// Flows that were not in their own tunnel at the end.
    pub strayed: u64,
    /// SPIs that are not the same at the peer; of a withdrawn endpoint they may differ.
    pub spis_changed: u64,
    /// SPIs there were to compare.
    pub spis_compared: u64,
    /// TCP connections that did not survive.
    pub tcp_broken: u64,
    /// TCP connections there were.
    pub tcp_connections: u64,
    /// Unprotected packets between protected networks on the WAN.
    pub clear_text: u64,
    /// ARP packets on the WAN in which the hurt host claimed its endpoint's address although it did not own it.
    pub arp_claims: u64,
    /// Packets that a stopped instance sent on the WAN after SIGCONT for an endpoint that it did not own.
    pub sent_after_thaw: u64,
    /// Packets of flows that tshark opened, and placed in a tunnel.
    pub placed: u64,
    /// Frames on the WAN that these counts looked at.
    pub frames: u64,
}

impl Outcome {
    /// Whether the trial kept every bar of the table.
    pub fn judge(&self) -> Result<()> {
        self.judge_safety()?;
        let (gap, bar) = (clock::millis(self.away.gap()), self.event.bar_ms(self.withdraws));
        ensure(gap <= bar, || format!("{}: gap {gap:.1} ms, bar {bar} ms", self.event.title()))?;
        let planned = |count: u64| if self.event.is_planned() { count } else { 0 };
        // A withdrawn endpoint's return is a new tunnel, as its drain is the other's: what moves is not held to order.
        let adopted = |count: u64| if self.withdraws { 0 } else { count };
        ensure_zero(
            self.event.title(),
            &[
                ("packets of planned work lost", planned(self.away.lost())),
                ("packets reordered by planned work", adopted(planned(self.away.reordered()))),
                ("packets of the other's flows lost", self.away.others_lost()),
                ("packets lost on the way home", adopted(self.home.lost())),
                ("packets of the other's flows lost on the way home", self.home.others_lost()),
                ("packets reordered on the way home", adopted(self.home.reordered())),
            ],
        )
    }

    /// The part of [`Outcome::judge`] that no slow machine excuses.
    pub fn judge_safety(&self) -> Result<()> {
        let adopted = |count: u64| if self.withdraws { 0 } else { count };
        ensure_zero(
            self.event.title(),
            &[
                ("flows moved to another tunnel", adopted(self.flows_moved())),
                ("flows of the other moved to another tunnel", self.others_moved()),
                ("flows that stayed in the withdrawn tunnel", self.unmoved),
                ("flows not in their own tunnel at the end", self.strayed),
                ("SPIs changed", self.spis_changed),
                ("IKE exchanges", adopted(self.ike_exchanges())),
                ("TCP connections broken", self.tcp_broken),
                ("packets in clear", self.clear_text),
                ("ARP claims of the hurt host", self.arp_claims),
                ("packets sent after SIGCONT", self.sent_after_thaw),
            ],
        )
    }

    /// The longest pause of the machine itself, if pauses explain every silence that broke a bar (see
    /// [`crate::trial::Outcome::stood_still`]).
    pub fn stood_still(&self, stalls: &StallWatch) -> Option<Duration> {
        self.judge_safety().ok()?;
        let planned = self.event.is_planned();
        let bar = self.event.bar_ms(self.withdraws);
        let broke = |(part, measure): &(Part, Measure), strict: bool| match part {
            Part::Met => clock::millis(measure.gap) > bar || (strict && measure.lost() > 0),
            Part::Other => measure.lost() > 0,
            Part::Reported => false,
        };
        let away = self.away.parts.iter().filter(|part| broke(part, planned));
        let home = self.home.parts.iter().filter(|part| broke(part, !self.withdraws));
        let mut longest = None;
        for (_, measure) in away.chain(home) {
            longest = longest.max(Some(stalls.explains(measure.gap_start, measure.gap)?));
        }
        longest
    }

    /// Flows of the hurt endpoint that were seen in the other tunnel: in the worse leg, since both see the same ones.
    pub fn flows_moved(&self) -> u64 {
        self.away.flows_moved.max(self.home.flows_moved)
    }

    /// The same of the other endpoint.
    pub fn others_moved(&self) -> u64 {
        self.away.others_moved.max(self.home.others_moved)
    }

    /// IKE exchanges of the whole trial.
    pub fn ike_exchanges(&self) -> u64 {
        self.away.ike_exchanges + self.home.ike_exchanges
    }

    /// Packets sent of all that is judged.
    pub fn sent(&self) -> u64 {
        self.away.sent() + self.home.sent()
    }

    /// Which flows lost packets or got them out of order, and where.
    pub fn tell_flows(&self, flows: &[Flow]) -> String {
        let mut told = Vec::new();
        for (when, leg) in [("away", &self.away), ("on the way home", &self.home)] {
            // Out and back, flow by flow.
            for (index, (part, measure)) in leg.parts.iter().enumerate() {
                if measure.lost() + measure.reordered > 0 && *part != Part::Reported {
                    let name = flows.get(index / 2).map(Flow::name).unwrap_or_default();
                    told.push(format!(
                        "{when}: {name}, {}: {} lost, {} reordered, gap {:.1} ms from {} on",
                        ["out", "back"][index % 2],
                        measure.lost(),
                        measure.reordered,
                        clock::millis(measure.gap),
                        clock::time_of_day(measure.gap_start)
                    ));
                }
            }
        }
        told.join("; ")
    }

    /// One line.
    pub fn tell(&self) -> String {
        let (away, home) = (&self.away, &self.home);
        format!(
            "gap {:.1} ms, lost {} and {} of the other's, reordered {}; home after {:.1} s: lost {}, reordered {}; \
             {} flows moved, {} of the other's; SPIs changed {}, exchanges {}, TCP broken {}, TCP segments reordered {}; \
             from the peer: gap {:.1} ms, lost {}",
            clock::millis(away.gap()),
            away.lost(),
            away.others_lost(),
            away.reordered(),
            self.home_after.as_secs_f64(),
            home.lost() + home.others_lost(),
            home.reordered(),
            self.flows_moved(),
            self.others_moved(),
            self.spis_changed,
            self.ike_exchanges(),
            self.tcp_broken,
            away.tcp_reordered + home.tcp_reordered,
            clock::millis(away.back_gap().max(home.back_gap())),
            away.back_lost() + home.back_lost(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn measure(sent: u64, received: u64, gap_ms: u32) -> Measure {
        let gap = gap_ms * MS;
        Measure { sent, received, gap, gap_start: 1000 * MS, ..Measure::default() }
    }

    fn outcome(event: Event, withdraws: bool, parts: &[(Part, Measure)]) -> Outcome {
        Outcome {
            event,
            hurt: 0,
            withdraws,
            away: Leg { parts: parts.to_vec(), ..Leg::default() },
            home: Leg::default(),
            home_after: Duration::ZERO,
            unmoved: 0,
            strayed: 0,
            spis_changed: 0,
            spis_compared: 8,
            tcp_broken: 0,
            tcp_connections: 2,
            clear_text: 0,
            arp_claims: 0,
            sent_after_thaw: 0,
            placed: 1,
            frames: 1,
        }
    }

    #[test]
    fn each_flow_is_held_to_its_own_bar() {
        let parts = [
            (Part::Met, measure(100, 90, 140)),
            (Part::Other, measure(100, 100, 3)),
            (Part::Reported, measure(100, 0, 5000)),
        ];
        let kill = outcome(Event::Kill, false, &parts);
        kill.judge().unwrap();
        assert_eq!((kill.away.lost(), kill.away.others_lost(), kill.sent()), (10, 0, 200));
        assert!(
            outcome(Event::Drain, false, &parts).judge().is_err(),
            "planned work loses nothing"
        );
        let slow = [(Part::Met, measure(100, 90, 180))];
        assert!(outcome(Event::Kill, false, &slow).judge().is_err());
        outcome(Event::Kill, true, &slow).judge().unwrap();
        let other = [(Part::Other, measure(100, 99, 3))];
        assert!(outcome(Event::Kill, true, &other).judge().is_err());
        let mut home = outcome(Event::Kill, false, &[]);
        home.home.parts = vec![(Part::Met, measure(100, 99, 3))];
        assert!(home.judge().is_err(), "nothing is lost on the way home");
    }

    #[test]
    fn only_a_withdrawn_endpoints_flows_may_move() {
        let spoil = |withdraws, change: fn(&mut Outcome)| {
            let mut spoilt = outcome(Event::Kill, withdraws, &[]);
            change(&mut spoilt);
            spoilt.judge().is_err()
        };
        assert!(spoil(false, |o| o.away.flows_moved = 1));
        assert!(!spoil(true, |o| o.away.flows_moved = 2));
        assert!(spoil(true, |o| o.home.others_moved = 1));
        assert!(spoil(true, |o| o.unmoved = 1), "a flow that still goes into the dead tunnel");
        assert!(spoil(true, |o| o.strayed = 1), "a flow that did not come back");
        assert!(spoil(true, |o| o.spis_changed = 2));
        assert!(spoil(false, |o| o.home.ike_exchanges = 1));
        assert!(!spoil(true, |o| o.home.ike_exchanges = 1));
    }

    #[test]
    fn a_pause_must_explain_every_silence() {
        let slow = (Part::Met, measure(100, 60, 180));
        let elsewhere = (Part::Other, Measure { gap_start: 9000 * MS, ..measure(100, 99, 4) });
        let watch = StallWatch::saw(&[(1010 * MS, 80 * MS)]);
        let kill = |parts: &[_]| outcome(Event::Kill, false, parts).stood_still(&watch);
        assert_eq!(kill(&[slow]), Some(80 * MS));
        assert_eq!(kill(&[slow, elsewhere]), None);
        assert_eq!(kill(&[]), None, "nothing broke a bar");
        let unsafe_ = Outcome { clear_text: 1, ..outcome(Event::Kill, false, &[slow]) };
        assert_eq!(unsafe_.stood_still(&watch), None);
    }
}

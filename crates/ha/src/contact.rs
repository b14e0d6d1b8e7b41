//! Contact with the other instance: what was heard, what was echoed, and when it counts as dead.
//!
//! ```text
//!             first heartbeat                 silence on every link for dead_after
//!  unknown ─────────────────────► alive ───────────────────────────────────► dead (Silence)
//!                                  │ ▲                                             │
//!                                  │ └──────────── any fresh heartbeat ────────────┤
//!                                  │                                               │
//!                                  └──────────────────────────────────────► dead (Proven)
//!                 stream ended without goodbye, and refused on every link that carried
//!                 a heartbeat within dead_after, and no heartbeat since the asking;
//!                 or a goodbye; or a hello from a new process
//! ```
//! Contact is two-way: every heartbeat echoes the send time of the newest one heard. Death is
//! judged only in [`Contact::judge`], which runs when all sockets were drained, so that what
//! waited in a socket's buffer is heard first. A turn that comes late by more than an interval
//! means that we, not the other, were away: silence is then counted afresh for `dead_after`, and
//! what we missed is not taken for silence: time away is not waited; who did not speak for
//! `fence_after` may have been judged dead by an owner that went on alone, so the state counts as
//! exact only when the owner says so to somebody it hears again; who owned may have been taken
//! over from by a process that ended before it could say so; and who was away for about
//! `boot_wait` may meet a new process that owns by now, which takes a reconnect to hear of.
//!
//! Heartbeats are numbered. On each link the number must grow (a copy or an old one is dropped);
//! claims are taken only from the newest over all links, so that a slow link never takes back what
//! a fast one said. A heartbeat names the boots of both ends: one from, or for, an earlier process
//! is dropped.

use crate::codec::{Claim, Heartbeat};
use crate::config::{Config, REJOIN};
use crate::event::Probe;
use crate::types::LinkId;
use core::time::Duration;

/// Why the other counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    Proven,
    Silence,
}

#[derive(Clone, Copy, Debug, Default)]
enum Asked {
    #[default]
    Never,
    /// Under way since.
    At(Duration),
    /// Asked at this time, refused.
    Refused(Duration),
    /// Not refused; ask again at this time, and then wait twice as long.
    Again(Duration),
}

/// One link's share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    pub(crate) heard_at: Option<Duration>,
    number: u64,
    pub(crate) accepted: u64,
    pub(crate) replayed: u64,
    asked: Asked,
    pause: Duration,
}

/// What is known of the other's present process.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) boot: u64,
    greeted_at: Duration,
    pub(crate) claims: Vec<Claim>,
    /// Number of the newest heartbeat heard, its send time on the other's clock, our receipt.
    number: u64,
    newest_sent: u64,
    newest_at: Duration,
    /// Newest receipt on any link.
    pub(crate) heard_at: Option<Duration>,
    /// Send time of our newest heartbeat that it echoed, nanoseconds.
    pub(crate) echoed: u64,
    /// Heartbeats sent (on its clock) before this are leftovers of a process proven dead.
    leftovers: u64,
    /// It said goodbye.
    gone: bool,
}

/// We were away for so long that a new process may have acquired meanwhile.
#[derive(Clone, Copy, Debug)]
struct Returned {
    at: Duration,
    /// The other is known again when it echoes what was sent after this mark.
    mark: u64,
}

/// What a heartbeat changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Dropped.
    Nothing,
    /// A sign of life, with claims older than what we know.
    Life,
    /// A sign of life with the newest claims.
    Claims,
}

pub(crate) struct Contact {
    /// Drawn at our start.
    pub(crate) boot: u64,
    pub(crate) links: Vec<Link>,
    pub(crate) peer: Option<Peer>,
    pub(crate) alive: bool,
    pub(crate) death: Option<Death>,
    /// When the last proof of a death was found.
    proven_at: Option<Duration>,
    /// A heartbeat of ours was echoed since our start.
    pub(crate) met: bool,
    /// Last thing heard of the other in any way: restarts the boot wait.
    pub(crate) sign_at: Duration,
    /// The stream ended without goodbye, at this time.
    pub(crate) stream_lost: Option<Duration>,
    pub(crate) rtt: Option<Duration>,
    last_turn: Duration,
    pub(crate) listen_until: Duration,
    /// Time away, summed until a while on time ends it: since when we are on time.
    absent: Duration,
    present_since: Duration,
    /// A new process would have been heard by then.
    pub(crate) rejoin_until: Duration,
    returned: Option<Returned>,
    /// Send time of our newest heartbeat echoed by whichever process of the other.
    echo: u64,
    /// The other's word that our state is exact counts when it echoes what was sent after this.
    sync_mark: u64,
    /// We were away in contact, for so long that the other may have judged us dead: it has not
    /// until it echoes what was sent after this.
    unheard: Option<u64>,
    /// How often the other died, or seemed to, of which we do not know whether it had judged us
    /// dead: it may have owned whatever we own.
    pub(crate) usurpers: u64,
    /// The first heartbeat of the present contact, or the last after which the other listens
    /// afresh because it was late.
    pub(crate) regained_at: Option<Duration>,
    next_number: u64,
    last_sent: u64,
    heartbeat: Duration,
    dead_after: Duration,
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl Contact {
    pub(crate) fn new(boot: u64, now: Duration, config: &Config) -> Contact {
        Contact {
            boot,
            links: vec![Link::default(); usize::from(config.links)],
            peer: None,
            alive: false,
            death: None,
            proven_at: None,
            met: false,
            sign_at: now,
            stream_lost: None,
            rtt: None,
            last_turn: now,
            listen_until: now,
            absent: Duration::ZERO,
            present_since: now,
            rejoin_until: now,
            returned: None,
            echo: 0,
            sync_mark: 0,
            unheard: None,
            usurpers: 0,
            regained_at: None,
            next_number: 1,
            last_sent: 0,
            heartbeat: config.heartbeat,
            dead_after: config.dead_after,
        }
    }

    pub(crate) fn claim(&self, id: u64) -> Option<&Claim> {
        self.peer.as_ref()?.claims.iter().find(|claim| claim.id == id)
    }

    /// Send time of our newest heartbeat that was echoed.
    pub(crate) fn echoed_at(&self) -> Option<Duration> {
        self.peer.as_ref().filter(|p| p.echoed > 0).map(|p| Duration::from_nanos(p.echoed))
    }

    pub(crate) fn heard_at(&self) -> Option<Duration> {
        self.peer.as_ref()?.heard_at
    }

    /// When a process said hello that sent no heartbeat so far.
    pub(crate) fn greeted_at(&self) -> Option<Duration> {
        self.peer.as_ref().filter(|peer| peer.heard_at.is_none()).map(|peer| peer.greeted_at)
    }

    /// Send time of our newest heartbeat; `None` if nobody can have heard it: no process was ever
    /// met, or the one that was heard is proven dead and no other has shown itself.
    pub(crate) fn spoke_at(&self) -> Option<Duration> {
        let dead = self.proven_at().is_some() && self.heard_at().is_some();
        self.peer.as_ref().filter(|_| self.last_sent > 0 && !dead)?;
        Some(Duration::from_nanos(self.last_sent))
    }

    /// When the other's death was proven, if it stands proven.
    pub(crate) fn proven_at(&self) -> Option<Duration> {
        self.proven_at.filter(|_| self.death == Some(Death::Proven))
    }

    /// Whether a process that existed [`REJOIN`] ago is one that we know of.
    pub(crate) fn steady(&self) -> bool {
        self.absent.is_zero()
    }

    /// Whether an owner that stopped counting on us would have told us so. Else it may have gone
    /// on alone while we knew nothing, and its last word that we are in sync is void.
    pub(crate) fn in_step(&self) -> bool {
        self.echo > self.sync_mark
    }

    /// We returned from so long an absence that a new process of the other may own, and nothing
    /// has shown since that the one we know lives on, or that it died only now.
    pub(crate) fn stranger(&self) -> bool {
        self.returned.is_some_and(|back| self.proven_at().is_none_or(|at| at < back.at))
    }

    /// The other is proven dead. What it said of our state holds if it cannot have judged us dead
    /// before: the reckoning of the fence's rule 1, from the other's side.
    fn prove(&mut self, now: Duration, config: &Config) {
        let late = now >= Duration::from_nanos(self.echo) + config.fence_after;
        if late && self.death != Some(Death::Proven) {
            self.sync_mark = self.sync_mark.max(self.last_sent);
        }
        self.lose_unheard();
        self.alive = false;
        self.death = Some(Death::Proven);
        self.proven_at = Some(now);
    }

    /// The other died and had not echoed anything since we were away.
    fn lose_unheard(&mut self) {
        if self.unheard.take().is_some() {
            self.usurpers += 1;
        }
    }

    /// A turn: notes whether it comes late, and what that makes doubtful.
    fn note_lateness(&mut self, now: Duration, config: &Config) {
        let away = now.saturating_sub(self.last_turn);
        self.last_turn = now;
        if away <= config.heartbeat * 2 {
            if now >= self.present_since + REJOIN {
                self.absent = Duration::ZERO;
            }
            return;
        }
        self.present_since = now;
        self.absent += away;
        self.listen_until = now + config.dead_after;
        // What was not listened through was not waited.
        self.sign_at = (self.sign_at + away).min(now);
        // A refusal from before says nothing about now.
        for link in &mut self.links {
            link.asked = Asked::Never;
        }
        // What leaves from this turn on is later than this.
        let mark = self.last_sent.max(nanos(now).saturating_sub(1));
        // Our last heartbeat left up to an interval before the last turn.
        if away + config.heartbeat >= config.fence_after {
            self.sync_mark = mark;
            if self.alive {
                self.unheard = Some(mark);
            }
        }
        if away >= config.dead_after {
            self.rejoin_until = now + REJOIN;
        }
        // The other's clock may be faster.
        if self.absent >= config.boot_wait * 4 / 5 {
            self.rejoin_until = now + REJOIN;
            self.returned = Some(Returned { at: now, mark });
            self.sign_at = now;
        }
    }

    /// A mark between what was sent and what will be: see [`Contact::echoed_since`].
    pub(crate) fn mark(&self) -> u64 {
        self.last_sent
    }

    /// Whether the other has echoed a heartbeat sent after the mark.
    pub(crate) fn echoed_since(&self, mark: u64) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.echoed > mark)
    }

    /// Whether our heartbeats reach the other: contact is two-way.
    pub(crate) fn echoed_lately(&self, now: Duration, dead_after: Duration) -> bool {
        self.alive && self.echoed_at().is_some_and(|sent| now < sent + dead_after)
    }

    /// A hello from a process: true if it is not the one we knew.
    pub(crate) fn greet(
        &mut self,
        now: Duration,
        boot: u64,
        claims: Vec<Claim>,
        config: &Config,
    ) -> bool {
        self.sign_at = now;
        if let Some(peer) = &mut self.peer
            && peer.boot == boot
        {
            // It lives: the proof was none.
            if self.death == Some(Death::Proven) && !peer.gone {
                self.death = Some(Death::Silence);
            }
            return false;
        }
        let known = self.peer.is_some();
        if known {
            self.prove(now, config);
        }
        for link in &mut self.links {
            *link = Link { accepted: link.accepted, replayed: link.replayed, ..Link::default() };
        }
        self.peer = Some(Peer {
            boot,
            greeted_at: now,
            claims,
            number: 0,
            newest_sent: 0,
            newest_at: now,
            heard_at: None,
            echoed: 0,
            leftovers: 0,
            gone: false,
        });
        known
    }

    /// An authenticated heartbeat.
    pub(crate) fn hear(&mut self, now: Duration, link: LinkId, heartbeat: Heartbeat) -> Heard {
        let (Some(peer), Some(link)) =
            (self.peer.as_mut(), self.links.get_mut(usize::from(link.0)))
        else {
            return Heard::Nothing;
        };
        if heartbeat.boot != peer.boot || heartbeat.to != self.boot || peer.gone {
            return Heard::Nothing;
        }
        if heartbeat.number <= link.number || heartbeat.sent_at < peer.leftovers {
            link.replayed += 1;
            return Heard::Nothing;
        }
        link.number = heartbeat.number;
        link.accepted += 1;
        link.heard_at = Some(now);
        peer.heard_at = Some(now);
        self.sign_at = now;
        // Only what we really sent can be echoed.
        if heartbeat.echo > peer.echoed && heartbeat.echo <= self.last_sent {
            peer.echoed = heartbeat.echo;
            self.echo = self.echo.max(heartbeat.echo);
            self.met = true;
            self.returned = self.returned.filter(|back| heartbeat.echo <= back.mark);
            self.unheard = self.unheard.filter(|mark| heartbeat.echo <= *mark);
            let sample = now
                .saturating_sub(Duration::from_nanos(heartbeat.echo))
                .saturating_sub(Duration::from_nanos(heartbeat.held));
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
        if !self.alive {
            self.regained_at = Some(now);
        }
        self.alive = true;
        self.death = None;
        if heartbeat.number <= peer.number {
            return Heard::Life;
        }
        // None was lost in between, so it was away, and listens as `stamp` does here.
        let late = Duration::from_nanos(heartbeat.sent_at.saturating_sub(peer.newest_sent));
        if heartbeat.number == peer.number + 1 && peer.number > 0 && late > self.heartbeat * 2 {
            self.regained_at = Some(now);
        }
        peer.number = heartbeat.number;
        peer.newest_sent = peer.newest_sent.max(heartbeat.sent_at);
        peer.newest_at = now;
        peer.claims = heartbeat.claims;
        Heard::Claims
    }

    /// The other said goodbye: it owns nothing any more, and what it sent earlier is void.
    pub(crate) fn goodbye(&mut self, now: Duration, config: &Config) {
        if let Some(peer) = &mut self.peer {
            peer.gone = true;
            self.prove(now, config);
        }
    }

    /// The stream is up: nothing is lost any more.
    pub(crate) fn stream_up(&mut self, now: Duration) {
        self.sign_at = now;
        self.stream_lost = None;
        for link in &mut self.links {
            link.asked = Asked::Never;
        }
    }

    pub(crate) fn probe_result(
        &mut self,
        now: Duration,
        link: LinkId,
        result: Probe,
        most: Duration,
    ) {
        let Some(link) = self.links.get_mut(usize::from(link.0)) else { return };
        let Asked::At(asked) = link.asked else { return };
        if result == Probe::Refused {
            link.asked = Asked::Refused(asked);
        } else {
            // A killed process closes its descriptors one by one: ask again soon, then less often.
            link.pause = (link.pause * 2).clamp(Duration::from_millis(1), most);
            link.asked = Asked::Again(now + link.pause);
        }
    }

    /// Which links to probe now: those that carried a heartbeat within `dead_after`, while the
    /// stream is lost and the other not yet judged.
    pub(crate) fn probes(&mut self, now: Duration, config: &Config) -> Vec<LinkId> {
        let mut out = Vec::new();
        if self.stream_lost.is_none() || !self.alive {
            return out;
        }
        let heard_at = self.heard_at().unwrap_or_default();
        for (n, link) in self.links.iter_mut().enumerate() {
            if link.heard_at.is_none_or(|heard| now >= heard + config.dead_after) {
                continue;
            }
            let due = match link.asked {
                Asked::Never => true,
                Asked::At(asked) => now >= asked + config.dead_after,
                Asked::Refused(asked) => asked < heard_at,
                Asked::Again(at) => now >= at,
            };
            if due {
                link.asked = Asked::At(now);
                out.push(LinkId(u8::try_from(n).unwrap_or(u8::MAX)));
            }
        }
        out
    }

    /// A turn whose sockets were drained: is the other dead? Returns a new judgement, if any.
    pub(crate) fn judge(&mut self, now: Duration, config: &Config) -> Option<Death> {
        self.note_lateness(now, config);
        let peer = self.peer.as_mut().filter(|_| self.alive)?;
        let heard_at = peer.heard_at?;
        let mut refused = 0;
        let proven = self.stream_lost.is_some()
            && self
                .links
                .iter()
                .filter(|l| l.heard_at.is_some_and(|h| now < h + config.dead_after))
                .all(|link| {
                    refused += 1;
                    matches!(link.asked, Asked::Refused(asked) if asked >= heard_at)
                })
            && refused > 0;
        if proven {
            let since = nanos(now.saturating_sub(peer.newest_at));
            peer.leftovers = peer.newest_sent.saturating_add(since);
            self.prove(now, config);
        } else if now >= heard_at + config.dead_after && now >= self.listen_until {
            self.alive = false;
            self.death = Some(Death::Silence);
            self.lose_unheard();
        } else {
            return None;
        }
        self.death
    }

    /// When [`Contact::judge`] or [`Contact::probes`] may next have something to say.
    pub(crate) fn timeout(&self, config: &Config) -> Option<Duration> {
        if !self.alive {
            return None;
        }
        let silence = (self.heard_at()? + config.dead_after).max(self.listen_until);
        let again = self
            .links
            .iter()
            .filter(|_| self.stream_lost.is_some())
            .filter_map(|link| if let Asked::Again(at) = link.asked { Some(at) } else { None });
        again.chain([silence]).min()
    }

    /// When an owner is out of contact for its fence, if nothing more is heard (fence, rule 2). A turn must find that out
    /// before the fence closes, and with an echo that was old already, less than an interval lies between the two.
    pub(crate) fn doubts_at(&self, config: &Config) -> Option<Duration> {
        let ageing = self.echoed_at()? + config.fence_after.saturating_sub(config.heartbeat);
        Some(ageing.max(self.heard_at()? + config.heartbeat * 2))
    }

    /// Numbers a heartbeat and fills in what contact needs. The same number goes out on all links.
    pub(crate) fn stamp(&mut self, now: Duration, heartbeat: &mut Heartbeat) -> bool {
        let Some(peer) = &self.peer else { return false };
        // Who hears this heartbeat sees that we were late, and relies on our listening afresh.
        if self.last_sent > 0 && now > Duration::from_nanos(self.last_sent) + self.heartbeat * 2 {
            self.listen_until = self.listen_until.max(now + self.dead_after);
        }
        self.last_sent = nanos(now).max(self.last_sent.saturating_add(1));
        heartbeat.boot = self.boot;
        heartbeat.to = peer.boot;
        heartbeat.number = self.next_number;
        heartbeat.sent_at = self.last_sent;
        heartbeat.echo = peer.newest_sent;
        heartbeat.held = nanos(now.saturating_sub(peer.newest_at));
        self.next_number += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn config() -> Config {
        Config { links: 2, ..Config::new("a", 0, "b") }
    }

    fn contact() -> Contact {
        let mut contact = Contact::new(7, ms(1000), &config());
        assert!(!contact.greet(ms(1000), 9, Vec::new(), &config()));
        contact
    }

    fn heartbeat(number: u64, echo: u64) -> Heartbeat {
        Heartbeat {
            boot: 9,
            to: 7,
            number,
            sent_at: number * 1_000_000,
            echo,
            ..Heartbeat::default()
        }
    }

    fn run(contact: &mut Contact, from: u64, to: u64) -> Option<(u64, Death)> {
        (from..=to).step_by(5).find_map(|t| Some((t, contact.judge(ms(t), &config())?)))
    }

    #[test]
    fn copies_old_ones_and_strangers_are_dropped() {
        let mut c = contact();
        assert_eq!(c.hear(ms(1001), LinkId(0), heartbeat(5, 0)), Heard::Claims);
        assert_eq!(c.hear(ms(1002), LinkId(0), heartbeat(5, 0)), Heard::Nothing);
        assert_eq!(c.hear(ms(1002), LinkId(0), heartbeat(4, 0)), Heard::Nothing);
        // The other link is slower: a sign of life, but no news.
        assert_eq!(c.hear(ms(1003), LinkId(1), heartbeat(4, 0)), Heard::Life);
        let stranger = Heartbeat { boot: 8, ..heartbeat(6, 0) };
        assert_eq!(c.hear(ms(1004), LinkId(0), stranger), Heard::Nothing);
        let for_another = Heartbeat { to: 6, ..heartbeat(6, 0) };
        assert_eq!(c.hear(ms(1004), LinkId(0), for_another), Heard::Nothing);
        assert_eq!(c.hear(ms(1004), LinkId(2), heartbeat(6, 0)), Heard::Nothing, "no such link");
        assert_eq!(c.links[0].replayed, 2);
    }

    #[test]
    fn only_what_was_sent_is_echoed() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 5_000_000_000_000));
        assert_eq!(c.echoed_at(), None);
        let mut ours = Heartbeat::default();
        assert!(c.stamp(ms(1002), &mut ours));
        c.hear(ms(1006), LinkId(0), Heartbeat { held: 1_000_000, ..heartbeat(2, ours.sent_at) });
        assert_eq!(c.echoed_at(), Some(ms(1002)));
        assert_eq!(c.rtt, Some(ms(3)));
        assert!(c.met);
    }

    #[test]
    fn silence_counts_on_every_link_and_from_receipt() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        c.hear(ms(1030), LinkId(1), heartbeat(2, 0));
        assert_eq!(run(&mut c, 1005, 1400), Some((1130, Death::Silence)));
    }

    #[test]
    fn a_late_turn_listens_again_before_it_judges() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        assert_eq!(c.judge(ms(1010), &config()), None);
        assert_eq!(c.judge(ms(1300), &config()), None, "we were away");
        assert_eq!(run(&mut c, 1305, 1600), Some((1400, Death::Silence)));
        // Late by no more than an interval is on time.
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        for t in [1040, 1080] {
            assert_eq!(c.judge(ms(t), &config()), None);
        }
        assert_eq!(c.judge(ms(1119), &config()), Some(Death::Silence));
    }

    #[test]
    fn proven_death_needs_both_signs_on_every_live_link() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        c.hear(ms(1002), LinkId(1), heartbeat(1, 0));
        assert!(c.probes(ms(1003), &config()).is_empty(), "the stream is up");
        c.stream_lost = Some(ms(1005));
        assert_eq!(c.probes(ms(1005), &config()), vec![LinkId(0), LinkId(1)]);
        c.probe_result(ms(1006), LinkId(0), Probe::Refused, ms(20));
        assert_eq!(c.judge(ms(1006), &config()), None, "one link is missing");
        // A heartbeat that was under way: ask again, everywhere.
        c.hear(ms(1006), LinkId(1), heartbeat(2, 0));
        c.probe_result(ms(1007), LinkId(1), Probe::Refused, ms(20));
        assert_eq!(c.judge(ms(1007), &config()), None, "asked before the heartbeat");
        assert_eq!(c.probes(ms(1007), &config()), vec![LinkId(0), LinkId(1)]);
        c.probe_result(ms(1008), LinkId(0), Probe::Refused, ms(20));
        c.probe_result(ms(1008), LinkId(1), Probe::Accepted, ms(20));
        assert_eq!(c.judge(ms(1008), &config()), None);
        assert_eq!(c.probes(ms(1009), &config()), vec![LinkId(1)], "asked again after 1 ms");
        c.probe_result(ms(1010), LinkId(1), Probe::Refused, ms(20));
        assert_eq!(c.judge(ms(1010), &config()), Some(Death::Proven));
        // What the dead process had sent arrives late and changes nothing …
        assert_eq!(c.hear(ms(1011), LinkId(0), heartbeat(3, 0)), Heard::Nothing);
        // … but a process that goes on sending lives.
        assert_eq!(c.hear(ms(1040), LinkId(0), heartbeat(40, 0)), Heard::Claims);
        assert!(c.alive);
    }

    #[test]
    fn a_link_without_heartbeats_proves_nothing() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        c.stream_lost = Some(ms(1002));
        assert_eq!(c.probes(ms(1002), &config()), vec![LinkId(0)]);
        c.probe_result(ms(1003), LinkId(0), Probe::Unknown, ms(20));
        assert_eq!(run(&mut c, 1005, 1200), Some((1105, Death::Silence)));
    }

    #[test]
    fn the_other_was_late_if_no_heartbeat_is_missing_and_listens_afresh_as_we_would() {
        let mut c = contact();
        let at =
            |number, sent: u64| Heartbeat { sent_at: sent * 1_000_000, ..heartbeat(number, 0) };
        c.hear(ms(1001), LinkId(0), at(1, 500));
        c.hear(ms(1041), LinkId(0), at(2, 540));
        assert_eq!(c.regained_at, Some(ms(1001)), "late by no more than an interval");
        c.hear(ms(1101), LinkId(0), at(4, 600));
        assert_eq!(c.regained_at, Some(ms(1001)), "one was lost: it may have heard nothing either");
        c.hear(ms(1151), LinkId(0), at(5, 641));
        assert_eq!(c.regained_at, Some(ms(1151)));
        for (now, listens) in [(1160, 1000), (1200, 1000), (1241, 1341)] {
            assert!(c.stamp(ms(now), &mut Heartbeat::default()));
            assert_eq!(c.listen_until, ms(listens), "sent at {now}");
        }
    }

    #[test]
    fn a_hello_of_a_process_that_was_proven_dead_takes_the_proof_back() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(1, 0));
        c.stream_lost = Some(ms(1002));
        assert_eq!(c.probes(ms(1002), &config()), vec![LinkId(0)]);
        c.probe_result(ms(1003), LinkId(0), Probe::Refused, ms(20));
        assert_eq!(c.judge(ms(1003), &config()), Some(Death::Proven));
        assert_eq!(c.proven_at(), Some(ms(1003)));
        assert!(!c.greet(ms(1200), 9, Vec::new(), &config()));
        assert_eq!(c.proven_at(), None);
        // Who said goodbye is gone all the same.
        c.goodbye(ms(1300), &config());
        assert!(!c.greet(ms(1400), 9, Vec::new(), &config()));
        assert_eq!(c.proven_at(), Some(ms(1300)));
    }

    #[test]
    fn a_new_process_proves_the_death_of_the_old_one() {
        let mut c = contact();
        c.hear(ms(1001), LinkId(0), heartbeat(50, 0));
        assert!(c.greet(ms(1002), 10, Vec::new(), &config()));
        assert_eq!((c.alive, c.death), (false, Some(Death::Proven)));
        // Its numbers start afresh; the old process's heartbeats are dropped.
        assert_eq!(c.hear(ms(1003), LinkId(0), heartbeat(51, 0)), Heard::Nothing);
        let new = Heartbeat { boot: 10, ..heartbeat(1, 0) };
        assert_eq!(c.hear(ms(1004), LinkId(0), new), Heard::Claims);
    }
}

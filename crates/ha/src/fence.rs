//! The fence of one owned endpoint: until when anything may be sent for it (ha.md, "The fence").
//!
//! ```text
//!                     echo fresh ──────────────► rule 1: newest echoed send time + fence_after
//!   owner, each turn  echo ageing, nothing heard ► rule 2: own last heartbeat + fence_after
//!                     echo ageing, still heard ──► rule 1 goes on, and the fence closes …
//!                                                 … unless the other's uplink is dead (rule 4): as 2
//!   a turn that comes after valid_until ─────────► rule 3: rule 2 extends nothing until dead_after
//!                                                  was listened through (REJOIN, if we were away
//!                                                  for so long that a new process may own)
//! ```
//! Rule 1 is safe because the other judges us by the receipt of that same heartbeat, which came no
//! earlier than its sending, and waits `dead_after`, which exceeds `fence_after` by an interval: so
//! much that clocks may differ by 10 % each. Rule 2 keeps a lone survivor alive and is where,
//! without a witness, a full partition may have two senders. It counts from the send time of the
//! newest own heartbeat, not from the turn: for in a one-way cut the other may still hear us, and
//! judges us by that. The value is computed afresh each
//! turn and may go down: whoever hears the other again without being echoed falls back to rule 1,
//! though only after as long as a first echo may take, so that a return closes nothing: neither
//! that of a new contact nor that of an instance that was late and therefore listens afresh.
//! While the other's death has stood proven for [`REJOIN`] and no process has shown itself since, rule 2 reaches
//! [`crate::Config::alone`] ahead: a new process owns nothing before it has listened for `boot_wait`, so a host that stops
//! for a moment need not fall silent.
//! Rule 5 (a higher term ends ownership) is in `ownership`.

use crate::config::REJOIN;
use core::time::Duration;

/// What a turn knows about the other instance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// The turn, after its sockets were drained.
    pub(crate) now: Duration,
    /// No pair is configured.
    pub(crate) lone: bool,
    /// Last authenticated heartbeat on any link.
    pub(crate) heard_at: Option<Duration>,
    /// When a process said hello that sent no heartbeat so far.
    pub(crate) greeted_at: Option<Duration>,
    /// Send time of our newest heartbeat that the other has echoed.
    pub(crate) echoed_at: Option<Duration>,
    /// When the present contact began (its first heartbeat), or when the other, having been late,
    /// began to listen afresh.
    pub(crate) regained_at: Option<Duration>,
    /// The other was judged dead and was not heard since.
    pub(crate) dead: bool,
    /// That judgement rests on proof, found then.
    pub(crate) proven_at: Option<Duration>,
    /// Send time of our newest heartbeat, if there is anybody to send it to.
    pub(crate) spoke_at: Option<Duration>,
    /// We have been on time for so long ([`crate::config::REJOIN`]) that we know of every process
    /// that was there before.
    pub(crate) steady: bool,
    /// A process of the other that we know nothing of may own, and would be heard by then.
    pub(crate) rejoin_until: Duration,
    /// The other reports a dead uplink for this endpoint and does not own it (as after a full
    /// partition it might), so it will not take over by silence.
    pub(crate) other_cannot_take: bool,
}

/// The configured times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) heartbeat: Duration,
    pub(crate) dead_after: Duration,
    pub(crate) fence_after: Duration,
    /// How far rule 2 reaches while no process of the other exists that we know of.
    pub(crate) alone: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fence {
    valid_until: Duration,
    /// The first turn that found the fence closed.
    closed_at: Option<Duration>,
    opened: bool,
}

impl Fence {
    /// Ownership ended, or is being handed over.
    pub(crate) fn close(&mut self) {
        *self = Fence::default();
    }

    /// A turn of the owner's control loop that drained its sockets.
    pub(crate) fn turn(&mut self, view: View, times: Times) -> Duration {
        let now = view.now;
        if self.opened && now >= self.valid_until && self.closed_at.is_none() {
            self.closed_at = Some(now);
        }
        let by_echo = view.echoed_at.map_or(Duration::ZERO, |sent| sent + times.fence_after);
        let hears =
            !view.dead && view.heard_at.is_some_and(|heard| now < heard + times.heartbeat * 2);
        let echo_ageing =
            view.echoed_at.is_none_or(|sent| now >= sent + times.fence_after - times.heartbeat);
        let out_of_contact = view.dead || (!hears && echo_ageing);
        let by_turn_applies = out_of_contact || (hears && echo_ageing && view.other_cannot_take);
        let proven = view.proven_at.is_some_and(|at| now >= at + REJOIN);
        let alone = proven && view.spoke_at.is_none() && view.steady;
        let listened = match self.closed_at {
            None => true,
            Some(_) if view.lone => true,
            // A proof from before we were away says nothing about what has started since, nor does any proof about a
            // process that has said hello: it may own.
            Some(closed)
                if view.proven_at.is_some_and(|at| at >= closed) && view.greeted_at.is_none() =>
            {
                true
            }
            Some(closed) => {
                let heard = view.heard_at.filter(|_| !hears);
                let since = closed.max(heard.max(view.greeted_at).unwrap_or_default());
                now >= (since + times.dead_after).max(view.rejoin_until)
            }
        };
        let by_turn = if view.lone {
            now + times.fence_after
        } else if by_turn_applies && listened && alone {
            now + times.alone.max(times.fence_after)
        } else if by_turn_applies && listened {
            view.spoke_at.map_or(now, |spoke| spoke.min(now)) + times.fence_after
        } else {
            Duration::ZERO
        };
        // The other is back and cannot have echoed yet: that is no one-way cut. It hears us within
        // fence_after, or judges us only dead_after later. A fence that was closed stays so.
        let by_return = match view.regained_at {
            Some(regained) if hears && self.closed_at.is_none() => regained + times.fence_after,
            _ => Duration::ZERO,
        };
        self.valid_until = by_echo.max(by_turn).max(by_return);
        if self.valid_until > now {
            self.opened = true;
            self.closed_at = None;
        }
        self.valid_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        heartbeat: Duration::from_millis(20),
        dead_after: Duration::from_millis(100),
        fence_after: Duration::from_millis(80),
        alone: Duration::from_secs(3),
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn view(now: u64, heard: u64, echoed: u64) -> View {
        View {
            now: ms(now),
            lone: false,
            heard_at: Some(ms(heard)),
            greeted_at: None,
            echoed_at: Some(ms(echoed)),
            regained_at: None,
            dead: false,
            proven_at: None,
            spoke_at: Some(ms(now)),
            steady: true,
            rejoin_until: Duration::ZERO,
            other_cannot_take: false,
        }
    }

    #[test]
    fn rule_1_in_contact_the_newest_echoed_send_time_counts() {
        let mut fence = Fence::default();
        assert_eq!(fence.turn(view(1000, 999, 990), TIMES), ms(1070));
        // The same echo twice extends nothing.
        assert_eq!(fence.turn(view(1010, 1009, 990), TIMES), ms(1070));
        assert_eq!(fence.turn(view(1020, 1019, 1010), TIMES), ms(1090));
    }

    #[test]
    fn rule_1_an_owner_that_hears_but_is_not_echoed_closes() {
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        for now in (1010..1400).step_by(10) {
            assert_eq!(fence.turn(view(now, now - 1, 990), TIMES), ms(1070));
        }
    }

    #[test]
    fn rule_2_losing_contact_alone_never_stops_an_owner() {
        let mut fence = Fence::default();
        for now in (1000..2000).step_by(10) {
            let until = fence.turn(view(now, 1000, 1000), TIMES);
            assert!(until > ms(now + 10), "closed at {now}");
        }
        // Out of contact begins with an echo of fence_after − interval and two silent intervals.
        let mut fence = Fence::default();
        assert_eq!(fence.turn(view(1059, 1000, 1000), TIMES), ms(1080));
        assert_eq!(fence.turn(view(1060, 1000, 1000), TIMES), ms(1140));
        assert_eq!(
            fence.turn(view(1070, 1031, 1000), TIMES),
            ms(1080),
            "heard within two intervals"
        );
    }

    #[test]
    fn rule_3_a_turn_after_valid_until_extends_nothing_until_it_listened() {
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        // SIGSTOP from 1001 to 3000: nothing heard, nothing echoed.
        assert!(fence.turn(view(3000, 999, 990), TIMES) <= ms(3000));
        assert!(fence.turn(view(3050, 999, 990), TIMES) <= ms(3050));
        assert!(fence.turn(view(3099, 999, 990), TIMES) <= ms(3099));
        assert_eq!(fence.turn(view(3100, 999, 990), TIMES), ms(3180));
        // Two late turns in a row start the listening once.
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        fence.turn(view(3000, 3000, 990), TIMES);
        assert!(fence.turn(view(3099, 3000, 990), TIMES) <= ms(3099));
        assert_eq!(fence.turn(view(3100, 3000, 990), TIMES), ms(3180));
        // A fresh echo proves that the other heard us after the pause, and follows: open at once.
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        fence.turn(view(3000, 3000, 990), TIMES);
        assert_eq!(fence.turn(view(3004, 3004, 3001), TIMES), ms(3081));
    }

    #[test]
    fn rule_3_a_new_process_is_listened_to_before_the_fence_opens() {
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        fence.turn(view(20_000, 999, 990), TIMES);
        // Its hello proves the death of the one before it, and it may own itself.
        let hello = |now| View {
            dead: true,
            proven_at: Some(ms(20_100)),
            heard_at: None,
            greeted_at: Some(ms(20_100)),
            ..view(now, 999, 990)
        };
        for now in [20_100, 20_150, 20_199] {
            assert!(fence.turn(hello(now), TIMES) <= ms(now));
        }
        assert_eq!(fence.turn(hello(20_200), TIMES), ms(20_280), "and then it was never heard");
    }

    #[test]
    fn rule_3_after_a_long_absence_it_listens_for_a_new_process() {
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        let back = |now| View { dead: true, rejoin_until: ms(21_000), ..view(now, 999, 990) };
        for now in [20_000, 20_100, 20_999] {
            assert!(fence.turn(back(now), TIMES) <= ms(now));
        }
        assert_eq!(fence.turn(back(21_000), TIMES), ms(21_080));
    }

    #[test]
    fn rule_2_counts_from_the_last_heartbeat_that_the_other_may_have_heard() {
        let mut fence = Fence::default();
        let spoke = |at| View { spoke_at: at, ..view(1100, 1000, 1000) };
        assert_eq!(fence.turn(spoke(Some(ms(1085))), TIMES), ms(1165));
        assert_eq!(fence.turn(spoke(None), TIMES), ms(1180), "nobody to hear us");
    }

    #[test]
    fn rule_2_reaches_far_while_the_other_is_proven_dead_and_nobody_else_came() {
        let alone =
            View { dead: true, proven_at: Some(ms(1000)), spoke_at: None, ..view(2000, 990, 980) };
        let mut fence = Fence::default();
        assert_eq!(fence.turn(alone, TIMES), ms(5000));
        // Not at once: a proof may be taken back by a heartbeat that was under way.
        let fresh = View { proven_at: Some(ms(1001)), ..alone };
        assert_eq!(Fence::default().turn(fresh, TIMES), ms(2080));
        // A turn that comes late but before that finds it open.
        assert_eq!(fence.turn(View { now: ms(4999), steady: false, ..alone }, TIMES), ms(5079));
        assert_eq!(fence.turn(View { now: ms(5000), ..alone }, TIMES), ms(8000));
        // A new process said hello: it counts from our heartbeats.
        let greeted = View { now: ms(5010), spoke_at: Some(ms(5005)), heard_at: None, ..alone };
        assert_eq!(fence.turn(greeted, TIMES), ms(5085));
        // Silence proves no death.
        let mut fence = Fence::default();
        let silent = View { proven_at: None, spoke_at: Some(ms(1995)), ..alone };
        assert_eq!(fence.turn(silent, TIMES), ms(2075));
    }

    #[test]
    fn rule_4_not_echoed_but_the_other_reports_a_dead_uplink() {
        let mut fence = Fence::default();
        for now in (1000..1400).step_by(10) {
            let cannot = View { other_cannot_take: true, ..view(now, now, 1000) };
            assert!(fence.turn(cannot, TIMES) > ms(now + 10), "closed at {now}");
        }
        // Its uplink came back: rule 1 again, which has long run out.
        assert!(fence.turn(view(1400, 1400, 1000), TIMES) <= ms(1400));
    }

    #[test]
    fn hearing_again_without_an_echo_takes_back_what_rule_2_gave() {
        let mut fence = Fence::default();
        assert_eq!(fence.turn(view(1070, 1000, 1000), TIMES), ms(1150));
        assert_eq!(fence.turn(view(1090, 1089, 1000), TIMES), ms(1080));
    }

    #[test]
    fn the_return_of_the_other_closes_nothing_before_it_can_echo() {
        let mut fence = Fence::default();
        let back = |now| View { regained_at: Some(ms(2000)), ..view(now, now, 1000) };
        fence.turn(View { dead: true, ..view(1990, 1000, 1000) }, TIMES);
        assert_eq!(fence.turn(back(2000), TIMES), ms(2080));
        assert_eq!(fence.turn(back(2070), TIMES), ms(2080), "not echoed for so long: rule 1");
        // A fence that was closed when the other came back stays closed.
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        fence.turn(View { dead: true, ..view(1995, 1000, 990) }, TIMES);
        assert!(fence.turn(back(2000), TIMES) <= ms(2000));
    }

    #[test]
    fn proof_opens_at_once_and_a_lone_owner_needs_nobody() {
        let mut fence = Fence::default();
        fence.turn(view(1000, 999, 990), TIMES);
        let proven = View { dead: true, proven_at: Some(ms(1200)), ..view(1200, 1190, 990) };
        assert_eq!(fence.turn(proven, TIMES), ms(1280));
        // One found before a pause proves nothing after it: another process may have started.
        let later = |now| View { now: ms(now), spoke_at: Some(ms(now)), ..proven };
        assert!(fence.turn(later(9000), TIMES) <= ms(9000));
        assert!(fence.turn(later(9099), TIMES) <= ms(9099));
        assert_eq!(fence.turn(later(9100), TIMES), ms(9180));
        let mut fence = Fence::default();
        let lone = View { lone: true, heard_at: None, echoed_at: None, ..view(5, 5, 5) };
        assert_eq!(fence.turn(lone, TIMES), ms(85));
        assert_eq!(fence.turn(View { now: ms(9000), ..lone }, TIMES), ms(9080));
    }
}

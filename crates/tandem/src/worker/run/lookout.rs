//! How long a worker looks for the next packet before it sleeps, while other threads may go first. To wake a thread on
//! another processor costs more, and longer: in a virtual machine, more than all that is done with a packet.
//!
//! Two cases promise one soon. Where packets are close together anyhow, the next is. And a packet that came alone in a quiet
//! time is likely a request or an answer: the other side replies in a moment, if it does. Whether it pays is learnt for
//! each direction by itself: who carries a request waits for the answer, who has carried the answer waits for nothing.

use std::time::Duration;

use esp::Direction;

/// What lately took less than this to come is looked for as long.
const NEAR: Duration = Duration::from_micros(15);

/// Pauses count as this at most, so that a busy time is noticed soon after a quiet one.
const LONG_PAUSE: Duration = Duration::from_micros(200);

/// An answer is looked for as long: two other threads may have to wake first.
const ANSWER: Duration = Duration::from_micros(150);

/// So long after several packets at once, one alone is an acknowledgement and no request.
const CALM: Duration = Duration::from_millis(5);

/// What a look that found an answer adds to the trust in the next; one that found none takes one away.
const PAID: u8 = 2;

/// The most trust there is, and what there is in the beginning.
const TRUST: u8 = 8;

/// Without trust, one in so many is looked for all the same.
const TRY: u8 = 64;

/// How often an answer came, for one direction.
#[derive(Clone, Copy, Debug)]
struct Answers {
    trust: u8,
    untried: u8,
}

/// What is known of the packets so far.
#[derive(Debug)]
pub(super) struct Lookout {
    /// How long it lately took until something was there, smoothed.
    pause: Duration,
    /// When several packets came at once last.
    busy: Option<Duration>,
    /// What was carried since the last wait.
    outbound: Way,
    inbound: Way,
    /// Whose answer is looked for, or was found to be something.
    asked: Option<Direction>,
}

/// One direction.
#[derive(Clone, Copy, Debug)]
struct Way {
    packets: usize,
    answers: Answers,
}

impl Default for Lookout {
    fn default() -> Self {
        let way = Way { packets: 0, answers: Answers { trust: TRUST, untried: 0 } };
        Self { pause: LONG_PAUSE, busy: None, outbound: way, inbound: way, asked: None }
    }
}

impl Lookout {
    /// So many packets were read, and not dropped.
    pub(super) fn carried(&mut self, direction: Direction, packets: usize) {
        self.way(direction).packets += packets;
    }

    /// Before a wait: how long to look first, if at all.
    pub(super) fn look(&mut self, now: Duration) -> Option<Duration> {
        let outbound = std::mem::take(&mut self.outbound.packets);
        let inbound = std::mem::take(&mut self.inbound.packets);
        // What was found may have been something else.
        if let Some(asked) = self.asked.take()
            && outbound + inbound > 0
        {
            let answered = match asked {
                Direction::Outbound => inbound,
                Direction::Inbound => outbound,
            };
            self.way(asked).answers.note(answered > 0);
        }
        if outbound + inbound > 1 {
            self.busy = Some(now);
        }
        if self.pause < NEAR {
            return Some(NEAR);
        }
        let calm = self.busy.is_none_or(|busy| busy + CALM <= now);
        let lone = match (outbound, inbound) {
            (1, 0) => Direction::Outbound,
            (0, 1) => Direction::Inbound,
            _ => return None,
        };
        (calm && self.way(lone).answers.try_it()).then(|| {
            self.asked = Some(lone);
            ANSWER
        })
    }

    /// After the wait, which took as long; `found`: something was there before the look was over.
    pub(super) fn waited(&mut self, time: Duration, found: bool) {
        self.pause = (self.pause * 3 + time.min(LONG_PAUSE)) / 4;
        // One that other work cut short says nothing.
        if !found
            && let Some(asked) = self.asked.take()
            && time >= ANSWER
        {
            self.way(asked).answers.note(false);
        }
    }

    fn way(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::Outbound => &mut self.outbound,
            Direction::Inbound => &mut self.inbound,
        }
    }
}

impl Answers {
    fn try_it(&mut self) -> bool {
        self.untried += 1;
        let due = self.trust > 0 || self.untried >= TRY;
        if due {
            self.untried = 0;
        }
        due
    }

    fn note(&mut self, found: bool) {
        self.trust =
            if found { (self.trust + PAID).min(TRUST) } else { self.trust.saturating_sub(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// What is looked for after these packets, of which the next came so long after.
    fn after(
        lookout: &mut Lookout,
        now: Duration,
        packets: (Direction, usize),
        next: u64,
    ) -> Option<Duration> {
        lookout.carried(packets.0, packets.1);
        let look = lookout.look(now);
        lookout.waited(us(next), look.is_some_and(|look| us(next) < look));
        look
    }

    #[test]
    fn answers_are_looked_for_and_not_the_next_request() {
        let mut lookout = Lookout::default();
        let (mut answers, mut requests) = (0, 0);
        for i in 0..64 {
            let now = us(i * 3000);
            let out = after(&mut lookout, now, (Direction::Outbound, 1), 80);
            answers += u32::from(out == Some(ANSWER));
            let back = after(&mut lookout, now + us(80), (Direction::Inbound, 1), 2920);
            requests += u32::from(back.is_some());
        }
        assert_eq!(answers, 64);
        assert_eq!(requests, u32::from(TRUST), "as long as nothing was known");
    }

    #[test]
    fn where_none_answers_it_is_tried_seldom_and_learnt_again() {
        let mut lookout = Lookout::default();
        let mut looks = 0;
        for i in 0..8 + 64 * 3 {
            looks += u32::from(
                after(&mut lookout, us(i * 3000), (Direction::Outbound, 1), 3000).is_some(),
            );
        }
        assert_eq!(looks, u32::from(TRUST) + 3);
        for i in 0..64 {
            let now = us(900_000 + i * 3000);
            after(&mut lookout, now, (Direction::Outbound, 1), 50);
            after(&mut lookout, now + us(50), (Direction::Inbound, 1), 2950);
        }
        let look = after(&mut lookout, us(2_000_000), (Direction::Outbound, 1), 50);
        assert_eq!(look, Some(ANSWER));
    }

    #[test]
    fn the_next_of_the_same_direction_is_no_answer_and_a_command_says_nothing() {
        let mut lookout = Lookout::default();
        let looks = (0..64 * 4)
            .filter(|i| after(&mut lookout, us(i * 100), (Direction::Inbound, 1), 100).is_some());
        assert_eq!(looks.count(), usize::from(TRUST) + 3);
        let mut lookout = Lookout::default();
        for i in 0..64 {
            let now = us(i * 3000);
            let look = after(&mut lookout, now, (Direction::Outbound, 1), 80);
            assert_eq!(look, Some(ANSWER));
            // What woke it was a command; the answer came while that was obeyed.
            assert_eq!(after(&mut lookout, now + us(80), (Direction::Inbound, 0), 1000), None);
        }
    }

    #[test]
    fn acknowledgements_of_a_paced_stream_are_no_requests() {
        let mut lookout = Lookout::default();
        for i in 0..64 {
            let now = us(1_000_000 + i * 512);
            assert_eq!(after(&mut lookout, now, (Direction::Outbound, 46), 150), None);
            assert_eq!(after(&mut lookout, now + us(150), (Direction::Inbound, 1), 362), None);
        }
        let calm = us(1_000_000 + 64 * 512) + CALM;
        assert_eq!(after(&mut lookout, calm, (Direction::Inbound, 1), 50), Some(ANSWER));
    }

    #[test]
    fn what_is_near_is_looked_for() {
        let mut lookout = Lookout::default();
        for _ in 0..16 {
            after(&mut lookout, us(1_000_000), (Direction::Outbound, 46), 10);
        }
        assert_eq!(after(&mut lookout, us(1_000_000), (Direction::Outbound, 46), 10), Some(NEAR));
        for _ in 0..4 {
            after(&mut lookout, us(1_000_000), (Direction::Outbound, 46), 5000);
        }
        assert_eq!(after(&mut lookout, us(1_000_000), (Direction::Outbound, 46), 10), None);
        assert_eq!(lookout.look(us(2_000_000)), None, "nothing was carried");
    }
}

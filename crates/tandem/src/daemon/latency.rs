//! `low_latency`: while a few packets flow, the host's idle processors are kept awake. To wake one that halts takes longer
//! than everything that the gateway does with a packet, above all in a virtual machine. At a high rate they hardly halt.

use std::time::Duration;

use netio::idle::IdleStates;
use tracing::warn;

/// The packets are looked at this often.
const LOOK: Duration = Duration::from_millis(20);

/// Packets a second from which on nothing is kept awake.
const HIGH_RATE: u64 = 20_000;

/// So long after the last packet, processors may sleep again.
const LINGER: Duration = Duration::from_millis(200);

/// What is wanted of the host.
#[derive(Debug, Default)]
struct Wish {
    packets: u64,
    looked: Duration,
    last: Option<Duration>,
    awake: bool,
}

impl Wish {
    /// With this many packets carried so far; whether processors are to be kept awake, where that changes.
    fn look(&mut self, now: Duration, packets: u64) -> Option<bool> {
        let came = packets.saturating_sub(self.packets);
        let time = now.saturating_sub(self.looked).as_micros().max(1);
        (self.packets, self.looked) = (packets, now);
        if came > 0 {
            self.last = Some(now);
        }
        let rate = u128::from(came) * 1_000_000 / time;
        let recent = self.last.is_some_and(|last| now < last + LINGER);
        let awake = recent && rate < u128::from(HIGH_RATE);
        let changed = awake != self.awake;
        self.awake = awake;
        changed.then_some(awake)
    }
}

/// Sees to it.
#[derive(Debug)]
pub(super) struct LowLatency {
    states: IdleStates,
    wish: Wish,
    next: Duration,
}

impl LowLatency {
    pub(super) fn new(states: IdleStates) -> Self {
        Self { states, wish: Wish::default(), next: Duration::ZERO }
    }

    /// Looks if it is time to, at how many packets were carried so far. When to look next.
    pub(super) fn look(&mut self, now: Duration, packets: impl FnOnce() -> u64) -> Duration {
        if now >= self.next {
            self.next = now + LOOK;
            if let Some(awake) = self.wish.look(now, packets())
                && let Err(error) = self.states.keep_awake(awake)
            {
                warn!(%error, "low_latency: the kernel refuses");
            }
        }
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn awake_while_a_few_packets_flow() {
        let mut wish = Wish::default();
        assert_eq!(wish.look(ms(1000), 0), None, "nothing came yet");
        assert_eq!(wish.look(ms(1020), 2), Some(true));
        assert_eq!(wish.look(ms(1040), 2), None);
        assert_eq!(wish.look(ms(1060), 4), None);
        assert_eq!(wish.look(ms(1240), 4), None);
        assert_eq!(wish.look(ms(1260), 4), Some(false), "long after the last");
        assert_eq!(wish.look(ms(1280), 5), Some(true));
        assert_eq!(wish.look(ms(1300), 5 + 400), Some(false), "20,000 a second");
        assert_eq!(wish.look(ms(1320), 5 + 400 + 399), Some(true));
    }
}

//! What a worker read, wrote and dropped, beside its shard's own counters.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Live counters of one worker: written by it once per batch, read by anyone.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub(super) $name: AtomicU64,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Snapshot {
            /// Adds what another worker counted.
            pub(super) fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl Counters {
            pub(super) fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Packets read from the TUN, after splitting.
    tun_read,
    /// Reads of the TUN that gave several of these as one.
    tun_split,
    /// Packets read from the TUN, after splitting, that were not what their header said, or fitted no slot. A read that
    /// could not be split at all is one.
    tun_malformed,
    /// Packets written to the TUN.
    tun_written,
    /// Writes to the TUN that carried several of these as one.
    tun_merged,
    /// Packets that the TUN refused.
    tun_refused,
    /// ESP packets received, on port 4500 or as protocol 50.
    esp_received,
    /// IKE messages received on port 4500 and queued for control.
    ike_received,
    /// IKE messages dropped because control's queue was full.
    ike_dropped,
    /// NAT keepalives received.
    keepalives,
    /// Datagrams too short for anything.
    short,
    /// Datagrams longer than a slot.
    truncated,
    /// Receive calls that failed.
    receive_errors,
    /// Datagrams and packets that the kernel dropped before they were read: mostly, the receive buffer was full.
    receive_dropped,
    /// ESP packets that the kernel took.
    sent,
    /// ESP packets that it did not take, for these reasons and others (no socket for protocol 50, …).
    unsent,
    /// The send buffer was full.
    unsent_full,
    /// There was no route.
    unsent_unreachable,
    /// A firewall of this host refused.
    unsent_refused,
    /// The endpoint's address was not here.
    unsent_not_local,
    /// They were larger than the kernel takes.
    unsent_too_large,
    /// Packets judged inside the fence and dropped right before they would have left.
    late,
    /// Batches with such packets.
    late_batches,
    /// Packets handed to the other instance.
    steered,
    /// Packets that should have been, while there was no way to.
    steer_lost,
    /// Steered datagrams that came to control's socket and the queue had no room for. The one counter that control writes.
    steer_refused,
    /// Packets that the other instance handed to us.
    steered_in,
    /// Datagrams of the pair link that were for control, whose queue was full.
    stray_dropped,
    /// Packets handed to another worker.
    handed,
    /// Packets that should have been, while it was slow.
    hand_lost,
    /// Packets that another worker handed to this one.
    handed_in,
}

/// Adds to a counter that only this thread writes.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    if count > 0 {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }
}

impl Snapshot {
    /// What the workers themselves dropped, by reason; reasons that never occurred are left out. The names do not meet the
    /// shard's.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let told = self.unsent_full
            + self.unsent_unreachable
            + self.unsent_refused
            + self.unsent_not_local
            + self.unsent_too_large;
        [
            ("fenced_late", self.late),
            ("send_buffer_full", self.unsent_full),
            ("no_route", self.unsent_unreachable),
            ("firewall", self.unsent_refused),
            ("address_absent", self.unsent_not_local),
            ("beyond_mtu", self.unsent_too_large),
            ("socket_refused", self.unsent.saturating_sub(told)),
            ("receive_dropped", self.receive_dropped),
            ("tun_refused", self.tun_refused),
            ("tun_malformed", self.tun_malformed),
            ("truncated", self.truncated),
            ("too_short", self.short),
            ("ike_queue_full", self.ike_dropped),
            ("steer_lost", self.steer_lost),
            ("worker_queue_full", self.hand_lost),
            ("steer_refused", self.steer_refused),
            ("stray_dropped", self.stray_dropped),
            ("receive_errors", self.receive_errors),
        ]
        .into_iter()
        .filter(|(_, n)| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_sent_is_told_by_its_reason_and_once() {
        let snapshot =
            Snapshot { unsent: 9, unsent_full: 4, unsent_refused: 3, ..Snapshot::default() };
        let drops: Vec<_> = snapshot.drops().collect();
        assert_eq!(drops, [("send_buffer_full", 4), ("firewall", 3), ("socket_refused", 2)]);
    }
}

//! What an endpoint begins by itself: connections that are to be up, paced, and
//! NAT keepalives.

use core::time::Duration;
use std::collections::BTreeSet;

use wire::id::ConnectionId;

use super::{Endpoint, SNOOZE, due::Due};
use crate::{
    Context, Keepalive,
    config::Start,
    state::{Fate, IkeSa},
};

impl Endpoint {
    /// Notes whether a connection that is to be up still is.
    pub(super) fn review(&mut self, now: Duration, name: &str) {
        let Some(conn) = self.registry.named(name) else { return };
        let id = conn.id;
        let wanted = conn.is_begun_by_us() && !self.stays_down(name);
        let (mut up, mut trying) = (false, false);
        for sa in self.table.of_connection(name) {
            up |= is_live(sa);
            trying |= sa.is_initiating();
        }
        if up {
            self.due.remove(id);
            self.doubted.remove(&id);
        } else if wanted && !trying {
            let tries = self.due.get(id).map_or(0, |due| due.tries);
            let pause = match tries {
                0 => Duration::ZERO,
                n => conn
                    .timers
                    .retry
                    .saturating_mul(1 << (n - 1).min(16))
                    .min(conn.timers.retry_max),
            };
            let peer = conn.remote_address.ip();
            self.due.insert(id, Due { at: now + pause, tries }, peer);
        }
    }

    /// The next connection to begin, and when, unless pacing (peers.md 12) holds all back until an attempt finishes.
    fn next_due(&self) -> Option<(Duration, ConnectionId)> {
        let limits = &self.registry.config.limits;
        if self.table.initiating() >= limits.initiations_total {
            return None;
        }
        self.due.next(|peer| self.table.initiating_to(peer) >= limits.initiations_per_peer)
    }

    /// Begins the connections that are due, paced.
    pub(super) fn start_due(&mut self, cx: &mut Context<'_>) {
        if cx.now < self.quiet_until {
            return;
        }
        // Each turn takes one from the list, or puts it off: the loop ends.
        while let Some((_, id)) = self.next_due().filter(|(at, _)| *at <= cx.now) {
            let Some(conn) = self.registry.by_id(id) else {
                self.due.remove(id);
                continue;
            };
            let (remote, name) = (conn.remote_address.ip(), conn.name.clone());
            let ours = conn.children.iter().any(|c| c.start == Start::Initiate);
            let retry_max = conn.timers.retry_max;
            let live = self.table.of_connection(&name).any(is_live);
            let trying = self.table.of_connection(&name).any(IkeSa::is_initiating);
            if remote.is_none() || live || !ours || self.stays_down(&name) {
                // A pause after `acquire` failed, or a start that came true.
                self.due.remove(id);
                continue;
            }
            if !trying {
                self.initiate(cx, id);
            }
            // Under way. Were its tries forgotten, a peer that refuses it would be asked again at once. What could not even
            // begin must not spin.
            let begun = self.table.of_connection(&name).any(IkeSa::is_initiating);
            self.due.postpone(id, cx.now + if begun { retry_max } else { SNOOZE });
        }
    }

    /// When [`Endpoint::start_due`] has something to begin.
    pub(super) fn next_start(&self) -> Option<Duration> {
        self.next_due().map(|(at, _)| at.max(self.quiet_until))
    }

    pub(super) fn send_keepalives(&mut self, now: Duration) {
        if self.keepalive_at.is_none_or(|at| at > now) {
            return;
        }
        let mut sent = BTreeSet::new();
        for sa in self.table.iter().filter(|sa| sa.path.nat_here && sa.established().is_some()) {
            if sent.insert((sa.path.local, sa.path.remote)) {
                self.keepalives.push_back(Keepalive { from: sa.path.local, to: sa.path.remote });
            }
        }
        self.keepalive_at = None;
        self.arm_keepalives(now);
    }

    /// RFC 3948 §4: whoever is behind a NAT sends them.
    pub(super) fn arm_keepalives(&mut self, now: Duration) {
        if self.keepalive_at.is_some() {
            return;
        }
        let interval = self
            .table
            .iter()
            .filter(|sa| sa.path.nat_here && sa.established().is_some())
            .filter_map(|sa| self.registry.of(sa))
            .map(|conn| conn.timers.keepalive)
            .filter(|interval| !interval.is_zero())
            .min();
        self.keepalive_at = interval.map(|interval| now + interval);
    }
}

/// Whether an IKE SA carries its connection.
pub(super) fn is_live(sa: &IkeSa) -> bool {
    sa.established().is_some_and(|e| matches!(e.fate, Fate::Live | Fate::Rival(..)))
}

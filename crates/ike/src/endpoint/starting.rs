//! What an endpoint begins by itself: connections that are to be up, paced, and
//! NAT keepalives.

use core::{net::IpAddr, time::Duration};
use std::collections::{BTreeMap, BTreeSet};

use wire::id::ConnectionId;

use super::{Due, Endpoint};
use crate::{
    Context, Keepalive,
    config::{RemoteAddress, Start},
    state::{Fate, IkeSa},
};

impl Endpoint {
    /// Notes whether a connection that is to be up still is.
    pub(super) fn review(&mut self, now: Duration, name: &str) {
        let Some(conn) = self.registry.named(name) else { return };
        let id = conn.id;
        let wanted = conn.children.iter().any(|c| c.start == Start::Initiate)
            && conn.remote_address != RemoteAddress::Any
            && !self.stays_down(name);
        let (mut up, mut trying) = (false, false);
        for sa in self.table.of_connection(name) {
            up |= is_live(sa);
            trying |= sa.is_initiating();
        }
        if up {
            self.due.remove(&id);
            self.doubted.remove(&id);
        } else if wanted && !trying {
            let tries = self.due.get(&id).map_or(0, |due| due.tries);
            let pause = match tries {
                0 => Duration::ZERO,
                n => conn
                    .timers
                    .retry
                    .saturating_mul(1 << (n - 1).min(16))
                    .min(conn.timers.retry_max),
            };
            self.due.insert(id, Due { at: now + pause, tries });
        }
    }

    /// Begins the connections that are due, paced (peers.md 12).
    pub(super) fn start_due(&mut self, cx: &mut Context<'_>) {
        if cx.now < self.quiet_until {
            return;
        }
        let due: Vec<ConnectionId> =
            self.due.iter().filter(|(_, d)| d.at <= cx.now).map(|(id, _)| *id).collect();
        if due.is_empty() {
            return;
        }
        let limits = self.registry.config.limits;
        let mut per_peer: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for sa in self.table.iter().filter(|sa| sa.is_initiating()) {
            *per_peer.entry(sa.path.remote.ip()).or_default() += 1;
        }
        let mut all: usize = per_peer.values().sum();
        for id in due {
            let Some(conn) = self.registry.by_id(id) else { continue };
            let (RemoteAddress::Ip(ip), name) = (conn.remote_address, conn.name.clone()) else {
                self.due.remove(&id);
                continue;
            };
            let live = self.table.of_connection(&name).any(is_live);
            let trying = self.table.of_connection(&name).any(IkeSa::is_initiating);
            let ours = conn.children.iter().any(|c| c.start == Start::Initiate);
            let retry_max = conn.timers.retry_max;
            if trying && !live && ours && !self.stays_down(&name) {
                // Under way. Were its tries forgotten, a peer that refuses it would be asked again at once.
                self.due.entry(id).and_modify(|due| due.at = cx.now + retry_max);
                continue;
            }
            if trying || live || !ours || self.stays_down(&name) {
                // A pause after `acquire` failed, or a start that came true.
                self.due.remove(&id);
                continue;
            }
            let of_peer = per_peer.entry(ip).or_default();
            if all >= limits.initiations_total || *of_peer >= limits.initiations_per_peer {
                continue;
            }
            *of_peer += 1;
            all += 1;
            self.initiate(cx, id);
        }
    }

    /// Whether the pacing above holds something back until another finishes.
    pub(super) fn next_start(&self) -> Option<Duration> {
        let limits = self.registry.config.limits;
        let initiating: Vec<IpAddr> = self
            .due
            .values()
            .next()
            .map(|_| {
                self.table
                    .iter()
                    .filter(|sa| sa.is_initiating())
                    .map(|sa| sa.path.remote.ip())
                    .collect()
            })
            .unwrap_or_default();
        self.due
            .iter()
            .filter(|(id, _)| {
                let remote = self.registry.by_id(**id).map(|c| c.remote_address);
                let of_peer = match remote {
                    Some(RemoteAddress::Ip(ip)) => initiating.iter().filter(|r| **r == ip).count(),
                    _ => 0,
                };
                initiating.len() < limits.initiations_total && of_peer < limits.initiations_per_peer
            })
            .map(|(_, due)| due.at.max(self.quiet_until))
            .min()
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

//! Connections that are to be begun, each at its time: the next one whose peer
//! has room for a further attempt is found without a walk over all of them.

use core::{net::IpAddr, time::Duration};
use std::collections::{BTreeMap, BTreeSet};

use wire::id::ConnectionId;

/// When a connection that is to be up is tried next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) at: Duration,
    pub(super) tries: u32,
}

/// Where the remote gateway is; none for `any`.
type Peer = Option<IpAddr>;

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct DueList {
    all: BTreeMap<ConnectionId, (Due, Peer)>,
    of_peer: BTreeMap<Peer, BTreeSet<(Duration, ConnectionId)>>,
    /// The first of each peer.
    heads: BTreeSet<(Duration, Peer)>,
}

impl DueList {
    pub(super) fn get(&self, id: ConnectionId) -> Option<Due> {
        self.all.get(&id).map(|(due, _)| *due)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn insert(&mut self, id: ConnectionId, due: Due, peer: Peer) {
        self.remove(id);
        self.all.insert(id, (due, peer));
        self.change(peer, |list| list.insert((due.at, id)));
    }

    pub(super) fn remove(&mut self, id: ConnectionId) {
        if let Some((due, peer)) = self.all.remove(&id) {
            self.change(peer, |list| list.remove(&(due.at, id)));
        }
    }

    /// Not before `at`.
    pub(super) fn postpone(&mut self, id: ConnectionId, at: Duration) {
        if let Some((due, peer)) = self.all.get(&id).copied() {
            self.insert(id, Due { at, ..due }, peer);
        }
    }

    /// The next one, of those whose peer is not full. Full peers are passed over one by one: there are no more of them
    /// than there may be attempts under way.
    pub(super) fn next(
        &self,
        is_full: impl Fn(IpAddr) -> bool,
    ) -> Option<(Duration, ConnectionId)> {
        let free = |(_, peer): &&(Duration, Peer)| !peer.is_some_and(&is_full);
        let (_, peer) = self.heads.iter().find(free)?;
        self.of_peer.get(peer)?.first().copied()
    }

    fn change(
        &mut self,
        peer: Peer,
        change: impl FnOnce(&mut BTreeSet<(Duration, ConnectionId)>) -> bool,
    ) {
        let list = self.of_peer.entry(peer).or_default();
        if let Some((at, _)) = list.first() {
            self.heads.remove(&(*at, peer));
        }
        change(list);
        match list.first() {
            Some((at, _)) => {
                self.heads.insert((*at, peer));
            }
            None => {
                self.of_peer.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PEERS: [Peer; 3] = [
        None,
        Some(IpAddr::V4(core::net::Ipv4Addr::LOCALHOST)),
        Some(IpAddr::V4(core::net::Ipv4Addr::BROADCAST)),
    ];

    proptest! {
        #[test]
        fn the_next_is_the_earliest_whose_peer_is_not_full(
            steps in proptest::collection::vec((0_u16..8, 0_u64..20, 0_u8..4), 1..60),
            full in 0_usize..4,
        ) {
            let mut list = DueList::default();
            let mut model: BTreeMap<ConnectionId, (Due, Peer)> = BTreeMap::new();
            let is_full = |peer: IpAddr| PEERS.get(full).copied().flatten() == Some(peer);
            for (n, at, what) in steps {
                let (id, peer) = (ConnectionId(n), PEERS[usize::from(n) % PEERS.len()]);
                let at = Duration::from_secs(at);
                match what {
                    0 => {
                        list.remove(id);
                        model.remove(&id);
                    }
                    1 => {
                        list.postpone(id, at);
                        if let Some((due, _)) = model.get_mut(&id) {
                            due.at = at;
                        }
                    }
                    tries => {
                        let due = Due { at, tries: tries.into() };
                        list.insert(id, due, peer);
                        model.insert(id, (due, peer));
                    }
                }
                prop_assert_eq!(list.get(id), model.get(&id).map(|(due, _)| *due));
                let free = model.iter().filter(|(_, (_, peer))| !peer.is_some_and(is_full));
                // Of equal times any may come first.
                let wanted = free.map(|(_, (due, _))| due.at).min();
                prop_assert_eq!(list.next(is_full).map(|(at, _)| at), wanted);
                let found = list.next(is_full).and_then(|(_, id)| model.get(&id));
                prop_assert_eq!(found.map(|(due, _)| due.at), wanted);
            }
            for id in model.into_keys() {
                list.remove(id);
            }
            prop_assert!(list.of_peer.is_empty() && list.heads.is_empty());
        }
    }
}

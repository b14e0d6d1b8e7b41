//! The modelled gateway: obeys the events as the real one must, plays a worker that sends numbered
//! packets, and checks the invariants with the eyes of someone who sees both hosts.

use super::world::{Act, MS, Us, World};
use crate::*;
use std::collections::{BTreeMap, BTreeSet};

/// One endpoint at one host.
#[derive(Default)]
pub(super) struct Gateway {
    pub(super) own: Option<Term>,
    pub(super) hold: bool,
    pub(super) mode: Option<Mode>,
    /// Acquired without exact state, so numbers and records are in doubt.
    pub(super) doubt: bool,
    /// What the events built.
    map: BTreeMap<u64, Vec<u8>>,
    /// The next sequence number; the ceiling known to be held by both; whether it is obeyed.
    next: u64,
    ceiling: u64,
    obey: bool,
    asked: BTreeMap<SideId, u64>,
    sync: Option<SyncId>,
    /// Records that wait for their acknowledgement: position, content.
    waiting: BTreeMap<u64, u64>,
    /// The highest ceiling that our grant allowed the other.
    granted: u64,
    /// What the workers have yet to confirm, and the position that they have.
    applying: Vec<(ApplyId, u64)>,
    installed: u64,
}

/// A modelled value is 8 bytes and the release in whose format it is written.
fn in_format(value: &[u8], release: u32) -> Vec<u8> {
    value.iter().take(8).copied().chain([release as u8]).collect()
}

/// What it says, in whatever format.
fn body(value: &[u8]) -> &[u8] {
    value.get(..8).unwrap_or(value)
}

/// What a record puts and deletes.
type Content = (Vec<(u64, Vec<u8>)>, Vec<u64>);

/// What was seen of one endpoint by the world.
#[derive(Default)]
struct Seen {
    acquired: BTreeSet<(u64, u64)>,
    terms: BTreeSet<u64>,
    numbers: BTreeMap<(u64, u64), bool>,
    sent: BTreeMap<(u64, u64), (u64, bool)>,
    /// Both own, after a partition: the log has two tails.
    forked: bool,
    /// Digest of the log at (lineage, term, position).
    digests: BTreeMap<(u64, u64, u64), u64>,
    /// The last value committed for each key, and whether it may be lost.
    pub(super) committed: BTreeMap<u64, Option<Vec<u8>>>,
}

#[derive(Default)]
pub(super) struct Ledger {
    seen: BTreeMap<u8, Seen>,
    content: BTreeMap<u64, Content>,
    serial: u64,
    pub(super) owns: Vec<(usize, Own)>,
    pub(super) handovers: usize,
    pub(super) announces: usize,
    pub(super) mismatches: usize,
    pub(super) warnings: Vec<(usize, Warning)>,
    pub(super) stood_down: Vec<(usize, Why)>,
    pub(super) quiet: usize,
    pub(super) modes: Vec<(usize, Mode)>,
    pub(super) resumes: usize,
    pub(super) packets: u64,
    pub(super) hooks: Vec<(usize, HookState, Term)>,
    mismatched_since: [Option<Us>; 2],
}

impl World {
    pub(super) fn status(&self, host: usize, endpoint: u8) -> Option<EndpointStatus> {
        let pair = self.hosts[host].pair.as_ref()?;
        pair.status(self.local(host)).endpoints.get(usize::from(endpoint)).cloned()
    }

    pub(super) fn drain_events(&mut self, host: usize) {
        while let Some(event) = self.hosts[host].pair.as_mut().and_then(Pair::poll_event) {
            if self.verbose && !matches!(event, Event::Fence { .. }) {
                self.note(host, format!("{event:?}"));
            }
            self.event(host, event);
        }
        self.check_logs(host);
    }

    fn event(&mut self, host: usize, event: Event) {
        match event {
            Event::Own(own) => self.own(host, own),
            Event::Hold { endpoint } => {
                self.gw(host, endpoint).hold = true;
                let often = self.slow_counters;
                let slow = if self.rng.chance(often) { 70 * MS } else { 0 };
                let after = MS + self.rng.below(4 * MS) + slow;
                self.act(host, after, Act::Counters(endpoint.0));
            }
            Event::Resume { endpoint } => {
                self.ledger.resumes += 1;
                self.gw(host, endpoint).hold = false;
            }
            Event::StandDown { endpoint, why, counters_wanted } => {
                if counters_wanted {
                    self.rewrite(host, endpoint);
                }
                self.ledger.stood_down.push((host, why));
                let gateway = self.gw(host, endpoint);
                gateway.own = None;
                gateway.hold = false;
                gateway.mode = None;
                gateway.obey = false;
                gateway.sync = None;
                gateway.asked.clear();
                gateway.waiting.clear();
                if why == Why::Granted {
                    gateway.ceiling = gateway.ceiling.max(gateway.granted);
                }
                if counters_wanted {
                    let after = MS + self.rng.below(5 * MS);
                    self.act(host, after, Act::Counters(endpoint.0));
                }
            }
            Event::Apply { endpoint, id, batch, position } => {
                self.check_format(host, batch.puts.iter().map(|(_, value)| value.as_slice()));
                let gateway = self.gw(host, endpoint);
                gateway.applying.push((id, position.0));
                let map = &mut gateway.map;
                for (key, value) in batch.puts {
                    map.insert(key, value.to_vec());
                }
                for key in batch.deletes {
                    map.remove(&key);
                }
                let slow = self.slow;
                let after = self.rng.below(2 * MS) + self.rng.below(slow);
                self.act(host, after, Act::Applied(endpoint.0, id));
            }
            Event::Acked { endpoint, position } => self.acked(host, endpoint, position),
            Event::Side { endpoint, bytes } => {
                let ceiling = u64::from_le_bytes(bytes.0[..8].try_into().unwrap());
                let gateway = self.gw(host, endpoint);
                gateway.ceiling = gateway.ceiling.max(ceiling);
            }
            Event::SideAcked { endpoint, id } => {
                let after = self.rng.below(2 * MS);
                let gateway = self.gw(host, endpoint);
                if let Some(ceiling) = gateway.asked.remove(&id) {
                    gateway.ceiling = gateway.ceiling.max(ceiling);
                    if let Some(sync) = gateway.sync.take() {
                        // The workers obey from now on, then confirm.
                        gateway.obey = true;
                        self.act(host, after, Act::Confirm(endpoint.0, sync));
                    }
                }
            }
            Event::Mode { endpoint, mode } => {
                self.ledger.modes.push((host, mode));
                let before = self.gw(host, endpoint).mode.replace(mode);
                // Invariant 4: an owner goes solo only when the other knows, or counts as dead.
                let contact =
                    self.hosts[host].pair.as_ref().unwrap().status(self.local(host)).contact;
                if (before, mode) == (Some(Mode::Synced), Mode::Solo)
                    && contact
                    && self.solo_unheard(host, endpoint.0)
                {
                    self.fail("invariant 4: solo although the shadow believes itself in sync");
                }
                let gateway = self.gw(host, endpoint);
                match mode {
                    Mode::Solo => {
                        gateway.obey = false;
                        gateway.sync = None;
                        gateway.asked.clear();
                    }
                    Mode::Syncing(id) => {
                        gateway.sync = Some(id);
                        self.lease(host, endpoint.0);
                    }
                    Mode::Synced => {
                        if !gateway.obey {
                            self.fail("synced, but leases are not obeyed");
                        }
                    }
                }
            }
            Event::Fence { .. } => {}
            Event::Reserve { endpoint, up_to } => {
                let after = MS + self.rng.below(20 * MS);
                self.act(host, after, Act::Reserved(endpoint.0, up_to));
            }
            Event::Handover { endpoint, tail, counters } => {
                self.ledger.handovers += 1;
                if let Some(bytes) = counters.0.get(..8) {
                    let theirs = u64::from_le_bytes(bytes.try_into().unwrap());
                    let gateway = self.gw(host, endpoint);
                    gateway.next = gateway.next.max(theirs);
                }
                self.check_format(
                    host,
                    tail.iter().filter_map(|item| Some(item.value.as_ref()?.as_slice())),
                );
                let puts = tail
                    .into_iter()
                    .filter(|item| !item.touched)
                    .filter_map(|item| Some((item.key, item.value?.to_vec())))
                    .collect::<Vec<_>>();
                if !puts.is_empty() {
                    self.append(host, endpoint.0, puts, Vec::new());
                }
            }
            Event::Settled { release } => self.hosts[host].settled = release,
            Event::Rewrite { endpoint, exact } => {
                if !exact {
                    self.rewrite(host, endpoint);
                }
                let now = self.local(host);
                if let Some(pair) = self.hosts[host].pair.as_mut() {
                    pair.rewritten(now, endpoint);
                }
            }
            Event::Announce { .. } => self.ledger.announces += 1,
            Event::Notify { state, term, .. } => self.ledger.hooks.push((host, state, term)),
            Event::Quiet { .. } => self.ledger.quiet += 1,
            Event::Contact(_) => {}
            Event::Warning(warning) => {
                if matches!(warning, Warning::DigestMismatch { .. }) {
                    self.ledger.mismatches += 1;
                }
                self.ledger.warnings.push((host, warning));
            }
        }
    }

    /// Says all that is held once more, in the format that is settled.
    fn rewrite(&mut self, host: usize, endpoint: EndpointId) {
        let now = self.local(host);
        let release = self.hosts[host].settled;
        let held = self.gw(host, endpoint).map.clone();
        for (key, value) in held {
            let value = in_format(&value, release);
            let puts = vec![(key, Value::new(value.clone()))];
            let Some(pair) = self.hosts[host].pair.as_mut() else { return };
            if pair.rewrite(now, endpoint, Batch { puts, deletes: Vec::new() }).is_ok() {
                self.gw(host, endpoint).map.insert(key, value);
            }
        }
        if self.status(host, endpoint.0).is_some_and(|s| matches!(s.role, Role::Owner(_))) {
            self.record_log(host, endpoint.0);
        }
    }

    /// Whatever crosses the link is in the format that is settled for it.
    fn check_format<'a>(&self, host: usize, values: impl Iterator<Item = &'a [u8]>) {
        let release = self.hosts[host].settled;
        for value in values {
            if value.get(8).is_some_and(|format| u32::from(*format) != release) {
                self.fail("invariant 5: a value that is not in the settled format");
            }
        }
    }

    pub(super) fn gw(&mut self, host: usize, endpoint: EndpointId) -> &mut Gateway {
        &mut self.hosts[host].gateway[usize::from(endpoint.0)]
    }

    fn own(&mut self, host: usize, own: Own) {
        let status = self.status(host, own.endpoint.0).unwrap();
        let lost = self.hosts.iter().any(|h| h.lost_terms);
        let seen = self.ledger.seen.entry(own.endpoint.0).or_default();
        // Invariant 1: IVs are term and counter, so a term never comes twice under one key.
        if own.term.0 % 2 != host as u64 {
            self.fail("invariant 1: a term of the other's parity");
        }
        if !seen.acquired.insert((status.lineage.0, own.term.0))
            || (!seen.terms.insert(own.term.0) && !lost)
        {
            self.fail("invariant 1: a term was acquired twice");
        }
        seen.forked = false;
        if !own.synced {
            // In doubt: what was sent beyond our position is settled with the peers (RFC 6311).
            let from = (status.lineage.0, status.position.0 + 1);
            for (_, exempt) in seen.sent.range_mut(from..=(status.lineage.0, u64::MAX)) {
                exempt.1 = true;
            }
        }
        // What the events built is what is held.
        let held: BTreeMap<u64, Vec<u8>> = self.hosts[host]
            .pair
            .as_ref()
            .unwrap()
            .values(own.endpoint)
            .map(|(key, value)| (key, value.to_vec()))
            .collect();
        let gateway = self.gw(host, own.endpoint);
        if gateway.map != held {
            self.fail("the gateway was not told what the pair holds");
        }
        let kept = matches!(own.how, How::Heal | How::Resume);
        gateway.own = Some(own.term);
        gateway.hold = false;
        gateway.doubt = !own.synced || (kept && gateway.doubt);
        gateway.obey = own.obey_leases;
        gateway.asked.clear();
        match &own.how {
            How::Grant(payload) => {
                gateway.next = u64::from_le_bytes(payload.0[..8].try_into().unwrap());
                gateway.ceiling = u64::from_le_bytes(payload.0[8..16].try_into().unwrap());
            }
            How::Heal => {}
            How::Resume => gateway.next = gateway.next.max(gateway.granted),
            _ => gateway.next = gateway.ceiling.max(gateway.next) + own.seq_jump,
        }
        self.ledger.owns.push((host, own));
    }

    fn acked(&mut self, host: usize, endpoint: EndpointId, position: Position) {
        let other = 1 - host;
        let unheard = self.solo_unheard(host, endpoint.0);
        let Some(status) = self.status(host, endpoint.0) else { return };
        let gateway = self.gw(host, endpoint);
        let doubt = gateway.doubt;
        let term = gateway.own;
        let later = gateway.waiting.split_off(&(position.0 + 1));
        let done = core::mem::replace(&mut gateway.waiting, later);
        let solo = gateway.mode == Some(Mode::Solo) || gateway.mode.is_none();
        // Invariant 4: what is acknowledged is installed at the other, if it lives and follows.
        let theirs = self.status(other, endpoint.0);
        if !solo
            && let Some(theirs) = theirs
            && Some(theirs.term) == term
            && theirs.lineage == status.lineage
            && matches!(theirs.role, Role::Shadow { .. })
            && self.gw(other, endpoint).installed < position.0
        {
            self.fail("invariant 4: committed, but the shadow does not hold it");
        }
        let partitioned = self.partitioned();
        let both = (0..2).all(|host| {
            let h = &self.hosts[host];
            !h.paused && h.gateway.get(usize::from(endpoint.0)).is_some_and(|g| g.own.is_some())
        });
        self.ledger.seen.entry(endpoint.0).or_default().forked |= both;
        for (position, content) in done {
            let seen = self.ledger.seen.entry(endpoint.0).or_default();
            let exempt = doubt || unheard || partitioned || seen.forked;
            let before = seen.sent.insert((status.lineage.0, position), (content, exempt));
            if let Some((other, earlier)) = before
                && other != content
                && !earlier
                && !exempt
            {
                self.fail("invariant 4: two different records were sent for one position");
            }
            let (puts, deletes) = self.ledger.content[&content].clone();
            let seen = self.ledger.seen.entry(endpoint.0).or_default();
            for (key, value) in puts {
                seen.committed.insert(key, Some(value));
            }
            for key in deletes {
                seen.committed.insert(key, None);
            }
        }
    }

    /// The owner may act alone while the other, alive, still believes itself in sync (it was judged
    /// dead and does not know), or owns already under a higher term (after a partition or a pause).
    fn solo_unheard(&self, host: usize, endpoint: u8) -> bool {
        let gateway = &self.hosts[host].gateway[usize::from(endpoint)];
        let solo = !matches!(gateway.mode, Some(Mode::Synced | Mode::Syncing(_)));
        let theirs = self.hosts[1 - host].gateway.get(usize::from(endpoint));
        if theirs.is_some_and(|theirs| theirs.own > gateway.own) {
            return true;
        }
        solo && self.status(1 - host, endpoint).is_some_and(|theirs| {
            theirs.role == Role::Shadow { synced: true } && Some(theirs.term) == gateway.own
        })
    }

    fn append(&mut self, host: usize, endpoint: u8, puts: Vec<(u64, Vec<u8>)>, deletes: Vec<u64>) {
        let now = self.local(host);
        let release = self.hosts[host].settled;
        let puts: Vec<_> =
            puts.into_iter().map(|(key, value)| (key, in_format(&value, release))).collect();
        self.ledger.serial += 1;
        let serial = self.ledger.serial;
        self.ledger.content.insert(serial, (puts.clone(), deletes.clone()));
        let batch = Batch {
            puts: puts.iter().map(|(key, value)| (*key, Value::new(value.clone()))).collect(),
            deletes: deletes.clone(),
        };
        let Some(pair) = self.hosts[host].pair.as_mut() else { return };
        let Ok(position) = pair.append(now, EndpointId(endpoint), batch) else { return };
        let gateway = self.gw(host, EndpointId(endpoint));
        for (key, value) in puts {
            gateway.map.insert(key, value);
        }
        for key in deletes {
            gateway.map.remove(&key);
        }
        gateway.waiting.insert(position.0, serial);
        self.record_log(host, endpoint);
    }

    /// Remembers what the owner's log is at its head.
    fn record_log(&mut self, host: usize, endpoint: u8) {
        let status = self.status(host, endpoint).unwrap();
        let at = (status.lineage.0, status.term.0, status.position.0);
        self.ledger.seen.entry(endpoint).or_default().digests.insert(at, status.digest);
    }

    /// Invariant 7: at equal positions of one log, equal digests.
    fn check_logs(&mut self, host: usize) {
        for endpoint in 0..self.endpoints {
            let Some(status) = self.status(host, endpoint) else { return };
            let at = (status.lineage.0, status.term.0, status.position.0);
            let known = self.ledger.seen.get(&endpoint).and_then(|s| s.digests.get(&at)).copied();
            // A shadow may be damaged for as long as the comparison takes.
            if matches!(status.role, Role::Shadow { .. })
                && known.is_some_and(|digest| digest != status.digest)
            {
                self.ledger.mismatched(self.now, host);
            } else if matches!(status.role, Role::Shadow { .. }) {
                self.ledger.matched(host);
            }
            if matches!(status.role, Role::Owner(_)) {
                self.record_log(host, endpoint);
            }
        }
    }

    fn lease(&mut self, host: usize, endpoint: u8) {
        let now = self.local(host);
        let next = self.gw(host, EndpointId(endpoint)).next;
        let ceiling = next + 60;
        let h = &mut self.hosts[host];
        let Some(pair) = h.pair.as_mut() else { return };
        let bytes = ceiling.to_le_bytes().to_vec();
        if let Some(id) = pair.send_side(now, EndpointId(endpoint), SideKind::Acked, bytes) {
            h.gateway[usize::from(endpoint)].asked.insert(id, ceiling);
        }
    }

    pub(super) fn perform(&mut self, host: usize, act: Act) {
        let now = self.local(host);
        let Some(pair) = self.hosts[host].pair.as_mut() else { return };
        match act {
            Act::Reserved(endpoint, up_to) => {
                self.hosts[host].disk[usize::from(endpoint)] = Some(up_to);
                let pair = self.hosts[host].pair.as_mut().unwrap();
                pair.handle_reserved(now, EndpointId(endpoint), up_to);
            }
            Act::Applied(endpoint, id) => {
                pair.applied(now, EndpointId(endpoint), id);
                let gateway = self.gw(host, EndpointId(endpoint));
                for (_, position) in gateway.applying.extract_if(.., |(known, _)| *known <= id) {
                    gateway.installed = position;
                }
            }
            Act::Confirm(endpoint, id) => pair.confirm_ceilings(now, EndpointId(endpoint), id),
            Act::Counters(endpoint) => {
                let gateway = &mut self.hosts[host].gateway[usize::from(endpoint)];
                let mut bytes = gateway.next.to_le_bytes().to_vec();
                bytes.extend(gateway.ceiling.to_le_bytes());
                gateway.granted = gateway.ceiling;
                let pair = self.hosts[host].pair.as_mut().unwrap();
                pair.final_counters(now, EndpointId(endpoint), Opaque(bytes));
            }
            Act::Tick(endpoint) => {
                self.tick(host, endpoint);
                let after = 2 * MS + self.rng.below(8 * MS);
                self.act(host, after, Act::Tick(endpoint));
            }
            Act::Uplink(endpoint, up) => pair.handle_uplink(now, EndpointId(endpoint), up),
            Act::Switchover(endpoint) => {
                let result = pair.switchover(now, EndpointId(endpoint));
                self.note(host, format!("switchover: {result:?}"));
            }
            Act::Goodbye => pair.goodbye(now),
        }
    }

    /// The owner's workers and IKE at work.
    fn tick(&mut self, host: usize, endpoint: u8) {
        let id = EndpointId(endpoint);
        let now = self.local(host);
        let open = now < self.hosts[host].pair.as_ref().unwrap().fence(id);
        let Some(status) = self.status(host, endpoint) else { return };
        let gateway = self.gw(host, id);
        if gateway.own.is_none() || gateway.hold {
            return;
        }
        if self.workload && self.rng.chance(30) {
            let key = 1 + self.rng.below(6);
            let value = self.rng.draw().to_le_bytes().to_vec();
            let other = 1 + self.rng.below(6);
            if self.rng.chance(25) {
                self.append(host, endpoint, vec![], vec![key]);
            } else {
                self.append(host, endpoint, vec![(key, value.clone()), (other, value)], vec![]);
            }
        }
        let unheard = self.solo_unheard(host, endpoint);
        let gateway = self.gw(host, id);
        let low = gateway.obey && gateway.next + 30 >= gateway.ceiling && gateway.asked.is_empty();
        if open && (!gateway.obey || gateway.next < gateway.ceiling) {
            let number = gateway.next;
            gateway.next += 1;
            let exempt = gateway.doubt || unheard;
            self.ledger.packets += 1;
            let seen = self.ledger.seen.entry(endpoint).or_default();
            let before = seen.numbers.insert((status.lineage.0, number), exempt);
            if before == Some(false) && !exempt {
                self.fail("invariant 2: a sequence number was sent twice");
            }
            // Invariant 2: an owner in sync stays below what the shadow really holds.
            let obey = self.gw(host, id).obey;
            if obey
                && let Some(theirs) = self.status(1 - host, endpoint)
                && theirs.role == (Role::Shadow { synced: true })
                && theirs.term == status.term
                && self.gw(1 - host, id).ceiling <= number
            {
                self.fail("invariant 2: a number above the ceiling that the shadow holds");
            }
        }
        if low {
            self.lease(host, endpoint);
        }
    }

    /// After every step.
    pub(super) fn check(&mut self) {
        for endpoint in 0..self.endpoints {
            let mut passing = 0;
            for host in 0..2 {
                let h = &self.hosts[host];
                let Some(pair) = &h.pair else { continue };
                let owns = h.gateway[usize::from(endpoint)].own.is_some();
                let open = self.local(host) < pair.fence(EndpointId(endpoint));
                passing += usize::from(owns && open && !h.paused);
            }
            // Invariant 3.
            if passing == 2 && !self.partitioned() {
                self.fail("invariant 3: two instances pass the fence");
            }
        }
        if (0..2).any(|host| {
            let since = self.ledger.mismatched_since[host];
            let running = self.hosts[host].pair.is_some() && !self.hosts[host].paused;
            running && since.is_some_and(|at| self.now > at + 700 * MS)
        }) {
            self.fail("invariant 7: digests differ, and nothing was done about it");
        }
    }

    /// Invariant 5, for scenarios with one fault: everything committed is at the owner.
    pub(super) fn check_nothing_lost(&self) {
        for endpoint in 0..self.endpoints {
            let Some(seen) = self.ledger.seen.get(&endpoint) else { continue };
            let owner = (0..2).find(|host| {
                self.status(*host, endpoint).is_some_and(|s| matches!(s.role, Role::Owner(_)))
            });
            let Some(owner) = owner else { self.fail("nobody owns") };
            let map = &self.hosts[owner].gateway[usize::from(endpoint)].map;
            for (key, value) in &seen.committed {
                if map.get(key).map(|v| body(v)) != value.as_ref().map(|v| body(v)) {
                    self.fail(&format!("invariant 5: key {key} was committed and lost"));
                }
            }
        }
    }

    /// One owner in sync, one shadow in sync, for every endpoint.
    pub(super) fn converged(&self) -> bool {
        (0..self.endpoints).all(|endpoint| {
            let (Some(one), Some(two)) = (self.status(0, endpoint), self.status(1, endpoint))
            else {
                return false;
            };
            let pair = match (one.role, two.role) {
                (Role::Owner(Mode::Synced), Role::Shadow { synced: true }) => (one, two),
                (Role::Shadow { synced: true }, Role::Owner(Mode::Synced)) => (two, one),
                _ => return false,
            };
            pair.0.term == pair.1.term && pair.0.lineage == pair.1.lineage
        })
    }
}

impl Ledger {
    fn mismatched(&mut self, now: Us, host: usize) {
        self.mismatched_since[host].get_or_insert(now);
    }

    pub(super) fn matched(&mut self, host: usize) {
        self.mismatched_since[host] = None;
    }
}

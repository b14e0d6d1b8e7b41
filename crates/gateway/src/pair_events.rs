//! What `ha` decides, carried out: acquisitions, switchovers, shadows, healing.
//!
//! The order within each is ha.md's ("Takeover, in order", "Switchover, in order"); `ha` emits its events in that
//! order and the outputs keep it.

use std::collections::VecDeque;
use std::time::Duration;

use wire::id::{EndpointId, EspSpi, IkeSpi, Term};

use crate::bug::Bug;
use crate::endpoint::{Part, Sync};
use crate::face::Output;
use crate::machine::Gateway;
use crate::peer_message::{self, Counters, ExactSa, Side};

/// Direct arrivals wait at least this long after a switchover while steered packets pass (ha.md).
const HOLD_DIRECT: Duration = Duration::from_millis(2);

/// Packets that the other instance handed over while it still took us for the owner go back to it for so long.
const HAND_BACK: Duration = Duration::from_millis(100);

/// Above the sequence numbers of an SA that another instance made and did not tell the counters of: an unsynced takeover's
/// jump (ha.md), more than can be sent in the seconds of a split.
const UNKNOWN_JUMP: u64 = 1 << 28;

impl Gateway {
    pub(crate) fn handle_pair_event(&mut self, now: Duration, event: ha::Event) {
        match event {
            ha::Event::Own(own) => self.own(now, own),
            ha::Event::Hold { endpoint } => self.hold(endpoint),
            ha::Event::Resume { endpoint } => self.resume(now, endpoint),
            ha::Event::StandDown { endpoint, why, counters_wanted } => {
                self.stand_down(now, endpoint, why, counters_wanted);
            }
            ha::Event::Apply { endpoint, id, position, batch } => {
                self.apply(now, endpoint, id, position, batch)
            }
            ha::Event::Acked { endpoint, position } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) {
                    e.committed = e.committed.max(position.0);
                    self.release(usize::from(endpoint.0));
                    self.grant(now, EndpointId(endpoint.0));
                }
            }
            ha::Event::Side { endpoint, bytes } => self.side(endpoint, &bytes.0),
            ha::Event::SideAcked { endpoint, id } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) {
                    for ceiling in e.leases.acked(id) {
                        let spi_in = EspSpi(ceiling.spi_in);
                        self.outputs.push_back(Output::Shard(esp::Command::Lease {
                            spi_in,
                            ceiling: ceiling.ceiling,
                        }));
                    }
                    self.confirm_sync(now, EndpointId(endpoint.0));
                }
            }
            ha::Event::Mode { endpoint, mode } => self.mode(now, endpoint, mode),
            ha::Event::Quiet { endpoint, until } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) {
                    e.ike.hold_initiations(until);
                }
            }
            ha::Event::Fence { endpoint, valid_until } => {
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) {
                    if self.bug == Bug::FenceNeverLowered && valid_until < e.valid_until {
                        return;
                    }
                    e.valid_until = valid_until;
                    self.outputs.push_back(Output::Fence { endpoint: e.id, valid_until });
                }
            }
            ha::Event::Reserve { endpoint, up_to } => {
                self.outputs.push_back(Output::Reserve {
                    endpoint: EndpointId(endpoint.0),
                    up_to: Term(up_to.0),
                });
            }
            ha::Event::Announce { endpoint } => {
                self.outputs.push_back(Output::Announce { endpoint: EndpointId(endpoint.0) });
            }
            ha::Event::Notify { endpoint, state, term } => {
                let state = match state {
                    ha::HookState::Master => "MASTER",
                    ha::HookState::Backup => "BACKUP",
                    ha::HookState::Fault => "FAULT",
                };
                if let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) {
                    e.term = Term(term.0);
                }
                self.outputs.push_back(Output::Notify {
                    endpoint: EndpointId(endpoint.0),
                    state,
                    term: Term(term.0),
                });
            }
            ha::Event::Handover { endpoint, tail, counters } => {
                self.handover(now, endpoint, tail, &counters.0)
            }
            ha::Event::Settled { release } => self.settled(release),
            ha::Event::Rewrite { endpoint, exact } => self.rewrite(now, endpoint, exact),
            ha::Event::Contact(true) => tracing::info!("in contact with the other instance"),
            ha::Event::Contact(false) => {
                self.split_at = now;
                tracing::warn!("contact with the other instance is lost");
            }
            ha::Event::Warning(warning) => {
                let about = warning.endpoint().and_then(|id| self.endpoints.get(usize::from(id.0)));
                let endpoint = about.map(|e| e.name.as_str());
                match warning {
                    ha::Warning::DigestMismatch { .. } => tracing::error!(endpoint, "{warning}"),
                    _ => tracing::warn!(endpoint, "{warning}"),
                }
            }
        }
    }

    fn own(&mut self, now: Duration, own: ha::Own) {
        self.finish_applying(now, usize::from(own.endpoint.0));
        let rtt = self.pair.status(now).rtt.unwrap_or_default();
        let Some(e) = self.endpoints.get_mut(usize::from(own.endpoint.0)) else { return };
        let endpoint = e.id;
        let term = Term(own.term.0);
        let (kind, granted) = match &own.how {
            ha::How::Boot => ("start", None),
            ha::How::ProvenDeath => ("takeover", None),
            ha::How::Silence => ("takeover after silence", None),
            ha::How::Grant(payload) => ("switchover", peer_message::decode::<Counters>(&payload.0)),
            ha::How::Heal => ("heal", None),
            ha::How::Resume => ("switchover taken back", None),
            ha::How::Doubt => ("doubt", None),
            ha::How::Free => ("found free", None),
        };
        tracing::info!(endpoint = e.name, %term, how = kind, synced = own.synced, "this instance is the owner");
        *self.counters.changes.entry(kind).or_default() += 1;
        if let ha::How::Grant(_) = own.how {
            let Some(granted) = granted else {
                // Authenticated, so it is a bug of the other release. Without exact counters the SAs start at their
                // ceilings, which is always safe.
                tracing::error!(
                    endpoint = e.name,
                    "the grant's counters cannot be read; going on above the ceilings"
                );
                self.finish_own(now, own);
                return;
            };
            for exact in &granted.sas {
                e.leases.raise(EspSpi(exact.spi_in), exact.ceiling);
                if let Some(counters) = exact.counters() {
                    let resume = esp::Command::Resume { term, counters: Box::new(counters) };
                    self.outputs.push_back(Output::Shard(resume));
                }
            }
            let until = now + HOLD_DIRECT.max(rtt * 2);
            self.outputs.push_back(Output::Shard(esp::Command::HoldDirect { endpoint, until }));
        }
        self.finish_own(now, own);
    }

    fn finish_own(&mut self, now: Duration, own: ha::Own) {
        let index = usize::from(own.endpoint.0);
        let term = Term(own.term.0);
        let exact = own.synced || self.bug == Bug::DoubtIgnored;
        let (mut cx, endpoints) = self.context(now);
        let Some(e) = endpoints.get_mut(index) else { return };
        let inbox = match std::mem::replace(&mut e.part, Part::Owner { sync: None }) {
            Part::Holding { inbox, .. } => inbox,
            _ => VecDeque::new(),
        };
        e.term = term;
        e.owes_counters = false;
        e.leases.void();
        let doubt = if exact { ike::Doubt::None } else { ike::Doubt::InDoubt };
        if let Some(until) = own.quiet_until {
            e.ike.hold_initiations(until);
        }
        if let Err(problem) = e.ike.activate(&mut cx, term, doubt) {
            tracing::error!(endpoint = e.name, %term, %problem, "IKE cannot serve in this term");
        }
        for datagram in inbox {
            e.ike.handle_datagram(&mut cx, datagram.from, datagram.to, &datagram.bytes);
        }
        e.welcome_since = None;
        let endpoint = e.id;
        self.use_soon(now, Some(endpoint));
        // Home again, or needed here after all: an earlier wish of the operator is served.
        if self.bug != Bug::DeclineKept {
            self.decline(now, index, false);
        }
        self.outputs.push_back(Output::Shard(esp::Command::Own {
            endpoint,
            term,
            seq_jump: own.seq_jump,
            obey_leases: own.obey_leases,
        }));
        self.outputs.push_back(Output::Addresses { endpoint, present: true });
    }

    fn hold(&mut self, endpoint: ha::EndpointId) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        e.part = Part::Holding { inbox: VecDeque::new(), counters: None, granted: false };
        self.outputs.push_back(Output::Shard(esp::Command::Hold { endpoint: e.id }));
    }

    /// Hands the final counters to `ha` once the workers have stopped and nothing waits for commitment, so that every
    /// datagram that was decided here also left from here.
    pub(crate) fn grant(&mut self, now: Duration, endpoint: EndpointId) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        let ha_id = e.ha_id();
        let Part::Holding { counters: Some(counters), granted, .. } = &mut e.part else { return };
        if *granted || !e.held.is_empty() {
            return;
        }
        *granted = true;
        let payload = Counters { sas: counters.iter().map(ExactSa::of).collect() };
        self.pair.final_counters(now, ha_id, ha::Opaque(peer_message::encode(&payload)));
    }

    fn resume(&mut self, now: Duration, endpoint: ha::EndpointId) {
        let index = usize::from(endpoint.0);
        let (mut cx, endpoints) = self.context(now);
        let Some(e) = endpoints.get_mut(index) else { return };
        let Part::Holding { inbox, .. } =
            std::mem::replace(&mut e.part, Part::Owner { sync: None })
        else {
            return;
        };
        tracing::warn!(
            endpoint = e.name,
            "the other instance refused the switchover; this one goes on"
        );
        for datagram in inbox {
            e.ike.handle_datagram(&mut cx, datagram.from, datagram.to, &datagram.bytes);
        }
        let endpoint = e.id;
        self.outputs.push_back(Output::Shard(esp::Command::Release { endpoint }));
    }

    fn stand_down(
        &mut self,
        now: Duration,
        endpoint: ha::EndpointId,
        why: ha::Why,
        counters_wanted: bool,
    ) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        let endpoint = e.id;
        let steer = why == ha::Why::Granted;
        tracing::info!(endpoint = e.name, ?why, "this instance is no longer the owner");
        e.ike.deactivate();
        for spi_in in e.held.abandon() {
            self.outputs.push_back(Output::Shard(esp::Command::UseOutbound { spi_in }));
        }
        e.leases.void();
        e.owes_counters = counters_wanted;
        e.rewriting = None;
        let ha_id = e.ha_id();
        if counters_wanted {
            self.write_anew(now, ha_id);
        }
        let Some(e) = self.endpoints.get_mut(usize::from(ha_id.0)) else { return };
        let part = if steer { Part::Steering { last: now } } else { Part::Shadow };
        let inbox = match std::mem::replace(&mut e.part, part) {
            Part::Holding { inbox, .. } => inbox,
            _ => VecDeque::new(),
        };
        self.outputs.push_back(Output::Shard(esp::Command::Disown { endpoint, steer }));
        if steer {
            let until = now + HAND_BACK;
            self.outputs.push_back(Output::Shard(esp::Command::HandBack { endpoint, until }));
            for d in inbox {
                self.outputs.push_back(Output::SteerIke {
                    endpoint,
                    from: d.from,
                    to: d.to,
                    bytes: d.bytes,
                });
            }
        } else {
            self.outputs.push_back(Output::Addresses { endpoint, present: false });
        }
    }

    /// The loser of a split tells the winner where its SAs stand.
    pub(crate) fn yield_counters(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        counters: &[esp::Counters],
    ) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        if std::mem::take(&mut e.owes_counters) {
            let payload = Counters { sas: counters.iter().map(ExactSa::of).collect() };
            self.pair.final_counters(
                now,
                ha::EndpointId(endpoint.0),
                ha::Opaque(peer_message::encode(&payload)),
            );
        }
    }

    fn side(&mut self, endpoint: ha::EndpointId, bytes: &[u8]) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        match peer_message::decode::<Side>(bytes) {
            Some(Side::Ceilings(_)) if self.bug == Bug::CeilingsForgotten => {}
            Some(Side::Ceilings(list)) => {
                for said in list {
                    let spi_in = EspSpi(said.spi_in);
                    let ceiling = e.leases.raise(spi_in, said.ceiling);
                    self.outputs.push_back(Output::Shard(esp::Command::Lease { spi_in, ceiling }));
                }
            }
            Some(Side::Tops(list)) => {
                for said in list {
                    let spi_in = EspSpi(said.spi_in);
                    // Also for an SA that is not in the shards yet.
                    e.leases.heard_top(spi_in, said.top);
                    self.outputs
                        .push_back(Output::Shard(esp::Command::Window { spi_in, top: said.top }));
                }
            }
            None => tracing::warn!(
                endpoint = e.name,
                "a side message of the other instance cannot be read"
            ),
        }
    }

    fn mode(&mut self, now: Duration, endpoint: ha::EndpointId, mode: ha::Mode) {
        let index = usize::from(endpoint.0);
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let id = e.id;
        e.mode = mode;
        match mode {
            ha::Mode::Solo => {
                tracing::warn!(
                    endpoint = e.name,
                    "running solo: a second failure would lose the tunnels"
                );
                e.leases.void();
                if let Part::Owner { sync } = &mut e.part {
                    *sync = None;
                }
                self.outputs
                    .push_back(Output::Shard(esp::Command::ObeyLeases { endpoint: id, on: false }));
            }
            ha::Mode::Syncing(sync_id) => {
                if let Part::Owner { sync } = &mut e.part {
                    *sync = Some(Sync { id: sync_id, obeying: self.bug == Bug::LeasesIgnored });
                }
                for ceilings in e.leases.say_all() {
                    self.say_ceilings(now, index, ceilings);
                }
                let on = self.bug != Bug::LeasesIgnored;
                self.outputs
                    .push_back(Output::Shard(esp::Command::ObeyLeases { endpoint: id, on }));
            }
            ha::Mode::Synced => {
                tracing::info!(endpoint = e.name, "the other instance can take over at any moment");
                // With it the shards say all window tops: those of idle SAs may have been lost with a stream.
                let on = self.bug != Bug::LeasesIgnored;
                self.outputs
                    .push_back(Output::Shard(esp::Command::ObeyLeases { endpoint: id, on }));
            }
        }
    }

    /// `ha` learns that the shadow knows every ceiling, and that the shard obeys them.
    pub(crate) fn confirm_sync(&mut self, now: Duration, endpoint: EndpointId) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        let settled = e.leases.settled();
        let ha_id = e.ha_id();
        if let Part::Owner { sync } = &mut e.part
            && let Some(ready) = *sync
            && ready.obeying
            && settled
        {
            *sync = None;
            self.pair.confirm_ceilings(now, ha_id, ready.id);
        }
    }

    /// The winner of a split takes over what the loser did meanwhile (ha.md, "Split brain without a witness").
    fn handover(
        &mut self,
        now: Duration,
        endpoint: ha::EndpointId,
        tail: Vec<ha::TailItem>,
        counters: &[u8],
    ) {
        let index = usize::from(endpoint.0);
        let since = self.split_at;
        let (mut cx, endpoints) = self.context(now);
        let Some(e) = endpoints.get_mut(index) else { return };
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        // What is in doubt here was touched by that alone, and the loser knows better.
        let better = |item: &ha::TailItem, ike: &ike::Endpoint| {
            !item.touched || ike.is_waiting_in_doubt(IkeSpi(item.key))
        };
        for item in tail.into_iter().filter(|item| better(item, &e.ike)) {
            match item.value {
                Some(value) => puts.push((IkeSpi(item.key), value)),
                None => deletes.push(IkeSpi(item.key)),
            }
        }
        if let Err(error) = e.ike.adopt(&mut cx, since, &puts, &deletes) {
            tracing::error!(endpoint = e.name, %error, "the other instance's tail cannot be used");
        }
        let term = e.term;
        let exact = peer_message::decode::<Counters>(counters).unwrap_or_default();
        // The SAs just adopted must be in the shards before their counters are.
        let first = self.outputs.len();
        while self.step_ike(now, index) {}
        // Where the loser's counters did not come, its SAs go on far above what it can have used.
        for output in self.outputs.iter_mut().skip(first) {
            if let Output::Shard(esp::Command::Install(sa)) = output
                && !exact.sas.iter().any(|said| said.spi_in == sa.spi_in.0)
            {
                sa.next_seq = sa.next_seq.saturating_add(UNKNOWN_JUMP);
            }
        }
        for counters in exact.sas.iter().filter_map(ExactSa::counters) {
            // In the running term this is healing: the shard goes on above both and merges the windows.
            self.outputs.push_back(Output::Shard(esp::Command::Resume {
                term,
                counters: Box::new(counters),
            }));
        }
    }
}

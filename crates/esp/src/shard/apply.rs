//! What commands do to a shard.

use core::time::Duration;

use crypto::aead::IvSequence;
use wire::id::{EndpointId, EspSpi};

use super::{ENDED_MAX, Shard, move_top, note};
use crate::command::{Command, CommandError, Counters, Sa};
use crate::endpoint::{Endpoint, Obey, Role};
use crate::foreign::Foreign;
use crate::policy::Tunnel;
use crate::report::{Report, Snapshot};
use crate::sa::{Ended, SaState};

impl Shard {
    /// Applies one command.
    ///
    /// # Errors
    /// [`CommandError`]: nothing was changed.
    pub fn apply(&mut self, command: Command) -> Result<(), CommandError> {
        self.obeyed += 1;
        let at = self.obeyed;
        match command {
            // Their owner does it.
            Command::Move { spi_in, .. }
            | Command::Lease { spi_in, .. }
            | Command::Window { spi_in, .. }
                if self.is_foreign(spi_in) => {}
            Command::Resume { counters, .. } if self.is_foreign(counters.spi_in) => {}
            Command::Install(sa) if self.is_foreign(sa.spi_in) => self.install_foreign(*sa)?,
            Command::Policies(policies) => self.policies.configure(policies),
            Command::Install(sa) => self.install(*sa)?,
            Command::UseOutbound { spi_in } => {
                if let Some(sa) = self.foreign.get_mut(spi_in) {
                    sa.used = true;
                    self.policies.use_sa(sa.tunnel(), &sa.local_ts, &sa.remote_ts);
                    return Ok(());
                }
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                sa.used = true;
                self.policies.use_sa(tunnel_of(sa), &sa.local_ts, &sa.remote_ts);
            }
            Command::Move { spi_in, local, remote, udp_encap } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                sa.relocate(local, remote, udp_encap);
            }
            Command::Remove { spi_in } => self.remove(spi_in)?,
            Command::Own { endpoint, term, seq_jump, obey_leases } => {
                let e = self.endpoint(endpoint)?;
                if let Some(had) = e.term.filter(|had| *had > term) {
                    return Err(CommandError::StaleTerm { endpoint, had, got: term });
                }
                let obey = if obey_leases { Obey::Yes } else { Obey::No };
                e.role = Role::Owner { obey, held: false };
                if e.term != Some(term) {
                    e.ivs = IvSequence::new(term.0);
                }
                e.term = Some(term);
                e.seq_jump = seq_jump;
            }
            Command::ObeyLeases { endpoint, on } => self.obey_leases(endpoint, on)?,
            Command::Hold { endpoint } => {
                let e = self.endpoint(endpoint)?;
                let (Role::Owner { held, .. }, Some(term)) = (&mut e.role, e.term) else {
                    return Err(CommandError::NotOwner(endpoint));
                };
                *held = true;
                let counters = self.counters(endpoint);
                self.answers.push_back(Report::Held { endpoint, term, counters, at });
            }
            Command::Release { endpoint } => {
                let Role::Owner { held, .. } = &mut self.endpoint(endpoint)?.role else {
                    return Err(CommandError::NotOwner(endpoint));
                };
                *held = false;
            }
            Command::Disown { endpoint, steer } => {
                self.endpoint(endpoint)?;
                let mut counters = self.counters(endpoint);
                if !steer && self.endpoint(endpoint)?.ownership().is_some() {
                    // Whoever goes on after a split may still have what was removed here meanwhile.
                    let ended = self.ended.iter().filter(|ended| ended.endpoint == endpoint);
                    counters.extend(ended.map(Ended::counters));
                }
                let e = self.endpoint(endpoint)?;
                e.role = if steer { Role::Steering } else { Role::Idle };
                e.direct_until = Duration::ZERO;
                e.back_until = Duration::ZERO;
                let term = e.term;
                self.answers.push_back(Report::Disowned { endpoint, term, counters, at });
            }
            Command::Steer { endpoint, on } => self.endpoint(endpoint)?.others = on,
            Command::Pin { endpoint, on } => {
                self.endpoint(endpoint)?;
                self.policies.pin_to(endpoint, on);
            }
            Command::HandBack { endpoint, until } => self.endpoint(endpoint)?.back_until = until,
            Command::HoldDirect { endpoint, until } => {
                self.endpoint(endpoint)?.direct_until = until;
            }
            Command::Lease { spi_in, ceiling } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                if let Some(e) = self.endpoints.get_mut(usize::from(sa.endpoint.0)) {
                    // First into the term: a ceiling that is given in it must
                    // not move the place where the SA starts.
                    if let Some(own) = e.ownership() {
                        sa.enter_term(own);
                    }
                    if let Role::Owner { obey: Obey::Wanted { look }, .. } = &mut e.role {
                        *look = true;
                    }
                }
                sa.lease(ceiling);
                note(sa, &mut self.noted);
            }
            Command::Resume { term, counters } => {
                let spi_in = counters.spi_in;
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                let e = self.endpoints.get(usize::from(sa.endpoint.0));
                if let Some(own) = e.and_then(Endpoint::ownership).filter(|own| own.term == term) {
                    // Healing in the running term: an SA that was idle since the term began enters it now, so that
                    // the counters are merged with its own and do not replace them.
                    sa.enter_term(own);
                }
                sa.resume(term, &counters);
                note(sa, &mut self.noted);
            }
            Command::Window { spi_in, top } => {
                let sa = self.table.get_mut(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
                let owned = self
                    .endpoints
                    .get(usize::from(sa.endpoint.0))
                    .is_some_and(|e| e.ownership().is_some());
                // The last words of a former owner come too late: the grant's
                // exact window knows more.
                if !owned {
                    sa.refuse_through(top);
                }
            }
            Command::Query { token } => {
                let sas = self.table.iter().map(SaState::stats);
                let snapshot = Snapshot { token, stats: self.stats, sas: sas.collect() };
                self.answers.push_back(Report::Snapshot(Box::new(snapshot)));
            }
            Command::Flows { token, now } => {
                let flows = self.policies.flows(now);
                self.answers.push_back(Report::Flows { token, flows });
            }
        }
        Ok(())
    }

    fn obey_leases(&mut self, endpoint: EndpointId, on: bool) -> Result<(), CommandError> {
        let e = self.endpoint(endpoint)?;
        let Role::Owner { obey, .. } = &mut e.role else {
            return Err(CommandError::NotOwner(endpoint));
        };
        if !on {
            *obey = Obey::No;
            return Ok(());
        }
        if *obey != Obey::Yes {
            *obey = Obey::Wanted { look: true };
        } else {
            // Asked again, answered again.
            self.answers.push_back(Report::Obeying { endpoint, at: self.obeyed });
        }
        let Some(own) = self.endpoint(endpoint)?.ownership() else { return Ok(()) };
        for sa in self.table.iter_mut().filter(|sa| sa.endpoint == endpoint) {
            sa.enter_term(own);
            if !sa.below_ceiling() {
                sa.ask_lease();
            }
            note(sa, &mut self.noted);
            move_top(sa, &mut self.moved);
        }
        Ok(())
    }

    /// Has the endpoints that wait for ceilings looked at again.
    fn look_at_leases(&mut self) {
        for e in &mut self.endpoints {
            if let Role::Owner { obey: Obey::Wanted { look }, .. } = &mut e.role {
                *look = true;
            }
        }
    }

    fn remove(&mut self, spi_in: EspSpi) -> Result<(), CommandError> {
        if self.foreign.remove(spi_in).is_some() {
            self.policies.remove(spi_in);
            return Ok(());
        }
        let sa = self.table.remove(spi_in).ok_or(CommandError::UnknownSa(spi_in))?;
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(sa.ended());
        self.policies.remove(spi_in);
        self.noted.retain(|spi| *spi != spi_in);
        self.moved.retain(|spi| *spi != spi_in);
        self.look_at_leases();
        Ok(())
    }

    fn install(&mut self, sa: Sa) -> Result<(), CommandError> {
        let spi_in = sa.spi_in;
        let owned = self.endpoint(sa.endpoint)?.ownership().map(|own| own.term);
        if let Some(old) = self.table.get_mut(spi_in)
            && old.is_same(&sa)
        {
            old.update(sa);
            note(old, &mut self.noted);
            if old.used {
                self.policies.refresh(tunnel_of(old), &old.local_ts, &old.remote_ts);
            }
            return Ok(());
        }
        let other = self.table.other_at(spi_in).map(|other| (other.spi_in, other.endpoint));
        self.make_room(sa.endpoint, other)?;
        let mut state = SaState::new(sa, owned)?;
        self.ended.retain(|ended| !state.recall(ended));
        self.table.insert(state)?;
        // Other keys: whatever was in use under this SPI is gone.
        self.policies.remove(spi_in);
        self.noted.retain(|spi| *spi != spi_in);
        self.moved.retain(|spi| *spi != spi_in);
        // An SA is in each list at most once, so packets never make them grow.
        let room = self.table.len();
        self.noted.reserve(room.saturating_sub(self.noted.len()));
        self.moved.reserve(room.saturating_sub(self.moved.len()));
        if let Some(sa) = self.table.get_mut(spi_in) {
            note(sa, &mut self.noted);
        }
        Ok(())
    }

    /// An SA of another worker: where it leads, so that packets are handed there.
    fn install_foreign(&mut self, sa: Sa) -> Result<(), CommandError> {
        let spi_in = sa.spi_in;
        self.endpoint(sa.endpoint)?;
        if let Some(old) = self.foreign.get_mut(spi_in)
            && old.is_same(&sa)
        {
            old.update(sa);
            if old.used {
                self.policies.refresh(old.tunnel(), &old.local_ts, &old.remote_ts);
            }
            return Ok(());
        }
        let other = self.foreign.other_at(spi_in).map(|other| (other.spi_in, other.endpoint));
        self.make_room(sa.endpoint, other)?;
        self.foreign.insert(Foreign::new(sa))?;
        self.policies.remove(spi_in);
        Ok(())
    }

    /// Another instance that lost everything chooses SPIs anew. What its earlier life chose at an endpoint that is not
    /// ours is history, if it did so: that endpoint's records will say so a moment later.
    fn make_room(
        &mut self,
        endpoint: EndpointId,
        other: Option<(EspSpi, EndpointId)>,
    ) -> Result<(), CommandError> {
        if let Some((spi_in, of)) = other
            && of != endpoint
            && self.endpoint(of)?.ownership().is_none()
        {
            self.remove(spi_in)?;
        }
        Ok(())
    }

    /// Exact counters of all own SAs of an endpoint that is owned; else none.
    fn counters(&mut self, endpoint: EndpointId) -> Vec<Counters> {
        let own = self.endpoint(endpoint).ok().and_then(|e| e.ownership());
        let Some(own) = own else { return Vec::new() };
        let of_it = self.table.iter_mut().filter(|sa| sa.endpoint == endpoint);
        of_it
            .map(|sa| {
                sa.enter_term(own);
                sa.counters()
            })
            .collect()
    }

    pub(super) fn endpoint(&mut self, endpoint: EndpointId) -> Result<&mut Endpoint, CommandError> {
        self.endpoints
            .get_mut(usize::from(endpoint.0))
            .ok_or(CommandError::UnknownEndpoint(endpoint))
    }
}

fn tunnel_of(sa: &SaState) -> Tunnel {
    Tunnel { endpoint: sa.endpoint, connection: sa.connection, spi_in: sa.spi_in }
}

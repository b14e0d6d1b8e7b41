//! The face of replication: a shadow applies records, takes over, hands back.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use crypto::aead::IvSequence;
use wire::id::{EspSpi, IkeSpi, Term};
use zeroize::Zeroizing;

use super::{Buried, Endpoint};
use crate::{
    ActivateError, ChildOp, Context, Doubt, established,
    event::DeleteReason,
    note::Note,
    record::{self, Record, RecordError, Stamp},
    state::{Established, IkeSa, Phase},
    sync,
};

/// What a batch of records holds.
#[derive(Default)]
struct Decoded {
    sas: BTreeMap<IkeSpi, IkeSa>,
    notes: Vec<Note>,
}

impl Endpoint {
    /// Forgets every SA (before a snapshot is applied). Gives what the workers
    /// must forget.
    ///
    /// # Errors
    /// [`RecordError::Owner`] while we own the endpoint.
    pub fn clear(&mut self) -> Result<Vec<ChildOp>, RecordError> {
        if self.active {
            return Err(RecordError::Owner);
        }
        let all: Vec<IkeSpi> = self.table.iter().map(|sa| sa.spi).collect();
        let changes = all.into_iter().map(|spi| (spi, None)).collect();
        self.notes.clear();
        Ok(self.table.commit(&self.registry, changes))
    }

    /// Every record as of `now`, its ages fresh, in the format that is written now.
    #[must_use]
    pub fn snapshot(&self, now: Duration) -> Vec<(IkeSpi, Zeroizing<Vec<u8>>)> {
        let format = self.format;
        let notes = self.notes.iter().filter_map(|note| {
            Some((record::note_key(&note.connection), record::encode_note(note, format, now)?))
        });
        let sas = self.table.iter().map(|sa| (sa.spi, record::encode(sa, format, now)));
        sas.chain(notes).collect()
    }

    /// The keys of [`Endpoint::snapshot`].
    #[must_use]
    pub fn record_keys(&self) -> Vec<IkeSpi> {
        let notes = self.notes.iter().map(|note| record::note_key(&note.connection));
        self.table.iter().map(|sa| sa.spi).chain(notes).collect()
    }

    /// Those of IKE SAs alone.
    pub fn sa_keys(&self) -> impl Iterator<Item = IkeSpi> + '_ {
        self.table.iter().map(|sa| sa.spi)
    }

    /// Whether notes have records in the format that is written now.
    #[must_use]
    pub fn format_has_notes(&self) -> bool {
        self.format >= record::NOTES_FORMAT
    }

    /// One record of [`Endpoint::snapshot`]; `None` if there is none by this key.
    #[must_use]
    pub fn record(&self, key: IkeSpi, now: Duration) -> Option<Zeroizing<Vec<u8>>> {
        if let Some(sa) = self.table.get(key) {
            return Some(record::encode(sa, self.format, now));
        }
        let connection = self.registry.noted(key)?;
        self.notes.record(&connection.name, self.format, now)?.1
    }

    /// All it takes to fill empty workers.
    #[must_use]
    pub fn install_all(&self) -> Vec<ChildOp> {
        self.table.install_all(&self.registry)
    }

    /// Inbound ESP SPIs in use or reserved, whichever instance chose them: an
    /// allocator must not hand them out.
    pub fn esp_spis(&self) -> impl Iterator<Item = EspSpi> + '_ {
        self.table.esp_spis()
    }

    /// Makes the shadow the owner in a new term (or the owner, in a further one):
    /// repeats outstanding requests
    /// byte for byte, arms timers, starts what is to be up.
    ///
    /// # Errors
    /// [`ActivateError::OldTerm`] unless `term` is above every earlier one.
    pub fn activate(
        &mut self,
        cx: &mut Context<'_>,
        term: Term,
        doubt: Doubt,
    ) -> Result<(), ActivateError> {
        if self.term.is_some_and(|old| old >= term) {
            return Err(ActivateError::OldTerm);
        }
        // A new term is a new IV space for every key (ha.md).
        self.ivs = IvSequence::new(term.0);
        self.term = Some(term);
        if !self.active {
            // What an earlier ownership left unpolled was never committed. (A further term of the same ownership is
            // how healing begins: what ended in it is still to be remembered.)
            self.transitions.clear();
            self.buried = Buried::default();
        }
        self.active = true;
        self.due.clear();
        self.doubted.clear();
        self.doubtful.clear();
        self.used.clear();
        self.snoozed.clear();
        let now = cx.now;
        // The peer may have been heard by the old owner since the record.
        self.table.adjust_all(&self.registry, |sa| {
            if let Phase::Established(e) = &mut sa.phase {
                e.heard = Stamp::at(now);
            }
        });
        let ivs = &self.ivs;
        let concerns = |sa: &&IkeSa| {
            doubt == Doubt::InDoubt
                || sa.in_doubt()
                || sa.outstanding().is_some()
                || sa.established().is_some_and(|e| !ivs.is_for(e.term))
        };
        let spis: Vec<IkeSpi> = self.table.iter().filter(concerns).map(|sa| sa.spi).collect();
        for spi in spis {
            let Some(sa) = self.table.get(spi).cloned() else { continue };
            // It could not even say that it ends: whoever is to be up begins anew.
            if sa.established().is_some_and(|e| !self.ivs.is_for(e.term)) {
                tracing::warn!(%spi, "the keys of an IKE SA have no IVs left: dropped");
                let _ =
                    self.step(cx, |step| established::drop_sa(step, &sa, DeleteReason::Expired));
                continue;
            }
            if doubt == Doubt::InDoubt || sa.in_doubt() {
                self.take_over_in_doubt(cx, sa);
            } else {
                self.repeat(now, &sa, false);
            }
        }
        self.resolve_doubts(cx);
        // Nothing is due so far, so those that are not ours to begin need no look.
        let ours = self.registry.config.connections.iter().filter(|c| c.is_begun_by_us());
        let names: Vec<String> = ours.map(|c| c.name.clone()).collect();
        for name in names {
            self.review(now, &name);
        }
        self.start_due(cx);
        self.arm_keepalives(now);
        Ok(())
    }

    /// Begins the exchanges that end doubts, once exchanges may begin.
    pub(super) fn resolve_doubts(&mut self, cx: &mut Context<'_>) {
        if cx.now < self.quiet_until {
            return;
        }
        for spi in core::mem::take(&mut self.doubtful) {
            // What the loser of a split knew exactly is no longer in doubt.
            let Some(sa) = self.table.get(spi).filter(|sa| sa.in_doubt()).cloned() else {
                continue;
            };
            let result = if sync::is_preferred(&sa) {
                self.step(cx, |step| sync::request(step, sa))
            } else {
                self.doubted.extend(self.registry.of(&sa).map(|c| c.id));
                self.step(cx, |step| sync::reestablish(step, sa))
            };
            if let Err(error) = result {
                // Nobody could speak in it ever again.
                tracing::warn!(%error, %spi, "a takeover left it in doubt: dropped");
                if let Some(sa) = self.table.get(spi).cloned() {
                    let _ = self
                        .step(cx, |step| established::drop_sa(step, &sa, DeleteReason::InDoubt));
                }
            }
        }
    }

    /// Marks what is in doubt; [`Endpoint::resolve_doubts`] ends it.
    fn take_over_in_doubt(&mut self, cx: &mut Context<'_>, mut sa: IkeSa) {
        let spi = sa.spi;
        // Nothing in either step can fail.
        let _ = match &mut sa.phase {
            // It only repeats its last answer.
            Phase::Closed(_) => Ok(()),
            // The other side, or the old owner towards it, may be further on:
            // whoever initiates begins anew.
            Phase::InitSent(_) | Phase::InitAnswered(_) | Phase::AuthSent(_) => {
                self.doubted.extend(self.registry.of(&sa).map(|c| c.id));
                self.step(cx, |step| established::drop_sa(step, &sa, DeleteReason::InDoubt))
            }
            Phase::Established(e) => {
                self.doubtful.insert(spi);
                e.set_in_doubt();
                // A later owner is to know of it, also if it takes over in the
                // quiet time.
                self.step(cx, |step| {
                    step.put(sa);
                    Ok(())
                })
            }
        };
    }

    /// Whether an IKE SA is in doubt and nothing was said in it since: what another
    /// instance knows of it is better.
    #[must_use]
    pub fn is_waiting_in_doubt(&self, spi: IkeSpi) -> bool {
        self.table.get(spi).and_then(IkeSa::established).is_some_and(Established::waits)
    }

    /// After a split brain healed (ha.md): takes over the loser's records of IKE
    /// SAs that have not changed here since `since`, the time of the split, or that
    /// wait in doubt here, so
    /// that what happened on the other side is not lost. Yields one transition.
    /// Gives how many records were taken.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing changes then.
    pub fn adopt(
        &mut self,
        cx: &mut Context<'_>,
        since: Duration,
        puts: &[(IkeSpi, Zeroizing<Vec<u8>>)],
        deletes: &[IkeSpi],
    ) -> Result<usize, RecordError> {
        let Decoded { sas: mut taken, notes } = self.decode_all(cx.now, puts)?;
        self.adopt_notes(cx.now, notes, deletes);
        let untouched = |spi: &IkeSpi| {
            self.used.get(spi).is_none_or(|at| *at <= since) || self.is_waiting_in_doubt(*spi)
        };
        taken.retain(|spi, _| untouched(spi) && !self.buried.ikes.contains(spi));
        // An IKE SA may have been rekeyed there and live under another name, while what it carries was ended here. One
        // that has nothing else left ended here with it; of the others, what ended stays ended.
        let mut ended = Vec::new();
        for (spi, sa) in &mut taken {
            let Phase::Established(e) = &mut sa.phase else { continue };
            let before = e.children.len();
            e.children.retain(|child| !self.buried.children.contains(&child.spi_in));
            if before > 0 && e.children.is_empty() {
                ended.push(*spi);
            }
        }
        taken.retain(|spi, _| !ended.contains(spi));
        let gone: Vec<IkeSpi> = deletes
            .iter()
            // Where a successor was not taken, its predecessor stays.
            .filter(|spi| ended.is_empty() && self.table.get(**spi).is_some() && untouched(spi))
            .copied()
            .collect();
        let count = taken.len() + gone.len();
        // Child SAs may have moved between the IKE SAs concerned; one that would
        // then stand in two places stays where it was used.
        let moved: BTreeSet<EspSpi> =
            taken.values().flat_map(|sa| sa.esp_spis().collect::<Vec<_>>()).collect();
        let clash = self.table.iter().any(|sa| {
            !taken.contains_key(&sa.spi)
                && !gone.contains(&sa.spi)
                && sa.esp_spis().any(|spi| moved.contains(&spi))
        });
        if clash || count == 0 {
            return Ok(0);
        }
        // What was in doubt there is in doubt here, and waits for the quiet time's
        // end as all the rest.
        for (spi, sa) in &mut taken {
            if let Phase::Established(e) = &mut sa.phase
                && e.doubt
            {
                e.set_in_doubt();
                self.doubtful.insert(*spi);
            }
        }
        // Nothing in it can fail.
        let _ = self.step(cx, |step| {
            taken.into_values().for_each(|sa| step.put(sa));
            gone.into_iter().for_each(|spi| step.delete(spi));
            Ok(())
        });
        Ok(count)
    }

    /// What an operator said, and what failed, on the other side of a split.
    fn adopt_notes(&mut self, now: Duration, notes: Vec<Note>, deletes: &[IkeSpi]) {
        let gone = deletes.iter().filter_map(|key| self.registry.noted(*key));
        let mut names: Vec<String> = gone.map(|connection| connection.name.clone()).collect();
        names.iter().for_each(|name| self.notes.remove(name));
        for note in notes {
            names.push(note.connection.clone());
            self.notes.set(note);
        }
        for name in names {
            self.put_note(&name, now);
        }
    }

    fn decode_all(
        &self,
        now: Duration,
        puts: &[(IkeSpi, Zeroizing<Vec<u8>>)],
    ) -> Result<Decoded, RecordError> {
        let mut all = Decoded::default();
        for (key, bytes) in puts {
            match self.decode(now, *key, bytes)? {
                Record::Sa(sa) => {
                    all.sas.insert(*key, *sa);
                }
                Record::Note(note) => all.notes.push(note),
            }
        }
        Ok(all)
    }

    /// No longer the owner; the state stays warm as a shadow's. What was not
    /// polled yet is dropped: it was not committed.
    pub fn deactivate(&mut self) {
        self.active = false;
        self.transitions.clear();
        self.keepalives.clear();
        self.due.clear();
        self.keepalive_at = None;
    }

    /// No exchange of ours begins before `until` (ha.md, split brain). Answers
    /// and repetitions go on. Call it before [`Endpoint::activate`].
    pub fn hold_initiations(&mut self, until: Duration) {
        self.quiet_until = until;
    }
}

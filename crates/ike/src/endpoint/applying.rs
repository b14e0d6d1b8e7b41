//! Records of the owner, applied by a shadow: all of a batch, or nothing.
//!
//! A snapshot of ten thousand tunnels takes a tenth of a second, in which an instance would send no heartbeat. So a
//! batch can be applied in parts:
//!
//! ```text
//!   Application ── decode, so many a part ──► all could be read ── commit, so many a part ──► done
//!                        └─ one could not: nothing was changed
//! ```
//! What is committed together is whole connections, since Child SAs move only between IKE SAs of one connection. The
//! Child SAs that are lost leave the workers before any other comes, since that may take the place of one in their
//! tables. So in between each connection is as it was, perhaps without what it loses, or as it is to be.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, btree_map};

use wire::id::{EspSpi, IkeSpi};
use zeroize::Zeroizing;

use super::Endpoint;
use crate::{
    ChildOp,
    note::Note,
    record::{self, Record, RecordError},
    state::IkeSa,
};

/// What becomes of IKE SAs.
type Changes = BTreeMap<IkeSpi, Option<IkeSa>>;
/// By connection; what belongs to none, by itself.
type Group = (Option<String>, Option<IkeSpi>);

/// A batch of records on its way into a shadow.
#[derive(Debug)]
pub struct Application {
    puts: std::vec::IntoIter<(IkeSpi, Zeroizing<Vec<u8>>)>,
    deletes: Vec<IkeSpi>,
    notes: Vec<Note>,
    groups: BTreeMap<Group, Changes>,
    /// Set when all is decoded: what is left to commit.
    decoded: Option<Decoded>,
}

#[derive(Debug)]
struct Decoded {
    /// Child SAs that no IKE SA has any more.
    lost: std::collections::btree_set::IntoIter<EspSpi>,
    groups: btree_map::IntoIter<Group, Changes>,
}

impl Application {
    /// The records as they came.
    #[must_use]
    pub fn new(puts: Vec<(IkeSpi, Zeroizing<Vec<u8>>)>, deletes: Vec<IkeSpi>) -> Self {
        Self {
            puts: puts.into_iter(),
            deletes,
            notes: Vec::new(),
            groups: BTreeMap::new(),
            decoded: None,
        }
    }
}

/// What a part came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// For the workers: removals first, since a Child SA may take the place of one that goes; the others in this order.
    pub ops: Vec<ChildOp>,
    /// Nothing is left to do.
    pub done: bool,
}

impl Endpoint {
    /// Applies records of the owner, each whole. Gives what the workers must hold, ready to run. Nothing changes on
    /// an error.
    ///
    /// # Errors
    /// See [`RecordError`]; [`RecordError::Owner`] while we own the endpoint.
    pub fn apply(
        &mut self,
        now: Duration,
        puts: &[(IkeSpi, Zeroizing<Vec<u8>>)],
        deletes: &[IkeSpi],
    ) -> Result<Vec<ChildOp>, RecordError> {
        let mut application = Application::new(puts.to_vec(), deletes.to_vec());
        let mut ops = Vec::new();
        loop {
            let part = self.apply_part(now, &mut application, usize::MAX)?;
            ops.extend(part.ops);
            if part.done {
                return Ok(ops);
            }
        }
    }

    /// The next part of an application: about `most` records. No other batch may be begun before it is done.
    ///
    /// # Errors
    /// As for [`Endpoint::apply`]: then nothing of the whole application was applied.
    pub fn apply_part(
        &mut self,
        now: Duration,
        application: &mut Application,
        most: usize,
    ) -> Result<Applied, RecordError> {
        if self.is_active() {
            return Err(RecordError::Owner);
        }
        if application.decoded.is_none() {
            for _ in 0..most {
                let Some((key, bytes)) = application.puts.next() else {
                    self.sort(application);
                    break;
                };
                match self.decode(now, key, &bytes)? {
                    Record::Sa(sa) => self.change(application, key, Some(*sa)),
                    Record::Note(note) => application.notes.push(note),
                }
            }
            return self.commit_part(application, most);
        }
        self.commit_part(application, most)
    }

    /// All could be decoded: deletes join in, and what will be lost is known.
    fn sort(&mut self, application: &mut Application) {
        for spi in core::mem::take(&mut application.deletes) {
            if let Some(connection) = self.registry.noted(spi) {
                self.notes.remove(&connection.name);
            }
            self.change(application, spi, None);
        }
        core::mem::take(&mut application.notes).into_iter().for_each(|note| self.notes.set(note));
        let groups = core::mem::take(&mut application.groups);
        let old = groups.values().flatten().filter_map(|(spi, _)| self.table.get(*spi));
        let new = groups.values().flatten().filter_map(|(_, new)| new.as_ref());
        let mut lost: BTreeSet<EspSpi> =
            old.flat_map(IkeSa::children).map(|child| child.spi_in).collect();
        for child in new.flat_map(IkeSa::children) {
            lost.remove(&child.spi_in);
        }
        application.decoded = Some(Decoded { lost: lost.into_iter(), groups: groups.into_iter() });
    }

    fn commit_part(
        &mut self,
        application: &mut Application,
        most: usize,
    ) -> Result<Applied, RecordError> {
        let Some(Decoded { lost, groups }) = &mut application.decoded else {
            return Ok(Applied::default());
        };
        let removals = lost.by_ref().take(most).map(|spi_in| ChildOp::Remove { spi_in });
        let removals: Vec<ChildOp> = removals.collect();
        let mut changes = Changes::new();
        while removals.len() + changes.len() < most {
            let Some((_, group)) = groups.next() else { break };
            changes.extend(group);
        }
        let done = lost.len() == 0 && groups.len() == 0;
        let mut ops = self.table.commit(&self.registry, changes);
        ops.retain(|op| !matches!(op, ChildOp::Remove { .. }));
        ops.extend(removals);
        Ok(Applied { ops, done })
    }

    /// Puts a change to the others of its connection.
    fn change(&self, application: &mut Application, spi: IkeSpi, new: Option<IkeSa>) {
        let old = self.table.get(spi);
        let name = new.as_ref().or(old).and_then(|sa| sa.connection.clone());
        let group = (name, None);
        let group = if group.0.is_none() { (None, Some(spi)) } else { group };
        application.groups.entry(group).or_default().insert(spi, new);
    }

    /// What a record holds, if it can be one of this endpoint's.
    pub(super) fn decode(
        &self,
        now: Duration,
        key: IkeSpi,
        bytes: &[u8],
    ) -> Result<Record, RecordError> {
        let record = record::decode(bytes, self.newest_format, now)?;
        let (filed, known) = match &record {
            Record::Sa(sa) => {
                (sa.spi == key, sa.connection.is_none() || self.registry.of(sa).is_some())
            }
            Record::Note(note) => {
                let filed = record::note_key(&note.connection) == key;
                (filed, self.registry.noted(key).is_some())
            }
        };
        match (filed, known) {
            (false, _) => Err(RecordError::Key),
            (_, false) => Err(RecordError::Connection),
            (true, true) => Ok(record),
        }
    }
}

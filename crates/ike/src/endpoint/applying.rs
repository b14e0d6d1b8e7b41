//! Records of the owner, applied by a shadow: all of a batch, or nothing.
//!
//! A snapshot of ten thousand tunnels takes a tenth of a second, in which an instance would send no heartbeat. So a
//! batch can be applied in parts:
//!
//! ```text
//!   Application ── decode, so many a part ──► all could be read ── commit, so many a part ──► done
//!                        └─ one could not: nothing was changed
//! ```
//! What is committed together is whole connections, since Child SAs move only between IKE SAs of one connection; and
//! all that loses a Child SA comes first, in one part, since another may take its place in the workers' tables. So in
//! between each connection is as it was, or as it is to be.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, btree_map};

use wire::id::IkeSpi;
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
    /// Groups that lose a Child SA.
    losing: BTreeSet<Group>,
    /// Set when all is decoded: what is left to commit.
    decoded: Option<btree_map::IntoIter<Group, Changes>>,
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
            losing: BTreeSet::new(),
            decoded: None,
        }
    }
}

/// What a part came to.
#[derive(Debug, Default)]
pub struct Applied {
    /// For the workers, in this order.
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

    /// All could be decoded: deletes join in, and what is to be in one part comes first.
    fn sort(&mut self, application: &mut Application) {
        for spi in core::mem::take(&mut application.deletes) {
            if let Some(connection) = self.registry.noted(spi) {
                self.notes.remove(&connection.name);
            }
            self.change(application, spi, None);
        }
        core::mem::take(&mut application.notes).into_iter().for_each(|note| self.notes.set(note));
        let mut first = Changes::new();
        for group in &application.losing {
            first.extend(application.groups.remove(group).into_iter().flatten());
        }
        let mut groups = core::mem::take(&mut application.groups);
        if !first.is_empty() {
            // Before every name.
            groups.insert((None, None), first);
        }
        application.decoded = Some(groups.into_iter());
    }

    fn commit_part(
        &mut self,
        application: &mut Application,
        most: usize,
    ) -> Result<Applied, RecordError> {
        let Some(groups) = &mut application.decoded else { return Ok(Applied::default()) };
        let mut changes = Changes::new();
        while changes.len() < most {
            let Some((_, group)) = groups.next() else { break };
            changes.extend(group);
        }
        let done = groups.len() == 0;
        Ok(Applied { ops: self.table.commit(&self.registry, changes), done })
    }

    /// Puts a change to the others of its connection.
    fn change(&self, application: &mut Application, spi: IkeSpi, new: Option<IkeSa>) {
        let old = self.table.get(spi);
        let name = new.as_ref().or(old).and_then(|sa| sa.connection.clone());
        let group = (name, None);
        let group = if group.0.is_none() { (None, Some(spi)) } else { group };
        let keeps = |child: &crate::state::Child| {
            let children = new.as_ref().map(IkeSa::children).unwrap_or_default();
            children.iter().any(|c| c.spi_in == child.spi_in)
        };
        if old.is_some_and(|old| !old.children().iter().all(keeps)) {
            application.losing.insert(group.clone());
        }
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

//! What is known of a connection beside its IKE SAs, and must outlive a takeover:
//! that an operator took it down, and what last failed.
//!
//! Replicated from format 2 on. In format 1 a takeover forgets both, so a
//! connection that was taken down comes up again, and `tandem status` no longer
//! says why a tunnel is not there.
//!
//! A note that says nothing has no record.

use core::time::Duration;
use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use wire::id::IkeSpi;
use zeroize::Zeroizing;

use crate::record::{self, Now, Stamp};

/// Longest text of a failure, in bytes: it may quote what a peer sent.
const TEXT_MAX: usize = 1024;

/// About one connection.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Note {
    /// The connection's name; the record's key is made of it.
    #[n(0)]
    pub(crate) connection: String,
    /// An operator took it down.
    #[n(1)]
    pub(crate) held: bool,
    #[n(2)]
    pub(crate) failed: Option<Failed>,
}

/// What last failed.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Failed {
    /// One line, as in the log.
    #[n(0)]
    pub(crate) text: String,
    #[n(1)]
    pub(crate) at: Stamp,
}

impl Failed {
    pub(crate) fn new(mut text: String, now: Duration) -> Self {
        let cut = (0..=TEXT_MAX).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(cut.unwrap_or(0));
        Self { text, at: Stamp::at(now) }
    }
}

/// A note's record, or its removal.
pub(crate) type Change = (IkeSpi, Option<Zeroizing<Vec<u8>>>);

/// The notes of an endpoint, by connection.
#[derive(Debug, Default)]
pub(crate) struct Notes(BTreeMap<String, Note>);

impl Notes {
    pub(crate) fn is_held(&self, connection: &str) -> bool {
        self.0.get(connection).is_some_and(|note| note.held)
    }

    pub(crate) fn failed(&self, connection: &str) -> Option<&Failed> {
        self.0.get(connection)?.failed.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Note> {
        self.0.values()
    }

    /// Whether it was not so before.
    #[must_use]
    pub(crate) fn hold(&mut self, connection: &str, held: bool) -> bool {
        self.change(connection, |note| note.held = held)
    }

    /// `None` forgets. Whether it was not so before.
    #[must_use]
    pub(crate) fn fail(&mut self, connection: &str, what: Option<String>, now: Duration) -> bool {
        self.change(connection, |note| {
            note.failed = what.map(|text| Failed::new(text, now));
        })
    }

    fn change(&mut self, connection: &str, f: impl FnOnce(&mut Note)) -> bool {
        let old = self.0.remove(connection);
        let mut new = old.clone().unwrap_or_else(|| Note {
            connection: connection.to_owned(),
            held: false,
            failed: None,
        });
        f(&mut new);
        self.set(new);
        self.0.get(connection) != old.as_ref()
    }

    /// From another instance's record.
    pub(crate) fn set(&mut self, note: Note) {
        if note.held || note.failed.is_some() {
            self.0.insert(note.connection.clone(), note);
        }
    }

    /// Another instance removed its record.
    pub(crate) fn remove(&mut self, connection: &str) {
        self.0.remove(connection);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The record of a connection's note, or that there is none; `None` in a format without notes.
    pub(crate) fn record(&self, connection: &str, format: u8, now: Duration) -> Option<Change> {
        if format < record::NOTES_FORMAT {
            return None;
        }
        let bytes = self.0.get(connection).and_then(|n| record::encode_note(n, format, now));
        Some((record::note_key(connection), bytes))
    }
}

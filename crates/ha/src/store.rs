//! One endpoint's replicated state: keys, values, and what names that state.
//!
//! Owner and shadow hold the same thing: a map, its digest, and (lineage, term, position). Values
//! are shared, so that a snapshot is cut without copying keys' material.

use crate::digest::entry_hash;
use crate::types::{Batch, Lineage, Position, Term, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

struct Entry {
    value: Arc<Value>,
    hash: u64,
}

/// The state. `lineage` is [`Lineage::NONE`] until the endpoint was started here or a whole
/// snapshot was received.
#[derive(Default)]
pub(crate) struct Store {
    map: BTreeMap<u64, Entry>,
    digest: u64,
    pub(crate) lineage: Lineage,
    pub(crate) term: Term,
    pub(crate) position: Position,
}

/// What it takes to go back to an earlier state.
pub(crate) struct Undo {
    values: Vec<(u64, Option<Arc<Value>>)>,
    lineage: Lineage,
    term: Term,
    position: Position,
}

impl Store {
    /// The present state of these keys.
    fn undo<'a>(&self, keys: impl Iterator<Item = &'a u64>) -> Undo {
        Undo {
            values: keys.map(|key| (*key, self.get(*key).map(Arc::clone))).collect(),
            lineage: self.lineage,
            term: self.term,
            position: self.position,
        }
    }

    /// Takes back one [`Store::apply`] or [`Store::replace`]; the newest first.
    pub(crate) fn revert(&mut self, undo: Undo) {
        for (key, value) in undo.values {
            match value {
                Some(value) => self.put(key, value),
                None => self.delete(key),
            }
        }
        self.lineage = undo.lineage;
        self.term = undo.term;
        self.position = undo.position;
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    pub(crate) fn get(&self, key: u64) -> Option<&Arc<Value>> {
        self.map.get(&key).map(|entry| &entry.value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Arc<Value>)> {
        self.map.iter().map(|(key, entry)| (*key, &entry.value))
    }

    /// Applies one record and steps the position.
    pub(crate) fn apply(&mut self, batch: Batch) -> Undo {
        let undo = self.undo(batch.puts.iter().map(|(key, _)| key).chain(&batch.deletes));
        for (key, value) in batch.puts {
            self.put(key, Arc::new(value));
        }
        for key in batch.deletes {
            self.delete(key);
        }
        self.position = Position(self.position.0.saturating_add(1));
        undo
    }

    /// Says the same in other words. The position stays, so the digest at it changes: only for a
    /// state that is compared with nobody's.
    pub(crate) fn reword(&mut self, batch: Batch) {
        for (key, value) in batch.puts {
            self.put(key, Arc::new(value));
        }
        for key in batch.deletes {
            self.delete(key);
        }
    }

    fn put(&mut self, key: u64, value: Arc<Value>) {
        let hash = entry_hash(key, &value);
        self.delete(key);
        self.digest = self.digest.wrapping_add(hash);
        self.map.insert(key, Entry { value, hash });
    }

    fn delete(&mut self, key: u64) {
        if let Some(old) = self.map.remove(&key) {
            self.digest = self.digest.wrapping_sub(old.hash);
        }
    }

    /// Replaces the whole map and returns the difference as one batch.
    pub(crate) fn replace(&mut self, new: BTreeMap<u64, Arc<Value>>) -> (Batch, Undo) {
        let gone = self.map.keys().filter(|key| !new.contains_key(key));
        let mut batch = Batch { puts: Vec::new(), deletes: gone.copied().collect() };
        for (key, value) in &new {
            if self.get(*key).is_none_or(|old| ***old != ***value) {
                batch.puts.push((*key, Value::clone(value)));
            }
        }
        let undo = self.undo(batch.puts.iter().map(|(key, _)| key).chain(&batch.deletes));
        for key in &batch.deletes {
            self.delete(*key);
        }
        for (key, value) in new {
            if self.get(key).is_none_or(|old| **old != *value) {
                self.put(key, value);
            }
        }
        (batch, undo)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(bytes: &[u8]) -> Value {
        Value::new(bytes.to_vec())
    }

    fn batch(puts: &[(u64, &[u8])], deletes: &[u64]) -> Batch {
        Batch {
            puts: puts.iter().map(|(key, bytes)| (*key, value(bytes))).collect(),
            deletes: deletes.to_vec(),
        }
    }

    #[test]
    fn the_digest_depends_on_content_alone() {
        let mut one = Store::default();
        one.apply(batch(&[(1, b"a"), (2, b"b")], &[]));
        one.apply(batch(&[(1, b"c")], &[2]));
        let mut other = Store::default();
        other.apply(batch(&[(1, b"c")], &[7]));
        assert_eq!(one.digest(), other.digest());
        other.apply(batch(&[(1, b"d")], &[]));
        assert_ne!(one.digest(), other.digest());
        other.apply(batch(&[], &[1]));
        assert_eq!(other.digest(), 0);
    }

    #[test]
    fn replace_returns_the_difference() {
        let mut store = Store::default();
        store.apply(batch(&[(1, b"a"), (2, b"b"), (3, b"c")], &[]));
        let new: BTreeMap<u64, Arc<Value>> =
            [(1, b"a"), (3, b"x"), (4, b"y")].map(|(k, v)| (k, Arc::new(value(v)))).into();
        store.lineage = Lineage(5);
        let old = store.digest();
        let (difference, undo) = store.replace(new);
        assert_eq!(difference, batch(&[(3, b"x"), (4, b"y")], &[2]));
        let mut fresh = Store::default();
        fresh.apply(batch(&[(1, b"a"), (3, b"x"), (4, b"y")], &[]));
        assert_eq!(store.digest(), fresh.digest());
        // And back, through a record.
        (store.lineage, store.term) = (Lineage(6), Term(7));
        let newer = store.apply(batch(&[(1, b"z"), (9, b"n")], &[3]));
        store.revert(newer);
        assert_eq!((store.digest(), store.position), (fresh.digest(), Position(1)));
        store.revert(undo);
        assert_eq!((store.digest(), store.lineage, store.term), (old, Lineage(5), Term(0)));
        assert!(store.get(2).is_some() && store.get(4).is_none());
    }
}

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

impl Store {
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
    pub(crate) fn apply(&mut self, batch: Batch) {
        for (key, value) in batch.puts {
            self.put(key, Arc::new(value));
        }
        for key in batch.deletes {
            self.delete(key);
        }
        self.position = Position(self.position.0.saturating_add(1));
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
    pub(crate) fn replace(&mut self, new: BTreeMap<u64, Arc<Value>>) -> Batch {
        let gone = self.map.keys().filter(|key| !new.contains_key(key));
        let mut batch = Batch { puts: Vec::new(), deletes: gone.copied().collect() };
        for (key, value) in &new {
            if self.get(*key).is_none_or(|old| ***old != ***value) {
                batch.puts.push((*key, Value::clone(value)));
            }
        }
        for key in &batch.deletes {
            self.delete(*key);
        }
        for (key, value) in new {
            if self.get(key).is_none_or(|old| **old != *value) {
                self.put(key, value);
            }
        }
        batch
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
        let difference = store.replace(new);
        assert_eq!(difference, batch(&[(3, b"x"), (4, b"y")], &[2]));
        let mut fresh = Store::default();
        fresh.apply(batch(&[(1, b"a"), (3, b"x"), (4, b"y")], &[]));
        assert_eq!(store.digest(), fresh.digest());
    }
}

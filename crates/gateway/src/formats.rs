//! Which format the pair speaks, and how what is held comes into it.
//!
//! The two hellos settle the lower of the two newest **releases** (`ha`); each release has one
//! format of frames (`ha`) and one of records (`ike`), and every build reads and writes its own and
//! the one before. `tandemd --hold-format N` makes a build speak nothing newer than N.
//!
//! Records are kept encoded in `ha`: in the log, and for the next snapshot. So that nobody is ever
//! sent what it cannot read, and owner and shadow have the same bytes (their digests are compared):
//!
//! | when | what happens |
//! | --- | --- |
//! | a hello (`Settled`) | `ike` writes in that format from then on, at every endpoint |
//! | an owner is about to cut a snapshot for a new stream (`Rewrite`) | every record is written anew, from the state itself: in the settled format and with ages as of now. What has no place in it (notes, in format 1) is deleted from the log, and stays in memory |
//! | a loser of a split owes its tail (`StandDown`) | the same, in place, before the tail leaves |
//! | a switchover | nothing: the other holds the same bytes |
//! | a takeover | nothing: alone, the last settled format goes on; the next hello settles anew |
//! | a record that cannot be read comes nevertheless | it is not applied nor acknowledged (`ha`'s `unusable`) |
//!
//! A shadow never rewrites: what it holds was written by the owner, for the stream that it came by.
//! One that takes over rewrites before it sends a snapshot to anybody.

use std::collections::BTreeSet;
use std::time::Duration;

use wire::id::IkeSpi;

use crate::bug::Bug;
use crate::endpoint::Endpoint;
use crate::machine::Gateway;
use crate::parts::PART;

/// The releases whose formats this build speaks.
pub const FORMATS: std::ops::RangeInclusive<u32> = ha::codec::OLDEST..=ha::codec::RELEASE;

/// Most bytes of values in one record of a rewriting; a value that is longer goes alone.
const SLICE: usize = 256 << 10;

/// The format of `ike`'s records in a release.
pub(crate) fn of_records(release: u32) -> u8 {
    match release {
        0 | 1 => 1,
        _ => 2,
    }
}

impl Gateway {
    /// Both instances speak this release.
    pub(crate) fn settled(&mut self, release: u32) {
        tracing::info!(format = release, "the pair's format is settled");
        if self.bug == Bug::FormatIgnored {
            return;
        }
        for e in &mut self.endpoints {
            e.ike.set_format(of_records(release));
        }
    }

    /// `ha` is about to send all that an owner holds.
    pub(crate) fn rewrite(&mut self, now: Duration, endpoint: ha::EndpointId, exact: bool) {
        if exact {
            self.pair.rewritten(now, endpoint);
            return;
        }
        let index = usize::from(endpoint.0);
        let Some(e) = self.endpoints.get_mut(index) else { return };
        e.rewriting = Some(e.ike.record_keys().into());
        self.go_on_rewriting(now, index);
    }

    /// The next records. What changes meanwhile is written in the settled format by itself.
    pub(crate) fn go_on_rewriting(&mut self, now: Duration, index: usize) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let Some(left) = &mut e.rewriting else { return };
        let part: Vec<IkeSpi> = left.drain(..left.len().min(PART)).collect();
        let done = left.is_empty();
        let puts = part.into_iter().filter_map(|key| Some((key.0, e.ike.record(key, now)?)));
        write(&mut self.pair, now, e, puts.collect());
        if done {
            e.rewriting = None;
            self.forget_unsaid(now, index);
            if let Some(e) = self.endpoints.get(index) {
                self.pair.rewritten(now, e.ha_id());
            }
        }
    }

    /// Puts every record anew, now.
    pub(crate) fn write_anew(&mut self, now: Duration, endpoint: ha::EndpointId) {
        let index = usize::from(endpoint.0);
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let puts = e.ike.snapshot(now).into_iter().map(|(key, value)| (key.0, value));
        write(&mut self.pair, now, e, puts.collect());
        self.forget_unsaid(now, index);
    }

    /// Deletes from the log what has no record in this format.
    fn forget_unsaid(&mut self, now: Duration, index: usize) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let said: BTreeSet<u64> = match e.ike.format_has_notes() {
            true => e.ike.record_keys().into_iter().map(|key| key.0).collect(),
            false => e.ike.sa_keys().map(|key| key.0).collect(),
        };
        let known = self.pair.values(e.ha_id()).map(|(key, _)| key);
        let deletes: Vec<u64> = known.filter(|key| !said.contains(key)).collect();
        write_batch(&mut self.pair, now, e, ha::Batch { puts: Vec::new(), deletes });
    }
}

/// In batches of bounded size.
fn write(pair: &mut ha::Pair, now: Duration, e: &mut Endpoint, puts: Vec<(u64, ha::Value)>) {
    let (mut batch, mut size) = (Vec::new(), 0);
    for (key, value) in puts {
        if size > 0 && size + value.len() > SLICE {
            size = 0;
            let puts = std::mem::take(&mut batch);
            write_batch(pair, now, e, ha::Batch { puts, deletes: Vec::new() });
        }
        size += value.len();
        batch.push((key, value));
    }
    write_batch(pair, now, e, ha::Batch { puts: batch, deletes: Vec::new() });
}

fn write_batch(pair: &mut ha::Pair, now: Duration, e: &mut Endpoint, batch: ha::Batch) {
    if batch.puts.is_empty() && batch.deletes.is_empty() {
        return;
    }
    match pair.rewrite(now, e.ha_id(), batch) {
        Ok(Some(position)) => e.position = position.0,
        Ok(None) => {}
        // What was put before stays in its old format, and the other says so if it cannot read it.
        Err(error) => {
            tracing::error!(endpoint = e.name, %error, "records could not be written anew");
        }
    }
}

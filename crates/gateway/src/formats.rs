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
        if !exact {
            self.write_anew(now, endpoint);
        }
        self.pair.rewritten(now, endpoint);
    }

    /// Puts every record anew.
    pub(crate) fn write_anew(&mut self, now: Duration, endpoint: ha::EndpointId) {
        let Some(e) = self.endpoints.get_mut(usize::from(endpoint.0)) else { return };
        let records = e.ike.snapshot(now);
        let said: BTreeSet<u64> = records.iter().map(|(key, _)| key.0).collect();
        let known = self.pair.values(endpoint).map(|(key, _)| key);
        let deletes = known.filter(|key| !said.contains(key)).collect();
        let mut puts = Vec::new();
        let mut size = 0;
        for (IkeSpi(key), value) in records {
            if size > 0 && size + value.len() > SLICE {
                size = 0;
                write(&mut self.pair, now, e, std::mem::take(&mut puts), Vec::new());
            }
            size += value.len();
            puts.push((key, value));
        }
        write(&mut self.pair, now, e, puts, deletes);
    }
}

fn write(
    pair: &mut ha::Pair,
    now: Duration,
    e: &mut Endpoint,
    puts: Vec<(u64, ha::Value)>,
    deletes: Vec<u64>,
) {
    if puts.is_empty() && deletes.is_empty() {
        return;
    }
    match pair.rewrite(now, e.ha_id(), ha::Batch { puts, deletes }) {
        Ok(Some(position)) => e.position = position.0,
        Ok(None) => {}
        // What was put before stays in its old format, and the other says so if it cannot read it.
        Err(error) => {
            tracing::error!(endpoint = e.name, %error, "records could not be written anew");
        }
    }
}

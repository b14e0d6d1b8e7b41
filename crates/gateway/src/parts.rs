//! Long work, a part in each turn: what concerns every one of ten thousand tunnels takes a tenth of a second, and an
//! instance that says nothing for so long is taken for dead.
//!
//! | what | where |
//! | --- | --- |
//! | a snapshot of the owner is applied | here |
//! | all records are written anew before a snapshot leaves | `formats` |
//! | the rows of `tandem status` | `view` |
//!
//! While something is left to do, the next turn is due at once; what else has arrived meanwhile comes before it.

use std::time::Duration;

use wire::id::IkeSpi;

use crate::bug::Bug;
use crate::machine::Gateway;

/// Tunnels, or records, that a part is about: a few milliseconds.
pub(crate) const PART: usize = 256;

/// A batch of the owner on its way into the shadow.
#[derive(Debug)]
pub(crate) struct Applying {
    id: ha::ApplyId,
    position: ha::Position,
    application: ike::Application,
}

impl Gateway {
    /// Whether something is left to do.
    pub(crate) fn is_busy(&self) -> bool {
        let busy = |e: &crate::endpoint::Endpoint| !e.applying.is_empty() || e.rewriting.is_some();
        self.endpoints.iter().any(busy) || self.is_showing()
    }

    /// A turn's part of it.
    pub(crate) fn go_on(&mut self, now: Duration) {
        for index in 0..self.endpoints.len() {
            self.go_on_applying(now, index, PART);
            self.go_on_rewriting(now, index);
        }
        self.go_on_showing(now);
    }

    /// A batch of the owner; those before it come first.
    pub(crate) fn apply(
        &mut self,
        now: Duration,
        endpoint: ha::EndpointId,
        id: ha::ApplyId,
        position: ha::Position,
        batch: ha::Batch,
    ) {
        let index = usize::from(endpoint.0);
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let mut puts: Vec<_> =
            batch.puts.into_iter().map(|(key, value)| (IkeSpi(key), value)).collect();
        let deletes: Vec<_> = batch.deletes.into_iter().map(IkeSpi).collect();
        if let Some((_, value)) = puts.first_mut()
            && let Some(left) = self.spoil.checked_sub(1)
        {
            self.spoil = left;
            let half = value.len() / 2;
            value.truncate(half);
        }
        let application = ike::Application::new(puts, deletes);
        e.applying.push_back(Applying { id, position, application });
        if e.applying.len() == 1 {
            self.go_on_applying(now, index, PART);
        }
    }

    /// All that the owner said counts before anything else is done with the state.
    pub(crate) fn finish_applying(&mut self, now: Duration, index: usize) {
        while self.endpoints.get(index).is_some_and(|e| !e.applying.is_empty()) {
            self.go_on_applying(now, index, usize::MAX);
        }
    }

    fn go_on_applying(&mut self, now: Duration, index: usize, most: usize) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        let endpoint = e.ha_id();
        let Some(Applying { id, position, application }) = e.applying.front_mut() else { return };
        let (id, position) = (*id, *position);
        match e.ike.apply_part(now, application, most) {
            Ok(ike::Applied { ops, done }) => {
                if done {
                    e.applying.pop_front();
                    e.position = position.0;
                    e.committed = position.0;
                }
                self.install_shadow(now, index, ops);
                if done {
                    // The shards' queue is ordered, so an `Own` that follows finds these SAs: they count as installed.
                    self.pair.applied(now, endpoint, id);
                }
            }
            Err(_) if self.bug == Bug::BadRecordAcked => {
                e.applying.pop_front();
                self.pair.applied(now, endpoint, id);
            }
            // Nothing of it was applied. `ha` asks for a snapshot; until one is whole and usable, what was here before is
            // all that this shadow has. What came after it is worth nothing, if `ha` took it back as well.
            Err(error) => {
                tracing::error!(endpoint = e.name, %error, "a record of the other instance cannot be used");
                if self.pair.unusable(now, endpoint, id) {
                    e.applying.clear();
                } else {
                    e.applying.pop_front();
                }
            }
        }
    }
}

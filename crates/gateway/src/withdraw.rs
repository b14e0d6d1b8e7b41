//! Endpoints whose addresses cannot move (`on_failure = "withdraw"`): only their home serves them.
//!
//! ```text
//!   home dies            `ha` removes the other's shadow, and so its SAs leave the shards there: what was pinned to
//!                        them is pinned anew
//!   home's uplink dies   both instances stop pinning to its tunnels, which stay (`ha::Pair::in_use`)
//!   home drains or stops first that; then, when what was pinned by the old rule has passed, its peers are told that
//!                        the tunnels end
//! ```
//! The other instance holds the SAs of such an endpoint all the same: it pins by them.

use std::time::Duration;

use crate::config::OnFailure;
use crate::face::Output;
use crate::machine::Gateway;

/// From the word that nothing is pinned to an endpoint any more to the end of its tunnels: several heartbeats, and what
/// was on its way over the pair link.
const SETTLE: Duration = Duration::from_millis(100);

/// How far an endpoint is that is being closed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Closing {
    /// Nothing is pinned to it any more.
    since: Duration,
    /// Its peers were told.
    told: bool,
}

impl Gateway {
    /// Whether an endpoint's addresses stay at its home.
    pub(crate) fn stays(&self, index: usize) -> bool {
        self.config.endpoints.get(index).is_some_and(|e| e.on_failure == OnFailure::Withdraw)
    }

    /// The shards learn which endpoints flows may be pinned to.
    pub(crate) fn tell_use(&mut self) {
        for e in &mut self.endpoints {
            let on = self.pair.in_use(e.ha_id());
            if on != e.in_use {
                e.in_use = on;
                self.outputs.push_back(Output::Shard(esp::Command::Pin { endpoint: e.id, on }));
            }
        }
    }

    /// A step towards the end of an endpoint's tunnels, in each turn of a drain or a stop. Peers cannot set them up again
    /// before it is taken back.
    pub(crate) fn close(&mut self, now: Duration, index: usize) {
        let Some(e) = self.endpoints.get_mut(index).filter(|e| e.serves(now)) else { return };
        let closing = *e.closing.get_or_insert(Closing { since: now, told: false });
        if closing.told {
            return;
        }
        self.pair.drain(now, true);
        if now >= closing.since + SETTLE {
            self.end_tunnels(now, index);
            if let Some(e) = self.endpoints.get_mut(index) {
                e.closing = Some(Closing { told: true, ..closing });
            }
        }
    }

    /// All tunnels of an endpoint end, and their peers are told.
    pub(crate) fn end_tunnels(&mut self, now: Duration, index: usize) {
        let (mut cx, endpoints) = self.context(now);
        if let Some(e) = endpoints.get_mut(index) {
            e.ike.leave(&mut cx);
        }
    }

    /// Whether the tunnels of an endpoint that is closed are gone.
    pub(crate) fn is_closed(&self, index: usize) -> bool {
        let Some(e) = self.endpoints.get(index) else { return true };
        e.closing.is_some_and(|closing| closing.told) && !e.ike.has_sas()
    }

    /// A drain was taken back: the tunnels that are ours to start come up again.
    pub(crate) fn reopen(&mut self, now: Duration, index: usize) {
        let Some(e) = self.endpoints.get_mut(index) else { return };
        if e.closing.take().is_some() {
            e.ike.stay(now);
        }
    }
}

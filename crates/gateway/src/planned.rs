//! Planned work: endpoints leave an instance that drains, and go home when it is back.
//!
//! ```text
//!   tandem drain    every endpoint is offered to the other, at each turn until none is left; the other
//!                   is told to keep them (`ha::Pair::drain`). Not while that drains
//!   tandem undrain  they may come home
//!   at home again   home is in sync, has its uplink and does not decline: after `hold_down` of that, the
//!                   owner hands over what is not its own
//! ```
//! An endpoint whose addresses cannot move is closed instead (`withdraw`).
//! An endpoint that an operator moved away from its home (`tandem failover`) stays until it is moved
//! back, or its home starts anew. Takeovers ask for none of this: a draining instance whose other dies
//! serves.

use std::time::Duration;

use wire::id::EndpointId;

use crate::bug::Bug;
use crate::endpoint::Part;
use crate::face::{Answer, Moved, Refusal};
use crate::machine::Gateway;

/// A drain is answered at the latest after this long; it goes on.
const DRAIN_PATIENCE: Duration = Duration::from_secs(60);
/// After an offer that came to nothing, this long passes before the next.
const RETRY: Duration = Duration::from_secs(1);

/// A `drain` that is not answered yet.
#[derive(Debug)]
pub(crate) struct Draining {
    pub(crate) ticket: u64,
    began: Duration,
    /// Endpoints that were ours when it began.
    leaving: Vec<EndpointId>,
    done: Vec<Moved>,
    /// Those whose tunnels ended instead.
    withdrawn: Vec<String>,
}

impl Draining {
    pub(crate) fn deadline(&self) -> Duration {
        self.began + DRAIN_PATIENCE
    }
}

impl Gateway {
    /// All endpoints are to leave.
    pub(crate) fn drain(&mut self, now: Duration, ticket: u64) -> Result<Draining, Answer> {
        if !self.pair.status(now).contact {
            return Err(Answer::Refused {
                why: Refusal::NotReady,
                text: "there is no contact with the other instance".to_owned(),
                hint: Some("see `tandem status` on both hosts"),
            });
        }
        if self.pair.other_drains() {
            return Err(Answer::Refused {
                why: Refusal::NotReady,
                text: "the other instance drains".to_owned(),
                hint: Some("`tandem undrain` there takes that back"),
            });
        }
        self.draining = true;
        self.pair.drain(now, true);
        tracing::info!("draining: all endpoints go to the other instance");
        let leaving = self.endpoints.iter().filter(|e| e.owns()).map(|e| e.id).collect();
        self.plan(now);
        Ok(Draining { ticket, began: now, leaving, done: Vec::new(), withdrawn: Vec::new() })
    }

    /// Endpoints may come home.
    pub(crate) fn undrain(&mut self, now: Duration) -> Answer {
        if std::mem::take(&mut self.draining) {
            tracing::info!("no longer draining: endpoints come home");
        }
        self.pair.drain(now, false);
        (0..self.endpoints.len()).for_each(|index| self.decline(now, index, false));
        (0..self.endpoints.len()).for_each(|index| self.reopen(now, index));
        Answer::Undrained
    }

    /// Whether the other instance is to keep an endpoint until it is asked.
    pub(crate) fn decline(&mut self, now: Duration, index: usize, declines: bool) {
        if let Some(e) = self.endpoints.get(index) {
            self.pair.decline(now, e.ha_id(), declines);
        }
    }

    /// A turn: who is to leave leaves, and who may go home goes home.
    pub(crate) fn plan(&mut self, now: Duration) {
        let staying = (0..self.endpoints.len()).filter(|index| self.draining && self.stays(*index));
        staying.collect::<Vec<_>>().into_iter().for_each(|index| self.close(now, index));
        for e in &mut self.endpoints {
            let Some(config) = self.config.endpoint(e.id) else { continue };
            let abroad = config.home != self.config.local && config.home_coming.preempt;
            let leaves = self.draining || abroad;
            let welcome = self.pair.is_welcome(e.ha_id(), self.draining)
                || (self.draining && self.bug == Bug::DrainUnready);
            if !leaves || !e.serves(now) || !welcome {
                e.welcome_since = None;
                continue;
            }
            let since = *e.welcome_since.get_or_insert(now);
            let at_once = self.draining || self.bug == Bug::HoldDownIgnored;
            let wait = if at_once { Duration::ZERO } else { config.home_coming.hold_down };
            if now < since + wait || e.offered_at.is_some_and(|at| now < at + RETRY) {
                continue;
            }
            e.offered_at = Some(now);
            match self.pair.switchover(now, e.ha_id()) {
                Ok(()) if self.draining => {}
                Ok(()) => tracing::info!(endpoint = e.name, "going home"),
                Err(error) => {
                    tracing::warn!(endpoint = e.name, %error, "cannot be handed over now");
                }
            }
        }
    }

    /// How long until an endpoint goes home, if nothing changes.
    pub(crate) fn home_in(&self, now: Duration, index: usize) -> Option<Duration> {
        let e = self.endpoints.get(index)?;
        let config = self.config.endpoint(e.id)?;
        let since = e.welcome_since.filter(|_| !self.draining && e.owns())?;
        Some((since + config.home_coming.hold_down).saturating_sub(now))
    }

    /// The answer to a drain, once all have left or patience is over.
    pub(crate) fn settle_drain(
        &self,
        now: Duration,
        mut draining: Draining,
    ) -> Result<Answer, Draining> {
        let pair = self.pair.status(now);
        let (mut left, mut names) = (Vec::new(), Vec::new());
        for id in std::mem::take(&mut draining.leaving) {
            let Some(e) = self.endpoints.get(usize::from(id.0)) else { continue };
            let stays = self.stays(usize::from(id.0));
            match e.part {
                Part::Owner { .. } if stays && self.is_closed(usize::from(id.0)) => {
                    draining.withdrawn.push(e.name.clone());
                }
                Part::Owner { .. } | Part::Holding { .. } => {
                    left.push(id);
                    names.push(e.name.as_str());
                }
                Part::Steering { .. } | Part::Shadow => {
                    let status = pair.endpoints.iter().find(|s| s.endpoint == e.ha_id());
                    draining.done.push(Moved {
                        endpoint: e.name.clone(),
                        term: wire::id::Term(status.map_or(0, |s| s.term.0)),
                        took: now.saturating_sub(draining.began),
                    });
                }
            }
        }
        if left.is_empty() {
            let Draining { done, withdrawn, .. } = draining;
            return Ok(Answer::Drained { moved: done, withdrawn });
        }
        if now >= draining.deadline() {
            return Ok(Answer::Refused {
                why: Refusal::NotReady,
                text: format!(
                    "still here: {}; they leave as soon as the other instance can take them",
                    names.join(", ")
                ),
                hint: Some(
                    "see `tandem status` and the log of the other host; `tandem undrain` takes it back",
                ),
            });
        }
        draining.leaving = left;
        Err(draining)
    }
}

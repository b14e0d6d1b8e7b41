//! Planned work as operators see it: what they asked of an instance, and whether endpoints moved for that, or went home
//! when and only when they should.
//!
//! | an endpoint is handed over | only |
//! | --- | --- |
//! | by `failover` | where it was asked for |
//! | by an instance that drains, or stops | always, and soon |
//! | by one whose uplink is dead | to one whose uplink works |
//! | to its home | with `preempt`, once that was ready for `hold_down`, and unless it declines |

use gateway::Request;

use crate::clock::{MS, Nanos, S};
use crate::host::Process;
use crate::scene::{ENDPOINTS, endpoint_name, name_of};
use crate::world::World;

/// An offer may be under way for so long after its cause has gone.
const AFTER: Nanos = 2 * S;
/// What is due is done within this much more, in a settled pair.
const PATIENCE: Nanos = 4 * S;
/// A wish is known at the other instance after so long.
const TOLD: Nanos = 300 * MS;

/// What operators asked of one process, as far as it took it up.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Since when it drains.
    draining: Option<Nanos>,
    /// When it ceased to.
    drained: Option<Nanos>,
    /// By endpoint: when it was told to hand it over.
    moved: [Option<Nanos>; ENDPOINTS],
    /// By endpoint: since when the other instance is to keep it.
    declines: [Option<Nanos>; ENDPOINTS],
}

/// What the simulation knows of endpoints away from home.
#[derive(Debug, Default)]
pub struct Homes {
    /// By endpoint: since when its home was ready, while the other instance owned it.
    ready: [Option<Nanos>; ENDPOINTS],
}

/// Whether some moment is not long ago.
fn lately(at: Option<Nanos>, now: Nanos) -> bool {
    at.is_some_and(|at| now <= at + AFTER)
}

impl Wishes {
    /// An operator asked something of a process that offers these endpoints now.
    pub fn ask(&mut self, now: Nanos, request: &Request, offered: [bool; ENDPOINTS]) {
        match request {
            Request::Drain => {
                self.draining.get_or_insert(now);
                self.declines = self.declines.map(|since| since.or(Some(now)));
            }
            Request::Undrain => {
                if self.draining.take().is_some() {
                    self.drained = Some(now);
                }
                self.declines = [None; ENDPOINTS];
            }
            Request::Failover { endpoint } => {
                for (n, offered) in offered.into_iter().enumerate() {
                    let named = endpoint.as_ref().is_none_or(|name| name == endpoint_name(n));
                    if named && offered {
                        self.moved[n] = Some(now);
                        self.declines[n].get_or_insert(now);
                    }
                }
            }
            _ => {}
        }
    }

    /// The process owns an endpoint now.
    pub fn owns(&mut self, endpoint: usize) {
        if self.draining.is_none() {
            self.declines[endpoint] = None;
        }
    }

    /// Why the process hands an endpoint over, if for a wish.
    fn gives(&self, now: Nanos, endpoint: usize) -> bool {
        self.draining.is_some()
            || lately(self.drained, now)
            || lately(self.moved.get(endpoint).copied().flatten(), now)
    }

    fn declined_for(&self, now: Nanos, endpoint: usize) -> Option<Nanos> {
        self.declines[endpoint].map(|since| now.saturating_sub(since))
    }
}

impl World {
    /// A process has just taken up an operator's request.
    pub(crate) fn note_request(&mut self, host: usize, p: &mut Process, request: &Request) {
        if host >= 2 {
            return;
        }
        let status = p.gateway.pair().status(self.hosts[host].local(self.now));
        let mut offered = [false; ENDPOINTS];
        for status in &status.endpoints {
            if let Some(offered) = offered.get_mut(usize::from(status.endpoint.0)) {
                *offered = status.role == ha::Role::Offering;
            }
        }
        // A drain is refused if there is nobody to take anything.
        if *request != Request::Drain || status.contact {
            p.wishes.ask(self.now, request, offered);
        }
    }

    /// An instance takes over what the other hands it.
    pub(crate) fn note_grant(&mut self, host: usize, p: &Process, endpoint: usize) {
        let now = self.now;
        let giver = &self.hosts[1 - host];
        // Who died meanwhile cannot be asked; and what was offered before the taker stood still may be long past.
        let Some(g) = giver.process.as_deref() else { return };
        let offers = |s: &ha::EndpointStatus| s.role == ha::Role::Offering;
        if !self.endpoint_status(1 - host, endpoint).as_ref().is_some_and(offers) {
            return;
        }
        let dead_uplink = !giver.wan_up[endpoint] || lately(giver.wan_back[endpoint], now);
        let goes = g.leave_by.is_some() || g.stopping;
        if g.wishes.gives(now, endpoint) || dead_uplink || goes {
            return;
        }
        let Some(place) = self.scene.endpoints.get(endpoint) else { return };
        let ready = self.homes.ready[endpoint].map(|since| now.saturating_sub(since));
        let why = if place.home != host {
            "though that is not its home"
        } else if !place.home_coming.preempt {
            "though preempt = false"
        } else if p.wishes.declined_for(now, endpoint).is_some_and(|since| since > TOLD) {
            "though that declines it"
        } else if ready.unwrap_or(0) + 150 * MS < slow(place.home_coming.hold_down) {
            "before its hold-down was over"
        } else {
            return;
        };
        let text = format!(
            "endpoint {} went to {} unasked, {why} (ready for {} ms)",
            endpoint_name(endpoint),
            name_of(host),
            ready.unwrap_or(0) / MS
        );
        self.checks.violate(0, text);
    }

    /// An endpoint is away from its home, and should be on its way there.
    pub(crate) fn somebody_goes_home(&self) -> bool {
        let places = self.scene.endpoints.iter().zip(&self.homes.ready);
        places.into_iter().any(|(place, ready)| place.home_coming.preempt && ready.is_some())
    }

    /// Looks whose home is ready, and, if all is `steady`, whether everybody is where he should be.
    pub(crate) fn watch_homes(&mut self, steady: bool) {
        let now = self.now;
        for (n, place) in self.scene.endpoints.clone().into_iter().enumerate() {
            let (home, away) = (place.home, 1 - place.home);
            let roles = [0, 1].map(|host| self.endpoint_status(host, n).map(|status| status.role));
            let wishes = [0, 1].map(|host: usize| {
                self.hosts[host].process.as_deref().map(|p| p.wishes.clone()).unwrap_or_default()
            });
            let owns = Some(ha::Role::Owner(ha::Mode::Synced));
            let abroad = (roles[away] == owns || roles[away] == Some(ha::Role::Offering))
                && roles[home] == Some(ha::Role::Shadow { synced: true });
            let ready = abroad && wishes[home].declines[n].is_none() && self.hosts[home].wan_up[n];
            let since = &mut self.homes.ready[n];
            *since = if ready { since.or(Some(now)) } else { None };
            let due = since.is_some_and(|since| {
                let hold_down = place.home_coming.hold_down.as_nanos() as u64;
                now > since + hold_down * 12 / 10 + PATIENCE
            });
            if steady && due && place.home_coming.preempt {
                let text = format!("endpoint {} does not come home", endpoint_name(n));
                return self.checks.violate(0, text);
            }
            for host in 0..2 {
                let overdue = wishes[host].draining.is_some_and(|at| now > at + PATIENCE);
                let owns = matches!(roles[host], Some(ha::Role::Owner(_)));
                if steady && overdue && owns && wishes[1 - host].declines[n].is_none() {
                    let text = format!(
                        "endpoint {} stays at {}, which drains",
                        endpoint_name(n),
                        name_of(host)
                    );
                    return self.checks.violate(0, text);
                }
            }
        }
    }
}

/// A time on a clock that runs fast, in ours.
fn slow(time: std::time::Duration) -> Nanos {
    time.as_nanos() as u64 * 9 / 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_last_as_the_product_says() {
        let mut wishes = Wishes::default();
        wishes.ask(1, &Request::Failover { endpoint: Some("second".into()) }, [true, true]);
        assert!(!wishes.gives(2, 0) && wishes.gives(2, 1) && !wishes.gives(2 + AFTER, 1));
        assert_eq!(wishes.declined_for(5, 1), Some(4));
        wishes.owns(1);
        assert_eq!(wishes.declined_for(5, 1), None, "back again");
        wishes.ask(9, &Request::Drain, [true, true]);
        wishes.owns(1);
        assert!(wishes.gives(9 + S * 60, 0) && wishes.declined_for(10, 1) == Some(1));
        wishes.ask(20, &Request::Undrain, [true, true]);
        assert_eq!(wishes.declined_for(30, 1), None);
    }
}

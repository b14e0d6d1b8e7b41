//! What operators ask, and the answers that take time: a failover is answered when the other instance owns the
//! endpoint, `up` when the tunnel stands or has failed.

use std::time::Duration;

use ike::config::{ChildConfig, RemoteAddress, Start};
use wire::id::{ConnectionId, EndpointId, Term};

use crate::bug::Bug;
use crate::config::Connection;
use crate::endpoint::{Endpoint, Part};
use crate::face::{Answer, Moved, Output, Refusal, Request, TunnelUp};
use crate::machine::Gateway;
use crate::planned::Draining;
use crate::status::TunnelState;
use crate::view::Showing;

/// `up` is answered at the latest after this long.
const UP_PATIENCE: Duration = Duration::from_secs(60);

/// A request without an answer so far.
#[derive(Debug)]
pub(crate) enum Pending {
    /// Waits for the shards' counters, then for its rows.
    Status(Showing),
    /// Waits for the other instance.
    Failover { ticket: u64, began: Duration, waiting: Vec<EndpointId>, done: Vec<Moved> },
    /// Waits for the other instance to have taken all.
    Drain(Draining),
    /// Waits for the peer, or for a failure of what we asked of it.
    Up { ticket: u64, began: Duration, connections: Vec<ConnectionId>, failed: Option<String> },
}

impl Pending {
    /// When it is answered at the latest.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Up { began, .. } => Some(*began + UP_PATIENCE),
            Self::Drain(draining) => Some(draining.deadline()),
            Self::Status(_) | Self::Failover { .. } => None,
        }
    }

    /// Something that we began for a connection has failed.
    pub(crate) fn note_failure(&mut self, of: Option<ConnectionId>, text: &str) {
        match self {
            Self::Up { connections, failed, .. }
                if of.is_some_and(|of| connections.contains(&of)) =>
            {
                failed.get_or_insert_with(|| text.to_owned());
            }
            _ => {}
        }
    }
}

fn refuse(why: Refusal, text: String, hint: &'static str) -> Answer {
    Answer::Refused { why, text, hint: Some(hint) }
}

impl Gateway {
    /// A request of an operator; the answer comes as [`Output::Answer`] with the ticket (any number but `u64::MAX`).
    pub fn handle_request(&mut self, now: Duration, ticket: u64, request: &Request) {
        let answer = match request {
            Request::Status => {
                self.pending.push(Pending::Status(Showing::new(ticket)));
                self.outputs.push_back(Output::Shard(esp::Command::Query { token: ticket }));
                None
            }
            Request::Summary => Some(Answer::Status(Box::new(crate::view::summary(self, now)))),
            Request::Failover { endpoint } => self.failover(now, ticket, endpoint.as_deref()),
            Request::Drain => match self.drain(now, ticket) {
                Ok(draining) => {
                    self.pending.push(Pending::Drain(draining));
                    None
                }
                Err(answer) => Some(answer),
            },
            Request::Undrain => Some(self.undrain(now)),
            Request::Flows => {
                self.outputs.push_back(Output::Shard(esp::Command::Flows { token: ticket, now }));
                None
            }
            Request::Up { connection } => self.up(now, ticket, connection),
            Request::Down { connection, purge } => Some(self.down(now, connection, *purge)),
            Request::Rekey { connection, ike, children } => {
                Some(self.rekey(now, connection, *ike, *children))
            }
        };
        if let Some(answer) = answer {
            self.outputs.push_back(Output::Answer { ticket, answer });
        }
        self.pump(now);
    }

    fn failover(&mut self, now: Duration, ticket: u64, name: Option<&str>) -> Option<Answer> {
        let chosen: Vec<&Endpoint> = match name {
            Some(name) => self.endpoints.iter().filter(|e| e.name == name).collect(),
            None => self.endpoints.iter().filter(|e| e.owns()).collect(),
        };
        if let (Some(name), true) = (name, chosen.is_empty()) {
            let known: Vec<&str> = self.endpoints.iter().map(|e| e.name.as_str()).collect();
            let text = format!("no endpoint is named {name:?}; there is: {}", known.join(", "));
            return Some(refuse(Refusal::UnknownName, text, "see `tandem status`"));
        }
        if chosen.is_empty() || chosen.iter().any(|e| !e.owns()) {
            let text = "this instance does not own it".to_owned();
            return Some(refuse(Refusal::NotOwner, text, "run the command on the other host"));
        }
        let (mut waiting, mut going, mut refused) = (Vec::new(), Vec::new(), None);
        for e in chosen {
            match self.pair.switchover(now, e.ha_id()) {
                Ok(()) => {
                    waiting.push(e.id);
                    going.push(e.name.clone());
                }
                Err(error) => refused = Some(format!("endpoint {}: {error}", e.name)),
            }
        }
        // Away from home it stays until it is moved back.
        for index in waiting.iter().map(|id| usize::from(id.0)) {
            self.decline(now, index, self.bug != Bug::FailoverNotKept);
        }
        if let Some(mut text) = refused {
            if !going.is_empty() {
                text.push_str(&format!("; handed over: {}", going.join(", ")));
            }
            return Some(refuse(
                Refusal::NotReady,
                text,
                "wait until `tandem status` shows it synced",
            ));
        }
        self.pending.push(Pending::Failover { ticket, began: now, waiting, done: Vec::new() });
        None
    }

    /// Flows of the shards, by name.
    pub(crate) fn answer_flows(&mut self, ticket: u64, flows: &[esp::Flow]) {
        let flows = crate::view::flows(self, flows);
        self.outputs.push_back(Output::Answer { ticket, answer: Answer::Flows(flows) });
    }

    /// The tunnels of a name that are served here and now, by connection and index of the endpoint; or the answer that
    /// there is none.
    fn serving(
        &self,
        now: Duration,
        name: &str,
    ) -> Result<Vec<(ConnectionId, String, usize)>, Answer> {
        if self.config.connections_named(name).next().is_none() {
            let known: Vec<&str> =
                self.config.connections.iter().map(|c| c.ike.name.as_str()).collect();
            let text = format!("no connection is named {name:?}; there is: {}", known.join(", "));
            return Err(refuse(Refusal::UnknownName, text, "see `tandem status`"));
        }
        let all = self.config.connections_named(name).flat_map(|c| {
            c.endpoints.iter().map(|e| (c.ike.id, c.ike.name.clone(), usize::from(e.0)))
        });
        let served = |index: usize| self.endpoints.get(index).is_some_and(|e| e.serves(now));
        let here: Vec<_> = all.filter(|(_, _, index)| served(*index)).collect();
        if here.is_empty() { Err(Self::not_owner(name)) } else { Ok(here) }
    }

    fn not_owner(name: &str) -> Answer {
        let text = format!("{name}: this instance does not own the connection's endpoint");
        refuse(
            Refusal::NotOwner,
            text,
            "run the command on the host that `tandem status` shows as owner",
        )
    }

    fn up(&mut self, now: Duration, ticket: u64, name: &str) -> Option<Answer> {
        let serving = match self.serving(now, name) {
            Ok(serving) => serving,
            Err(answer) => return Some(answer),
        };
        let mut begun = false;
        let mut connections = Vec::new();
        for (id, _, index) in serving {
            let (mut cx, endpoints) = self.context(now);
            let Some(e) = endpoints.get_mut(index) else { continue };
            begun |= e.ike.initiate(&mut cx, id);
            connections.push(id);
        }
        connections.dedup();
        let anywhere = |c: &Connection| c.remotes.contains(&RemoteAddress::Any);
        if !begun && self.config.connections_named(name).any(anywhere) {
            let text = format!("{name}: remote_address is \"any\", so only the peer can initiate");
            return Some(refuse(
                Refusal::Failed,
                text,
                "initiate at the peer, or give remote_address an address",
            ));
        }
        self.pending.push(Pending::Up { ticket, began: now, connections, failed: None });
        None
    }

    fn down(&mut self, now: Duration, name: &str, purge: bool) -> Answer {
        let serving = match self.serving(now, name) {
            Ok(serving) => serving,
            Err(answer) => return answer,
        };
        if let Some(refusal) = purge.then(|| self.needed_elsewhere(name)).flatten() {
            return refusal;
        }
        let mut closed = 0;
        for (id, own, index) in serving {
            let (mut cx, endpoints) = self.context(now);
            let Some(e) = endpoints.get_mut(index) else { continue };
            closed += e.ike.status_of(&own, now).len();
            e.ike.terminate(&mut cx, ike::Target::Connection(id));
        }
        Answer::Down { closed: u32::try_from(closed).unwrap_or(u32::MAX) }
    }

    /// The rules against clear text protect what any tunnel of a connection carries, also one that is not taken down here.
    fn needed_elsewhere(&self, name: &str) -> Option<Answer> {
        let (hint, needed) = if self.config.connections.iter().all(|c| c.name != name) {
            ("purge the connection as a whole, by its name in the configuration", true)
        } else {
            let seats = self.config.connections_named(name).flat_map(|c| &c.endpoints);
            let mut seats = seats.filter_map(|e| self.endpoints.get(usize::from(e.0)));
            (
                "bring its endpoints here first (`tandem drain` on the other host), or leave out --purge",
                seats.any(|e| self.pair.others(e.ha_id())),
            )
        };
        let text = format!("{name}: other tunnels of this connection need the rules");
        needed.then(|| refuse(Refusal::NotReady, text, hint))
    }

    fn rekey(&mut self, now: Duration, name: &str, ike: bool, children: bool) -> Answer {
        let serving = match self.serving(now, name) {
            Ok(serving) => serving,
            Err(answer) => return answer,
        };
        let (mut ike_sas, mut child_sas) = (0, 0);
        for (_, own, index) in serving {
            let (mut cx, endpoints) = self.context(now);
            let Some(e) = endpoints.get_mut(index) else { continue };
            // Children first: an IKE SA that is being replaced takes no further exchange.
            for sa in e.ike.status_of(&own, now) {
                if !matches!(sa.state, "established" | "rekeying") {
                    continue;
                }
                if children {
                    for child in sa.children.iter().filter(|child| child.state == "installed") {
                        child_sas +=
                            u32::from(e.ike.rekey(&mut cx, ike::Target::Child(child.spi_in)));
                    }
                }
                if ike {
                    ike_sas += u32::from(e.ike.rekey(&mut cx, ike::Target::Ike(sa.spi)));
                }
            }
        }
        Answer::Rekey { ike: ike_sas, children: child_sas }
    }

    /// Answers what can be answered now.
    pub(crate) fn settle_requests(&mut self, now: Duration) {
        for pending in std::mem::take(&mut self.pending) {
            let (ticket, answer) = match pending {
                Pending::Status(mut showing) => match showing.settle(self, now) {
                    Some(status) => (showing.ticket, Answer::Status(Box::new(status))),
                    None => {
                        self.pending.push(Pending::Status(showing));
                        continue;
                    }
                },
                Pending::Failover { ticket, began, waiting, done } => {
                    match self.settle_failover(now, began, waiting, done) {
                        Ok(answer) => (ticket, answer),
                        Err((waiting, done)) => {
                            self.pending.push(Pending::Failover { ticket, began, waiting, done });
                            continue;
                        }
                    }
                }
                Pending::Drain(draining) => {
                    let ticket = draining.ticket;
                    match self.settle_drain(now, draining) {
                        Ok(answer) => (ticket, answer),
                        Err(draining) => {
                            self.pending.push(Pending::Drain(draining));
                            continue;
                        }
                    }
                }
                Pending::Up { ticket, failed: Some(text), .. } => {
                    (ticket, Answer::Refused { why: Refusal::Failed, text, hint: None })
                }
                Pending::Up { ticket, began, connections, failed: None } => {
                    match self.settle_up(now, began, &connections) {
                        Some(answer) => (ticket, answer),
                        None => {
                            let failed = None;
                            self.pending.push(Pending::Up { ticket, began, connections, failed });
                            continue;
                        }
                    }
                }
            };
            self.outputs.push_back(Output::Answer { ticket, answer });
        }
    }

    fn settle_failover(
        &self,
        now: Duration,
        began: Duration,
        waiting: Vec<EndpointId>,
        mut done: Vec<Moved>,
    ) -> Result<Answer, (Vec<EndpointId>, Vec<Moved>)> {
        let pair = self.pair.status(now);
        let mut left = Vec::new();
        for id in waiting {
            let Some(e) = self.endpoints.get(usize::from(id.0)) else { continue };
            let offering = pair
                .endpoints
                .iter()
                .any(|s| s.endpoint == e.ha_id() && s.role == ha::Role::Offering);
            match e.part {
                Part::Holding { .. } => left.push(id),
                Part::Owner { .. } if offering => left.push(id),
                Part::Owner { .. } => {
                    let text =
                        format!("{}: the other instance did not take it; this one goes on", e.name);
                    return Ok(refuse(
                        Refusal::NotReady,
                        text,
                        "see `tandem status` and the log of the other host",
                    ));
                }
                Part::Steering { .. } | Part::Shadow => {
                    let term = pair
                        .endpoints
                        .iter()
                        .find(|s| s.endpoint == e.ha_id())
                        .map_or(0, |s| s.term.0);
                    let took = now.saturating_sub(began);
                    done.push(Moved { endpoint: e.name.clone(), term: Term(term), took });
                }
            }
        }
        if left.is_empty() { Ok(Answer::Moved(done)) } else { Err((left, done)) }
    }

    fn settle_up(
        &self,
        now: Duration,
        began: Duration,
        connections: &[ConnectionId],
    ) -> Option<Answer> {
        let late = now >= began + UP_PATIENCE;
        let mut states = Vec::new();
        for id in connections {
            states.extend(self.settle_connection(*id, now, late)?);
        }
        Some(Answer::Up(states))
    }

    /// How far a connection that was asked up is; `None` while it is worth waiting.
    fn settle_connection(
        &self,
        connection: ConnectionId,
        now: Duration,
        late: bool,
    ) -> Option<Vec<TunnelUp>> {
        let spec = &self.config.connection(connection)?.ike;
        let name = &spec.name;
        // Those that [`ike::Endpoint::initiate`] asks for.
        let ours = |child: &&ChildConfig| child.start == Start::Initiate;
        let some = spec.children.iter().any(|child| ours(&child));
        let wanted = spec.children.iter().filter(move |child| !some || ours(child));
        let mut states = Vec::new();
        for endpoint in &self.config.connection(connection)?.endpoints {
            let Some(e) = self.endpoints.get(usize::from(endpoint.0)) else { continue };
            let sas = e.ike.status_of(name, now);
            let installed: Vec<&str> = sas
                .iter()
                .flat_map(|sa| &sa.children)
                .filter(|child| child.state == "installed")
                .map(|child| child.name.as_str())
                .collect();
            let up = wanted.clone().all(|child| installed.contains(&child.name.as_str()));
            if !up && !late && e.owns() {
                return None;
            }
            states.push(TunnelUp {
                connection: name.clone(),
                endpoint: e.name.clone(),
                state: if up { TunnelState::Established } else { TunnelState::Connecting },
            });
        }
        Some(states)
    }
}

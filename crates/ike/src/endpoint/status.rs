//! The picture of an endpoint for `tandem status`.

use core::time::Duration;

use wire::id::EspSpi;

use super::Endpoint;
use crate::{
    event::{ChildName, ChildStatus, IkeStatus, Progress, Status},
    state::{ChildState, Established, Fate, IkeSa, Phase, Task},
    table::Table,
};

impl Endpoint {
    /// A picture for `tandem status`.
    #[must_use]
    pub fn status(&self, now: Duration) -> Status {
        let mut status = Status::default();
        for sa in self.table.iter() {
            if sa.is_half_open() {
                status.half_open += 1;
            } else if is_shown(sa) {
                status.ike_sas.push(self.ike_status(sa, now));
            }
        }
        status.ike_sas.sort_by(|a, b| {
            a.connection.cmp(&b.connection).then(b.age.cmp(&a.age)).then(a.spi.cmp(&b.spi))
        });
        status
    }

    /// The IKE SAs of one connection, as in [`Endpoint::status`].
    #[must_use]
    pub fn status_of(&self, connection: &str, now: Duration) -> Vec<IkeStatus> {
        let shown = self.table.of_connection(connection).filter(|sa| is_shown(sa));
        shown.map(|sa| self.ike_status(sa, now)).collect()
    }

    /// Whether any IKE SA stands, or is being brought up by us.
    #[must_use]
    pub fn has_sas(&self) -> bool {
        self.table.iter().any(is_shown)
    }

    /// How far each connection is that has an IKE SA: what [`Endpoint::status`] says, in short.
    pub fn progress(&self) -> impl Iterator<Item = Progress> + '_ {
        self.table.connections().map(|sas| {
            let shown = sas.clone().filter(|sa| is_shown(sa));
            let states = shown.map(|sa| (state_of(sa), sa.since));
            // The newest that is furthest stands for the connection.
            let first = states.max_by_key(|(state, since)| {
                (matches!(*state, "established" | "rekeying"), *since)
            });
            Progress { state: first.map(|(state, _)| state), children: Table::count_sending(sas) }
        })
    }

    /// Whose a Child SA is.
    #[must_use]
    pub fn child(&self, spi_in: EspSpi) -> Option<ChildName<'_>> {
        let sa = self.table.of_child(spi_in)?;
        let child = sa.children().iter().find(|child| child.spi_in == spi_in)?;
        let (connection, spi_out) = (sa.connection.as_deref(), child.spi_out);
        Some(ChildName { connection, child: &child.name, spi_out })
    }

    /// What last failed of a connection, and how long ago, whoever began it and whichever instance
    /// owned the endpoint then.
    #[must_use]
    pub fn last_failure(&self, connection: &str, now: Duration) -> Option<(&str, Duration)> {
        let known = [self.notes.failed(connection), self.knocked.get(connection)];
        let failed = known.into_iter().flatten().max_by_key(|failed| failed.at)?;
        Some((&failed.text, failed.at.age(now)))
    }

    /// Whether an operator took a connection down.
    #[must_use]
    pub fn is_held(&self, connection: &str) -> bool {
        self.notes.is_held(connection)
    }

    fn ike_status(&self, sa: &IkeSa, now: Duration) -> IkeStatus {
        let conn = self.registry.of(sa);
        let (e, state) = (sa.established(), state_of(sa));
        let connection = sa.connection.clone().unwrap_or_default();
        let senders = self.table.sending(&connection);
        IkeStatus {
            connection: sa.connection.clone(),
            spi: sa.spi,
            peer_spi: sa.peer_spi,
            state,
            initiator: sa.initiator,
            local: sa.path.local,
            remote: sa.path.remote,
            local_id: conn.map(|c| c.local_id.to_string()),
            remote_id: conn.map(|c| c.remote_id.to_string()),
            suite: e.map(|e| e.suite().to_string()),
            age: sa.since.age(now),
            rekey_in: e.map(|e| e.rekey_at.until(now)),
            heard: e.map(|e| e.heard.age(now)),
            nat: (sa.path.nat_here, sa.path.nat_there),
            children: sa
                .children()
                .iter()
                .map(|c| ChildStatus {
                    name: c.name.clone(),
                    spi_in: c.spi_in,
                    spi_out: c.spi_out,
                    state: match c.state {
                        ChildState::Retired(_) => "retired",
                        ChildState::Doomed => "deleting",
                        ChildState::Live if rekeying(e, c.spi_in) => "rekeying",
                        ChildState::Live if senders.contains(&c.spi_in) => "installed",
                        ChildState::Live => "receiving",
                    },
                    suite: c.suite().to_string(),
                    udp_encap: sa.path.encap,
                    local_ts: c.local_ts.clone(),
                    remote_ts: c.remote_ts.clone(),
                    age: c.since.age(now),
                    rekey_in: (c.state == ChildState::Live).then(|| c.rekey_at.until(now)),
                })
                .collect(),
        }
    }
}

/// What a peer began does not count before it is authenticated, and a closed one only repeats its last answer.
fn is_shown(sa: &IkeSa) -> bool {
    !sa.is_half_open() && !matches!(sa.phase, Phase::Closed(_))
}

fn state_of(sa: &IkeSa) -> &'static str {
    let Some(e) = sa.established() else { return "connecting" };
    match (e.fate, e.task()) {
        _ if e.waits() => "in doubt",
        (Fate::Live, Some(Task::Rekey(_))) => "rekeying",
        (Fate::Live, Some(Task::Sync(..))) => "synchronising",
        (Fate::Live, _) => "established",
        (Fate::Deleting(_), _) => "deleting",
        (Fate::Replaced(_), _) => "replaced",
        (Fate::Rival(..), _) => "rekeying",
        (Fate::Doubtful, _) => "in doubt",
    }
}

fn rekeying(e: Option<&Established>, spi_in: EspSpi) -> bool {
    matches!(e.and_then(|e| e.task()), Some(Task::Child(new)) if new.rekeys == Some(spi_in))
}

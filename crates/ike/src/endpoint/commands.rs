//! What an operator or a packet asks of an endpoint.

use core::time::Duration;

use wire::id::{ConnectionId, EspSpi, IkeSpi};

use super::{Endpoint, due::Due, starting::is_live};
use crate::{
    Context, Target, child,
    config::Start,
    error::Error,
    established,
    event::DeleteReason,
    init,
    record::Stamp,
    state::{ChildState, Established, Fate, IkeSa, Phase, Task},
    step::Step,
    table::Table,
};

impl Endpoint {
    /// Brings a connection up: all its children that are ours to start, or all
    /// if none is. False if there is no such connection or nowhere to go.
    pub fn initiate(&mut self, cx: &mut Context<'_>, id: ConnectionId) -> bool {
        let Some(conn) = self.registry.by_id(id) else { return false };
        if self.active {
            self.knocked.remove(&conn.name);
            let held = self.notes.hold(&conn.name, false);
            // Whoever asks again wants to know what fails from now on.
            if self.notes.fail(&conn.name, None, cx.now) || held {
                let name = conn.name.clone();
                self.put_note(&name, cx.now);
            }
        }
        let Some(conn) = self.registry.by_id(id) else { return false };
        let mut names: Vec<String> = conn
            .children
            .iter()
            .filter(|c| c.start == Start::Initiate)
            .map(|c| c.name.clone())
            .collect();
        if names.is_empty() {
            names = conn.children.iter().map(|c| c.name.clone()).collect();
        }
        // An attempt that was refused goes on asking, and has said why; whoever asks again wants to be told again.
        let name = conn.name.clone();
        let refused = self.table.of_connection(&name).find(|sa| sa.is_refused()).cloned();
        if let Some(sa) = refused {
            let _ = self.step(cx, |step| established::drop_sa(step, &sa, DeleteReason::Command));
        }
        self.bring_up(cx, id, names)
    }

    /// A packet wants a Child SA that is not up (`start = trap`, or a lost one).
    pub fn acquire(&mut self, cx: &mut Context<'_>, id: ConnectionId, child: &str) -> bool {
        let paused = self.due.get(id).is_some_and(|due| due.at > cx.now);
        if paused || cx.now < self.quiet_until {
            return false;
        }
        let allowed = self.registry.by_id(id).is_some_and(|conn| {
            !self.stays_down(&conn.name)
                && conn.children.iter().any(|c| c.name == child && c.start != Start::Respond)
        });
        allowed && self.bring_up(cx, id, vec![child.to_owned()])
    }

    fn bring_up(&mut self, cx: &mut Context<'_>, id: ConnectionId, names: Vec<String>) -> bool {
        if !self.active {
            return false;
        }
        let Some(conn) = self.registry.by_id(id) else { return false };
        let name = conn.name.clone();
        let remote = conn.remote_address.ip();
        if self.table.of_connection(&name).any(IkeSa::is_initiating) {
            return true;
        }
        let live = self.table.of_connection(&name).find(|sa| is_live(sa)).cloned();
        if live.is_none() && remote.is_none() {
            return false;
        }
        let fresh =
            !self.doubted.contains(&id) && !self.table.of_connection(&name).any(IkeSa::in_doubt);
        let due = match self.due.get(id) {
            Some(due) => Due { tries: due.tries.saturating_add(1), ..due },
            None => Due { at: cx.now, tries: 1 },
        };
        self.due.insert(id, due, remote);
        let result = match live {
            Some(sa) => self.step(cx, |step| want_children(step, sa, &names)),
            None => self.step(cx, |step| {
                let conn = step.registry.by_id(id).ok_or(Error::NotExpected)?;
                let remote = remote.ok_or(Error::NotExpected)?;
                init::start(step, conn, remote, names, fresh).map(|_| ())
            }),
        };
        if let Err(error) = result {
            tracing::warn!(%error, connection = name, "cannot initiate");
            return false;
        }
        true
    }

    /// Rekeys at once, or as soon as the window is free. Also for what `esp`
    /// reports as expiring. False if there is no such SA.
    pub fn rekey(&mut self, cx: &mut Context<'_>, target: Target) -> bool {
        let now = Stamp::at(cx.now);
        self.for_each(cx, target, move |e, child| match child {
            None => e.rekey_at = now,
            Some(spi) => {
                if let Some(c) = e.child_mut(spi).filter(|c| c.state == ChildState::Live) {
                    c.rekey_at = now;
                }
            }
        })
    }

    /// Deletes, and tells the peer. A connection stays down until
    /// [`Endpoint::initiate`] or the peer brings it up.
    pub fn terminate(&mut self, cx: &mut Context<'_>, target: Target) -> bool {
        if let Target::Connection(id) = target {
            let name = self.registry.by_id(id).map(|c| c.name.clone()).unwrap_or_default();
            if self.active && !name.is_empty() && self.notes.hold(&name, true) {
                self.put_note(&name, cx.now);
            }
        }
        self.end(cx, target)
    }

    /// This instance stops or drains, and nobody goes on: every peer is told. Nothing begins here from
    /// now on; whoever owns the endpoint next brings up what is to be up.
    pub fn leave(&mut self, cx: &mut Context<'_>) {
        self.leaving = true;
        let all: Vec<ConnectionId> =
            self.registry.config.connections.iter().map(|c| c.id).collect();
        for id in all {
            self.end(cx, Target::Connection(id));
        }
        let half_open: Vec<IkeSa> = self
            .table
            .iter()
            .filter(|sa| matches!(sa.phase, Phase::InitAnswered(_)))
            .cloned()
            .collect();
        for sa in half_open {
            let _ = self.step(cx, |step| established::drop_sa(step, &sa, DeleteReason::Command));
        }
    }

    fn end(&mut self, cx: &mut Context<'_>, target: Target) -> bool {
        if let Target::Connection(id) = target {
            let name = self.registry.by_id(id).map(|c| c.name.clone()).unwrap_or_default();
            let unfinished: Vec<IkeSpi> = self
                .table
                .of_connection(&name)
                .filter(|sa| sa.is_initiating())
                .map(|sa| sa.spi)
                .collect();
            for spi in unfinished {
                if let Some(sa) = self.table.get(spi).cloned() {
                    let _ = self
                        .step(cx, |step| established::drop_sa(step, &sa, DeleteReason::Command));
                }
            }
        }
        let now = Stamp::at(cx.now);
        self.for_each(cx, target, move |e, child| match child {
            None => {
                e.wanted.clear();
                match e.fate {
                    Fate::Live => e.fate = Fate::Deleting(DeleteReason::Command),
                    // Its message ids are in doubt: forgotten in silence.
                    Fate::Doubtful => e.expires_at = now,
                    _ => {}
                }
            }
            Some(spi) => {
                if let Some(c) = e.child_mut(spi).filter(|c| c.state == ChildState::Live) {
                    c.state = ChildState::Doomed;
                }
            }
        })
    }

    /// Takes [`Endpoint::leave`] back: what is to be up comes up.
    pub fn stay(&mut self, now: Duration) {
        self.leaving = false;
        // Whatever was tried before is no reason to wait.
        self.due.clear();
        let names: Vec<String> =
            self.registry.config.connections.iter().map(|c| c.name.clone()).collect();
        if self.active {
            names.iter().for_each(|name| self.review(now, name));
        }
    }

    /// Marks SAs of a target and lets each begin its next task.
    fn for_each(
        &mut self,
        cx: &mut Context<'_>,
        target: Target,
        mark: impl Fn(&mut Established, Option<EspSpi>),
    ) -> bool {
        if !self.active {
            return false;
        }
        let of = |table: &Table, name: &str| -> Vec<IkeSpi> {
            table
                .of_connection(name)
                .filter(|sa| sa.established().is_some())
                .map(|sa| sa.spi)
                .collect()
        };
        let name = |id| self.registry.by_id(id).map(|c| c.name.clone()).unwrap_or_default();
        let (spis, children): (Vec<IkeSpi>, Option<Vec<EspSpi>>) = match target {
            Target::Connection(id) => (of(&self.table, &name(id)), None),
            Target::Children(id) => {
                let spis = of(&self.table, &name(id));
                let all = spis.iter().filter_map(|s| self.table.get(*s)).flat_map(IkeSa::children);
                let children = all.map(|c| c.spi_in).collect();
                (spis, Some(children))
            }
            Target::Ike(spi) => (vec![spi], None),
            Target::Child(spi) => {
                (self.table.of_child(spi).map(|sa| sa.spi).into_iter().collect(), Some(vec![spi]))
            }
        };
        let mut any = false;
        for spi in spis {
            let Some(mut sa) = self.table.get(spi).cloned() else { continue };
            let Phase::Established(e) = &mut sa.phase else { continue };
            match &children {
                None => mark(e, None),
                Some(list) => list.iter().for_each(|child| mark(e, Some(*child))),
            }
            any = true;
            let result = self.step(cx, |step| {
                established::advance(step, &mut sa)?;
                step.put(sa);
                Ok(())
            });
            if let Err(error) = result {
                tracing::warn!(%error, %spi, "command could not begin");
            }
        }
        any
    }
}

/// Wishes for children of an IKE SA that is up.
fn want_children(step: &mut Step<'_, '_>, mut sa: IkeSa, names: &[String]) -> Result<(), Error> {
    let now = step.now();
    let Phase::Established(e) = &mut sa.phase else { return Err(Error::NotExpected) };
    let asked = match e.task() {
        Some(Task::Child(new)) => Some(new.name.clone()),
        _ => None,
    };
    for name in names {
        if !e.has_live(name) && asked.as_ref() != Some(name) {
            child::want(e, name, now, 0);
        }
    }
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

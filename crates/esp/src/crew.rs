//! Several workers as one, for whoever commands them: every command goes to
//! all, in one order, and what they report comes back as if one had said it.
//!
//! | report | of the whole crew |
//! | --- | --- |
//! | `Snapshot`, `Flows` | when all have answered, joined: each answers each command once and in order, so first answers belong together, then second ones |
//! | `Held`, `Disowned`, `Obeying` | when all have answered the newest such command, joined: what answers an older one is no longer true |
//! | `NoSa` | the first of any worker within a second |
//! | what is about one SA | as it comes: each SA is one worker's |

use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

use wire::id::{ConnectionId, EndpointId, SpiLayout};

use crate::command::{Command, Counters};
use crate::policy::NO_SA_INTERVAL;
use crate::reason::Stats;
use crate::report::{Flow, Report, Snapshot};

/// Control's books about its workers. It takes no part in a packet's way.
#[derive(Debug)]
pub struct Crew {
    workers: u8,
    /// How many commands were given so far.
    given: u64,
    snapshots: Answers,
    flows: Answers,
    rounds: BTreeMap<(Asked, EndpointId), Round>,
    no_sa: BTreeMap<(EndpointId, ConnectionId, u16), Duration>,
}

/// What all are asked for an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Held,
    Disowned,
    Obeying,
}

/// The answers to the newest command of a kind, by worker, until all have answered.
#[derive(Debug)]
struct Round {
    /// The command's number. A worker that is late may still answer an older one.
    since: u64,
    said: Vec<Option<Report>>,
}

impl Round {
    /// One from each worker, if this was the last that was missing.
    fn take(&mut self, worker: u8, at: u64, answer: Report) -> Option<Vec<Report>> {
        if at < self.since {
            return None;
        }
        *self.said.get_mut(usize::from(worker))? = Some(answer);
        if self.said.iter().any(Option::is_none) {
            return None;
        }
        Some(self.said.iter_mut().filter_map(Option::take).collect())
    }
}

/// Answers to one kind of command, by worker, until all have answered.
#[derive(Debug)]
struct Answers(Vec<VecDeque<Report>>);

impl Answers {
    fn new(workers: u8) -> Self {
        Self(vec![VecDeque::new(); usize::from(workers)])
    }

    /// One from each worker, if this was the last that was missing.
    fn take(&mut self, worker: u8, answer: Report) -> Option<Vec<Report>> {
        self.0.get_mut(usize::from(worker))?.push_back(answer);
        if self.0.iter().any(VecDeque::is_empty) {
            return None;
        }
        Some(self.0.iter_mut().filter_map(VecDeque::pop_front).collect())
    }
}

impl Crew {
    /// Of so many workers, none of which was told anything yet.
    #[must_use]
    pub fn new(workers: u8) -> Self {
        let workers = workers.max(1);
        Self {
            workers,
            given: 0,
            snapshots: Answers::new(workers),
            flows: Answers::new(workers),
            rounds: BTreeMap::new(),
            no_sa: BTreeMap::new(),
        }
    }

    /// The command as each worker is to get it, by worker. Keys go to the SA's own alone.
    pub fn give(&mut self, command: Command) -> impl Iterator<Item = (u8, Command)> + use<> {
        self.given += 1;
        match command {
            Command::Hold { endpoint } => self.ask(Asked::Held, endpoint),
            Command::Disown { endpoint, .. } => {
                self.ask(Asked::Disowned, endpoint);
                self.ask(Asked::Obeying, endpoint);
            }
            Command::Own { endpoint, .. } | Command::ObeyLeases { endpoint, .. } => {
                self.ask(Asked::Obeying, endpoint);
            }
            _ => {}
        }
        let owner = command
            .spi_in()
            .and_then(SpiLayout::of)
            .map_or(0, |layout| layout.worker_of(self.workers));
        let others: Vec<_> = (0..self.workers)
            .filter(|worker| *worker != owner)
            .map(|worker| (worker, command.without_keys()))
            .collect();
        others.into_iter().chain(core::iter::once((owner, command)))
    }

    fn ask(&mut self, asked: Asked, endpoint: EndpointId) {
        let said = vec![None; usize::from(self.workers)];
        self.rounds.insert((asked, endpoint), Round { since: self.given, said });
    }

    /// A worker's report; gives what all of them together say by it.
    pub fn take(&mut self, now: Duration, worker: u8, report: Report) -> Option<Report> {
        let mut round = |asked, endpoint, at, report| {
            self.rounds.get_mut(&(asked, endpoint))?.take(worker, at, report)
        };
        match report {
            Report::Held { endpoint, term, at, .. } => {
                let answers = round(Asked::Held, endpoint, at, report)?;
                let counters = answers.into_iter().flat_map(counters).collect();
                Some(Report::Held { endpoint, term, counters, at })
            }
            Report::Disowned { endpoint, term, at, .. } => {
                let answers = round(Asked::Disowned, endpoint, at, report)?;
                let counters = answers.into_iter().flat_map(counters).collect();
                Some(Report::Disowned { endpoint, term, counters, at })
            }
            Report::Obeying { endpoint, at } => {
                round(Asked::Obeying, endpoint, at, report)?;
                Some(Report::Obeying { endpoint, at })
            }
            Report::Snapshot(_) => self.snapshots.take(worker, report).map(join_snapshots),
            Report::Flows { token, .. } => {
                let answers = self.flows.take(worker, report)?;
                Some(Report::Flows { token, flows: join_flows(answers) })
            }
            Report::NoSa { endpoint, connection, child } if self.workers > 1 => {
                // The policies' number bounds it.
                let told = self.no_sa.entry((endpoint, connection, child)).or_insert(Duration::MAX);
                if *told != Duration::MAX && now < *told + NO_SA_INTERVAL {
                    return None;
                }
                *told = now;
                Some(report)
            }
            other => Some(other),
        }
    }
}

fn counters(answer: Report) -> Vec<Counters> {
    match answer {
        Report::Held { counters, .. } | Report::Disowned { counters, .. } => counters,
        _ => Vec::new(),
    }
}

fn join_snapshots(answers: Vec<Report>) -> Report {
    let mut whole = Snapshot { token: 0, stats: Stats::default(), sas: Vec::new() };
    for answer in answers {
        if let Report::Snapshot(part) = answer {
            whole.token = part.token;
            whole.stats.add(&part.stats);
            whole.sas.extend(part.sas);
        }
    }
    Report::Snapshot(Box::new(whole))
}

/// Each flow once, as the worker saw it that saw it last: a flow that changed its queue is in two caches.
fn join_flows(answers: Vec<Report>) -> Vec<Flow> {
    let mut flows: Vec<Flow> = Vec::new();
    for answer in answers {
        if let Report::Flows { flows: part, .. } = answer {
            flows.extend(part);
        }
    }
    let key = |flow: &Flow| (flow.src, flow.dst, flow.protocol, flow.ports);
    flows.sort_by_key(|flow| (key(flow), flow.idle));
    flows.dedup_by_key(|flow| key(flow));
    flows
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;
    use wire::id::{EspSpi, Term};

    const MAIN: EndpointId = EndpointId(0);

    fn held(at: u64, spis: &[u32]) -> Report {
        let counters = spis.iter().map(|spi| Counters {
            spi_in: EspSpi(*spi),
            next_seq: 1,
            ceiling: 1,
            window: crate::Window::new(),
        });
        Report::Held { endpoint: MAIN, term: Term(2), counters: counters.collect(), at }
    }

    // A switchover that was refused, released and tried again, while one worker did not run.
    #[test]
    fn what_a_late_worker_says_of_an_older_hold_is_void() {
        let mut crew = Crew::new(2);
        let give = |crew: &mut Crew, command| crew.give(command).count();
        let take = |crew: &mut Crew, worker, report| crew.take(Duration::ZERO, worker, report);
        give(&mut crew, Command::Hold { endpoint: MAIN });
        assert_eq!(take(&mut crew, 0, held(1, &[2])), None);
        give(&mut crew, Command::Release { endpoint: MAIN });
        give(&mut crew, Command::Hold { endpoint: MAIN });
        assert_eq!(take(&mut crew, 1, held(1, &[1])), None, "worker 0 has sent since");
        assert_eq!(take(&mut crew, 1, held(3, &[1, 3])), None);
        assert_eq!(take(&mut crew, 0, held(3, &[2])), Some(held(3, &[2, 1, 3])));
    }

    #[test]
    fn one_worker_may_be_late_as_well() {
        let mut crew = Crew::new(1);
        for command in [Command::Hold { endpoint: MAIN }, Command::Hold { endpoint: MAIN }] {
            crew.give(command).count();
        }
        assert_eq!(crew.take(Duration::ZERO, 0, held(1, &[1])), None);
        assert_eq!(crew.take(Duration::ZERO, 0, held(2, &[1])), Some(held(2, &[1])));
    }

    #[test]
    fn all_must_obey_and_have_been_asked() {
        let obeying = |at| Report::Obeying { endpoint: MAIN, at };
        let ask = |crew: &mut Crew| {
            crew.give(Command::ObeyLeases { endpoint: MAIN, on: true }).count();
        };
        let mut crew = Crew::new(2);
        ask(&mut crew);
        assert_eq!(crew.take(Duration::ZERO, 0, obeying(1)), None);
        // Asked again: what was said before is void, also what is on its way.
        ask(&mut crew);
        assert_eq!(crew.take(Duration::ZERO, 1, obeying(1)), None);
        assert_eq!(crew.take(Duration::ZERO, 1, obeying(2)), None);
        assert_eq!(crew.take(Duration::ZERO, 1, obeying(2)), None);
        assert_eq!(crew.take(Duration::ZERO, 0, obeying(2)), Some(obeying(2)));
    }

    #[test]
    fn several_workers_ask_for_an_sa_once_in_a_second() {
        let mut crew = Crew::new(3);
        let no_sa = |child| Report::NoSa { endpoint: MAIN, connection: ConnectionId(4), child };
        let at = Duration::from_millis;
        assert!(crew.take(at(0), 2, no_sa(0)).is_some());
        assert!(crew.take(at(999), 1, no_sa(0)).is_none());
        assert!(crew.take(at(999), 1, no_sa(1)).is_some());
        assert!(crew.take(at(1000), 0, no_sa(0)).is_some());
    }

    #[test]
    fn keys_go_to_one_worker() {
        let spi_in = SpiLayout::new(1, 9, 5, 2).unwrap().spi();
        let alg = crypto::aead::AeadAlg::Aes128Gcm16;
        let key = || crypto::Secret::new(vec![7; alg.keymat_len()]);
        let at = "192.0.2.1:4500".parse().unwrap();
        let sa = crate::Sa {
            endpoint: MAIN,
            connection: ConnectionId(0),
            spi_in,
            spi_out: EspSpi(77),
            alg,
            keymat_in: key(),
            keymat_out: key(),
            local_ts: Vec::new(),
            remote_ts: Vec::new(),
            local: at,
            remote: at,
            udp_encap: true,
            next_seq: 1,
            ceiling: 1,
            born: Term(0),
        };
        let mut crew = Crew::new(3);
        let mut with_keys = Vec::new();
        for (worker, command) in crew.give(Command::Install(Box::new(sa))) {
            let Command::Install(sa) = command else { panic!("another command") };
            assert_eq!(sa.spi_in, spi_in);
            if !sa.keymat_in.expose().is_empty() || !sa.keymat_out.expose().is_empty() {
                with_keys.push(worker);
            }
        }
        assert_eq!(with_keys, [5 % 3]);
    }

    #[test]
    fn counters_and_flows_are_joined() {
        let flow = |host: u8, idle| Flow {
            src: IpAddr::from([10, 1, 0, host]),
            dst: IpAddr::from([10, 2, 0, 1]),
            protocol: 17,
            ports: Some((1, 2)),
            endpoint: MAIN,
            spi_in: EspSpi(9),
            idle: Duration::from_millis(idle),
        };
        let mut crew = Crew::new(2);
        let flows = |flows| Report::Flows { token: 3, flows };
        assert!(crew.take(Duration::ZERO, 0, flows(vec![flow(1, 5), flow(2, 9)])).is_none());
        let joined = crew.take(Duration::ZERO, 1, flows(vec![flow(2, 4)]));
        assert_eq!(joined, Some(flows(vec![flow(1, 5), flow(2, 4)])));

        let part = |sealed| {
            let mut stats = Stats::default();
            (stats.sealed, stats.handed) = (sealed, 1);
            stats.count_drop(crate::Reason::NoSa);
            Report::Snapshot(Box::new(Snapshot { token: 8, stats, sas: Vec::new() }))
        };
        assert!(crew.take(Duration::ZERO, 0, part(30)).is_none());
        let Some(Report::Snapshot(whole)) = crew.take(Duration::ZERO, 1, part(12)) else {
            panic!("no answer")
        };
        assert_eq!((whole.token, whole.stats.sealed, whole.stats.handed), (8, 42, 2));
        assert_eq!(whole.stats.dropped(crate::Reason::NoSa), 2);
    }
}

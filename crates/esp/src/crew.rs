//! Several workers as one, for whoever commands them: every command goes to
//! all, in one order, and what they report comes back as if one had said it.
//!
//! | report | of the whole crew |
//! | --- | --- |
//! | `Held`, `Disowned`, `Snapshot`, `Flows` | when all have answered, joined: each answers each command once and in order, so first answers belong together, then second ones |
//! | `Obeying` | when all have said it since they were last asked |
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
    held: BTreeMap<EndpointId, Answers>,
    disowned: BTreeMap<EndpointId, Answers>,
    snapshots: Answers,
    flows: Answers,
    obeying: BTreeMap<EndpointId, Obeying>,
    no_sa: BTreeMap<(EndpointId, ConnectionId, u16), Duration>,
}

/// Who obeys the leases of an endpoint.
#[derive(Debug, Default)]
struct Obeying {
    /// What a worker said counts if it had obeyed so many commands by then.
    since: u64,
    /// One bit for each worker.
    said: u32,
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
            held: BTreeMap::new(),
            disowned: BTreeMap::new(),
            snapshots: Answers::new(workers),
            flows: Answers::new(workers),
            obeying: BTreeMap::new(),
            no_sa: BTreeMap::new(),
        }
    }

    /// The command as each worker is to get it, by worker. Keys go to the SA's own alone.
    pub fn give(&mut self, command: Command) -> impl Iterator<Item = (u8, Command)> + use<> {
        self.given += 1;
        if let Command::Own { endpoint, .. }
        | Command::Disown { endpoint, .. }
        | Command::ObeyLeases { endpoint, .. } = &command
        {
            self.obeying.insert(*endpoint, Obeying { since: self.given, said: 0 });
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

    /// A worker's report, made when it had obeyed `heard` commands; gives what all of them together say by it.
    pub fn take(
        &mut self,
        now: Duration,
        worker: u8,
        heard: u64,
        report: Report,
    ) -> Option<Report> {
        match report {
            Report::Held { endpoint, term, .. } => {
                let answers = of(&mut self.held, endpoint, self.workers).take(worker, report)?;
                let counters = answers.into_iter().flat_map(counters).collect();
                Some(Report::Held { endpoint, term, counters })
            }
            Report::Disowned { endpoint, term, .. } => {
                let answers =
                    of(&mut self.disowned, endpoint, self.workers).take(worker, report)?;
                let counters = answers.into_iter().flat_map(counters).collect();
                Some(Report::Disowned { endpoint, term, counters })
            }
            Report::Snapshot(_) => self.snapshots.take(worker, report).map(join_snapshots),
            Report::Flows { token, .. } => {
                let answers = self.flows.take(worker, report)?;
                Some(Report::Flows { token, flows: join_flows(answers) })
            }
            Report::Obeying { endpoint } => {
                let obeying = self.obeying.entry(endpoint).or_default();
                if heard < obeying.since {
                    return None;
                }
                obeying.said |= 1 << u32::from(worker);
                let all = obeying.said.count_ones() == u32::from(self.workers);
                all.then_some(report)
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

fn of(all: &mut BTreeMap<EndpointId, Answers>, endpoint: EndpointId, workers: u8) -> &mut Answers {
    all.entry(endpoint).or_insert_with(|| Answers::new(workers))
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

    fn held(spis: &[u32]) -> Report {
        let counters = spis.iter().map(|spi| Counters {
            spi_in: EspSpi(*spi),
            next_seq: 1,
            ceiling: 1,
            window: crate::Window::new(),
        });
        Report::Held { endpoint: MAIN, term: Term(2), counters: counters.collect() }
    }

    #[test]
    fn an_answer_is_whole_when_all_have_given_theirs() {
        let mut crew = Crew::new(2);
        let mut take = |worker, report| crew.take(Duration::ZERO, worker, 0, report);
        // The second hold of worker 1 before the first of worker 0.
        assert_eq!(take(1, held(&[1])), None);
        assert_eq!(take(1, held(&[1, 3])), None);
        assert_eq!(take(0, held(&[2])), Some(held(&[2, 1])));
        assert_eq!(take(0, held(&[])), Some(held(&[1, 3])));
    }

    #[test]
    fn all_must_obey_and_have_been_asked() {
        let obeying = Report::Obeying { endpoint: MAIN };
        let ask = |crew: &mut Crew| {
            crew.give(Command::ObeyLeases { endpoint: MAIN, on: true }).count();
        };
        let mut crew = Crew::new(2);
        ask(&mut crew);
        assert_eq!(crew.take(Duration::ZERO, 0, 1, obeying.clone()), None);
        // Asked again: what was said before is void, also what is on its way.
        ask(&mut crew);
        assert_eq!(crew.take(Duration::ZERO, 1, 1, obeying.clone()), None);
        assert_eq!(crew.take(Duration::ZERO, 0, 2, obeying.clone()), None);
        assert_eq!(crew.take(Duration::ZERO, 0, 2, obeying.clone()), None);
        assert_eq!(crew.take(Duration::ZERO, 1, 2, obeying.clone()), Some(obeying));
    }

    #[test]
    fn several_workers_ask_for_an_sa_once_in_a_second() {
        let mut crew = Crew::new(3);
        let no_sa = |child| Report::NoSa { endpoint: MAIN, connection: ConnectionId(4), child };
        let at = Duration::from_millis;
        assert!(crew.take(at(0), 2, 0, no_sa(0)).is_some());
        assert!(crew.take(at(999), 1, 0, no_sa(0)).is_none());
        assert!(crew.take(at(999), 1, 0, no_sa(1)).is_some());
        assert!(crew.take(at(1000), 0, 0, no_sa(0)).is_some());
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
        assert!(crew.take(Duration::ZERO, 0, 0, flows(vec![flow(1, 5), flow(2, 9)])).is_none());
        let joined = crew.take(Duration::ZERO, 1, 0, flows(vec![flow(2, 4)]));
        assert_eq!(joined, Some(flows(vec![flow(1, 5), flow(2, 4)])));

        let part = |sealed| {
            let mut stats = Stats::default();
            (stats.sealed, stats.handed) = (sealed, 1);
            stats.count_drop(crate::Reason::NoSa);
            Report::Snapshot(Box::new(Snapshot { token: 8, stats, sas: Vec::new() }))
        };
        assert!(crew.take(Duration::ZERO, 0, 0, part(30)).is_none());
        let Some(Report::Snapshot(whole)) = crew.take(Duration::ZERO, 1, 0, part(12)) else {
            panic!("no answer")
        };
        assert_eq!((whole.token, whole.stats.sealed, whole.stats.handed), (8, 42, 2));
        assert_eq!(whole.stats.dropped(crate::Reason::NoSa), 2);
    }
}

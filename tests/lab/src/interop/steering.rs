//! What steering costs: the goodput of a pair in active-active with half of the packets steered, against none.
//!
//! ```text
//!   lhost 10.1.0.9  ──► left  ─┐ none: every flow arrives at the instance that owns its tunnel
//!   lhost 10.1.0.19 ──► right ─┴ half: of each host's four flows two cross the pair link
//! ```
//! Eight TCP flows, fed alike, to a host behind a Tandem: strongSwan's own ESP would be the bottleneck of both. The
//! trials alternate within one run; what counts is the median of the rounds' ratios. Then the pair link is looked at
//! under a slow stream: what the counters say must be what is on the wire, once each.

use super::{Lab, Scenario};
use crate::active::{ENDPOINTS, wait_home};
use crate::capture::{Capture, Recording};
use crate::check;
use crate::error::{Error, IoContext, Result, ensure};
use crate::net::{self, Net};
use crate::probe;
use crate::proc::Proc;
use crate::scene::{PATIENCE, start_pair_with, start_tandem};
use crate::stats::nearest_rank;
use crate::tandem::{Config, Counters, Daemon};
use crate::{pcap, wait};
use std::collections::BTreeSet;
use std::process::{ChildStdin, ChildStdout};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "active-steer",
    about: "goodput with half of the packets steered, against none; the pair link's captures",
    play: steer,
}];

/// The least share of the goodput that is left with half of the packets steered.
const BAR: f64 = 0.6;
/// Flows from each host that are pinned to each endpoint: twice as many in a trial.
const OF_A_KIND: usize = 4;
/// Ports are tried from here on.
const PORTS_FROM: u16 = 7300;
/// The port of the sink.
const SINK: u16 = 7290;
/// Bytes a second, while the pair link is looked at.
const SLOW: u64 = 12_500_000;

struct Stage {
    net: Net,
    instances: [Daemon; 2],
    peer: Daemon,
    /// `host:port` of flows, by where they arrive and where they are pinned.
    flows: [[Vec<String>; 2]; 2],
    /// It ends with its standard input.
    _sink: (Proc, ChildStdin, ChildStdout),
}

/// What a trial found.
#[derive(Clone, Copy, Debug, Default)]
struct Trial {
    gbps: f64,
    /// Of the packets that arrived at either instance.
    steered_percent: f64,
    /// Processor time of both instances' threads for a gigabyte: control, worker.
    seconds_per_gb: [f64; 2],
}

fn steer(lab: &Lab<'_>) -> Result<String> {
    let mut stage = Stage::build(lab)?;
    let (rounds, millis) = if lab.full { (9, 4000) } else { (5, 2000) };
    // Buffers, routes and neighbours.
    stage.trial(true, 500)?;
    let mut trials = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for at in [round % 2, 1 - round % 2] {
            trials[at].push(stage.trial(at == 1, millis)?);
        }
    }
    let median = |at: usize, of: fn(&Trial) -> f64| {
        nearest_rank(&trials[at].iter().map(of).collect::<Vec<_>>(), 50.0)
    };
    let ratios: Vec<f64> =
        trials[0].iter().zip(&trials[1]).map(|(none, half)| half.gbps / none.gbps).collect();
    let ratio = nearest_rank(&ratios, 50.0);
    let tell = |at: usize| {
        let cpu = |of| median(at, of);
        format!(
            "{:.2} Gb/s ({:.1} % steered; CPU-s a GB: control {:.2}, worker {:.2})",
            median(at, |t| t.gbps),
            median(at, |t| t.steered_percent),
            cpu(|t| t.seconds_per_gb[0]),
            cpu(|t| t.seconds_per_gb[1])
        )
    };
    let found = format!(
        "none {}, half {}; ratio {ratio:.2} ({:.2} to {:.2} in {rounds} rounds)",
        tell(0),
        tell(1),
        nearest_rank(&ratios, 0.0),
        nearest_rank(&ratios, 100.0)
    );
    for (at, wanted) in [(0, 0.0..=1.0), (1, 40.0..=60.0)] {
        for trial in &trials[at] {
            ensure(wanted.contains(&trial.steered_percent), || {
                format!("{:.1} % steered, wanted {wanted:?}: {found}", trial.steered_percent)
            })?;
        }
    }
    let wire = stage.look_at_the_link(lab)?;
    for instance in stage.instances.iter().chain([&stage.peer]) {
        let errors = instance.log_errors();
        ensure(errors.is_empty(), || format!("{} logged: {}", instance.name, errors.join(" / ")))?;
    }
    ensure(ratio >= BAR, || format!("below the bar of {BAR}: {found}"))?;
    Ok(format!("{found}; {wire}"))
}

impl Stage {
    fn build(lab: &Lab<'_>) -> Result<Stage> {
        let net = Net::build(lab.run)?;
        net.second_next_hop()?;
        let instances = start_pair_with(lab.run, lab.bins, &net, &Config::active_active(), &[])?;
        wait_home(&instances, PATIENCE)?;
        let peer = start_tandem(lab.run, lab.bins, &net, &remote())?;
        wait::until("both tunnels", PATIENCE, Duration::from_millis(20), || {
            let there = peer.status()?;
            let mut up = there.is_up("gw", 1) && there.is_up("gw-b", 1);
            for instance in &instances {
                let tunnels = instance.status()?.tunnels;
                up &= tunnels.len() == 2 && tunnels.iter().all(|t| t.state == "established");
            }
            Ok(up.then_some(()))
        })?;
        net.lhost.ping_until(net::RHOST, PATIENCE)?;
        let log = lab.run.dir().join("sink.log");
        let bind = format!("{}:{SINK}", net::RHOST);
        let sink =
            net.rhost.cmd(probe::program()?).args(["sink", "--bind", &bind]).converse(&log)?;
        let mut stage = Stage { net, instances, peer, flows: Default::default(), _sink: sink };
        stage.find_flows()?;
        Ok(stage)
    }

    /// Opens flows until there are enough of each kind.
    fn find_flows(&mut self) -> Result<()> {
        for (arrives, source) in [net::LHOST, net::LHOST_SECOND].into_iter().enumerate() {
            let from: Vec<String> =
                (PORTS_FROM..PORTS_FROM + 32).map(|port| format!("{source}:{port}")).collect();
            wait::until_ok("a sink", PATIENCE, Duration::from_millis(50), || {
                self.spread(&from, 1, 0).map(drop)
            })?;
            for flow in self.instances[arrives].flows(&["--address", source])? {
                let pinned = ENDPOINTS.iter().position(|(name, ..)| *name == flow.endpoint);
                let (Some(pinned), Some(port)) = (pinned, flow.source_port) else { continue };
                let name = format!("{source}:{port}");
                let list = &mut self.flows[arrives][pinned];
                if from.contains(&name) && !list.contains(&name) && list.len() < OF_A_KIND {
                    list.push(name);
                }
            }
        }
        let enough = self.flows.iter().flatten().all(|list| list.len() == OF_A_KIND);
        ensure(enough, || format!("too few flows of a kind: {:?}", self.flows))
    }

    /// Bytes that arrived, and the seconds they took.
    fn spread(&self, from: &[String], millis: u64, rate: u64) -> Result<(f64, f64)> {
        let to = format!("{}:{SINK}", net::RHOST);
        let mut cmd = self.net.lhost.cmd(probe::program()?).args(["spread", "--to", &to]).args([
            "--millis",
            &millis.to_string(),
            "--rate",
            &rate.to_string(),
        ]);
        for flow in from {
            cmd = cmd.args(["--from", flow]);
        }
        let text = cmd.run(Duration::from_secs(60))?;
        let mut words = text.split_whitespace().map(str::parse::<f64>);
        match (words.next(), words.next()) {
            (Some(Ok(bytes)), Some(Ok(nanos))) => Ok((bytes, nanos / 1e9)),
            _ => Err(Error::parse("lab-probe spread", text)),
        }
    }

    /// Eight flows: all that stay where they arrive, or half of each host's that cross the pair link.
    fn chosen(&self, steered: bool) -> Vec<String> {
        let mut chosen = Vec::new();
        for (arrives, pinned) in self.flows.iter().enumerate() {
            let (stay, cross) = (&pinned[arrives], &pinned[1 - arrives]);
            if steered {
                chosen.extend(stay.iter().take(OF_A_KIND / 2).cloned());
                chosen.extend(cross.iter().take(OF_A_KIND / 2).cloned());
            } else {
                chosen.extend(stay.iter().cloned());
            }
        }
        chosen
    }

    fn trial(&mut self, steered: bool, millis: u64) -> Result<Trial> {
        let chosen = self.chosen(steered);
        let (counters, cpu) = (self.counters()?, self.cpu()?);
        let (bytes, seconds) = self.spread(&chosen, millis, 0)?;
        let (after, spent) = (self.counters()?, self.cpu()?);
        let grown = |of: fn(&Counters) -> u64| -> f64 {
            let sum = |all: &[Counters; 2]| all.iter().map(of).sum::<u64>();
            sum(&after).saturating_sub(sum(&counters)) as f64
        };
        // What leaves through the tunnels is what arrived from the hosts.
        let packets = grown(|c| c.packets_out);
        let gigabytes = bytes / 1e9;
        Ok(Trial {
            gbps: bytes * 8.0 / seconds / 1e9,
            steered_percent: 100.0 * grown(|c| c.steered_in) / packets.max(1.0),
            seconds_per_gb: [0, 1].map(|at| (spent[at] - cpu[at]) / gigabytes),
        })
    }

    fn counters(&self) -> Result<[Counters; 2]> {
        Ok([self.instances[0].status()?.counters, self.instances[1].status()?.counters])
    }

    /// Processor seconds of both instances so far: all threads but the worker, the worker.
    fn cpu(&mut self) -> Result<[f64; 2]> {
        let mut spent = [0.0; 2];
        for instance in &mut self.instances {
            let tasks = format!("/proc/{}/task", instance.pid()?);
            for task in std::fs::read_dir(&tasks).doing(tasks.as_str())?.flatten() {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                let Some((name, rest)) = stat.rsplit_once(')') else { continue };
                // User and system time are the fields 14 and 15, in hundredths of a second (proc(5)).
                let ticks = rest.split_whitespace().skip(11).take(2);
                let ticks: f64 = ticks.filter_map(|word| word.parse::<f64>().ok()).sum();
                spent[usize::from(name.contains("(worker"))] += ticks / 100.0;
            }
        }
        Ok(spent)
    }

    /// A slow stream, half of it steered, under captures.
    fn look_at_the_link(&mut self, lab: &Lab<'_>) -> Result<String> {
        for host in [&self.net.left, &self.net.right] {
            host.ip("link set eth2 gso_max_segs 1\nlink set eth1 gso_max_segs 1\n")?;
        }
        let chosen = self.chosen(true);
        let before = self.counters()?;
        let start = |ns, interface, snap| Capture::start(lab.run, ns, interface, "", snap);
        let captures = [
            start(&self.net.left, "eth2", 2048)?,
            start(&self.net.left, "eth1", 256)?,
            start(&self.net.lhost, "eth0", 256)?,
        ];
        self.spread(&chosen, 1500, SLOW)?;
        let [pair, lan, host] = captures.map(Capture::stop);
        let (pair, lan, host) = (pair?, lan?, host?);
        let after = self.counters()?;
        let grown = |of: fn(&Counters) -> u64| [0, 1].map(|at| of(&after[at]) - of(&before[at]));
        let (out, into) = (grown(|c| c.steered_out), grown(|c| c.steered_in));
        let twice: u64 = after.iter().filter_map(|c| c.drops.get("steered_twice")).sum();
        ensure(twice == 0, || format!("{twice} packets would have been steered twice"))?;
        ensure(out == [into[1], into[0]] && out.iter().all(|count| *count > 500), || {
            format!("{out:?} handed over, {into:?} taken")
        })?;
        let seen = [steered_datagrams(&pair)?, steered_datagrams(&lan)?];
        let total: usize = seen.iter().map(|seen| seen.counters.len()).sum();
        let repeats: u64 = seen.iter().map(|seen| seen.repeats).sum();
        ensure(total as u64 == out[0] + out[1], || {
            format!("{total} steered packets on the wire, {out:?} handed over")
        })?;
        ensure(repeats == 0, || format!("{repeats} counters of the pair link reused"))?;
        let clear = marked(&pair)? + check::clear_text(&pair);
        ensure(clear == 0, || format!("{clear} packets in clear on the pair link"))?;
        ensure(marked(&host)? > 500, || "the detector of clear text is blind".into())?;
        for seen in [pair, lan, host] {
            seen.discard();
        }
        Ok(format!("on the wire {total} steered packets, each once, none in clear"))
    }
}

/// Steered datagrams in a capture of the pair's port.
#[derive(Debug, Default)]
struct Steered {
    /// Key and counter of each.
    counters: BTreeSet<(u32, u64)>,
    /// Those that were there before.
    repeats: u64,
}

/// The pair port of the sample configuration.
const PAIR_PORT: u16 = 4600;

fn steered_datagrams(recording: &Recording) -> Result<Steered> {
    let mut found = Steered::default();
    let file = std::fs::read(recording.path()).doing("read a capture")?;
    for frame in pcap::frames(&file)? {
        // Ethernet, IPv4 without options, UDP; of a fragmented datagram the first part has the header.
        let bytes = frame.bytes;
        let word = |at: usize| bytes.get(at..at + 2).map(|w| u16::from_be_bytes([w[0], w[1]]));
        let is_udp = word(12) == Some(0x0800) && bytes.get(23) == Some(&17);
        let is_first = word(20).is_some_and(|fragment| fragment & 0x1fff == 0);
        if !is_udp || !is_first || word(36) != Some(PAIR_PORT) || bytes.get(42) != Some(&2) {
            continue;
        }
        let (Some(key), Some(counter)) = (
            bytes.get(43..).and_then(<[u8]>::first_chunk),
            bytes.get(47..).and_then(<[u8]>::first_chunk),
        ) else {
            continue;
        };
        let new = found.counters.insert((u32::from_be_bytes(*key), u64::from_be_bytes(*counter)));
        found.repeats += u64::from(!new);
    }
    Ok(found)
}

/// Frames that show what the flows carry.
fn marked(recording: &Recording) -> Result<u64> {
    let file = std::fs::read(recording.path()).doing("read a capture")?;
    let shows = |bytes: &[u8]| bytes.windows(probe::MARK.len()).any(|part| part == probe::MARK);
    Ok(pcap::frames(&file)?.iter().filter(|frame| shows(frame.bytes)).count() as u64)
}

/// The remote gateway: one connection to each endpoint of the pair.
fn remote() -> Config {
    let mut config = Config::remote();
    let mut second = config.branch().clone();
    second.name = "gw-b".into();
    second.remote_address = net::SECOND_WAN.into();
    config.connections.push(second);
    config
}

//! Probes: numbered UDP packets each way, a bulk TCP stream, an idle TCP connection.
//!
//! The program `lab-probe` runs inside the hosts' namespaces and streams small records home over a pipe; this
//! module collects and judges them. Sender, receiver and judge share CLOCK_BOOTTIME.

use crate::error::{Error, IoContext, Result};
use crate::ns::Ns;
use crate::proc::Proc;
use crate::run::Run;
use crate::{clock, wait};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One record of a probe: a letter and two numbers, 17 bytes on the pipe, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// `S` sent, `R` received, `B` bytes so far, `E` echo came back, `C` connected, `X` error.
    pub kind: u8,
    /// Packet number, byte count, echo number or errno.
    pub value: u64,
    /// When, in nanoseconds of CLOCK_BOOTTIME.
    pub at: u64,
}

impl Record {
    /// Bytes of a record.
    pub const SIZE: usize = 17;

    /// As on the pipe.
    pub fn bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [self.kind; Self::SIZE];
        bytes[1..9].copy_from_slice(&self.value.to_le_bytes());
        bytes[9..17].copy_from_slice(&self.at.to_le_bytes());
        bytes
    }

    /// From the pipe.
    pub fn read(bytes: &[u8; Self::SIZE]) -> Self {
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Record { kind: bytes[0], value: number(1), at: number(9) }
    }
}

/// The port of the UDP probes.
pub const UDP_PORT: u16 = 7000;
/// The port of the TCP probes' server.
pub const TCP_PORT: u16 = 7001;
/// What `lab-probe spread` sends, over and over: found on a wire, something crossed it in clear.
pub const MARK: &[u8; 16] = b"in clear, alas! ";

/// The path of the probe program, beside the running one.
pub fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().doing("find the lab's own program")?;
    // A test binary lives one folder deeper.
    for dir in own.ancestors().skip(1).take(2) {
        let path = dir.join("lab-probe");
        if path.exists() {
            return Ok(path);
        }
    }
    Err(Error::Machine("lab-probe is not beside the running program: build the crate `lab`".into()))
}

#[derive(Debug, Default)]
struct Log {
    sent: Vec<(u64, u64)>,
    received: Vec<(u64, u64)>,
    bytes: Vec<(u64, u64)>,
    echoes: Vec<(u64, u64)>,
    connected: bool,
    errors: Vec<u64>,
}

type Shared = Arc<Mutex<Log>>;

fn lock(log: &Shared) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Agent {
    proc: Proc,
    stdin: ChildStdin,
    log: Shared,
}

impl Agent {
    fn start(run: &Run, ns: &Ns, name: &str, args: &[String]) -> Result<Agent> {
        let err = run.dir().join(format!("probe-{}-{name}.log", ns.short()));
        let (proc, stdin, stdout) = ns.cmd(program()?).args(args).fifo(20).converse(&err)?;
        let log = Shared::default();
        let copy = Arc::clone(&log);
        std::thread::spawn(move || collect(stdout, &copy));
        Ok(Agent { proc, stdin, log })
    }

    fn tell(&mut self, byte: u8) -> Result<()> {
        self.stdin.write_all(&[byte]).and_then(|()| self.stdin.flush()).doing("talk to a probe")
    }
}

fn collect(mut stdout: ChildStdout, log: &Shared) {
    let mut buffer = vec![0; Record::SIZE * 4096];
    let mut filled = 0;
    loop {
        match stdout.read(&mut buffer[filled..]) {
            Ok(0) | Err(_) => return,
            Ok(count) => filled += count,
        }
        let whole = filled / Record::SIZE * Record::SIZE;
        let mut log = lock(log);
        for chunk in buffer[..whole].as_chunks::<{ Record::SIZE }>().0 {
            let record = Record::read(chunk);
            let entry = (record.value, record.at);
            match record.kind {
                b'S' => log.sent.push(entry),
                b'R' => log.received.push(entry),
                b'B' => log.bytes.push(entry),
                b'E' => log.echoes.push(entry),
                b'C' => log.connected = true,
                _ => log.errors.push(record.value),
            }
        }
        drop(log);
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Which way a probe's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the host behind the endpoint to the host behind the remote gateway.
    Out,
    /// The other way.
    In,
}

impl Way {
    /// Both.
    pub const BOTH: [Way; 2] = [Way::Out, Way::In];
}

/// What happened to the packets of one way within a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Packets sent within the window.
    pub sent: u64,
    /// Of those, packets that arrived (whenever).
    pub received: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Packets that came again.
    pub duplicates: u64,
    /// The longest silence at the receiver within the window, its ends included.
    pub gap: Duration,
    /// When that silence began.
    pub gap_start: Duration,
}

impl Measure {
    /// Packets that never arrived.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }
}

/// Judges one way: `sent` and `received` are (number, nanoseconds) in the order they happened.
pub fn judge(sent: &[(u64, u64)], received: &[(u64, u64)], from: u64, to: u64) -> Measure {
    let first = sent.partition_point(|(_, at)| *at < from);
    let last = sent.partition_point(|(_, at)| *at < to);
    let window = sent.get(first..last).unwrap_or_default();
    let mut measure = Measure { sent: window.len() as u64, ..Measure::default() };
    if let (Some((low, _)), Some((high, _))) = (window.first(), window.last()) {
        let mut seen = BTreeSet::new();
        let mut highest = None;
        // A packet arrives after it was sent.
        let start = received.partition_point(|(_, at)| *at < from);
        for (number, _) in received.get(start..).unwrap_or_default() {
            if !(low..=high).contains(&number) {
                continue;
            }
            if !seen.insert(*number) {
                measure.duplicates += 1;
                continue;
            }
            if highest.is_some_and(|highest| *number < highest) {
                measure.reordered += 1;
            }
            highest = highest.max(Some(*number));
        }
        measure.received = seen.len() as u64;
    }
    let start = received.partition_point(|(_, at)| *at < from);
    let end = received.partition_point(|(_, at)| *at < to);
    let mut before = from;
    let arrivals = received.get(start..end).unwrap_or_default().iter().map(|(_, at)| *at);
    for at in arrivals.chain([to]) {
        let gap = Duration::from_nanos(at.saturating_sub(before));
        if gap > measure.gap {
            measure.gap = gap;
            measure.gap_start = Duration::from_nanos(before);
        }
        before = before.max(at);
    }
    measure
}

/// Numbered UDP packets both ways between two hosts.
#[derive(Debug)]
pub struct UdpProbes {
    rate: u32,
    left: Agent,
    right: Agent,
}

impl UdpProbes {
    /// Starts `rate` packets a second each way between the hosts behind endpoint and gateway.
    pub fn start(run: &Run, left: (&Ns, &str), right: (&Ns, &str), rate: u32) -> Result<UdpProbes> {
        Self::on_port(run, left, right, rate, UDP_PORT)
    }

    /// The same on another port, at both ends: another flow.
    pub fn on_port(
        run: &Run,
        left: (&Ns, &str),
        right: (&Ns, &str),
        rate: u32,
        port: u16,
    ) -> Result<UdpProbes> {
        Self::sized(run, left, right, rate, port, 64)
    }

    /// The same with packets of `size` bytes of payload, by which they are known inside a tunnel.
    pub fn sized(
        run: &Run,
        left: (&Ns, &str),
        right: (&Ns, &str),
        rate: u32,
        port: u16,
        size: usize,
    ) -> Result<UdpProbes> {
        let (each, port, size) = (rate.to_string(), port.to_string(), size.to_string());
        let agent = |(ns, own): (&Ns, &str), (_, other): (&Ns, &str)| {
            let args = ["udp", "--bind", own, "--to", other, "--rate", &each, "--port", &port];
            let args = [&args[..], &["--size", &size]].concat();
            let name = format!("udp-{own}-{port}");
            let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
            Agent::start(run, ns, &name, &args)
        };
        Ok(UdpProbes { rate, left: agent(left, right)?, right: agent(right, left)? })
    }

    fn ends(&self, way: Way) -> (&Agent, &Agent) {
        match way {
            Way::Out => (&self.left, &self.right),
            Way::In => (&self.right, &self.left),
        }
    }

    /// Fails if a probe has died.
    pub fn check_alive(&mut self) -> Result<()> {
        self.left.proc.check_alive()?;
        self.right.proc.check_alive()
    }

    /// Waits until both ways have carried packets without a silence above 50 ms for the last 300 ms.
    pub fn wait_flowing(&self, within: Duration) -> Result<()> {
        let span = Duration::from_millis(300);
        wait::for_true("probes to flow both ways", within, Duration::from_millis(20), || {
            let to = clock::now();
            let from = to.saturating_sub(span);
            Way::BOTH.iter().all(|way| {
                let arrived = self.arrivals(*way, from, to);
                // A reader thread may lag a few ms behind the clock; the last silence is not judged as such.
                arrived.len() as u64 * 10 >= u64::from(self.rate) * 3 / 2
                    && judge(&[], &arrived, clock::nanos(from), clock::nanos(to)).gap < span / 6
            })
        })
    }

    /// Waits until packets that were sent after `since` arrive, both ways.
    pub fn wait_arrivals_since(&self, since: Duration, within: Duration) -> Result<()> {
        wait::for_true("probes to arrive both ways", within, Duration::from_millis(2), || {
            Way::BOTH.iter().all(|way| !self.arrivals(*way, since, Duration::MAX).is_empty())
        })
    }

    /// Arrivals within `[from, to)`: (number, nanoseconds).
    pub fn arrivals(&self, way: Way, from: Duration, to: Duration) -> Vec<(u64, u64)> {
        let log = lock(&self.ends(way).1.log);
        let first = log.received.partition_point(|(_, at)| *at < clock::nanos(from));
        let last = log.received.partition_point(|(_, at)| *at < clock::nanos(to));
        log.received.get(first..last).unwrap_or_default().to_vec()
    }

    /// Judges one way over packets sent within `[from, to)`. Call it a little after `to`, or see
    /// [`UdpProbes::settle`].
    pub fn measure(&self, way: Way, from: Duration, to: Duration) -> Measure {
        let (sender, receiver) = self.ends(way);
        let sent = lock(&sender.log).sent.clone();
        let log = lock(&receiver.log);
        judge(&sent, &log.received, clock::nanos(from), clock::nanos(to))
    }

    /// The packets of one way, sent within `[from, to)`, that never arrived: (number, when sent).
    pub fn lost(&self, way: Way, from: Duration, to: Duration) -> Vec<(u64, Duration)> {
        let (sender, receiver) = self.ends(way);
        let received: BTreeSet<u64> =
            lock(&receiver.log).received.iter().map(|(number, _)| *number).collect();
        let sent = lock(&sender.log).sent.clone();
        sent.into_iter()
            .map(|(number, at)| (number, Duration::from_nanos(at)))
            .filter(|(number, at)| (from..to).contains(at) && !received.contains(number))
            .collect()
    }

    /// How much arrived each way since `event`, in words.
    pub fn tell_silence(&self, event: Duration) -> String {
        let count = |way| self.arrivals(way, event, Duration::MAX).len();
        format!("{} arrived at the peer's host, {} at ours", count(Way::Out), count(Way::In))
    }

    /// Where losses fell, in words and in the time of day (UTC) that logs use.
    pub fn tell_losses(&self, from: Duration, to: Duration) -> String {
        let mut text = Vec::new();
        for way in Way::BOTH {
            let lost = self.lost(way, from, to);
            let mut index = 0;
            while let Some((_, start)) = lost.get(index) {
                // Losses within 20 ms belong together.
                let mut end = index;
                while lost
                    .get(end + 1)
                    .is_some_and(|next| next.1 - lost[end].1 < Duration::from_millis(20))
                {
                    end += 1;
                }
                let at = clock::time_of_day(*start);
                text.push(format!(
                    "{} {} from {at} on",
                    end + 1 - index,
                    if way == Way::Out { "towards the peer" } else { "from the peer" }
                ));
                index = end + 1;
            }
        }
        text.join(", ")
    }

    /// Waits until all records up to `to` have come home and packets sent before it had half a second to arrive.
    pub fn settle(&self, to: Duration) -> Result<()> {
        clock::sleep_until(to + Duration::from_millis(500));
        wait::for_true(
            "the probes' records",
            Duration::from_secs(5),
            Duration::from_millis(5),
            || {
                Way::BOTH.iter().all(|way| {
                    lock(&self.ends(*way).0.log)
                        .sent
                        .last()
                        .is_some_and(|(_, at)| *at > clock::nanos(to))
                })
            },
        )
    }

    /// Packets received in each `bucket` of `[from, to)`.
    pub fn series(&self, way: Way, from: Duration, to: Duration, bucket: Duration) -> Vec<u32> {
        let width = clock::nanos(bucket).max(1);
        let count = clock::nanos(to.saturating_sub(from)) / width;
        let mut series = vec![0_u32; usize::try_from(count).unwrap_or(0)];
        for (_, at) in self.arrivals(way, from, to) {
            let index = usize::try_from((at - clock::nanos(from)) / width).unwrap_or(usize::MAX);
            if let Some(slot) = series.get_mut(index) {
                *slot += 1;
            }
        }
        series
    }

    /// Forgets everything before `before`, so that long runs stay small.
    pub fn forget(&self, before: Duration) {
        let before = clock::nanos(before);
        for agent in [&self.left, &self.right] {
            let mut log = lock(&agent.log);
            log.sent.retain(|(_, at)| *at >= before);
            log.received.retain(|(_, at)| *at >= before);
        }
    }
}

/// A bulk TCP stream and an idle TCP connection between two hosts.
#[derive(Debug)]
pub struct TcpProbes {
    server: Agent,
    bulk: Option<Agent>,
    idle: Agent,
    next_echo: u64,
}

impl TcpProbes {
    /// Starts a server on `server` and connects from `client`. `bulk_rate` is in bytes a second (`None`: no bulk
    /// stream; `Some(0)`: as fast as it goes).
    pub fn start(
        run: &Run,
        client: &Ns,
        server: (&Ns, &str),
        bulk_rate: Option<u64>,
    ) -> Result<TcpProbes> {
        let (ns, address) = server;
        let serve = Agent::start(run, ns, "tcp", &["serve", "--bind", address].map(str::to_owned))?;
        wait::for_true(
            "the TCP server",
            Duration::from_secs(10),
            Duration::from_millis(5),
            || lock(&serve.log).connected,
        )?;
        let bulk = match bulk_rate {
            None => None,
            Some(rate) => {
                let args =
                    ["bulk", "--to", address, "--rate", &rate.to_string()].map(str::to_owned);
                Some(Agent::start(run, client, "bulk", &args)?)
            }
        };
        let idle =
            Agent::start(run, client, "idle", &["idle", "--to", address].map(str::to_owned))?;
        wait::for_true(
            "TCP connections",
            Duration::from_secs(20),
            Duration::from_millis(5),
            || {
                lock(&idle.log).connected
                    && bulk.as_ref().is_none_or(|bulk| lock(&bulk.log).connected)
            },
        )?;
        Ok(TcpProbes { server: serve, bulk, idle, next_echo: 0 })
    }

    /// Bytes the bulk stream has delivered by `at`.
    pub fn delivered(&self, at: Duration) -> u64 {
        let log = lock(&self.server.log);
        let count = log.bytes.partition_point(|(_, then)| *then <= clock::nanos(at));
        count.checked_sub(1).and_then(|last| log.bytes.get(last)).map_or(0, |(bytes, _)| *bytes)
    }

    /// The bulk stream's rate within a window, in bits a second.
    pub fn rate(&self, from: Duration, to: Duration) -> f64 {
        let bytes = self.delivered(to).saturating_sub(self.delivered(from));
        bytes as f64 * 8.0 / (to.saturating_sub(from)).as_secs_f64()
    }

    /// Bytes the bulk stream delivered in each `bucket` of `[from, to)`.
    pub fn series(&self, from: Duration, to: Duration, bucket: Duration) -> Vec<u64> {
        let mut series = Vec::new();
        let mut at = from;
        while at + bucket <= to {
            series.push(self.delivered(at + bucket).saturating_sub(self.delivered(at)));
            at += bucket;
        }
        series
    }

    /// Counts connections that are broken: the idle one must echo and the bulk one must move, within `within`.
    pub fn broken(&mut self, within: Duration) -> Result<u64> {
        let start = clock::now();
        self.next_echo += 1;
        let wanted = self.next_echo;
        // A dead probe is a broken connection.
        let told = self.idle.tell(b'n').is_ok();
        let idle = told
            && wait::for_true("echo", within, Duration::from_millis(2), || {
                lock(&self.idle.log).echoes.iter().any(|(number, _)| *number == wanted)
            })
            .is_ok();
        let mut broken = u64::from(!idle);
        if let Some(bulk) = &mut self.bulk {
            let before =
                self.server.log.lock().map_or(0, |log| log.bytes.last().map_or(0, |last| last.0));
            let moved = wait::for_true("bulk", within, Duration::from_millis(2), || {
                lock(&self.server.log)
                    .bytes
                    .last()
                    .is_some_and(|(bytes, at)| *bytes > before && *at > clock::nanos(start))
            });
            let dead = bulk.proc.ended().is_some() || !lock(&bulk.log).errors.is_empty();
            broken += u64::from(moved.is_err() || dead);
        }
        Ok(broken)
    }

    /// How many connections there are.
    pub fn connections(&self) -> u64 {
        1 + u64::from(self.bulk.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn records_survive_the_pipe() {
        let record = Record { kind: b'R', value: 0x0102_0304_0506_0708, at: u64::MAX - 3 };
        assert_eq!(Record::read(&record.bytes()), record);
    }

    #[test]
    fn loss_gap_and_order_are_judged() {
        let sent: Vec<_> = (0..10).map(|n| (n, n * MS)).collect();
        // 3 and 4 lost, 5 overtaken by 6, 8 twice; times in tenths of a millisecond.
        let received =
            [(0, 1), (1, 11), (2, 21), (6, 61), (5, 62), (7, 71), (8, 81), (8, 82), (9, 91)]
                .map(|(n, t)| (n, t * MS / 10));
        let measure = judge(&sent, &received, 0, 10 * MS);
        assert_eq!((measure.sent, measure.received, measure.lost()), (10, 8, 2));
        assert_eq!((measure.duplicates, measure.reordered), (1, 1));
        assert_eq!(measure.gap, Duration::from_millis(4));
        assert_eq!(measure.gap_start, Duration::from_nanos(2 * MS + MS / 10));
    }

    #[test]
    fn silence_at_the_ends_counts() {
        let sent = [(0, 0), (1, 50 * MS)];
        let received = [(0, MS), (1, 51 * MS)];
        let tail = judge(&sent, &received, 20 * MS, 100 * MS);
        assert_eq!(tail.gap, Duration::from_millis(49));
        let silent = judge(&sent, &[], 20 * MS, 100 * MS);
        assert_eq!((silent.gap, silent.lost()), (Duration::from_millis(80), 1));
    }
}

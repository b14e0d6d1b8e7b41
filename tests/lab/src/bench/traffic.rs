//! The cells: what is sent through the contender in place, and what is read while it runs.

use crate::bench::contender::Scene;
use crate::bench::cpu::{Machine, Spent, ThreadTime, Threads};
use crate::bench::probe::{self, BEGIN, READY, RoundTrips, TcpCount, UdpCount, UdpSent};
use crate::bench::profile::{Profile, Recording};
use crate::bench::search::Outcome;
use crate::error::{Error, IoContext, Result, ensure};
use crate::net;
use crate::ns::Ns;
use crate::proc::{Cmd, Proc};
use crate::run::Run;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Ports of the generator.
const TCP_PORT: u16 = 5301;
const UDP_PORT: u16 = 5302;
const ECHO_PORT: u16 = 5303;
/// How much longer than its own time a step may take.
const SLACK: Duration = Duration::from_secs(20);
/// How long packets may be under way after the last was sent.
const DRAIN: Duration = Duration::from_millis(150);
/// A sender that sent less than this part of what it was to send is itself the limit.
const KEPT_RATE: f64 = 0.9;
/// More lost is too many.
pub const LOSS: f64 = 0.001;

/// From which client to which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the near one to the far one.
    Out,
    /// Back.
    Back,
}

/// One TCP cell's wishes.
#[derive(Clone, Copy, Debug)]
pub struct TcpPlan<'a> {
    /// Streams.
    pub streams: usize,
    /// From which client.
    pub way: Way,
    /// Bytes a second of all, 0: as fast as it goes.
    pub rate: u64,
    /// TCP congestion control, if not the machine's.
    pub congestion: Option<&'a str>,
    /// Before the measured time.
    pub warm_up: Duration,
    /// The measured time.
    pub time: Duration,
    /// Whether it is also to be found out where the time goes, which costs some of it.
    pub profile: bool,
}

/// What was found.
#[derive(Clone, Copy, Debug)]
pub struct TcpFound {
    /// Payload that arrived.
    pub count: TcpCount,
    /// What the machine spent meanwhile.
    pub spent: Spent,
    /// What the gateways' workers spent meanwhile; only Tandem's are known.
    pub workers: ThreadTime,
    /// Where the time went, if that was asked.
    pub profile: Option<Profile>,
}

impl TcpFound {
    /// Gb/s of payload.
    pub fn gbps(&self) -> f64 {
        self.count.bytes as f64 * 8.0 / (self.count.nanos.max(1) as f64)
    }

    /// CPU-seconds of the machine for 10⁹ bytes of payload.
    pub fn cpu_s_per_gb(&self) -> f64 {
        self.spent.busy_s / (self.count.bytes.max(1) as f64 / 1e9)
    }
}

/// One UDP probe's outcome.
#[derive(Clone, Copy, Debug)]
pub struct UdpFound {
    /// What was sent.
    pub sent: UdpSent,
    /// What arrived.
    pub count: UdpCount,
    /// Whether the sender kept its rate, and less than [`LOSS`] was lost.
    pub outcome: Outcome,
}

impl UdpFound {
    /// Packets a second that arrived.
    pub fn rate(&self) -> f64 {
        self.count.received as f64 / (self.sent.nanos.max(1) as f64 / 1e9)
    }

    fn judge(wanted: f64, sent: UdpSent, count: UdpCount) -> UdpFound {
        let lost = sent.packets.saturating_sub(count.received) as f64;
        let mut found = UdpFound { sent, count, outcome: Outcome::Carried };
        let managed = found.rate();
        if sent.packets == 0 || lost >= LOSS * sent.packets as f64 {
            found.outcome = Outcome::Lost;
        } else if managed < KEPT_RATE * wanted {
            found.outcome = Outcome::Slower(managed);
        }
        found
    }
}

/// A child that talks in lines.
struct Talker {
    lines: Receiver<String>,
    stdin: ChildStdin,
    proc: Proc,
}

impl Talker {
    fn start(cmd: &Cmd, log: &Path) -> Result<Talker> {
        let (proc, stdin, stdout) = cmd.converse(log)?;
        let (out, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                if out.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Talker { lines, stdin, proc })
    }

    fn line(&mut self, within: Duration) -> Result<String> {
        self.lines.recv_timeout(within).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::Timeout {
                what: "the generator".into(),
                seconds: within.as_secs_f64(),
                hint: format!(": {}", self.proc.log_tail()),
            },
            RecvTimeoutError::Disconnected => {
                Error::check(format!("the generator ended: {}", self.proc.log_tail()))
            }
        })
    }

    fn expect(&mut self, word: &str, within: Duration) -> Result<()> {
        let line = self.line(within)?;
        let said: String = probe::parse(&line)?;
        ensure(said == word, || format!("the generator said {said}, not {word}"))
    }
}

/// The generator's place in one contender's network.
pub struct Traffic<'a> {
    scene: &'a Scene,
    program: PathBuf,
    dir: PathBuf,
    log: PathBuf,
    udp: Talker,
    echo: Talker,
    runs: u64,
}

impl std::fmt::Debug for Traffic<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Traffic")
    }
}

impl<'a> Traffic<'a> {
    /// Starts the receivers that every cell shares. `program` is `bench-probe`.
    pub fn start(run: &Run, program: &Path, scene: &'a Scene) -> Result<Traffic<'a>> {
        let log = run.dir().join("bench-probe.log");
        let listen = |what: &str, port: u16| -> Result<Talker> {
            let bind = format!("{}:{port}", net::RHOST);
            let cmd = scene.net.rhost.cmd(program).args([what, "--bind", &bind]);
            let mut talker = Talker::start(&cmd, &log)?;
            talker.expect(READY, SLACK)?;
            Ok(talker)
        };
        let (udp, echo) = (listen("udp-sink", UDP_PORT)?, listen("echo", ECHO_PORT)?);
        Ok(Traffic {
            scene,
            program: program.to_owned(),
            dir: run.dir().to_owned(),
            log,
            udp,
            echo,
            runs: 0,
        })
    }

    /// TCP streams.
    pub fn tcp(&self, plan: &TcpPlan<'_>) -> Result<TcpFound> {
        let ends: [(&Ns, &str); 2] =
            [(&self.scene.net.lhost, net::LHOST), (&self.scene.net.rhost, net::RHOST)];
        let ((from, _), (to, address)) = match plan.way {
            Way::Out => (ends[0], ends[1]),
            Way::Back => (ends[1], ends[0]),
        };
        let at = format!("{address}:{TCP_PORT}");
        let streams = plan.streams.to_string();
        let millis = |time: Duration| time.as_millis().to_string();
        let sink = to.cmd(&self.program).args(["tcp-sink", "--bind", &at, "--streams", &streams]);
        let sink = sink.args(["--skip-ms", &millis(plan.warm_up), "--ms", &millis(plan.time)]);
        let mut sink = Talker::start(&sink, &self.log)?;
        sink.expect(READY, SLACK)?;
        let rate = plan.rate.to_string();
        let source = from.cmd(&self.program).args(["tcp-source", "--to", &at]);
        let source = source.args(["--streams", &streams, "--rate", &rate]);
        let source =
            source.args(plan.congestion.map(|name| ["--congestion", name]).iter().flatten());
        let source = source.spawn(&self.log)?;
        sink.expect(BEGIN, plan.warm_up + SLACK)?;
        let recording = plan.profile.then(|| Recording::start(&self.dir, plan.time)).transpose()?;
        let workers = Threads::now(&self.scene.gateways, WORKERS)?;
        let before = Machine::begin()?;
        let line = sink.line(plan.time + SLACK)?;
        let spent = before.until(&Machine::end()?);
        let workers = workers.until(&Threads::now(&self.scene.gateways, WORKERS)?);
        drop((source, sink));
        let count: TcpCount = probe::parse(&line)?;
        ensure(count.bytes > 0, || "no byte arrived".into())?;
        let measured = Duration::from_nanos(count.nanos);
        let profile = recording.map(|it| it.finish(count.bytes, measured)).transpose()?;
        Ok(TcpFound { count, spent, workers, profile })
    }

    /// UDP packets of `size` bytes of payload at `rate` packets a second, from the near client to the far one.
    pub fn udp(&mut self, size: usize, rate: f64, time: Duration) -> Result<UdpFound> {
        self.runs += 1;
        let to = format!("{}:{UDP_PORT}", net::RHOST);
        let line = self
            .scene
            .net
            .lhost
            .cmd(&self.program)
            .args(["udp-source", "--to", &to, "--size", &size.to_string()])
            .args(["--rate", &format!("{rate:.3}"), "--run", &self.runs.to_string()])
            .args(["--ms", &time.as_millis().to_string()])
            .run(time + SLACK)?;
        let sent: UdpSent = probe::parse(line.trim())?;
        std::thread::sleep(DRAIN);
        self.udp.stdin.write_all(b"\n").doing("ask the receiver")?;
        let mut count: UdpCount = probe::parse(&self.udp.line(SLACK)?)?;
        if count.run != self.runs {
            // Not one packet of this run arrived.
            count = UdpCount { run: self.runs, ..UdpCount::default() };
        }
        Ok(UdpFound::judge(rate, sent, count))
    }

    /// Small requests, one after the other, with a pause before each.
    pub fn requests(&mut self, count: u32, pause: Duration) -> Result<RoundTrips> {
        self.echo.proc.check_alive()?;
        let to = format!("{}:{ECHO_PORT}", net::RHOST);
        let longest = (pause + Duration::from_millis(10)) * count + SLACK;
        let line = self
            .scene
            .net
            .lhost
            .cmd(&self.program)
            .args(["ask", "--to", &to, "--count", &count.to_string()])
            .args(["--pause-us", &pause.as_micros().to_string()])
            .run(longest)?;
        let trips: RoundTrips = probe::parse(line.trim())?;
        let lost = f64::from(u32::try_from(trips.lost).unwrap_or(u32::MAX));
        ensure(lost <= 0.02 * f64::from(count), || {
            format!("{} of {count} small requests were not answered", trips.lost)
        })?;
        Ok(trips)
    }
}

/// How the names of Tandem's workers begin.
const WORKERS: &str = "worker-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_carried_when_it_was_sent_and_less_than_a_thousandth_was_lost() {
        let found = |sent: u64, received: u64| {
            let sent = UdpSent { packets: sent, nanos: 2_000_000_000 };
            let count = UdpCount { received, ..UdpCount::default() };
            UdpFound::judge(10_000.0, sent, count)
        };
        assert_eq!(found(20_000, 19_981).outcome, Outcome::Carried);
        assert_eq!(found(20_000, 19_980).outcome, Outcome::Lost);
        assert_eq!(found(18_002, 18_002).outcome, Outcome::Carried);
        assert_eq!(found(17_000, 17_000).outcome, Outcome::Slower(8_500.0));
        assert_eq!(found(17_000, 16_000).outcome, Outcome::Lost);
        assert_eq!(found(0, 0).outcome, Outcome::Lost);
        assert!((found(20_000, 19_000).rate() - 9_500.0).abs() < 1e-6);
    }

    #[test]
    fn rates_and_costs_are_per_payload() {
        let found = TcpFound {
            count: TcpCount { bytes: 500_000_000, nanos: 2_000_000_000 },
            spent: Spent { busy_s: 3.0, ..Spent::default() },
            workers: ThreadTime::default(),
            profile: None,
        };
        assert!((found.gbps() - 2.0).abs() < 1e-9);
        assert!((found.cpu_s_per_gb() - 6.0).abs() < 1e-9);
    }
}

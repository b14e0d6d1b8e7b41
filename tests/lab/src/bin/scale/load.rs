//! The sender and the receiver, as the rounds use them.

use crate::agent::{Order, Silences, Streamed};
use lab::error::IoContext;
use lab::net::Net;
use lab::proc::Proc;
use lab::run::Run;
use lab::{Error, Result};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{ChildStdin, ChildStdout};
use std::time::Duration;

/// One of them.
struct Agent {
    proc: Proc,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Agent {
    fn tell(&mut self, order: &Order) -> Result<()> {
        let line =
            serde_json::to_string(order).map_err(|e| Error::parse("an order", e.to_string()))?;
        writeln!(self.stdin, "{line}").and_then(|()| self.stdin.flush()).doing("talk to an agent")
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).doing("hear from an agent")?;
        if line.is_empty() {
            self.proc.check_alive()?;
        }
        serde_json::from_str(&line).map_err(|e| Error::parse("an agent's answer", e.to_string()))
    }
}

/// Both, the sender behind the pair and the receiver behind the peer.
pub(crate) struct Load {
    sender: Agent,
    receiver: Agent,
    epoch: u32,
}

impl Load {
    pub(crate) fn start(run: &Run, net: &Net) -> Result<Load> {
        let own = std::env::current_exe().doing("find the lab's own program")?;
        let feedback = run.dir().join("feedback.sock");
        let start = |ns: &lab::ns::Ns, what: &str| -> Result<Agent> {
            let log = run.dir().join(format!("{what}.log"));
            let cmd = ns.cmd(&own).arg(what).arg("--feedback").arg(&feedback);
            let (proc, stdin, stdout) = cmd.converse(&log)?;
            Ok(Agent { proc, stdin, stdout: BufReader::new(stdout) })
        };
        Ok(Load {
            sender: start(&net.lhost, "send")?,
            receiver: start(&net.rhost, "receive")?,
            epoch: 0,
        })
    }

    fn epoch(&mut self, flows: usize) -> Result<u32> {
        self.epoch += 1;
        self.receiver.tell(&Order::Epoch { epoch: self.epoch, flows })?;
        self.receiver.answer::<()>()?;
        Ok(self.epoch)
    }

    /// As many packets as the path carries, to these addresses in turn.
    pub(crate) fn stream(&mut self, to: &[Ipv4Addr], time: Duration) -> Result<Streamed> {
        let epoch = self.epoch(to.len())?;
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.sender.tell(&Order::Stream { epoch, to: to.to_vec(), millis })?;
        self.sender.answer()
    }

    /// A packet each 20 ms to every `every`th of these addresses, one a second to the others, from now on.
    pub(crate) fn pace(&mut self, to: &[Ipv4Addr], every: usize) -> Result<()> {
        let epoch = self.epoch(to.len())?;
        self.sender.tell(&Order::Pace {
            epoch,
            to: to.to_vec(),
            every,
            fast_ms: FAST_MS,
            slow_ms: SLOW_MS,
        })
    }

    /// Silences count from now on.
    pub(crate) fn mark(&mut self) -> Result<()> {
        self.receiver.tell(&Order::Mark)?;
        self.receiver.answer()
    }

    /// Those since the mark.
    pub(crate) fn silences(&mut self) -> Result<Silences> {
        self.receiver.tell(&Order::Silences)?;
        self.receiver.answer()
    }

    /// Ends a pace.
    pub(crate) fn rest(&mut self) -> Result<()> {
        self.sender.tell(&Order::Rest)?;
        self.sender.answer()
    }
}

/// Between two packets of a flow that is looked at closely.
pub(crate) const FAST_MS: u64 = 20;
/// Between two packets of the others.
pub(crate) const SLOW_MS: u64 = 1000;

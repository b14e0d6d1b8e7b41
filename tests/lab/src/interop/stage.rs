//! What scenarios share: one instance with a strongSwan peer, or with a pair in its place.

use super::Lab;
use crate::baseline::peer_conn;
use crate::charon::{Charon, Conn};
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::net::{self, Net};
use crate::probe::{Measure, UdpProbes, Way};
use crate::run::Run;
use crate::scene::PATIENCE;
use crate::tandem::{Config, Daemon, PSK};
use crate::wait;
use std::time::Duration;

pub(super) const TICK: Duration = Duration::from_millis(20);

/// One instance, `left`, and a strongSwan.
pub(super) struct Single {
    pub(super) net: Net,
    pub(super) daemon: Daemon,
    pub(super) peer: Charon,
}

/// The peer's usual connection.
pub(super) fn conn() -> Conn {
    peer_conn(PSK)
}

/// Starts one instance and a strongSwan with these configurations; nobody has said a word yet, unless told to.
pub(super) fn single(lab: &Lab<'_>, config: &Config, conns: &[Conn]) -> Result<Single> {
    single_with(lab, config, conns, "", &[])
}

/// Like [`single`], with settings of the `charon` section and arguments of the daemon.
pub(super) fn single_with(
    lab: &Lab<'_>,
    config: &Config,
    conns: &[Conn],
    charon: &str,
    args: &[&str],
) -> Result<Single> {
    let net = Net::build(lab.run)?;
    let peer = Charon::start_with(lab.run, &net.peer, crate::charon::Backend::Libipsec, charon)?;
    peer.load(conns)?;
    let mut daemon = Daemon::prepare(lab.run, lab.bins, &net.left, "left", config)?.with_args(args);
    daemon.start()?;
    wait::until("the instance to own its endpoint", PATIENCE, TICK, || {
        daemon.proc()?.check_alive()?;
        Ok((daemon.status()?.main().role == "owner").then_some(()))
    })?;
    Ok(Single { net, daemon, peer })
}

impl Single {
    /// strongSwan initiates; both sides say it is up.
    pub(super) fn peer_up(&self) -> Result<()> {
        self.peer.initiate("net", PATIENCE).map_err(|error| self.with_log(error))?;
        self.both_up()
    }

    /// Waits until both sides say it is up.
    pub(super) fn both_up(&self) -> Result<()> {
        self.peer.wait_established(1, PATIENCE).map_err(|error| self.with_log(error))?;
        wait::until("the instance to show the tunnel", PATIENCE, TICK, || {
            Ok(self.daemon.status()?.is_up("branch", 1).then_some(()))
        })
        .map_err(|error| self.with_log(error))
    }

    /// Pings from both hosts to the other.
    pub(super) fn ping_both(&self) -> Result<()> {
        self.net.lhost.ping_until(net::RHOST, PATIENCE).map_err(|error| self.with_log(error))?;
        self.net.rhost.ping_until(net::LHOST, PATIENCE).map_err(|error| self.with_log(error))
    }

    /// The daemon's last words beside an error.
    pub(super) fn with_log(&self, error: Error) -> Error {
        Error::check(format!("{error}; daemon: {}", crate::proc::last_lines(&self.daemon.log(), 4)))
    }

    pub(super) fn probes(&self, run: &Run) -> Result<UdpProbes> {
        let probes = UdpProbes::start(
            run,
            (&self.net.lhost, net::LHOST),
            (&self.net.rhost, net::RHOST),
            1000,
        )?;
        probes.wait_flowing(PATIENCE)?;
        Ok(probes)
    }

    /// No ERROR in the log, still alive.
    pub(super) fn check_clean(&mut self) -> Result<()> {
        self.daemon.proc()?.check_alive()?;
        let errors = self.daemon.log_errors();
        ensure(errors.is_empty(), || format!("the daemon logged: {}", errors.join(" / ")))
    }
}

/// Does something under probes and returns (sent, lost, worst gap); the caller judges.
pub(super) fn under_traffic(
    probes: &UdpProbes,
    action: impl FnOnce() -> Result<()>,
) -> Result<(u64, u64, Duration)> {
    let from = clock::now();
    action()?;
    let to = clock::now() + Duration::from_millis(500);
    probes.settle(to)?;
    let both: Vec<Measure> = Way::BOTH.iter().map(|way| probes.measure(*way, from, to)).collect();
    let sum = |value: fn(&Measure) -> u64| both.iter().map(value).sum();
    let gap = both.iter().map(|measure| measure.gap).max().unwrap_or_default();
    Ok((sum(|measure| measure.sent), sum(Measure::lost), gap))
}

/// Like [`under_traffic`], and fails if a packet was lost.
pub(super) fn without_loss(
    probes: &UdpProbes,
    action: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let from = clock::now();
    let (sent, lost, gap) = under_traffic(probes, action)?;
    let to = clock::now().saturating_sub(Duration::from_millis(500));
    ensure(lost == 0, || {
        let places = probes.tell_losses(from, to);
        format!(
            "{lost} of {sent} packets lost ({places}), longest gap {:.1} ms",
            clock::millis(gap)
        )
    })?;
    Ok(format!("0 of {sent} lost, longest gap {:.1} ms", clock::millis(gap)))
}

/// The part of a log that is new.
pub(super) trait HasLog {
    /// What was logged after the first `skip` bytes.
    fn new_log(&self, skip: usize) -> String;
}

impl HasLog for Daemon {
    fn new_log(&self, skip: usize) -> String {
        self.log().get(skip..).unwrap_or_default().to_owned()
    }
}

/// Waits until the daemon's log, after `skip` bytes, has a line with all of `words` (case ignored).
pub(super) fn wait_log(daemon: &Daemon, skip: usize, words: &[&str]) -> Result<String> {
    let found = wait::until(&format!("{words:?} in the daemon's log"), PATIENCE, TICK, || {
        let log = daemon.log();
        let new = log.get(skip..).unwrap_or_default();
        Ok(new
            .lines()
            .find(|line| {
                let line = line.to_lowercase();
                words.iter().all(|word| line.contains(&word.to_lowercase()))
            })
            .map(str::to_owned))
    });
    found.map_err(|error| {
        Error::check(format!("{error}; last: {}", crate::proc::last_lines(&daemon.log(), 3)))
    })
}

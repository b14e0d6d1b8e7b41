//! Who stands in the remote gateway's place and brings all tunnels up.

use crate::config;
use lab::charon::{Backend, Charon};
use lab::net::Net;
use lab::run::Run;
use lab::tandem::{Bins, Daemon};
use lab::{Error, Result};
use std::time::Duration;

/// Who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tandem,
    Strongswan,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Tandem => "Tandem",
            Kind::Strongswan => "strongSwan",
        }
    }
}

/// It, running.
pub(crate) enum Peer {
    Tandem(Daemon),
    Strongswan(Charon),
}

impl Peer {
    /// Opens it; it initiates nothing before [`Peer::begin`].
    pub(crate) fn prepare(
        run: &Run,
        bins: &Bins,
        net: &Net,
        kind: Kind,
        tunnels: u32,
    ) -> Result<Peer> {
        match kind {
            Kind::Tandem => {
                net.virtual_peer()?;
                let config = config::peer(tunnels);
                Ok(Peer::Tandem(Daemon::prepare(run, bins, &net.peer, "peer", &config)?))
            }
            Kind::Strongswan => {
                // It wants an address of its own in what it protects, for the route to the other side.
                let own = (0..tunnels).map(|tunnel| {
                    format!("addr add {}/32 dev eth1\n", config::gateway(tunnels, tunnel))
                });
                net.peer.ip(&own.collect::<String>())?;
                // Its default log of a few hundred negotiations is a load of its own, and so are its own limits.
                let extra = "threads = 32\n  init_limit_half_open = 0\n  cookie_threshold = 0\n  block_threshold = 0";
                let charon = Charon::start_with(run, &net.peer, Backend::Libipsec, extra)?;
                charon.load(&config::strongswan(tunnels))?;
                Ok(Peer::Strongswan(charon))
            }
        }
    }

    /// Starts it, or has it bring all tunnels up.
    pub(crate) fn begin(&mut self, tunnels: u32) -> Result<()> {
        match self {
            Peer::Tandem(daemon) => daemon.spawn(),
            Peer::Strongswan(charon) => {
                for tunnel in 0..tunnels {
                    charon.initiate(&config::child_name(tunnel), Duration::from_secs(20))?;
                }
                Ok(())
            }
        }
    }

    /// Whether all its tunnels stand, by its own word.
    pub(crate) fn is_up(&self, tunnels: u32) -> Result<bool> {
        match self {
            Peer::Tandem(daemon) => {
                Ok(crate::rounds::summary(daemon)?.tunnel_counts.children >= u64::from(tunnels))
            }
            Peer::Strongswan(charon) => Ok(charon.spis()?.0.len() >= tunnels as usize),
        }
    }

    /// Lines of its log at level ERROR.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Peer::Tandem(daemon) => clean(daemon),
            Peer::Strongswan(_) => Ok(()),
        }
    }
}

/// Fails if a daemon logged an ERROR.
pub(crate) fn clean(daemon: &Daemon) -> Result<()> {
    match daemon.log_errors().as_slice() {
        [] => Ok(()),
        errors => Err(Error::check(format!("{} logged: {}", daemon.name, errors.join(" / ")))),
    }
}

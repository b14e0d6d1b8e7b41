//! What the running daemon keeps protected: all connections but those that were purged.
//!
//! Connections share rules, so purging one means: the rules of all others, and then the difference. Changes are made one
//! after the other, in the order in which they were asked for.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use gateway::config::Config;
use netio::route::Netlink;
use tokio::sync::Mutex;

use super::{Networks, Protection};

/// Cheap to clone; all clones keep one set of rules.
#[derive(Debug, Clone)]
pub struct Keeper {
    netlink: Netlink,
    tun: u32,
    networks: Arc<Networks>,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    purged: BTreeSet<String>,
    /// What is there.
    there: Protection,
    /// The same, and what may be there since a change failed half-way.
    perhaps: Protection,
}

impl Keeper {
    /// Sets the rules and routes of the whole configuration.
    pub async fn start(netlink: Netlink, tun: u32, config: &Config) -> io::Result<Self> {
        let networks = Arc::new(Networks::of(config));
        let protection = networks.protection(&BTreeSet::new());
        protection.set(&netlink).await?;
        netlink.anchor(tun).await?;
        protection.lead_into(&netlink, tun).await?;
        let kept = Kept { perhaps: protection.clone(), there: protection, ..Kept::default() };
        let kept = Arc::new(Mutex::new(kept));
        Ok(Self { netlink, tun, networks, kept })
    }

    /// Takes away what a connection has to itself (`on` = false), or brings it back. What does not change stays
    /// untouched. A change that failed half-way is made good by the next one.
    pub async fn keep(&self, connection: &str, on: bool) -> io::Result<()> {
        let mut kept = self.kept.lock().await;
        let changed = match on {
            true => kept.purged.remove(connection),
            false => kept.purged.insert(connection.to_owned()),
        };
        if !changed && kept.there == kept.perhaps {
            return Ok(());
        }
        let (networks, purged) = (Arc::clone(&self.networks), kept.purged.clone());
        // Of ten thousand connections that takes a while.
        let wanted = tokio::task::spawn_blocking(move || networks.protection(&purged)).await?;
        let outcome = wanted.replace(&kept.there, &kept.perhaps, &self.netlink, self.tun).await;
        if outcome.is_ok() {
            kept.perhaps = wanted.clone();
            kept.there = wanted;
        } else {
            kept.there = Protection::default();
            kept.perhaps.extend(wanted);
        }
        outcome
    }
}

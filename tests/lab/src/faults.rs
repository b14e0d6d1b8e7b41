//! Faults that are not signals: cuts, losses, flushed caches, saturated cores. Each is undone when its handle
//! is dropped.

use crate::error::Result;
use crate::ns::{BRIEF, Ns};
use crate::proc::{Cmd, Proc};
use crate::run::Run;

/// An nft table that drops what arrives at an interface.
#[derive(Debug)]
pub struct Impairment {
    ns: Ns,
    table: String,
}

impl Impairment {
    fn add(ns: &Ns, interface: &str, rule: &str) -> Result<Impairment> {
        Self::several(ns, &[(interface, rule)])
    }

    /// Several rules, each for what arrives at an interface, all at the same moment.
    pub fn several(ns: &Ns, rules: &[(&str, &str)]) -> Result<Impairment> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let table = format!("lab{number}");
        let mut text = format!("table netdev {table} {{\n");
        for (at, (interface, rule)) in rules.iter().enumerate() {
            text += &format!(
                " chain in{at} {{\n  type filter hook ingress device \"{interface}\" priority {at};\n  {rule}\n }}\n"
            );
        }
        ns.nft(&format!("{text}}}\n"))?;
        Ok(Impairment { ns: ns.clone(), table })
    }

    /// A one-way cut: nothing that arrives at `interface` of `ns` is seen any more; what it sends goes out.
    pub fn cut(ns: &Ns, interface: &str) -> Result<Impairment> {
        Self::add(ns, interface, "drop")
    }

    /// Drops `per_mille` of what arrives at `interface`, at random.
    pub fn loss(ns: &Ns, interface: &str, per_mille: u32) -> Result<Impairment> {
        Self::add(ns, interface, &format!("numgen random mod 1000 < {per_mille} drop"))
    }

    /// Drops what arrives at `interface` and matches an nft expression.
    pub fn matching(ns: &Ns, interface: &str, expression: &str) -> Result<Impairment> {
        Self::add(ns, interface, &format!("{expression} drop"))
    }
}

impl Drop for Impairment {
    fn drop(&mut self) {
        let _ = self.ns.nft(&format!("delete table netdev {}\n", self.table));
    }
}

/// Takes a link down: both ends lose carrier.
pub fn link_down(ns: &Ns, interface: &str) -> Result<()> {
    ns.ip(&format!("link set {interface} down\n"))
}

/// Takes it up again. Addresses stayed; routes through it may have gone.
pub fn link_up(ns: &Ns, interface: &str) -> Result<()> {
    ns.ip(&format!("link set {interface} up\n"))
}

/// Empties the neighbour caches (ARP and ND) of these namespaces, so that everyone asks again.
pub fn flush_neighbours(list: &[&Ns]) -> Result<()> {
    for ns in list {
        // It complains when there is nothing to flush.
        let _ =
            Cmd::new("ip").args(["-n", ns.name(), "-s", "neigh", "flush", "all"]).finish(BRIEF)?;
    }
    Ok(())
}

/// Keeps every core busy at normal priority until dropped.
#[derive(Debug)]
pub struct Saturation {
    /// The processes that burn.
    pub burners: Vec<Proc>,
}

impl Saturation {
    /// Starts one burning process per core and one more.
    pub fn start(run: &Run) -> Result<Saturation> {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let log = run.dir().join("burn.log");
        let mut burners = Vec::new();
        for _ in 0..=cores {
            burners.push(Cmd::new(crate::probe::program()?).arg("burn").spawn(&log)?);
        }
        Ok(Saturation { burners })
    }
}

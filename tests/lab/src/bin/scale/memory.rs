//! What a process holds in memory.

use lab::{Error, Result};
use serde::Serialize;

/// Of one process, bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Memory {
    /// Resident, what it shares with others included.
    pub(crate) rss: u64,
    /// Resident, its share of what is shared.
    pub(crate) pss: u64,
    /// Resident and its own: heap and stacks.
    pub(crate) anonymous: u64,
}

impl Memory {
    /// Of a process now.
    pub(crate) fn of(pid: u32) -> Result<Memory> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::parse(path.as_str(), error.to_string()))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes =
                line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            kilobytes
                .map(|n| n * 1024)
                .ok_or_else(|| Error::parse(path.as_str(), format!("no {name}")))
        };
        Ok(Memory { rss: field("Rss:")?, pss: field("Pss:")?, anonymous: field("Anonymous:")? })
    }

    /// How much more than `before`.
    pub(crate) fn since(self, before: Memory) -> Memory {
        Memory {
            rss: self.rss.saturating_sub(before.rss),
            pss: self.pss.saturating_sub(before.pss),
            anonymous: self.anonymous.saturating_sub(before.anonymous),
        }
    }

    /// KiB resident for each of so many.
    pub(crate) fn kib_each(self, count: u32) -> f64 {
        self.rss as f64 / 1024.0 / f64::from(count.max(1))
    }
}

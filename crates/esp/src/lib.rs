//! ESP in tunnel mode (RFC 4303) without I/O: [`Shard`] is one worker's whole
//! logic. It never reads a clock, opens a socket, draws randomness or
//! allocates per packet; time and fences are arguments.
//!
//! ```text
//! worker loop:
//!   for each command:  shard.apply(command)
//!   while shard.flush(now, fences, batch) > 0: write(batch)
//!   read the TUN into a batch;    shard.outbound(now, fences, batch);  write(batch)
//!   read the socket into a batch; shard.inbound(now, fences, batch);   write(batch)
//!   for each batch of another worker: shard.handed(now, fences, batch); write(batch)
//!   while let Some(report) = shard.poll_report(now): send it to control
//!   sleep until a descriptor is ready, a command comes, or shard.next_wakeup()
//!
//! write(batch), by slot.verdict():
//!   Send    → the endpoint's socket      Deliver → the TUN
//!   Steer   → the pair link              Held, Drop → nothing
//!   Hand    → another worker
//! ```
//!
//! | module | what |
//! | --- | --- |
//! | [`batch`] | buffers, allocated once; verdicts |
//! | [`command`], [`report`] | the two queues between control and worker |
//! | [`crew`] | several workers as one, for control |
//! | [`shard`] | composition: what happens to a packet, in order; `hand`: with several workers |
//! | `sa` | sequence numbers, IVs, leases and terms of one SA; seal and open |
//! | [`replay`] | the inbound window (RFC 6479) |
//! | `policy` | which SA an outbound packet belongs to |
//! | [`pin`] | which of several tunnels a flow takes |
//! | `foreign` | the SAs of other workers |
//! | `endpoint` | owner, held, steering, idle |
//! | `table`, `index` | SAs by SPI; policies by addresses |
//! | `queue`, `ecn`, `bytes` | held packets; RFC 6040; fields of headers |
//! | [`reason`] | why packets are dropped, and counters |
//! | [`segment`] | splitting what the TUN gives in one piece |
//! | [`coalesce`] | merging TCP segments that came out, before they are written |

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod batch;
mod bug;
mod bytes;
pub mod coalesce;
pub mod command;
pub mod crew;
mod ecn;
mod endpoint;
mod foreign;
mod index;
pub mod pin;
mod policy;
mod queue;
pub mod reason;
pub mod replay;
pub mod report;
mod sa;
pub mod segment;
pub mod shard;
mod table;

pub use batch::{Batch, Direction, HEADROOM, SLOT_LEN, Slot, Steered, TAILROOM, Verdict, slot_len};
#[cfg(feature = "bugs")]
pub use bug::Bug;
pub use command::{
    Command, CommandError, Counters, INITIAL_CEILING, LEASE_MIN, Policy, Sa, ceiling_for,
};
pub use crew::Crew;
pub use reason::{Reason, Stats};
pub use replay::Window;
pub use report::{Expiry, Flow, Report, SaStats, Snapshot, Tops};
pub use shard::{Config, Shard};

#[cfg(test)]
mod tests {
    /// A shard is made by the control thread and moved to its worker; commands
    /// and reports cross between the two.
    #[test]
    fn what_crosses_threads_can() {
        fn can_cross<T: Send + 'static>() {}
        can_cross::<crate::Shard>();
        can_cross::<crate::Command>();
        can_cross::<crate::Report>();
        can_cross::<crate::Batch>();
    }
}

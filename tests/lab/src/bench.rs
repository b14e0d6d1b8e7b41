//! The benchmark: Tandem's data plane beside what users would pick instead, on one network, in one run.
//!
//! ```text
//!   lhost ──── left ───────── peer ──── rhost        client – gateway – gateway – client
//!     └─────── right ──────────┘                     the near gateway's standby, idle but for heartbeats
//! ```
//! * [`net`]: that network; [`contender`]: who can stand in the gateways' places; [`uapi`]: WireGuard's way to be told.
//! * [`probe`]: what the generator (`bench-probe`) and the benchmark say to each other; [`traffic`]: cells.
//! * [`cpu`], [`aead`]: what a cell cost, and what its cryptography alone would have.
//! * [`profile`]: where the time went.
//! * [`search`], [`ratios`]: pure arithmetic over it. [`report`]: table and chart.

pub mod aead;
pub mod contender;
pub mod cpu;
pub mod net;
pub mod probe;
pub mod profile;
pub mod ratios;
pub mod report;
pub mod search;
pub mod traffic;
pub mod uapi;

//! Merging what came out of a tunnel: consecutive TCP segments, or UDP datagrams of one length, of one flow become one
//! large packet, which the rest of the host then carries once instead of many times. The kernel, or a network card,
//! splits it again where it leaves, into the very packets it was made of.
//!
//! Nothing is merged that the receiver would see differently:
//!
//! | must agree | TCP | UDP |
//! | --- | --- | --- |
//! | IP header | all but length, IPv4 identification and checksum | the same |
//! | transport header | all but sequence number, PSH and checksum | ports |
//! | payload | as long as the first's, the last perhaps shorter | the same |
//! | order | sequence numbers follow each other; PSH ends it | as they came |
//!
//! The identification means nothing in a packet that may not be fragmented (RFC 6864 §4.1), so others are not merged.
//! Every checksum must be there and right. Segments with other flags, IPv4 options, IPv6 extension headers, or without
//! payload pass as they are.
//!
//! ```text
//!   first:   | IP | TCP seq=S    | payload 1 |         `Run::head` and the payload
//!   second:  | IP | TCP seq=S+n  |   payload 2 |       its payload alone: packet[run.header_len()..]
//!   last:    | IP | TCP seq=S+2n |   payload 3 | PSH
//! ```
//! | room | what |
//! | --- | --- |
//! | `plan` | a batch in which flows are mixed: who goes with whom, and in which order |
//! | `run` | packets of one flow that follow each other |
//! | `tcp`, `udp`, `ip` | what may be merged, header by header |
//!
//! Pure functions over borrowed bytes: no I/O, no copy but of headers, no allocation but a [`Plan`]'s first.

mod ip;
mod plan;
mod run;
mod tcp;
mod udp;

pub use plan::{FLOWS, Plan, Planned};
pub use run::{Head, MOST_HEADER, Merge, Run};

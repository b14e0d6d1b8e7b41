//! The lab: network namespaces with real peers, probes that count packets, captures that are checked
//! byte by byte, and faults. It proves Tandem from outside and knows nothing of its crates: it sees
//! binaries, a config file, a control socket and packets.
//!
//! * [`run`]: one run of the lab; its processes and namespaces end with it, however it ends.
//! * [`ns`], [`proc`]: namespaces, links, addresses; processes inside them.
//! * [`net`]: the virtual network that every scenario uses.
//! * [`host`]: a whole host in a namespace, systemd and all; [`guide`]: the README's commands, to be typed there.
//! * [`charon`], [`uml`]: strongSwan, on its own ESP or on a real kernel's.
//! * [`tandem`]: instances of the daemon under test.
//! * [`probe`]: numbered UDP packets, TCP streams; gaps, losses.
//! * [`capture`], [`pcap`], [`check`]: tcpdump, and what must never be seen in its files.
//! * [`faults`]: SIGSTOP, cuts, losses, saturated cores.
//! * [`stall`]: whether the machine itself stood still.
//! * [`scene`]: a pair that serves a peer, ready to be hurt; [`trial`]: one fault, measured.
//! * [`active`]: the same for two endpoints; [`two_pairs`]: for two pairs that face each other.
//! * [`mod@bench`]: the data plane beside what users would pick instead.
//! * [`report`]: the demo's page. [`interop`]: the named real-peer scenarios.

pub mod active;
pub mod baseline;
pub mod bench;
pub mod capture;
pub mod charon;
pub mod check;
pub mod clock;
pub mod error;
pub mod faults;
pub mod guide;
pub mod host;
pub mod interop;
pub mod net;
pub mod ns;
pub mod pcap;
pub mod probe;
pub mod proc;
pub mod report;
pub mod run;
pub mod scene;
pub mod stall;
pub mod stats;
pub mod tandem;
pub mod trial;
pub mod two_pairs;
pub mod uml;
pub mod wait;

pub use error::{Error, Result};

//! The binaries: `tandemd`, the daemon, and `tandem`, the command that talks to it.
//!
//! Everything that decides is in the sans-IO crates below; here are the clock, the sockets, the threads, the files.
//!
//! | module | what |
//! | --- | --- |
//! | [`daemon`] | `tandemd`: set-up, control loop, address tasks |
//! | [`worker`] | the packet thread: TUN and port 4500 around one `esp::Shard` |
//! | [`link`] | the pair link: Noise stream, heartbeats, steering, probes |
//! | [`routing`] | routes and rules, and which of them outlive the process |
//! | [`config_file`], [`control_socket`], [`cli`] | what operators touch |
//! | [`terms`], [`hook`] | the term file, the notify hook |

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod cli;
pub mod config_file;
pub mod control_socket;
pub mod daemon;
pub mod hook;
pub mod link;
pub mod routing;
pub mod terms;
pub mod worker;

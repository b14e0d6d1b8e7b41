//! What the kernel does for Tandem: TUN, UDP, raw and packet sockets, addresses, routes and rules,
//! ARP and neighbour discovery, the clock, wake-ups, priorities and privileges.
//!
//! This is the only crate with `unsafe`; every block says why it is sound. It holds no policy:
//! who may send, own or answer is decided by its callers and passed in (a predicate, a deadline).
//! Parsers of what arrives from a network are total: junk gives `None`, never a panic.
//!
//! Where things are: [`clock`] time and timers · [`tun`] the interface that carries inner packets
//! and virtual addresses · [`udp`] batched datagrams · [`esp`] protocol 50 likewise · [`arp`] who
//! answers for a virtual address · [`route`] netlink · [`wake`] epoll, eventfd and the command
//! queue · [`host`] what on the host would break us · [`idle`] how deep it sleeps · [`sched`]
//! priority and privileges · [`memory`] what is free again · [`netns`] namespaces for tests and
//! labs.
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod arp;
pub mod clock;
pub mod descriptor;
pub mod esp;
pub mod host;
pub mod idle;
pub mod memory;
pub mod netns;
pub mod route;
pub mod sched;
pub mod tun;
pub mod udp;
pub mod wake;

mod filter;
mod sys;

pub use route::Prefix;

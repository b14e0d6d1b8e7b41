//! Codecs: bytes to checked values and back, for everything Tandem meets on a network.
//!
//! | module | what | source |
//! | --- | --- | --- |
//! | [`id`] | newtypes for numbers on the wire, the layout of our ESP SPIs | |
//! | [`ike`] | IKEv2 header, payload chain, message builders, framing of encrypted payloads | RFC 7296 §3, RFC 5282 |
//! | [`ts`] | traffic selectors and address arithmetic | RFC 7296 §3.13, RFC 4301 §4.4.1 |
//! | [`esp`] | ESP header and trailer | RFC 4303 §2 |
//! | [`ip`] | views of inner and outer IPv4, IPv6, TCP, UDP and ICMP packets, 5-tuples, checksums | RFC 791, RFC 8200 |
//! | [`natt`] | what a datagram on port 4500 carries | RFC 3948 |
//!
//! Every parser is total: any byte string gives a value or an error, never a panic, in time and memory
//! bounded by its length and by named caps (security.md, statements 1, 3 and 12). Nothing here does I/O.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod esp;
pub mod id;
pub mod ike;
pub mod ip;
pub mod natt;
mod read;
pub mod ts;
pub mod vnet;

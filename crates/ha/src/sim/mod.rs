//! Seeded simulation of a pair: two real [`crate::Pair`]s, a modelled gateway behind each, a
//! modelled network, disk and clock. Every step checks the invariants; a failure prints the seed.
//!
//! `world` is the machinery, `gateway` the modelled gateway with its checks, `drawn` and `absence`
//! the scenes drawn one by one, `random` the seeds and the deliberate bugs that they must catch.

mod absence;
mod drawn;
mod gateway;
mod random;
mod world;

//! Proof of purity: what architecture.md says about crates, checked on the sources themselves.
//!
//! The rules are in [`rules`], the reading of Rust source without comments, strings and test code in
//! [`source`]. Each check returns the list of what breaks it, so that `tests/` can run it on this workspace
//! and also on planted offenders: a check that cannot fail proves nothing.

pub mod rules;
pub mod source;

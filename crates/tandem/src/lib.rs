//! tandem (being written).

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod cli;
pub mod config_file;
pub mod control_socket;

//! Drawn scenarios.

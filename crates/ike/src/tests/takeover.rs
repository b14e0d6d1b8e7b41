//! (takeover)

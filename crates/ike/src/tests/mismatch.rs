//! (mismatch)

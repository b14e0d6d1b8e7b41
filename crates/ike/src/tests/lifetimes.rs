//! (lifetimes)

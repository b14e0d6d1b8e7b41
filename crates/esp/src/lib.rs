//! esp (being written).

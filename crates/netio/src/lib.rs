//! netio (being written).

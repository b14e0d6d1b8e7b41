//! ha (being written).

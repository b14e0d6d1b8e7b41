//! ike (being written).

//! purity (being written).

//! The vectors of tests/data, and a tiny seeded generator. Each test file uses a part.
#![allow(dead_code, reason = "shared by several test binaries")]

pub(crate) mod checks;

const VECTORS: &str = include_str!("../data/vectors.txt");

/// All vectors: name and bytes.
pub(crate) fn vectors() -> Vec<(&'static str, Vec<u8>)> {
    VECTORS
        .lines()
        .map(|line| {
            let (name, hex) = line.split_once(' ').expect("name and hex");
            (name, unhex(hex))
        })
        .collect()
}

/// The vector with this name.
pub(crate) fn vector(name: &str) -> Vec<u8> {
    vectors().into_iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes).expect("a known name")
}

pub(crate) fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex"))
        .collect()
}

/// SplitMix64: enough to spread mutations, and the same everywhere.
pub(crate) struct Seeded(pub(crate) u64);

impl Seeded {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `bound` − 1; 0 for a bound of 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

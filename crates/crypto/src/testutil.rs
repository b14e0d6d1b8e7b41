//! Helpers of this crate's unit tests.

/// Bytes of a hex string; white space is skipped, so that the RFCs' lines can
/// be pasted.
pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|c| (c as char).to_digit(16)).map(|d| d as u8).collect();
    assert_eq!(digits.len() % 2, 0, "odd number of hex digits");
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Randomness for tests: another stream at each call, the same in each run of
/// one test alone.
pub(crate) fn rng() -> rand_chacha::ChaCha20Rng {
    use core::sync::atomic::{AtomicU64, Ordering};
    static SEED: AtomicU64 = AtomicU64::new(0);
    rand_core::SeedableRng::seed_from_u64(SEED.fetch_add(1, Ordering::Relaxed))
}

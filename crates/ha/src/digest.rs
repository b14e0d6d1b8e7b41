//! The incremental digest of an endpoint's state, and the hash of an endpoint's name.
//!
//! The digest is the wrapping sum of one 64-bit hash per key and value, so a put or a delete
//! updates it in constant time and the order of keys does not matter. It finds errors, not
//! attackers: both sides are authenticated by the link.
//!
//! The hash is SipHash-2-4 (Aumasson, Bernstein: "SipHash: a fast short-input PRF", 2012), because
//! the standard library promises no stable hash across compiler versions, and two instances may be
//! different builds.

/// SipHash-2-4 of `data` under the key (`k0`, `k1`).
pub(crate) fn siphash(k0: u64, k1: u64, data: &[u8]) -> u64 {
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let (words, rest) = data.as_chunks::<8>();
    for word in words {
        let m = u64::from_le_bytes(*word);
        v[3] ^= m;
        round(&mut v);
        round(&mut v);
        v[0] ^= m;
    }
    let mut m = (data.len() as u64) << 56;
    for (n, byte) in rest.iter().enumerate() {
        m |= u64::from(*byte) << (8 * n);
    }
    v[3] ^= m;
    round(&mut v);
    round(&mut v);
    v[0] ^= m;
    v[2] ^= 0xff;
    for _ in 0..4 {
        round(&mut v);
    }
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[2] = v[2].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[1]);
    v[0] = v[0].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].rotate_left(32);
}

/// The number by which heartbeats name an endpoint.
pub(crate) fn name_id(name: &str) -> u64 {
    siphash(0x7461_6e64_656d, 0x656e_6470_6f69_6e74, name.as_bytes())
}

/// The share of one key and its value in the digest.
pub(crate) fn entry_hash(key: u64, value: &[u8]) -> u64 {
    siphash(key, 0x7265_636f_7264, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference implementation's vectors (veorq/SipHash, vectors.h): key 00..0f, input 00, 01, …
    #[test]
    fn known_answers() {
        let k0 = 0x0706_0504_0302_0100;
        let k1 = 0x0f0e_0d0c_0b0a_0908;
        let input: Vec<u8> = (0..15).collect();
        assert_eq!(siphash(k0, k1, &input), 0xa129_ca61_49be_45e5);
        assert_eq!(siphash(k0, k1, &[]), 0x726f_db47_dd0e_0e31);
        assert_eq!(siphash(k0, k1, &input[..8]), 0x93f5_f579_9a93_2462);
    }
}

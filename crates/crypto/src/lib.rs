//! The only crate that names a cryptographic library for IKE and ESP.
//!
//! | module | what | library |
//! | --- | --- | --- |
//! | [`aead`] | AES-GCM-16 and ChaCha20-Poly1305 in place, and the IV scheme of both | aws-lc-rs |
//! | [`prf`] | HMAC-SHA2 as PRF, and prf+ (RFC 7296 §2.13) | ring |
//! | [`dh`] | X25519, P-256, P-384, with secrets that can be replicated | x25519-dalek, p256, p384 |
//! | [`hash`] | SHA-1 (NAT detection only), SHA-256 | ring |
//! | [`Secret`] | bytes that are wiped on drop and never printed | zeroize |
//!
//! It never reads a clock and never draws randomness by itself: whoever needs
//! randomness passes an [`Rng`].

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod aead;
pub mod dh;
mod error;
pub mod hash;
pub mod prf;
mod secret;
#[cfg(test)]
mod testutil;

pub use error::Error;
pub use rand_core;
pub use secret::Secret;

use rand_core::{CryptoRng, RngCore};

/// A source of cryptographic randomness, usable as `&mut dyn Rng`.
///
/// Implemented for everything that is `RngCore + CryptoRng` of rand_core 0.6.
pub trait Rng: RngCore + CryptoRng {}

impl<T: RngCore + CryptoRng + ?Sized> Rng for T {}

/// Compares two byte strings in a time that depends on their lengths alone.
///
/// Strings of different lengths are unequal.
#[must_use]
pub fn ct_eq(a: &[u8], b: &[u8]) -> bool {
    use subtle::ConstantTimeEq;
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_time_equality_is_equality() {
        assert!(ct_eq(b"", b""));
        assert!(ct_eq(b"abc", b"abc"));
        assert!(!ct_eq(b"abc", b"abd"));
        assert!(!ct_eq(b"abc", b"ab"));
    }

    #[test]
    fn rng_is_object_safe() {
        fn draw(rng: &mut dyn Rng) -> u64 {
            rng.next_u64()
        }
        let mut rng = testutil::rng();
        // Two equal draws of 64 bits happen once in 2^64 runs.
        assert_ne!(draw(&mut rng), draw(&mut rng));
    }
}

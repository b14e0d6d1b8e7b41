//! Bytes that must not leak: wiped on drop, never printed, never cloned by
//! accident.

use core::fmt;

use zeroize::Zeroizing;

use crate::Rng;

/// Secret bytes.
///
/// They are wiped when dropped, print as `…`, do not implement `Clone` (see
/// [`Secret::duplicate`]) and compare only in constant time
/// ([`Secret::ct_eq`]).
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes ownership of `bytes`, which are wiped on drop.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Copies `bytes`; wiping the original is the caller's business.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec())
    }

    /// Draws `len` bytes from `rng`.
    pub fn random(len: usize, rng: &mut dyn Rng) -> Self {
        let mut bytes = Zeroizing::new(vec![0; len]);
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// Joins the parts into one secret.
    #[must_use]
    pub fn concat(parts: &[&[u8]]) -> Self {
        // Reserved at once: growing would leave unwiped copies behind.
        let mut bytes = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
        for part in parts {
            bytes.extend_from_slice(part);
        }
        Self::new(bytes)
    }

    /// The bytes. The name is long so that its uses are easy to find.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A second copy, wiped on its own. Explicit, because each copy is one
    /// more place to leak from.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }

    /// Whether both hold the same bytes, in constant time.
    #[must_use]
    pub fn ct_eq(&self, other: &Self) -> bool {
        crate::ct_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl From<Zeroizing<Vec<u8>>> for Secret {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        let secret = Secret::from_slice(b"hunter2");
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "… Some(…)");
    }

    #[test]
    fn duplicate_concat_and_equality() {
        let secret = Secret::concat(&[b"ab", b"", b"c"]);
        assert_eq!(secret.expose(), b"abc");
        assert_eq!(secret.len(), 3);
        assert!(secret.ct_eq(&secret.duplicate()));
        assert!(!secret.ct_eq(&Secret::from_slice(b"abd")));
        assert!(Secret::new(Vec::new()).is_empty());
    }

    #[test]
    fn random_fills_all() {
        let secret = Secret::random(64, &mut crate::testutil::rng());
        assert_eq!(secret.len(), 64);
        // All-zero has a chance of 2^-512.
        assert!(secret.expose().iter().any(|&b| b != 0));
    }
}

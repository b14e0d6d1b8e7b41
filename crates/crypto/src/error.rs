//! What can go wrong in this crate, by whose fault.
//!
//! No variant carries secret bytes, nor bytes of a peer.

/// Why a cryptographic operation was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The tag of a sealed message is wrong, or the message is too short to
    /// hold one. Says nothing more, so that it is no oracle.
    #[error("the message failed authentication")]
    NotAuthentic,
    /// The peer's Diffie-Hellman value has the wrong length, is not on the
    /// curve, or leads to an all-zero shared secret.
    #[error("the peer's key exchange value is invalid")]
    BadPublicValue,
    /// Our own key material does not fit the algorithm.
    #[error("key material is {got} bytes, the algorithm takes {want}")]
    KeyLength {
        /// What the algorithm takes, in bytes.
        want: usize,
        /// What was given, in bytes.
        got: usize,
    },
    /// A stored secret is not a private key of its group.
    #[error("stored secret is not a private key of its group")]
    BadSecret,
    /// More output was asked for than the function may give: 255 blocks of
    /// prf+, or 2^36 bytes of one AEAD message.
    #[error("more output was asked for than the algorithm may give")]
    TooLong,
}

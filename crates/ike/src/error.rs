//! Errors by fault, and what becomes of them.

use wire::ike::{BuildError, NotifyType, ParseError};

/// Why a datagram had no effect. Each kind has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// Not a well-formed message.
    #[error("malformed: {0}")]
    Malformed(#[from] ParseError),
    /// It does not decrypt with the SA's key.
    #[error("not authentic")]
    NotAuthentic,
    /// Well-formed, but nothing waits for it: wrong SPI, state, or message id.
    #[error("not expected")]
    NotExpected,
    /// Beyond a limit of security.md.
    #[error("over a limit")]
    Limit,
    /// The peer's public value or our key was refused.
    #[error("crypto: {0}")]
    Crypto(#[from] crypto::Error),
    /// We could not do our part.
    #[error("internal: {0}")]
    Internal(&'static str),
}

impl From<BuildError> for Error {
    fn from(_: BuildError) -> Self {
        Self::Internal("a message that cannot be written")
    }
}

/// A request is answered with this instead of what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) kind: NotifyType,
    pub(crate) data: Vec<u8>,
    /// The IKE SA ends with it (RFC 7296 §2.21.3).
    pub(crate) fatal: bool,
}

impl Refusal {
    pub(crate) fn new(kind: NotifyType) -> Self {
        Self { kind, data: Vec::new(), fatal: false }
    }

    /// RFC 7296 §2.21.3: INVALID_SYNTAX is fatal for the IKE SA.
    pub(crate) fn syntax() -> Self {
        Self { kind: NotifyType::INVALID_SYNTAX, data: Vec::new(), fatal: true }
    }

    /// An error of ours that the peer should try again after.
    pub(crate) fn temporary() -> Self {
        Self::new(NotifyType::TEMPORARY_FAILURE)
    }
}

impl From<ParseError> for Refusal {
    fn from(error: ParseError) -> Self {
        let kind = error.notify_type().unwrap_or(NotifyType::INVALID_SYNTAX);
        // UNSUPPORTED_CRITICAL_PAYLOAD rejects the message, not the IKE SA
        // (RFC 7296 §2.5).
        Self { kind, data: error.notify_data(), fatal: kind == NotifyType::INVALID_SYNTAX }
    }
}

//! What can be wrong with a message, told apart as far as the answer differs.

use super::registry::{NotifyType, PayloadType};
use crate::ts::TsError;

/// Why bytes are not an acceptable IKE message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not an IKE message at all: cut short, a length field that differs from the datagram's, or an
    /// initiator SPI of zero (RFC 7296 §3.1). Nothing in it can be trusted, so nothing answers it.
    #[error("not an IKE message: {0}")]
    Header(HeaderFault),
    /// A major version above 2 (RFC 7296 §2.5). Versions below 2 are a [`HeaderFault`].
    #[error("IKE major version {0}")]
    MajorVersion(u8),
    /// A payload of an unknown type has its critical bit set (RFC 7296 §2.5).
    #[error("critical payload of unknown type {}", .0.0)]
    UnsupportedCritical(PayloadType),
    /// A payload, or the chain at it, is malformed.
    #[error("malformed {payload} payload: {fault}")]
    Malformed {
        /// The payload at fault.
        payload: PayloadType,
        /// What is wrong with it.
        fault: Fault,
    },
}

/// Why a datagram is not an IKE message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderFault {
    /// Fewer than 28 bytes.
    #[error("shorter than a header")]
    Short,
    /// The length field differs from the number of bytes.
    #[error("length field differs from the datagram's")]
    Length,
    /// A major version below 2: IKEv1.
    #[error("major version below 2")]
    OldVersion,
    /// The initiator's SPI is zero.
    #[error("zero initiator SPI")]
    ZeroSpi,
}

/// What is wrong with a payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The payload's length leaves the message, or is below its own header.
    #[error("length leaves the message")]
    Length,
    /// The content is cut short.
    #[error("content cut short")]
    Truncated,
    /// Bytes follow the content, or the last payload.
    #[error("trailing bytes")]
    Trailing,
    /// More elements than a limit allows.
    #[error("too many elements")]
    TooMany,
    /// A count disagrees with what is there, or is zero.
    #[error("wrong count")]
    Count,
    /// A field has a value that is not allowed there.
    #[error("value out of range")]
    Value,
    /// An encrypted payload inside another, or not at the end, or a fragment with company.
    #[error("encrypted payload out of place")]
    Encrypted,
    /// A traffic selector is wrong.
    #[error(transparent)]
    TrafficSelector(#[from] TsError),
}

impl ParseError {
    /// The notify that tells the peer; `None` where silence is the answer. Whether it may be sent at all
    /// (never in answer to a response; INVALID_SYNTAX only when authenticated: RFC 7296 §3.10.1) is the
    /// caller's to decide.
    #[must_use]
    pub fn notify_type(&self) -> Option<NotifyType> {
        match self {
            ParseError::Header(_) => None,
            ParseError::MajorVersion(_) => Some(NotifyType::INVALID_MAJOR_VERSION),
            ParseError::UnsupportedCritical(_) => Some(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD),
            ParseError::Malformed { .. } => Some(NotifyType::INVALID_SYNTAX),
        }
    }

    /// The notification data that belongs to [`Self::notify_type`]: the payload type for
    /// UNSUPPORTED_CRITICAL_PAYLOAD (RFC 7296 §2.5), else nothing.
    #[must_use]
    pub fn notify_data(&self) -> Vec<u8> {
        match self {
            ParseError::UnsupportedCritical(kind) => vec![kind.0],
            _ => Vec::new(),
        }
    }
}

/// Why a message cannot be written: an error of ours, never of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildError {
    /// A payload or the message does not fit its length field.
    #[error("{0} payload or message too long")]
    TooLong(PayloadType),
    /// An element count does not fit its field, or is zero where one is needed.
    #[error("{0} payload with too many or no elements")]
    Count(PayloadType),
    /// A value has no encoding: a nonce outside 16 to 256 bytes, an SPI of unknown length.
    #[error("{0} payload with a value that has no encoding")]
    Value(PayloadType),
}

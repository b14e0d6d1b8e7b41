//! IKEv2 messages (RFC 7296 §3).
//!
//! Reading: [`Header::parse`] finds the IKE SA, [`Message::parse`] reads the clear part. For an encrypted
//! message, [`Sealed::split`] gives the parts to decrypt (in place, in a copy of the datagram) and
//! [`Sealed::parse_opened`] reads what came out. Then [`Payloads::doubled`] finds payloads that appear
//! twice; which payloads an exchange needs is for crate `ike` to say.
//!
//! Writing: [`MessageBuilder::clear`] or [`MessageBuilder::sealed`], `push` payloads, `finish`, and for the
//! second [`Unsealed::seal`].
//!
//! [`ParseError`] tells apart what is answered differently. Limits: [`MAX_MESSAGE_LEN`], [`MAX_PAYLOADS`],
//! [`MAX_PROPOSALS`], [`MAX_DELETE_SPIS`], [`MAX_CFG_ATTRIBUTES`]; 255 traffic selectors and transforms.

mod build;
mod error;
mod header;
mod ident;
mod message;
mod payload;
mod registry;
mod sa;

pub use build::{MessageBuilder, SealedBuilder, Unsealed, UnsealedParts};
pub use error::{BuildError, Fault, HeaderFault, ParseError};
pub use header::{HEADER_LEN, Header, MAX_MESSAGE_LEN};
pub use ident::{IdPayload, Identity, IdentityError};
pub use message::{Fragment, Message, Sealed, SealedParts, parse_inner, strip_padding};
pub use payload::{
    Auth, Certificate, CfgAttribute, Configuration, Delete, GENERIC_HEADER_LEN, KeyExchange,
    MAX_CFG_ATTRIBUTES, MAX_DELETE_SPIS, MAX_PAYLOADS, NONCE_LEN, Notify, Payload, Payloads,
};
pub use registry::{
    AuthMethod, CertEncoding, CfgAttributeType, CfgType, EncrId, EsnId, ExchangeType, GroupId,
    HashId, IdType, IntegId, NotifyType, PayloadType, PrfId, ProtocolId, TransformType,
};
pub use sa::{MAX_PROPOSALS, Proposal, Spi, Transform};

/// Explicit IV of AES-GCM and ChaCha20-Poly1305 in an SK payload (RFC 5282 §3.1, RFC 7634 §2).
pub const IV_LEN: usize = 8;
/// Integrity check value at the end of an SK payload.
pub const ICV_LEN: usize = 16;

//! The fixed header (RFC 7296 §3.1).

use super::error::{HeaderFault, ParseError};
use super::registry::{ExchangeType, PayloadType};
use crate::id::{IkeSpi, MessageId};
use crate::read::Reader;

/// Length of the fixed header.
pub const HEADER_LEN: usize = 28;
/// Longest IKE message we read or write: what a UDP datagram over IPv4 can carry.
pub const MAX_MESSAGE_LEN: usize = 65_507;

const FLAG_INITIATOR: u8 = 0x08;
const FLAG_RESPONSE: u8 = 0x20;

/// The fixed header without what follows from the rest of the message (next payload, length).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// SPI of the IKE SA's original initiator.
    pub initiator_spi: IkeSpi,
    /// SPI of its responder; zero in the first message.
    pub responder_spi: IkeSpi,
    /// Kind of exchange.
    pub exchange: ExchangeType,
    /// I flag: sent by the original initiator of this IKE SA.
    pub from_initiator: bool,
    /// R flag: answers the request with the same message id.
    pub response: bool,
    /// Message id.
    pub message_id: MessageId,
}

impl Header {
    /// Reads and checks the header of a whole datagram (without non-ESP marker): length, version, SPI.
    /// Minor version, the V flag and unused flags are ignored (RFC 7296 §3.1).
    pub fn parse(datagram: &[u8]) -> Result<Header, ParseError> {
        Header::read(datagram).map(|(header, _)| header)
    }

    /// Reads the fields of anything that is long enough, checking nothing: for the answer to a message
    /// that [`Header::parse`] refused with [`ParseError::MajorVersion`], and for logs.
    #[must_use]
    pub fn peek(datagram: &[u8]) -> Option<Header> {
        Raw::read(datagram).map(|raw| raw.header)
    }

    /// The header and the type of the first payload.
    pub(super) fn read(datagram: &[u8]) -> Result<(Header, PayloadType), ParseError> {
        let raw = Raw::read(datagram).ok_or(ParseError::Header(HeaderFault::Short))?;
        match raw.version >> 4 {
            2 => {}
            newer @ 3.. => return Err(ParseError::MajorVersion(newer)),
            _ => return Err(ParseError::Header(HeaderFault::OldVersion)),
        }
        if usize::try_from(raw.length) != Ok(datagram.len()) {
            return Err(ParseError::Header(HeaderFault::Length));
        }
        if raw.header.initiator_spi.is_zero() {
            return Err(ParseError::Header(HeaderFault::ZeroSpi));
        }
        Ok((raw.header, raw.next))
    }

    /// Writes all 28 bytes; next payload and length are the builder's to fill in.
    pub(super) fn emit(&self, out: &mut Vec<u8>) {
        out.extend(self.initiator_spi.to_bytes());
        out.extend(self.responder_spi.to_bytes());
        let flags = if self.from_initiator { FLAG_INITIATOR } else { 0 }
            | if self.response { FLAG_RESPONSE } else { 0 };
        out.extend([PayloadType::NONE.0, 0x20, self.exchange.0, flags]);
        out.extend(self.message_id.0.to_be_bytes());
        out.extend([0; 4]);
    }

    /// The header of the response to this request.
    #[must_use]
    pub fn to_response(self) -> Header {
        Header { from_initiator: !self.from_initiator, response: true, ..self }
    }
}

/// Where the builder fills in the next payload.
pub(super) const NEXT_PAYLOAD_AT: usize = 16;
/// Where the builder fills in the length.
pub(super) const LENGTH_AT: usize = 24;

struct Raw {
    header: Header,
    next: PayloadType,
    version: u8,
    length: u32,
}

impl Raw {
    fn read(datagram: &[u8]) -> Option<Raw> {
        let mut r = Reader::new(datagram);
        let initiator_spi = IkeSpi(r.u64()?);
        let responder_spi = IkeSpi(r.u64()?);
        let next = PayloadType(r.u8()?);
        let version = r.u8()?;
        let exchange = ExchangeType(r.u8()?);
        let flags = r.u8()?;
        let message_id = MessageId(r.u32()?);
        let length = r.u32()?;
        let header = Header {
            initiator_spi,
            responder_spi,
            exchange,
            from_initiator: flags & FLAG_INITIATOR != 0,
            response: flags & FLAG_RESPONSE != 0,
            message_id,
        };
        Some(Raw { header, next, version, length })
    }
}

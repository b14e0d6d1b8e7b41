//! Whole messages, read: header, clear payloads, and the seams of an encrypted payload.

use core::ops::Range;

use super::error::{Fault, ParseError};
use super::header::{HEADER_LEN, Header};
use super::payload::{GENERIC_HEADER_LEN, Payloads};
use super::registry::PayloadType;
use super::{ICV_LEN, IV_LEN};
use crate::read::Reader;

/// A message whose clear part was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message<'a> {
    /// The fixed header.
    pub header: Header,
    /// The payloads outside the encrypted one: all of an IKE_SA_INIT, none of most others. Beside an
    /// encrypted payload they are authenticated with it but mean nothing in any exchange we know.
    pub payloads: Payloads<'a>,
    /// The encrypted payload at the end, if there is one.
    pub sealed: Option<Sealed>,
}

impl<'a> Message<'a> {
    /// Reads a datagram (without non-ESP marker), which must be one message exactly.
    pub fn parse(datagram: &'a [u8]) -> Result<Message<'a>, ParseError> {
        let (header, first) = Header::read(datagram)?;
        // Header::read saw a whole header.
        let chain = datagram.get(HEADER_LEN..).unwrap_or_default();
        let (payloads, tail) = Payloads::parse_chain(first, chain)?;
        let Some(tail) = tail else {
            return Ok(Message { header, payloads, sealed: None });
        };

        let malformed = |fault| ParseError::Malformed { payload: tail.kind, fault };
        let mut content = Reader::new(tail.content);
        let mut fragment = None;
        if tail.kind == PayloadType::SKF {
            let (number, total) =
                (|| Some((content.u16()?, content.u16()?)))().ok_or(malformed(Fault::Truncated))?;
            // RFC 7383 §2.5: 1 ≤ number ≤ total. Company is refused: security.md, statement 3.
            if number == 0 || number > total {
                return Err(malformed(Fault::Value));
            }
            if !payloads.is_empty() {
                return Err(malformed(Fault::Encrypted));
            }
            fragment = Some(Fragment { number, total });
        }
        if content.len() < IV_LEN + 1 + ICV_LEN {
            return Err(malformed(Fault::Truncated));
        }
        // The encrypted payload ends the datagram, so its content is counted from there.
        let iv_start = datagram.len() - content.len();
        let sealed = Sealed { first: tail.first, fragment, iv_start, end: datagram.len() };
        Ok(Message { header, payloads, sealed: Some(sealed) })
    }
}

/// Which part of a fragmented message this is (RFC 7383 §2.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// From 1.
    pub number: u16,
    /// How many there are; never below `number`.
    pub total: u16,
}

/// The seams of a message with an SK or SKF payload, for an AEAD with an 8-byte IV and a 16-byte ICV
/// (RFC 5282 §3, §5.1):
///
/// ```text
/// header ‖ other payloads ‖ generic header ( ‖ fragment fields ) ‖ IV 8 ‖ payloads, padding, length ‖ ICV 16
/// └──────────────── additional data ───────────────────────────┘        └─────────── body ───────────────┘
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// Type of the first payload inside; `NONE` if it is empty or a fragment other than the first.
    pub first: PayloadType,
    /// For SKF, which part it is; `None` for SK.
    pub fragment: Option<Fragment>,
    iv_start: usize,
    end: usize,
}

/// A message split at its seams.
#[derive(Debug)]
pub struct SealedParts<'a> {
    /// Additional authenticated data.
    pub aad: &'a [u8],
    /// The explicit IV.
    pub iv: [u8; IV_LEN],
    /// Ciphertext followed by the ICV, to be opened in place.
    pub body: &'a mut [u8],
}

impl Sealed {
    /// Where the additional authenticated data lies in the datagram.
    #[must_use]
    pub fn aad(&self) -> Range<usize> {
        0..self.iv_start
    }

    /// Where the IV lies.
    #[must_use]
    pub fn iv(&self) -> Range<usize> {
        self.iv_start..self.iv_start + IV_LEN
    }

    /// Where ciphertext and ICV lie.
    #[must_use]
    pub fn body(&self) -> Range<usize> {
        self.iv_start + IV_LEN..self.end
    }

    /// Splits a copy of the datagram that was parsed. `None` if the length differs.
    #[must_use]
    pub fn split<'b>(&self, datagram: &'b mut [u8]) -> Option<SealedParts<'b>> {
        if datagram.len() != self.end {
            return None;
        }
        let (aad, rest) = datagram.split_at_mut_checked(self.iv_start)?;
        let (iv, body) = rest.split_first_chunk_mut::<IV_LEN>()?;
        Some(SealedParts { aad, iv: *iv, body })
    }

    /// Reads what came out of decryption (payloads, padding, pad length; no ICV). Padding may have any
    /// length and content (RFC 7296 §3.14). An encrypted payload inside is refused.
    pub fn parse_opened<'b>(&self, plaintext: &'b [u8]) -> Result<Payloads<'b>, ParseError> {
        let malformed = |fault| ParseError::Malformed { payload: PayloadType::SK, fault };
        let chain = strip_padding(plaintext).ok_or(malformed(Fault::Truncated))?;
        parse_inner(self.first, chain)
    }
}

/// Reads a chain of payloads that was inside an encrypted one, padding removed: also for the reassembled
/// content of fragments.
pub fn parse_inner(first: PayloadType, chain: &[u8]) -> Result<Payloads<'_>, ParseError> {
    match Payloads::parse_chain(first, chain)? {
        (payloads, None) => Ok(payloads),
        (_, Some(tail)) => {
            Err(ParseError::Malformed { payload: tail.kind, fault: Fault::Encrypted })
        }
    }
}

/// Removes padding and pad length; `None` if the pad length exceeds what is there.
#[must_use]
pub fn strip_padding(plaintext: &[u8]) -> Option<&[u8]> {
    let (&pad_len, rest) = plaintext.split_last()?;
    rest.get(..rest.len().checked_sub(usize::from(pad_len))?)
}

const _: () = assert!(GENERIC_HEADER_LEN == 4, "Sealed's drawing assumes it");

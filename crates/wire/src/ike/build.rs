//! Whole messages, written: clear ones, and encrypted ones up to the point where a key is needed.

use super::error::BuildError;
use super::header::{HEADER_LEN, Header, LENGTH_AT, MAX_MESSAGE_LEN, NEXT_PAYLOAD_AT};
use super::payload::{GENERIC_HEADER_LEN, Payload};
use super::registry::PayloadType;
use super::sa::patch_len;
use super::{ICV_LEN, IV_LEN};

/// Lays payloads into a message. Errors of any payload are kept and come out at the end, so that
/// building reads straight on.
///
/// ```
/// use wire::id::{IkeSpi, MessageId};
/// use wire::ike::{ExchangeType, Header, Message, MessageBuilder, Notify, NotifyType, Payload};
///
/// let header = Header {
///     initiator_spi: IkeSpi(1),
///     responder_spi: IkeSpi(0),
///     exchange: ExchangeType::IKE_SA_INIT,
///     from_initiator: false,
///     response: true,
///     message_id: MessageId(0),
/// };
/// let mut builder = MessageBuilder::clear(&header);
/// builder.push(&Payload::Notify(Notify::new(NotifyType::COOKIE, &[7; 16])));
/// let bytes = builder.finish()?;
/// let cookie = Message::parse(&bytes).map(|m| m.payloads.notify(NotifyType::COOKIE).map(|n| n.data.len()));
/// assert_eq!(cookie, Ok(Some(16)));
/// # Ok::<(), wire::ike::BuildError>(())
/// ```
#[derive(Debug)]
pub struct MessageBuilder(Chain);

/// The same for a message whose payloads will be encrypted: header, SK header, IV, payloads, a pad
/// length of 0, room for the ICV (RFC 7296 §3.14, RFC 5282 §3). Both AEADs we have need no padding.
#[derive(Debug)]
pub struct SealedBuilder(Chain);

#[derive(Debug)]
struct Chain {
    bytes: Vec<u8>,
    /// Where the type of the next payload goes.
    next_at: usize,
    error: Option<BuildError>,
}

impl Chain {
    fn fail(&mut self, error: BuildError) {
        self.error.get_or_insert(error);
    }

    fn announce(&mut self, kind: PayloadType) {
        if let Some(byte) = self.bytes.get_mut(self.next_at) {
            *byte = kind.0;
        }
    }

    fn push(&mut self, payload: &Payload<'_>) {
        let kind = payload.kind();
        let start = self.bytes.len();
        self.announce(kind);
        self.next_at = start;
        self.bytes.extend([0; GENERIC_HEADER_LEN]);
        let written = match payload.emit(&mut self.bytes) {
            Ok(()) => patch_len(&mut self.bytes, start + 2, start, kind),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            self.fail(error);
        }
        // A builder fed without end must not grow without end.
        if self.bytes.len() > MAX_MESSAGE_LEN {
            self.bytes.truncate(MAX_MESSAGE_LEN);
            self.fail(BuildError::TooLong(kind));
        }
    }

    fn finish(mut self) -> Result<Vec<u8>, BuildError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.bytes.len() > MAX_MESSAGE_LEN {
            return Err(BuildError::TooLong(PayloadType::NONE));
        }
        // At most MAX_MESSAGE_LEN.
        let len = self.bytes.len() as u32;
        if let Some(field) =
            self.bytes.get_mut(LENGTH_AT..).and_then(|rest| rest.first_chunk_mut::<4>())
        {
            *field = len.to_be_bytes();
        }
        Ok(self.bytes)
    }
}

impl MessageBuilder {
    /// Starts a message in clear.
    #[must_use]
    pub fn clear(header: &Header) -> MessageBuilder {
        let mut bytes = Vec::with_capacity(512);
        header.emit(&mut bytes);
        MessageBuilder(Chain { bytes, next_at: NEXT_PAYLOAD_AT, error: None })
    }

    /// Starts a message whose payloads will be encrypted.
    #[must_use]
    pub fn sealed(header: &Header) -> SealedBuilder {
        let mut bytes = Vec::with_capacity(512);
        header.emit(&mut bytes);
        let mut chain = Chain { bytes, next_at: NEXT_PAYLOAD_AT, error: None };
        chain.announce(PayloadType::SK);
        // The SK header's own next payload is the type of the first payload inside.
        chain.next_at = HEADER_LEN;
        chain.bytes.extend([0; GENERIC_HEADER_LEN + IV_LEN]);
        SealedBuilder(chain)
    }

    /// Adds a payload.
    pub fn push(&mut self, payload: &Payload<'_>) -> &mut MessageBuilder {
        self.0.push(payload);
        self
    }

    /// The finished message.
    pub fn finish(self) -> Result<Vec<u8>, BuildError> {
        self.0.finish()
    }
}

impl SealedBuilder {
    /// Adds a payload inside the encrypted one.
    pub fn push(&mut self, payload: &Payload<'_>) -> &mut SealedBuilder {
        self.0.push(payload);
        self
    }

    /// The message with all lengths right, ready to be encrypted.
    pub fn finish(mut self) -> Result<Unsealed, BuildError> {
        self.0.bytes.push(0);
        self.0.bytes.extend([0; ICV_LEN]);
        if let Err(error) =
            patch_len(&mut self.0.bytes, HEADER_LEN + 2, HEADER_LEN, PayloadType::SK)
        {
            self.0.fail(error);
        }
        self.0.finish().map(|bytes| Unsealed { bytes })
    }
}

/// A message laid out for encryption; its payloads are still readable, so it must not be sent and prints
/// only its length.
pub struct Unsealed {
    bytes: Vec<u8>,
}

/// Where things go.
#[derive(Debug)]
pub struct UnsealedParts<'a> {
    /// Additional authenticated data: header and SK generic header.
    pub aad: &'a [u8],
    /// To be filled with the IV.
    pub iv: &'a mut [u8; IV_LEN],
    /// Payloads and pad length, to be encrypted in place.
    pub plaintext: &'a mut [u8],
    /// To be filled with the ICV.
    pub icv: &'a mut [u8; ICV_LEN],
}

impl Unsealed {
    /// Fills in the IV, lets `seal(iv, aad, plaintext)` encrypt in place and return the ICV, and gives
    /// the datagram. Fails as `seal` fails.
    pub fn seal<E>(
        mut self,
        iv: [u8; IV_LEN],
        seal: impl FnOnce([u8; IV_LEN], &[u8], &mut [u8]) -> Result<[u8; ICV_LEN], E>,
    ) -> Result<Vec<u8>, E> {
        // The builder made all parts, so this is always Some; were it not, the message would go out
        // unencrypted, so it is emptied instead.
        match self.parts() {
            Some(parts) => {
                *parts.iv = iv;
                *parts.icv = seal(iv, parts.aad, parts.plaintext)?;
            }
            None => self.bytes.clear(),
        }
        Ok(core::mem::take(&mut self.bytes))
    }

    fn parts(&mut self) -> Option<UnsealedParts<'_>> {
        let (aad, rest) = self.bytes.split_at_mut_checked(HEADER_LEN + GENERIC_HEADER_LEN)?;
        let (iv, rest) = rest.split_first_chunk_mut::<IV_LEN>()?;
        let (plaintext, icv) = rest.split_last_chunk_mut::<ICV_LEN>()?;
        Some(UnsealedParts { aad, iv, plaintext, icv })
    }
}

impl core::fmt::Debug for Unsealed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Unsealed({} bytes)", self.bytes.len())
    }
}

//! The SA payload: proposals, transforms, the key-length attribute (RFC 7296 §3.3).

use super::error::{BuildError, Fault};
use super::registry::{
    EncrId, EsnId, GroupId, IntegId, PayloadType, PrfId, ProtocolId, TransformType,
};
use crate::id::{EspSpi, IkeSpi};
use crate::read::Reader;

/// Most proposals accepted in one SA payload.
pub const MAX_PROPOSALS: usize = 64;

/// An SPI as proposals and notifies carry it, by its length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Spi {
    /// None: IKE_SA_INIT, and notifies about no SA in particular.
    None,
    /// Four bytes: ESP, AH.
    Esp(EspSpi),
    /// Eight bytes: a rekeyed IKE SA.
    Ike(IkeSpi),
    /// Another length, which no protocol we know has. Can be read, not written.
    Other(u8),
}

impl Spi {
    pub(super) fn parse(bytes: &[u8]) -> Spi {
        if bytes.is_empty() {
            Spi::None
        } else if let Ok(four) = <[u8; 4]>::try_from(bytes) {
            Spi::Esp(EspSpi(u32::from_be_bytes(four)))
        } else if let Ok(eight) = <[u8; 8]>::try_from(bytes) {
            Spi::Ike(IkeSpi(u64::from_be_bytes(eight)))
        } else {
            // The length field is one byte, so this never saturates.
            Spi::Other(u8::try_from(bytes.len()).unwrap_or(u8::MAX))
        }
    }

    pub(super) fn emit(self, payload: PayloadType, out: &mut Vec<u8>) -> Result<(), BuildError> {
        match self {
            Spi::None => {}
            Spi::Esp(spi) => out.extend(spi.to_bytes()),
            Spi::Ike(spi) => out.extend(spi.to_bytes()),
            Spi::Other(_) => return Err(BuildError::Value(payload)),
        }
        Ok(())
    }

    pub(super) fn size(self) -> u8 {
        match self {
            Spi::None => 0,
            Spi::Esp(_) => 4,
            Spi::Ike(_) => 8,
            Spi::Other(len) => len,
        }
    }

    /// The SPI if it is a non-zero ESP one.
    #[must_use]
    pub fn esp(self) -> Option<EspSpi> {
        match self {
            Spi::Esp(spi) if spi.0 != 0 => Some(spi),
            _ => None,
        }
    }

    /// The SPI if it is a non-zero IKE one.
    #[must_use]
    pub fn ike(self) -> Option<IkeSpi> {
        match self {
            Spi::Ike(spi) if !spi.is_zero() => Some(spi),
            _ => None,
        }
    }
}

/// One algorithm on offer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Transform {
    /// What it is an algorithm for.
    pub kind: TransformType,
    /// Which one; the number's meaning depends on `kind`.
    pub id: u16,
    /// Key-length attribute, in bits.
    pub key_bits: Option<u16>,
    /// It carries an attribute we do not understand, so it must not be chosen (RFC 7296 §3.3.6). Such
    /// a transform can be read, not written.
    pub foreign: bool,
}

impl Transform {
    fn plain(kind: TransformType, id: u16) -> Transform {
        Transform { kind, id, key_bits: None, foreign: false }
    }

    /// Encryption; `key_bits` only for algorithms of variable key length (RFC 7296 §3.3.5).
    #[must_use]
    pub fn encr(id: EncrId, key_bits: Option<u16>) -> Transform {
        Transform { key_bits, ..Transform::plain(TransformType::ENCR, id.0) }
    }

    /// Pseudorandom function.
    #[must_use]
    pub fn prf(id: PrfId) -> Transform {
        Transform::plain(TransformType::PRF, id.0)
    }

    /// Integrity.
    #[must_use]
    pub fn integ(id: IntegId) -> Transform {
        Transform::plain(TransformType::INTEG, id.0)
    }

    /// Key exchange.
    #[must_use]
    pub fn ke(id: GroupId) -> Transform {
        Transform::plain(TransformType::KE, id.0)
    }

    /// Extended sequence numbers.
    #[must_use]
    pub fn esn(id: EsnId) -> Transform {
        Transform::plain(TransformType::ESN, id.0)
    }
}

/// One proposal: the sender accepts one transform of each kind present.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Proposal {
    /// 1 for the first of an offer, then one more each; a response repeats the chosen one's.
    pub number: u8,
    /// What the SA would protect.
    pub protocol: ProtocolId,
    /// The sender's SPI for it; `Spi::None` in IKE_SA_INIT.
    pub spi: Spi,
    /// The algorithms, in order of preference within a kind.
    pub transforms: Vec<Transform>,
}

impl Proposal {
    /// The transforms of one kind.
    pub fn of_kind(&self, kind: TransformType) -> impl Iterator<Item = &Transform> {
        self.transforms.iter().filter(move |t| t.kind == kind)
    }

    /// The key-exchange groups on offer, in order.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.of_kind(TransformType::KE).filter(|t| !t.foreign).map(|t| GroupId(t.id))
    }

    fn parse(r: &mut Reader<'_>) -> Result<(bool, Proposal), Fault> {
        let (more, _, len) = (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(Fault::Truncated)?;
        // A length below the four bytes just read cannot loop: it is refused here.
        let len = usize::from(len).checked_sub(4).ok_or(Fault::Length)?;
        let mut body = Reader::new(r.take(len).ok_or(Fault::Length)?);
        let [number, protocol, spi_size, count] = body.array::<4>().ok_or(Fault::Truncated)?;
        let spi = Spi::parse(body.take(usize::from(spi_size)).ok_or(Fault::Truncated)?);
        let mut transforms = Vec::new();
        for left in (0..count).rev() {
            let (more, transform) = Transform::parse(&mut body)?;
            // RFC 7296 §3.3.2: 0 marks the last transform, 3 the others.
            if more != (left > 0) {
                return Err(Fault::Count);
            }
            transforms.push(transform);
        }
        if !body.is_empty() {
            return Err(Fault::Trailing);
        }
        // RFC 7296 §3.3.1: 0 marks the last proposal, 2 the others.
        let more = match more {
            0 => false,
            2 => true,
            _ => return Err(Fault::Value),
        };
        Ok((more, Proposal { number, protocol: ProtocolId(protocol), spi, transforms }))
    }

    fn emit(&self, last: bool, out: &mut Vec<u8>) -> Result<(), BuildError> {
        let start = out.len();
        let count =
            u8::try_from(self.transforms.len()).map_err(|_| BuildError::Count(PayloadType::SA))?;
        out.extend([if last { 0 } else { 2 }, 0, 0, 0]);
        out.extend([self.number, self.protocol.0, self.spi.size(), count]);
        self.spi.emit(PayloadType::SA, out)?;
        for (i, transform) in (1..).zip(&self.transforms) {
            transform.emit(i == self.transforms.len(), out)?;
        }
        patch_len(out, start + 2, start, PayloadType::SA)
    }
}

/// Attribute format bit: type and value, no length (RFC 7296 §3.3.5).
const ATTRIBUTE_TV: u16 = 0x8000;
const ATTRIBUTE_KEY_LENGTH: u16 = 14;

impl Transform {
    fn parse(r: &mut Reader<'_>) -> Result<(bool, Transform), Fault> {
        let (more, _, len) = (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(Fault::Truncated)?;
        let len = usize::from(len).checked_sub(4).ok_or(Fault::Length)?;
        let mut body = Reader::new(r.take(len).ok_or(Fault::Length)?);
        let (kind, _, id) =
            (|| Some((body.u8()?, body.u8()?, body.u16()?)))().ok_or(Fault::Truncated)?;
        let mut transform = Transform::plain(TransformType(kind), id);
        while !body.is_empty() {
            let (kind, value) = (|| Some((body.u16()?, body.u16()?)))().ok_or(Fault::Truncated)?;
            if kind & ATTRIBUTE_TV == 0 {
                body.take(usize::from(value)).ok_or(Fault::Truncated)?;
                transform.foreign = true;
            } else if kind & !ATTRIBUTE_TV == ATTRIBUTE_KEY_LENGTH && transform.key_bits.is_none() {
                transform.key_bits = Some(value);
            } else {
                transform.foreign = true;
            }
        }
        let more = match more {
            0 => false,
            3 => true,
            _ => return Err(Fault::Value),
        };
        Ok((more, transform))
    }

    fn emit(&self, last: bool, out: &mut Vec<u8>) -> Result<(), BuildError> {
        if self.foreign {
            return Err(BuildError::Value(PayloadType::SA));
        }
        let len: u16 = if self.key_bits.is_some() { 12 } else { 8 };
        out.extend([if last { 0 } else { 3 }, 0]);
        out.extend(len.to_be_bytes());
        out.extend([self.kind.0, 0]);
        out.extend(self.id.to_be_bytes());
        if let Some(bits) = self.key_bits {
            out.extend((ATTRIBUTE_TV | ATTRIBUTE_KEY_LENGTH).to_be_bytes());
            out.extend(bits.to_be_bytes());
        }
        Ok(())
    }
}

pub(super) fn parse_proposals(body: &[u8]) -> Result<Vec<Proposal>, Fault> {
    let mut r = Reader::new(body);
    let mut proposals = Vec::new();
    loop {
        if proposals.len() == MAX_PROPOSALS {
            return Err(Fault::TooMany);
        }
        let (more, proposal) = Proposal::parse(&mut r)?;
        proposals.push(proposal);
        if !more {
            break;
        }
    }
    if r.is_empty() { Ok(proposals) } else { Err(Fault::Trailing) }
}

pub(super) fn emit_proposals(proposals: &[Proposal], out: &mut Vec<u8>) -> Result<(), BuildError> {
    if proposals.is_empty() || proposals.len() > MAX_PROPOSALS {
        return Err(BuildError::Count(PayloadType::SA));
    }
    for (i, proposal) in (1..).zip(proposals) {
        proposal.emit(i == proposals.len(), out)?;
    }
    Ok(())
}

/// Fills in a 16-bit length field at `at` with the number of bytes since `start`.
pub(super) fn patch_len(
    out: &mut [u8],
    at: usize,
    start: usize,
    payload: PayloadType,
) -> Result<(), BuildError> {
    let len =
        u16::try_from(out.len().saturating_sub(start)).map_err(|_| BuildError::TooLong(payload))?;
    let field = out.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>());
    if let Some(field) = field {
        *field = len.to_be_bytes();
    }
    Ok(())
}

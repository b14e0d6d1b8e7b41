//! The payloads and their chain (RFC 7296 §3.2 to §3.16).

use super::error::{BuildError, Fault, ParseError};
use super::ident::IdPayload;
use super::registry::{
    AuthMethod, CertEncoding, CfgAttributeType, CfgType, GroupId, NotifyType, PayloadType,
    ProtocolId,
};
use super::sa::{Proposal, Spi, emit_proposals, parse_proposals};
use crate::id::EspSpi;
use crate::read::Reader;
use crate::ts::{self, TrafficSelector};

/// Length of the generic payload header.
pub const GENERIC_HEADER_LEN: usize = 4;
/// Most payloads accepted in one chain.
pub const MAX_PAYLOADS: usize = 64;
/// Most SPIs accepted in one Delete payload.
pub const MAX_DELETE_SPIS: usize = 1024;
/// Most attributes accepted in one Configuration payload.
pub const MAX_CFG_ATTRIBUTES: usize = 256;
/// Nonces are 16 to 256 bytes (RFC 7296 §3.9).
pub const NONCE_LEN: core::ops::RangeInclusive<usize> = 16..=256;

const CRITICAL: u8 = 0x80;

/// One payload with its content. Bodies are borrowed from the message; the same type is what a
/// [`super::MessageBuilder`] takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload<'a> {
    /// SA: the proposals, 1 to [`super::MAX_PROPOSALS`].
    Sa(Vec<Proposal>),
    /// KE.
    Ke(KeyExchange<'a>),
    /// IDi.
    IdI(IdPayload<'a>),
    /// IDr.
    IdR(IdPayload<'a>),
    /// CERT.
    Cert(Certificate<'a>),
    /// CERTREQ: encoding and certification authorities.
    CertReq(Certificate<'a>),
    /// AUTH.
    Auth(Auth<'a>),
    /// Ni or Nr, 16 to 256 bytes.
    Nonce(&'a [u8]),
    /// N.
    Notify(Notify<'a>),
    /// D.
    Delete(Delete),
    /// V.
    VendorId(&'a [u8]),
    /// TSi. Empty only if every selector in it was of an unknown type.
    TsI(Vec<TrafficSelector>),
    /// TSr. Empty only if every selector in it was of an unknown type.
    TsR(Vec<TrafficSelector>),
    /// CP.
    Cp(Configuration<'a>),
    /// EAP: the EAP message.
    Eap(&'a [u8]),
    /// A payload of unknown type without critical bit, to be skipped (RFC 7296 §2.5).
    Unknown {
        /// Its type.
        kind: PayloadType,
        /// Its content.
        body: &'a [u8],
    },
}

/// A KE payload (RFC 7296 §3.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyExchange<'a> {
    /// The group the data belongs to.
    pub group: GroupId,
    /// The public value; its length is the group's business.
    pub data: &'a [u8],
}

/// A CERT or CERTREQ payload (RFC 7296 §3.6, §3.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Certificate<'a> {
    /// How the data is encoded.
    pub encoding: CertEncoding,
    /// The certificate, or hashes of authorities' keys.
    pub data: &'a [u8],
}

/// An AUTH payload (RFC 7296 §3.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Auth<'a> {
    /// How it was computed.
    pub method: AuthMethod,
    /// Signature or MAC.
    pub data: &'a [u8],
}

/// A Notify payload (RFC 7296 §3.10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Notify<'a> {
    /// What the SPI belongs to; `NONE` without SPI.
    pub protocol: ProtocolId,
    /// The SA it is about. In REKEY_SA and CHILD_SA_NOT_FOUND the SPI the sender expects inbound.
    pub spi: Spi,
    /// What it says.
    pub kind: NotifyType,
    /// Details, by kind.
    pub data: &'a [u8],
}

impl<'a> Notify<'a> {
    /// A notify about the IKE SA or none: no protocol, no SPI.
    #[must_use]
    pub fn new(kind: NotifyType, data: &'a [u8]) -> Notify<'a> {
        Notify { protocol: ProtocolId::NONE, spi: Spi::None, kind, data }
    }

    /// A notify about one Child SA: REKEY_SA, CHILD_SA_NOT_FOUND, INVALID_SELECTORS.
    #[must_use]
    pub fn about(kind: NotifyType, spi: EspSpi, data: &'a [u8]) -> Notify<'a> {
        Notify { protocol: ProtocolId::ESP, spi: Spi::Esp(spi), kind, data }
    }

    fn parse(body: &'a [u8]) -> Result<Notify<'a>, Fault> {
        let mut r = Reader::new(body);
        let (protocol, spi_size, kind) =
            (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(Fault::Truncated)?;
        let spi = Spi::parse(r.take(usize::from(spi_size)).ok_or(Fault::Truncated)?);
        // An SPI of another length is carried through: status types we do not know MUST be ignored (RFC 7296
        // §3.10.1), so they must not spoil the message.
        Ok(Notify { protocol: ProtocolId(protocol), spi, kind: NotifyType(kind), data: r.rest() })
    }

    fn emit(&self, out: &mut Vec<u8>) -> Result<(), BuildError> {
        out.extend([self.protocol.0, self.spi.size()]);
        out.extend(self.kind.0.to_be_bytes());
        self.spi.emit(PayloadType::NOTIFY, out)?;
        out.extend(self.data);
        Ok(())
    }
}

/// A Delete payload (RFC 7296 §3.11).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Delete {
    /// The IKE SA that carries it.
    Ike,
    /// Child SAs, by the SPIs the sender expects inbound.
    Esp(Vec<EspSpi>),
    /// AH SAs, which we never have.
    Ah(Vec<EspSpi>),
}

impl Delete {
    fn parse(body: &[u8]) -> Result<Delete, Fault> {
        let mut r = Reader::new(body);
        let (protocol, spi_size, count) =
            (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(Fault::Truncated)?;
        let protocol = ProtocolId(protocol);
        // RFC 7296 §3.11: SPI size 0 for IKE, 4 for AH and ESP.
        match (protocol, spi_size) {
            (ProtocolId::IKE, 0) if count == 0 && r.is_empty() => return Ok(Delete::Ike),
            (ProtocolId::IKE, 0) => return Err(Fault::Count),
            (ProtocolId::ESP | ProtocolId::AH, 4) => {}
            _ => return Err(Fault::Value),
        }
        let count = usize::from(count);
        if count > MAX_DELETE_SPIS {
            return Err(Fault::TooMany);
        }
        if r.len() != count * 4 {
            return Err(Fault::Count);
        }
        let spis = core::iter::from_fn(|| r.u32().map(EspSpi)).collect();
        Ok(if protocol == ProtocolId::ESP { Delete::Esp(spis) } else { Delete::Ah(spis) })
    }

    fn emit(&self, out: &mut Vec<u8>) -> Result<(), BuildError> {
        let (protocol, spi_size, spis): (_, u8, &[EspSpi]) = match self {
            Delete::Ike => (ProtocolId::IKE, 0, &[]),
            Delete::Esp(spis) => (ProtocolId::ESP, 4, spis),
            Delete::Ah(spis) => (ProtocolId::AH, 4, spis),
        };
        if spis.len() > MAX_DELETE_SPIS {
            return Err(BuildError::Count(PayloadType::DELETE));
        }
        out.extend([protocol.0, spi_size]);
        // At most MAX_DELETE_SPIS.
        out.extend((spis.len() as u16).to_be_bytes());
        spis.iter().for_each(|spi| out.extend(spi.to_bytes()));
        Ok(())
    }
}

/// A Configuration payload (RFC 7296 §3.15).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Configuration<'a> {
    /// Request, reply, set or acknowledgement.
    pub kind: CfgType,
    /// The attributes, at most [`MAX_CFG_ATTRIBUTES`].
    pub attributes: Vec<CfgAttribute<'a>>,
}

/// One configuration attribute.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CfgAttribute<'a> {
    /// Which.
    pub kind: CfgAttributeType,
    /// Its value; empty asks for one.
    pub value: &'a [u8],
}

impl<'a> Configuration<'a> {
    fn parse(body: &'a [u8]) -> Result<Configuration<'a>, Fault> {
        let mut r = Reader::new(body);
        let [kind, _, _, _] = r.array::<4>().ok_or(Fault::Truncated)?;
        let mut attributes = Vec::new();
        while !r.is_empty() {
            if attributes.len() == MAX_CFG_ATTRIBUTES {
                return Err(Fault::TooMany);
            }
            let (kind, len) = (|| Some((r.u16()?, r.u16()?)))().ok_or(Fault::Truncated)?;
            let value = r.take(usize::from(len)).ok_or(Fault::Truncated)?;
            // RFC 7296 §3.15.1: the top bit is reserved and ignored.
            attributes.push(CfgAttribute { kind: CfgAttributeType(kind & 0x7fff), value });
        }
        Ok(Configuration { kind: CfgType(kind), attributes })
    }

    fn emit(&self, out: &mut Vec<u8>) -> Result<(), BuildError> {
        if self.attributes.len() > MAX_CFG_ATTRIBUTES {
            return Err(BuildError::Count(PayloadType::CP));
        }
        out.extend([self.kind.0, 0, 0, 0]);
        for attribute in &self.attributes {
            let len = u16::try_from(attribute.value.len())
                .map_err(|_| BuildError::TooLong(PayloadType::CP))?;
            out.extend((attribute.kind.0 & 0x7fff).to_be_bytes());
            out.extend(len.to_be_bytes());
            out.extend(attribute.value);
        }
        Ok(())
    }
}

impl<'a> Payload<'a> {
    /// The payload's type.
    #[must_use]
    pub fn kind(&self) -> PayloadType {
        match self {
            Payload::Sa(_) => PayloadType::SA,
            Payload::Ke(_) => PayloadType::KE,
            Payload::IdI(_) => PayloadType::IDI,
            Payload::IdR(_) => PayloadType::IDR,
            Payload::Cert(_) => PayloadType::CERT,
            Payload::CertReq(_) => PayloadType::CERTREQ,
            Payload::Auth(_) => PayloadType::AUTH,
            Payload::Nonce(_) => PayloadType::NONCE,
            Payload::Notify(_) => PayloadType::NOTIFY,
            Payload::Delete(_) => PayloadType::DELETE,
            Payload::VendorId(_) => PayloadType::VENDOR_ID,
            Payload::TsI(_) => PayloadType::TSI,
            Payload::TsR(_) => PayloadType::TSR,
            Payload::Cp(_) => PayloadType::CP,
            Payload::Eap(_) => PayloadType::EAP,
            Payload::Unknown { kind, .. } => *kind,
        }
    }

    /// Reads the body of one payload. Types without a variant become `Unknown`.
    fn parse(kind: PayloadType, body: &'a [u8]) -> Result<Payload<'a>, Fault> {
        let mut r = Reader::new(body);
        Ok(match kind {
            PayloadType::SA => Payload::Sa(parse_proposals(body)?),
            PayloadType::KE => {
                let (group, _) = (|| Some((r.u16()?, r.u16()?)))().ok_or(Fault::Truncated)?;
                Payload::Ke(KeyExchange { group: GroupId(group), data: r.rest() })
            }
            PayloadType::IDI => Payload::IdI(IdPayload::parse(body)?),
            PayloadType::IDR => Payload::IdR(IdPayload::parse(body)?),
            PayloadType::CERT | PayloadType::CERTREQ => {
                let encoding = CertEncoding(r.u8().ok_or(Fault::Truncated)?);
                let certificate = Certificate { encoding, data: r.rest() };
                if kind == PayloadType::CERT {
                    Payload::Cert(certificate)
                } else {
                    Payload::CertReq(certificate)
                }
            }
            PayloadType::AUTH => {
                let [method, _, _, _] = r.array::<4>().ok_or(Fault::Truncated)?;
                Payload::Auth(Auth { method: AuthMethod(method), data: r.rest() })
            }
            PayloadType::NONCE => {
                if !NONCE_LEN.contains(&body.len()) {
                    return Err(Fault::Value);
                }
                Payload::Nonce(body)
            }
            PayloadType::NOTIFY => Payload::Notify(Notify::parse(body)?),
            PayloadType::DELETE => Payload::Delete(Delete::parse(body)?),
            PayloadType::VENDOR_ID => Payload::VendorId(body),
            PayloadType::TSI => Payload::TsI(ts::parse_payload(body)?),
            PayloadType::TSR => Payload::TsR(ts::parse_payload(body)?),
            PayloadType::CP => Payload::Cp(Configuration::parse(body)?),
            PayloadType::EAP => Payload::Eap(body),
            _ => Payload::Unknown { kind, body },
        })
    }

    /// Writes the body, without generic header.
    pub(super) fn emit(&self, out: &mut Vec<u8>) -> Result<(), BuildError> {
        match self {
            Payload::Sa(proposals) => emit_proposals(proposals, out)?,
            Payload::Ke(ke) => {
                out.extend(ke.group.0.to_be_bytes());
                out.extend([0; 2]);
                out.extend(ke.data);
            }
            Payload::IdI(id) | Payload::IdR(id) => id.emit(out),
            Payload::Cert(certificate) | Payload::CertReq(certificate) => {
                out.push(certificate.encoding.0);
                out.extend(certificate.data);
            }
            Payload::Auth(auth) => {
                out.extend([auth.method.0, 0, 0, 0]);
                out.extend(auth.data);
            }
            Payload::Nonce(nonce) if !NONCE_LEN.contains(&nonce.len()) => {
                return Err(BuildError::Value(PayloadType::NONCE));
            }
            Payload::Notify(notify) => notify.emit(out)?,
            Payload::Delete(delete) => delete.emit(out)?,
            Payload::TsI(selectors) | Payload::TsR(selectors) => {
                ts::emit_payload(selectors, out).map_err(|_| BuildError::Count(self.kind()))?;
            }
            Payload::Cp(configuration) => configuration.emit(out)?,
            Payload::Nonce(body)
            | Payload::VendorId(body)
            | Payload::Eap(body)
            | Payload::Unknown { body, .. } => {
                out.extend(*body);
            }
        }
        Ok(())
    }
}

/// The payloads of a message or of the inside of an encrypted one, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Payloads<'a>(Vec<Payload<'a>>);

/// Where a chain ended in an encrypted payload: its type, what its Next Payload says, its content.
pub(super) struct Tail<'a> {
    pub(super) kind: PayloadType,
    pub(super) first: PayloadType,
    pub(super) content: &'a [u8],
}

impl<'a> Payloads<'a> {
    /// Reads a chain that must fill `bytes` exactly. An encrypted payload may only end it, and is given
    /// back unread.
    pub(super) fn parse_chain(
        first: PayloadType,
        bytes: &'a [u8],
    ) -> Result<(Payloads<'a>, Option<Tail<'a>>), ParseError> {
        let mut r = Reader::new(bytes);
        let mut kind = first;
        let mut payloads = Vec::new();
        while kind != PayloadType::NONE {
            let malformed = |fault| ParseError::Malformed { payload: kind, fault };
            if payloads.len() == MAX_PAYLOADS {
                return Err(malformed(Fault::TooMany));
            }
            let (next, flags, len) =
                (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(malformed(Fault::Truncated))?;
            let len =
                usize::from(len).checked_sub(GENERIC_HEADER_LEN).ok_or(malformed(Fault::Length))?;
            let body = r.take(len).ok_or(malformed(Fault::Length))?;
            if matches!(kind, PayloadType::SK | PayloadType::SKF) {
                if !r.is_empty() {
                    return Err(malformed(Fault::Encrypted));
                }
                return Ok((
                    Payloads(payloads),
                    Some(Tail { kind, first: PayloadType(next), content: body }),
                ));
            }
            let payload = Payload::parse(kind, body).map_err(malformed)?;
            // RFC 7296 §2.5: the critical bit counts only for types we do not know.
            if flags & CRITICAL != 0 && matches!(payload, Payload::Unknown { .. }) {
                return Err(ParseError::UnsupportedCritical(kind));
            }
            payloads.push(payload);
            kind = PayloadType(next);
        }
        if r.is_empty() {
            Ok((Payloads(payloads), None))
        } else {
            Err(ParseError::Malformed { payload: PayloadType::NONE, fault: Fault::Trailing })
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> core::slice::Iter<'_, Payload<'a>> {
        self.0.iter()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none, as in a liveness check.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first payload that may appear only once but appears again. A message with one is answered
    /// like any malformed one (security.md, statement 2). Notify, Delete, CERT, CERTREQ, Vendor ID and
    /// unknown payloads may be many.
    #[must_use]
    pub fn doubled(&self) -> Option<PayloadType> {
        let single = |payload: &Payload<'_>| {
            !matches!(
                payload,
                Payload::Notify(_)
                    | Payload::Delete(_)
                    | Payload::Cert(_)
                    | Payload::CertReq(_)
                    | Payload::VendorId(_)
                    | Payload::Unknown { .. }
            )
        };
        // Quadratic, over at most MAX_PAYLOADS.
        let mut rest = self.0.iter();
        while let Some(payload) = rest.next() {
            let kind = payload.kind();
            if single(payload) && rest.clone().any(|later| later.kind() == kind) {
                return Some(kind);
            }
        }
        None
    }
}

macro_rules! first {
    ($($(#[$doc:meta])* $name:ident: $variant:ident($type:ty),)*) => {
        impl<'a> Payloads<'a> {
            $($(#[$doc])*
            #[must_use]
            pub fn $name(&self) -> Option<&$type> {
                self.0.iter().find_map(|payload| match payload {
                    Payload::$variant(content) => Some(content),
                    _ => None,
                })
            })*
        }
    };
}

first! {
    /// The proposals of the SA payload.
    sa: Sa(Vec<Proposal>),
    /// The KE payload.
    ke: Ke(KeyExchange<'a>),
    /// The IDi payload.
    id_i: IdI(IdPayload<'a>),
    /// The IDr payload.
    id_r: IdR(IdPayload<'a>),
    /// The AUTH payload.
    auth: Auth(Auth<'a>),
    /// The selectors of the TSi payload.
    ts_i: TsI(Vec<TrafficSelector>),
    /// The selectors of the TSr payload.
    ts_r: TsR(Vec<TrafficSelector>),
    /// The Configuration payload.
    cp: Cp(Configuration<'a>),
}

impl<'a> Payloads<'a> {
    /// The nonce, 16 to 256 bytes.
    #[must_use]
    pub fn nonce(&self) -> Option<&'a [u8]> {
        self.0.iter().find_map(|payload| match payload {
            Payload::Nonce(nonce) => Some(*nonce),
            _ => None,
        })
    }

    /// The EAP message.
    #[must_use]
    pub fn eap(&self) -> Option<&'a [u8]> {
        self.0.iter().find_map(|payload| match payload {
            Payload::Eap(message) => Some(*message),
            _ => None,
        })
    }

    /// All Notify payloads.
    pub fn notifies(&self) -> impl Iterator<Item = &Notify<'a>> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Notify(notify) => Some(notify),
            _ => None,
        })
    }

    /// The first Notify of a kind.
    #[must_use]
    pub fn notify(&self, kind: NotifyType) -> Option<&Notify<'a>> {
        self.notifies().find(|notify| notify.kind == kind)
    }

    /// The first Notify that reports an error.
    #[must_use]
    pub fn error(&self) -> Option<&Notify<'a>> {
        self.notifies().find(|notify| notify.kind.is_error())
    }

    /// All Delete payloads.
    pub fn deletes(&self) -> impl Iterator<Item = &Delete> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Delete(delete) => Some(delete),
            _ => None,
        })
    }

    /// All Vendor ids.
    pub fn vendor_ids(&self) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::VendorId(id) => Some(*id),
            _ => None,
        })
    }

    /// All CERT payloads.
    pub fn certs(&self) -> impl Iterator<Item = &Certificate<'a>> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Cert(certificate) => Some(certificate),
            _ => None,
        })
    }
}

impl<'a, 'b> IntoIterator for &'b Payloads<'a> {
    type Item = &'b Payload<'a>;
    type IntoIter = core::slice::Iter<'b, Payload<'a>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

//! The codec of replicated state: minicbor with numbered fields, behind one
//! leading byte that names the format.
//!
//! | format | body | key |
//! | --- | --- | --- |
//! | 1 | an IKE SA | our SPI |
//! | 2 | an IKE SA, as in format 1, or a note (`note`) | our SPI, or [`note_key`] |
//!
//! Format 1 has no notes: who writes it leaves them out, and a takeover forgets
//! them. Both are read and written; which is written is said from outside
//! ([`crate::Endpoint::set_format`]), by what the other instance can read.
//!
//! Two things are special. Points in time are written as **ages** (milliseconds
//! relative to "now"), so that a record means the same on a host with another
//! clock. And the buffer is sized before it is written, because a growing
//! vector would leave unwiped copies of keys behind.

use core::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use std::sync::Arc;

use crypto::{Secret, aead::AeadAlg, dh::Group, prf::PrfAlg};
use minicbor::{
    Decode, Decoder, Encode, Encoder,
    decode::Error as DecodeError,
    encode::{Error as EncodeError, Write},
};
use wire::{
    id::{EspSpi, IkeSpi},
    ts::{self, TrafficSelector},
};
use zeroize::Zeroizing;

use crate::{keys::Key, note::Note, state::IkeSa};

/// The oldest format that is read and written.
pub const OLDEST_FORMAT: u8 = 1;
/// The newest one.
pub const NEWEST_FORMAT: u8 = 2;
/// The first one with notes.
pub(crate) const NOTES_FORMAT: u8 = 2;

/// Why a record was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a release whose format we do not know.
    #[error("record format {0} is not known here, or is held back")]
    Format(u8),
    /// Not a record, or a damaged one.
    #[error("record does not decode")]
    Malformed,
    /// Its own SPI is not the one it is filed under.
    #[error("record is filed under another SPI")]
    Key,
    /// Our configuration has no such connection.
    #[error("record of an unknown connection")]
    Connection,
    /// We own the endpoint: nobody else's records count.
    #[error("records are not for the owner")]
    Owner,
}

/// "Now" while encoding or decoding, in milliseconds of the local clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(pub(crate) i64);

impl Clock {
    pub(crate) fn at(now: Duration) -> Self {
        Self(Stamp::at(now).0)
    }
}

/// What the derived codecs ask of their context.
pub(crate) trait Now {
    fn now(&self) -> i64;
}

impl Now for Clock {
    fn now(&self) -> i64 {
        self.0
    }
}

/// A point in time: milliseconds of the local clock, below zero for what
/// happened before this host booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(i64);

impl Stamp {
    pub(crate) fn at(now: Duration) -> Self {
        Self(i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
    }

    pub(crate) fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Time from `self` to `now`; zero if it lies ahead.
    pub(crate) fn age(self, now: Duration) -> Duration {
        let ms = Self::at(now).0.saturating_sub(self.0);
        Duration::from_millis(u64::try_from(ms).unwrap_or(0))
    }

    /// Time from `now` to `self`; zero if it is past.
    pub(crate) fn until(self, now: Duration) -> Duration {
        let ms = self.0.saturating_sub(Self::at(now).0);
        Duration::from_millis(u64::try_from(ms).unwrap_or(0))
    }

    pub(crate) fn is_due(self, now: Duration) -> bool {
        self.0 <= Self::at(now).0
    }

    /// As a deadline on the local clock.
    pub(crate) fn deadline(self) -> Duration {
        Duration::from_millis(u64::try_from(self.0).unwrap_or(0))
    }
}

impl<C: Now> Encode<C> for Stamp {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, c: &mut C) -> Result<(), EncodeError<W::Error>> {
        e.i64(self.0.saturating_sub(c.now()))?.ok()
    }
}

impl<'b, C: Now> Decode<'b, C> for Stamp {
    fn decode(d: &mut Decoder<'b>, c: &mut C) -> Result<Self, DecodeError> {
        Ok(Self(d.i64()?.saturating_add(c.now())))
    }
}

impl<C> Encode<C> for Key {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), EncodeError<W::Error>> {
        e.bytes(self.expose())?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Key {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, DecodeError> {
        Ok(Self::new(Secret::from_slice(d.bytes()?)))
    }
}

/// Bytes of a message, a nonce or a cookie, shared between copies of a state.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bytes(Arc<[u8]>);

impl Bytes {
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl core::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl core::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl<C> Encode<C> for Bytes {
    fn encode<W: Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), EncodeError<W::Error>> {
        e.bytes(&self.0)?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Bytes {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, DecodeError> {
        Ok(Self(d.bytes()?.into()))
    }
}

/// How a foreign type is written: through a type that minicbor knows.
macro_rules! via {
    ($module:ident, $type:ty, $raw:ty, $to:expr, $from:expr) => {
        pub(crate) mod $module {
            use super::*;

            pub(crate) fn encode<C, W: Write>(
                value: &$type,
                e: &mut Encoder<W>,
                c: &mut C,
            ) -> Result<(), EncodeError<W::Error>> {
                let to: fn(&$type) -> $raw = $to;
                to(value).encode(e, c)
            }

            pub(crate) fn decode<'b, C>(
                d: &mut Decoder<'b>,
                c: &mut C,
            ) -> Result<$type, DecodeError> {
                let raw = <$raw>::decode(d, c)?;
                let from: fn($raw) -> Option<$type> = $from;
                from(raw).ok_or_else(|| DecodeError::message("value out of range"))
            }
        }
    };
}

via!(ike_spi, IkeSpi, u64, |v| v.0, |raw| Some(IkeSpi(raw)));
via!(esp_spi, EspSpi, u32, |v| v.0, |raw| Some(EspSpi(raw)));
via!(opt_esp_spi, Option<EspSpi>, Option<u32>, |v| v.map(|s| s.0), |raw| Some(raw.map(EspSpi)));
via!(esp_spis, Vec<EspSpi>, Vec<u32>, |v| v.iter().map(|s| s.0).collect(), |raw| Some(
    raw.into_iter().map(EspSpi).collect()
));
via!(
    aead,
    AeadAlg,
    (u16, u16),
    |v| {
        let (id, bits) = v.transform();
        (id, bits.unwrap_or(0))
    },
    |(id, bits)| AeadAlg::from_transform(id, (bits != 0).then_some(bits))
);
via!(prf, PrfAlg, u16, |v| v.transform_id(), PrfAlg::from_transform_id);
via!(group, Group, u16, |v| v.transform_id(), Group::from_transform_id);
via!(opt_group, Option<Group>, u16, |v| v.map_or(0, Group::transform_id), |raw| if raw == 0 {
    Some(None)
} else {
    Group::from_transform_id(raw).map(Some)
});
via!(
    address,
    SocketAddr,
    (minicbor::bytes::ByteVec, u16),
    |v| {
        let octets = match v.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        (octets.into(), v.port())
    },
    |(octets, port)| {
        let ip = if let Ok(v4) = <[u8; 4]>::try_from(octets.as_slice()) {
            IpAddr::from(v4)
        } else {
            IpAddr::from(<[u8; 16]>::try_from(octets.as_slice()).ok()?)
        };
        Some(SocketAddr::new(ip, port))
    }
);
via!(
    selectors,
    Vec<TrafficSelector>,
    minicbor::bytes::ByteVec,
    |v| {
        let mut bytes = Vec::new();
        // Lists longer than a payload can hold are never made; an empty one is
        // written as no bytes.
        if ts::emit_payload(v, &mut bytes).is_err() {
            bytes.clear();
        }
        bytes.into()
    },
    |raw| if raw.is_empty() { Some(Vec::new()) } else { ts::parse_payload(&raw).ok() }
);

/// A flag that is written only when it is set, so that records of builds that did
/// not know it are read, and written again, as they were.
pub(crate) mod flag {
    use super::*;

    pub(crate) fn encode<C, W: Write>(
        value: &bool,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        e.bool(*value)?.ok()
    }

    pub(crate) fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<bool, DecodeError> {
        d.bool()
    }

    pub(crate) fn is_nil(value: &bool) -> bool {
        !value
    }

    pub(crate) fn nil() -> Option<bool> {
        Some(false)
    }
}

/// Counts what would be written.
struct Counter(usize);

impl Write for Counter {
    type Error = core::convert::Infallible;
    fn write_all(&mut self, buf: &[u8]) -> Result<(), Self::Error> {
        self.0 += buf.len();
        Ok(())
    }
}

/// Writes into a vector that never grows.
struct Filler(Zeroizing<Vec<u8>>);

impl Write for Filler {
    type Error = core::convert::Infallible;
    fn write_all(&mut self, buf: &[u8]) -> Result<(), Self::Error> {
        self.0.extend_from_slice(buf);
        Ok(())
    }
}

/// What a record holds.
#[derive(Debug)]
pub(crate) enum Record {
    Sa(Box<IkeSa>),
    Note(Note),
}

/// In a body of format 2: what it is.
const SA: u8 = 0;
const NOTE: u8 = 1;

/// The record of one IKE SA.
pub(crate) fn encode(sa: &IkeSa, format: u8, now: Duration) -> Zeroizing<Vec<u8>> {
    let kind = (format >= NOTES_FORMAT).then_some(SA);
    write(format, kind, sa, now)
}

/// The record of a note; there are none before format 2.
pub(crate) fn encode_note(note: &Note, format: u8, now: Duration) -> Option<Zeroizing<Vec<u8>>> {
    (format >= NOTES_FORMAT).then(|| write(format, Some(NOTE), note, now))
}

fn write<T: Encode<Clock>>(
    format: u8,
    kind: Option<u8>,
    value: &T,
    now: Duration,
) -> Zeroizing<Vec<u8>> {
    let mut clock = Clock::at(now);
    // Neither writer can fail, and no codec above makes errors of its own.
    let mut counter = Counter(0);
    let _ = value.encode(&mut Encoder::new(&mut counter), &mut clock);
    let mut filler = Filler(Zeroizing::new(Vec::with_capacity(counter.0 + 2)));
    filler.0.push(format);
    filler.0.extend(kind);
    let _ = value.encode(&mut Encoder::new(&mut filler), &mut clock);
    filler.0
}

/// What a record holds, if its format is at most `newest`.
pub(crate) fn decode(bytes: &[u8], newest: u8, now: Duration) -> Result<Record, RecordError> {
    let (&format, mut body) = bytes.split_first().ok_or(RecordError::Malformed)?;
    if !(OLDEST_FORMAT..=newest).contains(&format) {
        return Err(RecordError::Format(format));
    }
    let mut kind = SA;
    if format >= NOTES_FORMAT {
        (kind, body) = body.split_first().map(|(k, b)| (*k, b)).ok_or(RecordError::Malformed)?;
    }
    match kind {
        SA => Ok(Record::Sa(Box::new(read(body, now)?))),
        NOTE => Ok(Record::Note(read(body, now)?)),
        _ => Err(RecordError::Malformed),
    }
}

fn read<'b, T: Decode<'b, Clock>>(body: &'b [u8], now: Duration) -> Result<T, RecordError> {
    let mut decoder = Decoder::new(body);
    let value = T::decode(&mut decoder, &mut Clock::at(now)).map_err(|_| RecordError::Malformed)?;
    if decoder.position() == body.len() { Ok(value) } else { Err(RecordError::Malformed) }
}

/// The key of a connection's note. SPIs are drawn so that none is one of these.
pub(crate) fn note_key(connection: &str) -> IkeSpi {
    let hash = crypto::hash::sha256(&[b"tandem note ", connection.as_bytes()]);
    IkeSpi(u64::from_be_bytes(*hash.first_chunk().unwrap_or(&[0; 8])))
}

//! What crosses the pair link: heartbeats and frames, as CBOR with numbered fields.
//!
//! | release | frames | the gateway's values (`ike`'s records) |
//! | --- | --- | --- |
//! | 1 | as the golden records of release 1 | format 1 |
//! | 2 | `Hello` also names the build | format 2 |
//!
//! Fields are never renumbered; a new release may add fields at the end, which an older reader
//! skips. `Hello` is the one frame that every release reads, for it settles the release. The bytes
//! are authenticated before they come here, yet nothing is trusted: sizes, counts and numbers are
//! checked once, where bytes become a value, and trailing bytes are refused.
//!
//! Endpoints are named by a hash of their name, so that two instances whose configs differ still
//! agree on who owns what.

use crate::config::{BATCH_MAX, ENDPOINTS_MAX, FRAME_MAX, HEARTBEAT_MAX, SIDE_MAX, VALUE_MAX};
use crate::types::{Batch, Lineage, Position, Term, Value};
use minicbor::{Decode, Encode};
use zeroize::Zeroizing;

/// The newest release whose formats this build speaks.
pub const RELEASE: u32 = 2;
/// The oldest one.
pub const OLDEST: u32 = 1;
/// The first one whose hello names the build.
pub(crate) const BUILD_SINCE: u32 = 2;

/// Numbers above this are no terms or positions, but damage: they leave room to count on.
const NUMBER_MAX: u64 = 1 << 62;
/// Longest instance name, in bytes.
const NAME_MAX: usize = 256;

/// What a sender claims to be for one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum ClaimRole {
    /// It holds no state.
    #[default]
    #[n(0)]
    Empty,
    /// It holds state and follows.
    #[n(1)]
    Shadow,
    /// It owns.
    #[n(2)]
    Owner,
    /// It owned, lost after a split, and owes the winner its tail.
    #[n(3)]
    Yielding,
}

/// One endpoint in a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Claim {
    /// Hash of the endpoint's name.
    #[n(0)]
    pub(crate) id: u64,
    #[n(1)]
    pub(crate) role: ClaimRole,
    /// The term owned, or of the state held.
    #[n(2)]
    pub(crate) term: Term,
    #[n(3)]
    pub(crate) lineage: Lineage,
    /// Owner: the shadow's state is exact. Shadow: ours is.
    #[n(4)]
    pub(crate) synced: bool,
    #[n(5)]
    pub(crate) position: Position,
    #[n(6)]
    pub(crate) digest: u64,
    /// The uplink works.
    #[n(7)]
    pub(crate) uplink: bool,
    /// Owner: the term offered to the other; 0 if none.
    #[n(8)]
    pub(crate) offered: Term,
    /// The highest offered term that was refused.
    #[n(9)]
    pub(crate) refused: Term,
    /// The highest term this instance knows of, its reserved ones included.
    #[n(10)]
    pub(crate) top: Term,
    /// The highest term it has used, heard or refused: an offer must be above.
    #[n(11)]
    pub(crate) floor: Term,
    /// The highest offered term that was taken by its grant. (An owner by silence may bear the very
    /// number that the other was about to grant.)
    #[n(12)]
    pub(crate) taken: Term,
    /// Not to be handed to this instance unasked: it drains, or an operator moved it away. Absent
    /// in older releases, and for false.
    #[n(13)]
    pub(crate) declines: Option<bool>,
    /// This instance drains: nothing is to be handed to it, asked or not. Absent likewise.
    #[n(14)]
    pub(crate) drains: Option<bool>,
}

/// A heartbeat. Times are nanoseconds on the clock of whoever sent them first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Heartbeat {
    #[n(0)]
    pub(crate) index: u8,
    #[n(1)]
    pub(crate) release: u32,
    /// Drawn at the sender's start.
    #[n(2)]
    pub(crate) boot: u64,
    /// The boot of the instance it is meant for.
    #[n(3)]
    pub(crate) to: u64,
    /// Grows over all links.
    #[n(4)]
    pub(crate) number: u64,
    /// When it was sent; grows with `number`.
    #[n(5)]
    pub(crate) sent_at: u64,
    /// `sent_at` of the newest heard from the other; 0 if none.
    #[n(6)]
    pub(crate) echo: u64,
    /// How long ago that was heard.
    #[n(7)]
    pub(crate) held: u64,
    #[n(8)]
    pub(crate) config_digest: u64,
    #[n(9)]
    pub(crate) claims: Vec<Claim>,
}

/// The first frame each way. Every release reads it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Hello {
    #[n(0)]
    pub(crate) release: u32,
    #[n(1)]
    pub(crate) oldest: u32,
    #[n(2)]
    pub(crate) index: u8,
    #[n(3)]
    pub(crate) name: String,
    #[n(4)]
    pub(crate) boot: u64,
    #[n(5)]
    pub(crate) config_digest: u64,
    #[n(6)]
    pub(crate) claims: Vec<Claim>,
    /// What the sender calls its build, for people. Release 1 has no such field, and skips it.
    #[n(7)]
    pub(crate) build: Option<String>,
}

/// A key and its value.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Put {
    #[n(0)]
    pub(crate) key: u64,
    #[cbor(n(1), with = "value")]
    pub(crate) value: Value,
}

/// A key of a loser's tail.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct TailPut {
    #[n(0)]
    pub(crate) key: u64,
    #[n(1)]
    pub(crate) removed: bool,
    #[cbor(n(2), with = "value")]
    pub(crate) value: Value,
}

/// One piece of a snapshot.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Chunk {
    #[n(0)]
    pub(crate) id: u64,
    #[n(1)]
    pub(crate) term: Term,
    #[n(2)]
    pub(crate) lineage: Lineage,
    /// Names the snapshot; grows.
    #[n(3)]
    pub(crate) snap: u64,
    /// Counts pieces from 0.
    #[n(4)]
    pub(crate) part: u64,
    /// Where the log was cut.
    #[n(5)]
    pub(crate) position: Position,
    /// The digest of the whole.
    #[n(6)]
    pub(crate) digest: u64,
    #[n(7)]
    pub(crate) last: bool,
    #[n(8)]
    pub(crate) puts: Vec<Put>,
}

/// One record of the log.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Record {
    #[n(0)]
    pub(crate) id: u64,
    #[n(1)]
    pub(crate) term: Term,
    #[n(2)]
    pub(crate) position: Position,
    #[n(3)]
    pub(crate) puts: Vec<Put>,
    #[n(4)]
    pub(crate) deletes: Vec<u64>,
}

/// One piece of a grant.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Grant {
    #[n(0)]
    pub(crate) id: u64,
    /// The term of the owner that grants.
    #[n(1)]
    pub(crate) from: Term,
    /// The term granted.
    #[n(2)]
    pub(crate) term: Term,
    #[n(3)]
    pub(crate) position: Position,
    #[n(4)]
    pub(crate) part: u64,
    #[n(5)]
    pub(crate) last: bool,
    #[cbor(n(6), with = "value")]
    pub(crate) counters: Value,
}

/// One piece of what a loser hands over after a split.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Handover {
    #[n(0)]
    pub(crate) id: u64,
    /// The term the loser had.
    #[n(1)]
    pub(crate) term: Term,
    #[n(2)]
    pub(crate) part: u64,
    #[n(3)]
    pub(crate) last: bool,
    #[n(4)]
    pub(crate) tail: Vec<TailPut>,
    #[cbor(n(5), with = "value")]
    pub(crate) counters: Value,
}

/// What the stream carries, in order.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Frame {
    #[n(0)]
    Hello(#[n(0)] Hello),
    #[n(1)]
    Chunk(#[n(0)] Chunk),
    /// A piece of a snapshot has arrived: flow control, not commitment.
    #[n(2)]
    ChunkAck {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
        #[n(2)]
        snap: u64,
        #[n(3)]
        part: u64,
    },
    #[n(3)]
    Record(#[n(0)] Record),
    /// Installed, also in the workers: every record up to `position`, and the snapshot `snap`.
    #[n(4)]
    Ack {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
        #[n(2)]
        position: Position,
        #[n(3)]
        snap: u64,
    },
    #[n(5)]
    Side {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
        /// 0 if no acknowledgement is wanted.
        #[n(2)]
        side: u64,
        #[cbor(n(3), with = "value")]
        bytes: Value,
    },
    #[n(6)]
    SideAck {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
        #[n(2)]
        side: u64,
    },
    #[n(7)]
    Grant(#[n(0)] Grant),
    /// The offer was taken.
    #[n(8)]
    Owned {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
    },
    /// The offer was refused, for ever.
    #[n(9)]
    Refused {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
    },
    #[n(10)]
    Handover(#[n(0)] Handover),
    /// The shadow cannot go on from what it holds: send a snapshot.
    #[n(11)]
    Resync {
        #[n(0)]
        id: u64,
        #[n(1)]
        term: Term,
    },
}

/// Bytes that may be keys: wiped when dropped, on both ends.
mod value {
    use super::Value;
    use minicbor::decode::{Decoder, Error};
    use minicbor::encode::{self, Encoder, Write};
    use zeroize::Zeroizing;

    pub(super) fn encode<C, W: Write>(
        value: &Value,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.bytes(value)?;
        Ok(())
    }

    pub(super) fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<Value, Error> {
        Ok(Zeroizing::new(d.bytes()?.to_vec()))
    }
}

/// Why bytes are not a legal message; the text names the rule, never the content.
pub(crate) type Malformed = &'static str;

/// Decodes and checks a heartbeat.
pub(crate) fn heartbeat(bytes: &[u8]) -> Result<Heartbeat, Malformed> {
    if bytes.len() > HEARTBEAT_MAX {
        return Err("heartbeat too long");
    }
    let heartbeat: Heartbeat = whole(bytes, "heartbeat")?;
    claims(&heartbeat.claims)?;
    if heartbeat.sent_at == 0 || heartbeat.sent_at > NUMBER_MAX || heartbeat.held > NUMBER_MAX {
        return Err("heartbeat's times out of range");
    }
    Ok(heartbeat)
}

/// Decodes and checks a frame.
pub(crate) fn frame(bytes: &[u8]) -> Result<Frame, Malformed> {
    if bytes.len() > FRAME_MAX {
        return Err("frame too long");
    }
    let frame: Frame = whole(bytes, "frame")?;
    match &frame {
        Frame::Hello(hello) => {
            let build = hello.build.as_deref().unwrap_or_default();
            if hello.name.len() > NAME_MAX || build.len() > NAME_MAX {
                return Err("name too long");
            }
            claims(&hello.claims)?;
        }
        Frame::Chunk(chunk) => {
            number(chunk.term.0)?;
            number(chunk.position.0)?;
            puts(&chunk.puts)?;
        }
        Frame::Record(record) => {
            number(record.term.0)?;
            number(record.position.0)?;
            puts(&record.puts)?;
        }
        Frame::Grant(grant) => {
            number(grant.term.0)?;
            number(grant.position.0)?;
        }
        Frame::Handover(handover)
            if handover.tail.iter().any(|item| item.value.len() > VALUE_MAX) =>
        {
            return Err("value too long");
        }
        Frame::Side { bytes, .. } if bytes.len() > SIDE_MAX => return Err("side message too long"),
        Frame::Ack { position, .. } => number(position.0)?,
        _ => {}
    }
    Ok(frame)
}

fn whole<'b, T: Decode<'b, ()>>(bytes: &'b [u8], what: Malformed) -> Result<T, Malformed> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let value = decoder.decode().map_err(|_| what)?;
    if decoder.position() == bytes.len() { Ok(value) } else { Err("trailing bytes") }
}

fn claims(claims: &[Claim]) -> Result<(), Malformed> {
    if claims.len() > ENDPOINTS_MAX {
        return Err("too many endpoints");
    }
    for claim in claims {
        for n in [
            claim.term.0,
            claim.position.0,
            claim.offered.0,
            claim.refused.0,
            claim.top.0,
            claim.floor.0,
        ] {
            number(n)?;
        }
    }
    Ok(())
}

fn number(n: u64) -> Result<(), Malformed> {
    if n > NUMBER_MAX { Err("number out of range") } else { Ok(()) }
}

fn puts(puts: &[Put]) -> Result<(), Malformed> {
    if puts.iter().any(|put| put.value.len() > VALUE_MAX) {
        return Err("value too long");
    }
    Ok(())
}

/// Encodes a heartbeat.
pub(crate) fn encode_heartbeat(heartbeat: &Heartbeat) -> Vec<u8> {
    let mut out = Vec::with_capacity(96 + 96 * heartbeat.claims.len());
    // Writing to a vector cannot fail.
    let _ = minicbor::encode(heartbeat, &mut out);
    out
}

/// Encodes a frame. The room is taken at once, because a vector that grows leaves copies behind.
pub(crate) fn encode(frame: &Frame) -> Value {
    let body = match frame {
        Frame::Chunk(chunk) => size(&chunk.puts),
        Frame::Record(record) => size(&record.puts) + 9 * record.deletes.len(),
        Frame::Grant(grant) => grant.counters.len(),
        Frame::Handover(handover) => {
            handover.counters.len()
                + handover.tail.iter().map(|item| item.value.len() + 20).sum::<usize>()
        }
        Frame::Side { bytes, .. } => bytes.len(),
        Frame::Hello(hello) => 600 + 96 * hello.claims.len(),
        _ => 0,
    };
    let mut out = Zeroizing::new(Vec::with_capacity(body + 160));
    // Writing to a vector cannot fail.
    let _ = minicbor::encode(frame, &mut *out);
    out
}

fn size(puts: &[Put]) -> usize {
    puts.iter().map(|put| put.value.len() + 20).sum()
}

/// Whether a record stays within the limits.
pub(crate) fn fits(batch: &Batch) -> bool {
    let bytes: usize = batch.puts.iter().map(|(_, value)| value.len() + 16).sum();
    batch.puts.iter().all(|(_, value)| value.len() <= VALUE_MAX)
        && bytes + 16 * batch.deletes.len() <= BATCH_MAX
}

#[cfg(test)]
mod tests;

//! TCP segments that may be merged (RFC 9293 §3.1).

use wire::ip::{TCP_HEADER_LEN, Tcp};

use super::ip::same;

/// Shorter segments are not worth a split, and some network cards refuse to make them.
pub(super) const LEAST_PAYLOAD: usize = 128;

/// Of the flags in a header.
const FLAGS_AT: usize = 13;

/// What of a segment decides, beside its headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) header_len: usize,
    pub(super) payload_len: usize,
    pub(super) seq: u32,
    pub(super) push: bool,
}

impl Segment {
    /// `None` for every segment that passes as it is. The checksum is not looked at.
    pub(super) fn parse(segment: &[u8]) -> Option<Self> {
        let tcp = Tcp::parse(segment)?;
        let plain = tcp.flags & !Tcp::PSH == Tcp::ACK && !tcp.payload.is_empty();
        plain.then_some(Self {
            header_len: TCP_HEADER_LEN + tcp.options.len(),
            payload_len: tcp.payload.len(),
            seq: tcp.seq,
            push: tcp.flags & Tcp::PSH != 0,
        })
    }

    /// Whether the headers of two segments agree in all that a split copies.
    pub(super) fn same(&self, a: &[u8], b: &[u8]) -> bool {
        // All but sequence number, flags (see `parse`) and checksum.
        same(a, b, 0, 4)
            && same(a, b, 8, FLAGS_AT)
            && same(a, b, 14, 16)
            && same(a, b, 18, self.header_len)
    }
}

/// Adds the PSH that the last segment of a run had.
pub(super) fn push(header: &mut [u8]) -> Option<()> {
    *header.get_mut(FLAGS_AT)? |= Tcp::PSH;
    Some(())
}

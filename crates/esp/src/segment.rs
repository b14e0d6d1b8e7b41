//! Splitting: what the host handed over as one large packet (a TCP stream's bytes, or UDP datagrams of one length)
//! becomes the packets that it stands for, each written where it is then sealed. One pass copies the payload and sums
//! it up.
//!
//! ```text
//!   read:    | vnet | IP | TCP seq=S | payload 1 | payload 2 | … | last |
//!   slots:   | IP | TCP seq=S | payload 1 |   | IP | TCP seq=S+n | payload 2 |   …
//! ```
//! Lengths, IPv4 identification, sequence numbers and checksums become those of the part (as Linux does it, and as
//! [`crate::coalesce`] undoes it): FIN and PSH stay with the last segment alone, CWR with the first (RFC 3168 §6.1.2,
//! whose sender sets it on one packet). A packet that is whole is a run of one; if its checksum was left to us, it is
//! completed. Pure functions over borrowed bytes: no I/O, no allocation.

use wire::ip::{self, IPV6_HEADER_LEN, Sum, Tcp, UDP_HEADER_LEN, copy_and_sum};
use wire::vnet::{Carried, Offload};

use crate::bytes::{put, word};

/// How far the splitting of one packet has come. The packet itself is given to every call.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    form: Form,
    /// Bytes of the packet.
    total: usize,
    /// Payload bytes done, or for a whole packet, all.
    done: usize,
    /// Packets made.
    count: u16,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    /// As it is, but for a checksum over the bytes from the first place on, written at the second.
    Whole(Option<(usize, usize)>),
    Split {
        carried: Carried,
        ipv6: bool,
        transport_at: usize,
        header_len: usize,
        segment_len: usize,
        /// Of the pseudo-header, all but the length.
        pseudo: Sum,
    },
}

impl Segments {
    /// Begins with a packet as it was read. `None` if the packet is not what `offload` says.
    #[must_use]
    pub fn new(packet: &[u8], offload: Offload) -> Option<Self> {
        let form = match offload {
            Offload::None => Form::Whole(None),
            Offload::Checksum { from, at } => {
                packet.get(from..)?.get(at.checked_sub(from)?..)?.get(..2)?;
                Form::Whole(Some((from, at)))
            }
            Offload::Segments { carried, segment_len, transport_at } => {
                split_form(packet, carried, segment_len, transport_at)?
            }
            Offload::Unknown => return None,
        };
        Some(Self { form, total: packet.len(), done: 0, count: 0 })
    }

    /// How many packets it stands for.
    #[must_use]
    pub fn packets(&self) -> usize {
        match self.form {
            Form::Whole(_) => 1,
            Form::Split { header_len, segment_len, .. } => {
                self.total.saturating_sub(header_len).div_ceil(segment_len.max(1))
            }
        }
    }

    /// Whether all of it was written.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match self.form {
            Form::Whole(_) => self.count > 0,
            Form::Split { header_len, .. } => self.done + header_len >= self.total,
        }
    }

    /// Writes the next part of `packet`, which must be the one it began with, and gives its length. `None`, and
    /// nothing is left, when all is done or a part does not fit.
    pub fn next_into(&mut self, packet: &[u8], room: &mut [u8]) -> Option<usize> {
        let written = self.write(packet, room);
        if written.is_none() {
            (self.done, self.count) = (self.total, u16::MAX);
        }
        written
    }

    fn write(&mut self, packet: &[u8], room: &mut [u8]) -> Option<usize> {
        if self.is_done() || packet.len() != self.total {
            return None;
        }
        match self.form {
            Form::Whole(checksum) => {
                let to = room.get_mut(..packet.len())?;
                match checksum {
                    None => to.copy_from_slice(packet),
                    Some((from, at)) => complete(packet, to, from, at)?,
                }
                self.count = 1;
                Some(packet.len())
            }
            Form::Split { carried, ipv6, transport_at, header_len, segment_len, pseudo } => {
                let payload = packet.get(header_len + self.done..)?;
                let last = payload.len() <= segment_len;
                let payload = payload.get(..segment_len.min(payload.len()))?;
                let length = header_len + payload.len();
                let to = room.get_mut(..length)?;
                let (header, body) = to.split_at_mut_checked(header_len)?;
                header.copy_from_slice(packet.get(..header_len)?);
                let summed = copy_and_sum(body, payload);

                if ipv6 {
                    let rest = u16::try_from(length - IPV6_HEADER_LEN).ok()?;
                    put(header, 4, rest)?;
                } else {
                    put(header, 2, u16::try_from(length).ok()?)?;
                    let id = word(header, 4)?.wrapping_add(self.count);
                    put(header, 4, id)?;
                    let sum = ip::ipv4_header_checksum(header)?;
                    put(header, 10, sum)?;
                }
                let transport = header.get_mut(transport_at..)?;
                let transport_len = u16::try_from(length - transport_at).ok()?;
                match carried {
                    Carried::Tcp => {
                        let seq = u32::from_be_bytes(*transport.get(4..)?.first_chunk()?);
                        let seq = seq.wrapping_add(self.done as u32);
                        transport.get_mut(4..8)?.copy_from_slice(&seq.to_be_bytes());
                        let flags = transport.get_mut(13)?;
                        if !last {
                            *flags &= !(Tcp::FIN | Tcp::PSH);
                        }
                        if self.count > 0 {
                            *flags &= !Tcp::CWR;
                        }
                    }
                    Carried::Udp => put(transport, 4, transport_len)?,
                }
                let at = carried.checksum_at();
                put(transport, at, 0)?;
                let sum = Sum::of(transport).add(pseudo).add_u16(transport_len).add(summed);
                put(transport, at, never_zero(sum.finish()))?;

                self.done += payload.len();
                self.count = self.count.saturating_add(1);
                Some(length)
            }
        }
    }
}

fn split_form(
    packet: &[u8],
    carried: Carried,
    segment_len: usize,
    transport_at: usize,
) -> Option<Form> {
    let first = packet.first()?;
    let ipv6 = match first >> 4 {
        4 => (usize::from(first & 0xf) * 4 == transport_at).then_some(false)?,
        6 => (transport_at >= IPV6_HEADER_LEN).then_some(true)?,
        _ => return None,
    };
    let transport = packet.get(transport_at..)?;
    let transport_len = match carried {
        Carried::Tcp => usize::from(transport.get(12)? >> 4) * 4,
        Carried::Udp => UDP_HEADER_LEN,
    };
    let header_len = transport_at + transport_len;
    let least = if carried == Carried::Tcp { ip::TCP_HEADER_LEN } else { UDP_HEADER_LEN };
    if transport_len < least || segment_len == 0 || packet.len() <= header_len {
        return None;
    }
    // Whoever left the checksum to us has put the sum of the pseudo-header in its place, which is right also where the
    // destination in the header is not yet the last one (RFC 8200 §8.1, a routing header). Its length is the whole's,
    // taken off by adding the complement (RFC 1624 §3).
    let whole_len = u16::try_from(transport.len()).ok()?;
    let pseudo = Sum::ZERO.add_u16(word(transport, carried.checksum_at())?).add_u16(!whole_len);
    Some(Form::Split { carried, ipv6, transport_at, header_len, segment_len, pseudo })
}

/// Copies a packet whose checksum field holds the sum of the pseudo-header.
fn complete(packet: &[u8], to: &mut [u8], from: usize, at: usize) -> Option<()> {
    let (before, covered) = packet.split_at_checked(from)?;
    let (to_before, to_covered) = to.split_at_mut_checked(from)?;
    to_before.copy_from_slice(before);
    let sum = copy_and_sum(to_covered, covered);
    put(to, at, never_zero(sum.finish()))
}

/// UDP's zero means that there is no checksum (RFC 768); for TCP the two are the same (RFC 1071 §1).
fn never_zero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

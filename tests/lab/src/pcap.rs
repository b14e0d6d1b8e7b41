//! Reading what tcpdump wrote: the classic pcap file, Ethernet, ARP, IPv4, IPv6, UDP, ESP and IKE headers.
//!
//! This is a reader of its own on purpose: it shares no code with what it judges. ESP: RFC 4303 §2 (SPI,
//! sequence number) and RFC 4106 §3.1 (explicit IV of 8 bytes); ESP in UDP: RFC 3948 §2; IKE: RFC 7296 §3.1, §3.14.

use crate::error::{Error, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// A captured frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// When, as the file says (CLOCK_REALTIME).
    pub at: Duration,
    /// The bytes that were kept.
    pub bytes: &'a [u8],
    /// The frame's full length.
    pub full_length: u32,
}

/// The frames of a pcap file. A record that was cut off (tcpdump was killed) ends the list.
pub fn frames(file: &[u8]) -> Result<Vec<Frame<'_>>> {
    let bad = |why: &str| Error::parse("a capture", why);
    let magic = file.first_chunk::<4>().ok_or_else(|| bad("it is empty"))?;
    let (big, nanos) = match magic {
        [0xd4, 0xc3, 0xb2, 0xa1] => (false, false),
        [0x4d, 0x3c, 0xb2, 0xa1] => (false, true),
        [0xa1, 0xb2, 0xc3, 0xd4] => (true, false),
        [0xa1, 0xb2, 0x3c, 0x4d] => (true, true),
        _ => return Err(bad("not a pcap file")),
    };
    let word = |at: usize| -> Option<u32> {
        let bytes = *file.get(at..)?.first_chunk::<4>()?;
        Some(if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    if word(20) != Some(1) {
        return Err(bad("its link type is not Ethernet"));
    }
    let mut list = Vec::new();
    let mut at = 24;
    while let (Some(seconds), Some(fraction), Some(kept), Some(full_length)) =
        (word(at), word(at + 4), word(at + 8), word(at + 12))
    {
        let start = at + 16;
        let Some(bytes) = file.get(start..start + kept as usize) else { break };
        let fraction = if nanos { fraction } else { fraction.saturating_mul(1000) };
        list.push(Frame { at: Duration::new(seconds.into(), fraction), bytes, full_length });
        at = start + kept as usize;
    }
    Ok(list)
}

/// The header of an IKE message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IkeHeader {
    /// The initiator's SPI.
    pub initiator_spi: u64,
    /// The responder's SPI.
    pub responder_spi: u64,
    /// Type of the first payload.
    pub next_payload: u8,
    /// 34 IKE_SA_INIT, 35 IKE_AUTH, 36 CREATE_CHILD_SA, 37 INFORMATIONAL.
    pub exchange: u8,
    /// Whether the original initiator sent it.
    pub from_initiator: bool,
    /// Whether it is a response.
    pub is_response: bool,
    /// Message id.
    pub message_id: u32,
    /// Length of the message.
    pub length: u32,
}

/// What a frame carries, as far as the lab cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// ARP.
    Arp {
        /// 1 request, 2 reply.
        operation: u16,
        /// Sender's hardware address inside the packet.
        sender_mac: [u8; 6],
        /// Sender's address.
        sender: Ipv4Addr,
        /// Target's address.
        target: Ipv4Addr,
    },
    /// ESP.
    Esp {
        /// In UDP, or else as protocol 50.
        in_udp: bool,
        /// SPI.
        spi: u32,
        /// Sequence number.
        sequence: u32,
        /// The first 8 bytes after it: the IV of the AEADs in use.
        iv: u64,
        /// All kept bytes from the SPI on.
        bytes: &'a [u8],
    },
    /// An IKE message.
    Ike {
        /// Its header.
        header: IkeHeader,
        /// The IV of its SK payload, if it starts with one.
        iv: Option<u64>,
        /// All kept bytes from the header on.
        bytes: &'a [u8],
    },
    /// A NAT keepalive.
    Keepalive,
    /// Other IP.
    Ip {
        /// Protocol or next header.
        protocol: u8,
        /// The UDP or TCP ports, or 0.
        ports: (u16, u16),
    },
    /// Anything else.
    Other,
}

/// A frame, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// When (CLOCK_REALTIME).
    pub at: Duration,
    /// The frame's source address.
    pub source_mac: [u8; 6],
    /// The frame's destination address.
    pub target_mac: [u8; 6],
    /// IP source, if it is IP.
    pub source: Option<IpAddr>,
    /// IP destination.
    pub target: Option<IpAddr>,
    /// The frame's full length.
    pub full_length: u32,
    /// What is in it.
    pub content: Content<'a>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Takes a frame apart. What is cut off or malformed is [`Content::Other`].
pub fn dissect<'a>(frame: &Frame<'a>) -> Packet<'a> {
    let mut packet = Packet {
        at: frame.at,
        source_mac: [0; 6],
        target_mac: [0; 6],
        source: None,
        target: None,
        full_length: frame.full_length,
        content: Content::Other,
    };
    let mac = |at: usize| frame.bytes.get(at..).and_then(|rest| rest.first_chunk::<6>()).copied();
    let (Some(target_mac), Some(source_mac), Some(ether_type)) =
        (mac(0), mac(6), u16_at(frame.bytes, 12))
    else {
        return packet;
    };
    packet.target_mac = target_mac;
    packet.source_mac = source_mac;
    let body = frame.bytes.get(14..).unwrap_or_default();
    let content = match ether_type {
        0x0806 => arp(body),
        0x0800 => ipv4(body, &mut packet),
        0x86dd => ipv6(body, &mut packet),
        _ => None,
    };
    packet.content = content.unwrap_or(Content::Other);
    packet
}

fn arp(body: &[u8]) -> Option<Content<'_>> {
    let address = |at: usize| u32_at(body, at).map(Ipv4Addr::from_bits);
    Some(Content::Arp {
        operation: u16_at(body, 6)?,
        sender_mac: *body.get(8..)?.first_chunk()?,
        sender: address(14)?,
        target: address(24)?,
    })
}

fn ipv4<'a>(body: &'a [u8], packet: &mut Packet<'a>) -> Option<Content<'a>> {
    let first = *body.first()?;
    packet.source = Some(Ipv4Addr::from_bits(u32_at(body, 12)?).into());
    packet.target = Some(Ipv4Addr::from_bits(u32_at(body, 16)?).into());
    let protocol = *body.get(9)?;
    let header = usize::from(first & 0x0f) * 4;
    // Ethernet pads short frames: the IP length decides where the packet ends.
    let total = usize::from(u16_at(body, 2)?).min(body.len());
    let payload = body.get(header..total)?;
    let is_later_fragment = u16_at(body, 6)? & 0x1fff != 0;
    if is_later_fragment {
        return Some(Content::Ip { protocol, ports: (0, 0) });
    }
    Some(transport(protocol, payload))
}

fn ipv6<'a>(body: &'a [u8], packet: &mut Packet<'a>) -> Option<Content<'a>> {
    let address =
        |at: usize| body.get(at..)?.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes));
    packet.source = Some(address(8)?.into());
    packet.target = Some(address(24)?.into());
    Some(transport(*body.get(6)?, body.get(40..)?))
}

fn transport(protocol: u8, payload: &[u8]) -> Content<'_> {
    let ports = (u16_at(payload, 0).unwrap_or(0), u16_at(payload, 2).unwrap_or(0));
    let other =
        Content::Ip { protocol, ports: if matches!(protocol, 6 | 17) { ports } else { (0, 0) } };
    match protocol {
        50 => esp(payload, false).unwrap_or(other),
        17 => {
            let data = payload.get(8..).unwrap_or_default();
            if ports.0 == 500 || ports.1 == 500 {
                ike(data).unwrap_or(other)
            } else if ports.0 == 4500 || ports.1 == 4500 {
                match data {
                    [0xff] => Content::Keepalive,
                    // RFC 3948 §2.2: four zero bytes, where ESP has its SPI, mark IKE.
                    [0, 0, 0, 0, message @ ..] => ike(message).unwrap_or(other),
                    _ => esp(data, true).unwrap_or(other),
                }
            } else {
                other
            }
        }
        _ => other,
    }
}

fn esp(bytes: &[u8], in_udp: bool) -> Option<Content<'_>> {
    Some(Content::Esp {
        in_udp,
        spi: u32_at(bytes, 0)?,
        sequence: u32_at(bytes, 4)?,
        iv: u64_at(bytes, 8)?,
        bytes,
    })
}

fn ike(bytes: &[u8]) -> Option<Content<'_>> {
    let flags = *bytes.get(19)?;
    let header = IkeHeader {
        initiator_spi: u64_at(bytes, 0)?,
        responder_spi: u64_at(bytes, 8)?,
        next_payload: *bytes.get(16)?,
        exchange: *bytes.get(18)?,
        from_initiator: flags & 0x08 != 0,
        is_response: flags & 0x20 != 0,
        message_id: u32_at(bytes, 20)?,
        length: u32_at(bytes, 24)?,
    };
    if bytes.get(17)? >> 4 != 2 {
        return None;
    }
    // RFC 7296 §3.14: the SK payload (46) is the last, and in practice the only one: generic header, then IV.
    let iv = if header.next_payload == 46 { u64_at(bytes, 32) } else { None };
    Some(Content::Ike { header, iv, bytes })
}

/// Writes a pcap file of Ethernet frames: for tests, and for handing parts of a capture to tshark.
pub fn write(frames: &[(Duration, Vec<u8>)]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_3c4d_u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.extend(word.to_le_bytes());
    }
    for (at, bytes) in frames {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let seconds = u32::try_from(at.as_secs()).unwrap_or(u32::MAX);
        for word in [seconds, at.subsec_nanos(), length, length] {
            file.extend(word.to_le_bytes());
        }
        file.extend(bytes);
    }
    file
}

#[cfg(test)]
pub(crate) mod samples {
    /// An Ethernet frame with UDP from `source` to `target`.
    pub(crate) fn udp(source: [u8; 4], target: [u8; 4], ports: (u16, u16), data: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        frame.extend([0x45, 0]);
        frame.extend(u16::try_from(28 + data.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend(source);
        frame.extend(target);
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend(u16::try_from(8 + data.len()).unwrap().to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(data);
        frame
    }

    /// ESP in UDP.
    pub(crate) fn esp(spi: u32, sequence: u32, iv: u64, tail: &[u8]) -> Vec<u8> {
        let mut data = spi.to_be_bytes().to_vec();
        data.extend(sequence.to_be_bytes());
        data.extend(iv.to_be_bytes());
        data.extend(tail);
        udp([203, 0, 113, 10], [198, 51, 100, 7], (4500, 4500), &data)
    }

    /// The same without UDP.
    pub(crate) fn unwrapped(esp: &[u8]) -> Vec<u8> {
        let mut frame = [&esp[..34], &esp[42..]].concat();
        let length = u16::try_from(frame.len() - 14).unwrap();
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame[23] = 50;
        frame
    }

    /// An encrypted IKE message on port 4500.
    pub(crate) fn ike(message_id: u32, flags: u8, iv: u64, tail: &[u8]) -> Vec<u8> {
        let mut data = vec![0; 4];
        data.extend(1_u64.to_be_bytes());
        data.extend(2_u64.to_be_bytes());
        data.extend([46, 0x20, 37, flags]);
        data.extend(message_id.to_be_bytes());
        data.extend(u32::try_from(40 + tail.len()).unwrap().to_be_bytes());
        data.extend([0, 0]);
        data.extend(u16::try_from(12 + tail.len()).unwrap().to_be_bytes());
        data.extend(iv.to_be_bytes());
        data.extend(tail);
        udp([203, 0, 113, 10], [198, 51, 100, 7], (4500, 4500), &data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(bytes: Vec<u8>) -> Content<'static> {
        let file = write(&[(Duration::new(5, 7), bytes)]);
        let file: &'static [u8] = file.leak();
        let list = frames(file).unwrap();
        assert_eq!((list.len(), list[0].at), (1, Duration::new(5, 7)));
        dissect(&list[0]).content
    }

    #[test]
    fn esp_is_read_in_either_form() {
        let in_udp = samples::esp(0x8010_0001, 9, 0x1234, &[1; 20]);
        let bare = samples::unwrapped(&in_udp);
        assert_eq!(bare.len() + 8, in_udp.len());
        for (frame, wanted) in [(in_udp, true), (bare, false)] {
            let Content::Esp { in_udp, spi, sequence, iv, bytes } = only(frame) else {
                panic!("not ESP");
            };
            assert_eq!((spi, sequence, iv, bytes.len()), (0x8010_0001, 9, 0x1234, 36));
            assert_eq!(in_udp, wanted);
        }
    }

    #[test]
    fn ike_behind_its_marker_is_read() {
        let Content::Ike { header, iv, .. } = only(samples::ike(3, 0x20, 77, &[9; 16])) else {
            panic!("not IKE")
        };
        assert_eq!((header.initiator_spi, header.responder_spi, header.message_id), (1, 2, 3));
        assert!(header.is_response && !header.from_initiator);
        assert_eq!(iv, Some(77));
    }

    #[test]
    fn a_cut_file_gives_what_is_whole() {
        let mut file = write(&[
            (Duration::ZERO, samples::esp(300, 1, 1, &[])),
            (Duration::ZERO, samples::esp(300, 2, 2, &[])),
        ]);
        file.truncate(file.len() - 3);
        assert_eq!(frames(&file).unwrap().len(), 1);
        assert!(frames(&[1, 2, 3, 4, 5]).is_err());
    }

    #[test]
    fn keepalives_and_other_udp_are_told_apart() {
        let to = [198, 51, 100, 7];
        assert_eq!(only(samples::udp([1; 4], to, (4500, 4500), &[0xff])), Content::Keepalive);
        assert_eq!(
            only(samples::udp([1; 4], to, (53, 53), &[0; 30])),
            Content::Ip { protocol: 17, ports: (53, 53) }
        );
    }
}

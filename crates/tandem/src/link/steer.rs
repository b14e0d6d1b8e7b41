//! A packet that belongs to an endpoint of the other instance, and who seals it for the way there. Pure, but for the
//! counter that all senders share.
//!
//! ```text
//!  kind:1 (| 0x80: handed back) │ endpoint:1 │ family:1 (0, 4, 6) │ address:16 │ port:2 │ local port:2 │ packet …
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use wire::id::EndpointId;

use super::datagram::{HEADER, Sealer};

/// Bytes before the packet, inside the seal.
const HEAD: usize = 1 + 1 + 1 + 16 + 2 + 2;

/// In the kind: the packet had been handed over, and is handed back.
const BACK: u8 = 0x80;

/// Bytes that steering needs free in front of a packet, to be sealed in place.
pub const STEER_HEADROOM: usize = HEADER + HEAD;

/// Bytes that steering needs free behind it.
pub const STEER_TAILROOM: usize = crypto::aead::TAG_LEN;

/// Bytes of a packet's datagram on the pair link beyond the packet, above UDP.
pub const STEER_OVERHEAD: usize = STEER_HEADROOM + STEER_TAILROOM;

/// What is steered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SteerKind {
    /// An inner packet that arrived at the TUN.
    Plain,
    /// An ESP packet as it came in UDP.
    Esp,
    /// An IKE message, without the non-ESP marker.
    Ike,
}

/// Where a steered packet belongs and where it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SteerHead {
    /// What it is.
    pub kind: SteerKind,
    /// Whose it is.
    pub endpoint: EndpointId,
    /// The remote peer's outer address and port; none for [`SteerKind::Plain`].
    pub from: Option<SocketAddr>,
    /// The port it came to (500 or 4500); 0 for [`SteerKind::Plain`].
    pub local_port: u16,
    /// It had come from the receiver, when the sender owned the endpoint.
    pub back: bool,
}

impl SteerHead {
    fn encode(&self) -> [u8; HEAD] {
        let kind = match self.kind {
            SteerKind::Plain => 0,
            SteerKind::Esp => 1,
            SteerKind::Ike => 2,
        };
        let kind = if self.back { kind | BACK } else { kind };
        let (family, address, port) = match self.from {
            None => (0, [0; 16], 0),
            Some(from) => match from.ip() {
                IpAddr::V4(v4) => (4, v4.to_ipv6_mapped().octets(), from.port()),
                IpAddr::V6(v6) => (6, v6.octets(), from.port()),
            },
        };
        let mut out = [0; HEAD];
        let fields: [&[u8]; 4] = [
            &[kind, self.endpoint.0, family],
            &address,
            &port.to_be_bytes(),
            &self.local_port.to_be_bytes(),
        ];
        for (to, from) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        out
    }

    /// Splits an opened datagram into head and packet.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (head, packet) = bytes.split_first_chunk::<HEAD>()?;
        let [kind, endpoint, family, rest @ ..] = head;
        let (address, ports) = rest.split_first_chunk::<16>()?;
        let [p0, p1, l0, l1] = *ports.first_chunk::<4>()?;
        let back = kind & BACK != 0;
        let kind = match kind & !BACK {
            0 => SteerKind::Plain,
            1 => SteerKind::Esp,
            2 => SteerKind::Ike,
            _ => return None,
        };
        let address = Ipv6Addr::from(*address);
        let ip = match family {
            0 => None,
            4 => Some(IpAddr::V4(address.to_ipv4_mapped().unwrap_or(Ipv4Addr::UNSPECIFIED))),
            6 => Some(IpAddr::V6(address)),
            _ => return None,
        };
        let from = ip.map(|ip| SocketAddr::new(ip, u16::from_be_bytes([p0, p1])));
        let local_port = u16::from_be_bytes([l0, l1]);
        Some((Self { kind, endpoint: EndpointId(*endpoint), from, local_port, back }, packet))
    }
}

/// Seals packets for the other instance, for one link, under the newest keys. Cheap to clone; threads may use theirs at
/// once: the counter that makes the IV is one. One that outlives its stream seals what the other side refuses, so ask for a
/// new one after each `StreamUp`.
#[derive(Clone)]
pub struct SteerSender {
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) link: u8,
}

impl std::fmt::Debug for SteerSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SteerSender(link {})", self.link)
    }
}

impl SteerSender {
    /// The link that it must be sent on.
    #[must_use]
    pub fn link(&self) -> u8 {
        self.link
    }

    /// Seals in place, without blocking or allocating. `buffer` is [`STEER_HEADROOM`] bytes to be filled, the packet, and
    /// [`STEER_TAILROOM`] bytes. False when it is shorter than that.
    pub fn seal(&self, head: &SteerHead, buffer: &mut [u8]) -> bool {
        if buffer.len() < STEER_HEADROOM + STEER_TAILROOM {
            return false;
        }
        let Some(place) = buffer.get_mut(HEADER..STEER_HEADROOM) else { return false };
        place.copy_from_slice(&head.encode());
        self.sealer.seal(self.link, buffer).is_some()
    }

    /// The same for a packet elsewhere.
    #[must_use]
    pub fn seal_copy(&self, head: &SteerHead, packet: &[u8]) -> Option<Vec<u8>> {
        let mut datagram = vec![0; STEER_HEADROOM];
        datagram.extend_from_slice(packet);
        datagram.resize(datagram.len() + STEER_TAILROOM, 0);
        self.seal(head, &mut datagram).then_some(datagram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_come_through() {
        for (kind, from, back) in [
            (SteerKind::Plain, None, true),
            (SteerKind::Esp, Some("192.0.2.7:4500"), false),
            (SteerKind::Ike, Some("[2001:db8::7]:500"), false),
        ] {
            let from = from.map(|text| text.parse().unwrap());
            let head = SteerHead { kind, endpoint: EndpointId(3), from, local_port: 4500, back };
            let mut bytes = head.encode().to_vec();
            bytes.extend(b"packet");
            assert_eq!(SteerHead::decode(&bytes), Some((head, &b"packet"[..])));
            assert_eq!(SteerHead::decode(&bytes[..HEAD - 1]), None);
        }
    }

    fn any_head() -> impl Strategy<Value = SteerHead> {
        let from = proptest::option::of(any::<(IpAddr, u16)>());
        (0..3_u8, any::<u8>(), from, any::<u16>(), any::<bool>()).prop_map(
            |(kind, endpoint, from, local_port, back)| SteerHead {
                kind: [SteerKind::Plain, SteerKind::Esp, SteerKind::Ike][usize::from(kind)],
                endpoint: EndpointId(endpoint),
                from: from.map(SocketAddr::from),
                local_port,
                back,
            },
        )
    }

    proptest! {
        #[test]
        fn any_head_comes_through(head in any_head()) {
            let bytes = head.encode();
            prop_assert_eq!(SteerHead::decode(&bytes), Some((head, &b""[..])));
        }

        #[test]
        fn decoder_takes_anything(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some((_, packet)) = SteerHead::decode(&bytes) {
                prop_assert_eq!(packet, &bytes[HEAD..]);
            }
        }
    }
}

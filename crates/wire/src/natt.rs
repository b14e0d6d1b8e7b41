//! What a UDP datagram on port 4500 carries (RFC 3948 §2).

use crate::esp;

/// Four zero bytes in front of an IKE message on port 4500, where ESP would have its SPI (RFC 3948 §2.2).
pub const NON_ESP_MARKER: [u8; 4] = [0; 4];

/// The one payload byte of a NAT keepalive (RFC 3948 §2.3).
pub const KEEPALIVE: [u8; 1] = [0xff];

/// A datagram on port 4500 by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Datagram<'a> {
    /// An ESP packet, at least a header long; its SPI is not zero.
    Esp(&'a [u8]),
    /// An IKE message, marker removed. Not looked at further; may be empty.
    Ike(&'a [u8]),
    /// A NAT keepalive; receivers ignore it (RFC 3948 §2.3).
    Keepalive,
    /// None of these: too short for any. To be counted and dropped.
    Short,
}

/// Sorts a datagram that arrived on port 4500.
#[must_use]
pub fn classify(datagram: &[u8]) -> Datagram<'_> {
    if datagram == KEEPALIVE {
        return Datagram::Keepalive;
    }
    match datagram.strip_prefix(&NON_ESP_MARKER) {
        Some(ike) => Datagram::Ike(ike),
        None if datagram.len() >= esp::HEADER_LEN => Datagram::Esp(datagram),
        None => Datagram::Short,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        assert_eq!(classify(&[0xff]), Datagram::Keepalive);
        assert_eq!(classify(&[0, 0, 0, 0, 7, 8]), Datagram::Ike(&[7, 8]));
        assert_eq!(classify(&[0, 0, 0, 0]), Datagram::Ike(&[]));
        let esp = [0, 0, 1, 0, 0, 0, 0, 1];
        assert_eq!(classify(&esp), Datagram::Esp(&esp));
    }

    #[test]
    fn short_ones_are_neither() {
        assert_eq!(classify(&[]), Datagram::Short);
        assert_eq!(classify(&[0]), Datagram::Short);
        assert_eq!(classify(&[0, 0, 0]), Datagram::Short);
        assert_eq!(classify(&[0xff, 0xff]), Datagram::Short);
        assert_eq!(classify(&[0, 0, 1, 0, 0, 0, 0]), Datagram::Short);
    }
}

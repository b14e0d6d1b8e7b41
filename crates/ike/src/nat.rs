//! NAT detection (RFC 7296 §2.23) and what follows from it for the path.

use core::net::{IpAddr, SocketAddr};

use crypto::hash::sha1;
use wire::{
    id::IkeSpi,
    ike::{NotifyType, Payloads},
};

use crate::config::Encap;

/// The port that IKE floats to and ESP in UDP uses.
pub(crate) const NATT_PORT: u16 = 4500;

/// SHA-1 of SPIs, address and port, as they stand in the header.
pub(crate) fn digest(spi_i: IkeSpi, spi_r: IkeSpi, at: SocketAddr) -> [u8; 20] {
    let (v4, v6);
    let octets: &[u8] = match at.ip() {
        IpAddr::V4(ip) => {
            v4 = ip.octets();
            &v4
        }
        IpAddr::V6(ip) => {
            v6 = ip.octets();
            &v6
        }
    };
    sha1(&[&spi_i.to_bytes(), &spi_r.to_bytes(), octets, &at.port().to_be_bytes()])
}

/// What we send as NAT_DETECTION_SOURCE_IP: the truth, or a hash that nothing
/// can match, so that the peer takes us to be behind a NAT and encapsulates
/// (dataplane.md). The claim hashes address and port zero.
pub(crate) fn source_digest(
    encap: Encap,
    spi_i: IkeSpi,
    spi_r: IkeSpi,
    local: SocketAddr,
) -> [u8; 20] {
    match encap {
        Encap::Never => digest(spi_i, spi_r, local),
        Encap::Auto | Encap::Always => {
            let nowhere = match local {
                SocketAddr::V4(_) => IpAddr::from([0; 4]),
                SocketAddr::V6(_) => IpAddr::from([0; 16]),
            };
            digest(spi_i, spi_r, SocketAddr::new(nowhere, 0))
        }
    }
}

/// What the peer's two notifies say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Detected {
    /// The peer takes part.
    pub(crate) supported: bool,
    /// A NAT before us.
    pub(crate) here: bool,
    /// A NAT before the peer.
    pub(crate) there: bool,
}

/// Compares the notifies of an IKE_SA_INIT message with its outer addresses.
pub(crate) fn detect(
    payloads: &Payloads<'_>,
    spi_i: IkeSpi,
    spi_r: IkeSpi,
    from: SocketAddr,
    to: SocketAddr,
) -> Detected {
    let all = |kind| payloads.notifies().filter(move |n| n.kind == kind).map(|n| n.data);
    let mut sources = all(NotifyType::NAT_DETECTION_SOURCE_IP).peekable();
    let mut destinations = all(NotifyType::NAT_DETECTION_DESTINATION_IP).peekable();
    if sources.peek().is_none() || destinations.peek().is_none() {
        return Detected { supported: false, here: false, there: false };
    }
    // RFC 7296 §2.23: several source notifies are alternatives.
    let there = !sources.any(|d| d == digest(spi_i, spi_r, from));
    let here = !destinations.any(|d| d == digest(spi_i, spi_r, to));
    Detected { supported: true, here, there }
}

/// Whether ESP goes in UDP, or else as protocol 50: a peer that knows nothing of NATs cannot be told to expect UDP.
pub(crate) fn encapsulate(encap: Encap, detected: Detected) -> bool {
    match encap {
        Encap::Always => true,
        Encap::Auto => detected.supported,
        Encap::Never => detected.here || detected.there,
    }
}

/// The same when IKE_AUTH has named the connection. What the peer was told before, by another one perhaps, counts: many
/// peers drop what comes in the other form.
pub(crate) fn keep(encap: Encap, told: bool, supported: bool) -> bool {
    encap == Encap::Always || told && supported
}

/// The addresses of ESP in UDP: a peer that never floated still gets it on 4500.
pub(crate) fn esp_address(at: SocketAddr) -> SocketAddr {
    let port = if at.port() == 500 { NATT_PORT } else { at.port() };
    SocketAddr::new(at.ip(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udp_is_for_who_can_and_was_told_to() {
        let knows = |here, there| Detected { supported: true, here, there };
        let nothing = Detected { supported: false, here: false, there: false };
        let forms = |encap| {
            [nothing, knows(false, false), knows(true, false), knows(false, true)]
                .map(|detected| encapsulate(encap, detected))
        };
        assert_eq!(forms(Encap::Auto), [false, true, true, true]);
        assert_eq!(forms(Encap::Never), [false, false, true, true]);
        assert_eq!(forms(Encap::Always), [true; 4]);
        // The first connection that fits the address was "always", this one is not, and the peer knows nothing of it.
        assert!(!keep(Encap::Auto, true, false) && !keep(Encap::Never, true, false));
        assert!(keep(Encap::Always, false, false) && keep(Encap::Never, true, true));
        assert!(!keep(Encap::Auto, false, true));
    }

    // The digest of a real IKE_SA_INIT is in tests::interop; here only that
    // every input counts.
    #[test]
    fn every_input_counts() {
        let at: SocketAddr = "192.0.2.1:500".parse().unwrap();
        let base = digest(IkeSpi(1), IkeSpi(2), at);
        assert_ne!(base, digest(IkeSpi(2), IkeSpi(1), at));
        assert_ne!(base, digest(IkeSpi(1), IkeSpi(2), "192.0.2.1:4500".parse().unwrap()));
        assert_ne!(base, digest(IkeSpi(1), IkeSpi(2), "192.0.2.2:500".parse().unwrap()));
        assert_ne!(base, source_digest(Encap::Auto, IkeSpi(1), IkeSpi(2), at));
        assert_eq!(base, source_digest(Encap::Never, IkeSpi(1), IkeSpi(2), at));
    }
}

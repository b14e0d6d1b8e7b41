//! The kernel's forms of addresses and of control messages (TOS, UDP_SEGMENT, UDP_GRO).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Room for a TOS and a UDP_SEGMENT control message, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control(pub(super) [u8; CONTROL]);

/// CMSG_SPACE(sizeof(int)), which also holds a UDP_SEGMENT's two bytes.
pub(super) const SPACE: usize = 24;
pub(super) const CONTROL: usize = 2 * SPACE;

/// Writes an address in the kernel's form and gives its length.
pub(super) fn write_address(
    storage: &mut libc::sockaddr_storage,
    address: SocketAddr,
) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large enough and aligned for every sockaddr.
            unsafe { std::ptr::from_mut(storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { std::ptr::from_mut(storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// Reads an address that the kernel wrote.
pub(super) fn address_of(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that a sockaddr_in is there; storage is larger and aligned.
            let raw = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
            Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(raw.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that a sockaddr_in6 is there.
            let raw = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let port = u16::from_be(raw.sin6_port);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id)))
        }
        _ => None,
    }
}

/// The TOS byte and the size of the datagrams in a run, 0 for what the kernel did not say.
pub(super) fn notes_of(header: &libc::msghdr) -> (u8, usize) {
    let (mut tos, mut size) = (0, 0);
    // SAFETY: the header was filled by recvmmsg; CMSG_FIRSTHDR checks the control length, and the control array is
    // aligned and outlives this call.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: null, or a header inside the control array, by the macros' contract.
    while let Some(note) = unsafe { next.as_ref() } {
        let length_of = |bytes: usize| {
            // SAFETY: CMSG_LEN does arithmetic only.
            let length = unsafe { libc::CMSG_LEN(bytes as u32) };
            u64::from(length)
        };
        let holds = |bytes: usize| note.cmsg_len as u64 >= length_of(bytes);
        // SAFETY: CMSG_DATA does arithmetic only; `holds` proves that the data is there.
        let data = unsafe { libc::CMSG_DATA(note) };
        // SAFETY: as above, for each read its length was checked.
        unsafe {
            match (note.cmsg_level, note.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_TOS) if holds(1) => tos = *data,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) if holds(size_of::<libc::c_int>()) => {
                    tos = data.cast::<libc::c_int>().read_unaligned() as u8;
                }
                (libc::SOL_UDP, libc::UDP_GRO) if holds(size_of::<libc::c_int>()) => {
                    size =
                        usize::try_from(data.cast::<libc::c_int>().read_unaligned()).unwrap_or(0);
                }
                _ => {}
            }
        }
        // SAFETY: both point into the same control array.
        next = unsafe { libc::CMSG_NXTHDR(header, note) };
    }
    (tos, size)
}

/// Writes the control message that sets the TOS byte of one datagram.
pub(super) fn write_tos(control: &mut Control, tos: u8, v4: bool) {
    let (level, kind) =
        if v4 { (libc::IPPROTO_IP, libc::IP_TOS) } else { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) };
    // SAFETY: CMSG_LEN does arithmetic only.
    let length = unsafe { libc::CMSG_LEN(size_of::<libc::c_int>() as u32) };
    let header = libc::cmsghdr { cmsg_len: length as _, cmsg_level: level, cmsg_type: kind };
    let place = control.0.as_mut_ptr();
    // SAFETY: `Control` is 8-aligned and holds CMSG_SPACE(4) = 24 bytes: a cmsghdr of 16 and an int.
    unsafe {
        place.cast::<libc::cmsghdr>().write(header);
        libc::CMSG_DATA(place.cast()).cast::<libc::c_int>().write_unaligned(libc::c_int::from(tos));
    }
}

/// Writes the control message that splits one send into datagrams of `size` bytes, `at` bytes into the room.
pub(super) fn write_segment(control: &mut Control, at: usize, size: usize) {
    // SAFETY: CMSG_LEN does arithmetic only.
    let length = unsafe { libc::CMSG_LEN(size_of::<u16>() as u32) };
    let header = libc::cmsghdr {
        cmsg_len: length as _,
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    let Some(place) = control.0.get_mut(at..at + SPACE) else { return };
    let place = place.as_mut_ptr();
    // SAFETY: `Control` is 8-aligned, `at` is 0 or SPACE, and SPACE bytes hold a cmsghdr of 16 and two bytes more.
    unsafe {
        place.cast::<libc::cmsghdr>().write(header);
        libc::CMSG_DATA(place.cast()).cast::<u16>().write_unaligned(size as u16);
    }
}

// The layout that `Control` counts on.
const _: () = assert!(size_of::<libc::cmsghdr>() == 16 && CONTROL >= 16 + size_of::<libc::c_int>());

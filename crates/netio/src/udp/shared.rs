//! Two sockets on one address and port, for two threads: the kernel sorts datagrams by their first byte
//! (SO_REUSEPORT with SO_ATTACH_REUSEPORT_CBPF, Linux 4.5). So what is for one thread never passes through the other,
//! and the other side and every firewall between see a single port.
//!
//! The kernel looks at the first datagram of a run (UDP_SEGMENT, UDP_GRO) only. A sender's run has one kind; a network
//! card's merging joins datagrams of one TOS alone, so give the two kinds different ones. What comes to the wrong socket
//! all the same is for its owner to pass on.

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::{BatchSocket, Options, enlarge_buffers};
use crate::filter::{attach, line, ret};
use crate::sys::get_option;

/// Both sockets, bound.
#[derive(Debug)]
pub struct SharedPort {
    /// Gets whatever does not start with the chosen byte. Non-blocking.
    pub rest: std::net::UdpSocket,
    /// Gets the datagrams that start with it.
    pub chosen: BatchSocket,
    /// The kernel sorts. If it cannot, all datagrams of one sender go to one of the two, whatever they are.
    pub sorted: bool,
}

impl SharedPort {
    /// Opens both. `local` must be on this host. Errors: as for a socket that shares its port with nobody.
    pub fn open(
        local: SocketAddr,
        byte: u8,
        rest_buffer_bytes: usize,
        chosen: Options,
    ) -> io::Result<Self> {
        // Sockets of another process of ours would join the group, and the places below would be theirs. One that shares
        // nothing notices them.
        drop(std::net::UdpSocket::bind(local)?);
        let rest = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        rest.set_nonblocking(true)?;
        rest.set_reuse_port(true)?;
        enlarge_buffers(&rest, rest_buffer_bytes)?;
        if local.is_ipv6() {
            // A group's sockets must agree.
            rest.set_only_v6(true)?;
        }
        // The order of binding is that of the places in the group, which the program names.
        rest.bind(&local.into())?;
        let chosen = BatchSocket::bind(local, Options { shared: true, ..chosen })?;
        let sorted = sort(&rest, byte).is_ok();
        Ok(Self { rest: rest.into(), chosen, sorted })
    }
}

/// Attaches the program to the group: place 1 for datagrams that start with the byte, else place 0.
fn sort(group: &Socket, byte: u8) -> io::Result<()> {
    // What it loads from lies behind the UDP header. A datagram without any byte ends the program, with 0.
    let mut program = [
        line(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 0),
        line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, byte.into()),
        ret(1),
        ret(0),
    ];
    attach(group, libc::SO_ATTACH_REUSEPORT_CBPF, &mut program)
}

/// The MTU of the way from a local address to another host, as the kernel knows it now. Sends nothing.
pub fn path_mtu(local: SocketAddr, remote: SocketAddr) -> io::Result<u32> {
    let socket = std::net::UdpSocket::bind(SocketAddr::new(local.ip(), 0))?;
    socket.connect(remote)?;
    let mtu = if local.is_ipv4() {
        get_option(&socket, libc::IPPROTO_IP, libc::IP_MTU)?
    } else {
        get_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?
    };
    Ok(mtu.unsigned_abs())
}

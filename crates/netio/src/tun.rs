//! The TUN interface: inner packets pass through it and virtual addresses live on it.
//!
//! It is never persistent: when the last descriptor closes, by exit or by SIGKILL, the kernel
//! removes the interface with its addresses and routes (architecture.md, "Addresses live and die
//! with the process").

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use wire::vnet::{Carried, Offload, Segmented, VNET_HEADER_LEN};

use crate::sys::{check, set_nonblocking};

/// Most packets that one [`Tun::write_run`] takes.
pub const RUN: usize = 64;

/// Bytes that hold whatever one [`Tun::read`] gives: an IP packet has no more.
pub const READ_LEN: usize = 65_535;

/// One queue of a TUN interface, non-blocking.
#[derive(Debug)]
#[non_exhaustive]
pub enum Tun {
    /// The plain backend: no offloads, one queue, one packet a system call (tun-tap).
    Plain(Plain),
    /// Every packet has a vnet header in front (IFF_VNET_HDR, which tun-tap cannot ask for), so that one
    /// call can read or write several segments as one packet.
    Vnet(Vnet),
}

/// What the kernel leaves to whoever reads the TUN, and takes from whoever writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// TCP segmentation, and checksums.
    pub tcp: bool,
    /// UDP segmentation (kernels from 6.2 on).
    pub udp: bool,
}

impl Offloads {
    /// What TUNSETOFFLOAD is asked for.
    fn mask(self) -> libc::c_uint {
        let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        (if self.tcp { tcp } else { 0 }) | (if self.udp { udp } else { 0 })
    }
}

/// The backend with vnet headers.
#[derive(Debug)]
pub struct Vnet {
    file: File,
    name: String,
    index: u32,
    offloads: Offloads,
}

/// The backend over the crate `tun-tap`.
#[derive(Debug)]
pub struct Plain {
    iface: tun_tap::Iface,
    index: u32,
}

impl Tun {
    /// Creates the interface `name` (at most 15 bytes) for whole packets alone. Needs CAP_NET_ADMIN
    /// and /dev/net/tun. Errors: EBUSY when an interface of that name is there already.
    pub fn open_plain(name: &str) -> io::Result<Self> {
        check_name(name)?;
        let iface = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tun)?;
        // SAFETY: the descriptor is owned by `iface`, which outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(iface.as_raw_fd()) };
        set_nonblocking(&fd)?;
        let index = crate::route::index_of(iface.name())?;
        Ok(Self::Plain(Plain { iface, index }))
    }

    /// The same interface, whose [`Tun::read`] gives and whose [`Tun::write_run`] takes several segments at once:
    /// of each kind that the kernel knows, see [`Tun::offloads`]. Errors: as before, and EINVAL from a kernel that
    /// has no vnet headers.
    pub fn open_vnet(name: &str) -> io::Result<Self> {
        check_name(name)?;
        // One that is there already is not ours: see `check_name`, which cannot see one that comes in between.
        Self::create(name, libc::IFF_TUN_EXCL)
    }

    /// The same interface with so many queues, one for each worker. The kernel puts a flow's packets into the queue that
    /// its packets the other way were last written to, and before any were, into one by its hash (drivers/net/tun.c,
    /// tun_flow_update and tun_automq_select_queue, with a hash that is the same both ways): whoever delivers a flow
    /// also reads its answers. Errors: as before.
    pub fn open_queues(name: &str, count: u8) -> io::Result<Vec<Self>> {
        if count <= 1 {
            return Ok(vec![Self::open_vnet(name)?]);
        }
        check_name(name)?;
        let first = Self::create(name, libc::IFF_TUN_EXCL | libc::IFF_MULTI_QUEUE)?;
        let offloads = first.offloads();
        let mut queues = vec![first];
        for _ in 1..count {
            let file = attach(name, libc::IFF_MULTI_QUEUE)?;
            let index = crate::route::index_of(name)?;
            // The length of headers and the offloads are the interface's.
            queues.push(Self::Vnet(Vnet { file, name: name.to_owned(), index, offloads }));
        }
        Ok(queues)
    }

    /// Makes the interface, with these flags beside the usual ones.
    fn create(name: &str, flags: libc::c_int) -> io::Result<Self> {
        let file = attach(name, flags)?;
        let length = VNET_HEADER_LEN as libc::c_int;
        // SAFETY: the kernel reads one int, which outlives the call.
        check(unsafe {
            libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const length)
        })?;
        let index = crate::route::index_of(name)?;
        let all = Offloads { tcp: true, udp: true };
        let none = Offloads { tcp: false, udp: false };
        let known = [all, Offloads { udp: false, ..all }].into_iter().find(|offloads| {
            // SAFETY: the third argument is a number.
            check(unsafe {
                libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads.mask())
            })
            .is_ok()
        });
        let offloads = known.unwrap_or(none);
        Ok(Self::Vnet(Vnet { file, name: name.to_owned(), index, offloads }))
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Plain(plain) => plain.iface.name(),
            Self::Vnet(vnet) => &vnet.name,
        }
    }

    /// The kernel's interface index.
    #[must_use]
    pub fn index(&self) -> u32 {
        match self {
            Self::Plain(plain) => plain.index,
            Self::Vnet(vnet) => vnet.index,
        }
    }

    /// What the kernel does by the segment and not by the packet; nothing with the plain backend.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        match self {
            Self::Plain(_) => Offloads { tcp: false, udp: false },
            Self::Vnet(vnet) => vnet.offloads,
        }
    }

    /// Whether [`Tun::write_run`] takes runs of this kind. TCP's need no more than vnet headers.
    #[must_use]
    pub fn takes_runs(&self, carried: Carried) -> bool {
        match (self, carried) {
            (Self::Plain(_), _) => false,
            (Self::Vnet(_), Carried::Tcp) => true,
            (Self::Vnet(vnet), Carried::Udp) => vnet.offloads.udp,
        }
    }

    /// Reads one packet into `buffer` and gives its length and what is left to do for it; `None` when the queue is
    /// empty. A packet longer than `buffer` is cut by the kernel: give [`READ_LEN`], or without offloads the MTU. One that
    /// the kernel took from the queue and could not describe is of length 0 and [`Offload::Unknown`].
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        loop {
            let mut header = [0; VNET_HEADER_LEN];
            let result = match self {
                Self::Plain(plain) => plain.iface.recv(buffer),
                Self::Vnet(vnet) => {
                    let parts = &mut [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
                    (&vnet.file)
                        .read_vectored(parts)
                        .map(|length| length.saturating_sub(VNET_HEADER_LEN))
                }
            };
            match result {
                Ok(length) => return Ok(Some((length, Offload::decode(&header)))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // While the interface is down there is nothing to read.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(None),
                // A packet that no vnet header describes: it is gone, and the next may be well.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Ok(Some((0, Offload::Unknown)));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes one packet. The kernel takes it or drops it, it does not wait.
    /// Errors: EINVAL when the bytes are no IP packet, EIO while the interface is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            let result = match self {
                Self::Plain(plain) => plain.iface.send(packet),
                Self::Vnet(vnet) => {
                    let header = [0; VNET_HEADER_LEN];
                    (&vnet.file).write_vectored(&[IoSlice::new(&header), IoSlice::new(packet)])
                }
            };
            match result {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes segments as one packet: the headers of the whole, then the segments' payloads, at most [`RUN`]. The
    /// kernel splits it where it leaves the host, if it must.
    /// Errors: EINVAL when the kernel refuses the shape; EOPNOTSUPP where [`Tun::takes_runs`] says no.
    pub fn write_run<'a>(
        &self,
        form: Segmented,
        headers: &'a [u8],
        payloads: impl Iterator<Item = &'a [u8]>,
    ) -> io::Result<()> {
        let Self::Vnet(vnet) = self else {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        };
        let header = form.encode();
        let mut parts = [IoSlice::new(&[]); RUN + 2];
        let mut count = 1;
        let [head, rest @ ..] = &mut parts;
        *head = IoSlice::new(&header);
        for (part, bytes) in rest.iter_mut().zip(std::iter::once(headers).chain(payloads)) {
            *part = IoSlice::new(bytes);
            count += 1;
        }
        loop {
            match (&vnet.file).write_vectored(parts.get(..count).unwrap_or_default()) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sets MTU (bytes) and transmit queue length (packets), keeps IPv6 from inventing addresses
    /// and soliciting routers on the interface, sets reverse-path filtering to loose, and brings
    /// the interface up. An absent IPv6 is no error.
    pub fn configure(&self, mtu: u32, queue_length: u32) -> io::Result<()> {
        let name = self.name();
        self.set_mtu(mtu)?;
        let socket = control_socket()?;
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_metric = queue_length as libc::c_int;
        // SAFETY: a filled ifreq for an ioctl that only reads it.
        check(unsafe {
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFTXQLEN as _, &raw const request)
        })?;
        // Loose (2) wins over a strict "all" because the kernel takes the larger of the two.
        for (path, value) in [
            (format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode"), "1"),
            (format!("/proc/sys/net/ipv6/conf/{name}/router_solicitations"), "0"),
            (format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "2"),
        ] {
            match std::fs::write(&path, value) {
                Ok(()) => {}
                Err(error) => tracing::debug!(%path, %error, "sysctl not set"),
            }
        }
        let mut request = interface_request(name)?;
        // SAFETY: a filled ifreq; the kernel writes the flags into it.
        check(unsafe {
            libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request)
        })?;
        // SAFETY: the union was just filled with flags by the call above.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        // SAFETY: a filled ifreq for an ioctl that only reads it.
        check(unsafe {
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request)
        })?;
        Ok(())
    }

    /// Sets the MTU alone, in bytes.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let socket = control_socket()?;
        let mut request = interface_request(self.name())?;
        request.ifr_ifru.ifru_mtu = mtu as libc::c_int;
        // SAFETY: a filled ifreq for an ioctl that only reads it.
        check(unsafe {
            libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU as _, &raw const request)
        })?;
        Ok(())
    }
}

impl AsRawFd for Tun {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Plain(plain) => plain.iface.as_raw_fd(),
            Self::Vnet(vnet) => vnet.file.as_raw_fd(),
        }
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// A queue of the interface, which is made if it is not there.
fn attach(name: &str, flags: libc::c_int) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    set_nonblocking(&file)?;
    let mut request = interface_request(name)?;
    let flags = flags | libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a filled ifreq that outlives the call; the kernel writes the name into it.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(file)
}

/// The name must be fit for an interface, and free: to attach to one that somebody made persistent would let
/// its addresses and routes outlive this process.
fn check_name(name: &str) -> io::Result<()> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name"));
    }
    if crate::route::index_of(name).is_ok() {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Ok(())
}

/// Any socket will do for interface ioctls.
pub(crate) fn control_socket() -> io::Result<socket2::Socket> {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
}

/// An ifreq that holds the name and nothing else.
pub(crate) fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{in_new_namespace, ip};
    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    #[test]
    fn packets_pass_both_ways_and_the_interface_dies_with_the_descriptor() {
        packets_pass(Tun::open_plain);
    }

    #[test]
    fn packets_pass_with_vnet_headers_too() {
        packets_pass(Tun::open_vnet);
    }

    #[test]
    fn the_first_of_several_queues_passes_packets_too() {
        packets_pass(|name| Tun::open_queues(name, 3).map(|mut queues| queues.remove(0)));
    }

    // Whoever delivers a flow reads its answers, whatever queue they went to before.
    #[test]
    fn answers_come_by_the_queue_that_delivers() {
        in_new_namespace(|| {
            let queues = Tun::open_queues("tdm0", 3).unwrap();
            assert_eq!(queues.len(), 3);
            assert!(queues.iter().all(|queue| queue.index() == queues[0].index()));
            assert!(queues.iter().all(|queue| queue.offloads() == queues[0].offloads()));
            assert!(Tun::open_queues("tdm0", 2).is_err(), "a second holder must be refused");
            queues[0].configure(1400, 500).unwrap();
            ip("address add 10.9.0.1/32 dev tdm0");
            ip("route add 10.9.1.0/24 dev tdm0");
            let mut buffer = [0; 2048];
            let mut read = || {
                let deadline = Instant::now() + Duration::from_secs(2);
                loop {
                    assert!(Instant::now() < deadline, "no answer");
                    let got = [0, 1, 2].map(|at: usize| {
                        std::iter::from_fn(|| queues[at].read(&mut buffer).unwrap()).count()
                    });
                    if got != [0; 3] {
                        break got;
                    }
                }
            };
            for port in 7000..7016_u16 {
                let local = std::net::SocketAddr::from(([10, 9, 0, 1], port));
                let far = std::net::SocketAddr::from(([10, 9, 1, 7], 9000));
                let socket = UdpSocket::bind(local).unwrap();
                for round in 0..4 {
                    let queue = (usize::from(port) + round) % 3;
                    let packet = wire::ip::udp_packet(far, local, b"delivered").unwrap();
                    queues[queue].write(&packet).unwrap();
                    socket.send_to(b"answer", far).unwrap();
                    let mut expected = [0; 3];
                    expected[queue] = 1;
                    assert_eq!(read(), expected, "port {port}, round {round}");
                }
            }
            drop(queues);
            // A child that another test forks may have copies for a moment.
            let deadline = Instant::now() + Duration::from_secs(2);
            while crate::route::index_of("tdm0").is_ok() {
                assert!(Instant::now() < deadline, "it dies with the last of them");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn packets_pass(open: fn(&str) -> io::Result<Tun>) {
        in_new_namespace(move || {
            let tun = open("tdm0").unwrap();
            assert_eq!(tun.name(), "tdm0");
            assert!(open("tdm0").is_err(), "a second holder must be refused");
            ip("tuntap add dev tdm1 mode tun");
            assert!(open("tdm1").is_err(), "a persistent one would outlive the process");
            tun.configure(1380, 2000).unwrap();
            ip("address add 10.9.0.1/32 dev tdm0");
            ip("route add 10.9.1.0/24 dev tdm0");
            let shown = ip("link show tdm0");
            assert!(
                shown.contains("mtu 1380") && shown.contains("qlen 2000") && shown.contains("UP"),
                "{shown}"
            );
            assert!(!ip("-6 address show dev tdm0").contains("fe80"), "no address of its own");

            let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut buffer = [0_u8; 2048];
            assert_eq!(tun.read(&mut buffer).unwrap(), None, "nothing before anything was sent");
            socket.send_to(b"hello", "10.9.1.7:9000").unwrap();
            let deadline = Instant::now() + Duration::from_secs(2);
            let length = loop {
                if let Some((length, _)) = tun.read(&mut buffer).unwrap() {
                    break length;
                }
                assert!(Instant::now() < deadline);
            };
            assert_eq!(length, 20 + 8 + 5);
            assert_eq!(&buffer[28..33], b"hello");
            // Turn it round: addresses swapped keep the header's checksum right.
            let mut answer = buffer[..length].to_vec();
            answer[12..16].copy_from_slice(&buffer[16..20]);
            answer[16..20].copy_from_slice(&buffer[12..16]);
            answer[20..22].copy_from_slice(&buffer[22..24]);
            answer[22..24].copy_from_slice(&buffer[20..22]);
            // Of the checksum only a part is there, if the rest was left to us; IPv4 needs none.
            answer[26..28].fill(0);
            tun.write(&answer).unwrap();
            let (size, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((size, from.to_string().as_str()), (5, "10.9.1.7:9000"));
            assert!(tun.write(&[0_u8; 20]).is_err(), "not an IP version");

            drop(tun);
            assert!(!ip("link show").contains("tdm0"));
            assert!(!ip("route show table all").contains("10.9."));
        });
    }

    #[test]
    fn bad_names_are_refused() {
        for name in ["", "sixteen-bytes-xx", "a/b", "t%d"] {
            assert!(Tun::open_plain(name).is_err(), "{name:?}");
            assert!(Tun::open_vnet(name).is_err(), "{name:?}");
        }
    }
}

//! The packet socket of one virtual address on one interface.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

use super::Mac;
use super::packet::{self, Arp, Heard, Neighbor};
use crate::sys::{check, is_transient, set_option_of};
use crate::tun::{control_socket, interface_request};

/// What one turn of a [`Responder`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Questions answered.
    pub answered: u32,
    /// Questions left unanswered because the predicate said so.
    pub withheld: u32,
    /// The last one that claimed our address for itself. Expected of the other instance while an
    /// endpoint moves; otherwise somebody has the same address.
    pub conflict: Option<Mac>,
}

/// Answers for, and announces, one virtual address on one Ethernet interface.
#[derive(Debug)]
pub struct Responder {
    interface: String,
    address: IpAddr,
    mac: Mac,
    index: u32,
    fd: AsyncFd<OwnedFd>,
    /// Keeps the interface subscribed to the address's solicited-node group (MLD included).
    _group: Option<socket2::Socket>,
}

/// Most packets handled in one turn, so that a flood cannot hold the control loop.
const TURN: usize = 64;

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const ARPHRD_ETHER: libc::sa_family_t = 1;

impl Responder {
    /// Opens the socket; must be called inside a tokio runtime and with CAP_NET_RAW.
    /// Errors: `NotFound` without such an interface, `Unsupported` when it is not Ethernet
    /// (then nobody asks for addresses on it and no responder is needed).
    pub fn open(interface: &str, address: IpAddr) -> io::Result<Self> {
        let (index, mac) = identify(interface)?;
        let (protocol, filter) = match address {
            IpAddr::V4(v4) => (ETH_P_ARP, arp_filter(u32::from(v4))),
            IpAddr::V6(v6) => (ETH_P_IPV6, neighbor_filter(v6)),
        };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0: nothing is received before the filter is attached and the socket bound.
        // SAFETY: takes no pointer.
        let raw = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: `raw` was just returned by the kernel and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let mut filter = filter;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        set_option_of(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        let place = link_address(protocol, index, Mac([0; 6]));
        // SAFETY: a valid sockaddr_ll with its size.
        check(unsafe {
            libc::bind(
                fd.as_raw_fd(),
                std::ptr::from_ref(&place).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        })?;
        let group = match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => Some(join(index, packet::solicited_node(v6))?),
        };
        // SAFETY: the OwnedFd stays open and its number the same for as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { interface: interface.to_owned(), address, mac, index, fd, _group: group })
    }

    /// The address it stands for.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The interface's name.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The interface's Ethernet address.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Opens the socket again, after the interface was replaced (its index changed).
    pub fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(&self.interface, self.address)?;
        Ok(())
    }

    /// Waits for packets, then handles up to 64 of them: `may_answer` is asked right before
    /// each answer. Cancel-safe. Errors other than a link that is down (ENETDOWN, passed over)
    /// mean that the socket is of no more use: [`Responder::reopen`].
    pub async fn serve(&mut self, mut may_answer: impl FnMut() -> bool) -> io::Result<Served> {
        let mut served = Served::default();
        loop {
            let mut guard = self.fd.readable().await?;
            for _ in 0..TURN {
                let mut buffer = [0_u8; 256];
                let (bytes, from) = match receive(guard.get_inner(), &mut buffer) {
                    Ok(Some(got)) => got,
                    Ok(None) => continue,
                    Err(error) if is_transient(&error) => {
                        guard.clear_ready();
                        break;
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                    Err(error) => return Err(error),
                };
                let Some((answer, to)) = judge(self.address, self.mac, bytes, from, &mut served)
                else {
                    continue;
                };
                if may_answer() {
                    send(guard.get_inner(), self.index, self.address, &answer, to)?;
                    served.answered += 1;
                } else {
                    served.withheld += 1;
                }
            }
            if served != Served::default() {
                return Ok(served);
            }
        }
    }

    /// Says once to the whole segment that the address is here: gratuitous ARP in request form,
    /// or an unsolicited neighbour advertisement. The caller has checked that we may.
    pub fn announce(&mut self) -> io::Result<()> {
        // A bond or a bridge may have changed its address since.
        let (index, mac) = identify(&self.interface)?;
        self.mac = mac;
        if index != self.index {
            self.reopen()?;
        }
        let (bytes, to) = match self.address {
            IpAddr::V4(v4) => (Packet::Arp(Arp::announcement(mac, v4).emit()), Mac::BROADCAST),
            IpAddr::V6(v6) => {
                let (bytes, to) = packet::advertisement(mac, v6, None);
                (Packet::Neighbor(bytes), packet::multicast_mac(to))
            }
        };
        send(self.fd.get_ref(), self.index, self.address, &bytes, to)
    }
}

/// A packet ready to be sent.
enum Packet {
    Arp([u8; packet::ARP_LEN]),
    Neighbor([u8; packet::NA_LEN]),
}

impl Packet {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Arp(bytes) => bytes,
            Self::Neighbor(bytes) => bytes,
        }
    }
}

/// The answer to one packet and where it goes, or nothing.
fn judge(
    address: IpAddr,
    mac: Mac,
    bytes: &[u8],
    from: Mac,
    served: &mut Served,
) -> Option<(Packet, Mac)> {
    match address {
        IpAddr::V4(v4) => match packet::judge_arp(&Arp::parse(bytes)?, mac, v4) {
            Heard::Question(question) => {
                Some((Packet::Arp(question.answer(mac, v4).emit()), question.sender_mac))
            }
            Heard::Conflict(other) => {
                served.conflict = Some(other);
                None
            }
            Heard::Nothing => None,
        },
        IpAddr::V6(v6) => match packet::judge_neighbor(&Neighbor::parse(bytes)?, mac, v6) {
            Heard::Question(question) => {
                let (answer, to) = packet::advertisement(mac, v6, Some(&question));
                let to = if to.is_multicast() {
                    packet::multicast_mac(to)
                } else {
                    question.mac.unwrap_or(from)
                };
                Some((Packet::Neighbor(answer), to))
            }
            Heard::Conflict(other) => {
                served.conflict = Some(other);
                None
            }
            Heard::Nothing => None,
        },
    }
}

/// One packet and its Ethernet source; `None` for one that was not meant for this host.
fn receive<'b>(fd: &OwnedFd, buffer: &'b mut [u8; 256]) -> io::Result<Option<(&'b [u8], Mac)>> {
    let mut from = link_address(0, 0, Mac([0; 6]));
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: buffer and address are writable for the given lengths through the call.
    let read = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
            std::ptr::from_mut(&mut from).cast(),
            &raw mut length,
        )
    };
    let Ok(read) = usize::try_from(read) else { return Err(io::Error::last_os_error()) };
    let for_us = matches!(
        from.sll_pkttype,
        libc::PACKET_HOST | libc::PACKET_BROADCAST | libc::PACKET_MULTICAST
    );
    let [a, b, c, d, e, f, ..] = from.sll_addr;
    Ok(buffer.get(..read).filter(|_| for_us).map(|bytes| (bytes, Mac([a, b, c, d, e, f]))))
}

fn send(fd: &OwnedFd, index: u32, address: IpAddr, packet: &Packet, to: Mac) -> io::Result<()> {
    let protocol = if address.is_ipv4() { ETH_P_ARP } else { ETH_P_IPV6 };
    let place = link_address(protocol, index, to);
    let bytes = packet.bytes();
    // SAFETY: both pointers are valid for the given lengths; the kernel only reads.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            std::ptr::from_ref(&place).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    match usize::try_from(sent) {
        Ok(_) => Ok(()),
        Err(_) => match io::Error::last_os_error() {
            // A link that is down or a full queue loses this one; there will be more.
            error if is_transient(&error) => Ok(()),
            error if matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENOBUFS)) => Ok(()),
            error => Err(error),
        },
    }
}

fn link_address(protocol: u16, index: u32, to: Mac) -> libc::sockaddr_ll {
    let [a, b, c, d, e, f] = to.0;
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index as libc::c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [a, b, c, d, e, f, 0, 0],
    }
}

/// Index and Ethernet address of an interface.
fn identify(interface: &str) -> io::Result<(u32, Mac)> {
    let index = crate::route::index_of(interface)?;
    let mut request = interface_request(interface)?;
    let socket = control_socket()?;
    // SAFETY: a filled ifreq; the kernel writes the hardware address into it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut request) })?;
    // SAFETY: the call above filled this member of the union.
    let hardware = unsafe { request.ifr_ifru.ifru_hwaddr };
    if hardware.sa_family != ARPHRD_ETHER {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "not an Ethernet interface"));
    }
    let [a, b, c, d, e, f, ..] = hardware.sa_data;
    Ok((index, Mac([a, b, c, d, e, f].map(|byte| byte as u8))))
}

fn join(index: u32, group: Ipv6Addr) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None)?;
    socket.join_multicast_v6(&group, index)?;
    Ok(socket)
}

// Classic BPF (RFC-less; linux/filter.h): a load of a word, a conditional jump, a return.
const LOAD_WORD: u16 = 0x20;
const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

const fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Lets ARP packets through that name the address as target (offset 24) or sender (offset 14):
/// the rest of the segment's broadcasts never wake us.
fn arp_filter(address: u32) -> Vec<libc::sock_filter> {
    vec![
        step(LOAD_WORD, 0, 0, 24),
        step(JUMP_IF_EQUAL, 2, 0, address),
        step(LOAD_WORD, 0, 0, 14),
        step(JUMP_IF_EQUAL, 0, 1, address),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ]
}

/// Lets neighbour solicitations and advertisements (ICMPv6 type at offset 40) for the address
/// (target at offset 48) through.
fn neighbor_filter(address: Ipv6Addr) -> Vec<libc::sock_filter> {
    let mut steps = vec![
        step(LOAD_BYTE, 0, 0, 6),
        step(JUMP_IF_EQUAL, 0, 12, 58),
        step(LOAD_BYTE, 0, 0, 40),
        step(JUMP_IF_GREATER_OR_EQUAL, 0, 10, 135),
        step(JUMP_IF_GREATER_OR_EQUAL, 9, 0, 137),
    ];
    let segments = address.segments();
    for (i, pair) in segments.chunks(2).enumerate() {
        let word = pair.iter().fold(0_u32, |word, half| word << 16 | u32::from(*half));
        let left = (3 - i as u8) * 2;
        steps.push(step(LOAD_WORD, 0, 0, 48 + 4 * i as u32));
        steps.push(step(JUMP_IF_EQUAL, 0, left + 1, word));
    }
    steps.push(step(RETURN, 0, 0, u32::MAX));
    steps.push(step(RETURN, 0, 0, 0));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{in_new_namespace, ip};
    use std::cell::Cell;
    use std::time::Duration;

    /// A namespace with `v0` here and `v1` in a neighbour's namespace, whose thread runs the
    /// given closures and sends back what they return.
    struct Segment {
        ask: std::sync::mpsc::Sender<&'static str>,
        heard: std::sync::mpsc::Receiver<String>,
    }

    impl Segment {
        fn new() -> Self {
            let (ask, asked) = std::sync::mpsc::channel::<&'static str>();
            let (say, heard) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                crate::netns::isolate_thread().unwrap();
                // SAFETY: takes no pointer.
                say.send(unsafe { libc::gettid() }.to_string()).unwrap();
                for command in asked {
                    let result = if let Some(to) = command.strip_prefix("poke ") {
                        let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
                        let socket4 = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                        let to: std::net::SocketAddr = to.parse().unwrap();
                        let socket = if to.is_ipv4() { socket4 } else { socket };
                        format!("{:?}", socket.send_to(b"x", to).is_ok())
                    } else if let Some(address) = command.strip_prefix("announce ") {
                        let runtime = tokio::runtime::Builder::new_current_thread()
                            .enable_all()
                            .build()
                            .unwrap();
                        let _guard = runtime.enter();
                        let mut responder =
                            Responder::open("v1", address.parse().unwrap()).unwrap();
                        responder.announce().unwrap();
                        format!("{:?}", responder.mac())
                    } else {
                        ip(command)
                    };
                    if say.send(result).is_err() {
                        break;
                    }
                }
            });
            let tid = heard.recv().unwrap();
            ip("link add v0 type veth peer name v1");
            ip(&format!("link set v1 netns {tid}"));
            ip("address add 192.0.2.1/24 dev v0");
            ip("address add 2001:db8::1/64 dev v0 nodad");
            ip("link set v0 up");
            let segment = Self { ask, heard };
            segment.there("address add 192.0.2.2/24 dev v1");
            segment.there("address add 2001:db8::2/64 dev v1 nodad");
            segment.there("link set v1 up");
            // Until the kernel's link watch has run, packets vanish in a queue that does nothing.
            let up = (0..300).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                ip("link show v0").contains("state UP")
                    && segment.there("link show v1").contains("state UP")
            });
            assert!(up);
            segment
        }

        fn there(&self, command: &'static str) -> String {
            self.ask.send(command).unwrap();
            self.heard.recv().unwrap()
        }
    }

    fn run<F: Future<Output = ()>>(body: impl FnOnce(Segment) -> F + Send + 'static) {
        in_new_namespace(|| {
            let segment = Segment::new();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(body(segment));
        });
    }

    async fn serve_for(responder: &mut Responder, millis: u64, may: &Cell<bool>) -> Served {
        let mut total = Served::default();
        let end = tokio::time::sleep(Duration::from_millis(millis));
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return total,
                served = responder.serve(|| may.get()) => {
                    let served = served.unwrap();
                    total.answered += served.answered;
                    total.withheld += served.withheld;
                    total.conflict = served.conflict.or(total.conflict);
                }
            }
        }
    }

    #[test]
    fn a_real_kernel_learns_the_address_only_while_we_may_answer() {
        run(|segment| async move {
            for (virtual_address, poke, neigh) in [
                ("192.0.2.10", "poke 192.0.2.10:9", "neigh show to 192.0.2.10"),
                ("2001:db8::10", "poke [2001:db8::10]:9", "neigh show to 2001:db8::10"),
            ] {
                let mut responder =
                    Responder::open("v0", virtual_address.parse().unwrap()).unwrap();
                let mac = format!("{:?}", responder.mac());
                let may = Cell::new(false);
                segment.there(poke);
                let served = serve_for(&mut responder, 200, &may).await;
                assert!(served.answered == 0 && served.withheld > 0, "{served:?}");
                let shown = segment.there(neigh);
                assert!(!shown.contains(&mac), "{shown}");
                // The kernel asks again each second; from now on it gets an answer.
                may.set(true);
                segment.there(poke);
                let served = serve_for(&mut responder, 1300, &may).await;
                assert!(served.answered > 0 && served.conflict.is_none(), "{served:?}");
                let shown = segment.there(neigh);
                assert!(shown.contains(&mac) && shown.contains("REACHABLE"), "{shown}");
            }
        });
    }

    #[test]
    fn an_announcement_moves_the_neighbours_entry_at_once_and_is_seen_as_a_conflict() {
        run(|segment| async move {
            for (virtual_address, add, neigh, announce) in [
                (
                    "192.0.2.10",
                    "neigh replace 192.0.2.10 lladdr 02:00:00:00:00:99 dev v1 nud reachable",
                    "neigh show to 192.0.2.10",
                    "announce 192.0.2.10",
                ),
                (
                    "2001:db8::10",
                    "neigh replace 2001:db8::10 lladdr 02:00:00:00:00:99 dev v1 nud reachable",
                    "neigh show to 2001:db8::10",
                    "announce 2001:db8::10",
                ),
            ] {
                let mut responder =
                    Responder::open("v0", virtual_address.parse().unwrap()).unwrap();
                segment.there(add);
                assert!(segment.there(neigh).contains("02:00:00:00:00:99"));
                // The receiver's locktime (1 s by default) must not stand in the way.
                responder.announce().unwrap();
                let mac = format!("{:?}", responder.mac());
                let moved = (0..50).any(|_| {
                    std::thread::sleep(Duration::from_millis(10));
                    segment.there(neigh).contains(&mac)
                });
                assert!(moved, "{}", segment.there(neigh));
                // Somebody else claims the address.
                let theirs = segment.there(announce);
                let served = serve_for(&mut responder, 100, &Cell::new(true)).await;
                assert_eq!(served.conflict.map(|mac| format!("{mac:?}")), Some(theirs));
                assert_eq!(served.answered, 0);
            }
        });
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_not_ethernet_is_refused() {
        let kind = Responder::open("lo", "192.0.2.1".parse().unwrap()).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::Unsupported);
        assert!(Responder::open("none0", "192.0.2.1".parse().unwrap()).is_err());
    }
}

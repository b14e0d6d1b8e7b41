//! UDP in batches: recvmmsg and sendmmsg over buffers of the caller, without allocation per call.
//!
//! A socket is bound to a virtual address before the address is present (IP_FREEBIND), so that a
//! takeover opens nothing. While the address is absent the kernel refuses to send from it
//! (EINVAL, newer ones ENETUNREACH): one more fence, counted in [`SendCounters`].
//!
//! Datagrams that follow each other with one length, destination and TOS leave as one UDP_SEGMENT send,
//! which the kernel splits as late as it can: most of what sending costs is then paid once a run. What the
//! kernel's refusal of such a send means for the next ones is decided in one place, [`Segmenting`].
//!
//! Likewise UDP_GRO: the kernel may hand over a run of datagrams in one buffer of 64 KB, and [`BatchSocket::recv`]
//! deals them out to the caller's buffers. What is longer than such a buffer is cut, or given to the caller whole:
//! [`BatchSocket::recv_or_give`].
//!
//! Outer datagrams leave with DF clear and without path-MTU discovery (IP_PMTUDISC_DONT;
//! RFC 4301 §8.1 leaves the choice to us): fragmentation is kept rare by the TUN's MTU, a forged
//! ICMP cannot shrink a path, and a peer behind a silent small-MTU hop stays reachable.

use std::io;
use std::iter::Peekable;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::{check, is_transient, set_option};

/// Takes one datagram.
type Give<'a> = dyn FnMut(RecvMeta, &[u8]) + 'a;

/// Most datagrams in one system call.
pub const BATCH: usize = 64;

/// Socket buffers asked for, in bytes (dataplane.md).
pub const SOCKET_BUFFER: usize = 7 << 20;

/// What is known of one received datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecvMeta {
    /// Who sent it.
    pub from: SocketAddr,
    /// Bytes in the buffer that was given for it.
    pub len: usize,
    /// The outer IPv4 TOS or IPv6 traffic class byte (DSCP ‖ ECN); 0 unless asked for.
    pub tos: u8,
    /// The datagram was longer than its buffer.
    pub truncated: bool,
}

impl RecvMeta {
    /// A place holder to fill arrays with.
    pub const EMPTY: Self = Self {
        from: SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
        len: 0,
        tos: 0,
        truncated: false,
    };
}

/// One datagram to send.
#[derive(Clone, Copy, Debug)]
pub struct SendItem<'a> {
    /// Destination, of the socket's family.
    pub to: SocketAddr,
    /// The UDP payload.
    pub bytes: &'a [u8],
    /// Outer TOS or traffic class byte.
    pub tos: u8,
}

/// What became of datagrams that were to be sent. All but `sent` are drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendCounters {
    /// Taken by the kernel.
    pub sent: u64,
    /// The socket buffer was full (EAGAIN, ENOBUFS, ENOMEM).
    pub full: u64,
    /// No route or the network is down (ENETUNREACH, EHOSTUNREACH, ENETDOWN).
    pub unreachable: u64,
    /// A firewall refused (EPERM, EACCES).
    pub refused_by_host: u64,
    /// The address is not (yet, or any more) on this host (EINVAL, EADDRNOTAVAIL).
    pub not_local: u64,
    /// Larger than the kernel takes (EMSGSIZE).
    pub too_large: u64,
    /// A pending ICMP error consumed (ECONNREFUSED and other); the datagram was tried once more.
    pub icmp_errors: u64,
    /// Everything else.
    pub other: u64,
}

/// How to open a [`BatchSocket`].
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Report the outer TOS byte of received datagrams (needed to copy ECN, RFC 6040).
    pub recv_tos: bool,
    /// Receive and send buffer in bytes; needs CAP_NET_ADMIN above the host's limit.
    pub buffer_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { recv_tos: false, buffer_bytes: SOCKET_BUFFER }
    }
}

/// A UDP socket that reads and writes in batches; owned by one worker.
#[derive(Debug)]
pub struct BatchSocket {
    socket: Arc<Socket>,
    local: SocketAddr,
    recv_tos: bool,
    scratch: Box<Scratch>,
    incoming: Incoming,
    segmenting: Segmenting,
    counters: SendCounters,
    /// Receive errors other than "nothing there" (pending ICMP errors, mostly).
    receive_errors: u64,
}

/// The same socket for the control thread's few datagrams.
#[derive(Clone, Debug)]
pub struct UdpSender {
    socket: Arc<Socket>,
    local: SocketAddr,
}

/// Room for a TOS and a UDP_SEGMENT control message, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// CMSG_SPACE(sizeof(int)), which also holds a UDP_SEGMENT's two bytes.
const SPACE: usize = 24;
const CONTROL: usize = 2 * SPACE;

/// Most bytes of one segmented send: a UDP datagram over IPv4 (RFC 768, RFC 791).
const MOST_SEGMENTED: usize = 65_507;

/// Runs of datagrams in one recvmmsg.
const RUNS: usize = 32;

/// Room for one run: the largest UDP datagram there is.
const RUN_ROOM: usize = 1 << 16;

/// One received run: datagrams of `size` bytes, the last perhaps shorter.
#[derive(Clone, Copy)]
struct Received {
    meta: RecvMeta,
    size: usize,
}

/// What one recvmmsg brought, and how far it was dealt out. Its memory is allocated once; pages that no run ever
/// reached stay untouched.
struct Incoming {
    room: Box<[u8]>,
    runs: [Received; RUNS],
    count: usize,
    next: usize,
    /// Into the run at `next`.
    offset: usize,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} of {} runs dealt)", self.next, self.count)
    }
}

impl Incoming {
    fn new() -> Self {
        let none = Received { meta: RecvMeta::EMPTY, size: 0 };
        Self {
            room: vec![0; RUNS * RUN_ROOM].into_boxed_slice(),
            runs: [none; RUNS],
            count: 0,
            next: 0,
            offset: 0,
        }
    }

    /// The next datagram.
    fn next(&mut self) -> Option<(&[u8], RecvMeta)> {
        if self.next >= self.count {
            return None;
        }
        let run = self.runs.get(self.next)?;
        let room = self.room.get(self.next * RUN_ROOM..(self.next + 1) * RUN_ROOM)?;
        let whole = room.get(..run.meta.len)?;
        let end = self.offset.saturating_add(run.size).min(whole.len());
        let bytes = whole.get(self.offset..end)?;
        let meta = run.meta;
        if end >= whole.len() {
            self.next += 1;
            self.offset = 0;
        } else {
            self.offset = end;
        }
        Some((bytes, meta))
    }
}

/// Refusals of one size in a row after which datagrams of that size are no longer joined. More than one, as the
/// address may have come between a refused run and its datagrams that then went one by one.
const STRIKES: u8 = 3;

/// Whether runs are sent as one, and up to which size of datagram.
///
/// The kernel's words (net/ipv4/udp.c, udp_send_skb): EIO, no checksum offload on the way out, or IPsec of its own
/// there; EINVAL, later EMSGSIZE, a datagram that would not fit the interface's MTU, which by itself is sent in
/// fragments. EINVAL also stands for an address that is not on the host. So a refusal counts only when the same
/// datagram went by itself right after. Every other error (ENOBUFS, EAGAIN, EPERM …) is about the datagrams or the
/// moment, and says nothing about segmentation.
#[derive(Debug)]
struct Segmenting {
    /// Datagrams shorter than this are joined; 0: none.
    below: usize,
    refused_size: usize,
    strikes: u8,
}

/// What a refused run may mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// Segmentation is not supported here.
    Support,
    /// Datagrams of this size cannot be segments here.
    Size,
}

impl Segmenting {
    fn new(known: bool) -> Self {
        Self { below: if known { usize::MAX } else { 0 }, refused_size: 0, strikes: 0 }
    }

    fn takes(&self, size: usize) -> bool {
        size < self.below
    }

    /// What an error of a run makes doubtful; `None` when it says nothing about runs.
    fn doubt(error: &io::Error) -> Option<Doubt> {
        match error.raw_os_error() {
            Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT) => Some(Doubt::Support),
            Some(libc::EINVAL | libc::EMSGSIZE) => Some(Doubt::Size),
            _ => None,
        }
    }

    /// A run went.
    fn went(&mut self, size: usize) {
        if size >= self.refused_size {
            self.strikes = 0;
        }
    }

    /// A run was refused, and its first datagram, of `size` bytes, went by itself. True when that changes what is
    /// joined from now on.
    fn refused(&mut self, doubt: Doubt, size: usize) -> bool {
        match doubt {
            Doubt::Support => {
                self.below = 0;
                true
            }
            Doubt::Size => {
                if size != self.refused_size {
                    self.refused_size = size;
                    self.strikes = 0;
                }
                self.strikes += 1;
                if self.strikes < STRIKES {
                    return false;
                }
                self.strikes = 0;
                self.below = self.below.min(size);
                true
            }
        }
    }
}

/// The headers of a batch. The pointers inside are set and used within one call only.
struct Scratch {
    names: [libc::sockaddr_storage; BATCH],
    vectors: [libc::iovec; BATCH],
    controls: [Control; BATCH],
    messages: [libc::mmsghdr; BATCH],
    /// Datagrams in each message, and where the first one's vector stands.
    runs: [Run; BATCH],
}

/// Which datagrams make up one message.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    count: usize,
}

// SAFETY: the raw pointers in `vectors` and `messages` are rewritten at the start of every call
// and never read by anything but that call's system call; between calls they are dead.
unsafe impl Send for Scratch {}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

impl Scratch {
    fn new() -> Box<Self> {
        // SAFETY: all fields are plain C data for which all zeros is a valid value.
        Box::new(unsafe { std::mem::zeroed() })
    }
}

/// Opens a UDP socket bound to `local`, which need not be an address of this host yet.
/// The socket is non-blocking. Errors: EADDRINUSE when another process holds the port without
/// sharing it; EACCES below port 1024 without CAP_NET_BIND_SERVICE.
fn open(local: SocketAddr, options: Options) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    // Beside an IKE daemon that holds the wildcard port and shares it, the more specific bind wins.
    socket.set_reuse_address(true)?;
    // An int option even for IPv6 sockets.
    set_option(&socket, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
    enlarge_buffers(&socket, options.buffer_bytes)?;
    let tos = libc::c_int::from(options.recv_tos);
    if local.is_ipv4() {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, tos)?;
    } else {
        socket.set_only_v6(true)?;
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, tos)?;
    }
    socket.bind(&local.into())?;
    Ok(socket)
}

/// Asks for socket buffers of so many bytes each way: beyond the host's limit with CAP_NET_ADMIN,
/// else up to it.
pub fn enlarge_buffers(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    for (force, plain) in
        [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        if set_option(socket, libc::SOL_SOCKET, force, bytes).is_err() {
            set_option(socket, libc::SOL_SOCKET, plain, bytes)?;
        }
    }
    Ok(())
}

/// Opens a plain non-blocking socket with the same options and binding, for the control loop
/// (IKE on port 500): wrap it in tokio's `UdpSocket::from_std`.
pub fn control_socket(local: SocketAddr) -> io::Result<std::net::UdpSocket> {
    Ok(open(local, Options { recv_tos: false, buffer_bytes: 1 << 20 })?.into())
}

impl BatchSocket {
    /// Opens and binds; see [`Options`] and the module's head.
    pub fn bind(local: SocketAddr, options: Options) -> io::Result<Self> {
        let socket = open(local, options)?;
        // Kernels before 5.0 refuse; then every datagram comes by itself.
        let _ = set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1);
        // Kernels before 4.18 would send a run as one long datagram: they do not know the option either.
        let known = set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0);
        let segmenting = Segmenting::new(known.is_ok());
        let local = socket.local_addr()?.as_socket().unwrap_or(local);
        Ok(Self {
            socket: Arc::new(socket),
            local,
            recv_tos: options.recv_tos,
            scratch: Scratch::new(),
            incoming: Incoming::new(),
            segmenting,
            counters: SendCounters::default(),
            receive_errors: 0,
        })
    }

    /// The bound address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// A handle for another thread that sends single datagrams from the same address and port.
    #[must_use]
    pub fn sender(&self) -> UdpSender {
        UdpSender { socket: Arc::clone(&self.socket), local: self.local }
    }

    /// What became of everything sent so far.
    #[must_use]
    pub fn counters(&self) -> SendCounters {
        self.counters
    }

    /// Receive calls that failed with a real error so far.
    #[must_use]
    pub fn receive_errors(&self) -> u64 {
        self.receive_errors
    }

    /// Receives up to `min(buffers, metas)` datagrams, the i-th into the i-th buffer and described by
    /// `metas[i]`. 0 when nothing is there. Never blocks, never allocates. Pending errors of the socket are
    /// counted, not returned. What did not find a buffer comes with the next call: see [`BatchSocket::has_more`].
    pub fn recv<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
    ) -> usize {
        self.deal(buffers, metas, None)
    }

    /// Like [`BatchSocket::recv`], but a datagram longer than the buffer that would be its own is not cut: `long` sees
    /// it whole (in memory of the socket's), and the buffer takes the next. Long IKE messages among ESP packets.
    pub fn recv_or_give<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
        mut long: impl FnMut(RecvMeta, &[u8]),
    ) -> usize {
        self.deal(buffers, metas, Some(&mut long))
    }

    fn deal<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
        mut long: Option<&mut Give<'_>>,
    ) -> usize {
        if !self.has_more() {
            self.receive();
        }
        let mut dealt = 0;
        for (buffer, meta) in buffers.zip(metas) {
            let mut next = self.incoming.next();
            while let (Some((bytes, of)), Some(give)) = (next, &mut long)
                && bytes.len() > buffer.len()
                && !of.truncated
            {
                give(RecvMeta { len: bytes.len(), ..of }, bytes);
                next = self.incoming.next();
            }
            let Some((bytes, of)) = next else { break };
            let room = buffer.len().min(bytes.len());
            if let (Some(to), Some(from)) = (buffer.get_mut(..room), bytes.get(..room)) {
                to.copy_from_slice(from);
            }
            *meta = RecvMeta { len: room, truncated: of.truncated || room < bytes.len(), ..of };
            dealt += 1;
        }
        dealt
    }

    /// Whether datagrams were received that no call of [`BatchSocket::recv`] has handed out yet: the descriptor
    /// does not become readable for them.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.incoming.next < self.incoming.count
    }

    /// One recvmmsg into the buffers of `incoming`.
    fn receive(&mut self) {
        let Scratch { names, vectors, controls, messages, .. } = &mut *self.scratch;
        let slots = names.iter_mut().zip(vectors).zip(controls).zip(messages.iter_mut());
        let rooms = self.incoming.room.chunks_exact_mut(RUN_ROOM);
        for ((((name, vector), control), message), room) in slots.zip(rooms) {
            vector.iov_base = room.as_mut_ptr().cast();
            vector.iov_len = room.len();
            let header = &mut message.msg_hdr;
            header.msg_name = std::ptr::from_mut(name).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
            message.msg_len = 0;
        }
        self.incoming.count = 0;
        self.incoming.next = 0;
        self.incoming.offset = 0;
        // SAFETY: the first RUNS headers were filled above with pointers into arrays of `self`; lengths match.
        let got = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                RUNS as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let Ok(got) = usize::try_from(got) else {
            if !is_transient(&io::Error::last_os_error()) {
                self.receive_errors += 1;
            }
            return;
        };
        for ((message, name), run) in
            messages.iter().zip(names.iter()).zip(&mut self.incoming.runs).take(got)
        {
            let header = &message.msg_hdr;
            let (tos, size) = notes_of(header);
            let len = message.msg_len as usize;
            let meta = RecvMeta {
                from: address_of(name).unwrap_or(RecvMeta::EMPTY.from),
                len,
                truncated: header.msg_flags & libc::MSG_TRUNC != 0,
                tos: if self.recv_tos { tos } else { 0 },
            };
            *run = Received { meta, size: if size == 0 { len } else { size } };
        }
        self.incoming.count = got;
    }

    /// Sends datagrams in order, in system calls of up to [`BATCH`]; gives how many the kernel
    /// took. A datagram it refuses is counted by reason and skipped; a full socket buffer drops
    /// the rest of the batch. Never blocks, never allocates.
    pub fn send<'a>(&mut self, items: impl Iterator<Item = SendItem<'a>>) -> usize {
        let mut items = items.peekable();
        let before = self.counters.sent;
        while items.peek().is_some() {
            let count = self.fill(&mut items);
            self.send_filled(count);
        }
        (self.counters.sent - before) as usize
    }

    /// Fills headers from the iterator, a run of equal datagrams into each; gives their number (1..=BATCH).
    fn fill<'a>(&mut self, items: &mut Peekable<impl Iterator<Item = SendItem<'a>>>) -> usize {
        let segmenting = &self.segmenting;
        let Scratch { names, vectors, controls, messages, runs } = &mut *self.scratch;
        let headers = names.iter_mut().zip(controls).zip(messages.iter_mut()).zip(runs.iter_mut());
        let mut vectors = vectors.iter_mut().enumerate();
        let mut count = 0;
        for (((name, control), message), run) in headers {
            let Some((first, vector)) = vectors.next() else { break };
            let Some(head) = items.next() else { break };
            let size = head.bytes.len();
            *vector = vector_of(&head);
            *run = Run { first, count: 1 };
            let header = &mut message.msg_hdr;
            header.msg_iov = vector;
            let (mut total, mut last) = (size, size);
            // The last segment may be shorter, and then it is the last.
            let fits = |item: &SendItem<'_>, total: usize, last: usize| {
                segmenting.takes(size)
                    && last == size
                    && (1..=size).contains(&item.bytes.len())
                    && (item.to, item.tos) == (head.to, head.tos)
                    && total + item.bytes.len() <= MOST_SEGMENTED
            };
            while vectors.len() > 0
                && let Some(item) = items.next_if(|item| fits(item, total, last))
                && let Some((_, vector)) = vectors.next()
            {
                *vector = vector_of(&item);
                last = item.bytes.len();
                total += last;
                run.count += 1;
            }
            header.msg_iovlen = run.count as _;
            header.msg_namelen = write_address(name, head.to);
            header.msg_name = std::ptr::from_mut(name).cast();
            let mut length = 0;
            if head.tos != 0 {
                write_tos(control, head.tos, head.to.is_ipv4());
                length += SPACE;
            }
            if run.count > 1 {
                write_segment(control, length, size);
                length += SPACE;
            }
            header.msg_control =
                if length == 0 { std::ptr::null_mut() } else { control.0.as_mut_ptr().cast() };
            header.msg_controllen = length as _;
            header.msg_flags = 0;
            message.msg_len = 0;
            count += 1;
        }
        count
    }

    fn send_filled(&mut self, count: usize) {
        let mut next = 0;
        let mut retried = false;
        while next < count {
            let Some(rest) = self.scratch.messages.get_mut(next..count) else { return };
            // SAFETY: these headers were filled by `fill`, whose items outlive `send`; the kernel
            // only reads what they point to.
            let sent = unsafe {
                libc::sendmmsg(
                    self.socket.as_raw_fd(),
                    rest.as_mut_ptr(),
                    rest.len() as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                )
            };
            let runs = &self.scratch.runs;
            if let Ok(sent @ 1..) = usize::try_from(sent) {
                for run in runs.iter().skip(next).take(sent) {
                    self.counters.sent += run.count as u64;
                    let head = self.scratch.vectors.get(run.first);
                    if run.count > 1
                        && let Some(head) = head
                    {
                        self.segmenting.went(head.iov_len);
                    }
                }
                next += sent;
                retried = false;
                continue;
            }
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            let run = runs.get(next).copied().unwrap_or(Run { first: 0, count: 0 });
            if run.count > 1
                && let Some(doubt) = Segmenting::doubt(&error)
            {
                self.send_singly(next, run, doubt, &error);
                next += 1;
                continue;
            }
            let left = runs.iter().take(count).skip(next).map(|run| run.count as u64).sum();
            let failure = count_error(&mut self.counters, &error, left, run.count as u64);
            match failure {
                Failure::Batch => return,
                Failure::Datagram => next += 1,
                Failure::Pending if retried => next += 1,
                // The error belonged to an earlier datagram: this one has not been tried yet.
                Failure::Pending => retried = true,
            }
        }
    }

    /// Sends the datagrams of a refused run one by one, each in the run's class.
    fn send_singly(&mut self, message: usize, run: Run, doubt: Doubt, refusal: &io::Error) {
        let Scratch { vectors, messages, .. } = &mut *self.scratch;
        let Some(message) = messages.get_mut(message) else { return };
        let header = &mut message.msg_hdr;
        // UDP_SEGMENT stands last, behind the class where there is one.
        header.msg_controllen = header.msg_controllen.saturating_sub(SPACE as _);
        if header.msg_controllen == 0 {
            header.msg_control = std::ptr::null_mut();
        }
        for (place, vector) in vectors.iter_mut().skip(run.first).take(run.count).enumerate() {
            let size = vector.iov_len;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            // SAFETY: as in `send_filled`: one header, its name, class and one vector, all alive and filled.
            let sent =
                unsafe { libc::sendmsg(self.socket.as_raw_fd(), header, libc::MSG_DONTWAIT) };
            if sent < 0 {
                count_error(&mut self.counters, &io::Error::last_os_error(), 1, 1);
                continue;
            }
            self.counters.sent += 1;
            if place == 0 && self.segmenting.refused(doubt, size) {
                match doubt {
                    Doubt::Support => {
                        tracing::info!(local = %self.local, problem = %refusal, "the host cannot send runs of datagrams at once (UDP_SEGMENT; checksum offload may be off): each is sent by itself from now on, which costs throughput");
                    }
                    Doubt::Size => {
                        tracing::info!(local = %self.local, size, problem = %refusal, "datagrams of this size do not fit the interface whole: they are sent one by one from now on, in fragments, which costs throughput (is the TUN's MTU too large?)");
                    }
                }
            }
        }
    }
}

fn vector_of(item: &SendItem<'_>) -> libc::iovec {
    libc::iovec { iov_base: item.bytes.as_ptr().cast_mut().cast(), iov_len: item.bytes.len() }
}

/// What a failed send says about the datagrams.
enum Failure {
    /// This and all that follow are lost.
    Batch,
    /// This one is lost.
    Datagram,
    /// An old error was reported: try again.
    Pending,
}

/// `remaining` datagrams would follow in the call that failed, the first `these` of them in one message.
fn count_error(
    counters: &mut SendCounters,
    error: &io::Error,
    remaining: u64,
    these: u64,
) -> Failure {
    match error.raw_os_error().unwrap_or(0) {
        libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => {
            counters.full += remaining;
            return Failure::Batch;
        }
        libc::ECONNREFUSED | libc::EPROTO | libc::ENOPROTOOPT => {
            counters.icmp_errors += 1;
            return Failure::Pending;
        }
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN => {
            counters.unreachable += these;
        }
        libc::EPERM | libc::EACCES => counters.refused_by_host += these,
        libc::EINVAL | libc::EADDRNOTAVAIL => counters.not_local += these,
        libc::EMSGSIZE => counters.too_large += these,
        _ => counters.other += these,
    }
    Failure::Datagram
}

impl AsFd for BatchSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for BatchSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl UdpSender {
    /// The address datagrams leave from.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends one datagram without blocking. A pending ICMP error is passed over once.
    pub fn send_to(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let to = to.into();
        match self.socket.send_to(bytes, &to) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.socket.send_to(bytes, &to).map(drop)
            }
            other => other.map(drop),
        }
    }
}

/// Writes an address in the kernel's form and gives its length.
fn write_address(storage: &mut libc::sockaddr_storage, address: SocketAddr) -> libc::socklen_t {
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
fn address_of(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
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
fn notes_of(header: &libc::msghdr) -> (u8, usize) {
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
fn write_tos(control: &mut Control, tos: u8, v4: bool) {
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
fn write_segment(control: &mut Control, at: usize, size: usize) {
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

/// Waits up to `millis` for one descriptor to become readable; for tests and probes.
pub fn wait_readable(file: &impl AsFd, millis: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: file.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = check(unsafe { libc::poll(&raw mut poll, 1, millis) })?;
    Ok(ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{in_new_namespace, ip, stub};

    fn receive(socket: &mut BatchSocket) -> Vec<(RecvMeta, Vec<u8>)> {
        let mut buffers = vec![[0_u8; 200]; BATCH];
        let mut metas = [RecvMeta::EMPTY; BATCH];
        assert!(wait_readable(socket, 1000).unwrap());
        let count = socket.recv(buffers.iter_mut().map(|buffer| &mut buffer[..]), &mut metas);
        (0..count).map(|i| (metas[i], buffers[i][..metas[i].len].to_vec())).collect()
    }

    fn both_ways(first: &str, second: &str) {
        let options = Options { recv_tos: true, ..Options::default() };
        let mut left = BatchSocket::bind(first.parse().unwrap(), options).unwrap();
        let mut right = BatchSocket::bind(second.parse().unwrap(), options).unwrap();
        let payloads: Vec<Vec<u8>> = (0..150_u8).map(|i| vec![i; 1 + usize::from(i)]).collect();
        let to = right.local_addr();
        let sent =
            left.send(payloads.iter().map(|bytes| SendItem { to, bytes, tos: bytes[0] & 0x03 }));
        assert_eq!(sent, 150);
        let mut got = Vec::new();
        while got.len() < 150 {
            got.extend(receive(&mut right));
        }
        for (i, (meta, bytes)) in got.iter().enumerate() {
            assert_eq!(bytes, &payloads[i], "order and content");
            assert_eq!(meta.from, left.local_addr());
            assert_eq!(meta.tos, i as u8 & 0x03, "ECN bits of datagram {i}");
            assert!(!meta.truncated);
        }
        left.send([SendItem { to, bytes: &[9; 300], tos: 0 }].into_iter());
        let (meta, bytes) = receive(&mut right).remove(0);
        assert!(meta.truncated && bytes.len() == 200);
        right.sender().send_to(b"back", left.local_addr()).unwrap();
        assert_eq!(receive(&mut left).remove(0).1, b"back");
    }

    #[test]
    fn batches_keep_order_content_and_tos() {
        in_new_namespace(|| {
            ip("link set lo up");
            both_ways("127.0.0.1:4500", "127.0.0.2:4500");
            both_ways("[::1]:4500", "[::1]:4501");
        });
    }

    #[test]
    fn runs_of_equal_datagrams_travel_as_one_and_arrive_one_by_one() {
        in_new_namespace(|| {
            ip("link set lo up");
            let mut near =
                BatchSocket::bind("127.0.0.1:4500".parse().unwrap(), Options::default()).unwrap();
            let mut far =
                BatchSocket::bind("127.0.0.2:4500".parse().unwrap(), Options::default()).unwrap();
            let to = far.local_addr();
            // Three runs: 60 of 900 bytes ended by a shorter one, 1 larger, then 40 of 700 in another class.
            let lengths: Vec<(usize, u8)> = [(900, 0); 60]
                .into_iter()
                .chain([(10, 0), (1200, 0)])
                .chain([(700, 0x28); 40])
                .collect();
            let all: Vec<Vec<u8>> =
                lengths.iter().enumerate().map(|(i, (len, _))| vec![i as u8; *len]).collect();
            let items =
                all.iter().zip(&lengths).map(|(bytes, (_, tos))| SendItem { to, bytes, tos: *tos });
            assert_eq!(near.send(items), all.len());
            assert_eq!(near.segmenting.below, usize::MAX, "this kernel segments on loopback");
            let mut got: Vec<Vec<u8>> = Vec::new();
            let mut calls = 0;
            while got.len() < all.len() {
                assert!(far.has_more() || wait_readable(&far, 2000).unwrap());
                // Few buffers at a time: what does not fit must come with the next call.
                let mut room = vec![[0_u8; 2048]; 7];
                let mut metas = [RecvMeta::EMPTY; 7];
                let count = far.recv(room.iter_mut().map(|b| &mut b[..]), &mut metas);
                got.extend(
                    room.iter().zip(&metas).take(count).map(|(b, meta)| b[..meta.len].to_vec()),
                );
                calls += 1;
            }
            assert_eq!(got, all);
            assert!(calls >= all.len() / 7);
            assert!(!far.has_more());
        });
    }

    #[test]
    fn a_datagram_that_does_not_fit_is_cut_and_says_so() {
        in_new_namespace(|| {
            ip("link set lo up");
            let mut near =
                BatchSocket::bind("127.0.0.1:4500".parse().unwrap(), Options::default()).unwrap();
            let mut far =
                BatchSocket::bind("127.0.0.2:4500".parse().unwrap(), Options::default()).unwrap();
            let item = SendItem { to: far.local_addr(), bytes: &[7; 100], tos: 0 };
            assert_eq!(near.send([item].into_iter()), 1);
            assert!(wait_readable(&far, 2000).unwrap());
            let (mut room, mut metas) = ([0_u8; 40], [RecvMeta::EMPTY; 1]);
            assert_eq!(far.recv([&mut room[..]].into_iter(), &mut metas), 1);
            assert_eq!((metas[0].len, metas[0].truncated, room), (40, true, [7; 40]));
        });
    }

    /// Two ends of a wire of MTU 1500: a veth pair, one end in this namespace and both with addresses.
    fn over_a_wire(body: impl FnOnce(BatchSocket, SocketAddr) + Send + 'static) {
        in_new_namespace(|| {
            ip("link set lo up");
            stub("d0");
            ip("address add 192.0.2.1/24 dev d0");
            ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev d0");
            let socket =
                BatchSocket::bind("192.0.2.1:4500".parse().unwrap(), Options::default()).unwrap();
            body(socket, "192.0.2.2:4500".parse().unwrap());
        });
    }

    /// Fragments made so far in this namespace.
    fn fragments() -> u64 {
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split(' ').position(|name| name == "FragCreates").unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    }

    #[test]
    fn a_run_sent_one_by_one_keeps_its_class() {
        in_new_namespace(|| {
            ip("link set lo up mtu 1500");
            let options = Options { recv_tos: true, ..Options::default() };
            let mut near = BatchSocket::bind("127.0.0.1:4500".parse().unwrap(), options).unwrap();
            let mut far = BatchSocket::bind("127.0.0.2:4500".parse().unwrap(), options).unwrap();
            let (to, bytes) = (far.local_addr(), [5_u8; 1600]);
            for tos in [0x2a, 0] {
                assert_eq!(near.send((0..3).map(|_| SendItem { to, bytes: &bytes, tos })), 3);
                for _ in 0..3 {
                    let (mut room, mut metas) = ([0_u8; 2048], [RecvMeta::EMPTY; 1]);
                    assert!(far.has_more() || wait_readable(&far, 2000).unwrap());
                    assert_eq!(far.recv([&mut room[..]].into_iter(), &mut metas), 1);
                    assert_eq!((metas[0].len, metas[0].tos), (1600, tos));
                }
            }
            assert_eq!(near.segmenting.strikes, 2, "both runs were refused as runs");
        });
    }

    #[test]
    fn datagrams_beyond_the_mtu_go_in_fragments_and_smaller_ones_still_in_runs() {
        over_a_wire(|mut socket, to| {
            let (long, short) = (vec![1_u8; 1600], vec![2_u8; 1000]);
            let run = |bytes| (0..10).map(move |_| SendItem { to, bytes, tos: 0x28 });
            for _ in 0..5 {
                assert_eq!(socket.send(run(&long).chain(run(&short))), 20);
            }
            assert_eq!(fragments(), 5 * 10 * 2, "each long one in two fragments");
            assert!(!socket.segmenting.takes(1600), "no longer tried in vain");
            assert!(
                socket.segmenting.takes(1000),
                "a run too long for the wire says nothing of others"
            );
            assert_eq!(socket.counters(), SendCounters { sent: 100, ..SendCounters::default() });
        });
    }

    #[test]
    fn a_firewall_and_an_absent_address_do_not_end_segmentation() {
        over_a_wire(|mut socket, to| {
            let bytes = [3_u8; 1000];
            let run = || (0..10).map(|_| SendItem { to, bytes: &bytes, tos: 0 });
            let nft = |text: &str| {
                let done =
                    std::process::Command::new("nft").args(text.split(' ')).status().unwrap();
                assert!(done.success(), "nft {text}");
            };
            nft("add table inet t");
            nft("add chain inet t o { type filter hook output priority 0 ; policy drop ; }");
            for _ in 0..2 * STRIKES {
                assert_eq!(socket.send(run()), 0);
            }
            assert_eq!(socket.counters().refused_by_host, 20 * u64::from(STRIKES));
            nft("delete table inet t");
            ip("address del 192.0.2.1/24 dev d0");
            for _ in 0..2 * STRIKES {
                assert_eq!(socket.send(run()), 0);
            }
            ip("address add 192.0.2.1/24 dev d0");
            ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev d0");
            assert_eq!(socket.send(run()), 10);
            assert_eq!(socket.segmenting.below, usize::MAX);
        });
    }

    #[test]
    fn datagrams_too_large_for_udp_do_not_take_the_rest_along() {
        over_a_wire(|mut socket, to| {
            let (huge, small) = (vec![1_u8; 70_000], vec![2_u8; 100]);
            let items =
                [&huge, &small, &huge, &small, &small].map(|bytes| SendItem { to, bytes, tos: 0 });
            assert_eq!(socket.send(items.into_iter()), 3);
            assert_eq!(socket.counters().too_large, 2);
        });
    }

    #[test]
    fn only_what_says_unsupported_ends_segmentation() {
        let doubt = |code| Segmenting::doubt(&io::Error::from_raw_os_error(code));
        for code in [libc::EIO, libc::EOPNOTSUPP, libc::ENOPROTOOPT] {
            assert_eq!(doubt(code), Some(Doubt::Support));
        }
        for code in [libc::EINVAL, libc::EMSGSIZE] {
            assert_eq!(doubt(code), Some(Doubt::Size));
        }
        for code in [
            libc::EAGAIN,
            libc::ENOBUFS,
            libc::ENOMEM,
            libc::ECONNREFUSED,
            libc::EPERM,
            libc::EACCES,
            libc::ENETUNREACH,
            libc::ENETDOWN,
        ] {
            assert_eq!(doubt(code), None, "{}", io::Error::from_raw_os_error(code));
        }
        let mut segmenting = Segmenting::new(true);
        // An address that came late: one refusal, then it works.
        for _ in 0..10 {
            assert!(!segmenting.refused(Doubt::Size, 1400));
            segmenting.went(1400);
        }
        assert!(segmenting.takes(1400));
        // Smaller runs that work meanwhile do not speak for the larger.
        for last in [false, false, true] {
            assert_eq!(segmenting.refused(Doubt::Size, 1480), last);
            segmenting.went(1400);
        }
        assert!(segmenting.takes(1479) && !segmenting.takes(1480));
        assert!(segmenting.refused(Doubt::Support, 100));
        assert!(!segmenting.takes(1));
    }

    #[test]
    fn long_datagrams_are_given_whole_and_leave_the_rest_in_order() {
        in_new_namespace(|| {
            ip("link set lo up");
            let mut near =
                BatchSocket::bind("127.0.0.1:4500".parse().unwrap(), Options::default()).unwrap();
            let mut far =
                BatchSocket::bind("127.0.0.2:4500".parse().unwrap(), Options::default()).unwrap();
            let to = far.local_addr();
            let lengths = [100, 65_000, 200, 3_000, 3_000, 300];
            let all: Vec<Vec<u8>> =
                lengths.iter().enumerate().map(|(i, len)| vec![i as u8; *len]).collect();
            assert_eq!(near.send(all.iter().map(|bytes| SendItem { to, bytes, tos: 0 })), 6);
            let (mut short, mut long) = (Vec::new(), Vec::new());
            while short.len() + long.len() < all.len() {
                assert!(far.has_more() || wait_readable(&far, 2000).unwrap());
                let mut room = vec![[0_u8; 2048]; 2];
                let mut metas = [RecvMeta::EMPTY; 2];
                let rooms = room.iter_mut().map(|b| &mut b[..]);
                let count = far.recv_or_give(rooms, &mut metas, |meta, bytes| {
                    assert_eq!((meta.from, meta.len), (near.local_addr(), bytes.len()));
                    assert!(!meta.truncated);
                    long.push(bytes.to_vec());
                });
                for (bytes, meta) in room.iter().zip(&metas).take(count) {
                    assert!(!meta.truncated);
                    short.push(bytes[..meta.len].to_vec());
                }
            }
            let pick =
                |wanted: &[usize]| wanted.iter().map(|i| all[*i].clone()).collect::<Vec<_>>();
            assert_eq!((short, long), (pick(&[0, 2, 5]), pick(&[1, 3, 4])));
        });
    }

    #[test]
    fn binds_before_the_address_is_there_and_sends_only_after() {
        in_new_namespace(|| {
            ip("link set lo up");
            stub("d0");
            ip("address add 192.0.2.1/24 dev d0");
            let virtual_address = "192.0.2.10:4500".parse().unwrap();
            let mut early = BatchSocket::bind(virtual_address, Options::default()).unwrap();
            let item = SendItem { to: "192.0.2.1:9".parse().unwrap(), bytes: b"x", tos: 0 };
            assert_eq!(early.send([item, item].into_iter()), 0);
            let before = early.counters();
            assert_eq!(before.not_local + before.unreachable, 2, "{before:?}");
            ip("address add 192.0.2.10/32 dev d0");
            assert_eq!(early.send([item].into_iter()), 1);
            // What cannot be routed is counted and does not stop the rest.
            let lost = SendItem { to: "8.8.8.8:9".parse().unwrap(), ..item };
            assert_eq!(early.send([lost, item].into_iter()), 1);
            assert_eq!(early.counters().unreachable, before.unreachable + 1);
            let mut far =
                BatchSocket::bind("192.0.2.1:9000".parse().unwrap(), Options::default()).unwrap();
            let to = far.local_addr();
            early.send([SendItem { to, bytes: b"now", tos: 0 }].into_iter());
            assert_eq!(receive(&mut far)[0].0.from, virtual_address);
        });
    }

    #[test]
    fn a_full_buffer_drops_and_counts_instead_of_blocking() {
        in_new_namespace(|| {
            ip("link set lo up");
            stub("d0");
            ip("address add 192.0.2.1/24 dev d0");
            let options = Options { recv_tos: false, buffer_bytes: 4096 };
            let mut socket = BatchSocket::bind("192.0.2.1:4500".parse().unwrap(), options).unwrap();
            let bytes = [0_u8; 1400];
            let to = "192.0.2.2:9".parse().unwrap();
            // Nobody answers for 192.0.2.2: what waits for its neighbour entry fills the buffer. Each is longer than
            // the one before, so that none joins a run.
            let items = (0..10).map(|i| SendItem { to, bytes: &bytes[..1300 + i], tos: 0 });
            let sent = socket.send(items) as u64;
            let SendCounters { full, .. } = socket.counters();
            assert!(sent < 10 && sent + full == 10, "{:?}", socket.counters());
        });
    }
}

//! Real sockets in namespaces of their own, and headers that no kernel would write.

use super::*;
use crate::sys::{in_new_namespace, ip, stub};
use crate::udp::{BATCH, SOCKET_BUFFER, wait_readable};

fn bind(local: &str) -> EspSocket {
    EspSocket::bind(local.parse().unwrap(), SOCKET_BUFFER).unwrap()
}

fn receive(socket: &mut EspSocket) -> Vec<(RecvMeta, Vec<u8>)> {
    let mut buffers = vec![[0_u8; 2048]; BATCH];
    let mut metas = [RecvMeta::EMPTY; BATCH];
    assert!(wait_readable(socket, 10_000).unwrap());
    let count = socket.recv(buffers.iter_mut().map(|buffer| &mut buffer[..]), &mut metas);
    let packet = |i: usize| buffers[i][metas[i].start..][..metas[i].len].to_vec();
    (0..count).map(|i| (metas[i], packet(i))).collect()
}

fn both_ways(first: &str, second: &str) {
    let (mut left, mut right) = (bind(first), bind(second));
    let packets: Vec<Vec<u8>> = (0..150_u8).map(|i| vec![i; 100 + 9 * usize::from(i)]).collect();
    // A port, as SAs have, must not matter.
    let to = SocketAddr::new(right.local_addr(), 4500);
    let items = packets.iter().map(|bytes| SendItem { to, bytes, tos: bytes[0] });
    assert_eq!(left.send(items), 150);
    let mut got = Vec::new();
    while got.len() < 150 {
        got.extend(receive(&mut right));
    }
    for (i, (meta, bytes)) in got.iter().enumerate() {
        assert_eq!(bytes, &packets[i], "order and content");
        assert_eq!((meta.from, meta.tos), (left.local, i as u8), "packet {i}");
        assert!(!meta.truncated);
    }
    right.send([SendItem { to: left.local, bytes: &[9; 3000], tos: 0 }].into_iter());
    let (meta, _) = receive(&mut left).remove(0);
    assert!(meta.truncated && meta.start + meta.len == 2048, "{meta:?}");
    let sent = SendCounters { sent: 150, ..SendCounters::default() };
    assert_eq!((left.counters(), right.receive_errors()), (sent, 0));
}

#[test]
fn batches_keep_order_content_and_tos() {
    in_new_namespace(|| {
        ip("link set lo up");
        both_ways("127.0.0.1", "127.0.0.2");
        ip("address add fd00::1/128 dev lo nodad");
        both_ways("::1", "fd00::1");
    });
}

#[test]
fn what_is_for_another_address_does_not_come() {
    in_new_namespace(|| {
        ip("link set lo up");
        let (mut near, mut far, mut other) =
            (bind("127.0.0.1"), bind("127.0.0.2"), bind("127.0.0.3"));
        let to = |socket: &EspSocket| socket.local;
        let items = [(&other, 1_u8), (&far, 2)];
        let packets = items.map(|(socket, byte)| (to(socket), [byte; 40]));
        let items = packets.iter().map(|(to, bytes)| SendItem { to: *to, bytes, tos: 0 });
        assert_eq!(near.send(items), 2);
        for (socket, byte) in [(&mut other, 1), (&mut far, 2)] {
            let got = receive(socket);
            assert_eq!((got.len(), got[0].1[0]), (1, byte));
        }
    });
}

/// `name` of the IP lines in /proc/net/snmp.
fn counter(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|other| other == name).unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

#[test]
fn long_packets_go_in_fragments_and_come_whole() {
    in_new_namespace(|| {
        ip("link set lo up mtu 1500");
        let (mut near, mut far) = (bind("127.0.0.1"), bind("127.0.0.2"));
        let long = vec![7; 1900];
        let item = SendItem { to: far.local, bytes: &long, tos: 0 };
        assert_eq!(near.send([item, item].into_iter()), 2);
        assert_eq!(counter("FragCreates"), 4);
        let got = receive(&mut far);
        assert!(got.iter().all(|(meta, bytes)| *bytes == long && !meta.truncated));
        // The largest there is, and what is no packet at all: the rest goes on.
        let huge = vec![8; 70_000];
        let items = [SendItem { bytes: &huge, ..item }, item];
        assert_eq!(near.send(items.into_iter()), 1);
        assert_eq!(near.counters().too_large, 1);
    });
}

#[test]
fn binds_before_the_address_is_there_and_sends_only_after() {
    in_new_namespace(|| {
        ip("link set lo up");
        stub("d0");
        ip("address add 192.0.2.1/24 dev d0");
        let mut early = bind("192.0.2.10");
        let mut far = bind("192.0.2.1");
        let item = SendItem { to: far.local, bytes: &[5; 64], tos: 0 };
        assert_eq!(early.send([item, item].into_iter()), 0);
        let before = early.counters();
        assert_eq!(before.not_local + before.unreachable, 2, "{before:?}");
        ip("address add 192.0.2.10/32 dev d0");
        assert_eq!(early.send([item].into_iter()), 1);
        assert_eq!(receive(&mut far)[0].0.from, early.local);
        far.send([SendItem { to: early.local, ..item }].into_iter());
        assert_eq!(receive(&mut early)[0].1, [5; 64]);
        // And no longer.
        ip("address delete 192.0.2.10/32 dev d0");
        assert_eq!(early.send([item].into_iter()), 0);
        // IPv6 looks at its address when it is bound alone: sending from an absent one is for the fence to prevent.
        assert_eq!(bind("2001:db8::10").local_addr(), "2001:db8::10".parse::<IpAddr>().unwrap());
    });
}

#[test]
fn a_header_with_options_is_passed_over_whole() {
    in_new_namespace(|| {
        ip("link set lo up");
        let (near, mut far) = (bind("127.0.0.1"), bind("127.0.0.2"));
        // IP_OPTIONS: three times "no operation" and the end of the list (RFC 791 §3.1).
        crate::sys::set_option_of(&near, libc::IPPROTO_IP, libc::IP_OPTIONS, &[1_u8, 1, 1, 0])
            .unwrap();
        let mut near = near;
        near.send([SendItem { to: far.local, bytes: &[6; 50], tos: 0x2a }].into_iter());
        let (meta, bytes) = receive(&mut far).remove(0);
        assert_eq!((meta.start, meta.tos, bytes), (24, 0x2a, vec![6; 50]));
    });
}

#[test]
fn only_whole_headers_count() {
    let cut = |bytes: &[u8]| {
        let meta = behind_header(RecvMeta { len: bytes.len(), ..RecvMeta::EMPTY }, bytes);
        assert!(meta.start + meta.len <= bytes.len());
        (meta.start, meta.len)
    };
    let packet = |first: u8, len: usize| [&[first][..], &vec![0; len - 1]].concat();
    assert_eq!(cut(&packet(0x45, 20)), (20, 0));
    assert_eq!(cut(&packet(0x45, 60)), (20, 40));
    assert_eq!(cut(&packet(0x4f, 60)), (60, 0));
    for bad in [packet(0x45, 19), packet(0x4f, 59), packet(0x44, 60), packet(0x65, 60), vec![0x45]]
    {
        assert_eq!(cut(&bad), (0, 0), "{bad:?}");
    }
    assert_eq!(cut(&[]), (0, 0));
}

/// An ESP packet for this worker by the layout, told apart by its last byte.
fn packet_for(worker: u8, mark: u8) -> Vec<u8> {
    let spi = wire::id::SpiLayout::new(0, 0x7ff, worker, 0xffff).unwrap().spi();
    let mut bytes = vec![0; 24];
    bytes[..4].copy_from_slice(&spi.0.to_be_bytes());
    bytes[23] = mark;
    bytes
}

#[test]
fn each_packet_comes_to_one_worker_alone() {
    in_new_namespace(|| {
        ip("link set lo up");
        ip("address add fd00::1/128 dev lo nodad");
        for (near, far) in [("127.0.0.1", "127.0.0.2"), ("fd00::1", "::1")] {
            for workers in [2_u8, 5] {
                let local: IpAddr = near.parse().unwrap();
                let share = |worker| EspSocket::bind_share(local, 1 << 20, worker, workers);
                let mut sockets: Vec<_> = (0..workers).map(|w| share(w).unwrap()).collect();
                let mut far = bind(far);
                let packets: Vec<_> = (0..=15).map(|w| packet_for(w, w)).collect();
                let to = SocketAddr::new(local, 0);
                let items = packets.iter().map(|bytes| SendItem { to, bytes, tos: 0 });
                assert_eq!(far.send(items), 16);
                // Too short for an SPI: nobody's.
                assert_eq!(far.send([SendItem { to, bytes: &[1, 2], tos: 0 }].into_iter()), 1);
                // The last one of each, behind which nothing can come.
                let last = 0xff;
                for worker in 0..workers {
                    let bytes = packet_for(worker, last);
                    far.send([SendItem { to, bytes: &bytes, tos: 0 }].into_iter());
                }
                for (worker, socket) in (0_u8..).zip(&mut sockets) {
                    let mut got = Vec::new();
                    while got.last() != Some(&last) {
                        assert!(wait_readable(socket, 2000).unwrap(), "{got:?}");
                        got.extend(receive(socket).into_iter().map(|(_, bytes)| bytes[23]));
                    }
                    let own = (0..=15).filter(|w| w % workers == worker);
                    let expected: Vec<_> = own.chain([last]).collect();
                    assert_eq!(got, expected, "worker {worker} of {workers} at {local}");
                }
            }
        }
    });
}

// RFC 791 §3.1: options lie between the header and the SPI.
#[test]
fn the_filter_finds_the_spi_behind_options() {
    in_new_namespace(|| {
        ip("link set lo up");
        let local: IpAddr = "127.0.0.1".parse().unwrap();
        let mut sockets = [0, 1].map(|w| EspSocket::bind_share(local, 1 << 20, w, 2).unwrap());
        let far = bind("127.0.0.2");
        // Three no-operations and an end of options.
        let options = [1_u8, 1, 1, 0];
        far.socket.set_nonblocking(true).unwrap();
        crate::sys::set_option_of(&far, libc::IPPROTO_IP, libc::IP_OPTIONS, &options).unwrap();
        far.socket.send_to(&packet_for(1, 9), &SocketAddr::new(local, 0).into()).unwrap();
        far.socket.send_to(&packet_for(0, 8), &SocketAddr::new(local, 0).into()).unwrap();
        for (worker, mark) in [(0, 8), (1, 9)] {
            let got = receive(&mut sockets[worker]);
            assert_eq!(got.iter().map(|(_, bytes)| bytes[23]).collect::<Vec<_>>(), [mark]);
        }
    });
}

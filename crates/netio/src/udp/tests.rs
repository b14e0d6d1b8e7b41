//! Real sockets in namespaces of their own.

use super::segmenting::STRIKES;
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
    let sent = left.send(payloads.iter().map(|bytes| SendItem { to, bytes, tos: bytes[0] & 0x03 }));
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
    on_loopback(|mut near, mut far| {
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
        assert_eq!(near.batcher.segmenting.below, usize::MAX, "this kernel segments on loopback");
        let mut got: Vec<Vec<u8>> = Vec::new();
        let mut calls = 0;
        while got.len() < all.len() {
            assert!(far.has_more() || wait_readable(&far, 2000).unwrap());
            // Few buffers at a time: what does not fit must come with the next call.
            let mut room = vec![[0_u8; 2048]; 7];
            let mut metas = [RecvMeta::EMPTY; 7];
            let count = far.recv(room.iter_mut().map(|b| &mut b[..]), &mut metas);
            got.extend(room.iter().zip(&metas).take(count).map(|(b, meta)| b[..meta.len].to_vec()));
            calls += 1;
        }
        assert_eq!(got, all);
        assert!(calls >= all.len() / 7);
        assert!(!far.has_more());
    });
}

#[test]
fn what_fills_more_than_one_run_goes_in_few_with_the_odd_ones_first() {
    on_loopback(|mut near, mut far| {
        let to = far.local_addr();
        let runs = |near: &BatchSocket, count| {
            let messages = &near.batcher.scratch.messages[..count];
            messages.iter().map(|message| message.msg_hdr.msg_iovlen).collect::<Vec<_>>()
        };
        // 65,507 bytes at most: 44 of 1456; a shorter one ends the last run.
        let mut pass = |lengths: &[(usize, usize)], messages: &[usize]| {
            let lengths = lengths.iter().flat_map(|(length, count)| vec![*length; *count]);
            let all: Vec<Vec<u8>> = (0..).zip(lengths).map(|(n, len)| vec![n; len]).collect();
            let items = all.iter().map(|bytes| SendItem { to, bytes, tos: 0 });
            assert_eq!(near.send(items), all.len());
            assert_eq!(runs(&near, messages.len()), messages);
            let mut got: Vec<Vec<u8>> = Vec::new();
            while got.len() < all.len() {
                assert!(far.has_more() || wait_readable(&far, 2000).unwrap());
                let mut room = vec![[0_u8; 2048]; 9];
                let mut metas = [RecvMeta::EMPTY; 9];
                let count = far.recv(room.iter_mut().map(|b| &mut b[..]), &mut metas);
                got.extend(room.iter().zip(&metas).take(count).map(|(b, m)| b[..m.len].to_vec()));
            }
            assert_eq!(got, all, "each once, in order");
        };
        pass(&[(1456, 46), (100, 1)], &[3, 44]);
        pass(&[(1456, 88)], &[44, 44]);
        // 64 of small ones at most, which every kernel takes.
        pass(&[(100, 150), (1456, 5)], &[22, 64, 64, 5]);
        assert_eq!(near.batcher.segmenting.strikes, 0, "none was refused");
    });
}

#[test]
fn a_datagram_that_does_not_fit_is_cut_and_says_so() {
    on_loopback(|mut near, mut far| {
        let item = SendItem { to: far.local_addr(), bytes: &[7; 100], tos: 0 };
        assert_eq!(near.send([item].into_iter()), 1);
        assert!(wait_readable(&far, 2000).unwrap());
        let (mut room, mut metas) = ([0_u8; 40], [RecvMeta::EMPTY; 1]);
        assert_eq!(far.recv([&mut room[..]].into_iter(), &mut metas), 1);
        assert_eq!((metas[0].len, metas[0].truncated, room), (40, true, [7; 40]));
    });
}

/// Two sockets that reach each other in a namespace of their own.
fn on_loopback(body: impl FnOnce(BatchSocket, BatchSocket) + Send + 'static) {
    in_new_namespace(|| {
        ip("link set lo up");
        let [near, far] = ["127.0.0.1:4500", "127.0.0.2:4500"]
            .map(|local| BatchSocket::bind(local.parse().unwrap(), Options::default()).unwrap());
        body(near, far);
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
        assert_eq!(near.batcher.segmenting.strikes, 2, "both runs were refused as runs");
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
        assert!(!socket.batcher.segmenting.takes(1600), "no longer tried in vain");
        assert!(
            socket.batcher.segmenting.takes(1000),
            "a run too long for the wire says nothing of others"
        );
        assert_eq!(socket.counters(), SendCounters { sent: 100, ..SendCounters::default() });
    });
}

#[test]
fn a_larger_mtu_is_noticed() {
    over_a_wire(|mut socket, to| {
        let (long, short) = (vec![1_u8; 1600], vec![2_u8; 10]);
        let runs = |socket: &mut BatchSocket| {
            let items = (0..10).map(|_| SendItem { to, bytes: &long, tos: 0 });
            assert_eq!(socket.send(items), 10);
        };
        for _ in 0..STRIKES {
            runs(&mut socket);
        }
        assert!(!socket.batcher.segmenting.takes(1600));
        ip("link set d0 mtu 3000");
        for _ in 0..2000 {
            socket.send([SendItem { to, bytes: &short, tos: 0 }].into_iter());
        }
        runs(&mut socket);
        runs(&mut socket);
        assert_eq!(fragments(), u64::from(STRIKES) * 10 * 2, "whole, since the wire takes them");
        assert_eq!(socket.batcher.segmenting.below, usize::MAX);
    });
}

#[test]
fn a_firewall_and_an_absent_address_do_not_end_segmentation() {
    over_a_wire(|mut socket, to| {
        let bytes = [3_u8; 1000];
        let run = || (0..10).map(|_| SendItem { to, bytes: &bytes, tos: 0 });
        let nft = |text: &str| {
            let done = std::process::Command::new("nft").args(text.split(' ')).status().unwrap();
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
        assert_eq!(socket.batcher.segmenting.below, usize::MAX);
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
fn long_datagrams_are_given_whole_and_leave_the_rest_in_order() {
    on_loopback(|mut near, mut far| {
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
        let pick = |wanted: &[usize]| wanted.iter().map(|i| all[*i].clone()).collect::<Vec<_>>();
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
        let options = Options { buffer_bytes: 4096, ..Options::default() };
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

/// The first bytes of the datagrams that each of the two sockets has got, when `count` are there.
fn sorted(port: &mut SharedPort, count: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut rest, mut chosen) = (Vec::new(), Vec::new());
    let mut bytes = [0; 2048];
    while rest.len() + chosen.len() < count {
        let before = rest.len() + chosen.len();
        while let Ok((length, _)) = port.rest.recv_from(&mut bytes) {
            rest.push(if length == 0 { 0 } else { bytes[0] });
        }
        port.chosen.refill();
        while let Some((meta, datagram)) = port.chosen.take() {
            assert!(!meta.truncated && meta.len == datagram.len());
            chosen.push(datagram[0]);
            // It is the caller's to change: nothing of it comes again.
            datagram.fill(0xff);
        }
        if rest.len() + chosen.len() == before {
            assert!(
                wait_readable(&port.chosen, 1).unwrap() || wait_readable(&port.rest, 2000).unwrap()
            );
        }
    }
    (rest, chosen)
}

#[test]
fn a_shared_port_is_sorted_by_the_first_byte() {
    in_new_namespace(|| {
        ip("link set lo up");
        for (local, remote) in [("127.0.0.1:4600", "127.0.0.2:4600"), ("[::1]:4600", "[::1]:4601")]
        {
            let options = Options::default();
            let mut port = SharedPort::open(local.parse().unwrap(), 2, 1 << 20, options).unwrap();
            assert!(port.sorted);
            let mut far = BatchSocket::bind(remote.parse().unwrap(), options).unwrap();
            let to = port.chosen.local_addr();
            // Runs of one kind, single ones in between, and one without any byte.
            let kinds = [2_u8, 2, 2, 2, 1, 2, 1, 1, 0, 255, 2, 3];
            let all: Vec<Vec<u8>> = kinds.iter().map(|kind| vec![*kind; 900]).collect();
            for bytes in &all {
                assert_eq!(far.send([SendItem { to, bytes, tos: 0 }].into_iter()), 1);
            }
            far.sender().send_to(&[], to).unwrap();
            let run = (0..40).map(|_| SendItem { to, bytes: &[2; 1200], tos: 0 });
            assert_eq!(far.send(run), 40);
            let (rest, chosen) = sorted(&mut port, kinds.len() + 1 + 40);
            assert_eq!(rest, [1, 1, 1, 0, 255, 3, 0]);
            assert_eq!(chosen, [2; 6 + 40]);
            // Either one answers from the address that the other side knows.
            port.rest.send_to(b"rest", remote).unwrap();
            let (meta, bytes) = receive(&mut far).remove(0);
            assert_eq!((meta.from, &bytes[..]), (to, &b"rest"[..]));
            let item = SendItem { to: remote.parse().unwrap(), bytes: b"chosen", tos: 0 };
            port.chosen.send([item].into_iter());
            assert_eq!(receive(&mut far).remove(0).0.from, to);
        }
    });
}

#[test]
fn a_port_is_shared_with_nobody_else() {
    in_new_namespace(|| {
        ip("link set lo up");
        let local = "127.0.0.1:4600".parse().unwrap();
        let _port = SharedPort::open(local, 2, 1 << 20, Options::default()).unwrap();
        let error = std::net::UdpSocket::bind(local).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // Not even by its like: the kernel would sort among four.
        let error = SharedPort::open(local, 2, 1 << 20, Options::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let absent = "192.0.2.7:4600".parse().unwrap();
        let error = SharedPort::open(absent, 2, 1 << 20, Options::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    });
}

#[test]
fn the_mtu_of_a_path_is_its_interfaces() {
    in_new_namespace(|| {
        ip("link set lo up");
        stub("d0");
        ip("address add 192.0.2.1/24 dev d0");
        ip("link set d0 mtu 1476");
        let (near, far) = ("192.0.2.1:4600".parse().unwrap(), "192.0.2.2:4600".parse().unwrap());
        assert_eq!(path_mtu(near, far).unwrap(), 1476);
        assert!(path_mtu("192.0.2.9:4600".parse().unwrap(), far).is_err());
        ip("address add 2001:db8::1/64 dev d0 nodad");
        let (near, far) =
            ("[2001:db8::1]:4600".parse().unwrap(), "[2001:db8::2]:4600".parse().unwrap());
        assert_eq!(path_mtu(near, far).unwrap(), 1476);
    });
}

/// An ESP packet's beginning, for this worker by the layout.
fn esp_for(worker: u8, slot: u16) -> [u8; 16] {
    let spi = wire::id::SpiLayout::new(1, 0x2a5, worker, slot).unwrap().spi();
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&spi.0.to_be_bytes());
    bytes
}

#[test]
fn each_worker_gets_the_packets_of_its_sas() {
    in_new_namespace(|| {
        ip("link set lo up");
        for (local, remote) in [("127.0.0.1:0", "127.0.0.2:4500"), ("[::1]:0", "[::1]:4501")] {
            for workers in [2_u8, 3, 16] {
                // A port of its own: the last one's sockets may live on in a child that another test forks.
                let mut local: SocketAddr = local.parse().unwrap();
                local.set_port(4600 + u16::from(workers));
                let group = Group::bind(local, Options::default(), workers);
                let mut group = group.unwrap();
                assert!(group.unsorted.is_none());
                let mut far =
                    BatchSocket::bind(remote.parse().unwrap(), Options::default()).unwrap();
                let to = group.sockets[0].local_addr();
                // Whatever number of workers the other instance has: the rest of the division decides.
                let mut expected = vec![Vec::new(); usize::from(workers)];
                for worker in (0..=15).chain(0..=15) {
                    let packet = esp_for(worker, 7);
                    expected[usize::from(worker % workers)].push(packet.to_vec());
                    far.send([SendItem { to, bytes: &packet, tos: 0 }].into_iter());
                }
                let ike = [&[0; 4][..], &[0xff; 40]].concat();
                for bytes in [&ike[..], &[0xff], &[0, 0, 0]] {
                    far.sender().send_to(bytes, to).unwrap();
                    expected[0].push(bytes.to_vec());
                }
                // The last one of each, behind which nothing can come.
                for worker in 0..workers {
                    let last = esp_for(worker, 8).to_vec();
                    far.send([SendItem { to, bytes: &last, tos: 0 }].into_iter());
                    expected[usize::from(worker)].push(last);
                }
                for (socket, expected) in group.sockets.iter_mut().zip(expected) {
                    let mut got = Vec::new();
                    while got.last() != expected.last() {
                        assert!(wait_readable(socket, 2000).unwrap(), "{got:?}");
                        got.extend(receive(socket).into_iter().map(|(_, bytes)| bytes));
                    }
                    assert_eq!(got, expected, "{workers} workers");
                }
            }
        }
    });
}

#[test]
fn a_group_may_be_of_one_and_before_its_address() {
    in_new_namespace(|| {
        ip("link set lo up");
        let absent = "192.0.2.7:4500".parse().unwrap();
        assert_eq!(Group::bind(absent, Options::default(), 2).unwrap().sockets.len(), 2);
        let local = "127.0.0.1:4500".parse().unwrap();
        let group = Group::bind(local, Options::default(), 1).unwrap();
        assert_eq!(group.sockets.len(), 1);
    });
}

#[test]
fn what_found_no_room_is_counted() {
    in_new_namespace(|| {
        ip("link set lo up");
        let options = Options { buffer_bytes: 1 << 16, ..Options::default() };
        let mut socket = BatchSocket::bind("127.0.0.1:4500".parse().unwrap(), options).unwrap();
        let far = std::net::UdpSocket::bind("127.0.0.2:4500").unwrap();
        for _ in 0..1000 {
            far.send_to(&[7; 100], socket.local_addr()).unwrap();
        }
        let mut got = 0;
        while wait_readable(&socket, 0).unwrap() || socket.has_more() {
            got += receive(&mut socket).len() as u64;
        }
        assert!((32..1000).contains(&got), "{got}");
        assert_eq!(socket.receive_dropped(), 1000 - got);
        for _ in 0..10 {
            far.send_to(&[7; 100], socket.local_addr()).unwrap();
        }
        assert_eq!(receive(&mut socket).len(), 10);
        assert_eq!(socket.receive_dropped(), 1000 - got);
    });
}

//! Merging and splitting against the kernel, as another implementation of both. Needs root: each test makes a network
//! namespace of its own.
//!
//! ```text
//!   esp::coalesce ──► in0 (vnet) ══ forwarded by the kernel, which splits ══► out0 (plain) ──► compared
//!   esp::coalesce ──► in0 (vnet) ══ forwarded in one piece ══► out0 (vnet) ──► esp::segment ──► compared
//!   a socket's UDP_SEGMENT send, or a checksum left to the card ══► out0 (vnet) ──► esp::segment ──► compared
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use esp::coalesce::{Merge, Run};
use esp::segment::Segments;
use netio::tun::{READ_LEN, Tun};
use netio::udp::{BatchSocket, Options, SendItem};
use wire::ip::{ipv4_header_checksum, protocol, transport_checksum, udp_packet};

fn ip(arguments: &str) {
    let status =
        std::process::Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn segment(src: IpAddr, dst: IpAddr, seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend([0x13, 0x88, 0x0f, 0xa0]);
    tcp.extend(seq.to_be_bytes());
    tcp.extend([0, 0, 0, 7, 0x80, flags, 1, 0, 0, 0, 0, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    tcp.extend(payload);
    let sum = transport_checksum(src, dst, protocol::TCP, &tcp).unwrap();
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut packet = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + tcp.len() as u16).to_be_bytes());
            packet.extend([0, 9, 0x40, 0, 64, protocol::TCP, 0, 0]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
            let sum = ipv4_header_checksum(&packet).unwrap();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((tcp.len() as u16).to_be_bytes());
            packet.extend([protocol::TCP, 64]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
        }
        _ => unreachable!(),
    }
    packet.extend(tcp);
    packet
}

/// What forwarding changes, and the identification that means nothing beside DF, put back.
fn as_sent(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        assert_eq!(packet[8], 63, "forwarded once");
        packet[8] = 64;
        packet[4..6].copy_from_slice(&[0, 9]);
        let sum = ipv4_header_checksum(&packet).unwrap();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        assert_eq!(packet[7], 63, "forwarded once");
        packet[7] = 64;
    }
    packet
}

/// In a namespace of its own, with forwarding.
fn isolated(body: impl FnOnce() + Send + 'static) {
    let run = || {
        netio::netns::isolate_thread().expect("this test needs root");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        body();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn ways() -> [(IpAddr, IpAddr); 2] {
    [("10.2.0.5", "10.1.0.9"), ("fd02::5", "fd01::9")]
        .map(|(src, dst)| (src.parse().unwrap(), dst.parse().unwrap()))
}

/// Both ends, up, with routes from `in0` to `out0`.
fn inlet_and(outlet: Tun) -> (Tun, Tun) {
    let inlet = Tun::open_vnet("in0").unwrap();
    inlet.configure(1500, 500).unwrap();
    outlet.configure(1500, 500).unwrap();
    ip("address add 10.2.0.1/24 dev in0");
    ip("-6 address add fd02::1/64 dev in0 nodad");
    ip("route add 10.1.0.0/24 dev out0");
    ip("-6 route add fd01::/64 dev out0");
    (inlet, outlet)
}

/// Thirty segments of a stream, the last shorter and with PSH.
fn stream(src: IpAddr, dst: IpAddr) -> Vec<Vec<u8>> {
    let mut seq = u32::MAX - 5000;
    let mut sent = Vec::new();
    for n in 0..30_u8 {
        let payload = vec![n; if n == 29 { 321 } else { 1300 }];
        let flags = if n == 29 { 0x18 } else { 0x10 };
        sent.push(segment(src, dst, seq, flags, &payload));
        seq = seq.wrapping_add(payload.len() as u32);
    }
    sent
}

fn write_merged(inlet: &Tun, sent: &[Vec<u8>]) {
    let mut run = Run::start(&sent[0], Merge::ALL).unwrap();
    for packet in &sent[1..] {
        assert!(run.add(&sent[0], packet));
    }
    let head = run.head(&sent[0]).unwrap();
    let payloads = sent.iter().map(|packet| &packet[run.header_len()..]);
    inlet.write_run(head.form, head.bytes(), payloads).unwrap();
}

/// The next packets of a protocol that a TUN gives, split, and how many reads gave them.
fn packets(tun: &Tun, wanted: u8, count: usize) -> (Vec<Vec<u8>>, usize) {
    let mut buffer = vec![0; READ_LEN];
    let (mut got, mut reads) = (Vec::new(), 0);
    let deadline = Instant::now() + Duration::from_secs(3);
    while got.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} came", got.len());
        let Some((length, offload)) = tun.read(&mut buffer).unwrap() else { continue };
        let read = &buffer[..length];
        // Not what the kernel says by itself (multicast listener reports and the like).
        if read[if read[0] >> 4 == 4 { 9 } else { 6 }] != wanted {
            continue;
        }
        reads += 1;
        let mut segments = Segments::new(read, offload).expect("what the kernel says is so");
        while !segments.is_done() {
            let mut room = [0; 2048];
            let length = segments.next_into(read, &mut room).expect("it fits");
            got.push(room[..length].to_vec());
        }
    }
    (got, reads)
}

#[test]
fn the_kernel_splits_what_was_merged_into_what_it_was() {
    isolated(|| {
        let (inlet, outlet) = inlet_and(Tun::open_plain("out0").unwrap());
        for (src, dst) in ways() {
            let sent = stream(src, dst);
            write_merged(&inlet, &sent);
            let (got, reads) = packets(&outlet, protocol::TCP, sent.len());
            assert_eq!(got.into_iter().map(as_sent).collect::<Vec<_>>(), sent);
            assert_eq!(reads, sent.len(), "one packet a call");
        }
    });
}

#[test]
fn what_stayed_in_one_piece_is_split_into_what_it_was() {
    isolated(|| {
        let (inlet, outlet) = inlet_and(Tun::open_vnet("out0").unwrap());
        assert!(outlet.offloads().tcp);
        for (src, dst) in ways() {
            let sent = stream(src, dst);
            write_merged(&inlet, &sent);
            let (got, reads) = packets(&outlet, protocol::TCP, sent.len());
            assert_eq!(got.into_iter().map(as_sent).collect::<Vec<_>>(), sent);
            assert_eq!(reads, 1);
        }
    });
}

#[test]
fn the_kernel_splits_merged_datagrams_into_what_they_were() {
    isolated(|| {
        let (inlet, outlet) = inlet_and(Tun::open_plain("out0").unwrap());
        assert!(inlet.takes_runs(wire::vnet::Carried::Udp), "this kernel knows USO");
        for (src, dst) in ways() {
            let at = |address, port| std::net::SocketAddr::new(address, port);
            for size in [64, 1300] {
                let sent: Vec<Vec<u8>> = (0..40_u8)
                    .map(|n| {
                        let payload = vec![n; if n == 39 { size / 2 } else { size }];
                        udp_packet(at(src, 5000), at(dst, 4000), &payload).unwrap()
                    })
                    .collect();
                write_merged(&inlet, &sent);
                let (got, _) = packets(&outlet, protocol::UDP, sent.len());
                for (got, sent) in got.into_iter().zip(&sent) {
                    let got = as_sent(got);
                    // Only the identification, which `as_sent` gives everybody, was zero.
                    same_datagram(&got, sent);
                }
            }
        }
    });
}

#[test]
fn datagrams_sent_in_one_call_come_out_whole_and_with_their_checksums() {
    isolated(|| {
        let (_inlet, outlet) = inlet_and(Tun::open_vnet("out0").unwrap());
        assert!(outlet.offloads().udp, "this kernel knows USO");
        for (bind, to) in [("10.2.0.1:0", "10.1.0.9:7000"), ("[fd02::1]:0", "[fd01::9]:7000")] {
            let mut socket = BatchSocket::bind(bind.parse().unwrap(), Options::default()).unwrap();
            let (from, to) = (socket.local_addr(), to.parse().unwrap());
            let payload: Vec<u8> = (0..1300 * 9 + 77).map(|n| (n / 7) as u8).collect();
            let mut send = |payloads: &[&[u8]]| {
                let items = payloads.iter().map(|bytes| SendItem { to, bytes, tos: 0 });
                assert_eq!(socket.send(items), payloads.len());
            };
            let payloads: Vec<&[u8]> = payload.chunks(1300).collect();
            send(&payloads);
            let (got, reads) = packets(&outlet, protocol::UDP, payloads.len());
            assert_eq!(reads, 1);
            for (packet, sent) in got.iter().zip(payloads) {
                same_datagram(packet, &udp_packet(from, to, sent).unwrap());
            }
            // One alone: its checksum is left to us.
            send(&[b"alone"]);
            let (got, _) = packets(&outlet, protocol::UDP, 1);
            same_datagram(&got[0], &udp_packet(from, to, b"alone").unwrap());
        }
    });
}

/// But for the identification, DF and flow label, which the kernel chooses.
fn same_datagram(got: &[u8], wanted: &[u8]) {
    let mut got = got.to_vec();
    if got[0] >> 4 == 4 {
        assert_eq!(ipv4_header_checksum(&got).unwrap().to_be_bytes(), got[10..12]);
        got[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
        let sum = ipv4_header_checksum(&got).unwrap();
        got[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        got[1] = 0;
        got[2..4].fill(0);
    }
    assert!(got == wanted, "{:?} … instead of {:?} …", &got[..33], &wanted[..33]);
}

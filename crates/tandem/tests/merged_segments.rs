//! Merged TCP segments against the kernel, as another implementation of splitting them: what is written to
//! one TUN in one piece comes out of a second one, to which the kernel forwards it, as the segments that it
//! was made of. Needs root: it makes a network namespace of its own.
//!
//! ```text
//!   esp::coalesce ──► in0 (vnet) ══ forwarded by the kernel, which splits ══► out0 (plain) ──► compared
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use esp::coalesce::Run;
use netio::tun::Tun;
use wire::ip::{ipv4_header_checksum, protocol, transport_checksum};

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

#[test]
fn the_kernel_splits_them_into_what_they_were() {
    let run = || {
        netio::netns::isolate_thread().expect("this test needs root");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let (inlet, outlet) = (Tun::open_vnet("in0").unwrap(), Tun::open_plain("out0").unwrap());
        inlet.configure(1500, 500).unwrap();
        outlet.configure(1500, 500).unwrap();
        ip("address add 10.2.0.1/24 dev in0");
        ip("-6 address add fd02::1/64 dev in0 nodad");
        ip("route add 10.1.0.0/24 dev out0");
        ip("-6 route add fd01::/64 dev out0");
        for (src, dst) in [("10.2.0.5", "10.1.0.9"), ("fd02::5", "fd01::9")] {
            let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
            let mut seq = u32::MAX - 5000;
            let mut sent = Vec::new();
            for n in 0..30_u8 {
                let payload = vec![n; if n == 29 { 321 } else { 1300 }];
                let flags = if n == 29 { 0x18 } else { 0x10 };
                sent.push(segment(src, dst, seq, flags, &payload));
                seq = seq.wrapping_add(payload.len() as u32);
            }
            let mut run = Run::start(&sent[0]).unwrap();
            for packet in &sent[1..] {
                assert!(run.add(&sent[0], packet));
            }
            let mut first = sent[0].clone();
            let form = run.finish(&mut first).unwrap();
            let payloads = sent[1..].iter().map(|packet| &packet[run.header_len()..]);
            inlet.write_run(form, &first, payloads).unwrap();

            let mut buffer = [0; 2048];
            let mut got = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(3);
            while got.len() < sent.len() {
                assert!(Instant::now() < deadline, "{} of {} came", got.len(), sent.len());
                if let Some(length) = outlet.read(&mut buffer).unwrap() {
                    let packet = &buffer[..length];
                    // Not what the kernel says by itself (multicast listener reports and the like).
                    let protocol = packet[if packet[0] >> 4 == 4 { 9 } else { 6 }];
                    if protocol == protocol::TCP {
                        got.push(as_sent(packet.to_vec()));
                    }
                }
            }
            assert_eq!(got, sent);
        }
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

//! The documented JSON of `tandem … --json`, whole documents, byte for byte.
//!
//! Programs read these. A field may be added (then the golden file changes by added lines only); renaming or
//! removing one breaks somebody. `UPDATE_GOLDEN=1` writes the files anew; read the diff.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::collections::BTreeMap;
use std::path::Path;

use gateway::status::*;
use serde::Serialize;
use tandem::cli::render_status;
use tandem::control_socket::{Failure, Fault, Move, RekeyWhat, Request, Response, TunnelUp};

fn golden(name: &str, shown: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, format!("{shown}\n")).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(shown, golden.trim_end_matches('\n'), "{name}");
}

fn pretty<T: Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).unwrap()
}

/// A status with every field filled.
fn status() -> Status {
    let link = |n: u8, up: bool| LinkStatus {
        local: format!("172.31.{n}.1:4600"),
        remote: format!("172.31.{n}.2:4600"),
        up,
        stream: up,
        rtt_us: up.then_some(312),
        last_heard_ms: Some(if up { 12 } else { 61_000 }),
    };
    let child = ChildStatus {
        name: "net".into(),
        spi_in: "00100001".into(),
        spi_out: "c3d4e5f6".into(),
        state: ChildState::Installed,
        udp_encap: true,
        algs: "aes256gcm16".into(),
        age_s: 125,
        rekey_in_s: Some(3475),
        bytes_in: 1_234_567,
        bytes_out: 7_654_321,
        packets_in: 1000,
        packets_out: 7000,
        seq_out: Some(7001),
        seq_ceiling: Some(1_048_576),
        seq_in: Some(1000),
        local_ts: vec!["10.1.0.0/24".into()],
        remote_ts: vec!["10.2.0.0/24".into()],
    };
    let ike = IkeStatus {
        spi_i: "0123456789abcdef".into(),
        spi_r: "fedcba9876543210".into(),
        role: "responder".into(),
        age_s: 125,
        rekey_in_s: Some(13_800),
        algs: "aes256gcm16-prfsha384-x25519".into(),
        local: "203.0.113.10:4500".into(),
        local_id: "gw.example".into(),
        remote: "198.51.100.7:4500".into(),
        remote_id: "branch.example".into(),
        nat: Nat::Local,
    };
    Status {
        instance: "left".into(),
        index: 0,
        release: "0.1.0".into(),
        uptime_s: 11_520,
        workers: 2,
        draining: false,
        config_digest: "0011223344556677".into(),
        pair: Some(PairStatus {
            peer: "right".into(),
            peer_release: Some("0.1.0".into()),
            format: Some(1),
            newest_format: Some(2),
            peer_newest_format: Some(1),
            contact: Contact::TwoWay,
            refused: None,
            links: vec![link(0, true), link(1, false)],
        }),
        endpoints: vec![EndpointStatus {
            name: "main".into(),
            address: "203.0.113.10".into(),
            home: "left".into(),
            owner: Some("left".into()),
            role: Role::Owner,
            term: 12,
            mode: Mode::Synced,
            position: 431,
            acked_position: Some(431),
            fence_ms_left: Some(78),
            uplink: Some(true),
            pinned: true,
            home_in_s: None,
        }],
        tunnels: vec![
            TunnelStatus {
                connection: "branch".into(),
                endpoint: "main".into(),
                state: TunnelState::Established,
                ike: Some(ike),
                children: vec![child],
                last_error: None,
                taken_down: false,
            },
            TunnelStatus {
                connection: "depot".into(),
                endpoint: "main".into(),
                state: TunnelState::Connecting,
                last_error: Some(LastError {
                    text: "peer 198.51.100.9 refused: AUTHENTICATION_FAILED".into(),
                    age_s: 7,
                }),
                ..TunnelStatus::default()
            },
        ],
        tunnel_counts: TunnelCounts {
            down: 0,
            connecting: 1,
            established: 1,
            closing: 0,
            children: 1,
        },
        counters: Counters {
            packets_in: 1000,
            packets_out: 7000,
            bytes_in: 1_234_567,
            bytes_out: 7_654_321,
            steered_out: 3,
            steered_in: 0,
            handed: 5,
            changes: BTreeMap::from([("takeover_death".into(), 1)]),
            drops: BTreeMap::from([("fenced".into(), 0), ("replayed".into(), 2)]),
            ike_drops: BTreeMap::from([("malformed".into(), 1)]),
            pair_drops: BTreeMap::new(),
        },
    }
}

#[test]
fn status_document() {
    golden("status.json", &pretty(&status()));
    let read: Status = serde_json::from_str(&pretty(&status())).unwrap();
    assert_eq!(read, status());
}

#[test]
fn summary_table() {
    let summary = Status { tunnels: Vec::new(), ..status() };
    golden("summary.txt", &render_status(&summary, false));
}

#[test]
fn status_table() {
    let shown = render_status(&status(), false);
    golden("status.txt", &shown);
    assert!(!shown.contains('\x1b'), "no colour without a terminal");
    assert!(!shown.contains("fenced"), "a drop that never happened is not listed");
    let colourful = render_status(&status(), true);
    assert!(colourful.contains("\x1b["));
    // Where both speak no newer format than the one in use, there is nothing to say of it.
    let mut settled = status();
    if let Some(pair) = &mut settled.pair {
        (pair.format, pair.peer_newest_format) = (Some(2), Some(2));
    }
    settled.tunnels[1].state = TunnelState::Down;
    settled.tunnels[1].taken_down = true;
    let shown = render_status(&settled, false);
    assert!(shown.contains("format 2\n") && shown.contains("taken down"), "{shown}");
    // A status of nothing is still a status.
    let lone = render_status(&Status { instance: "solo".into(), ..Status::default() }, false);
    assert!(lone.contains("solo") && lone.contains("on its own"), "{lone}");
}

#[test]
fn responses() {
    let branch = || "branch".to_owned();
    let all = [
        Response::Failover {
            moves: vec![Move {
                endpoint: "main".into(),
                from: "left".into(),
                to: "right".into(),
                term: 13,
                took_ms: 4,
            }],
        },
        Response::Drain {
            instance: "left".into(),
            withdrawn: vec!["second".into()],
            moves: Vec::new(),
        },
        Response::Undrain { instance: "left".into() },
        Response::Flows {
            flows: vec![FlowStatus {
                source: "10.1.0.9".into(),
                destination: "10.2.0.5".into(),
                protocol: 6,
                source_port: Some(40_000),
                destination_port: Some(443),
                connection: Some(branch()),
                child: Some("net".into()),
                endpoint: "a".into(),
                steered: true,
                spi_out: Some("c3d4e5f6".into()),
                idle_ms: 12,
            }],
        },
        Response::Up {
            connection: branch(),
            tunnels: vec![TunnelUp {
                connection: "branch".into(),
                endpoint: "main".into(),
                state: TunnelState::Established,
            }],
        },
        Response::Down { connection: branch(), closed: 1, purged: false },
        Response::Rekey { connection: branch(), ike: 1, children: 2 },
        Response::Error(
            Failure::new(Fault::NotOwner, "`main` is served by `right`").hint("ask there"),
        ),
        Response::Error(Failure::new(Fault::UnknownName, "there is no connection `x`")),
    ];
    let lines: Vec<String> = all.iter().map(|r| serde_json::to_string(r).unwrap()).collect();
    golden("responses.jsonl", &lines.join("\n"));
    for (line, response) in lines.iter().zip(&all) {
        assert_eq!(&serde_json::from_str::<Response>(line).unwrap(), response);
    }
}

#[test]
fn requests() {
    let connection = || "branch".to_owned();
    let all = [
        Request::Status {},
        Request::Summary {},
        Request::Failover { endpoint: None },
        Request::Failover { endpoint: Some("main".into()) },
        Request::Drain {},
        Request::Undrain {},
        Request::Flows {},
        Request::Up { connection: connection() },
        Request::Down { connection: connection(), purge: true },
        Request::Rekey { connection: connection(), what: RekeyWhat::Both },
        Request::Rekey { connection: connection(), what: RekeyWhat::Child },
    ];
    let lines: Vec<String> = all.iter().map(|r| serde_json::to_string(r).unwrap()).collect();
    golden("requests.jsonl", &lines.join("\n"));
    for (line, request) in lines.iter().zip(&all) {
        assert_eq!(&serde_json::from_str::<Request>(line).unwrap(), request);
    }
    for wrong in
        [r#"{"command":"reboot"}"#, r#"{"command":"up"}"#, r#"{"command":"status","x":1}"#, "[]"]
    {
        assert!(serde_json::from_str::<Request>(wrong).is_err(), "{wrong}");
    }
}

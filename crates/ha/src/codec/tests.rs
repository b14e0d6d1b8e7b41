//! Golden records: what a release wrote must be read, and written alike, for ever.

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value(bytes: &[u8]) -> Value {
    Value::new(bytes.to_vec())
}

fn claim() -> Claim {
    Claim {
        id: 0x1122_3344_5566_7788,
        role: ClaimRole::Owner,
        term: Term(6),
        lineage: Lineage(9),
        synced: true,
        position: Position(300),
        digest: 0xdead_beef,
        uplink: true,
        offered: Term(7),
        refused: Term(5),
        top: Term(38),
        floor: Term(6),
        taken: Term(4),
        declines: None,
        drains: None,
    }
}

fn samples() -> Vec<(&'static str, Frame)> {
    let put = Put { key: 1, value: value(b"v") };
    let (id, term, position) = (2, Term(6), Position(3));
    let hello = Hello {
        release: 1,
        oldest: 1,
        index: 1,
        name: "right".into(),
        boot: 77,
        config_digest: 5,
        claims: vec![claim()],
        build: None,
    };
    let chunk = Chunk {
        id,
        term,
        lineage: Lineage(9),
        snap: 4,
        part: 0,
        position,
        digest: 8,
        last: true,
        puts: vec![put.clone()],
    };
    let record = Record { id, term, position, puts: vec![put], deletes: vec![5, 6] };
    let grant = Grant {
        id,
        from: term,
        term: Term(7),
        position,
        part: 0,
        last: true,
        counters: value(b"counters"),
    };
    let tail = TailPut { key: 1, removed: true, value: value(b"") };
    let handover =
        Handover { id, term, part: 0, last: true, tail: vec![tail], counters: value(b"c") };
    vec![
        (
            "820081a70001010102010365726967687404184d05050681ad001b112233445566778801020206030904f50519012c061adeadbeef07f5080709050a18260b060c04",
            Frame::Hello(hello),
        ),
        ("820181a9000201060209030404000503060807f5088182014176", Frame::Chunk(chunk)),
        ("82028402060400", Frame::ChunkAck { id, term, snap: 4, part: 0 }),
        ("820381a500020106020303818201417604820506", Frame::Record(record)),
        ("82048402060304", Frame::Ack { id, term, position, snap: 4 }),
        ("82058402060b456c65617365", Frame::Side { id, term, side: 11, bytes: value(b"lease") }),
        ("82068302060b", Frame::SideAck { id, term, side: 11 }),
        ("820781a70002010602070303040005f50648636f756e74657273", Frame::Grant(grant)),
        ("8208820206", Frame::Owned { id, term }),
        ("8209820206", Frame::Refused { id, term }),
        ("820a81a600020106020003f504818301f540054163", Frame::Handover(handover)),
        ("820b820206", Frame::Resync { id, term }),
    ]
}

fn heartbeat_sample() -> Heartbeat {
    Heartbeat {
        index: 1,
        release: 1,
        boot: 77,
        to: 78,
        number: 1000,
        sent_at: 5_000_000_000,
        echo: 4_990_000_000,
        held: 3_000_000,
        config_digest: 5,
        claims: vec![claim()],
    }
}

#[test]
fn release_1_frames_stay_as_they_are() {
    for (golden, frame) in samples() {
        let bytes = encode(&frame);
        assert_eq!(hex(&bytes), golden);
        assert!(frame_of(&bytes) == frame, "{golden}");
    }
}

/// What release 2 says and release 1 did not: the build in the hello, and that it declines.
#[test]
fn release_2_frames_stay_as_they_are() {
    let claims = vec![Claim { declines: Some(true), drains: Some(true), ..claim() }];
    let hello = Hello {
        release: 2,
        oldest: 1,
        index: 0,
        name: "left".into(),
        boot: 78,
        config_digest: 5,
        claims,
        build: Some("0.2.0".into()),
    };
    let frame = Frame::Hello(hello);
    let bytes = encode(&frame);
    assert_eq!(
        hex(&bytes),
        "820081a800020101020003646c65667404184e05050681af001b112233445566778801020206030904f50519012c061adeadbeef07f5080709050a18260b060c040df50ef50765302e322e30"
    );
    assert!(frame_of(&bytes) == frame);
}

#[test]
fn release_1_heartbeats_stay_as_they_are() {
    let sample = heartbeat_sample();
    let bytes = encode_heartbeat(&sample);
    assert_eq!(
        hex(&bytes),
        "aa0001010102184d03184e041903e8051b000000012a05f200061b00000001296d5b80071a002dc6c008050981ad001b112233445566778801020206030904f50519012c061adeadbeef07f5080709050a18260b060c04"
    );
    assert_eq!(heartbeat(&bytes).unwrap(), sample);
}

fn frame_of(bytes: &[u8]) -> Frame {
    match frame(bytes) {
        Ok(frame) => frame,
        Err(what) => panic!("{what}"),
    }
}

#[test]
fn the_room_taken_at_first_is_enough() {
    // A vector that grew would have left copies of keys behind.
    for (_, frame) in samples() {
        let bytes = encode(&frame);
        let big = match &frame {
            Frame::Record(record) => {
                let puts = (0..900).map(|key| Put { key: u64::MAX - key, value: value(&[1; 800]) });
                encode(&Frame::Record(Record { puts: puts.collect(), ..record.clone() }))
            }
            _ => continue,
        };
        assert!(bytes.capacity() <= 400 && bytes.len() <= bytes.capacity());
        assert!(big.capacity() <= big.len() + 900 * 20 + 200, "it did not double");
    }
}

#[test]
fn every_cut_and_every_trailing_byte_is_refused() {
    for (_, sample) in samples() {
        let bytes = encode(&sample);
        for n in 0..bytes.len() {
            assert!(frame(&bytes[..n]).is_err());
        }
        let mut long = bytes.to_vec();
        long.push(0);
        assert_eq!(frame(&long).err(), Some("trailing bytes"));
    }
    let bytes = encode_heartbeat(&heartbeat_sample());
    for n in 0..bytes.len() {
        assert!(heartbeat(&bytes[..n]).is_err());
    }
}

#[test]
fn limits_at_the_limit_and_one_above() {
    let record = |size| {
        let puts = vec![Put { key: 1, value: value(&vec![0; size]) }];
        let (id, term, position) = (1, Term(2), Position(3));
        encode(&Frame::Record(Record { id, term, position, puts, deletes: vec![] }))
    };
    assert!(frame(&record(VALUE_MAX)).is_ok());
    assert_eq!(frame(&record(VALUE_MAX + 1)).err(), Some("value too long"));
    assert_eq!(frame(&vec![0; FRAME_MAX + 1]).err(), Some("frame too long"));
    let side =
        |size| encode(&Frame::Side { id: 1, term: Term(2), side: 3, bytes: value(&vec![0; size]) });
    assert!(frame(&side(SIDE_MAX)).is_ok());
    assert_eq!(frame(&side(SIDE_MAX + 1)).err(), Some("side message too long"));
    let claims = |n| Heartbeat { claims: vec![Claim::default(); n], ..heartbeat_sample() };
    assert!(heartbeat(&encode_heartbeat(&claims(ENDPOINTS_MAX))).is_ok());
    assert!(heartbeat(&encode_heartbeat(&claims(ENDPOINTS_MAX + 1))).is_err());
    let absurd = Heartbeat {
        claims: vec![Claim { term: Term(NUMBER_MAX + 1), ..Claim::default() }],
        ..heartbeat_sample()
    };
    assert_eq!(heartbeat(&encode_heartbeat(&absurd)).err(), Some("number out of range"));
    assert_eq!(heartbeat(&vec![0; HEARTBEAT_MAX + 1]).err(), Some("heartbeat too long"));
}

/// A newer neighbour may add fields at the end; an older reader skips them.
#[test]
fn unknown_fields_are_skipped() {
    let bytes = [0x82, 0x04, 0x81, 0x00];
    assert!(frame(&bytes).is_err(), "an ack without its fields");
    // ChunkAck with a fifth field.
    let bytes = [0x82, 0x02, 0x85, 0x02, 0x06, 0x04, 0x00, 0x18, 0x63];
    assert!(frame_of(&bytes) == Frame::ChunkAck { id: 2, term: Term(6), snap: 4, part: 0 });
}

//! Known answers from elsewhere: a real strongSwan's messages, and the records
//! that builds write, by format.

use crypto::aead::AeadKey;
use zeroize::Zeroizing;

use super::*;

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The words of each line.
fn lines(file: &str) -> Vec<Vec<&str>> {
    file.lines().map(|line| line.split(' ').collect()).collect()
}

/// One case of the capture.
struct Case {
    spi: IkeSpi,
    record: Vec<u8>,
    /// Our port and bytes.
    we_send: VecDeque<(u16, Vec<u8>)>,
    we_get: VecDeque<(u16, Vec<u8>)>,
    esp: Option<Vec<u8>>,
}

fn case(name: &str) -> Case {
    let all = lines(include_str!("golden/strongswan-5.9.8.txt"));
    let start = all.iter().position(|w| w[..] == ["case", name]).unwrap();
    let of = |kind: &'static str| {
        let lines = all[start + 1..].iter().take_while(|w| w[0] != "case");
        lines.filter(move |w| w[0] == kind)
    };
    let datagrams = |kind| of(kind).map(|w| (w[1].parse().unwrap(), unhex(w[2]))).collect();
    let record = of("record").next().unwrap();
    Case {
        spi: IkeSpi(u64::from_str_radix(record[1], 16).unwrap()),
        record: unhex(record[2]),
        we_send: datagrams("we-send"),
        we_get: datagrams("we-get"),
        esp: of("esp").next().map(|w| unhex(w[1])),
    }
}

/// The configuration under which the capture was made.
fn captured() -> EndpointConfig {
    let mut config = config(A);
    config.addresses = vec!["10.99.0.1".parse().unwrap()];
    let c = &mut config.connections[0];
    c.local_address = "10.99.0.1".parse().unwrap();
    c.remote_address = RemoteAddress::Ip("10.99.0.2".parse().unwrap());
    c.local_id = "gw.example".parse().unwrap();
    c.remote_id = "peer.example".parse().unwrap();
    c.psk = Secret::from_slice(b"topsecret");
    config
}

/// Takes over from the record, repeats and compares what was sent, hears what
/// strongSwan said, and gives the last Child SA installed meanwhile.
fn replay(case: &mut Case) -> (Endpoint, Option<Box<ChildSa>>) {
    let mut ike = Endpoint::new(captured());
    let now = Duration::from_secs(1000);
    ike.apply(now, &[(case.spi, Zeroizing::new(case.record.clone()))], &[]).unwrap();
    // The capturing process had allocated this much.
    let first = ike.esp_spis().min().map_or(0x0004_f4b0, |spi| spi.0 - 0x0010_0000 + 1);
    let mut spis = Spis { next: first, ..Spis::default() };
    spis.taken = ike.esp_spis().collect();
    let mut rng = rng(1);
    let mut cx = Context { now, rng: &mut rng, spis: &mut spis };
    ike.activate(&mut cx, Term(1), Doubt::None).unwrap();
    let mut child = None;
    loop {
        while let Some(t) = ike.poll_transition() {
            for packet in t.transmits {
                if let Some(sent) = case.we_send.pop_front() {
                    assert_eq!((packet.from.port(), packet.bytes), sent);
                }
            }
            for op in t.children {
                if let ChildOp::Install(sa) = op {
                    child = Some(sa);
                }
            }
        }
        let Some((port, bytes)) = case.we_get.pop_front() else { break };
        let to = SocketAddr::new("10.99.0.1".parse().unwrap(), port);
        let from = SocketAddr::new("10.99.0.2".parse().unwrap(), port);
        let dropped = ike.counters();
        ike.handle_datagram(&mut cx, from, to, &bytes);
        assert_eq!(ike.counters().not_authentic, dropped.not_authentic);
        assert_eq!(ike.counters().not_expected, dropped.not_expected);
    }
    assert!(case.we_send.is_empty());
    (ike, child)
}

/// The ICMP echo request from behind strongSwan to behind us, opened.
fn open_ping(packet: &[u8], sa: &ChildSa) {
    assert_eq!(packet[..4], sa.spi_in.to_bytes());
    let key = AeadKey::new(sa.aead, sa.keymat_in.expose()).unwrap();
    let mut body = packet[16..].to_vec();
    let iv = packet[8..16].try_into().unwrap();
    let inner = key.open_in_place(iv, &packet[..8], &mut body).unwrap();
    assert_eq!((inner[0], inner[9]), (0x45, 1));
    assert_eq!(inner[12..20], [10, 2, 0, 1, 10, 1, 0, 9]);
}

// A half-open IKE SA that another process recorded (with its ephemeral secret),
// and a real strongSwan's answers: the IKE_AUTH request comes out byte for byte,
// strongSwan's AUTH verifies, and the key of the first Child SA opens an ESP
// packet that strongSwan sealed. So SKEYSEED, prf+, SK_*, AUTH and KEYMAT agree
// with another implementation.
#[test]
fn strongswan_agrees_on_every_key() {
    let mut case = case("establish");
    let (_, child) = replay(&mut case);
    open_ping(&case.esp.unwrap(), &child.unwrap());
}

// The same for a Child SA rekeyed with forward secrecy.
#[test]
fn strongswan_agrees_on_a_rekeyed_child() {
    let mut case = case("rekey-child");
    let (_, child) = replay(&mut case);
    open_ping(&case.esp.unwrap(), &child.unwrap());
}

// And for a rekeyed IKE SA: strongSwan's first request in the new one opens.
#[test]
fn strongswan_agrees_on_a_rekeyed_ike_sa() {
    let mut case = case("rekey-ike");
    let (ike, child) = replay(&mut case);
    assert_eq!(child.unwrap().spi_out, EspSpi(0x8642_e5d5));
    assert_eq!(ike.counters().received, 2);
}

const RECORDS_1: &str = include_str!("golden/records-1.txt");
const RECORDS_2: &str = include_str!("golden/records-2.txt");

/// A record of a golden file: what it shows, its key, its bytes.
fn records(file: &'static str) -> Vec<(&'static str, IkeSpi, Vec<u8>)> {
    let all = lines(file).into_iter().filter(|w| w[0] == "record");
    all.map(|w| (w[1], IkeSpi(u64::from_str_radix(w[2], 16).unwrap()), unhex(w[3]))).collect()
}

/// When they are read: long after the host booted, for ages reach back.
const READ_AT: Duration = Duration::from_secs(5_000_000);

/// What a build that holds one record, and nothing else, would write.
fn rewritten(key: IkeSpi, bytes: &[u8], format: u8) -> (Endpoint, Vec<Vec<u8>>) {
    let mut ike = Endpoint::new(config(A));
    ike.apply(READ_AT, &[(key, Zeroizing::new(bytes.to_vec()))], &[]).unwrap();
    ike.set_format(format);
    let all = ike.snapshot(READ_AT);
    assert!(all.iter().all(|(again, _)| *again == key));
    (ike, all.into_iter().map(|(_, bytes)| bytes.to_vec()).collect())
}

// Records of every format: every later release reads them, and as long as it writes
// the format, writes them so.
#[test]
fn golden_records_are_read_and_written() {
    for (format, file, least) in [(1, RECORDS_1, 13), (2, RECORDS_2, 15)] {
        let all = records(file);
        assert!(all.len() >= least);
        for (state, key, bytes) in all {
            assert_eq!(bytes[0], format);
            let (ike, again) = rewritten(key, &bytes, format);
            assert_eq!(again, [bytes], "{state}");
            // Those from before the field was there have it unset.
            assert_eq!(ike.is_waiting_in_doubt(key), state == "in-doubt", "{state}");
        }
    }
}

// The states of both files are the same, so one is translated into the other; notes
// have no place in format 1.
#[test]
fn either_format_is_translated_into_the_other() {
    let (old, new) = (records(RECORDS_1), records(RECORDS_2));
    let (notes, sas): (Vec<_>, Vec<_>) = new.into_iter().partition(|r| r.0.starts_with("note"));
    assert_eq!((old.len(), notes.len()), (sas.len(), 2));
    for ((state, key, first), (_, _, second)) in old.iter().zip(&sas) {
        assert_eq!(rewritten(*key, first, 2).1.as_slice(), std::slice::from_ref(second), "{state}");
        assert_eq!(rewritten(*key, second, 1).1.as_slice(), std::slice::from_ref(first), "{state}");
    }
    for (state, key, bytes) in notes {
        let (ike, again) = rewritten(key, &bytes, 1);
        assert!(again.is_empty(), "{state}");
        assert_eq!(ike.is_held("c"), state == "note-held");
        let failed = ike.last_failure("c", READ_AT);
        let expected = ("authentication failed: we sent IDi gw0.example", Duration::from_secs(90));
        assert_eq!(failed, (state == "note-failed").then_some(expected));
    }
}

// A build that is held at format 1 refuses the next one, as one that never knew it:
// nothing of the record is applied.
#[test]
fn a_held_build_knows_no_newer_format() {
    for (_, key, bytes) in records(RECORDS_2) {
        let mut ike = Endpoint::new(config(A));
        ike.hold_format(1);
        let put = [(key, Zeroizing::new(bytes))];
        assert!(matches!(ike.apply(READ_AT, &put, &[]), Err(crate::RecordError::Format(2))));
        assert!(ike.snapshot(READ_AT).is_empty());
        // Nor does it write it, whatever it is told.
        let (_, key, bytes) = records(RECORDS_1).remove(2);
        ike.apply(READ_AT, &[(key, Zeroizing::new(bytes))], &[]).unwrap();
        ike.set_format(2);
        assert_eq!(ike.snapshot(READ_AT)[0].1[0], 1);
    }
    for format in [0, 3] {
        let put = [(IkeSpi(1), Zeroizing::new(vec![format, 0]))];
        let refused = Endpoint::new(config(A)).apply(READ_AT, &put, &[]);
        assert!(matches!(refused, Err(crate::RecordError::Format(f)) if f == format));
    }
}

// Every cut of a note's record, a note under another key, of no connection, or of no kind.
#[test]
fn damaged_notes_are_refused() {
    let notes = records(RECORDS_2).into_iter().filter(|r| r.0.starts_with("note"));
    for (_, key, bytes) in notes {
        let refused = |key, bytes: &[u8]| {
            let put = [(key, Zeroizing::new(bytes.to_vec()))];
            Endpoint::new(config(A)).apply(READ_AT, &put, &[]).unwrap_err()
        };
        for cut in 0..bytes.len() {
            assert_eq!(refused(key, &bytes[..cut]), crate::RecordError::Malformed);
        }
        assert_eq!(refused(IkeSpi(7), &bytes), crate::RecordError::Key);
        let mut other = bytes.clone();
        other[1] = 2;
        assert_eq!(refused(key, &other), crate::RecordError::Malformed);
        // "c", the connection's name, is the note's first field.
        let name = bytes.windows(2).position(|w| w == [0x61, b'c']).unwrap();
        other = bytes.clone();
        other[name + 1] = b'd';
        assert_eq!(refused(crate::record::note_key("d"), &other), crate::RecordError::Connection);
    }
}

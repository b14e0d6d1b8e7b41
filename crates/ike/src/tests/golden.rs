//! Known answers from elsewhere: a real strongSwan's messages, and the records
//! that earlier builds wrote.

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

const RECORDS: &str = include_str!("golden/records-1.txt");

// Records of format 1: every later release reads them, and as long as it writes
// the format, writes them so.
#[test]
fn golden_records_are_read_and_written() {
    let now = Duration::from_secs(5_000_000);
    let all = lines(RECORDS).into_iter().filter(|w| w[0] == "record").collect::<Vec<_>>();
    assert!(all.len() >= 6);
    for words in all {
        let (state, bytes) = (words[1], unhex(words[3]));
        let spi = IkeSpi(u64::from_str_radix(words[2], 16).unwrap());
        let mut ike = Endpoint::new(config(A));
        ike.apply(now, &[(spi, Zeroizing::new(bytes.clone()))], &[]).unwrap();
        let again = ike.snapshot(now);
        assert_eq!(again[0].1.as_slice(), bytes, "{state}");
        // Those from before the field was there have it unset.
        assert_eq!(ike.is_waiting_in_doubt(spi), state == "in-doubt", "{state}");
    }
}

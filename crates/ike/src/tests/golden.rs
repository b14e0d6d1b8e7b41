//! Known answers from elsewhere: a real strongSwan's messages, and the records
//! that earlier builds wrote.

use crypto::aead::AeadKey;
use zeroize::Zeroizing;

use super::*;

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The words of the lines that begin with `kind`.
fn lines<'a>(file: &'a str, kind: &str) -> Vec<Vec<&'a str>> {
    let words = file.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    words.filter(|w| w[0] == kind).collect()
}

const STRONGSWAN: &str = include_str!("golden/strongswan-5.9.8.txt");

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

// The record of a half-open IKE SA that another process wrote (with its
// ephemeral secret), and a real strongSwan's answers to it: the IKE_AUTH request
// comes out byte for byte, strongSwan's AUTH verifies, and the key of the first
// Child SA opens an ESP packet that strongSwan sealed. So this proves SKEYSEED,
// prf+, SK_*, AUTH, KEYMAT and NAT detection against another implementation.
#[test]
fn strongswan_agrees_on_every_key() {
    let mut ike = Endpoint::new(captured());
    let record = &lines(STRONGSWAN, "record")[0];
    let spi = IkeSpi(u64::from_str_radix(record[1], 16).unwrap());
    let puts = [(spi, Zeroizing::new(unhex(record[2])))];
    let now = Duration::from_secs(1000);
    ike.apply(now, &puts, &[]).unwrap();

    let mut spis = Spis { next: 0x0002_0720, ..Spis::default() };
    let mut rng = rng(1);
    let mut cx = Context { now, rng: &mut rng, spis: &mut spis };
    ike.activate(&mut cx, Term(1), Doubt::None).unwrap();
    let sent = lines(STRONGSWAN, "we-send");
    let got = lines(STRONGSWAN, "we-get");
    let mut children = Vec::new();
    for (request, response) in sent.iter().zip(&got) {
        let mut transmits = Vec::new();
        while let Some(t) = ike.poll_transition() {
            transmits.extend(t.transmits);
            children.extend(t.children);
        }
        assert_eq!(transmits.len(), 1);
        assert_eq!(transmits[0].from.port().to_string(), request[1]);
        assert_eq!(transmits[0].bytes, unhex(request[2]));
        let port: u16 = response[1].parse().unwrap();
        let to = SocketAddr::new("10.99.0.1".parse().unwrap(), port);
        let from = SocketAddr::new("10.99.0.2".parse().unwrap(), port);
        ike.handle_datagram(&mut cx, from, to, &unhex(response[2]));
    }
    while let Some(t) = ike.poll_transition() {
        children.extend(t.children);
    }
    let Some(ChildOp::Install(sa)) = children.first() else { panic!("{children:?}") };

    let packet = unhex(lines(STRONGSWAN, "esp")[0][1]);
    assert_eq!(packet[..4], sa.spi_in.to_bytes());
    let key = AeadKey::new(sa.aead, sa.keymat_in.expose()).unwrap();
    let mut body = packet[16..].to_vec();
    let inner =
        key.open_in_place(packet[8..16].try_into().unwrap(), &packet[..8], &mut body).unwrap();
    // An ICMP echo request from behind strongSwan to behind us.
    assert_eq!(inner[..1], [0x45]);
    assert_eq!(inner[9], 1);
    assert_eq!(inner[12..20], [10, 2, 0, 1, 10, 1, 0, 9]);
}

const RECORDS: &str = include_str!("golden/records-1.txt");

// Records of format 1: every later release reads them, and as long as it writes
// the format, writes them so.
#[test]
fn golden_records_are_read_and_written() {
    let now = Duration::from_secs(5_000_000);
    let all = lines(RECORDS, "record");
    assert!(all.len() >= 6);
    for words in all {
        let (state, bytes) = (words[1], unhex(words[3]));
        let spi = IkeSpi(u64::from_str_radix(words[2], 16).unwrap());
        let mut ike = Endpoint::new(config(A));
        ike.apply(now, &[(spi, Zeroizing::new(bytes.clone()))], &[]).unwrap();
        let again = ike.snapshot(now);
        assert_eq!(again[0].1.as_slice(), bytes, "{state}");
    }
}

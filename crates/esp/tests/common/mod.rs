//! What the integration tests share: packets, SAs, and shards in pairs.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

use core::net::SocketAddr;
use core::time::Duration;

use crypto::Secret;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, Config, INITIAL_CEILING, Report, SLOT_LEN, Sa, Shard, Verdict};
use wire::id::{ConnectionId, EndpointId, EspSpi, SpiLayout, Term};
use wire::ts::{Cidr, TrafficSelector};

pub(crate) const MAIN: EndpointId = EndpointId(0);
/// A fence that never runs out.
pub(crate) const OPEN: &[Duration] = &[Duration::MAX];

pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|c| (c as char).to_digit(16)).map(|d| d as u8).collect();
    assert_eq!(digits.len() % 2, 0, "odd number of hex digits");
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(crate) fn ts(cidr: &str) -> TrafficSelector {
    TrafficSelector::from(cidr.parse::<Cidr>().unwrap())
}

pub(crate) fn sock(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A UDP packet from the left net to the right one, with a payload that tells
/// which it is.
pub(crate) fn udp(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    wire::ip::udp_packet(sock(from), sock(to), payload).unwrap()
}

/// From 10.1.0.9 to 10.2.0.5, which the SAs of [`sas`] carry left to right.
pub(crate) fn numbered(number: u32) -> Vec<u8> {
    udp("10.1.0.9:5000", "10.2.0.5:4000", &number.to_be_bytes())
}

pub(crate) fn number_of(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[packet.len() - 4..].try_into().unwrap())
}

/// Our SPI number `slot` of instance `instance`.
pub(crate) fn spi(instance: u8, slot: u16) -> EspSpi {
    SpiLayout::new(instance, 1, 0, slot).unwrap().spi()
}

/// Both ends' halves of one SA pair: the left net is 10.1.0.0/16 and
/// fd01::/64, the right one 10.2.0.0/16 and fd02::/64.
pub(crate) fn sas(alg: AeadAlg, slot: u16) -> (Sa, Sa) {
    let key = |first: u8| {
        Secret::new((0..alg.keymat_len()).map(|i| first.wrapping_add(i as u8)).collect())
    };
    let left_net = vec![ts("10.1.0.0/16"), ts("fd01::/64")];
    let right_net = vec![ts("10.2.0.0/16"), ts("fd02::/64")];
    let seed = (slot as u8).wrapping_mul(50);
    let left = Sa {
        endpoint: MAIN,
        connection: ConnectionId(0),
        spi_in: spi(0, slot),
        spi_out: spi(1, slot),
        alg,
        keymat_in: key(seed),
        keymat_out: key(seed.wrapping_add(100)),
        local_ts: left_net.clone(),
        remote_ts: right_net.clone(),
        local: sock("203.0.113.10:4500"),
        remote: sock("198.51.100.7:4500"),
        udp_encap: true,
        next_seq: 1,
        ceiling: INITIAL_CEILING,
        born: Term(0),
    };
    let right = Sa {
        spi_in: left.spi_out,
        spi_out: left.spi_in,
        keymat_in: left.keymat_out.duplicate(),
        keymat_out: left.keymat_in.duplicate(),
        local_ts: right_net,
        remote_ts: left_net,
        local: left.remote,
        remote: left.local,
        ..copy(&left)
    };
    (left, right)
}

pub(crate) fn copy(sa: &Sa) -> Sa {
    Sa {
        keymat_in: sa.keymat_in.duplicate(),
        keymat_out: sa.keymat_out.duplicate(),
        local_ts: sa.local_ts.clone(),
        remote_ts: sa.remote_ts.clone(),
        ..*sa
    }
}

pub(crate) fn config() -> Config {
    Config { queue_len: 64, ..Config::default() }
}

/// A shard that owns the endpoint in `term`, without obeying leases.
pub(crate) fn owner(term: u64) -> Shard {
    let mut shard = Shard::new(config());
    own(&mut shard, term, 0, false);
    shard
}

pub(crate) fn own(shard: &mut Shard, term: u64, seq_jump: u64, obey_leases: bool) {
    shard.apply(Command::Own { endpoint: MAIN, term: Term(term), seq_jump, obey_leases }).unwrap();
}

/// Installs and uses an SA.
pub(crate) fn install(shard: &mut Shard, sa: &Sa) {
    shard.apply(Command::Install(Box::new(copy(sa)))).unwrap();
    shard.apply(Command::UseOutbound { spi_in: sa.spi_in }).unwrap();
}

/// Two owners with one SA pair between them.
pub(crate) fn pair(alg: AeadAlg) -> (Shard, Shard, Sa, Sa) {
    let (left_sa, right_sa) = sas(alg, 0);
    let (mut left, mut right) = (owner(2), owner(2));
    install(&mut left, &left_sa);
    install(&mut right, &right_sa);
    (left, right, left_sa, right_sa)
}

pub(crate) fn batch_of<P: AsRef<[u8]>>(packets: &[P]) -> Batch {
    let mut batch = Batch::new(packets.len().max(1), SLOT_LEN);
    for packet in packets {
        assert!(batch.push().unwrap().fill(packet.as_ref()));
    }
    batch
}

/// One packet outbound: verdict, and the packet as it then stands.
pub(crate) fn seal(shard: &mut Shard, now: Duration, inner: &[u8]) -> (Verdict, Vec<u8>) {
    let mut batch = batch_of(&[inner]);
    shard.outbound(now, OPEN, &mut batch);
    let slot = &batch.slots()[0];
    (slot.verdict(), slot.packet().to_vec())
}

/// One packet outbound that must be sent.
pub(crate) fn sealed(shard: &mut Shard, now: Duration, inner: &[u8]) -> Vec<u8> {
    let (verdict, packet) = seal(shard, now, inner);
    assert!(matches!(verdict, Verdict::Send { .. }), "{verdict:?}");
    packet
}

/// One packet inbound: verdict, and the packet as it then stands.
pub(crate) fn open(shard: &mut Shard, now: Duration, esp: &[u8]) -> (Verdict, Vec<u8>) {
    let mut batch = batch_of(&[esp]);
    shard.inbound(now, OPEN, &mut batch);
    let slot = &batch.slots()[0];
    (slot.verdict(), slot.packet().to_vec())
}

/// One packet inbound that must be delivered.
pub(crate) fn opened(shard: &mut Shard, now: Duration, esp: &[u8]) -> Vec<u8> {
    let (verdict, packet) = open(shard, now, esp);
    assert_eq!(verdict, Verdict::Deliver { endpoint: MAIN });
    packet
}

pub(crate) fn seq_of(esp: &[u8]) -> u32 {
    wire::esp::Header::parse(esp).unwrap().seq
}

pub(crate) fn iv_of(esp: &[u8]) -> [u8; 8] {
    esp[8..16].try_into().unwrap()
}

pub(crate) fn reports(shard: &mut Shard, now: Duration) -> Vec<Report> {
    core::iter::from_fn(|| shard.poll_report(now)).collect()
}

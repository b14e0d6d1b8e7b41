//! What must hold of a plan for any packets whatever: nothing is lost, nothing overtakes within its flow, and what is
//! merged is split again into what it was made of. Used by tests/plan, and by the target `coalesce` in tests/fuzz.
#![allow(dead_code, reason = "each user takes a part")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a panic is a finding")]

use esp::coalesce::{MOST_HEADER, Merge, Plan, Planned};
use esp::segment::Segments;
use wire::ip::{Fragment, L4, Packet, Udp, protocol};
use wire::vnet::{Carried, Offload};

use super::made::{Made, slow_sum, transport_sum};

/// How much was tested.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    pub(crate) packets: usize,
    pub(crate) merged: usize,
    pub(crate) merged_udp: usize,
}

/// Plans for packets with what the caller says of each, and checks it all. Gives the numbers of those that leave
/// together.
pub(crate) fn check(
    packets: &[(Vec<u8>, u8)],
    most: usize,
    reached: &mut Reached,
) -> Vec<Vec<usize>> {
    let mut plan = Plan::new(packets.len(), most);
    plan.make(
        Merge::ALL,
        packets.iter().enumerate().map(|(n, (bytes, origin))| (n, &bytes[..], *origin)),
    );
    let groups: Vec<Vec<usize>> = plan.iter().map(|planned| planned.numbers().collect()).collect();

    reached.packets += packets.len();
    let order: Vec<usize> = groups.concat();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert!(sorted.into_iter().eq(0..packets.len()), "each once");
    assert!(groups.is_sorted_by_key(|group| group[0]), "first packets keep their order");
    let mut place = vec![0; packets.len()];
    for (at, number) in order.iter().enumerate() {
        place[*number] = at;
    }
    let seen: Vec<_> = packets.iter().map(|(bytes, _)| Packet::parse(bytes).ok()).collect();
    for later in 0..packets.len() {
        for earlier in 0..later {
            let ordered = place[earlier] < place[later];
            let flow = seen[earlier].as_ref().zip(seen[later].as_ref());
            assert!(ordered || !flow.is_some_and(one_flow), "{later} overtakes {earlier}");
        }
    }
    for planned in plan.iter() {
        let members: Vec<&[u8]> = planned.numbers().map(|n| &packets[n].0[..]).collect();
        assert_eq!(
            (planned.first(), planned.count()),
            (planned.numbers().next().unwrap(), members.len())
        );
        assert!(members.len() <= most.max(1));
        let origin = packets[planned.first()].1;
        assert!(planned.numbers().all(|n| packets[n].1 == origin), "one origin");
        merged(&planned, &members, reached);
    }
    groups
}

/// Whether both may be of one flow. What hides its ports may be of any between its addresses.
fn one_flow((a, b): (&Packet, &Packet)) -> bool {
    let has_flow = |packet: &Packet| {
        // One that ends before its ports is of no flow.
        let cut = packet.fragment == Fragment::Whole && packet.l4 == L4::Hidden;
        matches!(packet.protocol, protocol::TCP | protocol::UDP) && !cut
    };
    let bare = |packet: &Packet| {
        packet.fragment == Fragment::Whole
            && packet.l4_offset == if packet.is_ipv4() { 20 } else { 40 }
            && matches!(packet.l4, L4::Ports { .. })
    };
    has_flow(a)
        && has_flow(b)
        && (a.src, a.dst) == (b.src, b.dst)
        && (!bare(a) || !bare(b) || a.flow() == b.flow())
}

/// The merged packet: headers of the whole, then all payloads. Split by its vnet header, it is what it was.
fn merged(planned: &Planned<'_>, members: &[&[u8]], reached: &mut Reached) {
    let Some(run) = planned.run() else {
        return assert_eq!(members.len(), 1);
    };
    assert!(members.len() > 1);
    let head = run.head(members[0]).unwrap();
    assert_eq!(head.bytes().len(), run.header_len());
    assert!(run.header_len() <= MOST_HEADER);
    assert_eq!(usize::from(head.form.segment_len) + run.header_len(), members[0].len());
    let mut whole = head.bytes().to_vec();
    members.iter().for_each(|packet| whole.extend(&packet[run.header_len()..]));
    let read = Packet::parse(&whole).unwrap();
    assert_eq!(read.total_len, whole.len());
    // What is left for whoever splits it: the transport checksum alone, of which the pseudo-header's sum is there.
    let (addresses, part) = parts(&whole);
    assert!(!read.is_ipv4() || slow_sum(&whole[..20]) == 0xffff);
    let at = head.form.carried.checksum_at();
    let mut pseudo = vec![0, 0, 0, read.protocol];
    pseudo.extend((part.len() as u32).to_be_bytes());
    pseudo.extend(addresses);
    assert_eq!(part[at..at + 2], slow_sum(&pseudo).to_be_bytes());
    if head.form.carried == Carried::Udp {
        assert_eq!(Udp::parse(part).unwrap().payload.len() + 8, part.len());
    }

    let mut segments = Segments::new(&whole, Offload::decode(&head.form.encode())).unwrap();
    for packet in members {
        let mut room = vec![0; members[0].len()];
        let len = segments.next_into(&whole, &mut room).unwrap();
        intact(&room[..len], head.form.carried);
        intact(packet, head.form.carried);
        assert_eq!(comparable(&room[..len]), comparable(packet));
    }
    assert!(segments.is_done());
    reached.merged += 1;
    reached.merged_udp += usize::from(head.form.carried == Carried::Udp);
}

/// Addresses, and what follows a bare header.
fn parts(packet: &[u8]) -> (&[u8], &[u8]) {
    if packet[0] >> 4 == 6 {
        (&packet[8..40], &packet[40..])
    } else {
        (&packet[12..20], &packet[20..])
    }
}

/// Both checksums are right.
fn intact(packet: &[u8], carried: Carried) {
    let number = if carried == Carried::Tcp { 6 } else { 17 };
    let (addresses, part) = parts(packet);
    assert!(packet[0] >> 4 == 6 || slow_sum(&packet[..20]) == 0xffff);
    assert_eq!(transport_sum(addresses, number, part), 0xffff);
    assert!(carried == Carried::Tcp || part[6..8] != [0, 0]);
}

/// Without what may differ: the identification of IPv4, which means nothing here and which a split makes anew, with the
/// checksum that covers it; and TCP's two ways to write a checksum of zero.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let at = if packet[0] >> 4 == 4 {
        assert_eq!(packet[6..8], [0x40, 0]);
        packet[4..6].fill(0);
        packet[10..12].fill(0);
        (packet[9] == 6).then_some(36)
    } else {
        (packet[6] == 6).then_some(56)
    };
    if let Some(at) = at
        && packet[at..at + 2] == [0xff, 0xff]
    {
        packet[at..at + 2].fill(0);
    }
    packet
}

/// Makes both checksums of a packet right, if it is one of TCP or UDP, as if it were all that its lengths say, so that
/// what stands in its headers is looked at at all.
pub(crate) fn mend(packet: &mut [u8]) {
    let (from, to, number, at) = match packet.first().map_or(0, |first| first >> 4) {
        4 => (12, 20, 9, usize::from(packet[0] & 0xf) * 4),
        6 => (8, 40, 6, 40),
        _ => return,
    };
    if at < to || packet.len() < at {
        return;
    }
    if at < 40 {
        packet[10..12].fill(0);
        let sum = !slow_sum(&packet[..at]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let addresses = packet[from..to].to_vec();
    let number = packet[number];
    let part = &mut packet[at..];
    let at = if number == protocol::UDP { 6 } else { 16 };
    if part.len() < at + 2 {
        return;
    }
    part[at..at + 2].fill(0);
    let sum = match !transport_sum(&addresses, number, part) {
        0 => 0xffff,
        sum => sum,
    };
    part[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Packets drawn by bytes: how many may be one at most, then five bytes for each packet.
pub(crate) fn drawn(bytes: &[u8]) -> (Vec<(Vec<u8>, u8)>, usize) {
    let [most, steps @ ..] = bytes else { return (Vec::new(), 1) };
    let most = if most % 4 == 0 { usize::from(most / 4) } else { 64 };
    let mut seqs = [u32::MAX - 1000; 4];
    let mut packets = Vec::new();
    for step in steps.as_chunks::<5>().0.iter().take(64) {
        let [flow, length, at, value, how] = step.map(usize::from);
        let length = [200, 200, 200, 150, 1400, 128, 16, at][length % 8];
        let made = Made::of_flow(flow % 4, &mut seqs[flow % 4], packets.len(), length);
        let port = made.port + (flow as u16 / 4 % 16).saturating_sub(8);
        let mut packet = Made { port, ..made }.bytes();
        let at = at.min(packet.len() - 1);
        match how % 8 {
            0 => packet[at] = value as u8,
            1 => packet[at] ^= 1 << (value % 8),
            2 => packet.truncate(at),
            3 => packet.insert(at, value as u8),
            _ => {}
        }
        if how & 8 == 0 {
            mend(&mut packet);
        }
        if how & 16 == 0 || packets.is_empty() {
            packets.push((packet, u8::from(flow >= 240)));
        } else {
            // It overtook the one before.
            packets.insert(packets.len() - 1, (packet, 0));
        }
    }
    (packets, most)
}

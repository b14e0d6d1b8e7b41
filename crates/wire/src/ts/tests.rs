use super::*;

fn range(first: &str, last: &str) -> AddrRange {
    AddrRange::new(first.parse().unwrap(), last.parse().unwrap()).unwrap()
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn ts(net: &str, protocol: u8, ports: Ports) -> TrafficSelector {
    TrafficSelector::new(cidr(net).into(), protocol, ports).unwrap()
}

#[test]
fn ports_any_includes_opaque_and_ranges_do_not() {
    assert!(
        Ports::Any.matches(None) && Ports::Any.matches(Some(0)) && Ports::Any.matches(Some(65535))
    );
    assert!(Ports::Opaque.matches(None) && !Ports::Opaque.matches(Some(0)));
    let range = Ports::Range(80, 82);
    assert!(!range.matches(None) && !range.matches(Some(79)) && range.matches(Some(80)));
    assert!(range.matches(Some(82)) && !range.matches(Some(83)));
    assert!(Ports::Any.contains(Ports::Opaque) && !Ports::Opaque.contains(Ports::Any));
    assert!(!Ports::Range(0, 65534).contains(Ports::Opaque));
    assert_eq!(Ports::Opaque.intersect(Ports::Range(1, 2)), None);
    assert_eq!(Ports::Range(1, 5).intersect(Ports::Range(5, 9)), Some(Ports::Range(5, 5)));
    assert_eq!(Ports::Range(1, 5).intersect(Ports::Range(6, 9)), None);
}

// security.md, statement 14.
#[test]
fn contradictions_are_refused() {
    let all = AddrRange::ALL_V4;
    assert_eq!(Ports::from_wire(81, 80), Err(TsError::Ports));
    assert_eq!(Ports::from_wire(65535, 1), Err(TsError::Ports));
    assert_eq!(TrafficSelector::new(all, 6, Ports::Range(81, 80)), Err(TsError::Ports));
    assert_eq!(
        TrafficSelector::new(all, 0, Ports::Range(80, 80)),
        Err(TsError::PortsWithoutProtocol)
    );
    // A range written as all ports is ANY, so it needs no protocol.
    assert_eq!(TrafficSelector::new(all, 0, Ports::Range(0, 65535)), Ok(TrafficSelector::all(all)));
    let (low, high): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    assert_eq!(AddrRange::new(high, low), Err(TsError::Addresses));
    assert_eq!(AddrRange::new(low, Ipv6Addr::LOCALHOST.into()), Err(TsError::Family));
}

#[test]
fn cidrs_cover_a_range_exactly() {
    let list = |r: AddrRange| r.cidrs().map(|c| c.to_string()).collect::<Vec<_>>();
    assert_eq!(list(range("10.1.0.0", "10.1.0.255")), ["10.1.0.0/24"]);
    assert_eq!(list(range("10.1.1.7", "10.1.1.9")), ["10.1.1.7/32", "10.1.1.8/31"]);
    assert_eq!(list(AddrRange::ALL_V4), ["0.0.0.0/0"]);
    assert_eq!(list(AddrRange::ALL_V6), ["::/0"]);
    assert_eq!(list(range("255.255.255.255", "255.255.255.255")), ["255.255.255.255/32"]);
    // The longest list there is.
    assert_eq!(range("0.0.0.1", "255.255.255.254").cidrs().count(), 62);
    let widest =
        AddrRange::new(Ipv6Addr::from_bits(1).into(), Ipv6Addr::from_bits(u128::MAX - 1).into())
            .unwrap();
    assert_eq!(widest.cidrs().count(), 254);
    assert_eq!(range("10.1.0.0", "10.1.0.254").as_cidr(), None);
    assert_eq!(range("fd00::", "fd00::ffff").as_cidr(), Some(cidr("fd00::/112")));
    for text in
        ["0.0.0.0/0", "10.0.0.0/8", "10.1.2.3/32", "::/0", "fd00::/64", "fd00::1/128", "8000::/1"]
    {
        assert_eq!(AddrRange::from(cidr(text)).as_cidr(), Some(cidr(text)));
    }
}

#[test]
fn cidr_texts() {
    assert_eq!(cidr("10.1.2.3").prefix(), 32);
    assert_eq!(cidr("fd00::1").prefix(), 128);
    assert_eq!("10.1.0.1/24".parse::<Cidr>(), Err(CidrError::HostBits(cidr("10.1.0.0/24"))));
    assert_eq!(
        "10.1.0.1/24".parse::<Cidr>().unwrap_err().to_string(),
        "host bits are set after the prefix; did you mean 10.1.0.0/24?"
    );
    for text in ["10.1.0.0/33", "fd00::/129", "10.1.0.0/999"] {
        assert_eq!(text.parse::<Cidr>(), Err(CidrError::Prefix), "{text}");
    }
    for text in
        ["", "/", "10.1.0.0/", "10.1.0.0/+8", "10.1.0.0/ 8", "10.1/16", "a/8", "10.1.0.0/8/8"]
    {
        assert_eq!(text.parse::<Cidr>(), Err(CidrError::Syntax), "{text}");
    }
}

#[test]
fn selectors_contain_and_intersect() {
    let net = ts("10.1.0.0/16", 0, Ports::Any);
    let web = ts("10.1.2.0/24", 6, Ports::Range(80, 443));
    assert!(net.contains(&web) && !web.contains(&net));
    assert_eq!(net.intersect(&web), Some(web));
    assert_eq!(web.intersect(&ts("10.1.2.0/24", 17, Ports::Any)), None);
    assert_eq!(web.intersect(&ts("10.1.3.0/24", 6, Ports::Any)), None);
    assert_eq!(web.intersect(&ts("::/0", 6, Ports::Any)), None);
    assert_eq!(web.to_string(), "10.1.2.0/24[6/80-443]");
}

/// RFC 7296 §2.9: the example of a responder that narrows to its own subset, keeping the first.
#[test]
fn narrowing_keeps_what_both_allow_in_the_offered_order() {
    let offered =
        [ts("198.51.100.43/32", 17, Ports::Range(53, 53)), ts("198.51.100.0/24", 0, Ports::Any)];
    let allowed = [ts("198.51.100.0/25", 0, Ports::Any), ts("203.0.113.0/24", 0, Ports::Any)];
    // The first is inside what remains of the second, so one selector says it all.
    assert_eq!(narrow(&offered, &allowed), [ts("198.51.100.0/25", 0, Ports::Any)]);
    assert_eq!(narrow(&offered[..1], &allowed), [offered[0]]);
    assert_eq!(narrow(&offered, &allowed[1..]), []);
    let two = [ts("10.2.0.0/24", 0, Ports::Any), ts("10.1.0.0/24", 0, Ports::Any)];
    assert_eq!(narrow(&two, &[ts("10.0.0.0/8", 0, Ports::Any)]), two);
}

fn body(count: u8, selectors: &[&[u8]]) -> Vec<u8> {
    [&[count, 0, 0, 0], selectors.concat().as_slice()].concat()
}

#[test]
fn payload_errors_are_told_apart() {
    let good: &[u8] = &[7, 0, 0, 16, 0, 0, 255, 255, 10, 1, 0, 0, 10, 1, 0, 255];
    let unknown: &[u8] = &[9, 0, 0, 8, 1, 2, 3, 4];
    let parsed = |bytes: &[u8]| parse_payload(bytes);
    assert_eq!(parsed(&body(1, &[good])), Ok(vec![ts("10.1.0.0/24", 0, Ports::Any)]));
    assert_eq!(parsed(&body(2, &[unknown, good])), Ok(vec![ts("10.1.0.0/24", 0, Ports::Any)]));
    assert_eq!(parsed(&body(1, &[unknown])), Ok(vec![]));
    assert_eq!(parsed(&body(0, &[])), Err(TsError::Count));
    assert_eq!(parsed(&body(2, &[good])), Err(TsError::Count));
    assert_eq!(parsed(&body(1, &[good, good])), Err(TsError::Count));
    assert_eq!(parsed(&[1, 0, 0]), Err(TsError::Length));
    // A selector length of 0 to 3 cannot loop; one too short or too long for its type is refused.
    for len in [0, 1, 3, 4, 8, 15, 17, 40, 255] {
        let mut bad = good.to_vec();
        bad[3] = len;
        assert_eq!(parsed(&body(1, &[&bad, &[0; 24]])), Err(TsError::Length), "{len}");
    }
    let mut ports = good.to_vec();
    ports[4..8].copy_from_slice(&[0, 81, 0, 80]);
    assert_eq!(parsed(&body(1, &[&ports])), Err(TsError::Ports));
    let mut addrs = good.to_vec();
    addrs[8] = 11;
    assert_eq!(parsed(&body(1, &[&addrs])), Err(TsError::Addresses));
}

#[test]
fn payload_counts_at_the_limit() {
    let one = ts("10.0.0.0/8", 0, Ports::Any);
    let mut out = Vec::new();
    assert_eq!(emit_payload(&[], &mut out), Err(TsError::Count));
    assert_eq!(emit_payload(&[one; 256], &mut out), Err(TsError::Count));
    assert!(out.is_empty());
    emit_payload(&[one; 255], &mut out).unwrap();
    assert_eq!(parse_payload(&out), Ok(vec![one; 255]));
}

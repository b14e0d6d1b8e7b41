//! Fewer networks that cover the same addresses. Pure.
//!
//! The kernel asks one rule after the other for every packet, so what a packet costs must not grow with the number of
//! connections: pairs of networks that lie side by side become one pair. Nothing is covered that was not covered before,
//! and nothing is left out. Networks are never joined to "everywhere": the kernel treats that as no condition at all
//! ([`netio::route::Netlink::add_rule`]).

use std::collections::{BTreeMap, BTreeSet};

use netio::route::Prefix;

/// The fewest networks that cover what these cover.
pub(super) fn union(networks: BTreeSet<Prefix>) -> Vec<Prefix> {
    let mut joined: Vec<Prefix> = Vec::new();
    // In order, so a network comes after what covers it, and after its left neighbour.
    for next in networks {
        if joined.last().is_some_and(|last| last.covers(&next)) {
            continue;
        }
        joined.push(next);
        while let [.., left, right] = joined[..]
            && let Some(both) = parent(left, right)
        {
            joined.truncate(joined.len() - 2);
            joined.push(both);
        }
    }
    joined
}

/// The network that two halves make up.
fn parent(left: Prefix, right: Prefix) -> Option<Prefix> {
    if left.length() != right.length() || left.length() < 2 {
        return None;
    }
    let both = Prefix::new(left.address(), left.length() - 1)?;
    (left != right && both.covers(&left) && both.covers(&right)).then_some(both)
}

/// Few pairs that cover what these cover: joined on one side where the other is the same, on either side in turn.
pub(super) fn pairs(pairs: BTreeSet<(Prefix, Prefix)>) -> BTreeSet<(Prefix, Prefix)> {
    let turned =
        |pairs: BTreeSet<(Prefix, Prefix)>| pairs.into_iter().map(|(a, b)| (b, a)).collect();
    let mut pairs = pairs;
    loop {
        let before = pairs.len();
        pairs = turned(joined(turned(joined(pairs))));
        if pairs.len() >= before {
            return pairs;
        }
    }
}

/// Joins second sides that have the same first one.
fn joined(pairs: BTreeSet<(Prefix, Prefix)>) -> BTreeSet<(Prefix, Prefix)> {
    let mut by_first: BTreeMap<Prefix, BTreeSet<Prefix>> = BTreeMap::new();
    for (first, second) in pairs {
        by_first.entry(first).or_default().insert(second);
    }
    let each = |(first, seconds)| union(seconds).into_iter().map(move |second| (first, second));
    by_first.into_iter().flat_map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr};

    fn net(text: &str) -> Prefix {
        let (address, length) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    /// Networks in 10.0.0.0/28.
    fn any_net() -> impl Strategy<Value = Prefix> {
        (0_u8..16, 28_u8..=32)
            .prop_map(|(low, length)| Prefix::new([10, 0, 0, low].into(), length).unwrap())
    }

    proptest! {
        #[test]
        fn the_same_is_covered(all in proptest::collection::btree_set((any_net(), any_net()), 0..12)) {
            let fewer = pairs(all.clone());
            prop_assert!(fewer.len() <= all.len());
            let host = |low| Prefix::host(IpAddr::V4(Ipv4Addr::new(10, 0, 0, low)));
            let covers = |set: &BTreeSet<(Prefix, Prefix)>, a, b| {
                set.iter().any(|(from, to)| from.covers(&host(a)) && to.covers(&host(b)))
            };
            for (a, b) in (0..16).flat_map(|a| (0..16).map(move |b| (a, b))) {
                prop_assert_eq!(covers(&fewer, a, b), covers(&all, a, b), "{} to {}", a, b);
            }
        }
    }

    #[test]
    fn neighbours_become_one_and_never_everything() {
        let of = |texts: &[&str]| union(texts.iter().map(|text| net(text)).collect());
        assert_eq!(of(&["10.0.0.0/25", "10.0.0.128/25", "10.0.1.0/24"]), [net("10.0.0.0/23")]);
        assert_eq!(of(&["10.0.0.0/24", "10.0.0.7/32"]), [net("10.0.0.0/24")]);
        assert_eq!(of(&["10.0.1.0/24", "10.0.2.0/24"]).len(), 2, "no halves of one network");
        assert_eq!(of(&["0.0.0.0/1", "128.0.0.0/1"]).len(), 2);
        assert_eq!(of(&["::/1", "8000::/1", "0.0.0.0/1"]).len(), 3);
    }

    #[test]
    fn ten_thousand_branches_side_by_side_are_few() {
        let branch =
            |n: u32| Prefix::new(Ipv4Addr::from_bits(0x0a40_0000 + n * 256).into(), 24).unwrap();
        for turned in [false, true] {
            let here = net("10.1.0.0/24");
            let all = (0..10_000).map(branch).map(|b| if turned { (b, here) } else { (here, b) });
            assert!(pairs(all.collect()).len() < 8);
        }
    }
}

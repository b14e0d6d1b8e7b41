//! Children that lay claim to the same packets: which one carries a packet is then our choice on our side and the peer's
//! on theirs.
//!
//! Ten thousand children make fifty million pairs, and a look at each would delay the start; so only those are compared
//! whose networks meet on one side, which a walk over the sorted ranges of that side finds.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ike::config::ChildConfig;
use wire::ts::TrafficSelector;

use super::{ConnectionParts, Notes, Parts, path};

/// Pairs that are compared at most. There are more only where thousands overlap: the first of them are told.
const COMPARED: usize = 1 << 21;

/// From the first address to the last, and whose.
type Range = (IpAddr, IpAddr, usize);

pub(super) fn find(parts: &Parts, notes: &mut Notes) {
    let all: Vec<(&ConnectionParts, &ChildConfig)> =
        parts.connections.iter().flat_map(|c| c.ike.children.iter().map(move |k| (c, k))).collect();
    let ranges = |of: fn(&ChildConfig) -> &[TrafficSelector]| -> Vec<Range> {
        let each = |(at, (_, child)): (usize, &(_, &ChildConfig))| {
            let list: Vec<Range> =
                of(child).iter().map(|ts| (ts.addrs().first(), ts.addrs().last(), at)).collect();
            list
        };
        all.iter().enumerate().flat_map(each).collect()
    };
    let meet = |a: &[TrafficSelector], b: &[TrafficSelector]| {
        a.iter().find_map(|x| b.iter().find_map(|y| x.intersect(y)))
    };
    let sides = [ranges(|child| &child.local_ts), ranges(|child| &child.remote_ts)];
    for (later, earlier) in neighbours(sides) {
        let (Some((connection, child)), Some((other_connection, other))) =
            (all.get(later), all.get(earlier))
        else {
            continue;
        };
        let local = meet(&child.local_ts, &other.local_ts);
        let remote = meet(&child.remote_ts, &other.remote_ts);
        if let (Some(local), Some(remote)) = (local, remote) {
            notes.warn(
                format!("{}.remote_ts", path(connection, &format!("children.{}", child.name))),
                format!(
                    "`{}.{}` and `{}.{}` both cover traffic between {local} and {remote}",
                    other_connection.ike.name, other.name, connection.ike.name, child.name
                ),
                "better selectors that do not overlap",
                "which of the two then carries a packet is not defined",
            );
        }
    }
}

/// Pairs that meet on one side, the later one first. The side with more different networks is looked at.
fn neighbours([local, remote]: [Vec<Range>; 2]) -> BTreeSet<(usize, usize)> {
    let different = |ranges: &[Range]| {
        ranges.iter().map(|(first, last, _)| (first, last)).collect::<BTreeSet<_>>().len()
    };
    let mut ranges = if different(&local) > different(&remote) { local } else { remote };
    ranges.sort_unstable();
    let (mut pairs, mut compared) = (BTreeSet::new(), 0);
    let mut open: Vec<(IpAddr, usize)> = Vec::new();
    for (first, last, at) in ranges {
        open.retain(|(end, _)| *end >= first);
        compared += open.len();
        if compared > COMPARED {
            break;
        }
        let others = open.iter().map(|(_, other)| *other).filter(|other| *other != at);
        pairs.extend(others.map(|other| (at.max(other), at.min(other))));
        open.push((last, at));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(a: u8, b: u8, at: usize) -> Range {
        ([10, 0, 0, a.min(b)].into(), [10, 0, 0, a.max(b)].into(), at)
    }

    proptest! {
        #[test]
        fn all_that_meet_on_both_sides_are_among_them(
            ends in proptest::collection::vec((0_u8..50, 0_u8..50, 0_u8..50, 0_u8..50), 0..30),
        ) {
            let of = |side: usize| -> Vec<Range> {
                let pick = |(at, (a, b, c, d)): (usize, &(u8, u8, u8, u8))| match side {
                    0 => range(*a, *b, at),
                    _ => range(*c, *d, at),
                };
                ends.iter().enumerate().map(pick).collect()
            };
            let found = neighbours([of(0), of(1)]);
            let meet = |x: &Range, y: &Range| x.0 <= y.1 && y.0 <= x.1;
            for (later, earlier) in (0..ends.len()).flat_map(|i| (0..i).map(move |j| (i, j))) {
                let both = [0, 1].iter().all(|side| meet(&of(*side)[later], &of(*side)[earlier]));
                prop_assert!(!both || found.contains(&(later, earlier)), "{later} and {earlier}");
            }
        }
    }

    #[test]
    fn ten_thousand_apart_are_not_compared() {
        let all = range(0, 255, 0);
        let apart = |at: usize| {
            (IpAddr::from((at as u32).to_be_bytes()), IpAddr::from((at as u32).to_be_bytes()), at)
        };
        for swapped in [false, true] {
            let mut sides = [
                (0..10_000).map(|at| (all.0, all.1, at)).collect(),
                (0..10_000).map(apart).collect(),
            ];
            if swapped {
                sides.reverse();
            }
            assert!(neighbours(sides).is_empty());
        }
        // Where all meet, the work has an end.
        let all = |at| (all.0, all.1, at);
        assert!(
            neighbours([(0..10_000).map(all).collect(), (0..10_000).map(all).collect()]).len()
                <= COMPARED
        );
    }
}

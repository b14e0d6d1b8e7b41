//! Things behind pairs of address ranges, found by the two addresses of a
//! packet: what is most specific first, and without a walk over all of them.
//!
//! ```text
//!   shapes, small to large:  (remote /32, local /24)  ─► networks: (10.2.0.7, 10.1.0.0) ─► [T]
//!                            (remote /24, local /24)  ─►           (10.3.1.0, 10.1.0.0) ─► [T, T]
//!                            (…, …)                   ─► ranges:   those that are no networks
//! ```
//! A packet has at most one pair of networks of each shape, and there are few
//! shapes, however many pairs there are. A range that is no network is rare,
//! and found by looking at each of its shape.

use core::net::IpAddr;
use std::collections::BTreeMap;

use wire::ts::AddrRange;

/// How many addresses beyond the first a pair of ranges has: small is specific,
/// and the remote side counts first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    remote: u128,
    local: u128,
    ipv4: bool,
}

/// The first addresses of a pair of networks: remote, local.
type Networks = (u128, u128);

#[derive(Debug)]
struct Places<T> {
    networks: BTreeMap<Networks, Vec<T>>,
    ranges: Vec<T>,
}

#[derive(Debug)]
pub(crate) struct Index<T> {
    shapes: BTreeMap<Shape, Places<T>>,
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// The shape of a pair, and its place if both are networks.
fn place(local: &AddrRange, remote: &AddrRange) -> (Shape, Option<Networks>) {
    let span = |range: &AddrRange| bits(range.last()).saturating_sub(bits(range.first()));
    let shape = Shape {
        remote: span(remote),
        local: span(local),
        ipv4: local.is_ipv4() && remote.is_ipv4(),
    };
    let is_network = |first: u128, span: u128| (span & span.wrapping_add(1) | first & span) == 0;
    let (of_remote, of_local) = (bits(remote.first()), bits(local.first()));
    let both = local.is_ipv4() == remote.is_ipv4()
        && is_network(of_remote, shape.remote)
        && is_network(of_local, shape.local);
    (shape, both.then_some((of_remote, of_local)))
}

impl<T> Index<T> {
    pub(crate) fn new() -> Self {
        Self { shapes: BTreeMap::new() }
    }

    pub(crate) fn insert(&mut self, local: &AddrRange, remote: &AddrRange, value: T) {
        let (shape, networks) = place(local, remote);
        let empty = || Places { networks: BTreeMap::new(), ranges: Vec::new() };
        let places = self.shapes.entry(shape).or_insert_with(empty);
        match networks {
            // Most have one alone.
            Some(networks) => {
                places
                    .networks
                    .entry(networks)
                    .or_insert_with(|| Vec::with_capacity(1))
                    .push(value);
            }
            None => places.ranges.push(value),
        }
    }

    /// Takes those out that `goes` names.
    pub(crate) fn remove(
        &mut self,
        local: &AddrRange,
        remote: &AddrRange,
        goes: impl Fn(&T) -> bool,
    ) {
        let (shape, networks) = place(local, remote);
        let Some(places) = self.shapes.get_mut(&shape) else { return };
        match networks {
            Some(networks) => {
                if let Some(there) = places.networks.get_mut(&networks) {
                    there.retain(|value| !goes(value));
                    if there.is_empty() {
                        places.networks.remove(&networks);
                    }
                }
            }
            None => places.ranges.retain(|value| !goes(value)),
        }
        if places.networks.is_empty() && places.ranges.is_empty() {
            self.shapes.remove(&shape);
        }
    }

    /// By rising shape, what may be behind a packet from our side's `src` to the
    /// peer's side's `dst`. Whether a range holds the address is the caller's to
    /// ask.
    pub(crate) fn at(
        &self,
        src: IpAddr,
        dst: IpAddr,
    ) -> impl Iterator<Item = impl Iterator<Item = &T> + Clone> + Clone {
        let (ipv4, src, dst) = (src.is_ipv4(), bits(src), bits(dst));
        self.shapes.iter().filter(move |(shape, _)| shape.ipv4 == ipv4).map(
            move |(shape, places)| {
                let key = (dst & !shape.remote, src & !shape.local);
                let there = places.networks.get(&key).map_or(&[][..], Vec::as_slice);
                there.iter().chain(&places.ranges)
            },
        )
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.shapes
            .values_mut()
            .flat_map(|places| places.networks.values_mut().flatten().chain(&mut places.ranges))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;
    use proptest::prelude::*;

    /// Addresses close together, so that ranges meet.
    fn any_address(v4: bool) -> impl Strategy<Value = IpAddr> {
        (0_u8..64).prop_map(move |low| match v4 {
            true => Ipv4Addr::new(10, 1, 0, low).into(),
            false => IpAddr::from([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, low]),
        })
    }

    fn any_range() -> impl Strategy<Value = AddrRange> {
        any::<bool>().prop_flat_map(|v4| {
            let network = (any_address(v4), 0_u32..6).prop_map(|(address, size)| {
                let (first, last) =
                    (bits(address) >> size << size, bits(address) | ((1 << size) - 1));
                let of = |bits: u128| match address {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
                    IpAddr::V6(_) => IpAddr::V6(bits.into()),
                };
                AddrRange::new(of(first), of(last)).unwrap()
            });
            let range = (any_address(v4), any_address(v4))
                .prop_map(|(a, b)| AddrRange::new(a.min(b), a.max(b)).unwrap());
            prop_oneof![4 => network, 1 => range]
        })
    }

    proptest! {
        #[test]
        fn finds_what_a_walk_over_all_finds(
            pairs in proptest::collection::vec((any_range(), any_range()), 0..40),
            gone in proptest::collection::vec(any::<proptest::sample::Index>(), 0..10),
            // A packet is of one family, whatever a pair may be.
            (src, dst) in any::<bool>().prop_flat_map(|v4| (any_address(v4), any_address(v4))),
        ) {
            let mut index = Index::new();
            let mut all: Vec<_> = pairs.iter().copied().enumerate().collect();
            for (n, (local, remote)) in &all {
                index.insert(local, remote, *n);
            }
            for gone in gone.iter().filter(|_| !all.is_empty()).collect::<Vec<_>>() {
                if all.is_empty() {
                    break;
                }
                let (n, (local, remote)) = all.remove(gone.index(all.len()));
                index.remove(&local, &remote, |value| *value == n);
            }
            let covers = |n: &usize| pairs[*n].0.matches(src) && pairs[*n].1.matches(dst);
            let mut walked: Vec<usize> = all.iter().map(|(n, _)| *n).filter(covers).collect();
            let span = |range: &AddrRange| bits(range.last()) - bits(range.first());
            let shape = |n: &usize| (span(&pairs[*n].1), span(&pairs[*n].0));
            walked.sort_by_key(|n| (shape(n), *n));
            let mut found = Vec::new();
            for same_shape in index.at(src, dst) {
                let mut these: Vec<usize> = same_shape.copied().filter(covers).collect();
                these.sort_unstable();
                found.extend(these);
            }
            prop_assert_eq!(found, walked);
            // What is taken out leaves nothing behind.
            for (n, (local, remote)) in all {
                index.remove(&local, &remote, |value| *value == n);
            }
            prop_assert!(index.shapes.is_empty());
        }
    }

    #[test]
    fn a_packet_looks_at_few_of_many() {
        let local = AddrRange::new([10, 1, 0, 0].into(), [10, 1, 0, 255].into()).unwrap();
        let mut index = Index::new();
        for n in 0..10_000_u32 {
            let first = 0x0a40_0000 + n * 256;
            let of = |bits: u32| IpAddr::V4(Ipv4Addr::from_bits(bits));
            index.insert(&local, &AddrRange::new(of(first), of(first + 255)).unwrap(), n);
        }
        let seen: Vec<u32> =
            index.at([10, 1, 0, 9].into(), [10, 64, 3, 7].into()).flatten().copied().collect();
        assert_eq!(seen, [3]);
    }
}

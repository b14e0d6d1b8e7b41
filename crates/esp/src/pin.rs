//! Pins: which of a connection's live tunnels a flow takes.
//!
//! Weighted rendezvous hashing (highest random weight): each tunnel draws a lot for each flow, and
//! the best lot wins. Nothing is stored, so both instances agree without a word; when a tunnel goes,
//! only its flows move, and when one comes, flows move to it alone (invariant 6).
//!
//! ```text
//!   lot(flow, tunnel) = −log2(u) / weight      u: hash of flow and tunnel, uniform in (0, 1)
//! ```
//! The smallest lot wins: the minimum of exponentials with rates `weight` falls on each in
//! proportion to its rate. All in integers, so that every machine draws the same.
//!
//! A flow is hashed without direction and a tunnel by the unordered pair of its configured outer
//! addresses, so two gateways that face each other choose alike. Whoever can choose ports can choose
//! tunnels; that spoils a balance, not a secret.

use core::net::IpAddr;

use wire::ip::Flow;

/// A tunnel as pins know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Names the tunnel: see [`Pin::of`].
    pub id: u64,
    /// Its share among the tunnels of its connection: at least 1.
    pub weight: u32,
}

impl Pin {
    /// The pin of a tunnel between two outer addresses, as configured on both sides: what NAT or
    /// mobility makes of them does not count.
    #[must_use]
    pub fn of(one: IpAddr, other: IpAddr, weight: u32) -> Pin {
        let (low, high) = if one <= other { (one, other) } else { (other, one) };
        Pin { id: address(address(0, low), high), weight: weight.max(1) }
    }

    /// The lot this tunnel draws for a flow; the smallest wins.
    #[must_use]
    pub(crate) fn draw(self, flow: u64) -> Lot {
        Lot { cost: cost(mix(flow ^ mix(self.id))), pin: self }
    }
}

/// What a tunnel drew.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lot {
    /// −log2(u) in units of 2^-32; at most 65 << 32.
    cost: u64,
    pin: Pin,
}

impl Lot {
    /// Whether this lot wins over another: `cost / weight`, the smaller id where equal.
    pub(crate) fn beats(&self, other: &Lot) -> bool {
        let ours = u128::from(self.cost) * u128::from(other.pin.weight);
        let theirs = u128::from(other.cost) * u128::from(self.pin.weight);
        (ours, self.pin.id) < (theirs, other.pin.id)
    }
}

/// The hash of a flow, the same for both directions.
#[must_use]
pub fn flow_hash(flow: &Flow) -> u64 {
    let (src, dst) = ((flow.src, flow.ports.0), (flow.dst, flow.ports.1));
    let (low, high) = if src <= dst { (src, dst) } else { (dst, src) };
    let hash = address(address(u64::from(flow.protocol), low.0), high.0);
    mix(hash ^ ((u64::from(low.1) << 16) | u64::from(high.1)))
}

fn address(hash: u64, address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(v4) => mix(hash ^ u64::from(v4.to_bits())),
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            mix(mix(hash ^ (bits >> 64) as u64) ^ bits as u64)
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every
/// bit of the argument.
const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// −log2(u / 2^64) in units of 2^-32, rounded up to 2^-24 of one: whole part by counting zeros, each
/// further bit by squaring the mantissa.
fn cost(u: u64) -> u64 {
    let u = u.max(1);
    let zeros = u.leading_zeros();
    // 1.xxx with the point after the highest bit.
    let mut mantissa = u << zeros;
    let mut fraction = 0_u64;
    for bit in (8..32).rev() {
        let square = (u128::from(mantissa) * u128::from(mantissa)) >> 63;
        if square >> 64 != 0 {
            fraction |= 1 << bit;
            mantissa = (square >> 1) as u64;
        } else {
            mantissa = square as u64;
        }
    }
    (u64::from(zeros + 1) << 32) - fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tunnel(n: u8, weight: u32) -> Pin {
        Pin::of([198, 51, 100, n].into(), [203, 0, 113, 7].into(), weight)
    }

    fn choose(flow: &Flow, tunnels: &[Pin]) -> Pin {
        let hash = flow_hash(flow);
        let lots = tunnels.iter().map(|pin| pin.draw(hash));
        lots.reduce(|best, lot| if lot.beats(&best) { lot } else { best }).unwrap().pin
    }

    fn flow(n: u32) -> Flow {
        Flow {
            src: [10, 1, (n >> 8) as u8, n as u8].into(),
            dst: [10, 2, 0, 5].into(),
            protocol: 6,
            ports: (32_768 + (n % 4096) as u16, 443),
        }
    }

    #[test]
    fn logarithms_are_right() {
        for (u, log) in [(1 << 63, 1.0), (3 << 62, 0.415_037_499_3), (1 << 32, 32.0), (1, 64.0)] {
            let found = cost(u) as f64 / (1_u64 << 32) as f64;
            assert!((found - log).abs() < 1e-6, "{u}: {found}, not {log}");
        }
        assert!(cost(u64::MAX) < 1 << 10);
        assert_eq!(cost(0), cost(1));
    }

    #[test]
    fn shares_follow_the_weights() {
        for weights in [vec![1, 1], vec![1, 3], vec![5, 1, 2, 2]] {
            let tunnels: Vec<_> = weights.iter().zip(1..).map(|(w, n)| tunnel(n, *w)).collect();
            let total: u32 = weights.iter().sum();
            let flows = 100_000;
            for pin in &tunnels {
                let chosen = (0..flows).filter(|n| choose(&flow(*n), &tunnels) == *pin).count();
                let share = chosen as f64 / f64::from(flows);
                let fair = f64::from(pin.weight) / f64::from(total);
                // Five standard deviations.
                let allowed = 5.0 * (fair * (1.0 - fair) / f64::from(flows)).sqrt();
                assert!((share - fair).abs() < allowed, "{weights:?}: {share} instead of {fair}");
            }
        }
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(IpAddr::from),
            any::<[u8; 16]>().prop_map(IpAddr::from)
        ]
    }

    prop_compose! {
        fn any_flow()(src in any_address(), dst in any_address(), protocol: u8, ports: (u16, u16)) -> Flow {
            Flow { src, dst, protocol, ports }
        }
    }

    prop_compose! {
        fn any_tunnels()(weights in proptest::collection::vec(1_u32..100, 2..8)) -> Vec<Pin> {
            weights.iter().zip(1..).map(|(weight, n)| tunnel(n, *weight)).collect()
        }
    }

    proptest! {
        #[test]
        fn both_directions_and_both_sides_choose_alike(flow in any_flow(), tunnels in any_tunnels()) {
            let back = Flow {
                src: flow.dst,
                dst: flow.src,
                ports: (flow.ports.1, flow.ports.0),
                ..flow
            };
            prop_assert_eq!(choose(&flow, &tunnels), choose(&back, &tunnels));
            // The order in which tunnels are asked does not matter, nor which end is ours.
            let turned: Vec<_> = tunnels.iter().rev().copied().collect();
            prop_assert_eq!(choose(&flow, &tunnels), choose(&flow, &turned));
            let (a, b): (IpAddr, IpAddr) = ([192, 0, 2, 1].into(), [192, 0, 2, 9].into());
            prop_assert_eq!(Pin::of(a, b, 3), Pin::of(b, a, 3));
        }

        #[test]
        fn only_flows_of_a_lost_tunnel_move(flow in any_flow(), tunnels in any_tunnels(), lost: usize) {
            let lost = lost % tunnels.len();
            let mut left = tunnels.clone();
            left.remove(lost);
            let before = choose(&flow, &tunnels);
            let after = choose(&flow, &left);
            // Read backwards: when a tunnel comes, flows move to it alone.
            prop_assert!(after == before || before == tunnels[lost]);
        }
    }
}

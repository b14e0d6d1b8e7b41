//! Congestion marks across the tunnel (RFC 6040).

use wire::ip::Ecn;

/// RFC 6040 §4.2, figure 4: what the inner header's field becomes when the
/// packet leaves the tunnel. `None`: it must be dropped.
pub(crate) const fn decapsulate(inner: Ecn, outer: Ecn) -> Option<Ecn> {
    match (inner, outer) {
        (Ecn::NotEct, Ecn::Ce) => None,
        (Ecn::NotEct, _) => Some(Ecn::NotEct),
        (Ecn::Ect0, Ecn::Ect1) => Some(Ecn::Ect1),
        (Ecn::Ect0 | Ecn::Ect1, Ecn::Ce) => Some(Ecn::Ce),
        (inner, _) => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::ip::Ecn::{Ce, Ect0, Ect1, NotEct};

    // RFC 6040 §4.2, figure 4, row by row.
    #[test]
    fn figure_4() {
        let outer = [NotEct, Ect0, Ect1, Ce];
        let rows = [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce); 4]),
        ];
        for (inner, want) in rows {
            assert_eq!(outer.map(|outer| decapsulate(inner, outer)), want, "{inner:?}");
        }
    }
}

//! Stateless cookies (RFC 7296 §2.6), demanded while many SAs are half-open.
//!
//! A cookie is version ‖ time ‖ SHA-256(secret ‖ Ni ‖ IPi ‖ port ‖ SPIi ‖ time).
//! The secret is drawn when first needed and replaced every
//! `cookie_rotation`; the one before stays good for `cookie_lifetime`. It is
//! not replicated: after a takeover the peer is asked for a new cookie.

use core::{net::SocketAddr, time::Duration};

use crypto::{Rng, Secret, ct_eq, hash::sha256};
use wire::id::IkeSpi;

use crate::config::Limits;

#[derive(Debug)]
struct Epoch {
    version: u8,
    secret: Secret,
    since: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct Cookies {
    current: Option<Epoch>,
    previous: Option<Epoch>,
}

/// What the cookie binds.
#[derive(Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) nonce: &'a [u8],
    pub(crate) from: SocketAddr,
    pub(crate) spi: IkeSpi,
}

impl Epoch {
    fn cookie(&self, claim: &Claim<'_>, at_ms: u64) -> Vec<u8> {
        let time = at_ms.to_be_bytes();
        let source = claim.from.to_string();
        let hash = sha256(&[
            self.secret.expose(),
            claim.nonce,
            source.as_bytes(),
            &claim.spi.to_bytes(),
            &time,
        ]);
        [&[self.version][..], &time, &hash].concat()
    }
}

fn millis(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(u64::MAX)
}

impl Cookies {
    /// A fresh cookie: 41 bytes.
    pub(crate) fn make(
        &mut self,
        claim: &Claim<'_>,
        now: Duration,
        limits: &Limits,
        rng: &mut dyn Rng,
    ) -> Vec<u8> {
        let stale = self
            .current
            .as_ref()
            .is_none_or(|epoch| now.saturating_sub(epoch.since) >= limits.cookie_rotation);
        if stale {
            let version = self.current.as_ref().map_or(0, |epoch| epoch.version.wrapping_add(1));
            self.previous = self.current.take();
            self.current = Some(Epoch { version, secret: Secret::random(32, rng), since: now });
        }
        self.current.as_ref().map(|epoch| epoch.cookie(claim, millis(now))).unwrap_or_default()
    }

    /// Whether we made `cookie` for this claim, and lately.
    pub(crate) fn check(
        &self,
        cookie: &[u8],
        claim: &Claim<'_>,
        now: Duration,
        limits: &Limits,
    ) -> bool {
        let Some((&version, rest)) = cookie.split_first() else { return false };
        let Some((time, _)) = rest.split_first_chunk::<8>() else { return false };
        let made = u64::from_be_bytes(*time);
        let now_ms = millis(now);
        if made > now_ms || now_ms - made > millis(limits.cookie_lifetime) {
            return false;
        }
        [&self.current, &self.previous]
            .into_iter()
            .flatten()
            .any(|epoch| epoch.version == version && ct_eq(&epoch.cookie(claim, made), cookie))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_good_for_its_claim_and_time_only() {
        let limits = Limits::default();
        let mut rng = crate::tests::rng(1);
        let mut cookies = Cookies::default();
        let from = "192.0.2.1:500".parse().unwrap();
        let claim = Claim { nonce: b"nonce of the initiator", from, spi: IkeSpi(7) };
        let t = Duration::from_secs(1000);
        let cookie = cookies.make(&claim, t, &limits, &mut rng);
        assert!(cookies.check(&cookie, &claim, t + Duration::from_secs(10), &limits));
        assert!(!cookies.check(&cookie, &claim, t + Duration::from_millis(10_001), &limits));
        assert!(!cookies.check(&cookie, &Claim { spi: IkeSpi(8), ..claim }, t, &limits));
        assert!(!cookies.check(&cookie, &Claim { nonce: b"other", ..claim }, t, &limits));
        let elsewhere = "192.0.2.2:500".parse().unwrap();
        assert!(!cookies.check(&cookie, &Claim { from: elsewhere, ..claim }, t, &limits));
        for n in 0..cookie.len() {
            let mut bad = cookie.clone();
            bad[n] ^= 1;
            assert!(!cookies.check(&bad, &claim, t, &limits));
            assert!(!cookies.check(&cookie[..n], &claim, t, &limits));
        }
        // RFC 7296 §2.6: a cookie made just before a rotation stays good for a
        // short time after it.
        let late = t + limits.cookie_rotation - Duration::from_secs(1);
        let before = cookies.make(&claim, late, &limits, &mut rng);
        let after = late + Duration::from_secs(2);
        let new = cookies.make(&claim, after, &limits, &mut rng);
        assert_ne!(before[0], new[0]);
        assert!(cookies.check(&before, &claim, after, &limits));
        assert!(cookies.check(&new, &claim, after, &limits));
        assert!(!cookies.check(&[], &claim, t, &limits));
    }
}

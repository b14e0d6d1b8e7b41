//! The key schedule of IKEv2 as a chain of types (RFC 7296 §2.13–2.18):
//!
//! ```text
//!  nonces, DH ──► Skeyseed ──► IkeKeys ──► ChildKeys (KEYMAT of one Child SA)
//!                     ▲   └──► AuthKeys ─► AUTH payloads
//!                     └── SK_d of the IKE SA being rekeyed
//! ```
//!
//! A key cannot be asked for before what it is derived from exists. Secrets are
//! wiped on drop and print as `…`. State values are cloned for every step
//! (see [`crate::state`]); the secrets in them are shared, not copied.

use core::fmt;
use std::sync::Arc;

use crypto::{
    Secret,
    aead::AeadAlg,
    prf::{PrfAlg, prf, prf_plus},
};
use wire::id::IkeSpi;

/// A secret that several state values share: cloning adds an owner, not a copy
/// of the bytes. Wiped when the last owner is gone.
#[derive(Clone)]
pub(crate) struct Key(Arc<Secret>);

impl Key {
    pub(crate) fn new(secret: Secret) -> Self {
        Self(Arc::new(secret))
    }

    pub(crate) fn expose(&self) -> &[u8] {
        self.0.expose()
    }

    pub(crate) fn duplicate(&self) -> Secret {
        self.0.duplicate()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0)
    }
}

/// Nonces and SPIs of the exchange that keys come from.
#[derive(Clone, Copy)]
pub(crate) struct Exchange<'a> {
    pub(crate) ni: &'a [u8],
    pub(crate) nr: &'a [u8],
    pub(crate) spi_i: IkeSpi,
    pub(crate) spi_r: IkeSpi,
}

/// SKEYSEED.
pub(crate) struct Skeyseed(Secret);

impl Skeyseed {
    /// RFC 7296 §2.14: SKEYSEED = prf(Ni | Nr, g^ir).
    pub(crate) fn initial(alg: PrfAlg, x: &Exchange<'_>, shared: &Secret) -> Self {
        let nonces = [x.ni, x.nr].concat();
        Self(prf(alg, &nonces, &[shared.expose()]))
    }

    /// RFC 7296 §2.18: SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr), with
    /// the PRF of the old IKE SA.
    pub(crate) fn rekeyed(old: &IkeKeys, x: &Exchange<'_>, shared: &Secret) -> Self {
        Self(prf(old.prf, old.sk_d.expose(), &[shared.expose(), x.ni, x.nr]))
    }

    /// RFC 7296 §2.14: {SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr}
    /// = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr). With an AEAD SK_a is empty
    /// (RFC 5282 §7), and SK_e carries the salt at its end.
    pub(crate) fn expand(
        self,
        alg: PrfAlg,
        aead: AeadAlg,
        x: &Exchange<'_>,
    ) -> Result<(IkeKeys, AuthKeys), crypto::Error> {
        let (d, e) = (alg.len(), aead.keymat_len());
        let seed = [x.ni, x.nr, &x.spi_i.to_bytes(), &x.spi_r.to_bytes()];
        let all = prf_plus(alg, self.0.expose(), &seed, 3 * d + 2 * e)?;
        let mut rest = all.expose();
        let mut take = |len: usize| {
            let (head, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            rest = tail;
            Key::new(Secret::from_slice(head))
        };
        let (sk_d, sk_ei, sk_er, sk_pi, sk_pr) = (take(d), take(e), take(e), take(d), take(d));
        Ok((IkeKeys { aead, prf: alg, sk_d, sk_ei, sk_er }, AuthKeys { prf: alg, sk_pi, sk_pr }))
    }
}

/// What an IKE SA needs for its life: SK_d, SK_ei, SK_er.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct IkeKeys {
    pub(crate) aead: AeadAlg,
    pub(crate) prf: PrfAlg,
    pub(crate) sk_d: Key,
    pub(crate) sk_ei: Key,
    pub(crate) sk_er: Key,
}

impl IkeKeys {
    /// The key we seal with: SK_ei of the original initiator.
    pub(crate) fn outbound(&self, we_initiated: bool) -> &Key {
        if we_initiated { &self.sk_ei } else { &self.sk_er }
    }

    /// The key the peer seals with.
    pub(crate) fn inbound(&self, we_initiated: bool) -> &Key {
        self.outbound(!we_initiated)
    }

    /// RFC 7296 §2.17: KEYMAT = prf+(SK_d, [g^ir (new) |] Ni | Nr), first the
    /// key from the initiator of the exchange to its responder.
    pub(crate) fn child(
        &self,
        aead: AeadAlg,
        shared: Option<&Secret>,
        ni: &[u8],
        nr: &[u8],
    ) -> Result<ChildKeys, crypto::Error> {
        let len = aead.keymat_len();
        let seed = [shared.map_or(&[][..], Secret::expose), ni, nr];
        let all = prf_plus(self.prf, self.sk_d.expose(), &seed, 2 * len)?;
        let (first, second) = all.expose().split_at_checked(len).unwrap_or((&[], &[]));
        Ok(ChildKeys {
            to_responder: Key::new(Secret::from_slice(first)),
            to_initiator: Key::new(Secret::from_slice(second)),
        })
    }
}

/// KEYMAT of one Child SA, key ‖ salt per direction. "Initiator" is who sent
/// the request of the exchange that made it.
pub(crate) struct ChildKeys {
    pub(crate) to_responder: Key,
    pub(crate) to_initiator: Key,
}

/// SK_pi and SK_pr, needed until both sides are authenticated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AuthKeys {
    pub(crate) prf: PrfAlg,
    pub(crate) sk_pi: Key,
    pub(crate) sk_pr: Key,
}

/// One side's half of an IKE_SA_INIT exchange, as AUTH signs it.
pub(crate) struct Signed<'a> {
    /// The side's first complete message.
    pub(crate) message: &'a [u8],
    /// The other side's nonce.
    pub(crate) nonce: &'a [u8],
    /// The side's ID payload without its generic header.
    pub(crate) id_body: &'a [u8],
}

impl AuthKeys {
    /// RFC 7296 §2.15: AUTH = prf(prf(PSK, "Key Pad for IKEv2"),
    /// RealMessage | Nonce | prf(SK_p, IDbody)).
    pub(crate) fn psk_auth(&self, psk: &Secret, by_initiator: bool, x: &Signed<'_>) -> Secret {
        let sk_p = if by_initiator { &self.sk_pi } else { &self.sk_pr };
        let maced_id = prf(self.prf, sk_p.expose(), &[x.id_body]);
        let pad = prf(self.prf, psk.expose(), &[b"Key Pad for IKEv2"]);
        prf(self.prf, pad.expose(), &[x.message, x.nonce, maced_id.expose()])
    }
}

//! Diffie-Hellman groups whose ephemeral secrets can be serialised, because a
//! half-open exchange is replicated to the other instance (ha.md).
//!
//! X25519 is RFC 8031, P-256 and P-384 are RFC 5903. A peer's value that has
//! the wrong length, is not on the curve, or yields an all-zero secret is
//! refused (security.md, statement 6).

use p256::elliptic_curve::sec1::ToEncodedPoint;
use zeroize::Zeroizing;

use crate::{Error, Rng, Secret};

/// A key exchange group that IKE can negotiate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Curve25519 (RFC 8031).
    X25519,
    /// 256-bit random ECP group (RFC 5903).
    P256,
    /// 384-bit random ECP group (RFC 5903).
    P384,
}

impl Group {
    /// All of them, most preferred first.
    pub const ALL: [Self; 3] = [Self::X25519, Self::P256, Self::P384];

    /// Transform id, type 4, and the group number of the KE payload.
    #[must_use]
    pub const fn transform_id(self) -> u16 {
        match self {
            Self::P256 => 19,
            Self::P384 => 20,
            Self::X25519 => 31,
        }
    }

    /// The group of a transform id, if it has an implementation here.
    #[must_use]
    pub fn from_transform_id(id: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|group| group.transform_id() == id)
    }

    /// Length in bytes of the value in a KE payload: RFC 8031 §3.1 (32),
    /// RFC 5903 §7 (x ‖ y: 64, 96).
    #[must_use]
    pub const fn public_len(self) -> usize {
        match self {
            Self::X25519 => 32,
            Self::P256 => 64,
            Self::P384 => 96,
        }
    }

    /// Length in bytes of the shared secret, and of a serialised private key.
    #[must_use]
    pub const fn secret_len(self) -> usize {
        match self {
            Self::X25519 | Self::P256 => 32,
            Self::P384 => 48,
        }
    }
}

/// One side's ephemeral key pair. The private part is wiped on drop.
pub struct Ephemeral(Inner);

enum Inner {
    X25519(x25519_dalek::StaticSecret),
    P256(p256::SecretKey),
    P384(p384::SecretKey),
}

impl core::fmt::Debug for Ephemeral {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Ephemeral({:?}, …)", self.group())
    }
}

impl Ephemeral {
    /// Draws a fresh key pair.
    pub fn generate(group: Group, rng: &mut dyn Rng) -> Self {
        let mut rng = rng;
        Self(match group {
            Group::X25519 => Inner::X25519(x25519_dalek::StaticSecret::random_from_rng(rng)),
            Group::P256 => Inner::P256(p256::SecretKey::random(&mut rng)),
            Group::P384 => Inner::P384(p384::SecretKey::random(&mut rng)),
        })
    }

    /// Which group the key belongs to.
    #[must_use]
    pub const fn group(&self) -> Group {
        match self.0 {
            Inner::X25519(_) => Group::X25519,
            Inner::P256(_) => Group::P256,
            Inner::P384(_) => Group::P384,
        }
    }

    /// The value for the KE payload, [`Group::public_len`] bytes.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        match &self.0 {
            Inner::X25519(secret) => x25519_dalek::PublicKey::from(secret).to_bytes().to_vec(),
            // RFC 5903 §7: x ‖ y, without the 0x04 that SEC1 puts in front.
            Inner::P256(secret) => secret
                .public_key()
                .to_encoded_point(false)
                .as_bytes()
                .iter()
                .skip(1)
                .copied()
                .collect(),
            Inner::P384(secret) => secret
                .public_key()
                .to_encoded_point(false)
                .as_bytes()
                .iter()
                .skip(1)
                .copied()
                .collect(),
        }
    }

    /// The shared secret with the peer's KE value, [`Group::secret_len`] bytes.
    ///
    /// # Errors
    /// [`Error::BadPublicValue`] if the value has the wrong length, is not a
    /// point of the curve, or the secret is all zero.
    pub fn agree(&self, peer: &[u8]) -> Result<Secret, Error> {
        if peer.len() != self.group().public_len() {
            return Err(Error::BadPublicValue);
        }
        match &self.0 {
            Inner::X25519(secret) => {
                let peer: [u8; 32] = peer.try_into().map_err(|_| Error::BadPublicValue)?;
                let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(peer));
                // RFC 8031 §3.1 takes RFC 7748's check: a point of small order
                // gives zero whatever our secret is, so it must not be used.
                if !shared.was_contributory() {
                    return Err(Error::BadPublicValue);
                }
                Ok(Secret::from_slice(shared.as_bytes()))
            }
            // RFC 5903 §7: the secret is the x coordinate alone. The point at
            // infinity has no 0x04 form, and both curves have prime order, so
            // that a point on the curve is always of full order.
            Inner::P256(secret) => {
                let point = uncompressed::<65>(peer)?;
                let peer =
                    p256::PublicKey::from_sec1_bytes(&point).map_err(|_| Error::BadPublicValue)?;
                let shared =
                    p256::ecdh::diffie_hellman(secret.to_nonzero_scalar(), peer.as_affine());
                Ok(Secret::from_slice(shared.raw_secret_bytes()))
            }
            Inner::P384(secret) => {
                let point = uncompressed::<97>(peer)?;
                let peer =
                    p384::PublicKey::from_sec1_bytes(&point).map_err(|_| Error::BadPublicValue)?;
                let shared =
                    p384::ecdh::diffie_hellman(secret.to_nonzero_scalar(), peer.as_affine());
                Ok(Secret::from_slice(shared.raw_secret_bytes()))
            }
        }
    }

    /// The private key, for the replicated record of a half-open exchange.
    #[must_use]
    pub fn to_secret_bytes(&self) -> Secret {
        match &self.0 {
            Inner::X25519(secret) => Secret::from_slice(secret.as_bytes()),
            Inner::P256(secret) => Secret::from_slice(&Zeroizing::new(secret.to_bytes())),
            Inner::P384(secret) => Secret::from_slice(&Zeroizing::new(secret.to_bytes())),
        }
    }

    /// Rebuilds a key pair from [`Ephemeral::to_secret_bytes`].
    ///
    /// # Errors
    /// [`Error::KeyLength`], or [`Error::BadSecret`] if the number is zero or
    /// not below the order of the curve.
    pub fn from_secret_bytes(group: Group, secret: &[u8]) -> Result<Self, Error> {
        let wrong = Error::KeyLength { want: group.secret_len(), got: secret.len() };
        if secret.len() != group.secret_len() {
            return Err(wrong);
        }
        Ok(Self(match group {
            Group::X25519 => {
                let bytes = Zeroizing::new(<[u8; 32]>::try_from(secret).map_err(|_| wrong)?);
                Inner::X25519(x25519_dalek::StaticSecret::from(*bytes))
            }
            Group::P256 => {
                Inner::P256(p256::SecretKey::from_slice(secret).map_err(|_| Error::BadSecret)?)
            }
            Group::P384 => {
                Inner::P384(p384::SecretKey::from_slice(secret).map_err(|_| Error::BadSecret)?)
            }
        }))
    }
}

/// SEC1's form of an uncompressed point: 0x04 ‖ x ‖ y.
fn uncompressed<const N: usize>(xy: &[u8]) -> Result<[u8; N], Error> {
    let mut out = [0; N];
    let (tag, body) = out.split_first_mut().ok_or(Error::BadPublicValue)?;
    if body.len() != xy.len() {
        return Err(Error::BadPublicValue);
    }
    *tag = 4;
    body.copy_from_slice(xy);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::rng;
    use crate::testutil::unhex;

    struct Vector {
        group: Group,
        secret: [&'static str; 2],
        public: [&'static str; 2],
        shared: &'static str,
    }

    const VECTORS: [Vector; 4] = [
        // RFC 5903 §8.1
        Vector {
            group: Group::P256,
            secret: [
                "C88F01F5 10D9AC3F 70A292DA A2316DE5 44E9AAB8 AFE84049 C62A9C57 862D1433",
                "C6EF9C5D 78AE012A 011164AC B397CE20 88685D8F 06BF9BE0 B283AB46 476BEE53",
            ],
            public: [
                "DAD0B653 94221CF9 B051E1FE CA5787D0 98DFE637 FC90B9EF 945D0C37 72581180
                 5271A046 1CDB8252 D61F1C45 6FA3E59A B1F45B33 ACCF5F58 389E0577 B8990BB3",
                "D12DFB52 89C8D4F8 1208B702 70398C34 2296970A 0BCCB74C 736FC755 4494BF63
                 56FBF3CA 366CC23E 8157854C 13C58D6A AC23F046 ADA30F83 53E74F33 039872AB",
            ],
            shared: "D6840F6B 42F6EDAF D13116E0 E1256520 2FEF8E9E CE7DCE03 812464D0 4B9442DE",
        },
        // RFC 5903 §8.2
        Vector {
            group: Group::P384,
            secret: [
                "099F3C70 34D4A2C6 99884D73 A375A67F 7624EF7C 6B3C0F16 0647B674 14DCE655
                 E35B5380 41E649EE 3FAEF896 783AB194",
                "41CB0779 B4BDB85D 47846725 FBEC3C94 30FAB46C C8DC5060 855CC9BD A0AA2942
                 E0308312 916B8ED2 960E4BD5 5A7448FC",
            ],
            public: [
                "667842D7 D180AC2C DE6F74F3 7551F557 55C7645C 20EF73E3 1634FE72 B4C55EE6
                 DE3AC808 ACB4BDB4 C88732AE E95F41AA 9482ED1F C0EEB9CA FC498462 5CCFC23F
                 65032149 E0E144AD A0241815 35A0F38E EB9FCFF3 C2C947DA E69B4C63 4573A81C",
                "E558DBEF 53EECDE3 D3FCCFC1 AEA08A89 A987475D 12FD950D 83CFA417 32BC509D
                 0D1AC43A 0336DEF9 6FDA41D0 774A3571 DCFBEC7A ACF31964 72169E83 8430367F
                 66EEBE3C 6E70C416 DD5F0C68 759DD1FF F83FA401 42209DFF 5EAAD96D B9E6386C",
            ],
            shared: "11187331 C279962D 93D60424 3FD592CB 9D0A926F 422E4718 7521287E 7156C5C4
                     D6031355 69B9E9D0 9CF5D4A2 70F59746",
        },
        // RFC 8031 appendix A
        Vector {
            group: Group::X25519,
            secret: [
                "75 1f b4 30 86 55 b4 76 b6 78 9b 73 25 f9 ea 8c
                 dd d1 6a 58 53 3f f6 d9 e6 00 09 46 4a 5f 9d 94",
                "0a 54 64 52 53 29 0d 60 dd ad d0 e0 30 ba cd 9e
                 55 01 ef dc 22 07 55 a1 e9 78 f1 b8 39 a0 56 88",
            ],
            public: [
                "48 d5 dd d4 06 12 57 ba 16 6f a3 f9 bb db 74 f1
                 a4 e8 1c 08 93 84 fa 77 f7 90 70 9f 0d fb c7 66",
                "0b e7 c1 f5 aa d8 7d 7e 44 86 62 67 32 98 a4 43
                 47 8b 85 97 45 17 9e af 56 4c 79 c0 ef 6e ee 25",
            ],
            shared: "c7 49 50 60 7a 12 32 7f 32 04 d9 4b 68 25 bf b0
                     68 b7 f8 31 9a 9e 37 08 ed 3d 43 ce 81 30 c9 50",
        },
        // RFC 7748 §6.1
        Vector {
            group: Group::X25519,
            secret: [
                "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
                "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            ],
            public: [
                "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
                "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            ],
            shared: "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        },
    ];

    #[test]
    fn rfc_vectors() {
        for v in &VECTORS {
            let [a, b] =
                v.secret.map(|s| Ephemeral::from_secret_bytes(v.group, &unhex(s)).unwrap());
            let [pub_a, pub_b] = v.public.map(unhex);
            assert_eq!(a.public(), pub_a, "{:?}", v.group);
            assert_eq!(b.public(), pub_b, "{:?}", v.group);
            assert_eq!(a.agree(&pub_b).unwrap().expose(), unhex(v.shared));
            assert_eq!(b.agree(&pub_a).unwrap().expose(), unhex(v.shared));
        }
    }

    #[test]
    fn fresh_keys_agree_and_survive_serialisation() {
        for group in Group::ALL {
            let a = Ephemeral::generate(group, &mut rng());
            let b = Ephemeral::generate(group, &mut rng());
            assert_ne!(a.public(), b.public());
            assert_eq!(a.public().len(), group.public_len());
            let secret = a.to_secret_bytes();
            assert_eq!(secret.len(), group.secret_len());
            let a2 = Ephemeral::from_secret_bytes(group, secret.expose()).unwrap();
            assert_eq!(a2.public(), a.public());
            let shared = b.agree(&a.public()).unwrap();
            assert_eq!(shared.len(), group.secret_len());
            assert!(a2.agree(&b.public()).unwrap().ct_eq(&shared));
        }
    }

    // security.md, statement 6: wrong length.
    #[test]
    fn refuses_wrong_lengths() {
        for group in Group::ALL {
            let ours = Ephemeral::generate(group, &mut rng());
            let good = Ephemeral::generate(group, &mut rng()).public();
            let mut long = good.clone();
            long.push(0);
            // SEC1's form, as a confused peer would send it.
            let sec1 = [&[4], good.as_slice()].concat();
            let compressed = [&[2], &good[..good.len() / 2]].concat();
            for bad in [&[], &good[1..], &good[..good.len() - 1], &long, &sec1, &compressed] {
                assert_eq!(ours.agree(bad).err(), Some(Error::BadPublicValue), "{group:?}");
            }
            assert!(ours.agree(&good).is_ok());
        }
    }

    // security.md, statement 6: the value 0, and what leads to a zero secret.
    #[test]
    fn refuses_zero_and_points_of_small_order() {
        for group in Group::ALL {
            let ours = Ephemeral::generate(group, &mut rng());
            let zero = vec![0; group.public_len()];
            assert_eq!(ours.agree(&zero).err(), Some(Error::BadPublicValue), "{group:?}");
        }
        // The points of order 1, 2, 4 and 8 of Curve25519 and their
        // non-canonical forms: 0, 1, p−1, p, p+1 and the two of order 8
        // (cr.yp.to/ecdh.html#validate).
        let small = [
            "0000000000000000000000000000000000000000000000000000000000000000",
            "0100000000000000000000000000000000000000000000000000000000000000",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        ];
        let ours = Ephemeral::generate(Group::X25519, &mut rng());
        for point in small {
            assert_eq!(ours.agree(&unhex(point)).err(), Some(Error::BadPublicValue), "{point}");
        }
    }

    // security.md, statement 6: off-curve, and coordinates not below p.
    #[test]
    fn refuses_points_off_the_curve() {
        let p256 = "ffffffff00000001000000000000000000000000ffffffffffffffffffffffff";
        let p384 = "ffffffffffffffffffffffffffffffffffffffffffffffff
                    fffffffffffffffeffffffff0000000000000000ffffffff";
        for (group, p) in [(Group::P256, p256), (Group::P384, p384)] {
            let ours = Ephemeral::generate(group, &mut rng());
            let p = unhex(p);
            let half = p.len();
            let good = Ephemeral::generate(group, &mut rng()).public();
            for at in [0, half - 1, half, 2 * half - 1] {
                let mut bad = good.clone();
                bad[at] ^= 1;
                assert_eq!(ours.agree(&bad).err(), Some(Error::BadPublicValue), "{group:?} {at}");
            }
            let mut p_minus_1 = p.clone();
            p_minus_1[half - 1] -= 1;
            let mut one = vec![0; half];
            one[half - 1] = 1;
            for x in [&one, &p_minus_1, &p, &vec![0xff; half]] {
                for y in [x, &vec![0; half]] {
                    let bad = [x.as_slice(), y.as_slice()].concat();
                    assert_eq!(ours.agree(&bad).err(), Some(Error::BadPublicValue), "{group:?}");
                }
            }
        }
    }

    #[test]
    fn refuses_stored_secrets_that_are_none() {
        for group in Group::ALL {
            let short = vec![1; group.secret_len() - 1];
            let want = Error::KeyLength { want: group.secret_len(), got: group.secret_len() - 1 };
            assert_eq!(Ephemeral::from_secret_bytes(group, &short).err(), Some(want));
        }
        for group in [Group::P256, Group::P384] {
            for byte in [0, 0xff] {
                let bad = vec![byte; group.secret_len()];
                let got = Ephemeral::from_secret_bytes(group, &bad).err();
                assert_eq!(got, Some(Error::BadSecret));
            }
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let ours = Ephemeral::generate(Group::P256, &mut rng());
        assert_eq!(format!("{ours:?}"), "Ephemeral(P256, …)");
    }

    #[test]
    fn transform_ids_round_trip() {
        for group in Group::ALL {
            assert_eq!(Group::from_transform_id(group.transform_id()), Some(group));
        }
        for id in [0, 2, 14, 21, 32] {
            assert_eq!(Group::from_transform_id(id), None);
        }
    }
}

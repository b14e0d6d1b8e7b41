//! Pseudo-random functions of IKEv2: HMAC with SHA-2 (RFC 4868), and prf+
//! (RFC 7296 §2.13).

use ring::hmac;
use zeroize::Zeroizing;

use crate::{Error, Secret};

/// A PRF that IKE can negotiate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrfAlg {
    /// PRF_HMAC_SHA2_256.
    HmacSha256,
    /// PRF_HMAC_SHA2_384.
    HmacSha384,
    /// PRF_HMAC_SHA2_512.
    HmacSha512,
}

impl PrfAlg {
    /// All of them, most preferred first.
    pub const ALL: [Self; 3] = [Self::HmacSha384, Self::HmacSha256, Self::HmacSha512];

    /// Transform id, type 2 (RFC 4868 §4).
    #[must_use]
    pub const fn transform_id(self) -> u16 {
        match self {
            Self::HmacSha256 => 5,
            Self::HmacSha384 => 6,
            Self::HmacSha512 => 7,
        }
    }

    /// The algorithm of a transform id, if it has an implementation here.
    #[must_use]
    pub fn from_transform_id(id: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.transform_id() == id)
    }

    /// Output length in bytes, which is also the preferred key length and the
    /// length of SK_d, SK_pi and SK_pr (RFC 7296 §2.14).
    #[must_use]
    pub const fn len(self) -> usize {
        match self {
            Self::HmacSha256 => 32,
            Self::HmacSha384 => 48,
            Self::HmacSha512 => 64,
        }
    }

    /// Never: every algorithm here has output. (Beside `len` by convention.)
    #[must_use]
    pub const fn is_empty(self) -> bool {
        false
    }

    fn ring(self) -> hmac::Algorithm {
        match self {
            Self::HmacSha256 => hmac::HMAC_SHA256,
            Self::HmacSha384 => hmac::HMAC_SHA384,
            Self::HmacSha512 => hmac::HMAC_SHA512,
        }
    }
}

/// `prf(key, parts joined)`: [`PrfAlg::len`] bytes. Any key length is legal.
#[must_use]
pub fn prf(alg: PrfAlg, key: &[u8], parts: &[&[u8]]) -> Secret {
    Secret::from_slice(mac(&hmac::Key::new(alg.ring(), key), parts).as_ref())
}

/// `prf+(key, seed joined)`, cut to `len` bytes.
///
/// RFC 7296 §2.13: T1 = prf(K, S | 0x01), Tn = prf(K, Tn-1 | S | n).
///
/// # Errors
/// [`Error::TooLong`] above 255 blocks, where the counter would wrap.
pub fn prf_plus(alg: PrfAlg, key: &[u8], seed: &[&[u8]], len: usize) -> Result<Secret, Error> {
    if len > 255 * alg.len() {
        return Err(Error::TooLong);
    }
    let key = hmac::Key::new(alg.ring(), key);
    // Reserved at once: growing would leave unwiped copies behind.
    let mut out = Zeroizing::new(Vec::with_capacity(len + alg.len()));
    let mut last: Option<hmac::Tag> = None;
    let mut counter = 0u8;
    while out.len() < len {
        counter = counter.saturating_add(1);
        let mut context = hmac::Context::with_key(&key);
        if let Some(tag) = &last {
            context.update(tag.as_ref());
        }
        for part in seed {
            context.update(part);
        }
        context.update(&[counter]);
        let tag = context.sign();
        out.extend_from_slice(tag.as_ref());
        last = Some(tag);
    }
    out.truncate(len);
    Ok(Secret::from(out))
}

fn mac(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(part);
    }
    context.sign()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::unhex;

    // RFC 4231 §4.2–4.4, 4.7: key, data, and the three answers.
    #[test]
    fn rfc4231() {
        let long_data = b"This is a test using a larger than block-size key and a larger than \
            block-size data. The key needs to be hashed before being used by the HMAC algorithm.";
        let cases: [(&[u8], &[u8], [&str; 3]); 4] = [
            (
                &[0x0b; 20],
                b"Hi There",
                [
                    "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
                    "afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59c
                     faea9ea9076ede7f4af152e8b2fa9cb6",
                    "87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cde
                     daa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854",
                ],
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                [
                    "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
                    "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e
                     8e2240ca5e69e2c78b3239ecfab21649",
                    "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554
                     9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
                ],
            ),
            (
                &[0xaa; 20],
                &[0xdd; 50],
                [
                    "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
                    "88062608d3e6ad8a0aa2ace014c8a86f0aa635d947ac9febe83ef4e55966144b
                     2a5ab39dc13814b94e3ab6e101a34f27",
                    "fa73b0089d56a284efb0f0756c890be9b1b5dbdd8ee81a3655f83e33b2279d39
                     bf3e848279a722c806b485a47e67c807b946a337bee8942674278859e13292fb",
                ],
            ),
            (
                &[0xaa; 131],
                long_data,
                [
                    "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
                    "6617178e941f020d351e2f254e8fd32c602420feb0b8fb9adccebb82461e99c5
                     a678cc31e799176d3860e6110c46523e",
                    "e37b6a775dc87dbaa4dfa9f96e5e3ffddebd71f8867289865df5a32d20cdc944
                     b6022cac3c4982b10d5eeb55c3e4de15134676fb6de0446065c97440fa8c6a58",
                ],
            ),
        ];
        for (key, data, answers) in cases {
            let algs = [PrfAlg::HmacSha256, PrfAlg::HmacSha384, PrfAlg::HmacSha512];
            for (alg, answer) in algs.into_iter().zip(answers) {
                assert_eq!(prf(alg, key, &[data]).expose(), unhex(answer), "{alg:?}");
                let (head, tail) = data.split_at(3);
                assert_eq!(prf(alg, key, &[head, b"", tail]).expose(), unhex(answer), "{alg:?}");
            }
        }
    }

    // RFC 7296 §2.13. Answers by Python's hmac module:
    // t = hmac.new(b'key of any length', t + b'nonces and spis' + bytes([i]), h).digest()
    // joined for i = 1, 2, … and cut to 150 bytes.
    #[test]
    fn prf_plus_against_python() {
        let cases = [
            (
                PrfAlg::HmacSha256,
                "ae999bf4f8001ccbd70cf18aa01bd331dd61fd7d87bd4ecad50603b5843d6904343a253c3a68da0d
                 5258fac431fe9ef4fc48cb79dccb9eb3cfbe45f5a534feaed0cf65a460782cbe36e7cb55e3f15027
                 e7ea547988bd3a82bac474281fdb0a432cd10ccc048b3ccef3777f6f351bbc07ba225c69b442650a
                 a2aa41f72f45d262d3f6d7c8ed4269e6723e4980fc080ec49bdeb67b50b9",
            ),
            (
                PrfAlg::HmacSha384,
                "625e3927562863d17da476bd45eefb8b69ee57356837b28eee9599b34751be6d7ecc0c82e26c662a
                 4e708abc8e0a55148b342b89d710687b58da25b3d33d5f5b7bc15edad25c168a3eaa57891c69e229
                 6553bedb29ac265ee18442add50b51993eaaacbdd4af4aecabd5b18e973501d1d146958766ce13b6
                 0cfca28b111b33d83cb9d6f6ed8ff567a9fdf85eb6c6adbcbaf825764fc6",
            ),
            (
                PrfAlg::HmacSha512,
                "c433e1b1da7db9f48b812c53cc9d3d515965e44e7ce6517860177dac323ae3587ae4562a374dfb31
                 5bfad1516d3af50beb4cacb48e33a6adc9a589d46fc498bc71d2ca2a938c4529809d264beb697dc0
                 425a480ff9f96e10b98141d395358d81afc9d86b1eb6cfe1252eb794ade7d7e451a924e3fe91d7a9
                 b58d4da88fdcd9bb088d60ac7ec629b6d3828afe33c288951d4cd2bad157",
            ),
        ];
        for (alg, answer) in cases {
            let answer = unhex(answer);
            for len in [0, 1, 31, 32, 33, 150] {
                let seed: [&[u8]; 2] = [b"nonces ", b"and spis"];
                let got = prf_plus(alg, b"key of any length", &seed, len).unwrap();
                assert_eq!(got.expose(), &answer[..len], "{alg:?} {len}");
            }
        }
    }

    #[test]
    fn prf_plus_ends_at_255_blocks() {
        for alg in PrfAlg::ALL {
            assert_eq!(
                prf_plus(alg, b"k", &[b"s"], 255 * alg.len()).unwrap().len(),
                255 * alg.len()
            );
            let over = prf_plus(alg, b"k", &[b"s"], 255 * alg.len() + 1);
            assert_eq!(over.err(), Some(Error::TooLong));
        }
    }

    #[test]
    fn transform_ids_round_trip() {
        for alg in PrfAlg::ALL {
            assert_eq!(PrfAlg::from_transform_id(alg.transform_id()), Some(alg));
            assert!(!alg.is_empty());
        }
        // PRF_HMAC_MD5, PRF_HMAC_SHA1, PRF_AES128_CMAC
        for id in [0, 1, 2, 8, 65535] {
            assert_eq!(PrfAlg::from_transform_id(id), None);
        }
    }
}

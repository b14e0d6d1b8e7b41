//! The AEADs of ESP and IKE: AES-GCM-16 (RFC 4106, RFC 5282) and
//! ChaCha20-Poly1305 (RFC 7634), sealing and opening in place.
//!
//! The nonce of all three is salt (4 bytes, from the key material) ‖ IV
//! (8 bytes, sent in the packet). Tandem's IVs are made by [`IvSequence`].
//!
//! By aws-lc, not by ring: where the processor has AVX-512 it is faster with full packets (`cargo bench -p crypto` shows
//! both), and it wipes expanded keys when they are freed.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305};
use aws_lc_rs::aead::{LessSafeKey, Nonce, UnboundKey};

use crate::Error;

/// Length of the explicit IV in bytes.
pub const IV_LEN: usize = 8;
/// Length of the tag (ICV) in bytes.
pub const TAG_LEN: usize = 16;
/// Length of the salt at the end of the key material, in bytes.
pub const SALT_LEN: usize = 4;

/// An AEAD that IKE or ESP can negotiate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AeadAlg {
    /// AES-128-GCM with a 16-byte ICV.
    Aes128Gcm16,
    /// AES-256-GCM with a 16-byte ICV.
    Aes256Gcm16,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
}

impl AeadAlg {
    /// All of them, most preferred first.
    pub const ALL: [Self; 3] = [Self::Aes256Gcm16, Self::Aes128Gcm16, Self::ChaCha20Poly1305];

    /// Transform id, type 1, and the Key Length attribute in bits where the
    /// transform has one (RFC 4106 §8.2; RFC 7634 §4 forbids it).
    #[must_use]
    pub const fn transform(self) -> (u16, Option<u16>) {
        match self {
            Self::Aes128Gcm16 => (20, Some(128)),
            Self::Aes256Gcm16 => (20, Some(256)),
            Self::ChaCha20Poly1305 => (28, None),
        }
    }

    /// The algorithm of a transform id and Key Length attribute, if it has an
    /// implementation here. So nothing can be negotiated that has none
    /// (security.md, statement 7).
    #[must_use]
    pub fn from_transform(id: u16, key_bits: Option<u16>) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.transform() == (id, key_bits))
    }

    /// Length of the key alone, in bytes.
    #[must_use]
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm16 => 16,
            Self::Aes256Gcm16 | Self::ChaCha20Poly1305 => 32,
        }
    }

    /// Length of the salt that follows the key in the key material, in bytes
    /// (RFC 4106 §8.1, RFC 7634 §2).
    #[must_use]
    pub const fn salt_len(self) -> usize {
        SALT_LEN
    }

    /// Length of the key material: key ‖ salt, in bytes.
    #[must_use]
    pub const fn keymat_len(self) -> usize {
        self.key_len() + self.salt_len()
    }

    /// Length of the tag (ICV), in bytes.
    #[must_use]
    pub const fn icv_len(self) -> usize {
        TAG_LEN
    }

    /// Length of the explicit IV, in bytes.
    #[must_use]
    pub const fn iv_len(self) -> usize {
        IV_LEN
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm16 => &AES_128_GCM,
            Self::Aes256Gcm16 => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// One direction's key, expanded and ready. Neither call allocates.
pub struct AeadKey {
    key: LessSafeKey,
    salt: [u8; SALT_LEN],
    alg: AeadAlg,
}

impl core::fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "AeadKey({:?}, …)", self.alg)
    }
}

impl AeadKey {
    /// Expands `keymat`, which is key ‖ 4-byte salt.
    ///
    /// # Errors
    /// [`Error::KeyLength`] unless it is exactly [`AeadAlg::keymat_len`] long.
    pub fn new(alg: AeadAlg, keymat: &[u8]) -> Result<Self, Error> {
        let wrong = Error::KeyLength { want: alg.keymat_len(), got: keymat.len() };
        if keymat.len() != alg.keymat_len() {
            return Err(wrong);
        }
        let (key, salt) = keymat.split_at_checked(alg.key_len()).ok_or(wrong)?;
        let unbound = UnboundKey::new(alg.algorithm(), key).map_err(|_| wrong)?;
        let salt = salt.try_into().map_err(|_| wrong)?;
        Ok(Self { key: LessSafeKey::new(unbound), salt, alg })
    }

    /// The algorithm the key is for.
    #[must_use]
    pub const fn alg(&self) -> AeadAlg {
        self.alg
    }

    /// Encrypts `buf` in place and returns the tag that follows it on the wire.
    ///
    /// An `iv` must never be used twice with one key for different input; take
    /// it from an [`IvSequence`].
    ///
    /// # Errors
    /// [`Error::TooLong`] above 2^36 bytes; nothing else can fail.
    #[inline]
    pub fn seal_in_place(
        &self,
        iv: [u8; IV_LEN],
        aad: &[u8],
        buf: &mut [u8],
    ) -> Result<[u8; TAG_LEN], Error> {
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(iv), Aad::from(aad), buf)
            .map_err(|_| Error::TooLong)?;
        tag.as_ref().try_into().map_err(|_| Error::TooLong)
    }

    /// Verifies and decrypts `buf`, which is ciphertext ‖ tag, in place and
    /// returns the plaintext at its front.
    ///
    /// # Errors
    /// [`Error::NotAuthentic`]; `buf` then holds rubbish.
    #[inline]
    pub fn open_in_place<'a>(
        &self,
        iv: [u8; IV_LEN],
        aad: &[u8],
        buf: &'a mut [u8],
    ) -> Result<&'a mut [u8], Error> {
        self.key.open_in_place(self.nonce(iv), Aad::from(aad), buf).map_err(|_| Error::NotAuthentic)
    }

    #[inline]
    fn nonce(&self, iv: [u8; IV_LEN]) -> Nonce {
        let [a, b, c, d] = self.salt;
        let [e, f, g, h, i, j, k, l] = iv;
        Nonce::assume_unique_for_key([a, b, c, d, e, f, g, h, i, j, k, l])
    }
}

/// Makes the explicit IVs of one term: the term's low 16 bits ‖ a 48-bit
/// counter from 0 (ha.md, "ESP counters").
///
/// As terms never repeat and their parity names the instance, no clock,
/// partition or restart can repeat an IV, as long as whoever may use a key in a
/// term draws from one sequence made once for that term (not once for the key:
/// a key can come back within a term). A key whose terms would wrap 16 bits gets
/// no IV; it is to be replaced long before. Several workers that may use one key
/// need a part of the counter each.
#[derive(Debug)]
pub struct IvSequence {
    term: u64,
    next: u64,
}

impl IvSequence {
    /// IVs that there are in one term.
    pub const LEN: u64 = 1 << 48;
    /// Terms that a key can live through, its first one included: then the term's
    /// bits are back where the key began.
    pub const TERMS: u64 = 1 << 16;

    /// The sequence of `term`, from 0.
    #[must_use]
    pub const fn new(term: u64) -> Self {
        Self { term, next: 0 }
    }

    /// Whether a key that was made in term `born` may still be used: not from
    /// 2^16 terms later on, and not in a term before.
    #[inline]
    #[must_use]
    pub const fn is_for(&self, born: u64) -> bool {
        match self.term.checked_sub(born) {
            Some(age) => age < Self::TERMS,
            None => false,
        }
    }

    /// The next IV for a key that was made in term `born`. `None` when the
    /// counter is used up: then nothing more may be sealed in this term; or when
    /// the key is too old ([`Self::is_for`]): then never again with it.
    #[inline]
    pub fn next_iv(&mut self, born: u64) -> Option<[u8; IV_LEN]> {
        if self.next >= Self::LEN || !self.is_for(born) {
            return None;
        }
        // The shift leaves the term's low 16 bits.
        let iv = (self.term << 48) | self.next;
        self.next += 1;
        Some(iv.to_be_bytes())
    }

    /// How many were taken.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::unhex;
    use aes_gcm::aead::{AeadInPlace, KeyInit};
    use proptest::prelude::*;

    fn iv(text: &str) -> [u8; 8] {
        unhex(text).try_into().unwrap()
    }

    fn check(alg: AeadAlg, keymat: &[u8], iv: [u8; 8], aad: &[u8], plain: &[u8], sealed: &[u8]) {
        let key = AeadKey::new(alg, keymat).unwrap();
        let mut buf = plain.to_vec();
        let tag = key.seal_in_place(iv, aad, &mut buf).unwrap();
        buf.extend_from_slice(&tag);
        assert_eq!(buf, sealed, "{alg:?}");
        assert_eq!(key.open_in_place(iv, aad, &mut buf).unwrap(), plain, "{alg:?}");
    }

    // McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 4
    // and 16, whose 96-bit IV is RFC 4106's salt ‖ IV. Both were also computed
    // with OpenSSL (Python cryptography's AESGCM).
    #[test]
    fn gcm_vectors() {
        let key = "feffe9928665731c6d6a8f9467308308";
        let plain = unhex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72
             1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let aad = unhex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let sealed = unhex(
            "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e
             21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091
             5bc94fbc3221a5db94fae95ae7121a47",
        );
        let keymat = unhex(&format!("{key} cafebabe"));
        let iv = iv("facedbaddecaf888");
        check(AeadAlg::Aes128Gcm16, &keymat, iv, &aad, &plain, &sealed);

        let sealed = unhex(
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa
             8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662
             76fc6ece0f4e1768cddf8853bb2d551b",
        );
        let keymat = unhex(&format!("{key} {key} cafebabe"));
        check(AeadAlg::Aes256Gcm16, &keymat, iv, &aad, &plain, &sealed);
    }

    // RFC 7634 appendix A (ESP) and appendix B (IKE).
    #[test]
    fn rfc7634_examples() {
        let keymat = unhex(
            "80 81 82 83 84 85 86 87 88 89 8a 8b 8c 8d 8e 8f
             90 91 92 93 94 95 96 97 98 99 9a 9b 9c 9d 9e 9f a0 a1 a2 a3",
        );
        let iv = iv("10 11 12 13 14 15 16 17");
        let plain = unhex(
            "45 00 00 54 a6 f2 00 00 40 01 e7 78 c6 33 64 05
             c0 00 02 05 08 00 5b 7a 3a 08 00 00 55 3b ec 10
             00 07 36 27 08 09 0a 0b 0c 0d 0e 0f 10 11 12 13
             14 15 16 17 18 19 1a 1b 1c 1d 1e 1f 20 21 22 23
             24 25 26 27 28 29 2a 2b 2c 2d 2e 2f 30 31 32 33
             34 35 36 37 01 02 02 04",
        );
        let sealed = unhex(
            "24 03 94 28 b9 7f 41 7e 3c 13 75 3a 4f 05 08 7b
             67 c3 52 e6 a7 fa b1 b9 82 d4 66 ef 40 7a e5 c6
             14 ee 80 99 d5 28 44 eb 61 aa 95 df ab 4c 02 f7
             2a a7 1e 7c 4c 4f 64 c9 be fe 2f ac c6 38 e8 f3
             cb ec 16 3f ac 46 9b 50 27 73 f6 fb 94 e6 64 da
             91 65 b8 28 29 f6 41 e0
             76 aa a8 26 6b 7f b0 f7 b1 1b 36 99 07 e1 ad 43",
        );
        let aad = unhex("01 02 03 04 00 00 00 05");
        check(AeadAlg::ChaCha20Poly1305, &keymat, iv, &aad, &plain, &sealed);

        let plain = unhex("00 00 00 0c 00 00 40 01 00 00 00 0a 00");
        let aad = unhex(
            "c0 c1 c2 c3 c4 c5 c6 c7 d0 d1 d2 d3 d4 d5 d6 d7
             2e 20 25 00 00 00 00 09 00 00 00 45 29 00 00 29",
        );
        let sealed = unhex(
            "61 03 94 70 1f 8d 01 7f 7c 12 92 48 89
             6b 71 bf e2 52 36 ef d7 cd c6 70 66 90 63 15 b2",
        );
        check(AeadAlg::ChaCha20Poly1305, &keymat, iv, &aad, &plain, &sealed);
    }

    /// RustCrypto's answer: the second opinion.
    fn other_seal(alg: AeadAlg, keymat: &[u8], iv: [u8; 8], aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let (key, salt) = keymat.split_at(alg.key_len());
        let nonce = [salt, &iv].concat();
        let nonce: &[u8; 12] = nonce.as_slice().try_into().unwrap();
        let nonce = nonce.into();
        let mut buf = plain.to_vec();
        let tag = match alg {
            AeadAlg::Aes128Gcm16 => aes_gcm::Aes128Gcm::new_from_slice(key)
                .unwrap()
                .encrypt_in_place_detached(nonce, aad, &mut buf),
            AeadAlg::Aes256Gcm16 => aes_gcm::Aes256Gcm::new_from_slice(key)
                .unwrap()
                .encrypt_in_place_detached(nonce, aad, &mut buf),
            AeadAlg::ChaCha20Poly1305 => unreachable!("aes-gcm has no ChaCha20"),
        }
        .unwrap();
        buf.extend_from_slice(&tag);
        buf
    }

    proptest! {
        #[test]
        fn aws_lc_and_rustcrypto_agree(
            wide: bool,
            keymat: [u8; 32],
            salt: [u8; 4],
            iv: [u8; 8],
            aad in prop::collection::vec(any::<u8>(), 0..40),
            plain in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let alg = if wide { AeadAlg::Aes256Gcm16 } else { AeadAlg::Aes128Gcm16 };
            let keymat = [&keymat[..alg.key_len()], &salt].concat();
            let sealed = other_seal(alg, &keymat, iv, &aad, &plain);
            check(alg, &keymat, iv, &aad, &plain, &sealed);
        }

        // Any single flipped bit, in IV, AAD, ciphertext or tag, is noticed.
        #[test]
        fn one_flipped_bit_is_noticed(
            which in 0..3usize,
            keymat: [u8; 36],
            iv: [u8; 8],
            aad: [u8; 8],
            plain in prop::collection::vec(any::<u8>(), 0..80),
            flip: prop::sample::Index,
        ) {
            let alg = AeadAlg::ALL[which];
            let key = AeadKey::new(alg, &keymat[..alg.keymat_len()]).unwrap();
            let mut buf = plain.clone();
            let tag = key.seal_in_place(iv, &aad, &mut buf).unwrap();
            let mut all = [&iv[..], &aad, &buf, &tag].concat();
            let bit = flip.index(all.len() * 8);
            all[bit / 8] ^= 1 << (bit % 8);
            let (iv, rest) = all.split_at_mut(8);
            let (aad, sealed) = rest.split_at_mut(8);
            let opened = key.open_in_place((&*iv).try_into().unwrap(), aad, sealed);
            prop_assert_eq!(opened.err(), Some(Error::NotAuthentic));
        }
    }

    #[test]
    fn too_short_for_a_tag_is_not_authentic() {
        for alg in AeadAlg::ALL {
            let key = AeadKey::new(alg, &vec![7; alg.keymat_len()]).unwrap();
            for len in 0..TAG_LEN {
                let mut buf = vec![0; len];
                let got = key.open_in_place([0; 8], &[], &mut buf);
                assert_eq!(got.err(), Some(Error::NotAuthentic));
            }
        }
    }

    #[test]
    fn key_material_of_another_length_is_refused() {
        for alg in AeadAlg::ALL {
            for got in [0, alg.key_len(), alg.keymat_len() - 1, alg.keymat_len() + 1] {
                let want = Error::KeyLength { want: alg.keymat_len(), got };
                assert_eq!(AeadKey::new(alg, &vec![7; got]).err(), Some(want));
            }
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let key = AeadKey::new(AeadAlg::Aes128Gcm16, &[0xab; 20]).unwrap();
        assert_eq!(format!("{key:?}"), "AeadKey(Aes128Gcm16, …)");
    }

    // security.md, statement 7.
    #[test]
    fn transforms_round_trip_and_have_keys() {
        for alg in AeadAlg::ALL {
            let (id, bits) = alg.transform();
            assert_eq!(AeadAlg::from_transform(id, bits), Some(alg));
            assert!(alg.key_len() > 0);
            assert_eq!(bits.map_or(32, |bits| usize::from(bits) / 8), alg.key_len());
            assert_eq!((alg.iv_len(), alg.salt_len(), alg.icv_len()), (8, 4, 16));
        }
        let bad = [
            (20, None),
            (20, Some(0)),
            (20, Some(192)),
            (28, Some(256)),
            (12, Some(128)),
            (0, None),
        ];
        for (id, bits) in bad {
            assert_eq!(AeadAlg::from_transform(id, bits), None);
        }
    }

    // ha.md, "ESP counters": [term, low 16 bits | counter:48].
    #[test]
    fn iv_layout_and_end() {
        let mut ivs = IvSequence::new(0x0001_0002_abcd);
        assert_eq!(ivs.next_iv(0x0001_0002_0000), Some([0xab, 0xcd, 0, 0, 0, 0, 0, 0]));
        assert_eq!(ivs.next_iv(0x0001_0002_0000), Some([0xab, 0xcd, 0, 0, 0, 0, 0, 1]));
        assert_eq!(ivs.used(), 2);
        ivs.next = IvSequence::LEN - 1;
        assert_eq!(
            ivs.next_iv(0x0001_0002_0000),
            Some([0xab, 0xcd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        );
        assert_eq!(ivs.next_iv(0x0001_0002_0000), None);
        assert_eq!(ivs.next_iv(0x0001_0002_0000), None);
    }

    // A key may be used in 2^16 terms: in the next one its first IV would come again.
    #[test]
    fn a_key_gets_no_iv_twice_however_many_terms_it_lives_through() {
        let born = 0x0001_0002_abcd;
        let first = IvSequence::new(born).next_iv(born);
        assert!(first.is_some());
        let mut ivs = IvSequence::new(born + IvSequence::TERMS - 1);
        assert_eq!(ivs.next_iv(born), Some([0xab, 0xcc, 0, 0, 0, 0, 0, 0]));
        for later in
            [IvSequence::TERMS, IvSequence::TERMS + 1, 5 * IvSequence::TERMS, u64::MAX - born]
        {
            let mut ivs = IvSequence::new(born + later);
            assert_eq!(ivs.next_iv(born), None);
            assert_eq!(ivs.used(), 0);
            // A younger key is none the worse for it.
            assert!(ivs.next_iv(born + later).is_some());
        }
        // Nor is a key used in a term that was before it.
        assert_eq!(IvSequence::new(born - 1).next_iv(born), None);
    }
}

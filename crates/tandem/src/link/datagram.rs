//! Heartbeats and steered packets on UDP: sealed under keys that the stream carried. Pure.
//!
//! ```text
//!  purpose:1 │ key id:4 │ counter:8 │ ciphertext … │ tag:16        AES-256-GCM
//!  └────────────── additional data, with the link's number ──┘
//! ```
//! Every stream brings fresh keys, one per direction and purpose, chosen by the sender; the counter
//! is the IV and never repeats under a key. Naming the link in the additional data keeps a
//! heartbeat heard on one link from being passed off on another.

use std::sync::atomic::{AtomicU64, Ordering};

use crypto::Secret;
use crypto::aead::{AeadAlg, AeadKey, TAG_LEN};
use zeroize::Zeroizing;

const ALG: AeadAlg = AeadAlg::Aes256Gcm16;

/// Bytes before the ciphertext.
pub(crate) const HEADER: usize = 1 + 4 + 8;

/// Bytes that sealing adds in all.
pub(crate) const OVERHEAD: usize = HEADER + TAG_LEN;

/// What a datagram is for; each has a key of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Heartbeat,
    Steer,
}

impl Purpose {
    /// The first byte of such a datagram.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Heartbeat => 1,
            Self::Steer => 2,
        }
    }
}

/// The keys that one side draws for what it will send during one stream.
pub(crate) struct Keys {
    id: u32,
    heartbeat: Secret,
    steer: Secret,
}

impl Keys {
    pub(crate) fn random(rng: &mut dyn crypto::Rng) -> Self {
        let length = ALG.keymat_len();
        Self {
            id: rng.next_u32(),
            heartbeat: Secret::random(length, rng),
            steer: Secret::random(length, rng),
        }
    }

    /// The body of a keys record.
    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(4 + 2 * ALG.keymat_len()));
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(self.heartbeat.expose());
        out.extend_from_slice(self.steer.expose());
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk::<4>()?;
        if rest.len() != 2 * ALG.keymat_len() {
            return None;
        }
        let (heartbeat, steer) = rest.split_at_checked(ALG.keymat_len())?;
        Some(Self {
            id: u32::from_be_bytes(*id),
            heartbeat: Secret::from_slice(heartbeat),
            steer: Secret::from_slice(steer),
        })
    }

    fn key(&self, purpose: Purpose) -> Option<AeadKey> {
        let keymat = match purpose {
            Purpose::Heartbeat => &self.heartbeat,
            Purpose::Steer => &self.steer,
        };
        AeadKey::new(ALG, keymat.expose()).ok()
    }

    pub(crate) fn sealer(&self, purpose: Purpose) -> Option<Sealer> {
        Some(Sealer { purpose, id: self.id, key: self.key(purpose)?, next: AtomicU64::new(0) })
    }

    pub(crate) fn opener(&self, purpose: Purpose) -> Option<Opener> {
        Some(Opener { purpose, id: self.id, key: self.key(purpose)?, window: Window::default() })
    }
}

/// The sending end of one key. Threads may share it: the counter is atomic.
pub(crate) struct Sealer {
    purpose: Purpose,
    id: u32,
    key: AeadKey,
    next: AtomicU64,
}

impl Sealer {
    /// Seals in place: `buffer` is [`HEADER`] bytes to be filled, the plaintext, and room for the
    /// tag. `None` when it is too short.
    pub(crate) fn seal(&self, link: u8, buffer: &mut [u8]) -> Option<()> {
        let (header, rest) = buffer.split_first_chunk_mut::<HEADER>()?;
        let (plain, tag) = rest.split_last_chunk_mut::<TAG_LEN>()?;
        // 2^64 datagrams are never reached in a stream's life.
        let counter = self.next.fetch_add(1, Ordering::Relaxed);
        let aad = header_and_link(self.purpose, self.id, counter, link);
        header.copy_from_slice(aad.first_chunk::<HEADER>()?);
        *tag = self.key.seal_in_place(counter.to_be_bytes(), &aad, plain).ok()?;
        Some(())
    }
}

fn header_and_link(purpose: Purpose, id: u32, counter: u64, link: u8) -> [u8; HEADER + 1] {
    let [a, b, c, d] = id.to_be_bytes();
    let [e, f, g, h, i, j, k, l] = counter.to_be_bytes();
    [purpose.byte(), a, b, c, d, e, f, g, h, i, j, k, l, link]
}

/// Why a datagram was refused. All are counted, none is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too short to be one.
    Short,
    /// No such purpose.
    Unknown,
    /// Sealed under another key: of an earlier stream, or of somebody else.
    OtherKey,
    /// The tag does not verify.
    Forged,
    /// Seen before, or too old to tell.
    Replayed,
}

/// The purpose that a datagram claims.
pub(crate) fn purpose_of(datagram: &[u8]) -> Result<Purpose, Refused> {
    match datagram.first() {
        _ if datagram.len() < OVERHEAD => Err(Refused::Short),
        Some(1) => Ok(Purpose::Heartbeat),
        Some(2) => Ok(Purpose::Steer),
        _ => Err(Refused::Unknown),
    }
}

/// The receiving end of one key.
pub(crate) struct Opener {
    purpose: Purpose,
    id: u32,
    key: AeadKey,
    window: Window,
}

impl Opener {
    /// Opens in place; gives the plaintext.
    pub(crate) fn open<'d>(
        &mut self,
        link: u8,
        datagram: &'d mut [u8],
    ) -> Result<&'d [u8], Refused> {
        if purpose_of(datagram)? != self.purpose {
            return Err(Refused::Unknown);
        }
        let (header, rest) = datagram.split_first_chunk_mut::<HEADER>().ok_or(Refused::Short)?;
        let [_, a, b, c, d, counter @ ..] = *header;
        if u32::from_be_bytes([a, b, c, d]) != self.id {
            return Err(Refused::OtherKey);
        }
        let counter = u64::from_be_bytes(counter);
        if !self.window.is_new(counter) {
            return Err(Refused::Replayed);
        }
        let aad = header_and_link(self.purpose, self.id, counter, link);
        let plain = self
            .key
            .open_in_place(counter.to_be_bytes(), &aad, rest)
            .map_err(|_| Refused::Forged)?;
        // Only an authentic datagram moves the window.
        self.window.mark(counter);
        Ok(plain)
    }
}

/// Which counters were seen: the last [`Window::BITS`] up to the highest (RFC 6479's ring).
struct Window {
    /// One above the highest seen.
    end: u64,
    words: [u64; Self::WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self { end: 0, words: [0; Self::WORDS] }
    }
}

impl Window {
    const WORDS: usize = 32;
    /// One word is always partly beyond the highest.
    const BITS: u64 = (Self::WORDS as u64 - 1) * 64;

    fn bit(&self, counter: u64) -> Option<bool> {
        let word = self.words.get((counter / 64) as usize % Self::WORDS)?;
        Some(word & (1 << (counter % 64)) != 0)
    }

    fn is_new(&self, counter: u64) -> bool {
        if counter >= self.end {
            return true;
        }
        counter + Self::BITS >= self.end && self.bit(counter) == Some(false)
    }

    fn mark(&mut self, counter: u64) {
        if counter >= self.end {
            // Words entered for the first time lose what an earlier round left in them.
            let old = if self.end == 0 { 0 } else { (self.end - 1) / 64 + 1 };
            let new = counter / 64;
            for word in (old..=new).rev().take(Self::WORDS) {
                if let Some(word) = self.words.get_mut(word as usize % Self::WORDS) {
                    *word = 0;
                }
            }
            self.end = counter.saturating_add(1);
        }
        if let Some(word) = self.words.get_mut((counter / 64) as usize % Self::WORDS) {
            *word |= 1 << (counter % 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ends() -> (Keys, Sealer, Opener) {
        let keys = Keys::random(&mut rand_core::OsRng);
        let decoded = Keys::decode(&keys.encode()).unwrap();
        let sealer = keys.sealer(Purpose::Heartbeat).unwrap();
        (keys, sealer, decoded.opener(Purpose::Heartbeat).unwrap())
    }

    fn sealed(sealer: &Sealer, link: u8, plain: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0; HEADER];
        datagram.extend_from_slice(plain);
        datagram.extend_from_slice(&[0; TAG_LEN]);
        sealer.seal(link, &mut datagram).unwrap();
        datagram
    }

    #[test]
    fn comes_through_once_and_on_its_link_only() {
        let (_, sealer, mut opener) = ends();
        let datagram = sealed(&sealer, 1, b"beat");
        assert_eq!(datagram.len(), 4 + OVERHEAD);
        assert_eq!(opener.open(0, &mut datagram.clone()), Err(Refused::Forged));
        assert_eq!(opener.open(1, &mut datagram.clone()), Ok(&b"beat"[..]));
        assert_eq!(opener.open(1, &mut datagram.clone()), Err(Refused::Replayed));
    }

    #[test]
    fn other_keys_purposes_and_every_changed_bit_are_refused() {
        let (keys, sealer, mut opener) = ends();
        let datagram = sealed(&sealer, 0, b"beat");
        assert_eq!(ends().2.open(0, &mut datagram.clone()), Err(Refused::OtherKey));
        let mut steer = keys.opener(Purpose::Steer).unwrap();
        assert_eq!(steer.open(0, &mut datagram.clone()), Err(Refused::Unknown));
        for bit in 0..datagram.len() * 8 {
            let mut bad = datagram.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(opener.open(0, &mut bad).is_err(), "bit {bit}");
        }
        for length in 0..datagram.len() {
            assert!(opener.open(0, &mut datagram[..length].to_vec()).is_err());
        }
        // None of that moved the window.
        assert!(opener.open(0, &mut datagram.clone()).is_ok());
        assert!(Keys::decode(&keys.encode()[1..]).is_none());
    }

    proptest! {
        #[test]
        fn window_is_the_set_it_stands_for(steps in proptest::collection::vec(0_u64..6000, 1..400)) {
            let mut window = Window::default();
            let mut seen = BTreeSet::new();
            for counter in steps {
                let end = seen.last().map_or(0, |highest: &u64| highest + 1);
                let fits = counter >= end || counter + Window::BITS >= end;
                prop_assert_eq!(window.is_new(counter), fits && !seen.contains(&counter), "{}", counter);
                if window.is_new(counter) {
                    window.mark(counter);
                    seen.insert(counter);
                }
            }
        }

        #[test]
        fn any_bytes_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(ends().2.open(0, &mut bytes).is_err());
        }
    }
}

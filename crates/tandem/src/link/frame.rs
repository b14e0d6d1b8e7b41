//! How frames are cut into records of the stream, and put together again. Pure.
//!
//! A record on the wire is `length:u16 (big endian) ‖ Noise ciphertext`; the plaintext is
//! `kind:u8 ‖ bytes`. A frame is any number of [`Kind::Part`] and one [`Kind::End`].

use zeroize::{Zeroize, Zeroizing};

/// The largest frame, in bytes: what the pair protocol allows.
pub(crate) const FRAME_MAX: usize = ha::config::FRAME_MAX;

/// Plaintext bytes of a frame in one record. Small enough that a long frame does not make an
/// urgent one of the other direction wait, large enough that sealing costs nothing.
pub(crate) const CHUNK: usize = 32 << 10;

/// Largest record body that is accepted: kind, chunk, tag.
pub(crate) const RECORD_MAX: usize = 1 + CHUNK + 16;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Fresh keys for datagrams; the first record each way and only that.
    Keys,
    /// A frame goes on in the next record.
    Part,
    /// A frame ends here.
    End,
    /// The sender leaves on purpose.
    Goodbye,
}

impl Kind {
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Keys => 0,
            Self::Part => 1,
            Self::End => 2,
            Self::Goodbye => 3,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Keys,
            1 => Self::Part,
            2 => Self::End,
            3 => Self::Goodbye,
            _ => return None,
        })
    }
}

/// The chunks of a frame in order, each with its kind; an empty frame is one empty end.
pub(crate) fn chunks(frame: &[u8]) -> impl Iterator<Item = (Kind, &[u8])> {
    let last = frame.len().div_ceil(CHUNK).max(1) - 1;
    (0..=last).map(move |i| {
        let rest = frame.get(i * CHUNK..).unwrap_or_default();
        let chunk = rest.get(..CHUNK).unwrap_or(rest);
        (if i == last { Kind::End } else { Kind::Part }, chunk)
    })
}

/// Puts frames together. Holds at most [`FRAME_MAX`] bytes, which may be keys: wiped.
#[derive(Default)]
pub(crate) struct Assembler {
    partial: Zeroizing<Vec<u8>>,
}

/// A frame above [`FRAME_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

impl Assembler {
    /// Takes a chunk; gives the frame that it completes.
    pub(crate) fn push(
        &mut self,
        last: bool,
        chunk: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, TooLong> {
        if self.partial.len() + chunk.len() > FRAME_MAX {
            return Err(TooLong);
        }
        // Growing moves the bytes: the old place must be wiped by hand.
        if self.partial.capacity() - self.partial.len() < chunk.len() {
            let wanted = (self.partial.len() + chunk.len()).next_power_of_two();
            let mut larger = Zeroizing::new(Vec::with_capacity(wanted));
            larger.extend_from_slice(&self.partial);
            self.partial.zeroize();
            self.partial = larger;
        }
        self.partial.extend_from_slice(chunk);
        Ok(last.then(|| std::mem::take(&mut self.partial)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn through(frame: &[u8]) -> Vec<u8> {
        let mut assembler = Assembler::default();
        let mut whole = None;
        for (kind, chunk) in chunks(frame) {
            assert_eq!(whole, None, "nothing after the end");
            assert!(chunk.len() <= CHUNK);
            whole = assembler.push(kind == Kind::End, chunk).unwrap();
        }
        whole.unwrap().to_vec()
    }

    #[test]
    fn frames_of_border_sizes_come_through() {
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, FRAME_MAX] {
            let frame: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            assert_eq!(through(&frame), frame);
            assert_eq!(chunks(&frame).count(), length.div_ceil(CHUNK).max(1));
        }
    }

    #[test]
    fn too_long_is_refused_before_it_is_held() {
        let mut assembler = Assembler::default();
        for _ in 0..FRAME_MAX / CHUNK {
            assert_eq!(assembler.push(false, &[0; CHUNK]), Ok(None));
        }
        assert_eq!(assembler.push(true, &[0]), Err(TooLong));
        assert!(assembler.partial.len() <= FRAME_MAX);
    }

    proptest! {
        #[test]
        fn any_frame_comes_through(frame in proptest::collection::vec(any::<u8>(), 0..3 * CHUNK)) {
            prop_assert_eq!(through(&frame), frame);
        }

        #[test]
        fn kinds_are_one_to_one(byte in any::<u8>()) {
            prop_assert!(Kind::from_byte(byte).is_none_or(|kind| kind.byte() == byte));
        }
    }
}

//! The stream's handshake and encryption: `Noise_NNpsk0_25519_AESGCM_SHA256`, the pair secret as
//! its pre-shared key. Pure: bytes in, bytes out (randomness is the operating system's).
//!
//! ```text
//!  lower index                     higher index
//!      │ ── psk, e, {version, index} ──► │   a wrong secret fails here
//!      │ ◄── e, ee, {version, index} ─── │
//!      │ ══ Keys ══════════════════════► │   now the stream counts for the higher …
//!      │ ◄═════════════════════ Keys ═══ │   … and now for the lower
//! ```
//! Nothing is parsed before its tag verified. A replayed first message gets an answer that its
//! sender cannot use, and changes nothing.

use ring::hkdf;
use snow::{Builder, HandshakeState, StatelessTransportState};
use zeroize::Zeroizing;

/// Version of the transport below the pair protocol; the pair protocol negotiates its own.
const VERSION: u8 = 1;

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
const PROLOGUE: &[u8] = b"tandem pair link 1";

/// Bytes of each handshake message: ephemeral key, two bytes, tag.
pub(crate) const MESSAGE_LEN: usize = 32 + 2 + 16;

/// Bytes that encryption adds to a record.
const TAG: usize = 16;

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The tag does not verify: another secret, or bytes of something else.
    #[error("it does not hold our pair secret")]
    NotAuthentic,
    /// The other's transport is of another version.
    #[error("it speaks version {0} of the pair link, we speak {VERSION}")]
    Version(u8),
    /// Both claim the same index.
    #[error("it has index {0} like this instance: give one of them index 0, the other 1")]
    EqualIndex(u8),
    /// The library refused; a bug of ours.
    #[error("internal error in the handshake")]
    Internal,
}

/// The pre-shared key, derived from whatever bytes the secret file holds.
pub(crate) fn derive_psk(secret: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut psk = Zeroizing::new([0; 32]);
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, PROLOGUE).extract(secret);
    // Filling the length that the algorithm asks for cannot fail.
    let filled =
        prk.expand(&[b"noise psk"], hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut psk[..]));
    debug_assert!(filled.is_ok());
    psk
}

/// The connecting side, between its message and the answer.
pub(crate) struct Initiator {
    state: HandshakeState,
    index: u8,
}

impl Initiator {
    /// Starts a handshake; gives the first message.
    pub(crate) fn start(
        psk: &[u8; 32],
        index: u8,
    ) -> Result<(Self, [u8; MESSAGE_LEN]), HandshakeError> {
        let mut state = builder(psk)?.build_initiator().map_err(|_| HandshakeError::Internal)?;
        let message = write(&mut state, index)?;
        Ok((Self { state, index }, message))
    }

    /// Takes the answer.
    pub(crate) fn finish(mut self, answer: &[u8; MESSAGE_LEN]) -> Result<Session, HandshakeError> {
        read(&mut self.state, answer, self.index)?;
        Session::new(self.state)
    }
}

/// The accepting side: takes the first message, gives the answer and the session.
pub(crate) fn respond(
    psk: &[u8; 32],
    index: u8,
    message: &[u8; MESSAGE_LEN],
) -> Result<([u8; MESSAGE_LEN], Session), HandshakeError> {
    let mut state = builder(psk)?.build_responder().map_err(|_| HandshakeError::Internal)?;
    read(&mut state, message, index)?;
    let answer = write(&mut state, index)?;
    Ok((answer, Session::new(state)?))
}

fn builder(psk: &[u8; 32]) -> Result<Builder<'_>, HandshakeError> {
    let pattern = PATTERN.parse().map_err(|_| HandshakeError::Internal)?;
    Ok(Builder::new(pattern).prologue(PROLOGUE).psk(0, psk))
}

fn write(state: &mut HandshakeState, index: u8) -> Result<[u8; MESSAGE_LEN], HandshakeError> {
    let mut message = [0; MESSAGE_LEN];
    match state.write_message(&[VERSION, index], &mut message) {
        Ok(MESSAGE_LEN) => Ok(message),
        _ => Err(HandshakeError::Internal),
    }
}

fn read(
    state: &mut HandshakeState,
    message: &[u8; MESSAGE_LEN],
    own: u8,
) -> Result<(), HandshakeError> {
    let mut payload = [0; MESSAGE_LEN];
    let length =
        state.read_message(message, &mut payload).map_err(|_| HandshakeError::NotAuthentic)?;
    match payload.get(..length) {
        Some([VERSION, index]) if *index != own => Ok(()),
        Some([VERSION, index]) => Err(HandshakeError::EqualIndex(*index)),
        Some([version, ..]) => Err(HandshakeError::Version(*version)),
        _ => Err(HandshakeError::NotAuthentic),
    }
}

/// An authenticated stream's keys. Each direction counts its own records.
pub(crate) struct Session {
    state: StatelessTransportState,
}

/// A record that does not verify, or the counter is used up: the stream is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken;

impl Session {
    fn new(state: HandshakeState) -> Result<Self, HandshakeError> {
        let state = state.into_stateless_transport_mode().map_err(|_| HandshakeError::Internal)?;
        Ok(Self { state })
    }

    /// Appends record number `counter` (length and ciphertext) with this plaintext to `out`.
    /// Each number is used once; at most [`super::frame::RECORD_MAX`] bytes result.
    pub(crate) fn seal(&self, counter: u64, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        let length = plain.len() + TAG;
        let start = out.len();
        out.extend_from_slice(&u16::try_from(length).map_err(|_| Broken)?.to_be_bytes());
        out.resize(start + 2 + length, 0);
        let place = out.get_mut(start + 2..).ok_or(Broken)?;
        match self.state.write_message(counter, plain, place) {
            Ok(written) if written == length => Ok(()),
            _ => Err(Broken),
        }
    }

    /// Opens the body of record number `counter` into `plain`, which is wiped by its owner.
    pub(crate) fn open(
        &self,
        counter: u64,
        body: &[u8],
        plain: &mut Zeroizing<Vec<u8>>,
    ) -> Result<(), Broken> {
        plain.resize(body.len(), 0);
        let length = self.state.read_message(counter, body, plain).map_err(|_| Broken)?;
        plain.truncate(length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(left: &[u8], right: &[u8]) -> Result<(Session, Session), HandshakeError> {
        let (initiator, first) = Initiator::start(&derive_psk(left), 0)?;
        let (second, responder) = respond(&derive_psk(right), 1, &first)?;
        Ok((initiator.finish(&second)?, responder))
    }

    #[test]
    fn equal_secrets_agree_and_others_do_not() {
        let (left, right) = pair(b"secret", b"secret").unwrap();
        let mut wire = Vec::new();
        let mut plain = Zeroizing::new(Vec::new());
        left.seal(0, b"one", &mut wire).unwrap();
        assert_eq!(wire[..2], [0, 3 + 16]);
        right.open(0, &wire[2..], &mut plain).unwrap();
        assert_eq!(plain[..], *b"one");
        // A record out of its place, from the wrong side or changed is refused.
        assert_eq!(right.open(1, &wire[2..], &mut plain), Err(Broken));
        assert_eq!(left.open(0, &wire[2..], &mut plain), Err(Broken));
        wire[4] ^= 1;
        assert_eq!(right.open(0, &wire[2..], &mut plain), Err(Broken));
        assert_eq!(pair(b"secret", b"secreT").err(), Some(HandshakeError::NotAuthentic));
    }

    #[test]
    fn equal_indices_are_named_only_to_who_holds_the_secret() {
        let psk = derive_psk(b"secret");
        let (_, first) = Initiator::start(&psk, 1).unwrap();
        assert_eq!(respond(&psk, 1, &first).err(), Some(HandshakeError::EqualIndex(1)));
        assert_eq!(
            respond(&derive_psk(b"other"), 1, &first).err(),
            Some(HandshakeError::NotAuthentic)
        );
    }

    #[test]
    fn a_replayed_first_message_gives_a_session_that_only_the_first_sender_could_use() {
        let psk = derive_psk(b"secret");
        let (initiator, first) = Initiator::start(&psk, 0).unwrap();
        let (second, _) = respond(&psk, 1, &first).unwrap();
        let (_, replayed) = respond(&psk, 1, &first).unwrap();
        let session = initiator.finish(&second).unwrap();
        let mut wire = Vec::new();
        session.seal(0, b"keys", &mut wire).unwrap();
        assert_eq!(replayed.open(0, &wire[2..], &mut Zeroizing::new(Vec::new())), Err(Broken));
    }

    // An independent HKDF (Python's hmac): salt "tandem pair link 1", secret "secret".
    #[test]
    fn the_psk_is_hkdf_of_the_secret() {
        let hex: String = derive_psk(b"secret").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "795e465c9c485621995ede3b2efa8e732b19f7232b270c6e810c36e4dbf0f22c");
    }
}

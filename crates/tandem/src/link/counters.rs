//! What the link dropped and why, and warnings that do not flood the log.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::datagram::Refused;
use super::noise::HandshakeError;

/// At most one warning of a kind in this time.
const WARN_EVERY: Duration = Duration::from_secs(60);

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Live counters, shared by the link's tasks.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)*
            warned: Mutex<[Warned; 3]>,
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Authentic heartbeats.
    heartbeats,
    /// Authentic steered packets.
    steered,
    /// Datagrams from another address than the other instance's.
    strangers,
    /// Datagrams too short to be ours.
    short,
    /// Datagrams of no known purpose.
    unknown,
    /// Datagrams under another key, of an earlier stream mostly.
    other_key,
    /// Datagrams whose tag does not verify.
    forged,
    /// Datagrams seen before.
    replayed,
    /// Handshakes by somebody with another secret, version or our own index.
    refused_handshakes,
    /// Handshakes that ended early or timed out.
    broken_handshakes,
    /// Connections that the other accepted and ended during the handshake.
    hang_ups,
    /// Streams that stood.
    streams,
    /// Streams ended because a record did not verify or made no sense.
    broken_streams,
    /// Warnings written to the log.
    warnings,
}

impl Snapshot {
    /// What was dropped or refused, by reason; reasons that never occurred are left out.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("strangers", self.strangers),
            ("short", self.short),
            ("unknown", self.unknown),
            ("other_key", self.other_key),
            ("forged", self.forged),
            ("replayed", self.replayed),
            ("refused_handshakes", self.refused_handshakes),
            ("broken_handshakes", self.broken_handshakes),
            ("broken_streams", self.broken_streams),
        ]
        .into_iter()
        .filter(|(_, n)| *n > 0)
    }
}

/// One kind of warning's memory.
#[derive(Debug, Default, Clone, Copy)]
struct Warned {
    last: Option<Instant>,
    suppressed: u64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, refused: Refused) {
        Self::add(match refused {
            Refused::Short => &self.short,
            Refused::Unknown => &self.unknown,
            Refused::OtherKey => &self.other_key,
            Refused::Forged => &self.forged,
            Refused::Replayed => &self.replayed,
        });
    }

    /// Counts a refused handshake and warns, at most once a minute for each kind.
    pub(crate) fn refuse_handshake(&self, from: IpAddr, error: HandshakeError) {
        Self::add(&self.refused_handshakes);
        let kind = match error {
            HandshakeError::NotAuthentic | HandshakeError::Internal => 0,
            HandshakeError::Version(_) => 1,
            HandshakeError::EqualIndex(_) => 2,
        };
        if let Some(suppressed) = self.may_warn(kind) {
            match error {
                HandshakeError::NotAuthentic => tracing::warn!(
                    %from, suppressed,
                    "pair link refused: {error}; copy the file of [pair] secret_file from one host to the other"
                ),
                _ => tracing::warn!(%from, suppressed, "pair link refused: {error}"),
            }
        }
    }

    /// Warns that the other side hung up during the handshake, which is how its refusal looks.
    pub(crate) fn refused_by_other(&self, from: IpAddr) {
        if let Some(suppressed) = self.may_warn(0) {
            tracing::warn!(
                %from, suppressed,
                "the other instance hangs up when we connect: see its log; most likely the files of [pair] secret_file differ"
            );
        }
    }

    fn may_warn(&self, kind: usize) -> Option<u64> {
        let mut warned = super::lock(&self.warned);
        let entry = warned.get_mut(kind)?;
        if entry.last.is_some_and(|last| last.elapsed() < WARN_EVERY) {
            entry.suppressed += 1;
            return None;
        }
        entry.last = Some(Instant::now());
        Self::add(&self.warnings);
        Some(std::mem::take(&mut entry.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn one_warning_a_minute_for_each_kind() {
        let counters = Counters::default();
        let from = IpAddr::from([192, 0, 2, 1]);
        for _ in 0..100 {
            counters.refuse_handshake(from, HandshakeError::NotAuthentic);
            counters.refuse_handshake(from, HandshakeError::EqualIndex(1));
            tokio::time::advance(Duration::from_millis(500)).await;
        }
        let snapshot = counters.snapshot();
        assert_eq!((snapshot.refused_handshakes, snapshot.warnings), (200, 2));
        tokio::time::advance(Duration::from_secs(20)).await;
        counters.refuse_handshake(from, HandshakeError::NotAuthentic);
        assert_eq!(counters.snapshot().warnings, 3);
    }
}

//! Receiving: recvmmsg with UDP_GRO into memory of the socket's, and dealing out what it brought.

use std::ops::Range;

use super::{BatchSocket, RecvMeta};

/// Runs of datagrams in one recvmmsg.
const RUNS: usize = 32;

/// Room for one run: the largest UDP datagram there is.
const RUN_ROOM: usize = 1 << 16;

/// One received run: datagrams of `size` bytes, the last perhaps shorter.
#[derive(Clone, Copy)]
struct Received {
    meta: RecvMeta,
    size: usize,
}

/// What one recvmmsg brought, and how far it was dealt out. Its memory is allocated once; pages that no run ever
/// reached stay untouched.
pub(super) struct Incoming {
    room: Box<[u8]>,
    runs: [Received; RUNS],
    count: usize,
    next: usize,
    /// Into the run at `next`.
    offset: usize,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} of {} runs dealt)", self.next, self.count)
    }
}

impl Incoming {
    pub(super) fn new() -> Self {
        let none = Received { meta: RecvMeta::EMPTY, size: 0 };
        Self {
            room: vec![0; RUNS * RUN_ROOM].into_boxed_slice(),
            runs: [none; RUNS],
            count: 0,
            next: 0,
            offset: 0,
        }
    }

    /// Where the next datagram lies in `room`.
    fn advance(&mut self) -> Option<(Range<usize>, RecvMeta)> {
        if self.next >= self.count {
            return None;
        }
        let Received { meta, size } = *self.runs.get(self.next)?;
        let (start, length) = (self.next * RUN_ROOM, meta.len.min(RUN_ROOM));
        let end = self.offset.saturating_add(size).min(length);
        let place = start + self.offset..start + end;
        if end >= length {
            self.next += 1;
            self.offset = 0;
        } else {
            self.offset = end;
        }
        Some((place, meta))
    }

    /// The next datagram.
    fn next(&mut self) -> Option<(&[u8], RecvMeta)> {
        let (place, meta) = self.advance()?;
        Some((self.room.get(place)?, meta))
    }
}

impl BatchSocket {
    /// Receives up to `min(buffers, metas)` datagrams, the i-th into the i-th buffer and described by
    /// `metas[i]`. 0 when nothing is there. Never blocks, never allocates. Pending errors of the socket are
    /// counted, not returned. What did not find a buffer comes with the next call: see [`BatchSocket::has_more`].
    pub fn recv<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
    ) -> usize {
        self.deal(buffers, metas, None::<&mut fn(RecvMeta, &[u8])>)
    }

    /// Like [`BatchSocket::recv`], but a datagram longer than the buffer that would be its own is not cut: `long` sees
    /// it whole (in memory of the socket's), and the buffer takes the next. Long IKE messages among ESP packets.
    pub fn recv_or_give<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
        mut long: impl FnMut(RecvMeta, &[u8]),
    ) -> usize {
        self.deal(buffers, metas, Some(&mut long))
    }

    fn deal<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
        mut long: Option<&mut impl FnMut(RecvMeta, &[u8])>,
    ) -> usize {
        if !self.has_more() {
            self.receive();
        }
        let mut dealt = 0;
        for (buffer, meta) in buffers.zip(metas) {
            let mut next = self.incoming.next();
            while let (Some((bytes, of)), Some(give)) = (next, &mut long)
                && bytes.len() > buffer.len()
                && !of.truncated
            {
                give(RecvMeta { len: bytes.len(), ..of }, bytes);
                next = self.incoming.next();
            }
            let Some((bytes, of)) = next else { break };
            let room = buffer.len().min(bytes.len());
            if let (Some(to), Some(from)) = (buffer.get_mut(..room), bytes.get(..room)) {
                to.copy_from_slice(from);
            }
            *meta = RecvMeta { len: room, truncated: of.truncated || room < bytes.len(), ..of };
            dealt += 1;
        }
        dealt
    }

    /// Whether datagrams were received that no call of [`BatchSocket::recv`] has handed out yet: the descriptor
    /// does not become readable for them.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.incoming.next < self.incoming.count
    }

    /// Receives what is there, up to some runs, if nothing is left of the last time: [`BatchSocket::take`] deals it
    /// out. Never blocks, never allocates.
    pub fn refill(&mut self) {
        if !self.has_more() {
            self.receive();
        }
    }

    /// The next datagram that was received, whole, in memory of the socket's: for who works on it in place. `None`
    /// when all were taken.
    pub fn take(&mut self) -> Option<(RecvMeta, &mut [u8])> {
        let (place, of) = self.incoming.advance()?;
        let bytes = self.incoming.room.get_mut(place)?;
        Some((RecvMeta { len: bytes.len(), ..of }, bytes))
    }

    /// One recvmmsg into the buffers of `incoming`.
    fn receive(&mut self) {
        let Incoming { room, runs, count, next, offset } = &mut self.incoming;
        (*count, *next, *offset) = (0, 0, 0);
        let rooms = room.chunks_exact_mut(RUN_ROOM);
        let got = self.batcher.receive(&self.socket, rooms, |i, meta, size, _| {
            if let Some(run) = runs.get_mut(i) {
                let tos = if self.recv_tos { meta.tos } else { 0 };
                let size = if size == 0 { meta.len } else { size };
                *run = Received { meta: RecvMeta { tos, ..meta }, size };
            }
        });
        match got {
            Ok(got) => *count = got,
            Err(_) => self.receive_errors += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever lengths and segment sizes the kernel names: all that was received is dealt out, once and in order.
        #[test]
        fn every_byte_is_dealt_once(
            list in proptest::collection::vec((0..=RUN_ROOM + 9, 0_usize..3000), 0..=RUNS),
        ) {
            let mut incoming = Incoming::new();
            incoming.count = list.len();
            for ((len, size), run) in list.iter().zip(&mut incoming.runs) {
                let size = if *size == 0 { *len } else { *size };
                *run = Received { meta: RecvMeta { len: *len, ..RecvMeta::EMPTY }, size };
            }
            let mut at = (0, 0);
            while let Some((place, _)) = incoming.advance() {
                let (run, from) = (place.start / RUN_ROOM, place.start % RUN_ROOM);
                if run != at.0 && from == 0 && !place.is_empty() {
                    at = (run, 0);
                }
                prop_assert_eq!((run, from), (at.0, at.1 % RUN_ROOM), "{:?}", place);
                prop_assert!(incoming.room.get(place.clone()).is_some());
                let most = if list[run].1 == 0 { RUN_ROOM } else { list[run].1 };
                prop_assert!(place.len() <= most);
                at.1 += place.len();
                if at.1 == list[run].0.min(RUN_ROOM) {
                    at = (run + 1, 0);
                }
            }
            prop_assert_eq!(incoming.next, list.len());
        }
    }
}

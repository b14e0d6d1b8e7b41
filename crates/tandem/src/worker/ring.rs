//! Packets from one worker to another, in parcels: batches of slots that were allocated once and circulate.
//!
//! ```text
//!   sender                                     receiver
//!   free ──put: slots are swapped──► filling ──dispatch, one wake for all───► arrived ──► judged in place
//!    ▲                                                                                        │
//!    └──────────────────────────── returned ◄──────────────── give_back ◄────────────────────┘
//! ```
//! No lock, no allocation, nobody waits: a sender has [`PARCELS`], and when those for a receiver are all on their way,
//! what is to follow is dropped. Parcels of one sender arrive in the order in which they left.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use esp::{Batch, Slot};
use netio::wake::EventFd;

/// Packets in a parcel. A batch of one takes a whole one, so that they must be many rather than large.
const PARCEL: usize = 16;

/// Parcels of one sender: 4 MB with slots for an Ethernet's packets.
const PARCELS: usize = 128;

/// Packets on their way.
pub(super) struct Parcel {
    from: usize,
    to: usize,
    /// How many commands the sender had obeyed: the receiver obeys as many before it judges.
    pub(super) heard: u64,
    /// The packets.
    pub(super) batch: Batch,
}

/// One worker's end.
pub(super) struct Ring {
    free: Vec<Parcel>,
    /// Parcels that are not free, by receiver.
    lent: Box<[usize]>,
    /// Most of these that one receiver may have.
    share: usize,
    filling: Box<[Option<Parcel>]>,
    /// Whose parcels left since they were woken.
    sent: Box<[bool]>,
    workers: Box<[Door]>,
    arrived: Receiver<Parcel>,
    returned: Receiver<Parcel>,
    event: EventFd,
}

/// Where parcels for a worker are left.
#[derive(Clone)]
struct Door {
    parcels: SyncSender<Parcel>,
    empties: SyncSender<Parcel>,
    event: EventFd,
}

impl Ring {
    /// One end for each worker.
    pub(super) fn new(workers: usize, slot_len: usize) -> io::Result<Vec<Self>> {
        let mut doors = Vec::new();
        let mut inner = Vec::new();
        for _ in 0..workers {
            // All there are fit.
            let (parcels, arrived) = sync_channel(PARCELS * workers);
            let (empties, returned) = sync_channel(PARCELS);
            let event = EventFd::new()?;
            doors.push(Door { parcels, empties, event: event.clone() });
            inner.push((arrived, returned, event));
        }
        let end = |(from, (arrived, returned, event))| {
            let parcel = |_| {
                let batch = Batch::new(PARCEL, slot_len);
                Parcel { from, to: from, heard: 0, batch }
            };
            Self {
                free: (0..PARCELS).map(parcel).collect(),
                lent: vec![0; workers].into_boxed_slice(),
                // A receiver that is slow does not keep them all from the others.
                share: if workers > 2 { PARCELS / 2 } else { PARCELS },
                filling: (0..workers).map(|_| None).collect(),
                sent: vec![false; workers].into_boxed_slice(),
                workers: doors.clone().into_boxed_slice(),
                arrived,
                returned,
                event,
            }
        };
        Ok(inner.into_iter().enumerate().map(end).collect())
    }

    /// Set when a parcel has arrived.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Takes the packet for another worker and leaves an empty slot; [`Ring::dispatch`] follows. False when there is no
    /// parcel for it.
    pub(super) fn put(&mut self, worker: u8, heard: u64, slot: &mut Slot) -> bool {
        let to = usize::from(worker);
        if self.filling.get(to).is_some_and(|parcel| parcel.as_ref().is_some_and(is_full)) {
            self.send(to, heard);
        }
        if self.filling.get(to).is_some_and(Option::is_none) {
            let parcel = self.free_parcel(to);
            if let Some(place) = self.filling.get_mut(to) {
                *place = parcel;
            }
        }
        let Some(Some(parcel)) = self.filling.get_mut(to) else { return false };
        let Some(free) = parcel.batch.push() else { return false };
        std::mem::swap(free, slot);
        true
    }

    /// Sends what was put, by someone who has obeyed so many commands.
    pub(super) fn dispatch(&mut self, heard: u64) {
        for to in 0..self.filling.len() {
            self.send(to, heard);
            if self.sent.get_mut(to).is_some_and(std::mem::take)
                && let Some(door) = self.workers.get(to)
            {
                door.event.set();
            }
        }
    }

    fn send(&mut self, to: usize, heard: u64) {
        let Some(mut parcel) = self.filling.get_mut(to).and_then(Option::take) else { return };
        parcel.heard = heard;
        // It has room for all parcels. If its worker is gone, the process ends.
        if let (Some(door), Some(sent)) = (self.workers.get(to), self.sent.get_mut(to)) {
            *sent |= door.parcels.try_send(parcel).is_ok();
        }
    }

    fn free_parcel(&mut self, to: usize) -> Option<Parcel> {
        while let Ok(parcel) = self.returned.try_recv() {
            if let Some(lent) = self.lent.get_mut(parcel.to) {
                *lent -= 1;
            }
            self.free.push(parcel);
        }
        let lent = self.lent.get_mut(to).filter(|lent| **lent < self.share)?;
        let mut parcel = self.free.pop()?;
        *lent += 1;
        parcel.to = to;
        Some(parcel)
    }

    /// The next parcel that has arrived. Clear the event before, not after.
    pub(super) fn next(&mut self) -> Option<Parcel> {
        self.arrived.try_recv().ok()
    }

    /// Gives a parcel back to its sender.
    pub(super) fn give_back(&self, mut parcel: Parcel) {
        parcel.batch.clear();
        if let Some(door) = self.workers.get(parcel.from) {
            let _ = door.empties.try_send(parcel);
        }
    }
}

fn is_full(parcel: &Parcel) -> bool {
    parcel.batch.is_full()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u32) -> Slot {
        let mut slot = Slot::new(256);
        assert!(slot.fill(&number.to_be_bytes()));
        slot
    }

    fn number(slot: &Slot) -> u32 {
        u32::from_be_bytes(slot.packet().try_into().unwrap())
    }

    #[test]
    fn parcels_keep_order_and_are_bounded() {
        let mut ends = Ring::new(2, 256).unwrap();
        let (mut there, mut here) = (ends.pop().unwrap(), ends.pop().unwrap());
        let room = (PARCELS * PARCEL) as u32;
        let mut next = 0;
        for round in 0..3_u64 {
            let first = next;
            let refused = loop {
                let mut slot = slot(next);
                if !here.put(1, round, &mut slot) {
                    break slot;
                }
                assert!(slot.packet().is_empty(), "an empty slot is left");
                next += 1;
            };
            assert_eq!(next - first, room, "all parcels, and no more");
            // What found no room is still there, for whoever counts it.
            assert_eq!(number(&refused), next);
            here.dispatch(round);
            assert!(there.event().clear());
            let mut expect = first;
            while let Some(parcel) = there.next() {
                assert_eq!(parcel.heard, round);
                for slot in parcel.batch.slots() {
                    assert_eq!(number(slot), expect);
                    expect += 1;
                }
                there.give_back(parcel);
            }
            assert_eq!(expect, next);
        }
    }

    #[test]
    fn one_slow_worker_leaves_room_for_the_others() {
        let mut ends = Ring::new(3, 256).unwrap();
        let mut fill = |to| {
            let mut count = 0;
            while ends[0].put(to, 0, &mut slot(count)) {
                count += 1;
            }
            ends[0].dispatch(0);
            count as usize
        };
        assert_eq!(fill(1), PARCELS / 2 * PARCEL);
        assert_eq!(fill(2), PARCELS / 2 * PARCEL);
        let parcel = ends[2].next().unwrap();
        ends[2].give_back(parcel);
        assert!(!ends[0].put(1, 0, &mut slot(0)), "it has its share");
        assert!(ends[0].put(2, 0, &mut slot(0)));
    }

    #[test]
    fn a_wake_is_enough_for_a_parcel() {
        let mut ends = Ring::new(2, 256).unwrap();
        let (mut there, mut here) = (ends.pop().unwrap(), ends.pop().unwrap());
        let reader = std::thread::spawn(move || {
            let mut expect = 0;
            while expect < 20_000 {
                assert!(netio::udp::wait_readable(there.event(), 5_000).unwrap(), "at {expect}");
                there.event().clear();
                while let Some(parcel) = there.next() {
                    for slot in parcel.batch.slots() {
                        assert_eq!(number(slot), expect);
                        expect += 1;
                    }
                    there.give_back(parcel);
                }
            }
        });
        let mut sent = 0;
        while sent < 20_000 {
            let mut slot = slot(sent);
            if here.put(1, 0, &mut slot) {
                sent += 1;
                if sent % 7 == 0 || sent == 20_000 {
                    here.dispatch(0);
                }
            } else {
                assert!(!reader.is_finished(), "at {sent}");
                std::thread::yield_now();
            }
        }
        reader.join().unwrap();
    }
}

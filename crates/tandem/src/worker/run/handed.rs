//! What passes between the workers.

use esp::{Batch, Verdict};
use netio::clock::boottime;

use super::super::counters::add;
use super::{Flow, Io, State};

/// Parcels taken before the worker looks at its own sockets again.
const TURN: usize = 32;

impl State {
    /// Judges and writes what other workers have handed over.
    pub(super) fn read_handed(&mut self) -> Flow {
        let Some(ring) = &self.io.ring else { return Flow::Go };
        ring.event().clear();
        for _ in 0..TURN {
            let next = self.early.take().or_else(|| self.io.ring.as_mut()?.next());
            let Some(mut parcel) = next else { return Flow::Go };
            // Whoever handed it over has obeyed commands that may not have been looked at here, or stand in this queue
            // a moment later: those come first. Then nothing is judged by less than was known before.
            if self.obey() == Flow::Stop {
                return Flow::Stop;
            }
            if parcel.heard > self.io.heard {
                // The command wakes this worker.
                self.early = Some(parcel);
                return Flow::Go;
            }
            add(&self.io.counters.handed_in, parcel.batch.len() as u64);
            self.io.read_fences(&mut self.fences);
            self.shard.handed(boottime(), &self.fences, &mut parcel.batch);
            self.io.write(&mut parcel.batch, &mut self.sockets);
            if let Some(ring) = &self.io.ring {
                ring.give_back(parcel);
            }
        }
        if let Some(ring) = &self.io.ring {
            ring.event().set();
        }
        Flow::Go
    }

    /// Whether a parcel that came too early can be judged now.
    pub(super) fn is_late(&self) -> bool {
        self.early.as_ref().is_some_and(|parcel| parcel.heard <= self.io.heard)
    }
}

#[cfg(test)]
impl State {
    pub(in super::super) fn obey_now(&mut self) {
        assert!(self.obey() == Flow::Go);
    }

    pub(in super::super) fn read_tun_now(&mut self) {
        assert!(netio::udp::wait_readable(&*self.io.tun, 2000).unwrap());
        self.read_tun().unwrap();
    }

    pub(in super::super) fn read_handed_now(&mut self) {
        assert!(self.read_handed() == Flow::Go);
    }
}

impl Io {
    /// Hands packets of a judged batch to other workers.
    pub(super) fn hand_on(&mut self, batch: &mut Batch) {
        let Some(ring) = &mut self.ring else { return };
        let (mut handed, mut lost) = (0, 0);
        for slot in batch.slots_mut() {
            if let Verdict::Hand { worker } = slot.verdict() {
                if ring.put(worker, self.heard, slot) {
                    handed += 1;
                } else {
                    lost += 1;
                }
            }
        }
        if handed > 0 {
            ring.dispatch(self.heard);
        }
        add(&self.counters.handed, handed);
        add(&self.counters.hand_lost, lost);
    }
}

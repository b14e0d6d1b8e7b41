//! An instance's workers as one shard: packets come to any of them and are handed on at once. The lag between workers is
//! for esp's own model of them (`esp/tests/workers.rs`); here they meet everything else.

use std::time::Duration;

use esp::{Batch, Command, CommandError, Config, Crew, Direction, Report, Shard, Verdict};

/// The workers' shards.
pub struct Squad {
    crew: Crew,
    shards: Vec<Shard>,
    /// Who reads next.
    reader: usize,
    /// Where a packet lies between two workers.
    between: Batch,
}

impl Squad {
    /// So many.
    pub fn new(config: Config, workers: u8) -> Self {
        let shard = |worker| Shard::new(Config { worker, workers, ..config });
        Self {
            crew: Crew::new(workers),
            shards: (0..workers).map(shard).collect(),
            reader: 0,
            between: Batch::new(1, config.slot_len),
        }
    }

    /// Switches a deliberate mistake on.
    pub fn set_bug(&mut self, bug: esp::Bug) {
        for shard in &mut self.shards {
            shard.set_bug(bug);
        }
    }

    /// See [`Shard::apply`]: to all.
    pub fn apply(&mut self, command: Command) -> Result<(), CommandError> {
        let mut all = Ok(());
        for (worker, command) in self.crew.give(command) {
            if let Some(shard) = self.shards.get_mut(usize::from(worker)) {
                all = all.and(shard.apply(command));
            }
        }
        all
    }

    /// See [`Shard::outbound`] and [`Shard::inbound`]: by one of them, then by whom it hands to.
    pub fn judge(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch, way: Direction) {
        self.reader = (self.reader + 1) % self.shards.len().max(1);
        if let Some(shard) = self.shards.get_mut(self.reader) {
            match way {
                Direction::Outbound => shard.outbound(now, fences, batch),
                Direction::Inbound => shard.inbound(now, fences, batch),
            }
        }
        self.hand_on(now, fences, batch);
    }

    /// See [`Shard::flush`].
    pub fn flush(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) -> usize {
        for at in 0..self.shards.len() {
            let count = self.shards.get_mut(at).map_or(0, |shard| shard.flush(now, fences, batch));
            if count > 0 {
                self.hand_on(now, fences, batch);
                return count;
            }
        }
        batch.clear();
        0
    }

    fn hand_on(&mut self, now: Duration, fences: &[Duration], batch: &mut Batch) {
        for slot in batch.slots_mut() {
            while let Verdict::Hand { worker } = slot.verdict() {
                self.between.clear();
                if self.between.push().is_none() {
                    return;
                }
                let Some(place) = self.between.slots_mut().first_mut() else { return };
                std::mem::swap(place, slot);
                if let Some(shard) = self.shards.get_mut(usize::from(worker)) {
                    shard.handed(now, fences, &mut self.between);
                }
                let Some(place) = self.between.slots_mut().first_mut() else { return };
                std::mem::swap(place, slot);
            }
        }
    }

    /// See [`Shard::poll_report`]: what all of them say.
    pub fn poll_report(&mut self, now: Duration) -> Option<Report> {
        for (worker, shard) in (0_u8..).zip(&mut self.shards) {
            while let Some(report) = shard.poll_report(now) {
                if let Some(report) = self.crew.take(now, worker, report) {
                    return Some(report);
                }
            }
        }
        None
    }

    /// See [`Shard::next_wakeup`].
    pub fn next_wakeup(&self) -> Option<Duration> {
        self.shards.iter().filter_map(Shard::next_wakeup).min()
    }
}

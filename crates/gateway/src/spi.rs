//! The inbound ESP SPIs of one instance.
//!
//! Every inbound SPI that this instance hands out names its place in a worker's table, so that the lookup of a
//! received datagram is an array index ([`wire::id::SpiLayout`]). The pool never gives a slot out twice while it
//! is in use, and when a slot returns its generation moves on, so that a late datagram for the old SA misses.
//!
//! SPIs that the *other* instance chose carry the other's index bit and live in the other half of every table:
//! a takeover adopts them without translation, and this pool never sees them.

use std::collections::{BTreeMap, VecDeque};

use wire::id::{EspSpi, SpiLayout};

/// Most SAs that this instance may have negotiated at once, per worker (the slot field is 16 bits wide).
const SLOTS_PER_WORKER: u32 = 1 << 16;
/// A boot's first slot is one of this many, so that its SAs seldom meet those of the instance's earlier life where the
/// other instance holds both (after a split). Small, because tables grow up to the highest slot in use.
const STARTS: u64 = 64;
/// Slots between two such starts.
const STRIDE: u64 = 64;
/// Slots rest this long in the free queue, in allocations, before they are used again while fresh ones remain.
const REST: usize = 64;

/// Hands out inbound SPIs; one per gateway.
#[derive(Debug)]
pub(crate) struct SpiPool {
    instance: u8,
    workers: u8,
    next_worker: u8,
    first_generation: u16,
    /// Per worker: the next slot that was never used.
    fresh: Vec<u32>,
    /// Per worker.
    resting: Vec<Resting>,
}

/// Returned places with the generation they will carry next.
#[derive(Debug, Clone, Default)]
struct Resting {
    /// By slot.
    places: BTreeMap<u16, SpiLayout>,
    /// Oldest first, with some that were adopted meanwhile.
    order: VecDeque<SpiLayout>,
}

impl Resting {
    fn push(&mut self, place: SpiLayout) {
        // What was adopted is forgotten in the order now and then, so that this stays cheap for ten thousand.
        if self.order.len() > 2 * (self.places.len() + REST) {
            self.order.retain(|place| self.places.get(&place.slot()) == Some(place));
        }
        self.places.insert(place.slot(), place);
        self.order.push_back(place);
    }

    fn pop(&mut self) -> Option<SpiLayout> {
        loop {
            let place = self.order.pop_front()?;
            if self.places.get(&place.slot()) == Some(&place) {
                return self.places.remove(&place.slot());
            }
        }
    }
}

impl SpiPool {
    /// `seed` spreads the first generation of a boot, so that SAs of an earlier life of this instance are missed
    /// with high probability even before their peers notice.
    pub(crate) fn new(instance: u8, workers: u8, seed: u64) -> Self {
        let count = usize::from(workers.max(1));
        Self {
            instance,
            workers: workers.max(1),
            next_worker: 0,
            first_generation: (seed % u64::from(SpiLayout::MAX_GENERATION)) as u16 + 1,
            fresh: vec![((seed >> 11) % STARTS * STRIDE) as u32; count],
            resting: vec![Resting::default(); count],
        }
    }

    /// How many workers there are.
    pub(crate) fn workers(&self) -> u8 {
        self.workers
    }

    /// An SPI on the workers in turn, or on the one that has `like`; `None` when every slot of every worker is in use.
    pub(crate) fn allocate(&mut self, like: Option<EspSpi>) -> Option<EspSpi> {
        let first = like.and_then(SpiLayout::of).map(|like| like.worker_of(self.workers));
        for turn in 0..self.workers {
            let worker = match first {
                Some(first) => (first + turn) % self.workers,
                None => {
                    let next = self.next_worker;
                    self.next_worker = (next + 1) % self.workers;
                    next
                }
            };
            let index = usize::from(worker);
            let fresh = self.fresh.get_mut(index)?;
            let resting = self.resting.get_mut(index)?;
            let exhausted = *fresh >= SLOTS_PER_WORKER;
            if (resting.places.len() > REST || exhausted)
                && let Some(place) = resting.pop()
            {
                return Some(place.spi());
            }
            if !exhausted {
                let slot = *fresh as u16;
                *fresh += 1;
                return SpiLayout::new(self.instance, self.first_generation, worker, slot)
                    .map(SpiLayout::spi);
            }
        }
        None
    }

    /// Marks an SPI that this instance chose in an earlier life (it came back in a snapshot) as in use.
    pub(crate) fn adopt(&mut self, spi: EspSpi) {
        let Some(place) = self.ours(spi) else { return };
        let index = usize::from(place.worker());
        let (Some(fresh), Some(resting)) = (self.fresh.get_mut(index), self.resting.get_mut(index))
        else {
            return;
        };
        while *fresh <= u32::from(place.slot()) {
            if let Some(skipped) =
                SpiLayout::new(self.instance, self.first_generation, place.worker(), *fresh as u16)
                && *fresh < u32::from(place.slot())
            {
                resting.push(skipped);
            }
            *fresh += 1;
        }
        resting.places.remove(&place.slot());
    }

    /// Returns an SPI; foreign and unknown ones are ignored, so a double release is harmless.
    pub(crate) fn release(&mut self, spi: EspSpi) {
        let Some(place) = self.ours(spi) else { return };
        let index = usize::from(place.worker());
        let (Some(fresh), Some(resting)) = (self.fresh.get(index), self.resting.get_mut(index))
        else {
            return;
        };
        if u32::from(place.slot()) >= *fresh || resting.places.contains_key(&place.slot()) {
            return;
        }
        resting.push(place.next_generation());
    }

    fn ours(&self, spi: EspSpi) -> Option<SpiLayout> {
        SpiLayout::of(spi).filter(|place| place.instance() == self.instance)
    }
}

impl ike::SpiAllocator for SpiPool {
    fn allocate(&mut self, like: Option<EspSpi>) -> Option<EspSpi> {
        SpiPool::allocate(self, like)
    }

    fn release(&mut self, spi: EspSpi) {
        SpiPool::release(self, spi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn place(spi: EspSpi) -> (u8, u16) {
        let layout = SpiLayout::of(spi).unwrap();
        (layout.worker(), layout.slot())
    }

    #[test]
    fn never_hands_out_a_place_twice_and_changes_generation() {
        let mut pool = SpiPool::new(1, 2, 7);
        let mut live = BTreeSet::new();
        let mut ever = BTreeSet::new();
        for round in 0..2_000 {
            let spi = pool.allocate(None).unwrap();
            assert!(!spi.is_reserved(), "RFC 4303 §2.1: 0-255 are reserved");
            assert_eq!(SpiLayout::of(spi).unwrap().instance(), 1);
            assert!(live.insert(place(spi)), "a place in use was handed out again");
            assert!(ever.insert(spi), "an SPI came back while its generation is fresh");
            if round % 3 != 0 {
                pool.release(spi);
                pool.release(spi);
                live.remove(&place(spi));
            }
        }
    }

    #[test]
    fn workers_take_turns_and_the_sas_of_a_tunnel_stay_together() {
        let mut pool = SpiPool::new(0, 3, 9);
        let first: Vec<EspSpi> = (0..6).map(|_| pool.allocate(None).unwrap()).collect();
        assert_eq!(first.iter().map(|spi| place(*spi).0).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
        for _ in 0..4 {
            assert_eq!(place(pool.allocate(Some(first[4])).unwrap()).0, 1);
        }
        // Chosen by an instance with more workers: ours by the rest of the division.
        let theirs = SpiLayout::new(1, 5, 8, 0).unwrap().spi();
        assert_eq!(place(pool.allocate(Some(theirs)).unwrap()).0, 2);
        assert_eq!(place(pool.allocate(None).unwrap()).0, 0, "their turn goes on");
        // A worker that is full sends its tunnels' SAs elsewhere.
        while place(pool.allocate(Some(first[0])).unwrap()).0 == 0 {}
        assert_eq!(place(pool.allocate(Some(first[0])).unwrap()).0, 1);
    }

    // An earlier life may have had more workers; what it chose is nobody's to give out.
    #[test]
    fn workers_of_an_earlier_life_are_left_alone() {
        let mut pool = SpiPool::new(0, 2, 0);
        let old = SpiLayout::new(0, 900, 7, 5).unwrap().spi();
        pool.adopt(old);
        pool.release(old);
        for _ in 0..500 {
            assert!(place(pool.allocate(None).unwrap()).0 < 2);
        }
    }

    #[test]
    fn adopted_spis_are_in_use() {
        let mut pool = SpiPool::new(0, 1, 0);
        let old = SpiLayout::new(0, 900, 0, 5).unwrap().spi();
        pool.adopt(old);
        for _ in 0..200 {
            assert_ne!(place(pool.allocate(None).unwrap()).1, 5);
        }
        pool.release(old);
        let later =
            std::iter::from_fn(|| pool.allocate(None)).find(|spi| place(*spi).1 == 5).unwrap();
        assert_ne!(later, old, "it comes back in another generation");
    }

    // An SA may come back after its release (healing), and go again.
    #[test]
    fn a_place_that_was_adopted_while_it_rested_is_given_out_once() {
        let mut pool = SpiPool::new(0, 1, 0);
        let spis: Vec<EspSpi> = (0..200).map(|_| pool.allocate(None).unwrap()).collect();
        for spi in &spis {
            pool.release(*spi);
            pool.adopt(*spi);
            pool.release(*spi);
            pool.adopt(*spi);
        }
        assert!(pool.resting[0].order.len() <= 2 * REST + 2, "{}", pool.resting[0].order.len());
        let in_use: BTreeSet<_> = spis.iter().map(|spi| place(*spi)).collect();
        for _ in 0..500 {
            assert!(!in_use.contains(&place(pool.allocate(None).unwrap())));
        }
        pool.release(spis[3]);
        pool.release(spis[3]);
        for other in &spis[4..] {
            pool.release(*other);
        }
        let mut again = BTreeSet::new();
        for _ in 0..300 {
            assert!(again.insert(place(pool.allocate(None).unwrap())));
        }
    }
}

//! SAs by inbound SPI. Our SPIs carry the place they sit in, so that lookup is
//! two array indices and one comparison (dataplane.md). Both instances choose
//! SPIs on their own, each for as many workers as it has, and all kinds live
//! here: a lane for each instance and worker that an SPI can name.

use wire::id::{EspSpi, SpiLayout};

use crate::command::CommandError;

/// What sits in a table.
pub(crate) trait Placed {
    /// The SPI that says where.
    fn spi_in(&self) -> EspSpi;
}

/// Two instances with every worker that the layout has bits for.
const LANES: usize = 2 * (SpiLayout::MAX_WORKER as usize + 1);

#[derive(Debug)]
pub(crate) struct Table<T> {
    /// Each grows with the highest slot in use.
    lanes: [Vec<Option<Box<T>>>; LANES],
    max_slots: usize,
    len: usize,
}

impl<T: Placed> Table<T> {
    /// A table for slots 0 to `max_slots` − 1 of each worker of each instance.
    pub(crate) fn new(max_slots: usize) -> Self {
        Self { lanes: [const { Vec::new() }; LANES], max_slots, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Lane and slot.
    #[inline]
    fn place(spi: EspSpi) -> Option<(usize, usize)> {
        let layout = SpiLayout::of(spi)?;
        let lane = usize::from(layout.worker()) * 2 + usize::from(layout.instance());
        Some((lane, usize::from(layout.slot())))
    }

    #[inline]
    fn at(&self, spi: EspSpi) -> Option<&T> {
        let (lane, slot) = Self::place(spi)?;
        self.lanes.get(lane)?.get(slot)?.as_deref()
    }

    #[inline]
    pub(crate) fn get(&self, spi: EspSpi) -> Option<&T> {
        self.at(spi).filter(|sa| sa.spi_in() == spi)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, spi: EspSpi) -> Option<&mut T> {
        let (lane, slot) = Self::place(spi)?;
        let sa = self.lanes.get_mut(lane)?.get_mut(slot)?.as_deref_mut()?;
        // The place is the same for every generation of the slot.
        (sa.spi_in() == spi).then_some(sa)
    }

    /// The SA in the place of an SPI, if that is another.
    pub(crate) fn other_at(&self, spi: EspSpi) -> Option<&T> {
        self.at(spi).filter(|sa| sa.spi_in() != spi)
    }

    pub(crate) fn insert(&mut self, sa: T) -> Result<(), CommandError> {
        let spi = sa.spi_in();
        let (lane, slot) = Self::place(spi)
            .filter(|(_, slot)| *slot < self.max_slots)
            .ok_or(CommandError::BadSpi(spi))?;
        let Some(places) = self.lanes.get_mut(lane) else { return Err(CommandError::BadSpi(spi)) };
        if slot >= places.len() {
            places.resize_with(slot + 1, || None);
        }
        let Some(free) = places.get_mut(slot) else { return Err(CommandError::BadSpi(spi)) };
        match free {
            Some(other) if other.spi_in() != spi => {
                return Err(CommandError::SlotTaken(spi, other.spi_in()));
            }
            Some(_) => {}
            None => self.len += 1,
        }
        *free = Some(Box::new(sa));
        Ok(())
    }

    pub(crate) fn remove(&mut self, spi: EspSpi) -> Option<Box<T>> {
        self.get(spi)?;
        let (lane, slot) = Self::place(spi)?;
        let sa = self.lanes.get_mut(lane)?.get_mut(slot)?.take();
        self.len -= usize::from(sa.is_some());
        sa
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.lanes.iter_mut().flatten().filter_map(Option::as_deref_mut)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.lanes.iter().flatten().filter_map(Option::as_deref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(EspSpi);

    impl Placed for Named {
        fn spi_in(&self) -> EspSpi {
            self.0
        }
    }

    fn spi(instance: u8, generation: u16, worker: u8, slot: u16) -> EspSpi {
        SpiLayout::new(instance, generation, worker, slot).unwrap().spi()
    }

    // The other instance, or an earlier life, may have had another number of workers.
    #[test]
    fn workers_and_instances_have_slots_of_their_own() {
        let mut table = Table::new(8);
        for (instance, worker) in [(0, 0), (1, 0), (0, 5), (1, 15)] {
            table.insert(Named(spi(instance, 1, worker, 3))).unwrap();
        }
        assert_eq!(table.len(), 4);
        let (there, other) = (spi(1, 1, 15, 3), spi(1, 2, 15, 3));
        assert!(table.get(there).is_some() && table.get(other).is_none());
        assert_eq!(table.other_at(other).unwrap().0, there);
        assert!(table.insert(Named(other)).is_err());
        assert!(table.insert(Named(spi(0, 1, 0, 8))).is_err(), "beyond the table");
        assert!(table.remove(other).is_none() && table.remove(there).is_some());
        table.insert(Named(other)).unwrap();
        assert_eq!(table.iter().count(), 4);
    }
}

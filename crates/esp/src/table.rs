//! SAs by inbound SPI. Our SPIs carry the slot they sit in, so that lookup is
//! an array index and one comparison (dataplane.md). Both instances choose
//! SPIs on their own and both kinds live here: even places are instance 0's.

use wire::id::{EspSpi, SpiLayout};

use crate::command::CommandError;
use crate::sa::SaState;

#[derive(Debug)]
pub(crate) struct Table {
    places: Vec<Option<Box<SaState>>>,
    max_slots: usize,
    len: usize,
}

impl Table {
    /// A table for slots 0 to `max_slots` − 1 of each instance. It grows with
    /// the highest slot in use.
    pub(crate) fn new(max_slots: usize) -> Self {
        Self { places: Vec::new(), max_slots, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn place(spi: EspSpi) -> Option<usize> {
        let layout = SpiLayout::of(spi)?;
        Some(usize::from(layout.slot()) * 2 + usize::from(layout.instance()))
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, spi: EspSpi) -> Option<&mut SaState> {
        let sa = self.places.get_mut(Self::place(spi)?)?.as_deref_mut()?;
        // The place is the same for every generation of the slot.
        (sa.spi_in == spi).then_some(sa)
    }

    /// The SA in the place of an SPI, if that is another.
    pub(crate) fn other_at(&self, spi: EspSpi) -> Option<&SaState> {
        let sa = self.places.get(Self::place(spi)?)?.as_deref()?;
        (sa.spi_in != spi).then_some(sa)
    }

    pub(crate) fn insert(&mut self, sa: SaState) -> Result<(), CommandError> {
        let spi = sa.spi_in;
        let place = Self::place(spi)
            .filter(|place| place / 2 < self.max_slots)
            .ok_or(CommandError::BadSpi(spi))?;
        if place >= self.places.len() {
            self.places.resize_with(place + 1, || None);
        }
        let Some(free) = self.places.get_mut(place) else { return Err(CommandError::BadSpi(spi)) };
        match free {
            Some(other) if other.spi_in != spi => {
                return Err(CommandError::SlotTaken(spi, other.spi_in));
            }
            Some(_) => {}
            None => self.len += 1,
        }
        *free = Some(Box::new(sa));
        Ok(())
    }

    pub(crate) fn remove(&mut self, spi: EspSpi) -> Option<Box<SaState>> {
        self.get_mut(spi)?;
        let sa = self.places.get_mut(Self::place(spi)?)?.take();
        self.len -= usize::from(sa.is_some());
        sa
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut SaState> {
        self.places.iter_mut().filter_map(Option::as_deref_mut)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &SaState> {
        self.places.iter().filter_map(Option::as_deref)
    }
}

//! Newtypes for the numbers that name things, on the wire and inside the pair.

use core::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($repr:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $format, ")"), self.0)
            }
        }

        impl From<$name> for $repr {
            fn from(value: $name) -> $repr {
                value.0
            }
        }
    };
}

number!(
    /// One side's name for an IKE SA (RFC 7296 §3.1). Zero means "not chosen yet" and names no SA.
    IkeSpi(u64), "{:016x}"
);
number!(
    /// The receiver's name for an inbound ESP SA (RFC 4303 §2.1). 0 to 255 are reserved.
    EspSpi(u32), "{:08x}"
);
number!(
    /// Number of an IKE exchange in one direction of one IKE SA (RFC 7296 §2.2).
    MessageId(u32), "{}"
);
number!(
    /// Grows at every acquisition of an endpoint and fences its former owner (ha.md).
    Term(u64), "{}"
);
number!(
    /// Dense index of an endpoint: the configured names sorted, so it is the same on both hosts.
    EndpointId(u8), "{}"
);
number!(
    /// Dense index of a connection: the configured names sorted, so it is the same on both hosts.
    ConnectionId(u16), "{}"
);

impl IkeSpi {
    /// The responder's SPI in a first message (RFC 7296 §3.1).
    pub const ZERO: IkeSpi = IkeSpi(0);

    /// Whether this is the "not chosen yet" value.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The eight bytes as sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

impl EspSpi {
    /// The four bytes as sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }

    /// Whether the value is one of those that no SA may use (RFC 4303 §2.1: 0 is local, 1 to 255 are IANA's).
    #[must_use]
    pub fn is_reserved(self) -> bool {
        self.0 <= 255
    }
}

impl MessageId {
    /// The id after this one; `None` at the end, where the IKE SA must have been replaced (RFC 7296 §2.2).
    #[must_use]
    pub fn next(self) -> Option<MessageId> {
        self.0.checked_add(1).map(MessageId)
    }
}

/// How an inbound ESP SPI of ours is made up, so that the lookup of an SA is an array index
/// (dataplane.md) and two instances never choose the same one:
/// bit 31 instance, bits 30–20 generation, bits 19–16 worker, bits 15–0 slot.
///
/// Fields are private because their bounds are checked once, in [`SpiLayout::new`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SpiLayout {
    instance: u8,
    generation: u16,
    worker: u8,
    slot: u16,
}

impl SpiLayout {
    /// Generations run from 1 to this. Never 0, so the reserved SPIs 0 to 255 cannot arise.
    pub const MAX_GENERATION: u16 = 0x7ff;
    /// Workers run from 0 to this.
    pub const MAX_WORKER: u8 = 0xf;
    /// Where the worker's bits begin, from the right.
    pub const WORKER_SHIFT: u32 = 16;

    /// Checks the bounds: `instance` 0 or 1, `generation` 1 to [`Self::MAX_GENERATION`],
    /// `worker` up to [`Self::MAX_WORKER`], any `slot`.
    #[must_use]
    pub fn new(instance: u8, generation: u16, worker: u8, slot: u16) -> Option<SpiLayout> {
        let in_bounds = instance <= 1
            && (1..=Self::MAX_GENERATION).contains(&generation)
            && worker <= Self::MAX_WORKER;
        in_bounds.then_some(SpiLayout { instance, generation, worker, slot })
    }

    /// The SPI with these fields.
    #[must_use]
    pub fn spi(self) -> EspSpi {
        EspSpi(
            u32::from(self.instance) << 31
                | u32::from(self.generation) << 20
                | u32::from(self.worker) << Self::WORKER_SHIFT
                | u32::from(self.slot),
        )
    }

    /// The fields of an SPI; `None` if its generation is 0, which we never hand out.
    #[must_use]
    pub fn of(spi: EspSpi) -> Option<SpiLayout> {
        let field = |shift: u32, mask: u32| (spi.0 >> shift) & mask;
        SpiLayout::new(
            field(31, 1) as u8,
            field(20, 0x7ff) as u16,
            field(Self::WORKER_SHIFT, Self::MAX_WORKER.into()) as u8,
            field(0, 0xffff) as u16,
        )
    }

    /// Index of the instance that chose the SPI: 0 or 1.
    #[must_use]
    pub fn instance(self) -> u8 {
        self.instance
    }

    /// How often the slot was used before, wrapping past [`Self::MAX_GENERATION`] to 1.
    #[must_use]
    pub fn generation(self) -> u16 {
        self.generation
    }

    /// The worker that the SA was given to by whoever chose the SPI.
    #[must_use]
    pub fn worker(self) -> u8 {
        self.worker
    }

    /// The worker that owns the SA where there are so many, perhaps fewer or more than where the SPI was chosen.
    #[must_use]
    pub fn worker_of(self, workers: u8) -> u8 {
        self.worker % workers.max(1)
    }

    /// Index into the worker's table of SAs.
    #[must_use]
    pub fn slot(self) -> u16 {
        self.slot
    }

    /// The same slot, one generation later.
    #[must_use]
    pub fn next_generation(self) -> SpiLayout {
        let generation =
            if self.generation >= Self::MAX_GENERATION { 1 } else { self.generation + 1 };
        SpiLayout { generation, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_has_the_agreed_bits() {
        let spi = SpiLayout::new(1, 0x123, 0x4, 0x5678).unwrap().spi();
        assert_eq!(spi, EspSpi(0x8000_0000 | 0x123 << 20 | 0x4 << 16 | 0x5678));
        assert_eq!(SpiLayout::new(0, 1, 0, 0).unwrap().spi(), EspSpi(0x0010_0000));
        assert_eq!(SpiLayout::new(1, 0x7ff, 0xf, 0xffff).unwrap().spi(), EspSpi(u32::MAX));
    }

    #[test]
    fn every_spi_with_a_generation_survives_the_round_trip() {
        for raw in (0..=u32::MAX).step_by(65_521) {
            match SpiLayout::of(EspSpi(raw)) {
                Some(layout) => assert_eq!(layout.spi(), EspSpi(raw)),
                None => assert_eq!(raw & 0x7ff0_0000, 0),
            }
        }
    }

    #[test]
    fn out_of_bounds_fields_are_refused() {
        assert!(SpiLayout::new(2, 1, 0, 0).is_none());
        assert!(SpiLayout::new(0, 0, 0, 0).is_none());
        assert!(SpiLayout::new(0, 0x800, 0, 0).is_none());
        assert!(SpiLayout::new(0, 1, 16, 0).is_none());
        assert!(SpiLayout::of(EspSpi(0xff)).is_none());
    }

    #[test]
    fn generations_wrap_past_zero() {
        let last = SpiLayout::new(0, SpiLayout::MAX_GENERATION, 3, 9).unwrap();
        assert_eq!(last.next_generation(), SpiLayout::new(0, 1, 3, 9).unwrap());
        assert_eq!(SpiLayout::new(0, 1, 3, 9).unwrap().next_generation().generation(), 2);
    }

    #[test]
    fn message_ids_end() {
        assert_eq!(MessageId(0).next(), Some(MessageId(1)));
        assert_eq!(MessageId(u32::MAX).next(), None);
    }

    #[test]
    fn ids_print_as_peers_tools_do() {
        assert_eq!(IkeSpi(0xab).to_string(), "00000000000000ab");
        assert_eq!(EspSpi(0xab).to_string(), "000000ab");
        assert_eq!(format!("{:?}", Term(7)), "Term(7)");
    }
}

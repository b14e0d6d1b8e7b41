//! Several workers: what is not this one's to deal with goes to the worker
//! whose it is.
//!
//! ```text
//!   reader R ──► the packet's SA ─┬─ R's own ───────────────────────► admit, seal or open, queue
//!                                 └─ worker W's ─┬─ endpoint idle ──► steer or drop: nothing of it is with W
//!                                                └─ else ─► Hand W ─► admit, seal or open, queue
//!   worker W ≠ 0 is to steer ──► Hand 0 ──► still to be steered? ─┬─ yes ─► pair link
//!                                                                 └─ no ──► judged anew
//! ```
//! **Order within a flow.** Outside of `Idle` the reader decides nothing but
//! which SA it is: a packet is admitted, queued (a hold, a direct hold, others
//! in line) and released by the SA's owner alone. So all packets of an SA pass
//! one place, in the order in which they were read: a hold's queue and what
//! comes at `Release`, `Own` or `Disown` after it cannot overtake each other.
//! What waited there and is then steered takes the same way to worker 0 as what
//! comes after it. An endpoint is `Idle` when it never was ours or its queue
//! was steered long ago; then the reader steers by itself.
//!
//! What worker 0 finds not to be steered any more goes back and passes a direct
//! hold, as what the other instance hands over does: it is older.
//!
//! A flow changes its worker when it changes its SA for one of another worker
//! (gateway's `SpiPool` gives a successor the same one), or when the kernel
//! moves it to another queue; then a few of its packets can be overtaken.
//!
//! **Knowledge.** Workers obey the same commands at different times. Whoever
//! judges a handed packet has been told at least what the one knew who handed it
//! on (see [`Shard::handed`]): it finds the SA that was chosen, unless that is
//! gone; then the packet is judged anew, as if it were read a moment later.

use core::time::Duration;

use wire::id::{EndpointId, EspSpi, SpiLayout};
use wire::ip::Packet;

use super::Shard;
use crate::batch::{Direction, Handed, Slot, Verdict};
use crate::endpoint::{Admission, Arrival, Role};
use crate::reason::Reason;

/// From the reader to the SA's owner, to its successor's, to whoever steers: more needs more commands meanwhile.
const MAX_HOPS: u8 = 4;

/// The worker that hands packets to the other instance.
const STEERS: u8 = 0;

impl Shard {
    /// Whether an SA is another worker's.
    pub(super) fn is_foreign(&self, spi_in: EspSpi) -> bool {
        self.other_owner(spi_in).is_some()
    }

    /// The worker whose SA it is, if that is another.
    fn other_owner(&self, spi_in: EspSpi) -> Option<u8> {
        let owner = SpiLayout::of(spi_in)?.worker_of(self.config.workers);
        (owner != self.config.worker).then_some(owner)
    }

    /// A packet of an SA that is not in the table: another worker's, or nobody's.
    #[cold]
    pub(super) fn not_here(
        &mut self,
        now: Duration,
        slot: &mut Slot,
        spi_in: EspSpi,
        arrival: Arrival,
        otherwise: Reason,
    ) -> Result<Verdict, Reason> {
        let owner = self.other_owner(spi_in).ok_or(otherwise)?;
        if let Some(endpoint) = self.foreign.get(spi_in).map(|sa| sa.endpoint)
            && let Some(e) = self.endpoints.get(usize::from(endpoint.0))
            && e.role == Role::Idle
        {
            match e.admit(now, arrival) {
                Admission::Steer => return self.steer(slot, endpoint),
                Admission::Drop(reason) => return Err(reason),
                // Not while it is idle.
                Admission::Process(_) | Admission::Queue => {}
            }
        }
        hand(slot, owner, Some(spi_in), None)
    }

    /// To the other instance, if need be by the worker that can.
    #[inline]
    pub(super) fn steer(&self, slot: &mut Slot, endpoint: EndpointId) -> Result<Verdict, Reason> {
        if self.config.worker == STEERS {
            return Ok(Verdict::Steer { endpoint });
        }
        hand(slot, STEERS, None, Some(endpoint))
    }

    /// Judges a packet that another worker may have handed on, or that was queued here.
    pub(super) fn handed_one(
        &mut self,
        now: Duration,
        fences: &[Duration],
        slot: &mut Slot,
        released: bool,
    ) -> Result<Verdict, Reason> {
        let handed = slot.handed;
        if let Some(endpoint) = handed.and_then(|handed| handed.steer)
            && let Some(e) = self.endpoints.get(usize::from(endpoint.0))
        {
            // It has waited its turn where its SA is.
            let arrival = Arrival { steered: slot.steered, released: true };
            match e.admit(now, arrival) {
                Admission::Steer => return self.steer(slot, endpoint),
                Admission::Drop(reason) => return Err(reason),
                // Ours again.
                Admission::Process(_) | Admission::Queue => {}
            }
            slot.handed = handed.map(|handed| Handed { steer: None, back: true, ..handed });
        }
        let released = released || handed.is_some_and(|handed| handed.back);
        match slot.direction {
            Direction::Inbound => self.inbound_one(now, fences, slot, released),
            Direction::Outbound => {
                // What waited in a queue is judged by what holds now: the choice was made before.
                let chosen = handed.and_then(|handed| handed.spi_in).filter(|_| !released);
                let usable = |spi_in: &EspSpi| self.table.get(*spi_in).is_some_and(|sa| sa.used);
                let Some(spi_in) = chosen.filter(usable) else {
                    return self.outbound_one(now, fences, slot, released);
                };
                let packet = Packet::parse(slot.packet()).map_err(|_| Reason::MalformedInner)?;
                let arrival = Arrival { steered: slot.steered, released };
                self.outbound_by(now, fences, slot, &packet, spi_in, arrival)
            }
        }
    }
}

/// Marks a packet for another worker.
fn hand(
    slot: &mut Slot,
    worker: u8,
    spi_in: Option<EspSpi>,
    steer: Option<EndpointId>,
) -> Result<Verdict, Reason> {
    let hops = slot.handed.map_or(0, |handed| handed.hops) + 1;
    let back = slot.handed.is_some_and(|handed| handed.back);
    if hops > MAX_HOPS {
        return Err(Reason::HandedTooOften);
    }
    slot.handed = Some(Handed { spi_in, steer, back, hops });
    Ok(Verdict::Hand { worker })
}

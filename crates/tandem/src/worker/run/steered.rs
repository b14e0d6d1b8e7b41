//! What crosses the pair link: packets that the other instance hands over, and those that are handed to it.

use std::time::Duration;

use esp::{Batch, Direction, Slot, Steered, Verdict};
use wire::id::EndpointId;

use super::super::counters::add;
use super::super::outlet::Outlet;
use super::super::{Counters, EndpointSocket, WorkerEvent};
use super::{Flow, Io, State};
use crate::link::{Arrival, STEER_HEADROOM, STEER_TAILROOM, SteerHead, SteerKind};

/// Steering frames are sealed in the slot itself.
const _: () = assert!(STEER_HEADROOM <= esp::HEADROOM && STEER_TAILROOM <= esp::TAILROOM);

/// Control hears that an endpoint's packets are handed over at most this often.
const STEERED_PAUSE: Duration = Duration::from_millis(100);

impl State {
    /// What one receive on a pair link brought.
    pub(super) fn read_link(&mut self, link: u8) -> Flow {
        if !self.io.steering.as_mut().is_some_and(|steering| steering.refill(link)) {
            return Flow::Go;
        }
        let mut way = None;
        while let Some(arrival) = self.io.steering.as_mut().and_then(|port| port.take(link)) {
            let outlet = (&self.io.outlet, &*self.io.counters);
            let (batch, spare) = (&mut self.batch, &mut self.spare);
            match collect(arrival, link, outlet, batch, spare, &mut way) {
                Collected::Goes => {}
                Collected::Waits(next) => {
                    if self.judge_steered(&mut way) == Flow::Stop {
                        return Flow::Stop;
                    }
                    way = Some(next);
                    if let Some(slot) = self.batch.push() {
                        std::mem::swap(slot, &mut self.spare);
                    }
                }
            }
        }
        self.judge_steered(&mut way)
    }

    /// Steered datagrams that control passed on.
    pub(super) fn take_strays(&mut self) -> Flow {
        while let Some((link, mut datagram)) = self.strays.pop_front() {
            let Some(port) = &mut self.io.steering else { continue };
            let mut way = None;
            let outlet = (&self.io.outlet, &*self.io.counters);
            let (batch, spare) = (&mut self.batch, &mut self.spare);
            let arrival = port.open(link, &mut datagram);
            // The batch is empty, so nothing waits.
            let _ = collect(arrival, link, outlet, batch, spare, &mut way);
            if self.judge_steered(&mut way) == Flow::Stop {
                return Flow::Stop;
            }
        }
        Flow::Go
    }

    /// Judges and writes the steered packets collected in the batch, which go this way.
    fn judge_steered(&mut self, way: &mut Option<Direction>) -> Flow {
        let Some(direction) = way.take() else { return Flow::Go };
        // What the other hands over left after its control had heard of what ours decided: an `Own` that it counts on
        // stands in the queue by now, though perhaps not yet when the queue was looked at last.
        if self.obey() == Flow::Stop {
            return Flow::Stop;
        }
        self.judge(direction);
        Flow::Go
    }
}

/// What became of a steered packet.
enum Collected {
    /// It is in the batch, or was dealt with.
    Goes,
    /// It is in the spare slot: the batch must be judged first. It goes this way.
    Waits(Direction),
}

/// Puts a packet into the batch, whose packets go one way.
fn collect(
    arrival: Arrival<'_>,
    link: u8,
    (outlet, counters): (&Outlet, &Counters),
    batch: &mut Batch,
    spare: &mut Slot,
    way: &mut Option<Direction>,
) -> Collected {
    let (head, packet) = match arrival {
        Arrival::Steered(head, packet) => (head, packet),
        Arrival::Stray(datagram) => {
            let passed_on = outlet.ike(WorkerEvent::Stray { link, datagram: datagram.to_vec() });
            add(&counters.stray_dropped, u64::from(!passed_on));
            return Collected::Goes;
        }
        Arrival::Refused => return Collected::Goes,
    };
    let direction = match head.kind {
        SteerKind::Plain => Direction::Outbound,
        SteerKind::Esp => Direction::Inbound,
        SteerKind::Ike => {
            outlet.take_ike(counters, packet, |bytes| WorkerEvent::SteeredIke { head, bytes });
            return Collected::Goes;
        }
    };
    let waits = batch.is_full() || way.is_some_and(|way| way != direction);
    let slot = if waits { Some(&mut *spare) } else { batch.push() };
    let Some(slot) = slot else { return Collected::Goes };
    slot.clear();
    if !slot.fill(packet) {
        if !waits {
            batch.pop();
        }
        add(&counters.truncated, 1);
        return Collected::Goes;
    }
    slot.steered = Some(Steered { endpoint: head.endpoint, back: head.back });
    slot.peer = head.from.filter(|_| direction == Direction::Inbound);
    add(&counters.steered_in, 1);
    if waits {
        return Collected::Waits(direction);
    }
    *way = Some(direction);
    Collected::Goes
}

impl Io {
    /// Seals a packet for the other instance in its slot; one that cannot be is emptied.
    pub(super) fn seal_steered(
        &mut self,
        now: Duration,
        endpoint: EndpointId,
        slot: &mut Slot,
        sockets: &[EndpointSocket],
    ) {
        let back = slot.steered.is_some();
        let direction = slot.direction();
        let head = match direction {
            Direction::Outbound => {
                SteerHead { kind: SteerKind::Plain, endpoint, from: None, local_port: 0, back }
            }
            Direction::Inbound => {
                let place = sockets.iter().find(|place| place.endpoint == endpoint);
                let local_port = place.map_or(0, |place| place.socket.local_addr().port());
                SteerHead { kind: SteerKind::Esp, endpoint, from: slot.peer, local_port, back }
            }
        };
        let sealed = match (&self.steer, slot.widen(STEER_HEADROOM, STEER_TAILROOM)) {
            (Some(sender), Some(buffer)) => sender.seal(&head, buffer),
            _ => false,
        };
        if !sealed {
            // Whatever it holds must not leave as it is.
            slot.set_len(0);
        }
        // Inner packets are handed over as long as flows are pinned there; only what peers still send here is late.
        if direction == Direction::Inbound
            && let Some(told) = self.steered_told.get_mut(usize::from(endpoint.0))
            && now >= *told + STEERED_PAUSE
            && self.outlet.report(WorkerEvent::Steered(endpoint)).is_ok()
        {
            *told = now;
        }
    }

    /// Sends what was sealed for the other instance. Gives how many packets the kernel took.
    pub(super) fn hand_over(&mut self, batch: &Batch) -> u64 {
        let (Some(sender), Some(port)) = (&self.steer, &mut self.steering) else { return 0 };
        let sealed = batch.slots().iter().filter_map(|slot| match slot.verdict() {
            Verdict::Steer { .. } => Some(slot.packet()),
            _ => None,
        });
        port.send(sender.link(), sealed) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::sync_channel;

    use super::super::super::tests::steering::{PLAIN, links};
    use super::super::super::tests::{Peer, isolated, linked_state};
    use super::*;
    use netio::clock::boottime;

    #[test]
    fn a_stray_that_control_has_no_room_for_is_counted() {
        let (ike, _full) = sync_channel(1);
        let event = netio::wake::EventFd::new().unwrap();
        let outlet = Outlet::new(sync_channel(1).0, ike, event, Arc::default());
        let counters = Counters::default();
        let (mut batch, mut spare) = (Batch::new(1, 256), Slot::new(256));
        for dropped in 0..3 {
            let arrival = Arrival::Stray(&[1; 60]);
            let to = (&outlet, &counters);
            collect(arrival, 0, to, &mut batch, &mut spare, &mut None);
            assert_eq!(counters.snapshot().stray_dropped, dropped);
        }
        assert_eq!(counters.snapshot().drops().collect::<Vec<_>>(), [("stray_dropped", 2)]);
    }

    // ha.md, "Switchover": the old owner steers when it has heard that the new one owns. The new one's worker may have looked
    // at its queue just before that stood there, and at the pair link just after.
    #[test]
    fn what_was_decided_before_a_packet_was_handed_over_comes_first() {
        isolated(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let [left, right] = runtime.block_on(links());
            let (_control, mut state) = linked_state(Some(right.steering));
            let mut peer = Peer::new();
            let inner = wire::ip::udp_packet(
                "10.1.0.9:5000".parse().unwrap(),
                "10.2.0.5:4000".parse().unwrap(),
                b"steered",
            );
            assert!(left.handle.send_steer(&PLAIN, &inner.unwrap()));
            let port = state.io.steering.as_ref().unwrap();
            assert!(netio::udp::wait_readable(port.sockets().next().unwrap(), 3000).unwrap());
            assert!(state.read_link(0) == Flow::Go);
            assert_eq!(peer.receive().0, b"steered");
        });
    }

    #[test]
    fn what_cannot_be_sealed_does_not_leave() {
        isolated(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let [left, right] = runtime.block_on(links());
            let (_control, mut state) = linked_state(Some(left.steering));
            state.obey();
            let disown = esp::Command::Disown { endpoint: EndpointId(0), steer: true };
            state.shard.apply(disown).unwrap();
            let inner = wire::ip::udp_packet(
                "10.1.0.9:5000".parse().unwrap(),
                "10.2.0.5:4000".parse().unwrap(),
                b"no keys yet",
            );
            let inner = inner.unwrap();
            // There is a way to the other, and no stream that brought keys.
            state.batch.push().unwrap().fill(&inner);
            state.judge(Direction::Outbound);
            // And with keys, but no room for a head in front of the packet.
            state.io.steer = left.handle.steer_sender();
            state.batch.push().unwrap().fill(&inner);
            state.shard.outbound(boottime(), &[Duration::MAX], &mut state.batch);
            assert!(state.batch.slots_mut()[0].widen(40, 0).is_some());
            state.io.write(&mut state.batch, &mut state.sockets);
            let counters = state.io.counters.snapshot();
            assert_eq!((counters.steered, counters.steer_lost), (0, 2));
            let mut port = right.steering;
            assert!(!port.refill(0));
        });
    }
}

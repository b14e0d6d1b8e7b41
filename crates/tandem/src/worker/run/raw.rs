//! ESP as protocol 50: a batch that comes without UDP, and the packets of a judged batch that leave so.

use esp::{Batch, Direction, Slot, Verdict};
use netio::esp::EspSocket;
use netio::udp::SendItem;
use wire::id::EndpointId;
use wire::ip::Ecn;

use super::super::EndpointSocket;
use super::super::counters::add;
use super::State;

impl State {
    /// One batch; how many packets. The descriptor stays readable while there is more.
    pub(super) fn read_raw(&mut self, at: usize) -> usize {
        let Some(EndpointSocket { raw: Some(socket), .. }) = self.sockets.get_mut(at) else {
            return 0;
        };
        let (errors, dropped) = (socket.receive_errors(), socket.receive_dropped());
        let slots = self.batch.unused();
        let got = socket.recv(slots.iter_mut().map(Slot::room), &mut self.metas[..]);
        let (mut kept, mut truncated) = (0, 0);
        for (i, meta) in self.metas.iter().enumerate().take(got) {
            if meta.truncated {
                truncated += 1;
                continue;
            }
            let Some(slot) = slots.get_mut(i) else { break };
            slot.set_len(meta.start + meta.len);
            slot.narrow(meta.start, meta.len);
            slot.ecn = Ecn::of(meta.tos);
            // No NAT passes it on, so there is no peer to follow.
            slot.peer = None;
            slots.swap(kept, i);
            kept += 1;
        }
        let counters = &self.io.counters;
        add(&counters.receive_errors, socket.receive_errors() - errors);
        add(&counters.receive_dropped, socket.receive_dropped() - dropped);
        add(&counters.truncated, truncated);
        if kept > 0 {
            self.batch.commit(kept);
            add(&counters.esp_received, kept as u64);
            self.judge(Direction::Inbound);
        }
        got
    }
}

#[cfg(test)]
impl State {
    /// A packet from the TUN, judged; then written, after something has happened in between.
    pub(in super::super) fn write_outbound(
        &mut self,
        payload: &[u8],
        meanwhile: impl FnOnce(),
    ) -> super::super::Snapshot {
        let (from, to) = ("10.1.0.9:5000", "10.2.0.5:4000");
        let inner = wire::ip::udp_packet(from.parse().unwrap(), to.parse().unwrap(), payload);
        self.obey();
        self.batch.push().unwrap().fill(&inner.unwrap());
        let open = [std::time::Duration::MAX];
        self.shard.outbound(netio::clock::boottime(), &open, &mut self.batch);
        assert!(matches!(self.batch.slots()[0].verdict(), Verdict::Send { udp_encap: false, .. }));
        meanwhile();
        self.io.write(&mut self.batch, &mut self.sockets);
        self.batch.clear();
        self.counters()
    }

    pub(in super::super) fn counters(&self) -> super::super::Snapshot {
        self.io.counters.snapshot()
    }
}

/// What became of an endpoint's packets for protocol 50.
#[derive(Default)]
pub(super) struct Unwrapped {
    /// Dropped, since the fence passed.
    pub(super) late: u64,
    /// All others.
    pub(super) to_send: u64,
    /// Those of them that the kernel took.
    pub(super) sent: u64,
}

/// Sends the packets of a judged batch that leave this endpoint as protocol 50, if the fence is open.
pub(super) fn send(
    batch: &Batch,
    endpoint: EndpointId,
    open: bool,
    socket: Option<&mut EspSocket>,
) -> Unwrapped {
    let items = || {
        batch.slots().iter().filter_map(|slot| match slot.verdict() {
            Verdict::Send { endpoint: of, to, udp_encap: false, .. } if of == endpoint => {
                Some(SendItem { to, bytes: slot.packet(), tos: slot.outer_traffic_class() })
            }
            _ => None,
        })
    };
    let count = items().count() as u64;
    if count == 0 {
        return Unwrapped::default();
    }
    if !open {
        return Unwrapped { late: count, ..Unwrapped::default() };
    }
    let sent = socket.map_or(0, |socket| socket.send(items()));
    Unwrapped { to_send: count, sent: sent as u64, ..Unwrapped::default() }
}

//! To the host: the inner packets of a judged batch, those of a flow that follow each other as one.

use std::io;
use std::sync::Arc;

use esp::coalesce::{Merge, Plan, Planned, Run};
use esp::{Slot, Verdict};
use netio::tun::{RUN, Tun};
use wire::id::EndpointId;
use wire::vnet::Carried;

use super::super::counters::add;
use super::super::{BATCH, Counters};

/// What delivering needs.
pub(super) struct Delivery {
    tun: Arc<Tun>,
    counters: Arc<Counters>,
    /// What the kernel takes as one.
    merge: Merge,
    plan: Plan,
}

/// What became of a batch's packets for the host.
#[derive(Default)]
pub(super) struct Delivered {
    /// The kernel took them.
    pub(super) written: u64,
    /// It did not.
    pub(super) refused: u64,
    /// Their fence closed after they were judged.
    pub(super) late: u64,
}

impl Delivery {
    pub(super) fn new(tun: Arc<Tun>, counters: Arc<Counters>) -> Self {
        let merge = Merge { tcp: tun.takes_runs(Carried::Tcp), udp: tun.takes_runs(Carried::Udp) };
        Self { tun, counters, merge, plan: Plan::new(BATCH, RUN) }
    }

    /// Writes the packets of the batch that are for the host, of endpoints whose fence is open.
    pub(super) fn write(
        &mut self,
        slots: &[Slot],
        is_open: impl Fn(EndpointId) -> bool,
    ) -> Delivered {
        // A fence is one endpoint's: what is written as one must have come through one.
        let to_host = slots.iter().enumerate().filter_map(|(at, slot)| match slot.verdict() {
            Verdict::Deliver { endpoint } => Some((at, slot.packet(), endpoint)),
            _ => None,
        });
        self.plan.make(self.merge, to_host);
        let mut done = Delivered::default();
        for planned in self.plan.iter() {
            let count = planned.count() as u64;
            let first = slots.get(planned.first());
            let Some(Verdict::Deliver { endpoint }) = first.map(Slot::verdict) else { continue };
            if !is_open(endpoint) {
                done.late += count;
                continue;
            }
            let written = match planned.run() {
                Some(run) if self.merge.takes(run.carried()) => {
                    write_run(&self.tun, &self.counters, &mut self.merge, slots, &planned, run)
                }
                _ => write_singly(&self.tun, slots, &planned),
            };
            done.written += written;
            done.refused += count - written;
        }
        done
    }
}

/// Writes a run as one packet, or where the kernel refuses that, one by one, as all of its kind from then on. Gives how
/// many packets the kernel took.
fn write_run(
    tun: &Tun,
    counters: &Counters,
    merge: &mut Merge,
    slots: &[Slot],
    planned: &Planned<'_>,
    run: &Run,
) -> u64 {
    let head = slots.get(planned.first()).and_then(|first| run.head(first.packet()));
    let Some(head) = head else { return write_singly(tun, slots, planned) };
    let payload = |at: usize| slots.get(at)?.packet().get(run.header_len()..);
    let payloads = planned.numbers().filter_map(payload);
    let Err(error) = tun.write_run(head.form, head.bytes(), payloads) else {
        add(&counters.tun_merged, 1);
        return run.count() as u64;
    };
    if error.kind() != io::ErrorKind::InvalidInput {
        return 0;
    }
    let form = head.form;
    tracing::warn!(%error, ?form, "the kernel refuses merged packets of this kind; written one by one from now on");
    match run.carried() {
        Carried::Tcp => merge.tcp = false,
        Carried::Udp => merge.udp = false,
    }
    write_singly(tun, slots, planned)
}

fn write_singly(tun: &Tun, slots: &[Slot], planned: &Planned<'_>) -> u64 {
    let packets = planned.numbers().filter_map(|at| slots.get(at));
    packets.map(|slot| u64::from(tun.write(slot.packet()).is_ok())).sum()
}

//! The queues from a worker to control.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};

use netio::wake::EventFd;

use super::counters::add;
use super::{Counters, LONG_IKE_QUEUE, WorkerEvent, is_long};

/// The queues to control. Sending neither waits nor allocates.
pub(super) struct Outlet {
    reports: SyncSender<WorkerEvent>,
    ike: SyncSender<WorkerEvent>,
    event: EventFd,
    /// Long IKE messages in the queue.
    long_ike: Arc<AtomicUsize>,
}

impl Outlet {
    pub(super) fn new(
        reports: SyncSender<WorkerEvent>,
        ike: SyncSender<WorkerEvent>,
        event: EventFd,
        long_ike: Arc<AtomicUsize>,
    ) -> Self {
        Self { reports, ike, event, long_ike }
    }

    /// Gives it back when there is no room.
    #[expect(
        clippy::result_large_err,
        reason = "a box would be an allocation on the way of packets"
    )]
    pub(super) fn report(&self, event: WorkerEvent) -> Result<(), WorkerEvent> {
        match self.reports.try_send(event) {
            Ok(()) => {
                self.event.set();
                Ok(())
            }
            Err(TrySendError::Full(event)) => Err(event),
            // Control is gone; the command queue says so next.
            Err(TrySendError::Disconnected(_)) => Ok(()),
        }
    }

    /// False when it was dropped.
    pub(super) fn ike(&self, event: WorkerEvent) -> bool {
        let taken = self.ike.try_send(event).is_ok();
        if taken {
            self.event.set();
        }
        taken
    }

    /// An IKE message for control, counted. False when it was dropped.
    pub(super) fn take_ike(
        &self,
        counters: &Counters,
        message: &[u8],
        event: impl FnOnce(Vec<u8>) -> WorkerEvent,
    ) -> bool {
        let long = is_long(message);
        // Counted before it is queued, since control counts it out; and looked at before it is copied.
        let room = !long || self.long_ike.fetch_add(1, Ordering::AcqRel) < LONG_IKE_QUEUE;
        let taken = room && self.ike(event(message.to_vec()));
        if long && !taken {
            self.long_ike.fetch_sub(1, Ordering::AcqRel);
        }
        add(if taken { &counters.ike_received } else { &counters.ike_dropped }, 1);
        taken
    }
}

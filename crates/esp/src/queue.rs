//! A bounded queue of packets, allocated once. Packets move in and out by
//! swapping buffers with the slots of a batch: nothing is copied.

use crate::batch::Slot;

/// Packets in order of arrival.
#[derive(Debug)]
pub(crate) struct Queue {
    ring: Box<[Slot]>,
    head: usize,
    len: usize,
}

impl Queue {
    pub(crate) fn new(capacity: usize, slot_len: usize) -> Self {
        Self { ring: (0..capacity).map(|_| Slot::new(slot_len)).collect(), head: 0, len: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the packet and leaves an empty slot. `false` if the queue is full.
    pub(crate) fn push(&mut self, slot: &mut Slot) -> bool {
        if self.len == self.ring.len() {
            return false;
        }
        let at = (self.head + self.len) % self.ring.len();
        let Some(free) = self.ring.get_mut(at) else { return false };
        core::mem::swap(free, slot);
        slot.clear();
        self.len += 1;
        true
    }

    /// Puts the oldest packet into `slot` and keeps that one's buffer. `false`
    /// if the queue is empty.
    pub(crate) fn pop(&mut self, slot: &mut Slot) -> bool {
        if self.len == 0 {
            return false;
        }
        let Some(oldest) = self.ring.get_mut(self.head) else { return false };
        core::mem::swap(oldest, slot);
        oldest.clear();
        self.head = (self.head + 1) % self.ring.len();
        self.len -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_in_first_out_and_bounded() {
        let mut queue = Queue::new(3, 256);
        let mut slot = Slot::new(256);
        let mut next = 0u8;
        let mut expect = 0u8;
        for _ in 0..5 {
            while slot.fill(&[next]) && queue.push(&mut slot) {
                assert!(slot.packet().is_empty());
                next += 1;
            }
            assert_eq!(queue.len, 3);
            // The refused packet stays where it was.
            assert_eq!(slot.packet(), [next]);
            for _ in 0..2 {
                assert!(queue.pop(&mut slot));
                assert_eq!(slot.packet(), [expect]);
                expect += 1;
            }
        }
        assert!(queue.pop(&mut slot));
        assert!(!queue.pop(&mut slot));
        assert!(queue.is_empty());
    }

    #[test]
    fn capacity_zero_takes_nothing() {
        let mut queue = Queue::new(0, 256);
        let mut slot = Slot::new(256);
        assert!(!queue.push(&mut slot));
        assert!(!queue.pop(&mut slot));
    }
}

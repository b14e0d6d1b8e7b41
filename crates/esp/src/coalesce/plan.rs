//! Who goes with whom in a batch in which flows are mixed, and in which order all leave.
//!
//! ```text
//!   batch:    A1 B1 A2 C1 B2 A3 A5 B3        A4 is missing
//!   leaves:   [A1 A2 A3] [B1 B2 B3] [C1] [A5]
//! ```
//! Within a flow nothing overtakes: a packet that cannot join its flow's run ends that run, whatever the packet is, and
//! leaves after it. Between flows the first packets of the runs keep their order. Fragments and packets with options
//! end all runs between their two addresses, because they may be of any of these flows.

use super::ip::Flow;
use super::run::{Merge, Run};

/// Flows whose runs can grow at the same time. One more ends the run that is open for longest.
pub const FLOWS: usize = 8;

/// No packet.
const NONE: u32 = u32::MAX;

/// The plan for one batch. Holds no packets, only their numbers; kept for the next batch, so that nothing is allocated
/// for that.
#[derive(Debug)]
pub struct Plan {
    most: usize,
    packets: Vec<Packet>,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Packet {
    /// The caller's number.
    number: usize,
    /// The next packet of the group.
    next: u32,
}

/// What leaves together.
#[derive(Debug)]
struct Group {
    first: u32,
    last: u32,
    run: Option<Run>,
}

/// A run that may grow.
#[derive(Clone, Copy)]
struct Open<'a, K> {
    flow: Flow<'a>,
    first: &'a [u8],
    origin: K,
    group: usize,
}

impl Plan {
    /// For batches of `packets` (a larger one allocates) in runs of at most `most`.
    #[must_use]
    pub fn new(packets: usize, most: usize) -> Self {
        Self { most, packets: Vec::with_capacity(packets), groups: Vec::with_capacity(packets) }
    }

    /// Plans anew: for packets in the order in which they should leave, each with the caller's number for it, its
    /// bytes, and what all packets of a run must have in common.
    pub fn make<'a, K: Copy + PartialEq>(
        &mut self,
        merge: Merge,
        packets: impl IntoIterator<Item = (usize, &'a [u8], K)>,
    ) {
        self.packets.clear();
        self.groups.clear();
        let mut open: [Option<Open<'a, K>>; FLOWS] = [None; FLOWS];
        for (number, bytes, origin) in packets {
            let at = self.packets.len() as u32;
            self.packets.push(Packet { number, next: NONE });
            let flow = Flow::of(bytes);
            let mut joined = false;
            for place in &mut open {
                let Some(run) = place.as_ref().filter(|run| flow.may_be(&run.flow)) else {
                    continue;
                };
                joined |= run.origin == origin && self.join(run.group, run.first, bytes, at);
                if !joined || !self.may_grow(run.group) {
                    *place = None;
                }
            }
            if joined {
                continue;
            }
            let run = Run::start(bytes, merge);
            if run.is_some() && self.most > 1 {
                // A free place, or that of the oldest run.
                let age = |place: &&mut Option<Open<'a, K>>| place.as_ref().map(|run| run.group);
                if let Some(place) = open.iter_mut().min_by_key(age) {
                    let group = self.groups.len();
                    *place = Some(Open { flow, first: bytes, origin, group });
                }
            }
            self.groups.push(Group { first: at, last: at, run });
        }
    }

    /// Adds the packet at `at` to a group, if it continues its run.
    fn join(&mut self, group: usize, first: &[u8], bytes: &[u8], at: u32) -> bool {
        let Some(group) = self.groups.get_mut(group) else { return false };
        if !group.run.as_mut().is_some_and(|run| run.add(first, bytes)) {
            return false;
        }
        if let Some(last) = self.packets.get_mut(group.last as usize) {
            last.next = at;
        }
        group.last = at;
        true
    }

    fn may_grow(&self, group: usize) -> bool {
        let run = self.groups.get(group).and_then(|group| group.run.as_ref());
        run.is_some_and(|run| run.is_open() && run.count() < self.most)
    }

    /// What leaves, in order.
    pub fn iter(&self) -> impl Iterator<Item = Planned<'_>> {
        self.groups.iter().map(|group| Planned { group, packets: &self.packets })
    }
}

/// Packets that leave as one, or one packet.
#[derive(Clone, Copy, Debug)]
pub struct Planned<'p> {
    group: &'p Group,
    packets: &'p [Packet],
}

impl<'p> Planned<'p> {
    /// How they are merged, if there are several.
    #[must_use]
    pub fn run(&self) -> Option<&'p Run> {
        self.group.run.as_ref().filter(|run| run.count() > 1)
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.run().map_or(1, Run::count)
    }

    /// The number of the first, to which [`Run::head`] belongs.
    #[must_use]
    pub fn first(&self) -> usize {
        self.numbers().next().unwrap_or_default()
    }

    /// Their numbers, in order.
    pub fn numbers(&self) -> impl Iterator<Item = usize> + use<'p> {
        let packets = self.packets;
        let at = |index: u32| packets.get(index as usize);
        core::iter::successors(at(self.group.first), move |packet| at(packet.next))
            .map(|packet| packet.number)
    }
}

//! What an instance that comes back knows when it must take over again.

use std::time::Duration;

use esp::{Reason, Verdict};

use crate::world::Pair;

/// More tunnels at an endpoint than one part of a snapshot is about.
const MANY: usize = 300;

// ha.md, "What is replicated": inbound window tops. Those of idle SAs are said once, when the shadow comes back, and
// overtake the snapshot that brings their SAs.
#[test]
fn what_was_accepted_before_a_shadow_came_back_is_refused_by_it() {
    let mut pair = Pair::with_connections(MANY);
    pair.kill(1);
    pair.run(Duration::from_millis(300));
    let recorded = pair.packets();
    let verdicts = pair.receive(0, &recorded);
    assert!(verdicts.iter().all(delivered));
    pair.run(Duration::from_millis(50));
    pair.revive(1);
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.owners(), ["left", "left"]);
    pair.kill(0);
    pair.run(Duration::from_millis(300));
    let verdicts = pair.receive(1, &recorded);
    assert_eq!(verdicts.iter().filter(|v| refused(v)).count(), MANY, "{:?}", verdicts.first());
    let newer = pair.packets();
    let verdicts = pair.receive(1, &newer);
    assert!(verdicts.iter().all(delivered));
}

// Tops are not acknowledged: what was under way when the stream broke is said again on the next.
#[test]
fn what_was_said_into_a_broken_stream_is_said_again() {
    let mut pair = Pair::with_connections(3);
    let recorded = pair.packets();
    // As they come to the owners of the two endpoints, whichever those packets are for.
    let here = pair.receive(0, &recorded);
    let there = pair.receive(1, &recorded);
    assert!(here.iter().zip(&there).all(|(a, b)| delivered(a) != delivered(b)));
    pair.break_stream();
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.owners(), ["left", "right"]);
    pair.kill(0);
    pair.run(Duration::from_millis(300));
    assert!(pair.receive(1, &recorded).iter().all(refused));
}

fn delivered(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Deliver { .. })
}

fn refused(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Drop(Reason::Replayed | Reason::TooOld))
}
